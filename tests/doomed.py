"""Rebinds in processes that kill themselves (-9) at a point of the test's choice. See test_faults.py.

`python tests/doomed.py URL` reads points from standard input, one a line, and forks for each a process that rebinds
queue `a` to `b` and kills itself there: before its statement N, before its `commit`, or `after` it. The line
`data 3` is a rebind by `data`, `event 3` one by the event. For each line it prints what the process ended with: the
number of the signal, negative, or 0 where it did not come to the point.
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import slow_policy  # noqa: F401
from sqlalchemy import Engine, event

from history import RebindRequest
from names import Criteria
from queues import registry


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rebind_and_die(url: str, way: str, point: str) -> None:
    registry.bind(url, busy_timeout=30)
    registry.prepare()
    statements = count()
    if point == "commit":
        event.listen(Engine, "commit", die)
    elif point != "after":
        event.listen(Engine, "before_cursor_execute", lambda *_: die() if next(statements) == int(point) else None)
    data, by_event = ({"wait_at": ""}, True) if way == "event" else ({"queue": "b"}, False)
    registry.rebind(RebindRequest("doomed", data, Criteria(domain="a"), trigger_rebind_event=by_event))
    if point == "after":
        die()


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if not child:
            rebind_and_die(sys.argv[1], *line.split())
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
