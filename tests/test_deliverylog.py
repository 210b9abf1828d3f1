"""Tests of the delivery log: what records say, and who follows it or goes on after a key."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from databases import engine_for, history, listening, logged, names, new_database, nothing_changes, stored
from factories import METAS, ask, change_all, connected_to, message, undo
from sqlalchemy import insert, make_url, text
from terminal import Flask
from waiting import PATIENCE

import deliverylog
import tables
from history import NODEID, NothingToUndo, UnknownRebind
from queues import QueueRegistry
from rebinding import RebindResult
from store import StoreUnavailable
from tables import FIRST_SECOND, LAST_SECOND


def test_records_say_what_each_rebind_made_of_a_message_whatever_became_of_it_later(
    queues: QueueRegistry, url: str
) -> None:
    queues.load(message(["ada@a.example", "bob@b.example"], meta=meta) for meta in METAS)
    done: list[RebindResult] = []
    expected = []
    ways: list[dict[str, Any] | None] = [  # None is an undo of the one before
        {"data": {"campaign": "x", "n": "1"}},
        {"data": {"tenant": "y"}, "unset": ("queue", "n")},
        {"trigger_rebind_event": True},
        None,
        None,
        {},
    ]
    for fields in ways:
        old = names(url)
        with connected_to(change_all):
            done.append(undo(queues, done[-1]) if fields is None else ask(queues, **fields))
        expected += [
            (row["sender"], row["recipient"], row["meta"], queue, row["queue"], done[-1].rebind_id)
            for row, queue in zip(stored(url), old, strict=True)
        ]
    said = ("sender", "recipient", "meta", "old_queue", "queue", "rebind_id")
    assert [tuple(record[name] for name in said) for record in logged(url)] == expected


ADDRESSES = ["192.0.2.1", "192.0.2.1:25", "[2001:db8::1]:25", "/run/smtp"]
NO_ADDRESSES = ["localhost.", "fe80::1%eth0", "[fe80::1%eth0]:25", "192.0.2.1:99999", "[2001:db8::1]", ""]


@pytest.mark.parametrize(
    ("details", "shown"),
    [
        pytest.param({"peer_address": {"name": "a", "addr": "::1"}, "site": "a", "tls_cipher": "x"}, None, id="taken"),
        pytest.param(dict.fromkeys(deliverylog.OWN_FIELDS, 99999), {}, id="what the columns say"),
        *(pytest.param({"peer_address": {"name": "a", "addr": addr}}, None, id=addr) for addr in ADDRESSES),
        *(pytest.param({"peer_address": {"name": "a", "addr": addr}}, {}, id=addr) for addr in NO_ADDRESSES),
        pytest.param({"peer_address": {"addr": "::1"}}, {}, id="an address without a name"),
        pytest.param({"peer_address": "::1"}, {}, id="an address that is not an object"),
    ],
)
def test_details_replace_defaults_and_nothing_that_a_reader_would_refuse(
    queues: QueueRegistry, url: str, details: Any, shown: dict[str, Any] | None
) -> None:
    """docs/contract.md, "Records"."""
    with engine_for(url).begin() as db:
        for row in ({}, {"details": details}):
            db.execute(delivery("m").values(row))
    plain, detailed = logged(url)
    assert detailed == plain | (details if shown is None else shown)


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        pytest.param({"num_attempts": 70_000}, {"num_attempts": 65535}, id="many attempts"),
        pytest.param({"num_attempts": -1, "size": -5}, {"num_attempts": 0, "size": 0}, id="less than nothing"),
        pytest.param(
            {"created": -0.5, "event_time": FIRST_SECOND},
            {
                "created": -1,
                "created_time": "1969-12-31T23:59:59.500000Z",
                "timestamp": FIRST_SECOND,
                "event_time": "0001-01-01T00:00:00.000000Z",
            },
            id="before 1970",
        ),
        pytest.param(
            {"created": LAST_SECOND},
            {"created": LAST_SECOND, "created_time": "9999-12-31T23:59:59.000000Z"},
            id="the last second",
        ),
    ],
)
def test_numbers_and_times_of_a_record_are_those_that_its_readers_take(
    queues: QueueRegistry, url: str, columns: dict[str, Any], shown: dict[str, Any]
) -> None:
    with engine_for(url).begin() as db:
        db.execute(delivery("m").values(columns))
    (record,) = logged(url)
    assert record == record | shown


# Following the log


class Ended(Exception):
    """The reader waits, and nothing more will happen."""


def follow(
    queues: QueueRegistry, monkeypatch: pytest.MonkeyPatch, steps: Iterator[Callable[[], Any]], at_looks: bool = False
) -> list[str]:
    """The ids of the records that a reader gets who follows the log, until it waits and no step is left.

    The next of `steps` happens each time that the reader waits, and with `at_looks` also before it looks for writers.
    """

    def end() -> None:
        raise Ended

    def sleep(_: float) -> None:
        next(steps, end)()

    def writers_of_log(db: Any) -> Any:
        if at_looks:
            next(steps, lambda: None)()
        return real(db)

    real = queues.database.backend.writers_of_log
    monkeypatch.setattr(queues.database.backend, "writers_of_log", writers_of_log)
    monkeypatch.setattr(deliverylog, "time", SimpleNamespace(sleep=sleep))
    found: list[str] = []
    with pytest.raises(Ended):
        found.extend(record["id"] for record in deliverylog.records(queues.database, poll=1))
    return found


def delivery(id: str) -> Any:
    """The statement by which a worker writes a record."""
    record = {"type": "Delivery", "sender": "", "recipient": "ada@a.example", "queue": "q", "meta": {}, "size": 0}
    others = {"nodeid": NODEID, "created": 1, "num_attempts": 1, "event_time": 2}
    return insert(tables.log).values(record | others | {"id": id})


LATER_WRITERS = "w1 w2 c2 w3 w4 c4 c1 c3"  # 3 and 4 write while the reader waits for 1


def orders() -> Iterator[str]:
    """Every order in which two transactions begin, write and commit; the first is the one that begins first."""
    for places in itertools.combinations(range(1, 6), 2):
        first, second = iter(["b1", "w1", "c1"]), iter(["b2", "w2", "c2"])
        yield " ".join(next(first if n in (0, *places) else second) for n in range(6))


@pytest.mark.postgresql
@pytest.mark.parametrize("at_looks", [False, True], ids=["while it waits", "before it looks"])
@pytest.mark.parametrize("order", [*orders(), LATER_WRITERS])
def test_a_record_comes_once_in_whatever_order_transactions_commit(
    queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch, order: str, at_looks: bool
) -> None:
    with ExitStack() as stack:
        writers = {number: stack.enter_context(engine_for(url).connect()) for number in "1234"}
        step: dict[str, Callable[[str], Any]] = {
            "b": lambda number: writers[number].execute(text("SELECT pg_current_xact_id()")),
            "w": lambda number: writers[number].execute(delivery(number)),
            "c": lambda number: writers[number].commit(),
        }
        steps = iter([partial(step[each[0]], each[1]) for each in order.split()])
        written = [each[1] for each in order.split() if each[0] == "w"]
        assert follow(queues, monkeypatch, steps, at_looks) == written


@pytest.mark.postgresql
def test_who_follows_the_log_does_not_wait_for_those_who_write_later_records(
    queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues.load([message(id="m")])
    with engine_for(url).connect() as earlier, engine_for(url).connect() as later:
        earlier.execute(delivery("earlier"))
        ask(queues)
        steps = iter([lambda: later.execute(delivery("later")), earlier.commit])
        assert follow(queues, monkeypatch, steps) == ["earlier", "m"]


STRANGERS = {
    "writes messages": "UPDATE messages SET sender = 'x'",
    "reads the log": "SELECT * FROM log",
    "is a rebind that has written nothing": "SELECT pg_advisory_xact_lock(hashtext('rebind'))",
}


@pytest.mark.postgresql
@pytest.mark.parametrize("statement", STRANGERS.values(), ids=STRANGERS)
def test_who_follows_the_log_does_not_wait_for_a_transaction_that(
    queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    queues.load([message()])
    with engine_for(url).connect() as db:
        db.execute(delivery("rolled back"))  # it leaves a gap
        db.rollback()
    ask(queues)
    with engine_for(url).connect() as stranger:
        stranger.execute(text("SELECT pg_current_xact_id()"))
        stranger.exec_driver_sql(statement)
        assert follow(queues, monkeypatch, iter(())) == [stored(url)[0]["id"]]


@pytest.mark.postgresql
def test_who_follows_the_log_does_not_wait_for_a_transaction_in_another_database(
    queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with new_database(url, tmp_path) as ours:
        queues.bind(ours, busy_timeout=PATIENCE)
        queues.database.prepare(create=True)
        # A copy's tables have the same numbers.
        with new_database(url, tmp_path, f"TEMPLATE {make_url(ours).database}") as other:
            queues.load([message(id="m")])
            ask(queues)
            with engine_for(other).connect() as stranger:
                stranger.execute(delivery("stranger"))
                assert follow(queues, monkeypatch, iter(())) == ["m"]


@pytest.mark.postgresql
def test_who_only_prints_the_log_waits_for_nobody(flask: Flask, queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    with engine_for(url).connect() as writer:
        writer.execute(delivery("open"))
        ask(queues)
        (line,) = flask("log")[1].splitlines()
        assert json.loads(line)["id"] == stored(url)[0]["id"]


# Pruning


@pytest.fixture
def prune(queues: QueueRegistry, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], tuple[int, int]]:
    """Prune what is there by now, at most two records in a transaction, and call what is given after each."""

    def prune(between: Callable[[], object]) -> tuple[int, int]:
        clock = itertools.count()  # by which each transaction takes a second

        def sleep(seconds: float) -> None:
            assert seconds == 1, "as long as the transaction took"
            between()

        monkeypatch.setattr(deliverylog, "PRUNED_AT_ONCE", 2)
        monkeypatch.setattr(deliverylog, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep))
        return deliverylog.prune(queues.database, before=time.time())

    return prune


def test_while_its_records_are_pruned_a_rebind_cannot_be_undone_and_its_history_goes_with_the_last(
    queues: QueueRegistry, url: str, prune: Callable[[Callable[[], object]], tuple[int, int]]
) -> None:
    """One that wrote no records leaves the history at the end."""
    queues.load([message() for _ in range(4)])
    first, suppressed = ask(queues, {"tenant": "t"}), ask(queues, suppress_logging=True)
    seen: list[Any] = []

    def look() -> None:
        with nothing_changes(url), pytest.raises((NothingToUndo, UnknownRebind)) as refused:
            undo(queues, first)
        seen.append((len(logged(url)), [row["rebind_id"] for row in history(url)], str(refused.value)))

    assert prune(look) == (4, 2)
    in_part = f"the rebind {first.rebind_id} cannot be undone: 2 of its 4 records are there"
    pruned = f"the history has no rebind {first.rebind_id}: it was never done, or it has been pruned"
    assert seen == [(2, [first.rebind_id, suppressed.rebind_id], in_part), (0, [suppressed.rebind_id], pruned)]
    assert history(url) == []


def test_a_prune_passes_over_what_stays_and_lets_others_write_after_each_of_its_transactions(
    queues: QueueRegistry, url: str, prune: Callable[[Callable[[], object]], tuple[int, int]]
) -> None:
    """Of 32 records, in groups of the same age, it removes 8, at most 2 in a transaction."""

    def write(event_time: float) -> None:
        with engine_for(url).begin() as db:
            db.execute(delivery("m").values(event_time=event_time))

    for event_time in [1] * 5 + [3e9] * 12 + [1] * 3 + [3e9] * 12:
        write(event_time)
    assert prune(lambda: write(4e9)) == (8, 0)
    assert len(logged(url)) == 32 - 8 + 5


def test_a_rebind_that_is_done_while_a_prune_runs_keeps_its_history_and_its_records(
    queues: QueueRegistry, url: str, prune: Callable[[Callable[[], object]], tuple[int, int]]
) -> None:
    """Its first record is among those that the next transaction looks at. The second rebind writes none."""
    queues.load([message() for _ in range(3)])
    ask(queues, {"tenant": "old"})
    later: list[RebindResult] = []

    def rebind() -> None:
        later.append(ask(queues, {"tenant": "new"}, suppress_logging=bool(later)))

    assert prune(rebind) == (3, 1)
    assert [row["rebind_id"] for row in history(url)] == [each.rebind_id for each in later]
    assert [record["rebind_id"] for record in logged(url)] == [later[0].rebind_id] * 3
    assert undo(queues, later[0]).matched == 3


def test_a_prune_without_room_goes_on_in_smaller_steps_and_says_what_it_has_removed(
    queues: QueueRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues.load(message() for _ in range(6))
    ask(queues)
    monkeypatch.setattr(deliverylog, "PRUNED_AT_ONCE", 4)
    monkeypatch.setattr(deliverylog, "FEWER", 2)
    is_full = iter([True, False, True])

    def fail(db: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE FROM log") and next(is_full):
            raise StoreUnavailable("disk is full")

    with listening("before_cursor_execute", fail), pytest.raises(StoreUnavailable) as failed:
        deliverylog.prune(queues.database, before=9e9)
    assert failed.value.in_full == "disk is full; 2 records and 0 rebinds were removed before"
    assert len([*deliverylog.records(queues.database)]) == 4
