"""Rebinds in processes that kill themselves (-9) at a point of the test's choice. See test_faults.py.

`python tests/doomed.py URL` reads from standard input one line of JSON for each process that it forks: the fields of
the request to rebind queue `a`, and the `point` at which the process kills itself: before its statement of this number,
before its "commit", or "after" it. For each line it prints what the process ended with: the number of the signal,
negative, or 0 if it did not come to the point.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psycopg
from sqlalchemy import Engine, event

from names import Criteria
from queues import registry
from rebinding import RebindRequest


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_each_statement(call: Callable[[], object]) -> Callable[[], None]:
    """Call this before each statement, whatever the connection. Returns what ends it.

    SQLAlchemy does not tell its listeners about statements that are given to psycopg itself.
    """

    def listener(*_: Any) -> None:
        call()

    def execute(*arguments: Any, **options: Any) -> Any:
        call()
        return psycopg_execute(*arguments, **options)

    def end() -> None:
        event.remove(Engine, "before_cursor_execute", listener)
        psycopg.Connection.execute = psycopg_execute  # type: ignore[method-assign]

    psycopg_execute = psycopg.Connection.execute
    event.listen(Engine, "before_cursor_execute", listener)
    psycopg.Connection.execute = execute  # type: ignore[method-assign]
    return end


def rebind_and_die(url: str, point: str | int, **fields: Any) -> None:
    import site_policy  # noqa: F401 - its handlers are for this process alone

    registry.bind(url, busy_timeout=30)
    registry.database.prepare(create=True)
    if point == "commit":
        event.listen(Engine, "commit", die)
    elif point != "after":
        statements = count()
        before_each_statement(lambda: die() if next(statements) == point else None)
    registry.rebind(RebindRequest(criteria=Criteria(domain="a"), **fields))
    if point == "after":
        die()


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if not child:
            rebind_and_die(sys.argv[1], **json.loads(line))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
