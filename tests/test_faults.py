"""Faults at each moment of a rebind: killed processes, failing statements, cut connections, full databases.

After each, `outcome` looks from outside: no message is lost or doubled, and the rebind was done as a whole or not at
all, its records too; then the next rebind is done.
"""

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import psycopg
import pytest
from answers import done, is_unavailable
from databases import contents, empty, engine_for, history, listening, logged, run_sql, stored
from doomed import before_each_statement
from factories import ask, counts, message, set_data
from links import Link
from services import ROOT, Start
from sqlalchemy import text
from waiting import PATIENCE, until

from event import rebind
from moving import BATCH
from queues import QueueRegistry
from rebinding import RebindResult
from store import StoreUnavailable

BYSTANDERS = 10  # in another queue, that no rebind of the tests matches
LONG = "r" * 2000  # a reason that makes the records of a rebind larger than what there is room for


@dataclass(frozen=True)
class Books:
    """All that a database holds, as anybody may read it."""

    messages: list[dict[str, Any]]
    contents: dict[str, bytes]
    records: list[dict[str, Any]]
    history: list[dict[str, Any]]


def books(url: str) -> Books:
    """What is there when no transaction of anybody's is running, and sound as the database itself judges it."""
    if url.startswith("postgresql"):
        until(lambda: transactions(url) == 0)
    if url.startswith("sqlite"):
        with engine_for(url).connect() as db:
            assert db.execute(text("PRAGMA integrity_check")).all() == [("ok",)]
            assert db.execute(text("PRAGMA foreign_key_check")).all() == []
    return Books(stored(url), contents(url), logged(url), history(url))


def transactions(url: str) -> int:
    """How many transactions run in this PostgreSQL database, except this one."""
    running = "datname = current_database() AND backend_type = 'client backend' AND xact_start IS NOT NULL"
    with engine_for(url).connect() as db:
        others = text(f"SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND {running}")
        return int(db.scalar(others) or 0)


Outcome = Literal["done", "nothing"]


def outcome(before: Books, url: str) -> Outcome:
    """What came of a rebind from `a` to `b`: all of it or nothing, and no message, record or row more or less."""
    after = books(url)
    if after == before:
        return "nothing"
    assert after.contents == before.contents
    assert [as_moved(row) for row in before.messages] == [row | {"due": None} for row in after.messages]
    dues = {row["due"] for row in after.messages if row["queue"] == "b"}
    assert len(dues) == 1, "all of them are due since the same moment"
    assert [row for row in after.messages if row["queue"] != "b"] == [r for r in before.messages if r["queue"] != "a"]
    assert after.records[: len(before.records)] == before.records
    new = after.records[len(before.records) :]
    assert [row["id"] for row in new] == [row["id"] for row in before.messages if row["queue"] == "a"], "one each"
    assert {(row["type"], row["old_queue"], row["queue"]) for row in new} == {("AdminRebind", "a", "b")}
    assert after.history[:-1] == before.history
    assert {row["rebind_id"] for row in new} == {after.history[-1]["rebind_id"]}
    assert [after.history[-1][count] for count in ("matched", "moved", "flushed")] == [len(new)] * 3
    return "done"


def as_moved(row: dict[str, Any]) -> dict[str, Any]:
    change = {"queue": "b", "meta": {"queue": "b"}} if row["queue"] == "a" else {}
    return row | change | {"due": None}


def fill(queues: QueueRegistry, url: str, count: int) -> Books:
    """Load messages to rebind, and some that are not. Returns the books, before anything goes wrong."""
    new = [message(meta={"queue": "a"}) for _ in range(count)]
    queues.load(new + [message(meta={"queue": "other"}) for _ in range(BYSTANDERS)])
    return books(url)


# One rebind, at each of its statements

Ask = dict[str, Any]
"""The fields of a RebindRequest."""


def to_undo(queues: QueueRegistry, url: str, count: int) -> tuple[Ask, Books]:
    """Messages that were rebound from `b` to `a`, and how to ask for an undo of that."""
    queues.load([message(meta={"queue": "b"}) for _ in range(count)])
    first = ask(queues, {"queue": "a", "new": "key"})
    queues.load([message(meta={"queue": "other"}) for _ in range(BYSTANDERS)])
    return {"data": {}, "undo": first.rebind_id, "always_flush": True}, books(url)


def to_rebind(queues: QueueRegistry, url: str, count: int, **fields: Any) -> tuple[Ask, Books]:
    """Messages in `a`, and how to ask for a rebind of them to `b`."""
    return {"data": {"queue": "b"}, **fields}, fill(queues, url, count)


# Each loads messages, and gives what to ask for so that those in `a` get to `b`, and the books before that.
WAYS: dict[str, Callable[[QueueRegistry, str, int], tuple[Ask, Books]]] = {
    "data": to_rebind,
    "event": partial(to_rebind, trigger_rebind_event=True),
    "undo": to_undo,
}


def fail(url: str) -> None:
    """Raise an error as the database's driver does."""
    if url.startswith("postgresql"):
        raise psycopg.OperationalError("as it was told")
    error = sqlite3.OperationalError("as it was told")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    raise error


def no_memory(url: str) -> None:
    raise MemoryError


def cut(url: str) -> None:
    """Let the server end all other connections."""
    others = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
    run_sql(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")


Fault = Callable[[str], None]
FAULTS = [
    pytest.param(fail, False, id="an error"),
    pytest.param(fail, True, id="an error for good"),
    pytest.param(no_memory, False, id="out of memory"),
    pytest.param(no_memory, True, id="out of memory for good"),
    pytest.param(cut, False, id="a cut connection", marks=pytest.mark.postgresql),
]


def attempted(queues: QueueRegistry, asked: Ask) -> RebindResult | Exception:
    """What comes of a rebind from `a` to `b`."""
    try:
        return ask(queues, domain="a", reason=LONG, **asked)
    except (StoreUnavailable, MemoryError) as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "for_good"), FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_whichever_statement_fails_nothing_is_changed_and_the_next_rebind_is_done(
    queues: QueueRegistry, url: str, way: str, fault: Fault, for_good: bool
) -> None:
    rebind.connect(set_data)
    for failing in count():
        empty(url)
        asked, before = WAYS[way](queues, url, 3)
        statements = count()

        def strike(failing: int = failing, statements: "count[int]" = statements) -> None:
            number = next(statements)
            if number == failing or (for_good and number > failing):
                fault(url)

        end = before_each_statement(strike)
        result = attempted(queues, asked)
        end()
        if next(statements) <= failing:
            break
        assert isinstance(result, MemoryError if fault is no_memory else StoreUnavailable)
        assert outcome(before, url) == "nothing", f"at statement {failing}"
        again = attempted(queues, asked)
        assert isinstance(again, RebindResult)
        assert counts(again) == (3, 3, 3)
        assert outcome(before, url) == "done"
    assert failing > 4, "there were statements to fail"
    assert isinstance(result, RebindResult)
    assert outcome(before, url) == "done"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_is_killed_leaves_all_or_nothing_and_the_retry_gives_the_one_answer(
    queues: QueueRegistry, url: str, way: str
) -> None:
    """Before any statement, before the commit, and after it."""
    asked, before = WAYS[way](queues, url, BATCH + 2)
    asked |= {"reason": "a test", "actor": "me", "idempotency_key": "one"}
    command = [sys.executable, "tests/doomed.py", url]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as doomed:
        assert doomed.stdin
        assert doomed.stdout

        def killed(point: int | str) -> bool:
            print(json.dumps({"point": point, **asked}), file=doomed.stdin, flush=True)
            ended = int(doomed.stdout.readline())  # type: ignore[union-attr]
            assert ended in (-signal.SIGKILL, 0)
            return ended == -signal.SIGKILL

        assert killed("commit")
        assert outcome(before, url) == "nothing"
        for statement in count():
            if not killed(statement):
                break
            assert outcome(before, url) == "nothing", f"killed before statement {statement}"
        assert statement > 4, "there were statements to kill it before"
        assert outcome(before, url) == "done"

        empty(url)
        asked |= (again := WAYS[way](queues, url, BATCH + 2))[0]
        assert killed("after")
        assert outcome(again[1], url) == "done"
        doomed.stdin.close()
    rebind.connect(set_data)
    answer = ask(queues, domain="a", **asked)
    assert (*counts(answer), answer.rebind_id) == (*[BATCH + 2] * 3, history(url)[-1]["rebind_id"])
    assert outcome(again[1], url) == "done"


@pytest.mark.postgresql
@pytest.mark.parametrize(("lost", "left"), [("to the server", "nothing"), ("to the client", "done")])
def test_if_the_connection_is_lost_at_the_commit_the_answer_says_that_it_may_have_been_done(
    queues: QueueRegistry, url: str, link: Link, start: Start, lost: str, left: Outcome
) -> None:
    before = fill(queues, url, 3)
    service = start("--workers", "1", url=link.url)
    link.cuts = lost
    lost_answer = "the answer to the commit was lost: all was done or nothing; send it again with its Idempotency-Key"
    assert is_unavailable(service.rebind(domain="a", data={"queue": "b"}), lost_answer)
    assert outcome(before, url) == left
    assert done(service.rebind(domain="b" if left == "done" else "a", data={"queue": "next"})) == (3, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.sqlite
def test_a_database_with_no_page_to_spare_changes_nothing_until_it_has(
    queues: QueueRegistry, site: str, way: str
) -> None:
    """SQLITE_FULL, whichever page is the first that there is no room for."""
    queues.bind(site, busy_timeout=PATIENCE)  # in which no page is free
    queues.database.prepare(create=True)
    rebind.connect(set_data)
    asked, before = WAYS[way](queues, site, 300)

    def rebind_within(pages: int) -> RebindResult | Exception:
        """On a connection of its own: the limit is the connection's, and never less than what is used."""
        queues.bind(site, busy_timeout=PATIENCE)
        with listening("connect", lambda connection, _: connection.execute(f"PRAGMA max_page_count = {pages}")):
            return attempted(queues, asked)

    with engine_for(site).connect() as db:
        used = int(db.scalar(text("PRAGMA page_count")) or 0)
    for pages in count(used):
        result = rebind_within(pages)
        if isinstance(result, RebindResult):
            break
        assert str(result) == "the database cannot do this now: database or disk is full"
        assert outcome(before, site) == "nothing"
    assert pages > used
    assert outcome(before, site) == "done"
