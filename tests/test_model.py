"""The registry against a model: whatever is asked, it does to a database what ten lines of Python do to a list."""

import copy
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from conftest import empty, logged, message, set_data, stored
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from event import rebind
from history import NODEID, RebindRequest
from message import Message, NewMessage
from queues import Loaded, QueueRegistry

NOW = object()  # a time that is the call's
NAMING = ("queue", "campaign", "tenant", "routing_domain")
TEXTS = ("a", "b", "A", "", "a:b", "a@b", "b!a", "é", "null", "x.example", 'q"\\')
RECIPIENTS = ("ada@x.example", "bob@X.Example", "cyd@y.example", "dan@[IPv6:::1]", "eve@é.example")

Row = dict[str, Any]


def model(rows: list[Row], request: RebindRequest, limit: int | None) -> tuple[list[Row], tuple[int, int, int]]:
    """docs/contract.md, "What one request does", to `rows`. Returns the records, and the counts of the result."""
    found = [row for row in rows if matches(request, row["queue"])]
    found = [row for row in rows if row in sorted(found, key=lambda row: row["due"])[:limit]]
    old = [row["queue"] for row in found]
    for row in found:
        row["meta"] |= request.data
        if request.trigger_rebind_event and "to" in request.data:
            row["recipient"] = request.data["to"]
        row["domain"] = first(row["recipient"]).split("@")[1].lower()
        row["queue"], before = name(row["meta"], row["domain"]), row["queue"]
        if request.always_flush or row["queue"] != before:
            row["due"] = NOW
    moved = sum(row["queue"] != before for row, before in zip(found, old, strict=True))
    flushed = len(found) if request.always_flush else moved
    records = [record(row, before, request) for row, before in zip(found, old, strict=True)]
    return [] if request.suppress_logging else records, (len(found), moved, flushed)


def name(meta: Row, domain: str) -> str:
    """The name of a message's queue: docs/contract.md, "The name of a message's queue"."""
    queue, campaign, tenant, route = (meta[key] if isinstance(meta.get(key), str) else None for key in NAMING)
    before = f"{campaign}:{tenant or ''}@" if campaign is not None else "" if tenant is None else f"{tenant}@"
    return before + domain + ("" if route is None else f"!{route}") if queue is None else queue


def matches(request: RebindRequest, queue: str) -> bool:
    """Whether the request picks the queue."""
    found = re.fullmatch(r"(?s:(?:(?:([^:@]*):)?([^@]*)@)?([^!]*)(?:!(.*))?)", queue)
    assert found
    campaign, tenant, domain, route = found.groups()
    criteria = [(request.campaign, campaign), (request.tenant, tenant)]
    criteria += [(lower(request.domain), lower(domain)), (lower(request.routing_domain), lower(route))]
    return all(wanted is None or wanted == part for wanted, part in criteria)


def record(row: Row, old_queue: str, request: RebindRequest) -> Row:
    """The row of the log that says what became of `row`."""
    kept = ("id", "sender", "recipient", "queue", "meta", "size", "created", "num_attempts")
    of_request = {"old_queue": old_queue, "reason": request.reason, "actor": "me", "type": "AdminRebind"}
    unset = dict.fromkeys(column.name for column in store.log.c if column.name != "key")
    return unset | copy.deepcopy({key: row[key] for key in kept}) | of_request | {"nodeid": NODEID}


def first(recipient: str | list[str]) -> str:
    return recipient if isinstance(recipient, str) else recipient[0]


def lower(text: str | None) -> str | None:
    return None if text is None else text.lower()


texts = st.sampled_from(TEXTS)
no_texts = st.sampled_from([None, True, 0, 1.5, [], ["a"], {}, {"a": {"queue": "b"}}])
keys = st.sampled_from([*NAMING, *NAMING, "other", "é", "", "a.b", '"'])
metas = st.dictionaries(keys, st.one_of(texts, texts, no_texts), max_size=4)
data = st.dictionaries(keys, texts, max_size=3)
envelopes = st.sampled_from(RECIPIENTS) | st.lists(st.sampled_from(RECIPIENTS), min_size=1, max_size=3)
loaded = st.lists(
    st.builds(
        message,
        envelopes,
        sender=st.sampled_from(["", "news@acme.example", "é@acme.example"]),
        content=st.sampled_from([b"", b"Hello", b"\0\xff"]),
        meta=metas,
        due=st.sampled_from([1.0, 2.5, 2.5, 1e9, 4e9]),
        num_attempts=st.integers(0, 3),
    ),
    min_size=3,
    max_size=12,
)
rarely = st.sampled_from([True, False, False])
absent = [None] * 10  # criteria are few, so that they match often
criteria = {key: st.sampled_from([*absent, "a", "b", ""]) for key in ("campaign", "tenant", "routing_domain")}
requests = st.builds(
    RebindRequest,
    reason=texts,
    data=data | st.builds(lambda more, to: more | {"to": to}, data, st.sampled_from(RECIPIENTS)),
    domain=st.sampled_from([*absent, "x.example", "Y.EXAMPLE", "[ipv6:::1]", "É.example", "a", ""]),
    trigger_rebind_event=rarely,
    always_flush=rarely,
    suppress_logging=rarely,
    **criteria,
)
calls = st.lists(st.tuples(requests, rarely, st.none() | st.integers(1, 4)), min_size=2, max_size=5)


@pytest.fixture(scope="module")
def registry(url: str) -> QueueRegistry:
    """One for all examples, which empty it themselves."""
    registry = QueueRegistry()
    registry.bind(url, busy_timeout=30)
    registry.prepare()
    return registry


def obey(message: Message, data: dict[str, str]) -> None:
    """The event's handler: what the model does where `trigger_rebind_event` is set."""
    set_data(message, data)
    message.recipient = data.get("to", message.recipient)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=100)
@given(loaded, calls)
def test_the_registry_does_what_the_model_does(
    url: str,
    registry: QueueRegistry,
    new: list[NewMessage],
    calls: list[tuple[RebindRequest, bool, int | None]],
) -> None:
    empty(url)
    start = time.time()
    counts = registry.load(new)
    rows = stored(url)
    assert all(start <= row["created"] <= time.time() for row in rows)
    expected = [_expected(each, row) for each, row in zip(_kept(new), rows, strict=True)]
    assert (rows, counts) == (
        expected,
        Loaded(len(rows), sum(not each.content for each in _kept(new)), len(new) - len(rows)),
    )
    log: list[Row] = []
    with rebind.connected_to(obey):
        for request, dry_run, limit in calls:
            after = copy.deepcopy(rows)
            records, counted = model(after, request, limit)
            start = time.time()
            result = registry.rebind(request, actor="me", dry_run=dry_run, limit=limit)
            end = time.time()
            assert (result.matched, result.moved, result.flushed) == counted
            if not dry_run:
                log += [record | {"event_time": NOW, "rebind_id": result.rebind_id} for record in records]
                rows = after
            _settle(rows, "due", stored(url), start, end)
            _settle(log, "event_time", logged(url), start, end)
            assert stored(url) == rows
            assert logged(url) == log


def _kept(new: list[NewMessage]) -> list[NewMessage]:
    return [each for each in new if each.meta.get("queue") != "null"]


def _expected(new: NewMessage, row: Row) -> Row:
    """What is stored of a message that was loaded."""
    recipient = new.recipient[0] if len(new.recipient) == 1 else new.recipient
    domain = first(recipient).split("@")[1].lower()
    fields = vars(replace(new, recipient=recipient))
    row_fields = {key: fields[key] for key in ("id", "sender", "recipient", "meta", "due", "num_attempts")}
    named = {"domain": domain, "queue": name(new.meta, domain)}
    return row | row_fields | named | {"size": len(new.content)}


def _settle(expected: list[Row], key: str, actual: list[Row], start: float, end: float) -> None:
    """Put the time of the database where the model says NOW, when it is between `start` and `end`."""
    for row, found in zip(expected, actual, strict=True):
        if row[key] is NOW:
            assert start <= found[key] <= end
            row[key] = found[key]
