"""Rebinds while senders add messages and delivery workers take them away: exactly once, on both engines."""

import json
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from itertools import chain, count
from typing import Any
from urllib.parse import urlencode

import pytest
import requests
from databases import contents, engine_for, history, locked, logged, names, run_sql, stored
from factories import ask, connected_to, counts, message, set_data
from services import PATH, ROOT, SITE_POLICY, Service, Start
from sqlalchemy import Connection, text
from waiting import until

from delivery import Outcome, claim, settle
from message import Message
from moving import BATCH
from queues import QueueRegistry
from rebinding import RebindResult

SECONDS = 10
SEED = 7


@dataclass(frozen=True)
class Asked:
    """A request that was answered."""

    key: str
    """Its Idempotency-Key."""
    query: dict[str, Any]
    data: dict[str, str]
    event: bool
    answer: dict[str, str]
    """The headers of the answer that are ours, without `Rebind-`."""

    @property
    def id(self) -> str:
        return self.answer["Id"]

    @property
    def matched(self) -> int:
        return int(self.answer["Matched"])


def test_the_ledger_is_exact_while_messages_come_and_go_and_operators_retry_and_undo(
    service: Service, queues: QueueRegistry, url: str, start: Start
) -> None:
    """Two hosts' worth of gunicorn and four operators, two senders and three workers; then the ledger."""
    hosts = [service, start(REBIND_POLICY=SITE_POLICY)]
    parties = [party("send", url, 1), party("send", url, 2), *(party("work", url, n) for n in (3, 4, 5))]
    until(lambda: bool(stored(url)))
    asked: list[Asked] = []
    with ThreadPoolExecutor(4) as pool:
        for operating in [pool.submit(operate, hosts, seed, asked) for seed in range(4)]:
            operating.result()
    sent_1, sent_2, *taken_by = [json.loads(each.communicate(timeout=60)[0]) for each in parties]

    taken, left = dict(chain(*taken_by)), {row["id"]: row for row in stored(url)}
    ids = [*chain(*([id for id, _ in pairs] for pairs in taken_by)), *left]
    assert Counter(sent_1 + sent_2) == Counter(ids), "none is lost, none is doubled"

    rows = history(url)
    columns = {"Id": "rebind_id", "Matched": "matched", "Moved": "moved", "Flushed": "flushed", "Left": "left_alone"}
    answers = {
        row["idempotency_key"]: {name: f"{row[of]}" for name, of in columns.items() if row[of] is not None}
        for row in rows
    }
    assert (len(rows), answers) == (len(asked), {each.key: each.answer for each in asked}), "each key has one row"

    records = defaultdict(list)
    for record in logged(url):
        if record["type"] == "AdminRebind":
            records[record["rebind_id"]].append(record)
    of_id = {each.id: each for each in asked}
    last: dict[str, dict[str, Any]] = {}
    for row in rows:
        enter(last, of_id[row["rebind_id"]], records.pop(row["rebind_id"], []))
    assert not records
    assert {id: (row["queue"], row["meta"]) for id, row in left.items() if id in last} == {
        id: (record["queue"], record["meta"]) for id, record in last.items() if id in left
    }
    assert taken == {id: last[id]["meta"] if id in last else {} for id in taken}
    assert any("undo" in each.query and each.matched for each in asked)


def party(role: str, url: str, seed: int) -> subprocess.Popen[str]:
    """A sender or a worker, as a process of its own."""
    command = [sys.executable, "tests/traffic.py", role, url, str(SECONDS), str(SEED * 100 + seed)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def operate(hosts: list[Service], seed: int, asked: list[Asked]) -> None:
    """Ask for one rebind after the other, each with a mark, or for the undo of one of anybody's."""
    dice = random.Random(SEED * 1000 + seed)
    end = time.monotonic() + SECONDS
    for number in count():
        if time.monotonic() > end:
            return
        key = f"{seed}-{number}"
        query: dict[str, Any] = {"limit": 50} if dice.random() < 0.3 else {}
        data, event, criteria = {}, False, {}
        undoable = [each.id for each in asked[-20:] if each.matched]
        if undoable and dice.random() < 0.4:
            query["undo"] = dice.choice(undoable)
        else:
            event = dice.random() < 0.3
            data = {"queue": f"q{dice.randrange(5)}.example"} | ({"mark": key} if event else {key: "by data"})
            criteria = {"domain": f"q{dice.randrange(5)}.example"} if dice.random() < 0.8 else {}
        body = {"reason": "a test", "data": data, "trigger_rebind_event": event} | criteria
        answer = ask_until_answered(hosts, dice, f"{PATH}?{urlencode(query)}", json.dumps(body), key)
        asked.append(Asked(key, query, data, event, answer))


def ask_until_answered(hosts: list[Service], dice: random.Random, path: str, body: str, key: str) -> dict[str, str]:
    """Ask, and often go away before the answer comes, and ask again, or ask again though it came."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": f'"{key}"'}
    while dice.random() < 0.4:
        with closing(HTTPConnection(*dice.choice(hosts).address)) as client:
            client.request("POST", path, body, headers)
            client.sock.settimeout(dice.uniform(0.001, 0.1))
            with suppress(TimeoutError):
                client.sock.recv(1)
    answers = []
    for _ in range(dice.choice([1, 1, 2])):
        answer = requests.post(dice.choice(hosts).base + path, body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        ours = {name[7:]: value for name, value in answer.headers.items() if name.startswith("Rebind-")}
        answers.append(ours)
    assert answers == answers[:1] * len(answers)
    return answers[0]


def enter(last: dict[str, dict[str, Any]], asked: Asked, records: list[dict[str, Any]]) -> None:
    """Enter the next rebind: each record continues where its message's last one ended, as nothing else renames queues.

    last: the last record of each message. What an undo gives back is tested in test_model.py.
    """
    assert len({record["id"] for record in records}) == len(records) == asked.matched, "one record each"
    change = {"queue": asked.data["queue"], asked.data["mark"]: "by the event"} if asked.event else asked.data
    for record in records:
        before = last.get(record["id"], {"queue": record["old_queue"], "meta": {}})
        assert record["old_queue"] == before["queue"]
        if "undo" not in asked.query:
            assert record["meta"] == before["meta"] | change
        last[record["id"]] = record


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


@pytest.fixture
def rebinding(queues: QueueRegistry) -> Iterator[Callable[..., Future[RebindResult]]]:
    """Start a rebind; the event's handler does what a rebind without the event does."""
    with ThreadPoolExecutor(1) as pool, connected_to(set_data):
        yield partial(pool.submit, ask, queues)


Rebinding = Callable[..., Future[RebindResult]]


@pytest.mark.postgresql
def test_a_rebind_does_not_keep_workers_from_what_it_does_not_match(
    rebinding: Rebinding, queues: QueueRegistry, url: str
) -> None:
    matched = [message("a@matched.example") for _ in range(3)]
    queues.load([*matched, message("a@other.example", id="free")])
    with holding(url, matched[-1].id) as holder:
        rebound = rebinding({"queue": "new"}, domain="matched.example")
        until(lambda: len(holder.waiting()) == 1)
        assert [each.id for each in claim(10, lease=60)] == ["free"], "what the rebind holds is passed over"
    assert counts(rebound.result()) == (3, 3, 3)
    assert {row["id"] for row in stored(url) if row["queue"] == "new"} == {each.id for each in matched}


@pytest.mark.postgresql
@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_rebind_does_not_keep_senders_from_adding_contents(
    rebinding: Rebinding, queues: QueueRegistry, url: str, event: bool
) -> None:
    """A content refers to its message, whose key no rebind changes."""
    queues.load([message(id="first", due=1.0), message(id="last", due=2.0)])
    run_sql(url, "DELETE FROM contents")
    with holding(url, "last") as holder:
        rebound = rebinding({"queue": "new"}, limit=2, trigger_rebind_event=event)
        until(lambda: len(holder.waiting()) == 1)
        run_sql(url, "INSERT INTO contents VALUES ('first', 'Hello')")
    assert counts(rebound.result()) == (2, 2, 2)
    assert contents(url) == {"first": b"Hello"}


@pytest.mark.postgresql
def test_a_worker_that_waits_for_a_rebind_finds_what_the_rebind_did(queues: QueueRegistry, url: str) -> None:
    queues.load([message(id="m")])
    (claimed,) = claim(1, lease=60)
    with ThreadPoolExecutor() as pool, holding(url, "m") as holder:
        written = pool.submit(settle, claimed, [Outcome("TransientFailure", ["ada@example.com"], {})], 4e9)
        until(lambda: len(holder.waiting()) == 1)
        holder.db.execute(text("UPDATE messages SET queue = 'new', due = 1"))
        holder.db.commit()
        assert written.result()
    assert [(row["queue"], row["due"], row["num_attempts"]) for row in stored(url)] == [("new", 1, 1)]


@pytest.mark.postgresql
@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_deadlock_with_a_worker_does_not_reach_the_client(
    rebinding: Rebinding, queues: QueueRegistry, url: str, event: bool
) -> None:
    queues.load([message() for _ in range(2)])
    last = last_stored(url)
    (first,) = {row["id"] for row in stored(url)} - {last}
    with holding(url, last) as holder:
        rebound = rebinding({"queue": "new"}, trigger_rebind_event=event)
        until(lambda: len(holder.waiting()) == 1)
        # The rebind holds the first and waits for the last; now this worker waits for the first. It waits longer than
        # the rebind before it looks for a deadlock, so that the rebind is the one that is ended.
        holder.db.execute(text("SET LOCAL deadlock_timeout = '30s'"))
        holder.db.execute(text("UPDATE messages SET num_attempts = 9 WHERE id = :id"), {"id": first})
        holder.db.commit()
        assert counts(rebound.result()) == (2, 2, 2)
    attempts = {row["id"]: (row["queue"], row["num_attempts"]) for row in stored(url)}
    assert attempts == {first: ("new", 9), last: ("new", 0)}
    assert len(logged(url)) == 2


@pytest.mark.postgresql
def test_the_event_finds_each_message_as_a_worker_left_it(queues: QueueRegistry, url: str) -> None:
    """A rebind locks a message when it comes to it. One that was delivered before that is not there any more.

    When the first handler is called, the server has locked the first messages. A worker changes two of the others.
    """
    new = [message() for _ in range(3 * BATCH)]
    queues.load(new)
    gone, tried = "", ""

    def work(message: Message, data: dict[str, str]) -> None:
        nonlocal gone, tried
        message.meta["queue"] = "new"
        if not gone:
            with engine_for(url).begin() as db:
                gone, tried, *_ = db.scalars(text("SELECT id FROM messages FOR UPDATE SKIP LOCKED"))
                db.execute(text("DELETE FROM messages WHERE id = :id"), {"id": gone})
                db.execute(text("UPDATE messages SET num_attempts = 7 WHERE id = :id"), {"id": tried})

    with connected_to(work):
        result = ask(queues, domain="example.com", trigger_rebind_event=True)
    assert counts(result) == (len(new) - 1,) * 3
    left = {each.id for each in new} - {gone}
    assert {row["id"] for row in stored(url)} == {row["id"] for row in logged(url)} == left
    assert {row["id"] for row in stored(url) if row["num_attempts"] == 7} == {tried}
    assert set(names(url)) == {"new"}
