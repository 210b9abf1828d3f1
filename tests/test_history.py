"""Tests of the history: what its rows say, and requests that are sent again."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from databases import history, logged, nothing_changes, run_sql, stored
from factories import ask, change_all, connected_to, message
from waiting import PATIENCE

from event import rebind
from history import NODEID, KeyReused, rebinds_done
from queues import QueueRegistry
from rebinding import RebindResult


@pytest.fixture(autouse=True)
def _handler(queues: QueueRegistry) -> Iterator[None]:
    with connected_to(change_all):
        yield


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


def test_an_event_that_is_asked_for_again_gets_the_same_answer_though_no_handler_is_connected_any_more(
    queues: QueueRegistry,
) -> None:
    queues.load([message()])
    first = ask(queues, trigger_rebind_event=True, idempotency_key="k")
    rebind.handlers.clear()
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
    ],
    ids=lambda other: " ".join(other),
)
def test_a_key_cannot_be_used_by_a_different_request(queues: QueueRegistry, url: str, other: dict[str, Any]) -> None:
    queues.load([message()])
    same: dict[str, Any] = {"data": {"tenant": "t"}, "idempotency_key": "k"}
    ask(queues, **same)
    with nothing_changes(url), pytest.raises(KeyReused):
        ask(queues, **(same | other))


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


def test_the_history_says_who_asked_for_what_and_what_was_done(queues: QueueRegistry, url: str) -> None:
    queues.load([message(meta={"campaign": "c"}), message()])
    asked: dict[str, Any] = {"reason": "why", "data": {"tenant": "t", "é": ""}, "limit": 5}
    asked |= {"always_flush": True, "suppress_logging": True}
    criteria: dict[str, Any] = {"campaign": "c", "domain": "Example.com"}
    result = ask(queues, **asked, **criteria, actor="ada", unset=("z", "a"), idempotency_key="k")
    (row,) = history(url)
    assert row == row | {"rebind_id": result.rebind_id, "actor": "ada", "nodeid": NODEID, "idempotency_key": "k"}
    assert row["request"] == asked | criteria | {"unset": ["a", "z"]}
    assert [row[name] for name in ("reason", "matched", "moved", "flushed", "left_alone")] == ["why", 1, 1, 1, None]
    assert row["event_time"] == stored(url)[0]["due"]


def test_the_history_is_in_the_order_of_what_was_done_whatever_the_clock_says(queues: QueueRegistry, url: str) -> None:
    done = [ask(queues, {"n": number}).rebind_id for number in "123"]
    run_sql(url, f"UPDATE rebinds SET event_time = event_time + 7200 WHERE rebind_id = '{done[0]}'")
    assert [row["rebind_id"] for row in rebinds_done(queues.database)] == done[::-1]
    assert rebinds_done(queues.database, limit=1)[0]["rebind_id"] == done[-1]
