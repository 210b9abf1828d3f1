"""Tests of delivery.py: how workers claim messages, and what they write of each attempt."""

from collections.abc import Callable
from typing import Any

import pytest
from databases import contents, run_sql, stored
from factories import ask, message, settled, undo
from sqlalchemy import make_url
from waiting import PATIENCE

import deliverylog
from delivery import DISCARD, Claim, Outcome, claim, recipient_list, settle
from deliverylog import response
from event import rebind
from message import Message
from queues import QueueRegistry
from rebinding import RebindRequest

CONTENT = b"Subject: hello\r\n\r\nHello Ada\r\n"
OK = {"response": response(250, "OK")}
LATER = {"response": response(451, "4.2.2 mailbox full")}
NEVER = {"response": response(550, "5.1.1 no such user")}


def records(queues: QueueRegistry) -> list[tuple[str, Any, int]]:
    """The type, recipient and reply's code of each record."""
    return [
        (each["type"], each["recipient"], each["response"]["code"]) for each in deliverylog.records(queues.database)
    ]


def test_a_claimed_message_is_nobody_elses_until_its_lease_ends(queues: QueueRegistry) -> None:
    queues.load([message(content=CONTENT) for _ in range(3)])
    claims = claim(2, lease=60)
    assert len({each.id for each in claims + claim(2, lease=-1)}) == 3
    assert claims[0].content == CONTENT
    assert len(claim(5, lease=60)) == 1, "a lease that has ended comes back"
    assert claim(5, lease=60) == []


@pytest.mark.postgresql
def test_of_a_queue_those_are_claimed_first_that_have_been_due_longest(queues: QueueRegistry, url: str) -> None:
    """Without its index PostgreSQL finds them in another order. SQLite always uses the index."""
    without_index = {"options": "-c enable_indexscan=off -c enable_bitmapscan=off"}
    queues.bind(make_url(url).update_query_dict(without_index).render_as_string(hide_password=False), PATIENCE)
    queues.load(message(id=id, due=due) for id, due in (("3", 3.0), ("1", 1.0), ("2", 2.0)))
    assert [each.id for each in claim(2, lease=60)] == ["1", "2"]


def after(sql: str) -> Callable[[Claim, str], None]:
    """What a worker in another language does with its claim, as docs/tables.md says."""
    return lambda claimed, url: run_sql(url, sql.format(id=claimed.id, due=claimed.due, lease=claimed.leased_until))


@pytest.mark.parametrize(
    "finish",
    [
        pytest.param(lambda claimed, _: settled(claimed, "Delivery", OK), id="delivered"),
        pytest.param(lambda claimed, _: settled(claimed, "Bounce", NEVER), id="bounced"),
        pytest.param(lambda claimed, _: settled(claimed, "TransientFailure", LATER, 4e9), id="postponed"),
        pytest.param(after("DELETE FROM messages WHERE id = '{id}'"), id="SQL: removed"),
        pytest.param(
            after(
                "UPDATE messages SET num_attempts = num_attempts + 1, "
                "due = CASE WHEN due = {due} THEN 4e9 ELSE due END, "
                "leased_until = CASE WHEN leased_until = {lease} THEN 0 ELSE leased_until END WHERE id = '{id}'"
            ),
            id="SQL: postponed",
        ),
    ],
)
def test_a_claim_that_outlives_its_lease_does_nothing_when_its_message_is_gone_or_another_came_later(
    queues: QueueRegistry, url: str, finish: Callable[[Claim, str], object]
) -> None:
    """SQLite gives the new row the place of the one that was deleted."""
    queues.load([message(content=b"old")])
    (late,) = claim(1, lease=-1)
    (in_time,) = claim(1, lease=60)
    assert late.id == in_time.id
    assert settled(in_time, "Delivery", OK)
    assert not finish(late, url)
    assert (records(queues), stored(url)) == ([("Delivery", "ada@example.com", 250)], [])
    queues.load([message(content=b"new")])
    before = stored(url), contents(url), records(queues)
    finish(late, url)
    assert (stored(url), contents(url), records(queues)) == before


ON_HOLD = ["x.invalid", "x.invalid!", "a.example!hold.invalid", "INVALID", "Relay.Invalid:2525", "c:t@d!hold.invalid"]
NOT_ON_HOLD = ["notinvalid", "invalid.example", "x.invalid!relay.example", "invalid:t@a.example", "a.example!"]


def test_queues_on_hold_are_skipped(queues: QueueRegistry) -> None:
    """docs/contract.md, "Delivery workers"."""
    queues.load([message(meta={"queue": name}) for name in ON_HOLD + NOT_ON_HOLD])
    assert sorted(each.queue for each in claim(100, lease=60)) == sorted(NOT_ON_HOLD)
    ask(queues, domain="relay.invalid:2525", unset=("queue",))
    assert [each.queue for each in claim(100, lease=60)] == ["example.com"], "it was released"


def test_what_is_due_in_queue_null_is_removed_without_an_attempt_or_a_record(queues: QueueRegistry, url: str) -> None:
    """docs/contract.md, "Delivery workers". What is not due yet stays."""
    later, kept = message(), message(meta={"queue": "Null"}, due=4e9)
    queues.load([message(), message(), later])
    ask(queues, {"queue": "null"})
    queues.load([kept])
    run_sql(url, f"UPDATE messages SET due = 4e9 WHERE id = '{later.id}'")
    assert claim(10, lease=60) == []
    assert [row["id"] for row in stored(url)] == list(contents(url)) == [later.id, kept.id]
    assert [record["type"] for record in deliverylog.records(queues.database)] == ["AdminRebind"] * 3


def test_queue_null_is_emptied_first_however_many_other_queues_there_are(queues: QueueRegistry, url: str) -> None:
    queues.load([message() for _ in range(2 * DISCARD + 1)])
    ask(queues, {"queue": "null"})
    queues.load([message(meta={"queue": name}) for name in "abc"])
    left = [(len(claim(1, lease=60)), len(stored(url))) for _ in range(4)]
    assert left == [(1, DISCARD + 4), (1, 4), (1, 3), (0, 3)]


def test_queues_take_turns_however_many_messages_each_has(queues: QueueRegistry) -> None:
    held = [message(meta={"queue": f"{number}.invalid"}) for number in range(40)]
    queues.load([message(meta={"queue": name}) for name in "aaaaccbbbz"] + held)
    turns = [each.queue for _ in range(10) for each in claim(1, lease=60)]
    first = sorted("abcz").index(turns[0])
    assert turns[:4] == [*"abcz"[first:], *"abcz"[:first]]
    assert sorted(turns) == sorted("aaaaccbbbz")
    assert claim(1, lease=60) == []


def move_and_flush(queues: QueueRegistry) -> None:
    ask(queues, {"queue": "other"}, always_flush=True)


def flush(queues: QueueRegistry) -> None:
    ask(queues, always_flush=True)


def move_and_undo(queues: QueueRegistry) -> None:
    undo(queues, ask(queues, {"queue": "other"}))


@pytest.mark.parametrize("rebind_it", [move_and_flush, flush, move_and_undo])
def test_a_rebind_does_not_take_a_message_from_the_worker_that_holds_it(
    queues: QueueRegistry, rebind_it: Callable[[QueueRegistry], None]
) -> None:
    """docs/contract.md, "Delivery workers"."""
    queues.load([message()])
    (claimed,) = claim(1, lease=60)
    rebind_it(queues)
    assert (claim(1, lease=60), queues.queues()[0].due) == ([], 0)
    assert settled(claimed, "TransientFailure", LATER, 4e9)
    assert [each.num_attempts for each in claim(1, lease=60)] == ([] if rebind_it is move_and_undo else [1])


def test_each_outcome_has_its_record_and_the_message_stays_for_those_who_are_tried_again(
    queues: QueueRegistry, url: str
) -> None:
    """The queue keeps its name until the next rebind, which then finds the domain of those who are left."""
    queues.load([message(["good@example.com", "bad@example.com", "ada@Two.example", "bob@example.com"])])
    (before,) = stored(url)
    (claimed,) = claim(1, lease=60)
    outcomes = [
        Outcome("Delivery", ["good@example.com"], OK),
        Outcome("Bounce", ["bad@example.com"], NEVER),
        Outcome("TransientFailure", ["ada@Two.example", "bob@example.com"], LATER),
    ]
    assert settle(claimed, outcomes, due=4e9)

    left = ["ada@Two.example", "bob@example.com"]
    assert stored(url) == [before | {"recipient": left, "domain": "two.example", "due": 4e9, "num_attempts": 1}]
    assert records(queues) == [
        ("Delivery", "good@example.com", 250),
        ("Bounce", "bad@example.com", 550),
        ("TransientFailure", left, 451),
    ]
    queues.rebind(RebindRequest("r", {"tenant": "t"}))
    assert [row["queue"] for row in stored(url)] == ["t@two.example"]


def test_a_recipient_who_is_named_twice_gets_one_copy(queues: QueueRegistry, url: str) -> None:
    twice = ["ada@example.com", "bob@example.com", "ada@example.com", "bob@example.com"]
    queues.load([message(twice)])
    (claimed,) = claim(1, lease=60)
    assert recipient_list(claimed) == twice[:2]
    assert settle(claimed, [Outcome("Delivery", twice[:1], OK)], due=4e9)
    assert [row["recipient"] for row in stored(url)] == ["bob@example.com"]


@pytest.mark.parametrize("due", [4e9, None])
@pytest.mark.parametrize("meanwhile", [lambda queues: None, flush], ids=["", "a rebind flushes it meanwhile"])
def test_outcomes_whose_commit_was_not_answered_are_written_once(
    queues: QueueRegistry, url: str, due: float | None, meanwhile: Callable[[QueueRegistry], None]
) -> None:
    queues.load([message(["good@example.com", "ada@example.com"])])
    (claimed,) = claim(1, lease=60)
    outcomes = [Outcome("Delivery", ["good@example.com"], OK), Outcome("TransientFailure", ["ada@example.com"], LATER)]
    meanwhile(queues)
    assert settle(claimed, outcomes, due)
    once = stored(url), records(queues)
    assert settle(claimed, outcomes, due)
    assert (stored(url), records(queues)) == once


def test_what_comes_after_the_end_of_a_lease_counts_and_leaves_the_next_workers_lease_alone(
    queues: QueueRegistry, url: str
) -> None:
    queues.load([message(["good@example.com", "ada@example.com"])])
    (late,) = claim(1, lease=-1)
    (in_time,) = claim(1, lease=60)
    for _ in range(2):  # the answer to the first is lost
        assert settle(late, [Outcome("Delivery", ["good@example.com"], OK)], due=4e9)
    (row,) = stored(url)
    assert (row["recipient"], row["leased_until"]) == ("ada@example.com", in_time.leased_until)
    assert settle(in_time, [Outcome("Bounce", ["ada@example.com"], NEVER)])
    assert (stored(url), records(queues)) == (
        [],
        [("Delivery", "good@example.com", 250), ("Bounce", "ada@example.com", 550)],
    )


@pytest.mark.parametrize(
    ("done", "left"),
    [
        pytest.param(["good@example.com"], ["ada@example.com", "new@example.com"], id="some have it"),
        pytest.param(["good@example.com", "ada@example.com"], "new@example.com", id="all have it who were claimed"),
    ],
)
def test_who_has_a_message_does_not_get_it_again_after_a_rebind_and_whom_its_handler_added_does(
    queues: QueueRegistry, url: str, done: list[str], left: str | list[str]
) -> None:
    queues.load([message(["good@example.com", "ada@example.com"])])
    (claimed,) = claim(1, lease=60)

    def add(message: Message, data: dict[str, str]) -> None:
        message.meta["queue"] = "other"
        message.recipient = [*message.recipient, "new@example.com"]

    rebind.connect(add)
    queues.rebind(RebindRequest("r", {}, trigger_rebind_event=True))
    settle(claimed, [Outcome("Delivery", done, OK)], due=4e9)
    assert [(row["queue"], row["recipient"]) for row in stored(url)] == [("other", left)]
    assert [message.due < 4e9 for message in claim(1, lease=60)] == [True], "it is due now"
