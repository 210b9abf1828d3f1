"""The registry against a model: whatever is asked, it does to a database what a few lines of Python do to a list."""

import copy
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from databases import empty, history, in_order, stored
from factories import message
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, update

import tables
from event import rebind
from history import KeyReused, NothingToUndo, UnknownRebind
from message import Message, NewMessage
from names import Criteria
from queues import QueueRegistry
from rebinding import RebindRequest, RebindResult

NAMING = ("queue", "campaign", "tenant", "routing_domain")
TEXTS = ("a", "b", "A", "", "a:b", "a@b", "b!a", "é", "null", "x.example", 'q"\\')
RECIPIENTS = ("ada@x.example", "bob@X.Example", "cyd@y.example", "dan@[IPv6:::1]", "eve@é.example")
REFUSED = (UnknownRebind, NothingToUndo, KeyReused)

Row = dict[str, Any]


class Model:
    """docs/contract.md, from "What one request does" to "Retries", for messages in a list."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.records: list[Row] = []
        self.history: list[Row] = []
        self.answers: dict[str, tuple[RebindRequest, RebindResult]] = {}

    def rebind(self, request: RebindRequest, rebind_id: str, now: float) -> RebindResult:
        """Do what is asked. rebind_id, now: what the registry chose."""
        if request.idempotency_key in self.answers and not request.dry_run:
            first, answer = self.answers[request.idempotency_key]
            if first != request:
                raise KeyReused
            return answer
        found, left = self.found(request)
        found = [each for each in found if matches(request.criteria, each[0]["queue"])]
        found.sort(key=lambda pair: (pair[0]["due"], pair[0]["id"].encode()))
        found = found[: request.limit]
        moves = Counter((row["queue"], new["queue"]) for row, new in found)
        moved = sum(number for (old, new), number in moves.items() if old != new)
        counts = (len(found), moved, len(found) if request.always_flush else moved)
        if request.dry_run:
            plan = (len(found), moved, [(*queues, number) for queues, number in moves.items()], 0)
            return RebindResult(*counts, left, plan=plan)  # type: ignore[arg-type]
        for row, new in sorted(found, key=lambda pair: (len(pair[0]["id"]), pair[0]["id"])):
            if not request.suppress_logging:
                before = copy.deepcopy(row)
                keys = self.changed_keys(request, before, new)
                self.records.append(
                    {"of": request, "rebind_id": rebind_id, "before": before, "after": new, "keys": keys}
                )
            row |= new | ({"due": now} if request.always_flush or row["queue"] != new["queue"] else {})
        self.history.append({"request": request, "rebind_id": rebind_id, "counts": (*counts, left)})
        answer = RebindResult(*counts, left, rebind_id)
        if request.idempotency_key:
            self.answers[request.idempotency_key] = request, answer
        return answer

    def found(self, request: RebindRequest) -> tuple[list[tuple[Row, Row]], int | None]:
        """The messages that would be handled if there were neither criteria nor a limit, each with what it becomes."""
        if request.undo is not None:
            return self.found_by_undo(request.undo)
        found = [(row, became(row, request)) for row in self.rows]
        if request.limit and not request.trigger_rebind_event and {*request.data, *request.unset} & {*NAMING}:
            found = [(row, new) for row, new in found if row["queue"] != new["queue"]]
        return found, None

    def changed_keys(self, request: RebindRequest, before: Row, after: Row) -> set[str]:
        """What an undo of this would restore of the metadata."""
        if request.undo is not None:
            undone = (each for each in self.records if each["rebind_id"] == request.undo)
            return next(set(each["keys"]) for each in undone if each["before"]["id"] == before["id"])
        if not request.trigger_rebind_event:
            return {*request.data, *request.unset}
        keys = {*before["meta"], *after["meta"]}
        return {key for key in keys if as_json(before["meta"].get(key, ...)) != as_json(after["meta"].get(key, ...))}

    def found_by_undo(self, rebind_id: str) -> tuple[list[tuple[Row, Row]], int]:
        if rebind_id not in [row["rebind_id"] for row in self.history]:
            raise UnknownRebind
        records = [record for record in self.records if record["rebind_id"] == rebind_id]
        if not records:
            raise NothingToUndo
        there = {row["id"]: row for row in self.rows}
        pairs = [(there.get(each["before"]["id"]), each) for each in records]
        in_place = [(row, each) for row, each in pairs if row and row["queue"] == each["after"]["queue"]]
        found = [(row, restored(row, each)) for row, each in in_place]
        changed = [(row, new) for row, new in found if as_json(row) != as_json(row | new)]
        return changed, len(records) - len(in_place)


def became(row: Row, request: RebindRequest) -> Row:
    """What a rebind by data or by the event makes of a message."""
    meta = copy.deepcopy(row["meta"])
    if not request.trigger_rebind_event:
        meta = {key: value for key, value in meta.items() if key not in request.unset} | request.data
        return named(row, {"meta": meta, "sender": row["sender"], "recipient": row["recipient"]})
    handled: Any = SimpleNamespace(meta=meta, sender=row["sender"], recipient=row["recipient"])
    obey(handled, request.data)
    return named(row, vars(handled))


def restored(row: Row, record: Row) -> Row:
    """What an undo makes of a message, by its record of the rebind that is taken back."""
    before, after, keys = record["before"], record["after"], record["keys"]
    meta = {key: value for key, value in row["meta"].items() if key not in keys}
    meta |= {key: value for key, value in before["meta"].items() if key in keys}
    envelope = {n: before[n] if row[n] == after[n] else row[n] for n in ("sender", "recipient")}
    return named(row, {"meta": meta} | envelope)


def named(row: Row, new: Row) -> Row:
    """A message's new state with the domain and the queue that follow from it."""
    recipient = new["recipient"][0] if len(new["recipient"]) == 1 else new["recipient"]
    domain = row["domain"] if recipient == row["recipient"] else domain_of(recipient)
    return new | {"recipient": recipient, "domain": domain, "queue": name(new["meta"], domain)}


def name(meta: Row, domain: str) -> str:
    """The name of a message's queue: docs/contract.md, "The name of a message's queue"."""
    queue, campaign, tenant, route = (meta[key] if isinstance(meta.get(key), str) else None for key in NAMING)
    before = f"{campaign}:{tenant or ''}@" if campaign is not None else "" if tenant is None else f"{tenant}@"
    return before + domain + ("" if route is None else f"!{route}") if queue is None else queue


def matches(wanted: Criteria, queue: str) -> bool:
    """Whether the criteria pick the queue."""
    found = re.fullmatch(r"(?s:(?:(?:([^:@]*):)?([^@]*)@)?([^!]*)(?:!(.*))?)", queue)
    assert found
    campaign, tenant, domain, route = found.groups()
    pairs = [(wanted.campaign, campaign), (wanted.tenant, tenant)]
    pairs += [(lower(wanted.domain), lower(domain)), (lower(wanted.routing_domain), lower(route))]
    return all(criterion is None or criterion == component for criterion, component in pairs)


def domain_of(recipient: str | list[str]) -> str:
    return (recipient if isinstance(recipient, str) else recipient[0]).split("@")[1].lower()


def lower(text: str | None) -> str | None:
    return None if text is None else text.lower()


def as_json(value: Any) -> str:
    """For comparison: in Python 1 equals True."""
    return json.dumps(value, sort_keys=True, default=repr)


def obey(message: Message, data: dict[str, str]) -> None:
    """The event's handler, of the model too."""
    for key, value in data.items():
        if key == "to":
            message.recipient = value.split(",")
        elif key == "from":
            message.sender = value
        elif value == "":
            message.meta.pop(key, None)
        elif isinstance(message.meta.get(key), list):
            message.meta[key].append({value: None})
        else:
            message.meta[key] = {"a": [None, 1], "b": None}.get(value, value)


# What is asked


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
criteria = st.builds(
    Criteria,
    domain=st.sampled_from([*absent, "x.example", "Y.EXAMPLE", "[ipv6:::1]", "É.example", "a", ""]),
    **{key: st.sampled_from([*absent, "a", "b", ""]) for key in ("campaign", "tenant", "routing_domain")},
)
common: dict[str, Any] = {
    "reason": texts,
    "criteria": criteria,
    "always_flush": rarely,
    "suppress_logging": st.sampled_from([True] + [False] * 5),
    "dry_run": rarely,
    "limit": st.none() | st.integers(1, 4),
    "idempotency_key": st.sampled_from([None, None, "k1", "k2"]),
    "actor": st.sampled_from(["me", "me", "you"]),
}
unset = st.just(()) | st.lists(keys, max_size=2, unique=True).map(tuple)
by_data = st.builds(RebindRequest, data=data, unset=unset, **common).filter(lambda r: not {*r.data} & {*r.unset})
envelope = st.fixed_dictionaries(
    {}, optional={"to": st.sampled_from([*RECIPIENTS, ",".join(RECIPIENTS[:2])]), "from": st.sampled_from(RECIPIENTS)}
)
by_event = st.builds(
    RebindRequest, data=st.builds(dict.__or__, data, envelope), trigger_rebind_event=st.just(True), **common
)
places = st.integers(0, 20)
steps = st.one_of(
    st.tuples(st.just("ask"), by_data | by_event),
    st.tuples(st.just("ask"), by_data | by_event),
    st.tuples(st.just("undo"), st.builds(RebindRequest, data=st.just({}), undo=places.map(str), **common)),
    st.tuples(st.just("undo"), st.builds(RebindRequest, data=st.just({}), undo=places.map(str), **common)),
    st.tuples(st.sampled_from(["again", "deliver to one", "deliver"]), places),
)
sessions = st.lists(steps, min_size=3, max_size=8)


@pytest.fixture(scope="module")
def registry(url: str) -> QueueRegistry:
    """One for all examples, which empty it themselves."""
    registry = QueueRegistry()
    registry.bind(url, busy_timeout=30)
    registry.prepare()
    return registry


@settings(derandomize=True, deadline=None, max_examples=15)
@given(loaded, sessions)
def test_the_registry_does_what_the_model_does(
    url: str, registry: QueueRegistry, new: list[NewMessage], session: list[tuple[str, Any]]
) -> None:
    compare(url, registry, new, session)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=200)
@given(loaded, sessions)
def test_the_registry_does_what_the_model_does_in_many_examples(
    url: str, registry: QueueRegistry, new: list[NewMessage], session: list[tuple[str, Any]]
) -> None:
    compare(url, registry, new, session)


def compare(url: str, registry: QueueRegistry, new: list[NewMessage], session: list[tuple[str, Any]]) -> None:
    """Load the messages, do what is asked step by step, and compare the database with the model after each."""
    empty(url)
    start = time.time()
    kept = [each for each in new if each.meta.get("queue") != "null"]
    assert registry.load(new)[::2] == (len(kept), len(new) - len(kept))
    model = Model([as_loaded(each, row) for each, row in zip(kept, stored(url), strict=True)])
    assert stored(url) == model.rows
    assert all(start <= row["created"] <= time.time() for row in model.rows)
    asked: list[RebindRequest] = []
    with rebind.connected_to(obey):
        for step, what in session:
            if step in ("deliver", "deliver to one") and model.rows:
                deliver(registry, model, what % len(model.rows), to_one=step == "deliver to one")
            elif step == "again" and asked:
                same(url, registry, model, asked[what % len(asked)])
            elif step in ("ask", "undo"):
                ids = [*(row["rebind_id"] for row in model.history), "unknown"]
                asked.append(what if step == "ask" else replace(what, undo=ids[int(what.undo) % len(ids)]))
                same(url, registry, model, asked[-1])


def same(url: str, registry: QueueRegistry, model: Model, request: RebindRequest) -> None:
    """Ask the registry and the model, and compare what they answer and what there is afterwards."""
    start = time.time()
    result = answer(lambda: registry.rebind(request))
    last = (history(url) or [{"rebind_id": "", "event_time": 0.0}])[-1]
    is_new = last["rebind_id"] not in ["", *(row["rebind_id"] for row in model.history)]
    assert not is_new or start <= last["event_time"] <= time.time()
    assert result == answer(lambda: model.rebind(request, last["rebind_id"], last["event_time"]))
    assert stored(url) == model.rows
    said = ("rebind_id", "id", "sender", "recipient", "queue", "meta", "size", "num_attempts", "old_queue", "actor")
    assert [
        {n: record[n] for n in said} | {"content": record["response"]["content"]}
        for record in in_order(registry.records())
    ] == [in_log(record) for record in model.records]
    numbers = ("matched", "moved", "flushed", "left_alone")
    kept = [(row["rebind_id"], row["actor"], row["request"], *(row[n] for n in numbers)) for row in history(url)]
    rebinds = [(row["request"], row["rebind_id"], row["counts"]) for row in model.history]
    assert kept == [(rebind_id, asked.actor, asked.asked(), *counts) for asked, rebind_id, counts in rebinds]


def answer(call: Callable[[], RebindResult]) -> Any:
    """What is answered, or the class of the refusal. A plan's entries of equal size may come in any order."""
    try:
        result = call()
    except REFUSED as error:
        return type(error)
    if result.plan is None:
        return result
    matched, moved, moves, more = result.plan
    return replace(result, plan=None), matched, moved, sorted(map(tuple, moves)), more


def in_log(record: Row) -> Row:
    """What readers of the log see of the model's record."""
    before, after, request = record["before"], record["after"], record["of"]
    shown = {name: after[name] for name in ("sender", "recipient", "queue", "meta")}
    shown |= {name: before[name] for name in ("id", "size", "num_attempts")}
    content = f"Rebound from {before['queue']} to {after['queue']}: {request.reason}"
    return shown | {
        "rebind_id": record["rebind_id"],
        "old_queue": before["queue"],
        "actor": request.actor,
        "content": content,
    }


def deliver(registry: QueueRegistry, model: Model, place: int, to_one: bool) -> None:
    """A worker removes a message, or its first recipient if there are several."""
    row = model.rows[place]
    this = tables.messages.c.id == row["id"]
    if to_one and isinstance(row["recipient"], list):
        left = row["recipient"][1:]
        row |= {"recipient": left if len(left) > 1 else left[0], "domain": domain_of(left)}
        change: Any = update(tables.messages).values(recipient=row["recipient"], domain=row["domain"])
    else:
        del model.rows[place]
        change = delete(tables.messages)
    with registry.database.begin_write() as db:
        db.execute(change.where(this))


def as_loaded(new: NewMessage, row: Row) -> Row:
    """What is stored of a message that was loaded; `created` is the registry's."""
    recipient = new.recipient[0] if len(new.recipient) == 1 else new.recipient
    domain = domain_of(recipient)
    fields = {key: getattr(new, key) for key in ("id", "sender", "due", "num_attempts")}
    named = {"recipient": recipient, "domain": domain, "queue": name(new.meta, domain), "size": len(new.content)}
    meta = json.loads(json.dumps(new.meta))  # an example may have the same list at two keys
    return fields | named | {"meta": meta, "created": row["created"]}
