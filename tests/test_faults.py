"""Faults in the middle of a rebind: killed workers, full disks, locks, clients that go away, damaged files.

After each, `outcome` looks from outside: no message is lost or doubled, and the rebind was done as a whole or not at
all, its records too; then `works_again` asks for the next rebind.
"""

import json
import os
import random
import resource
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psycopg
import pytest
import requests
from answers import done, is_problem, is_unavailable
from databases import contents, empty, engine_for, history, listening, logged, new_database, stored
from doomed import before_each_statement
from factories import ask, counts, message
from links import Link
from services import PATH, ROOT, Service, Start, workers
from slow import POLICY, SlowRebind, held
from sqlalchemy import make_url, text
from waiting import PATIENCE, until

from event import rebind
from message import Message
from moving import BATCH
from queues import QueueRegistry
from rebinding import RebindResult
from store import StoreUnavailable

SEED = 11
MOMENTS = 20  # at each of which a worker is killed
MESSAGES = 2 * BATCH + 200  # in queue `a`; the event's handlers get them in three batches
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


def outcome(before: Books, url: str, to: str = "b") -> Outcome:
    """What came of a rebind of queue `a`: all of it or nothing, and no message, record or row too many or too few."""
    after = books(url)
    if after == before:
        return "nothing"
    assert after.contents == before.contents
    assert [as_moved(row, to) for row in before.messages] == [row | {"due": None} for row in after.messages]
    dues = {row["due"] for row in after.messages if row["queue"] == to}
    assert len(dues) == 1, "all of them are due since the same moment"
    assert [row for row in after.messages if row["queue"] != to] == [r for r in before.messages if r["queue"] != "a"]
    assert after.records[: len(before.records)] == before.records
    new = after.records[len(before.records) :]
    assert [row["id"] for row in new] == [row["id"] for row in before.messages if row["queue"] == "a"], "one each"
    assert {(row["type"], row["old_queue"], row["queue"]) for row in new} == {("AdminRebind", "a", to)}
    assert after.history[:-1] == before.history
    assert {row["rebind_id"] for row in new} == {after.history[-1]["rebind_id"]}
    assert [after.history[-1][count] for count in ("matched", "moved", "flushed")] == [len(new)] * 3
    return "done"


def as_moved(row: dict[str, Any], to: str) -> dict[str, Any]:
    change = {"queue": to, "meta": {"queue": to}} if row["queue"] == "a" else {}
    return row | change | {"due": None}


def works_again(service: Service, url: str) -> None:
    """Assert that the next request does all it should."""
    before = books(url)
    answer = service.rebind(domain="b" if before.messages[0]["queue"] == "b" else "a", data={"queue": "next"})
    assert done(answer) == (MESSAGES,) * 3
    after = books(url)
    assert Counter(row["queue"] for row in after.messages) == {"next": MESSAGES, "other": BYSTANDERS}
    assert len(after.records) == len(before.records) + MESSAGES


@pytest.fixture
def before(queues: QueueRegistry, url: str) -> Books:
    """Messages to rebind, and some that are not; the books, before anything goes wrong."""
    return fill(queues, url)


def fill(queues: QueueRegistry, url: str, count: int = MESSAGES) -> Books:
    new = [message(meta={"queue": "a"}) for _ in range(count)]
    queues.load(new + [message(meta={"queue": "other"}) for _ in range(BYSTANDERS)])
    return books(url)


@pytest.fixture(scope="module")
def gunicorn(shared: Start) -> Service:
    """One worker, so that it is known which to kill, with the handler of slow_policy.py."""
    return shared("--workers", "1", REBIND_POLICY=POLICY)


def worker(service: Service) -> int:
    """The process id of gunicorn's one worker, when there is one."""
    until(lambda: len(workers(service)) == 1)
    return min(workers(service))


@contextmanager
def held_at(service: Service, folder: Path, before: Books, at: int, **options: Any) -> Iterator[SlowRebind]:
    """While this lasts, a rebind of queue `a` to `b` by the event waits in its handler, at message number `at`."""
    with held(service.rebind, before.messages[at]["id"], folder, domain="a", **options) as slow:
        yield slow


def came(answer: Future[requests.Response]) -> int | None:
    """The status of the answer, or None where the connection broke instead."""
    try:
        return answer.result().status_code
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        return None


# Killed


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(0, MOMENTS, 2))
def test_a_worker_that_is_killed_in_a_handler_leaves_nothing_of_the_rebind(
    service: Service, before: Books, url: str, tmp_path: Path, moment: int
) -> None:
    with held_at(service, tmp_path, before, at=random.Random(SEED + moment).randrange(MESSAGES)) as slow:
        os.kill(slow.worker, signal.SIGKILL)
        assert came(slow.answer) is None
    assert outcome(before, url) == "nothing"
    works_again(service, url)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, MOMENTS, 2))
def test_a_worker_that_is_killed_at_any_moment_leaves_all_of_the_rebind_or_nothing(
    service: Service, queues: QueueRegistry, url: str, moment: int
) -> None:
    """The delay is the fault, and waits for nothing: whenever it is over, the worker is killed."""
    fill(queues, url)
    begun = time.monotonic()
    service.rebind(domain="a", data={"queue": "a"}).raise_for_status()
    delay = random.Random(SEED + moment).uniform(0, 1.1) * (time.monotonic() - begun)
    victim, before = worker(service), books(url)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.rebind, domain="a", data={"queue": "b"})
        time.sleep(delay)
        os.kill(victim, signal.SIGKILL)
        status = came(answer)
    left = outcome(before, url)
    assert (status, left) in [(200, "done"), (None, "done"), (None, "nothing")]
    works_again(service, url)


Ask = dict[str, Any]
"""The fields of a RebindRequest."""


def to_undo(queues: QueueRegistry, url: str, count: int) -> tuple[Ask, Books]:
    """Messages that were rebound from `b` to `a`, and how to ask for an undo of that."""
    queues.load([message(meta={"queue": "b"}) for _ in range(count)])
    first = ask(queues, {"queue": "a", "new": "key"})
    queues.load([message(meta={"queue": "other"}) for _ in range(BYSTANDERS)])
    return {"data": {}, "undo": first.rebind_id}, books(url)


def to_rebind(queues: QueueRegistry, url: str, count: int, **fields: Any) -> tuple[Ask, Books]:
    """Messages in `a`, and how to ask for a rebind of them to `b`."""
    return {"data": {"queue": "b"}, **fields}, fill(queues, url, count)


# Each loads messages, and gives what to ask for so that those in `a` get to `b`, and the books before that.
WAYS: dict[str, Callable[[QueueRegistry, str, int], tuple[Ask, Books]]] = {
    "data": to_rebind,
    "event": partial(to_rebind, trigger_rebind_event=True),
    "undo": to_undo,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_kills_itself_leaves_all_or_nothing_and_the_retry_gives_the_one_answer(
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
    rebind.connect(move)
    answer = ask(queues, domain="a", **asked)
    assert (*counts(answer), answer.rebind_id) == (*[BATCH + 2] * 3, history(url)[-1]["rebind_id"])
    assert outcome(again[1], url) == "done"


# Statements that fail


def move(message: Message, data: dict[str, str]) -> None:
    message.meta["queue"] = data["queue"]


def attempted(queues: QueueRegistry, asked: Ask) -> RebindResult | Exception:
    """What comes of a rebind from `a` to `b`."""
    try:
        return ask(queues, domain="a", reason=LONG, **asked)
    except (StoreUnavailable, MemoryError) as error:
        return error


def driver_error(url: str) -> Exception:
    """An error as the database's driver raises it."""
    if url.startswith("postgresql"):
        return psycopg.OperationalError("as it was told")
    error = sqlite3.OperationalError("as it was told")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    return error


@pytest.mark.slow
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("memory", [False, True], ids=["operational", "memory"])
@pytest.mark.parametrize("way", ["data", "event", "undo"])
def test_whichever_statement_fails_nothing_is_changed_and_the_next_rebind_is_done(
    queues: QueueRegistry, url: str, way: str, memory: bool, for_good: bool
) -> None:
    rebind.connect(move)
    error = MemoryError() if memory else driver_error(url)
    for failing in count():
        empty(url)
        asked, before = WAYS[way](queues, url, 3)
        statements = count()

        def fail(failing: int = failing, statements: "count[int]" = statements) -> None:
            number = next(statements)
            if number == failing or (for_good and number > failing):
                raise error

        end = before_each_statement(fail)
        result = attempted(queues, asked)
        end()
        if isinstance(result, RebindResult):
            break
        assert isinstance(result, MemoryError if memory else StoreUnavailable)
        assert outcome(before, url) == "nothing", f"statement {failing} failed"
        again = attempted(queues, asked)
        assert isinstance(again, RebindResult)
        assert counts(again) == (3, 3, 3)
        assert outcome(before, url) == "done"
    assert failing > 4, "there were statements to fail"
    assert outcome(before, url) == "done"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.sqlite
def test_a_database_with_no_page_to_spare_changes_nothing_until_it_has(
    queues: QueueRegistry, tmp_path: Path, way: str
) -> None:
    """SQLITE_FULL, whichever page is the first that there is no room for."""
    url = f"sqlite:///{tmp_path / 'new.db'}"  # in which no page is free
    queues.bind(url, busy_timeout=30)
    queues.prepare()
    rebind.connect(move)
    asked, before = WAYS[way](queues, url, 300)

    def rebind_within(pages: int) -> RebindResult | Exception:
        """On a connection of its own: the limit is the connection's, and never less than what is used."""
        queues.bind(url, busy_timeout=30)
        with listening("connect", lambda connection, _: connection.execute(f"PRAGMA max_page_count = {pages}")):
            return attempted(queues, asked)

    with engine_for(url).connect() as db:
        used = int(db.scalar(text("PRAGMA page_count")) or 0)
    fulls = 0
    for pages in count(used):
        result = rebind_within(pages)
        if isinstance(result, RebindResult):
            break
        assert str(result) == "the database cannot do this now: database or disk is full"
        assert outcome(before, url) == "nothing"
        fulls += 1
    assert fulls > 0
    assert outcome(before, url) == "done"


# The disk is full


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(6))
@pytest.mark.sqlite
def test_where_files_may_not_grow_it_is_503_and_works_again_when_they_may(
    service: Service, before: Books, url: str, tmp_path: Path, moment: int
) -> None:
    """SQLITE_IOERR_WRITE: the worker's limit on the size of a file, which the test sets in the midst of its work."""
    dice = random.Random(SEED + moment)
    limit = dice.randrange(100_000, 400_000)  # bytes
    with held_at(service, tmp_path, before, at=dice.randrange(MESSAGES), reason=LONG) as slow:
        before_it = resource.prlimit(worker(service), resource.RLIMIT_FSIZE)
        resource.prlimit(worker(service), resource.RLIMIT_FSIZE, (limit, before_it[1]))
        assert is_unavailable(slow.let_go(), "the database cannot do this now: disk I/O error")
        assert is_unavailable(service.rebind(domain="a", data={"queue": "b"}, reason=LONG))
    assert outcome(before, url) == "nothing"
    resource.prlimit(worker(service), resource.RLIMIT_FSIZE, before_it)
    works_again(service, url)


SMALL = 24 * 2**20  # bytes of a disk that can be filled


@pytest.fixture
def small_disk(url: str) -> Iterator[tuple[str, Path]]:
    """A database of the same kind on a disk of its own, and the folder where the disk is mounted."""
    with TemporaryDirectory() as temporary:
        disk = Path(temporary) / "disk"
        disk.mkdir()
        Path(temporary).chmod(0o755)  # also for the user that PostgreSQL runs as
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL},mode=777", "rebind-test", str(disk)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("a disk of its own can be mounted by root alone")
        try:
            with tablespace(url, disk) as options, new_database(url, disk, options) as new:
                yield new, disk
                engine_for(new).dispose()
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextmanager
def tablespace(url: str, disk: Path) -> Iterator[str]:
    """What puts the tables of a new PostgreSQL database on the disk; SQLite's file needs nothing of the kind."""
    if url.startswith("sqlite"):
        yield ""
        return
    folder = disk / "tables"
    folder.mkdir()
    with engine_for(url).connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        data = Path(str(db.scalar(text("SHOW data_directory")))).stat()
        os.chown(folder, data.st_uid, data.st_gid)
        db.execute(text(f"CREATE TABLESPACE small LOCATION '{folder}'"))
        yield "TABLESPACE small"
        db.execute(text("DROP TABLESPACE small"))


def test_a_full_disk_is_503_and_works_again_when_there_is_room(
    small_disk: tuple[str, Path], queues: QueueRegistry, start: Start, tmp_path: Path
) -> None:
    """At one moment after another: before one of the event's first two batches is written, with less room each time."""
    url, disk = small_disk
    queues.bind(url, busy_timeout=30)
    queues.prepare()
    before = fill(queues, url)
    service = start("--workers", "1", url=url, REBIND_POLICY=POLICY)
    dice = random.Random(SEED)
    for room in (300_000, 0):
        folder = tmp_path / f"{room}"
        folder.mkdir()
        with held_at(service, folder, before, at=dice.randrange(2 * BATCH), reason=LONG) as slow:
            fill_up(disk, room)
            assert is_unavailable(slow.let_go())
        assert is_unavailable(service.rebind(domain="a", data={"queue": "b"}, reason=LONG))
        (disk / "filler").unlink()
        assert outcome(before, url) == "nothing"
    works_again(service, url)


def fill_up(disk: Path, room: int) -> None:
    """Use up the disk except for so many bytes."""

    def filled() -> bool:
        state = os.statvfs(disk)
        with (disk / "filler").open("wb") as filler, suppress(OSError):  # the server may be writing, too
            os.posix_fallocate(filler.fileno(), 0, state.f_bavail * state.f_frsize - room)
            return True
        return False

    until(filled)


# Locked by another process


HOLDER = """
import sys
from sqlalchemy import create_engine
db = create_engine(sys.argv[1]).raw_connection().driver_connection
for statement in sys.argv[2:]:
    db.execute(statement)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(url: str, *statements: str) -> Iterator[None]:
    """While this lasts, another process holds what it got by these statements; then it is killed."""
    command = [sys.executable, "-c", HOLDER, url, *statements]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        try:
            yield
        finally:
            holder.kill()


LOCKS = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"}


@pytest.mark.parametrize("seconds", ["0.2", "0"])
def test_a_database_that_another_process_locks_is_503_and_works_again_when_that_is_gone(
    before: Books, url: str, start: Start, seconds: str
) -> None:
    service = start(REBIND_BUSY_TIMEOUT=seconds)
    with another_process(url, LOCKS[make_url(url).get_backend_name()]):
        for _ in range(3):
            assert is_unavailable(service.rebind(domain="a", data={"queue": "b"}))
    assert outcome(before, url) == "nothing"
    works_again(service, url)


def test_a_service_that_starts_while_its_database_is_locked_works_when_it_no_longer_is(
    before: Books, url: str, start: Start
) -> None:
    at_start = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_lock(hashtext('rebind'))"}
    with another_process(url, at_start[make_url(url).get_backend_name()]):
        service = start(REBIND_BUSY_TIMEOUT="0.5")
        assert is_unavailable(service.rebind(domain="a", data={"queue": "b"}))
    assert outcome(before, url) == "nothing"
    works_again(service, url)


# Of another encoding


@pytest.mark.postgresql
def test_postgresql_is_asked_as_read_committed_whatever_its_default_is(queues: QueueRegistry, url: str) -> None:
    other = make_url(url).update_query_dict({"options": "-c default_transaction_isolation=serializable"})
    queues.bind(other.render_as_string(hide_password=False), busy_timeout=30)
    for begun in (queues.database.autocommit(), queues.database.begin_read(), queues.database.begin_write()):
        with begun as db:
            assert db.scalar(text("SHOW transaction_isolation")) == "read committed"


# The client goes away


def wire(service: Service, body: dict[str, Any]) -> bytes:
    content = json.dumps({"reason": "a test", "domain": "a"} | body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@contextmanager
def answered(service: Service) -> Iterator[None]:
    """At the end, wait until the service has done with one request more, whoever reads the answer."""
    line = f'"POST {PATH} HTTP/1.1" '
    done = service.output.read_text().count(line)
    yield
    until(lambda: service.output.read_text().count(line) == done + 1)


@pytest.mark.slow
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_rebind_whose_client_has_gone_is_finished(
    service: Service, before: Books, url: str, tmp_path: Path, reset: bool
) -> None:
    data = {"wait_at": before.messages[BATCH]["id"], "folder": str(tmp_path)}
    with answered(service):
        with socket.create_connection(service.address) as client:
            client.sendall(wire(service, {"data": data, "trigger_rebind_event": True}))
            until(lambda: any(tmp_path.glob("[0-9]*")))
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        (tmp_path / "go").touch()
    assert outcome(before, url) == "done"
    works_again(service, url)


# Two rebinds at once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"), [(("a", "b"), ("a", "c")), (("a", "b"), ("b", "a"))], ids=["same queue", "to and fro"]
)
def test_two_rebinds_at_once_come_to_the_same_as_one_after_the_other(
    shared: Start, queues: QueueRegistry, url: str, one: tuple[str, str], other: tuple[str, str]
) -> None:
    two_workers, barrier = shared(), threading.Barrier(2, timeout=PATIENCE)

    def rebind_pair(pair: tuple[str, str]) -> int:
        barrier.wait()
        answer = two_workers.rebind(domain=pair[0], data={"queue": pair[1]}, reason=f"{pair}")
        assert answer.status_code == 200, answer.text
        return int(answer.headers["Rebind-Moved"])

    seen = set()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(8):
            empty(url)
            queues.load(message(meta={"queue": queue}) for queue in "ab" * 300)
            moved = tuple(pool.map(rebind_pair, (one, other)))
            after = books(url)
            left = Counter(row["queue"] for row in after.messages)
            asked = {row["rebind_id"]: row["reason"] for row in after.history}
            recorded = Counter(asked[record["rebind_id"]] for record in after.records)
            assert recorded == Counter({f"{one}": moved[0], f"{other}": moved[1]})
            seen.add((moved, tuple(sorted(left.items()))))
    assert seen <= {in_turn(one, other), swapped(in_turn(other, one))}


Turn = tuple[tuple[int, ...], tuple[tuple[str, int], ...]]


def in_turn(first: tuple[str, str], second: tuple[str, str]) -> Turn:
    """How many each moves, and what is left, when one comes after the other."""
    left, moved = Counter({"a": 300, "b": 300}), []
    for source, to in (first, second):
        moved.append(left[source])
        left[to] += left.pop(source, 0)
    return tuple(moved), tuple(sorted((+left).items()))


def swapped(turn: Turn) -> Turn:
    return turn[0][::-1], turn[1]


# The connection is lost at the commit


@pytest.mark.postgresql
@pytest.mark.parametrize(("lost", "left"), [("to the server", "nothing"), ("to the client", "done")])
def test_where_the_connection_is_lost_at_the_commit_the_answer_says_that_it_may_have_been_done(
    before: Books, url: str, link: Link, start: Start, lost: str, left: Outcome
) -> None:
    service = start("--workers", "1", url=link.url)
    link.cuts = lost
    lost_answer = "the answer to the commit was lost: all was done or nothing; send it again with its Idempotency-Key"
    assert is_unavailable(service.rebind(domain="a", data={"queue": "b"}), lost_answer)
    assert outcome(before, url) == left
    works_again(service, url)


# Locks of this process on the file

CONNECT = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('SELECT * FROM messages').connection.close()"


@pytest.mark.sqlite
def test_a_store_that_is_prepared_again_is_not_taken_from_those_who_use_it(queues: QueueRegistry, url: str) -> None:
    """A process that opens and closes the file by itself loses its locks: SQLite, "How To Corrupt", section 2.2.

    Another process that ends its use then takes itself for the last, and removes the log (-wal) that is in use.
    """
    queues.load([message()])
    with engine_for(url).connect() as db:
        assert db.scalar(text("SELECT count(*) FROM messages")) == 1
        queues.bind(url, busy_timeout=PATIENCE)
        queues.prepare()
        file = str(make_url(url).database)
        subprocess.run([sys.executable, "-c", CONNECT, file], check=True)
        assert Path(f"{file}-wal").exists()


# The file is damaged


@pytest.fixture
def damaged(queues: QueueRegistry, tmp_path: Path) -> Callable[[str], Path]:
    """Copy a database, with one part of it overwritten."""
    whole = tmp_path / "whole.db"
    queues.bind(f"sqlite:///{whole}", busy_timeout=30)
    queues.prepare()
    queues.load(message(meta={"queue": "a"}) for _ in range(MESSAGES))
    with closing(sqlite3.connect(whole)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        root = dict(db.execute("SELECT name, rootpage FROM sqlite_master"))
        (size,) = db.execute("PRAGMA page_size").fetchone()

    def copy(part: str) -> Path:
        file, content = tmp_path / "damaged.db", whole.read_bytes()
        if part == "second half":
            content = content[: len(content) // 2]
        elif part == "schema":
            content = content[:100] + b"\xff" * (size - 100) + content[size:]
        else:
            start = (root[part] - 1) * size
            content = content[:start] + b"\xff" * size + content[start + size :]
        file.write_bytes(content)
        return file

    return copy


@pytest.mark.parametrize("part", ["second half", "schema", "messages", "messages_queue_due"])
@pytest.mark.sqlite
def test_a_damaged_database_stops_gunicorn_with_one_line_that_says_so(
    damaged: Callable[[str], Path], start: Start, part: str
) -> None:
    file = damaged(part)
    content = file.read_bytes()
    service = start(url=f"sqlite:///{file}")
    assert service.process.wait(30) != 0
    (line,) = service.output.read_text().splitlines()
    assert line.startswith(("rebind cannot start: the file is damaged", "rebind cannot start: the database is damaged"))
    assert file.read_bytes() == content


@pytest.mark.sqlite
def test_a_damaged_log_is_told_by_the_answer_and_leaves_the_messages_where_they_are(
    damaged: Callable[[str], Path], start: Start
) -> None:
    url = f"sqlite:///{damaged('log')}"
    before = stored(url)
    service = start(url=url)
    for _ in range(2):
        detail = "the file is damaged, or is not a database: database disk image is malformed"
        assert is_problem(service.rebind(data={"queue": "b"}), 500, detail)
    assert stored(url) == before
    assert done(service.rebind(data={"queue": "b"}, suppress_logging=True)) == (MESSAGES,) * 3
