"""The registry against a model: whatever is asked, it does to a database what some lines of Python do to a list."""

import copy
import itertools
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from conftest import by_id, empty, history, logged, message, run_sql, set_data, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from event import rebind
from history import NothingToUndo, RebindRequest, RebindResult, UnknownRebind
from message import Message, NewMessage
from moving import Move
from names import Criteria
from queues import Loaded, QueueRegistry

NOW = object()  # a time that is the call's
NAMING = ("queue", "campaign", "tenant", "routing_domain")
TEXTS = ("a", "b", "A", "", "a:b", "a@b", "b!a", "é", "null", "x.example", 'q"\\')
RECIPIENTS = ("ada@x.example", "bob@X.Example", "cyd@y.example", "dan@[IPv6:::1]", "eve@é.example")

Row = dict[str, Any]


@dataclass
class Done:
    """A rebind that was done: of each message, what it was before, what was changed, and where it was left."""

    before: dict[str, Row] = field(default_factory=dict)
    changed: dict[str, set[str]] = field(default_factory=dict)
    after: dict[str, Row] = field(default_factory=dict)


def model(rows: list[Row], request: RebindRequest, done: dict[str, Done]) -> tuple[Done, int | None]:
    """docs/contract.md, "What one request does" and "Beyond the page", to `rows`.

    Returns what was done, and of an undo how many messages were left alone.
    """
    what, left = Done(), None
    found = sorted((row for row in rows if matches(request.criteria, row["queue"])), key=lambda r: (r["due"], r["id"]))
    first = None
    if request.undo is not None:
        first = undone(request.undo, done)
        in_place = {row["id"] for row in rows if row["queue"] == first.after.get(row["id"], {}).get("queue")}
        left = len(first.after) - len(in_place)
        found = [row for row in found if row["id"] in in_place]
    for row in found:
        if len(what.before) == request.limit:
            break
        new = changed(row, request, first)
        stays = new["queue"] == row["queue"]
        if first and stays and same(new["meta"], row["meta"]) and new["recipient"] == row["recipient"]:
            continue
        if stays and request.limit and not request.trigger_rebind_event and {*request.data, *request.unset} & {*NAMING}:
            continue
        if request.always_flush or not stays:
            new["due"] = NOW
        what.before[row["id"]] = copy.deepcopy(row)
        what.changed[row["id"]] = {*request.data, *request.unset}
        if first or request.trigger_rebind_event:
            old, now = row["meta"], new["meta"]
            differs = {key for key in {*old, *now} if not same(old.get(key, NOW), now.get(key, NOW))}
            what.changed[row["id"]] = differs
        row |= new
        what.after[row["id"]] = copy.deepcopy(row)
    return what, left


def changed(row: Row, request: RebindRequest, first: Done | None) -> Row:
    """What becomes of one message."""
    new = copy.deepcopy(row)
    if first:
        before, after = first.before[row["id"]], first.after[row["id"]]
        for key in first.changed[row["id"]]:
            new["meta"].pop(key, None)
        new["meta"] |= {key: v for key, v in before["meta"].items() if key in first.changed[row["id"]]}
        if before["recipient"] != after["recipient"] == row["recipient"]:
            new["recipient"] = before["recipient"]
    else:
        new["meta"] |= request.data
        for key in request.unset:
            new["meta"].pop(key, None)
    if request.trigger_rebind_event and "to" in request.data:
        new["recipient"] = request.data["to"]
    new["domain"] = first_of(new["recipient"]).split("@")[1].lower()
    return new | {"queue": name(new["meta"], new["domain"])}


def undone(rebind_id: str, done: dict[str, Done]) -> Done:
    """What is to be taken back. Raises UnknownRebind and NothingToUndo."""
    if rebind_id not in done:
        raise UnknownRebind
    if not done[rebind_id].after:
        raise NothingToUndo
    return done[rebind_id]


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON: 1 is not true."""
    return one is other or (NOW not in (one, other) and json.dumps(one) == json.dumps(other))


def name(meta: Row, domain: str) -> str:
    """The name of a message's queue: docs/contract.md, "The name of a message's queue"."""
    queue, campaign, tenant, route = (meta[key] if isinstance(meta.get(key), str) else None for key in NAMING)
    before = f"{campaign}:{tenant or ''}@" if campaign is not None else "" if tenant is None else f"{tenant}@"
    return before + domain + ("" if route is None else f"!{route}") if queue is None else queue


def matches(criteria: Criteria, queue: str) -> bool:
    """Whether the criteria pick the queue."""
    found = re.fullmatch(r"(?s:(?:(?:([^:@]*):)?([^@]*)@)?([^!]*)(?:!(.*))?)", queue)
    assert found
    campaign, tenant, domain, route = found.groups()
    pairs = [(criteria.campaign, campaign), (criteria.tenant, tenant)]
    pairs += [(lower(criteria.domain), lower(domain)), (lower(criteria.routing_domain), lower(route))]
    return all(wanted is None or wanted == part for wanted, part in pairs)


def first_of(recipient: str | list[str]) -> str:
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
picked = {key: st.sampled_from([*absent, "a", "b", ""]) for key in ("campaign", "tenant", "routing_domain")}
criteria = st.builds(
    Criteria, domain=st.sampled_from([*absent, "x.example", "Y.EXAMPLE", "[ipv6:::1]", "É.example", "a", ""]), **picked
)
limits = st.none() | st.none() | st.integers(1, 4)
flags = {"criteria": criteria, "always_flush": rarely, "suppress_logging": rarely, "dry_run": rarely, "limit": limits}
by_data = st.builds(
    lambda data, unset, **fields: RebindRequest(data=data, unset=tuple(unset - data.keys()), **fields),
    data=data,
    unset=st.frozensets(keys, max_size=2) | st.just(frozenset()),
    reason=texts,
    **flags,
)
by_event = st.builds(
    RebindRequest,
    reason=texts,
    data=data | st.builds(lambda more, to: more | {"to": to}, data, st.sampled_from(RECIPIENTS)),
    trigger_rebind_event=st.just(True),
    **flags,
)
undos = st.builds(
    RebindRequest, reason=texts, data=st.just({}), undo=st.sampled_from(["0", "1", "2", "3", "unknown"]), **flags
)
deliveries = st.integers(0, 11)  # the message that a worker removes
steps = st.lists(st.tuples(by_data | by_data | by_event | undos | undos | deliveries, rarely), min_size=2, max_size=7)


@pytest.fixture(scope="module")
def registry(url: str) -> QueueRegistry:
    """One for all examples, which empty it themselves."""
    registry = QueueRegistry()
    registry.bind(url, busy_timeout=30)
    registry.prepare()
    return registry


def obey(message: Message, data: dict[str, str]) -> None:
    """The event's handler: what the model does with `trigger_rebind_event`."""
    set_data(message, data)
    message.recipient = data.get("to", message.recipient)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=150)
@given(loaded, steps)
def test_the_registry_does_what_the_model_does(
    url: str,
    registry: QueueRegistry,
    new: list[NewMessage],
    steps: list[tuple[RebindRequest | int, bool]],
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
    done: dict[str, Done] = {}
    asked: list[RebindRequest] = []
    with rebind.connected_to(obey):
        for step, repeated in steps:
            if isinstance(step, int):
                deliver(url, rows, step)
                continue
            request = replace(step, undo=step.undo and dict(enumerate(done)).get(int(step.undo, 36), "unknown"))
            request = replace(request, idempotency_key=f"key {len(asked)}") if repeated else request
            what, result = ask(registry, url, rows, request, done)
            if what and result and result.rebind_id:
                done[result.rebind_id] = what
                asked.append(request)
            assert stored(url) == rows
            assert records(url) == list(itertools.chain.from_iterable(map(expected_records, done.items(), asked)))
            assert [(row["rebind_id"], row["request"]) for row in history(url)] == [
                (rebind_id, request.asked()) for rebind_id, request in zip(done, asked, strict=True)
            ]


def deliver(url: str, rows: list[Row], index: int) -> None:
    """A worker removes a message."""
    if index < len(rows):
        run_sql(url, f"DELETE FROM messages WHERE id = '{rows.pop(index)['id']}'")


def ask(
    registry: QueueRegistry, url: str, rows: list[Row], request: RebindRequest, done: dict[str, Done]
) -> tuple[Done | None, RebindResult | None]:
    """Ask the registry and the model, and compare what they say; `rows` become what they are to be."""
    after, start = copy.deepcopy(rows), time.time()
    try:
        what, left = model(after, request, done)
    except (UnknownRebind, NothingToUndo) as error:
        with pytest.raises(type(error)):
            registry.rebind(request)
        return None, None
    result = registry.rebind(request)
    if request.idempotency_key:
        assert request.dry_run or registry.rebind(request) == result
    moves = Counter((what.before[id]["queue"], row["queue"]) for id, row in what.after.items())
    moved = sum(number for (source, to), number in moves.items() if source != to)
    flushed = len(what.after) if request.always_flush else moved
    assert (result.matched, result.moved, result.flushed, result.left) == (len(what.after), moved, flushed, left)
    if request.dry_run:
        largest = sorted((Move(*pair, number) for pair, number in moves.items()), key=lambda m: (-m.messages, m[:2]))
        assert result.plan
        assert (sorted(result.plan.moves), result.plan.more) == (sorted(largest), 0)
        assert [move.messages for move in result.plan.moves] == [move.messages for move in largest]
        return None, None
    for row, found in zip(after, stored(url), strict=True):
        if row["due"] is NOW:
            assert start <= found["due"] <= time.time()
            row["due"] = found["due"]
    rows[:] = after
    return (Done() if request.suppress_logging else what), result


def records(url: str) -> list[tuple[Any, ...]]:
    """The log, as far as the model tells it."""
    names = ("rebind_id", "id", "sender", "recipient", "old_queue", "queue", "meta", "num_attempts", "size")
    return [(*(record[name] for name in names), record["response"]["content"]) for record in logged(url)]


def expected_records(rebind: tuple[str, Done], request: RebindRequest) -> list[tuple[Any, ...]]:
    """The records of one rebind, by their message's id."""
    rebind_id, what = rebind
    names = ("id", "sender", "recipient", "old_queue", "queue", "meta", "num_attempts", "size")
    rows = by_id(what.after[id] | {"old_queue": before["queue"]} for id, before in what.before.items())
    content = "Rebound from {old_queue} to {queue}: {reason}"
    return [(rebind_id, *(row[name] for name in names), content.format(**row, reason=request.reason)) for row in rows]


def _kept(new: list[NewMessage]) -> list[NewMessage]:
    return [each for each in new if each.meta.get("queue") != "null"]


def _expected(new: NewMessage, row: Row) -> Row:
    """What is stored of a message that was loaded."""
    recipient = new.recipient[0] if len(new.recipient) == 1 else new.recipient
    domain = first_of(recipient).split("@")[1].lower()
    fields = vars(replace(new, recipient=recipient))
    row_fields = {key: fields[key] for key in ("id", "sender", "recipient", "meta", "due", "num_attempts")}
    named = {"domain": domain, "queue": name(new.meta, domain)}
    return row | row_fields | named | {"size": len(new.content)}
