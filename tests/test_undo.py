"""Tests of undo. docs/contract.md, "Undo"."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from databases import engine_for, listening, logged, metas, names, new_database, nothing_changes, run_sql, stored
from factories import METAS, ask, change_all, connected_to, counts, message, set_data, undo
from sqlalchemy import Connection
from waiting import PATIENCE

import deliverylog
from delivery import Outcome, claim, settle
from deliverylog import LogFilter
from message import Message
from queues import QueueRegistry
from rebinding import Move, RebindResult


def by_event(queues: QueueRegistry, handler: Callable[..., None], **fields: Any) -> RebindResult:
    """Ask for a rebind by the event, with this handler."""
    with connected_to(handler):
        return ask(queues, trigger_rebind_event=True, **fields)


def setting(name: str, value: Any) -> Callable[..., None]:
    """A handler that sets this attribute of each message."""
    return lambda message, data: setattr(message, name, value)


# What messages get back


@pytest.mark.parametrize(
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
def test_an_undo_gives_messages_back_all_that_they_had_and_its_undo_takes_it_again(
    queues: QueueRegistry, url: str, fields: dict[str, Any]
) -> None:
    """A dry run plans that."""
    queues.load(message(["ada@a.example", "bob@b.example"], meta=meta) for meta in METAS)
    before, old = stored(url), names(url)
    with connected_to(change_all):
        first = ask(queues, **fields)
    after, new = stored(url), names(url)
    with nothing_changes(url):
        dry = undo(queues, first, dry_run=True)
    second = undo(queues, first)
    assert stored(url) == before
    assert dry.plan
    assert sorted(dry.plan.moves) == sorted(Move(*pair, 1) for pair in zip(new, old, strict=True) if pair[0] != pair[1])
    assert replace(dry, plan=None, rebind_id=second.rebind_id) == second
    assert second == RebindResult(len(METAS), first.moved, 0, 0, second.rebind_id)
    third = undo(queues, second)
    assert stored(url) == after
    assert third == replace(second, rebind_id=third.rebind_id)


def test_a_message_goes_back_into_the_queue_that_its_sender_chose(queues: QueueRegistry, url: str) -> None:
    queues.load([message(meta={"tenant": "t"}, queue="of another name")])
    assert counts(undo(queues, ask(queues, {"note": "x"}))) == (1, 1, 0)
    assert (names(url), metas(url)) == (["of another name"], [{"tenant": "t"}])


def test_metadata_comes_back_as_it_was_written_even_if_python_cannot_read_it(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    meta = rf'{{"\u006e": [1.10, 12345678901234567890], "long": {"1" * 5000}, "o": "\u00e9\""}}'
    run_sql(url, f"UPDATE messages SET meta = '{meta}'")
    undo(queues, ask(queues, {"n": "1", "long": "1", "o": "2"}))
    with engine_for(url).connect() as db:
        found = db.exec_driver_sql("SELECT CAST(meta AS TEXT) FROM messages").scalar_one()
    assert json.loads(found, parse_int=str, parse_float=str) == json.loads(meta, parse_int=str, parse_float=str)


@pytest.mark.parametrize("sent", ["Postmaster", '["ada@example.com", "bob@example.com"]'])
def test_a_recipient_comes_back_as_its_sender_wrote_it(queues: QueueRegistry, url: str, sent: str) -> None:
    queues.load([message()])
    run_sql(url, f"UPDATE messages SET recipient = '{sent}', domain = 'of.its.own'")
    before = stored(url)
    first = by_event(queues, setting("recipient", ["bob@example.com"]))
    assert (stored(url)[0]["recipient"], stored(url)[0]["domain"]) == ("bob@example.com", "example.com")
    undo(queues, first)
    assert stored(url) == before


# When they are due


def test_what_an_attempt_has_postponed_since_stays_postponed(queues: QueueRegistry, url: str) -> None:
    queues.load([message(due=5.0), message(due=6.0)])
    first = ask(queues, {"tenant": "t"})
    run_sql(url, "UPDATE messages SET due = 4e9")
    run_sql(url, f"UPDATE messages SET num_attempts = 1 WHERE id = '{stored(url)[0]['id']}'")
    assert counts(undo(queues, first)) == (2, 2, 0)
    assert [row["due"] for row in stored(url)] == [4e9, 6.0]


def test_a_message_is_still_flushed_only_if_nobody_has_postponed_it_since(queues: QueueRegistry, url: str) -> None:
    queues.load([message(due=4e9)])
    first = ask(queues, always_flush=True)
    run_sql(url, "UPDATE messages SET due = 7e9")
    second = undo(queues, first)
    assert (second.matched, second.left) == (0, 1)


# Which messages

CHANGED_SINCE = {
    "gone": "DELETE FROM messages",
    "moved on": "UPDATE messages SET queue = 'on'",
    "other metadata": """UPDATE messages SET meta = '{"tenant": "t", "note": "since"}'""",
}


@pytest.mark.parametrize("change", CHANGED_SINCE.values(), ids=CHANGED_SINCE)
@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_message_that_is_not_as_the_rebind_left_it_is_left_alone(
    queues: QueueRegistry, url: str, change: str, event: bool
) -> None:
    queues.load([message(), message(id="other")])
    with connected_to(set_data):
        first = ask(queues, {"tenant": "t"}, trigger_rebind_event=event)
    run_sql(url, f"{change} WHERE id = 'other'")
    since = [row for row in stored(url) if row["id"] == "other"]
    second = undo(queues, first)
    assert (counts(second), second.left) == ((1, 1, 0), 1)
    assert [row for row in stored(url) if row["id"] == "other"] == since


ENVELOPE_SINCE = {
    "an attempt": "num_attempts = 1",
    "a worker that holds it": "leased_until = 9e9",
    "another sender": "sender = 'since@acme.example'",
    "another recipient": "recipient = 'since@example.com'",
}


@pytest.mark.parametrize("change", ENVELOPE_SINCE.values(), ids=ENVELOPE_SINCE)
@pytest.mark.parametrize(("column", "value"), [("sender", ""), ("recipient", ["bob@example.com"])])
def test_a_new_envelope_is_taken_back_only_if_nobody_can_have_seen_it(
    queues: QueueRegistry, url: str, column: str, value: Any, change: str
) -> None:
    queues.load([message()])
    first = by_event(queues, setting(column, value))
    run_sql(url, f"UPDATE messages SET {change}")
    second = undo(queues, first)
    is_its_business = column in change or change.startswith(("num", "leased"))
    assert (second.matched, second.left) == ((0, 1) if is_its_business else (1, 0))


@pytest.mark.parametrize(
    ("meta", "fields"),
    [
        ({"tenant": "t", "é": [1.5]}, {"data": {"tenant": "t"}}),
        ({"tenant": "t"}, {"unset": ("campaign",)}),
        ({"tenant": "t"}, {"data": {}}),
        ({"tenant": "t"}, {"trigger_rebind_event": True, "data": {"tenant": "of no meaning"}}),
    ],
    ids=["set as it was", "nothing to unset", "nothing asked", "event"],
)
def test_what_the_rebind_matched_and_did_not_change_does_not_count(
    queues: QueueRegistry, url: str, meta: dict[str, Any], fields: dict[str, Any]
) -> None:
    queues.load([message(meta=meta)])
    cast = "jsonb" if url.startswith("postgresql") else "TEXT"
    run_sql(url, f"UPDATE messages SET meta = CAST(replace(CAST(meta AS TEXT), ':', ' : ') AS {cast})")
    with connected_to(lambda message, data: None):
        first = ask(queues, **fields)
    assert first.matched == 1
    run_sql(url, "UPDATE messages SET due = 7e9, queue = 'moved on'")
    second = undo(queues, first)
    assert (second.matched, second.left) == (0, 0)


def test_a_message_that_was_removed_and_loaded_again_is_the_same_message(queues: QueueRegistry, url: str) -> None:
    queues.load([message(id="m")])
    first = ask(queues, {"tenant": "t"})
    run_sql(url, "DELETE FROM messages")
    queues.load([message(id="m", meta={"tenant": "t"}, due=8e9)])
    assert counts(undo(queues, first)) == (1, 1, 0)
    assert (names(url), metas(url)) == (["example.com"], [{}])


def test_criteria_of_an_undo_are_those_of_the_queues_in_which_messages_are_now(queues: QueueRegistry, url: str) -> None:
    queues.load(message(meta={"tenant": tenant}) for tenant in "abc")
    first = ask(queues, {"campaign": "new"})
    second = undo(queues, first, campaign="new", tenant="b")
    assert (counts(second), second.left) == ((1, 1, 0), 0)
    assert names(url) == ["new:a@example.com", "b@example.com", "new:c@example.com"]
    assert undo(queues, first, domain="elsewhere.example").matched == 0


@pytest.mark.parametrize(
    ("fields", "first_ones"),
    [
        ({"data": {"queue": "q"}}, ["1", "2"]),
        ({"data": {"note": "x"}}, ["2", "4"]),
        ({"always_flush": True}, ["1", "2"]),
    ],
    ids=["move", "stay", "flush alone"],
)
def test_a_paced_undo_takes_back_the_next_ones_and_leaves_nothing(
    queues: QueueRegistry, url: str, fields: dict[str, Any], first_ones: list[str]
) -> None:
    """Those that moved, and those that were flushed, are all due at the same time."""
    queues.load(message(id=id, due=due) for id, due in zip("12345", (5.0, 1.0, 4.0, 2.0, 3.0), strict=True))
    before = stored(url)
    first = ask(queues, **fields)
    results = [undo(queues, first, limit=2) for _ in range(4)]
    assert [(result.matched, result.left) for result in results] == [(2, 0), (2, 0), (1, 0), (0, 0)]
    undone = [record["id"] for record in logged(url) if record["rebind_id"] == results[0].rebind_id]
    assert undone == first_ones
    assert stored(url) == before


# Records among others


def test_the_first_rebind_of_a_store_is_undone_as_a_whole(queues: QueueRegistry, url: str, tmp_path: Path) -> None:
    with new_database(url, tmp_path) as new:
        queues.bind(new, busy_timeout=PATIENCE)
        queues.database.prepare(create=True)
        queues.load([message(), message()])
        assert counts(undo(queues, ask(queues, {"tenant": "t"}))) == (2, 2, 0)
        queues.database.close()
        engine_for(new).dispose()


@pytest.mark.sqlite
def test_records_of_a_rebind_are_found_by_their_keys_and_not_by_reading_the_whole_log(queues: QueueRegistry) -> None:
    queues.load([message()])
    first = ask(queues, {"key": "1"})
    plans = []

    def explain(db: Connection, _: Any, statement: str, parameters: Any, *__: Any) -> None:
        if first.rebind_id in parameters and re.search(r"\blog\b", statement):
            driver: Any = db.connection.driver_connection
            plans.append(str(driver.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()))

    with listening("before_cursor_execute", explain):
        list(deliverylog.records(queues.database, wanted=LogFilter(rebind_id=first.rebind_id)))
        assert undo(queues, first).matched == 1
    assert len(plans) > 2
    assert [plan for plan in plans if "SEARCH log USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)" not in plan] == []


@pytest.mark.postgresql
def test_an_undo_passes_over_what_a_worker_wrote_while_the_rebind_ran(queues: QueueRegistry, url: str) -> None:
    """The worker's record has a key between those of the rebind. In SQLite there is one writer at a time."""
    queues.load([message(), message(meta={"queue": "of the worker"})])
    (claimed,) = [each for each in claim(2, lease=60) if each.queue == "of the worker"]

    def move(message: Message, data: dict[str, str]) -> None:
        settle(claimed, [Outcome("Delivery", ["ada@example.com"], {})])
        message.meta["tenant"] = "t"

    first = by_event(queues, move, domain="example.com")
    assert [record["type"] for record in deliverylog.records(queues.database)] == ["Delivery", "AdminRebind"]
    second = undo(queues, first)
    assert (counts(second), second.left) == ((1, 1, 0), 0)
