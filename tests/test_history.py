"""Tests of the history: undo, requests that are sent again, what records say, and following the log."""

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from databases import (
    engine_for,
    history,
    listening,
    logged,
    metas,
    names,
    new_database,
    nothing_changes,
    run_sql,
    stored,
)
from factories import ask, counts, message
from sqlalchemy import Connection, insert, make_url, text, update
from waiting import PATIENCE

import deliverylog
import tables
from delivery import claim, delivered
from deliverylog import LogFilter
from event import HandlerFailed, rebind
from history import NODEID, KeyReused, NothingToUndo, UnknownRebind
from message import Message
from queues import QueueRegistry
from rebinding import Move, Plan, RebindResult
from store import StoreRefused
from tables import FIRST_SECOND, LAST_SECOND

METAS: list[dict[str, Any]] = [
    {"é": []},
    {"campaign": "c", "n": {"a": [1, None, {}]}},
    {"tenant": "t", "n": None},
    {"queue": "pinned", "n": "x", "é": 1.5, 'q"\\': {}},
]


def change_all(message: Message, data: dict[str, str]) -> None:
    """A handler that changes all that a handler may change: keys are added, removed and changed in their depth."""
    if "é" in message.meta:
        del message.meta["é"]
    if isinstance(message.meta.get("n"), dict):
        message.meta["n"]["a"][2]["deep"] = True
    else:
        message.meta["n"] = [1]
    message.meta |= {"campaign": "new", "added": None}
    message.sender, message.recipient = "", ["cyd@c.example", "ada@a.example"]


def replace_recipient(message: Message, data: dict[str, str]) -> None:
    message.recipient = [data["to"]]


def leave_alone(message: Message, data: dict[str, str]) -> None:
    pass


EVERY_WAY = pytest.mark.parametrize(
    "fields",
    [
        {"data": {"campaign": "new", "n": "1"}},
        {"unset": ("campaign", "tenant", "queue", "n", "é")},
        {"data": {"campaign": "new"}, "unset": ("queue", "n")},
        {"data": {"campaign": "new", 'q"\\': "odd"}},
        {"data": {"campaign": "new"} | {f"k{number}": "many" for number in range(100)}},
        {"trigger_rebind_event": True},
    ],
    ids=["data", "unset", "data and unset", "an odd key", "many keys", "event"],
)


@pytest.fixture(autouse=True)
def _handler(queues: QueueRegistry) -> Iterator[None]:
    with rebind.connected_to(change_all):
        yield


def undo(queues: QueueRegistry, first: RebindResult, **fields: Any) -> RebindResult:
    """Ask for the undo of a rebind."""
    return ask(queues, undo=first.rebind_id, **fields)


def states(url: str) -> list[dict[str, Any]]:
    """The stored messages without `due`, which no undo restores."""
    return [{name: value for name, value in row.items() if name != "due"} for row in stored(url)]


# Undo


@EVERY_WAY
def test_an_undo_gives_messages_back_what_they_had_and_its_undo_takes_it_again(
    queues: QueueRegistry, url: str, fields: dict[str, Any]
) -> None:
    queues.load(message(["ada@a.example", "bob@b.example"], meta=meta) for meta in METAS)
    before = states(url)
    first = ask(queues, **fields)
    after = states(url)
    second = undo(queues, first)
    assert states(url) == before
    assert second == RebindResult(len(METAS), first.moved, first.moved, 0, second.rebind_id)
    third = undo(queues, second)
    assert states(url) == after
    assert third == replace(second, rebind_id=third.rebind_id)


def test_an_undo_does_not_restore_due(queues: QueueRegistry, url: str) -> None:
    queues.load([message(due=4e9), message(meta={"queue": "pinned"}, due=5e9)])
    first = ask(queues, {"tenant": "t"}, always_flush=True)
    run_sql(url, "UPDATE messages SET due = 4e9")
    assert counts(undo(queues, first)) == (2, 1, 1)
    assert [row["due"] == 4e9 for row in stored(url)] == [False, True]


def test_an_undo_may_flush_all_that_it_handles(queues: QueueRegistry, url: str) -> None:
    queues.load([message(due=4e9)])
    first = ask(queues, {"note": "x"})
    assert counts(undo(queues, first, always_flush=True)) == (1, 0, 1)
    assert stored(url)[0]["due"] < 4e9


def test_messages_that_moved_on_or_are_gone_are_left_alone(queues: QueueRegistry, url: str) -> None:
    queues.load(message(meta={"tenant": tenant}) for tenant in ("stays", "moves", "goes"))
    first = ask(queues, {"campaign": "c"})
    ask(queues, {"queue": "on"}, tenant="moves")
    run_sql(url, "DELETE FROM messages WHERE queue = 'c:goes@example.com'")
    second = undo(queues, first)
    assert (counts(second), second.left) == ((1, 1, 1), 2)
    assert metas(url) == [{"tenant": "stays"}, {"tenant": "moves", "campaign": "c", "queue": "on"}]


def test_what_others_changed_since_stays(queues: QueueRegistry, url: str) -> None:
    queues.load([message(meta={"a": "old", "b": "old"})])
    first = ask(queues, {"a": "first"})
    ask(queues, {"a": "second", "b": "second", "c": "second"})
    undo(queues, first)
    assert metas(url) == [{"a": "old", "b": "second", "c": "second"}]


def test_a_message_that_a_handler_left_alone_is_left_alone_by_an_undo_too(queues: QueueRegistry, url: str) -> None:
    """The keys of `data` are what its record changed only if no handler was called."""
    queues.load([message(meta={"note": "old"})])
    rebind.disconnect(change_all)
    with rebind.connected_to(leave_alone):
        first = ask(queues, {"note": "first"}, trigger_rebind_event=True)
    assert [record["meta"] for record in logged(url)] == [{"note": "old"}]
    ask(queues, {"note": "second"})
    assert counts(undo(queues, first)) == (0, 0, 0)
    assert metas(url) == [{"note": "second"}]


def test_the_first_rebind_of_a_store_is_undone_as_a_whole(queues: QueueRegistry, url: str, tmp_path: Path) -> None:
    with new_database(url, tmp_path) as new:
        queues.bind(new, busy_timeout=PATIENCE)
        queues.prepare()
        queues.load([message(), message()])
        assert counts(undo(queues, ask(queues, {"tenant": "t"}))) == (2, 2, 2)
        queues.database.close()
        engine_for(new).dispose()


@pytest.mark.sqlite
@pytest.mark.parametrize("key", ["key", "an odd key"])
def test_records_of_a_rebind_are_found_by_their_keys_and_not_by_reading_the_whole_log(
    queues: QueueRegistry, key: str
) -> None:
    queues.load([message()])
    first = ask(queues, {key: "1"})
    plans = []

    def explain(db: Connection, _: Any, statement: str, parameters: Any, *__: Any) -> None:
        if first.rebind_id in parameters and re.search(r"\blog\b", statement):
            driver: Any = db.connection.driver_connection
            plans.append(str(driver.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()))

    with listening("before_cursor_execute", explain):
        list(queues.records(wanted=LogFilter(rebind_id=first.rebind_id)))
        assert undo(queues, first).matched == 1
    assert len(plans) > 2
    assert [plan for plan in plans if "SEARCH log USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)" not in plan] == []


@pytest.mark.postgresql
def test_an_undo_passes_over_what_a_worker_wrote_while_the_rebind_ran(queues: QueueRegistry, url: str) -> None:
    """The worker's record has a key between those of the rebind. In SQLite there is one writer at a time."""
    queues.load([message(), message(meta={"queue": "of the worker"})])
    (claimed,) = [each for each in claim(2, lease=60) if each.queue == "of the worker"]
    rebind.disconnect(change_all)

    def move(message: Message, data: dict[str, str]) -> None:
        delivered(claimed, {})
        message.meta["tenant"] = "t"

    with rebind.connected_to(move):
        first = ask(queues, domain="example.com", trigger_rebind_event=True)
    assert [record["type"] for record in queues.records()] == ["Delivery", "AdminRebind"]
    second = undo(queues, first)
    assert (counts(second), second.left) == ((1, 1, 1), 0)


def test_recipients_whom_a_worker_has_served_since_do_not_come_back(queues: QueueRegistry, url: str) -> None:
    queues.load([message(["ada@a.example", "bob@b.example"]) for _ in range(2)])
    first = ask(queues, trigger_rebind_event=True)
    served = update(tables.messages).where(tables.messages.c.id == stored(url)[0]["id"])
    with queues.database.begin_write() as db:
        db.execute(served.values(recipient="ada@a.example", domain="a.example"))
    assert counts(undo(queues, first)) == (2, 2, 2)
    assert [(row["sender"], row["recipient"], row["queue"], row["meta"]) for row in stored(url)] == [
        ("news@acme.example", "ada@a.example", "a.example", {}),
        ("news@acme.example", ["ada@a.example", "bob@b.example"], "a.example", {}),
    ]


def test_a_sender_that_somebody_changed_since_stays(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    first = ask(queues, trigger_rebind_event=True)
    run_sql(url, "UPDATE messages SET sender = 'since@acme.example'")
    undo(queues, first)
    assert [(row["sender"], row["recipient"]) for row in stored(url)] == [("since@acme.example", "ada@example.com")]


def test_a_recipient_that_a_handler_set_as_a_list_of_one_is_replaced_again(queues: QueueRegistry, url: str) -> None:
    queues.load([message("ada@a.example")])
    rebind.disconnect(change_all)
    with rebind.connected_to(replace_recipient):
        first = ask(queues, {"to": "bob@b.example"}, trigger_rebind_event=True)
    undo(queues, first)
    assert [(row["recipient"], row["queue"]) for row in stored(url)] == [("ada@a.example", "a.example")]
    assert [record["recipient"] for record in logged(url)] == ["bob@b.example", "ada@a.example"]


@EVERY_WAY
def test_a_dry_run_of_an_undo_plans_what_it_would_do(queues: QueueRegistry, url: str, fields: dict[str, Any]) -> None:
    queues.load(message("ada@a.example", meta=meta) for meta in METAS)
    old = names(url)
    first = ask(queues, **fields)
    new = names(url)
    with nothing_changes(url):
        dry = undo(queues, first, dry_run=True)
    assert dry.plan
    assert sorted(dry.plan.moves) == sorted(Move(*pair, 1) for pair in zip(new, old, strict=True))
    assert replace(dry, plan=None) == replace(undo(queues, first), rebind_id=None)


@pytest.mark.parametrize(
    ("data", "moved", "left"), [({"queue": "q"}, 2, [0, 2, 4, 5]), ({"note": "x"}, 0, [0] * 4)], ids=["move", "stay"]
)
def test_an_undo_with_a_limit_takes_back_the_next_ones(
    queues: QueueRegistry, url: str, data: dict[str, str], moved: int, left: list[int]
) -> None:
    queues.load(message(id=id, due=due) for id, due in zip("12345", (5.0, 1.0, 4.0, 2.0, 3.0), strict=True))
    first = ask(queues, data)
    run_sql(url, "UPDATE messages SET due = 6e9 WHERE due > 1e9")
    results = [undo(queues, first, limit=2) for _ in left]
    assert [(result.matched, result.left) for result in results] == list(zip((2, 2, 1, 0), left, strict=True))
    assert results[0].moved == moved
    undone = [record["id"] for record in logged(url) if record["rebind_id"] == results[0].rebind_id]
    assert undone == (["1", "2"] if moved else ["2", "4"])  # those that moved are all due at the same time
    assert metas(url) == [{}] * 5


@pytest.mark.parametrize("way", [{"data": {"note": "x"}}, {"data": {"a note": "x"}}], ids=["by SQL", "by Python"])
def test_what_is_as_it_was_is_not_handled_again(queues: QueueRegistry, url: str, way: dict[str, Any]) -> None:
    queues.load([message(), message()])
    first = ask(queues, **way)
    assert undo(queues, first).matched == 2
    with nothing_changes(url):
        assert counts(undo(queues, first, dry_run=True)) == (0, 0, 0)
    assert counts(undo(queues, first, always_flush=True)) == (0, 0, 0)


def blank_sender(message: Message, data: dict[str, str]) -> None:
    message.sender = ""


def same_domain(message: Message, data: dict[str, str]) -> None:
    message.recipient = "bob@example.com"


@pytest.mark.parametrize("handler", [blank_sender, same_domain])
def test_an_undo_gives_back_the_envelope_alone(
    queues: QueueRegistry, url: str, handler: Callable[[Message, dict[str, str]], None]
) -> None:
    queues.load([message("ada@example.com")])
    before = states(url)
    rebind.disconnect(change_all)
    with rebind.connected_to(handler):
        first = ask(queues, trigger_rebind_event=True)
    assert states(url) != before
    assert counts(undo(queues, first)) == (1, 0, 0)
    assert states(url) == before


def test_criteria_of_an_undo_are_those_of_the_queues_in_which_messages_are_now(queues: QueueRegistry, url: str) -> None:
    queues.load(message(meta={"tenant": tenant}) for tenant in "abc")
    first = ask(queues, {"campaign": "new"})
    second = undo(queues, first, campaign="new", tenant="b")
    assert (counts(second), second.left) == ((1, 1, 1), 0)
    assert names(url) == ["new:a@example.com", "b@example.com", "new:c@example.com"]
    assert undo(queues, first, domain="elsewhere.example").matched == 0


@pytest.mark.parametrize("dry_run", [False, True], ids=["", "dry run"])
@pytest.mark.parametrize("id", ["0-0", "00000000-0000-4000-8000-000000000000"], ids=["no UUID", "a UUID of no time"])
def test_a_rebind_that_the_history_does_not_have_cannot_be_undone(
    queues: QueueRegistry, url: str, id: str, dry_run: bool
) -> None:
    with nothing_changes(url), pytest.raises(UnknownRebind, match=f"the history has no rebind {id}"):
        ask(queues, undo=id, dry_run=dry_run)


@pytest.mark.parametrize("why", ["suppressed", "nothing matched", "pruned"])
def test_a_rebind_without_records_cannot_be_undone(queues: QueueRegistry, url: str, why: str) -> None:
    queues.load([message()])
    domain = "elsewhere.example" if why == "nothing matched" else "example.com"
    first = ask(queues, {"tenant": "t"}, domain=domain, suppress_logging=why == "suppressed")
    if why == "pruned":
        run_sql(url, "DELETE FROM log")
    ask(queues, {"note": "of another rebind"})
    with nothing_changes(url), pytest.raises(NothingToUndo, match=f"the rebind {first.rebind_id} wrote no records"):
        undo(queues, first)


UNREADABLE = "1" * 5000  # the digits of a number that Python does not read


def test_an_undo_gives_back_numbers_digit_by_digit(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    meta = f'{{"n": [1.10, 12345678901234567890], "long": {UNREADABLE}}}'
    run_sql(url, f"UPDATE messages SET meta = '{meta}'")
    undo(queues, ask(queues, {"n": "1", "long": "1"}))
    with engine_for(url).connect() as db:
        found = db.exec_driver_sql("SELECT CAST(meta AS TEXT) FROM messages").scalar_one()
    assert json.loads(found, parse_int=str, parse_float=str) == json.loads(meta, parse_int=str, parse_float=str)


def test_an_undo_is_refused_if_python_must_read_what_the_message_was_and_cannot(
    queues: QueueRegistry, url: str
) -> None:
    queues.load([message(id="odd"), message()])
    run_sql(url, f"""UPDATE messages SET meta = '{{"a key": {UNREADABLE}}}' WHERE id = 'odd'""")
    first = ask(queues, {"a key": "1"})
    with nothing_changes(url), pytest.raises(StoreRefused, match=r"^message odd cannot get back what it had: "):
        undo(queues, first)


def test_keys_that_a_sender_escaped_come_back(queues: QueueRegistry, url: str) -> None:
    queues.load([message("ada@a.example")])
    meta = r"""{"\u0063ampaign": "c", "\u006e": null, "o": "\u00e9\""}"""
    run_sql(url, f"UPDATE messages SET queue = 'c:@a.example', meta = '{meta}'")
    undo(queues, ask(queues, {"campaign": "d", "n": "1", "o": "2"}))
    assert (names(url), metas(url)) == (["c:@a.example"], [{"campaign": "c", "n": None, "o": 'é"'}])


def test_an_undo_gives_back_a_recipient_that_only_a_sender_can_write(queues: QueueRegistry, url: str) -> None:
    queues.load([message(id="odd")])
    run_sql(url, "UPDATE messages SET recipient = 'Postmaster'")
    with rebind.connected_to(readdress):
        first = ask(queues, trigger_rebind_event=True)
    undo(queues, first)
    assert [row["recipient"] for row in stored(url)] == ["Postmaster"]


def readdress(message: Message, data: dict[str, str]) -> None:
    message.recipient = "ada@other.example"


# Requests that are sent again


@pytest.mark.parametrize("fields", [{}, {"domain": "elsewhere.example"}], ids=["", "nothing matched"])
def test_a_request_that_is_sent_again_gets_the_same_answer_and_does_nothing(
    queues: QueueRegistry, url: str, fields: dict[str, Any]
) -> None:
    queues.load([message()])
    first = ask(queues, {"tenant": "t", "a": "b"}, unset=("x", "y"), idempotency_key="k", **fields)
    queues.load([message()])
    with nothing_changes(url):
        assert ask(queues, {"a": "b", "tenant": "t"}, unset=("y", "x"), idempotency_key="k", **fields) == first


def test_an_undo_that_is_sent_again_gets_the_same_answer(queues: QueueRegistry, url: str) -> None:
    queues.load([message(), message("bob@gone.example")])
    first = ask(queues, {"tenant": "t"})
    run_sql(url, "DELETE FROM messages WHERE domain = 'gone.example'")
    second = undo(queues, first, idempotency_key="k")
    assert second.left == 1
    with nothing_changes(url):
        assert undo(queues, first, idempotency_key="k") == second


def test_an_event_that_is_asked_for_again_gets_the_same_answer_though_no_handler_is_connected_any_more(
    queues: QueueRegistry,
) -> None:
    queues.load([message()])
    first = ask(queues, trigger_rebind_event=True, idempotency_key="k")
    rebind.disconnect(change_all)
    assert ask(queues, trigger_rebind_event=True, idempotency_key="k") == first


@pytest.mark.parametrize(
    "other",
    [
        {"reason": "another"},
        {"data": {"tenant": "u"}},
        {"campaign": "c"},
        {"trigger_rebind_event": True},
        {"always_flush": True},
        {"suppress_logging": True},
        {"limit": 1},
        {"unset": ("campaign",)},
        {"data": {}, "undo": "0-0"},
        {"actor": "another"},
    ],
    ids=lambda other: " ".join(other),
)
def test_a_key_cannot_be_used_by_a_different_request(queues: QueueRegistry, url: str, other: dict[str, Any]) -> None:
    queues.load([message()])
    same: dict[str, Any] = {"data": {"tenant": "t"}, "idempotency_key": "k"}
    ask(queues, **same)
    with nothing_changes(url), pytest.raises(KeyReused):
        ask(queues, **(same | other))


def test_a_request_that_failed_does_not_use_its_key(queues: QueueRegistry) -> None:
    def fail(message: Message, data: dict[str, str]) -> None:
        raise RuntimeError("not today")

    queues.load([message()])
    with rebind.connected_to(fail), pytest.raises(HandlerFailed):
        ask(queues, trigger_rebind_event=True, idempotency_key="k")
    assert counts(ask(queues, {"tenant": "t"}, idempotency_key="k")) == (1, 1, 1)


def test_a_dry_run_neither_looks_at_its_key_nor_uses_it(queues: QueueRegistry) -> None:
    queues.load([message()])
    ask(queues, {"tenant": "a"}, idempotency_key="used")
    for key in ("used", "new"):
        planned = ask(queues, {"tenant": "b"}, idempotency_key=key, dry_run=True).plan
        assert planned == Plan(1, 1, [Move("a@example.com", "b@example.com", 1)], 0)
    assert counts(ask(queues, {"tenant": "b"}, idempotency_key="new")) == (1, 1, 1)


@pytest.mark.parametrize("way", ["data", "undo"])
def test_the_same_request_twice_at_once_is_done_once(queues: QueueRegistry, url: str, way: str) -> None:
    queues.load(message() for _ in range(3))
    first = ask(queues, {"note": "x"})
    fields: dict[str, Any] = {"data": {"tenant": "t"}} if way == "data" else {"undo": first.rebind_id}
    barrier = threading.Barrier(2)

    def send() -> RebindResult:
        host = QueueRegistry()
        host.bind(url, busy_timeout=PATIENCE)
        barrier.wait(PATIENCE)
        return ask(host, limit=1, idempotency_key="k", **fields)

    with ThreadPoolExecutor(2) as pool:
        one, other = [each.result() for each in [pool.submit(send), pool.submit(send)]]
    assert one == other
    assert one.matched == 1
    assert [record["rebind_id"] for record in logged(url)] == [first.rebind_id] * 3 + [one.rebind_id]
    assert [row["rebind_id"] for row in history(url)] == [first.rebind_id, one.rebind_id]


# What the history and records say


@pytest.mark.parametrize("suppressed", [False, True], ids=["", "suppressed"])
def test_the_history_says_who_asked_for_what_and_what_was_done(
    queues: QueueRegistry, url: str, suppressed: bool
) -> None:
    queues.load([message(meta={"campaign": "c"}), message()])
    result = ask(
        queues,
        {"tenant": "t", "é": ""},
        campaign="c",
        domain="Example.com",
        reason="why",
        actor="ada",
        always_flush=True,
        suppress_logging=suppressed,
        limit=5,
        unset=("z", "a"),
        idempotency_key="k",
    )
    (row,) = history(url)
    assert row == row | {
        "rebind_id": result.rebind_id,
        "actor": "ada",
        "nodeid": NODEID,
        "reason": "why",
        "request": {
            "reason": "why",
            "data": {"tenant": "t", "é": ""},
            "campaign": "c",
            "domain": "Example.com",
            "always_flush": True,
            "limit": 5,
            "unset": ["a", "z"],
        }
        | ({"suppress_logging": True} if suppressed else {}),
        "idempotency_key": "k",
        "matched": 1,
        "moved": 1,
        "flushed": 1,
        "left_alone": None,
    }
    assert row["event_time"] == stored(url)[0]["due"]


def test_the_history_says_what_an_undo_did(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    first = ask(queues, {"tenant": "t"})
    undo(queues, first, reason="a mistake")
    row = history(url)[-1]
    asked: dict[str, Any] = {"reason": "a mistake", "data": {}, "unset": [], "undo": first.rebind_id}
    assert (row["request"], row["matched"], row["moved"], row["flushed"], row["left_alone"]) == (asked, 1, 1, 1, 0)


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
        done.append(undo(queues, done[-1]) if fields is None else ask(queues, **fields))
        expected += [
            (row["sender"], row["recipient"], row["meta"], queue, row["queue"], done[-1].rebind_id)
            for row, queue in zip(stored(url), old, strict=True)
        ]
    said = ("sender", "recipient", "meta", "old_queue", "queue", "rebind_id")
    assert [tuple(record[name] for name in said) for record in logged(url)] == expected


def test_a_record_that_python_cannot_read_does_not_hide_others(queues: QueueRegistry, url: str) -> None:
    queues.load([message(id="huge"), message(id="other")])
    number = "1" * 5000
    run_sql(url, f"""UPDATE messages SET meta = '{{"n": {number}}}' WHERE id = 'huge'""")
    ask(queues, {"note": "x"})
    shown = {record["id"]: record["meta"] for record in queues.records()}
    assert shown["other"] == {"note": "x"}
    assert number in shown["huge"]


@pytest.mark.parametrize(
    ("details", "shown"),
    [
        pytest.param({"peer_address": {"name": "a", "addr": "::1"}, "site": "a", "tls_cipher": "x"}, None, id="taken"),
        pytest.param(dict.fromkeys(deliverylog.OWN_FIELDS, 99999), {}, id="what the columns say"),
        pytest.param({"peer_address": {"name": "a", "addr": "localhost."}}, {}, id="an address that is a name"),
        pytest.param({"peer_address": "::1"}, {}, id="an address that is not an object"),
        pytest.param([1], {}, id="a list"),
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

    real = queues.database.engine.writers_of_log
    monkeypatch.setattr(queues.database.engine, "writers_of_log", writers_of_log)
    monkeypatch.setattr(deliverylog, "time", SimpleNamespace(sleep=sleep))
    found: list[str] = []
    with pytest.raises(Ended):
        found.extend(record["id"] for record in queues.records(poll=1))
    return found


def delivery(id: str) -> Any:
    """The statement by which a worker writes a record."""
    record = {"type": "Delivery", "sender": "", "recipient": "ada@a.example", "queue": "q", "meta": {}, "nodeid": "n"}
    return insert(tables.log).values(record | {"id": id, "size": 0, "created": 1, "num_attempts": 1, "event_time": 2})


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
        queues.prepare()
        # A copy's tables have the same numbers.
        with new_database(url, tmp_path, f"TEMPLATE {make_url(ours).database}") as other:
            queues.load([message(id="m")])
            ask(queues)
            with engine_for(other).connect() as stranger:
                stranger.execute(delivery("stranger"))
                assert follow(queues, monkeypatch, iter(())) == ["m"]


@pytest.mark.postgresql
def test_who_only_prints_the_log_waits_for_nobody(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    with engine_for(url).connect() as writer:
        writer.execute(delivery("open"))
        ask(queues)
        assert [record["id"] for record in queues.records()] == [stored(url)[0]["id"]]
