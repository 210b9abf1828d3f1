"""A rebind that takes as long as a test likes: its handler, in site_policy.py, waits in the middle of it."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from factories import message
from services import SITE_POLICY
from waiting import until

from moving import BATCH
from queues import QueueRegistry

POLICY = SITE_POLICY
MESSAGES = BATCH + 2  # the first batch is written, and the second is not, when the handler waits


@dataclass(frozen=True)
class SlowRebind:
    """A rebind from queue `a` to `b` that is being done."""

    worker: int
    """The process id of the gunicorn worker that does it."""
    answer: Future[requests.Response]
    folder: Path

    def let_go(self) -> requests.Response:
        """Let the handler go on, and wait for the answer."""
        (self.folder / "go").touch()
        return self.answer.result()


@contextmanager
def slow_rebind(
    ask: Callable[..., requests.Response], queues: QueueRegistry, folder: Path, **options: Any
) -> Iterator[SlowRebind]:
    """Load MESSAGES messages. While this lasts, a rebind of them by the event waits in its handler, at the last one.

    ask: sends the request; it takes the fields of the body.
    """
    new = [message(meta={"queue": "a"}) for _ in range(MESSAGES)]
    queues.load(new)
    data = {"queue": "b", "wait_at": new[-1].id, "folder": str(folder)}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, data=data, trigger_rebind_event=True, **options)
        try:
            until(lambda: answer.done() or any(folder.glob("[0-9]*")))
            assert not answer.done(), answer.result().text
            yield SlowRebind(int(next(folder.glob("[0-9]*")).name), answer, folder)
        finally:
            (folder / "go").touch()
