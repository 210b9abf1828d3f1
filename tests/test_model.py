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
from factories import connected_to, message
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, update

import deliverylog
import tables
from history import KeyReused, NothingToUndo, UnknownRebind
from message import Message, NewMessage
from names import Criteria
from queues import QueueRegistry
from rebinding import Plan, RebindRequest, RebindResult

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
            if first != replace(request, actor=first.actor):
                raise KeyReused
            return answer
        found, left = self.found(request, now)
        found = [each for each in found if matches(request.criteria, each[0])]
        found.sort(key=lambda pair: (pair[0]["due"], pair[0]["id"].encode()))
        found = found[: request.limit]
        moves = Counter((row["queue"], new["queue"]) for row, new in found)
        moved = sum(number for (old, new), number in moves.items() if old != new)
        flushed = len(found) if request.always_flush else 0 if request.undo else moved
        counts = (len(found), moved, flushed)
        if request.dry_run:
            return RebindResult(*counts, left, plan=Plan.of(moves))
        for row, new in sorted(found, key=lambda pair: (len(pair[0]["id"]), pair[0]["id"])):
            before = copy.deepcopy(row)
            row |= new
            if request.always_flush or (row["queue"] != before["queue"] and request.undo is None):
                row["due"] = now
            if not request.suppress_logging:
                after = copy.deepcopy(row)
                self.records.append({"of": request, "rebind_id": rebind_id, "before": before, "after": after})
        self.history.append({"request": request, "rebind_id": rebind_id, "counts": (*counts, left)})
        answer = RebindResult(*counts, left, rebind_id)
        if request.idempotency_key:
            self.answers[request.idempotency_key] = request, answer
        return answer

    def found(self, request: RebindRequest, now: float) -> tuple[list[tuple[Row, Row]], int | None]:
        """The messages that would be handled if there were neither criteria nor a limit, each with what it becomes."""
        if request.undo is not None:
            return self.found_by_undo(request, now)
        found = [(row, became(row, request)) for row in self.rows]
        if request.limit and not request.trigger_rebind_event and {*request.data, *request.unset} & {*NAMING}:
            found = [(row, new) for row, new in found if row["queue"] != new["queue"]]
        return found, None

    def found_by_undo(self, request: RebindRequest, now: float) -> tuple[list[tuple[Row, Row]], int]:
        if request.undo not in [row["rebind_id"] for row in self.history]:
            raise UnknownRebind
        (first,) = [row for row in self.history if row["rebind_id"] == request.undo]
        records = [record for record in self.records if record["rebind_id"] == request.undo]
        if first["request"].suppress_logging or len(records) != first["counts"][0]:
            raise NothingToUndo
        there = {row["id"]: row for row in self.rows}
        found, left = [], 0
        for record in records:
            row, before, after = there.get(record["before"]["id"]), record["before"], record["after"]
            stays = as_json({key: before[key] for key in KEPT}) == as_json({key: after[key] for key in KEPT})
            if stays and (before["due"] == after["due"] or request.always_flush):
                continue  # the rebind did not change it
            if row and is_as_left(row, before, after, now) and (not stays or row["due"] == after["due"]):
                found.append((row, restored(row, before, after)))
            elif not (row and is_back(row, before, after) and (not stays or row["due"] == before["due"])):
                left += 1
        return found, left


KEPT = ("queue", "meta", "sender", "recipient")


def envelope_of(before: Row, after: Row) -> list[str]:
    """What the event changed of the envelope."""
    return [name for name in ("sender", "recipient") if before[name] != after[name]]


def is_as_left(row: Row, before: Row, after: Row, now: float) -> bool:
    same = ["queue", "meta", *(changed := envelope_of(before, after))]
    untouched = row["num_attempts"] == before["num_attempts"] and row["leased_until"] <= now
    return (untouched or not changed) and as_json([row[key] for key in same]) == as_json([after[key] for key in same])


def is_back(row: Row, before: Row, after: Row) -> bool:
    same = ["queue", "meta", *envelope_of(before, after)]
    return as_json([row[key] for key in same]) == as_json([before[key] for key in same])


def became(row: Row, request: RebindRequest) -> Row:
    """What a rebind by data or by the event makes of a message."""
    meta = copy.deepcopy(row["meta"])
    if not request.trigger_rebind_event:
        meta = {key: value for key, value in meta.items() if key not in request.unset} | request.data
        return named(row, {"meta": meta, "sender": row["sender"], "recipient": row["recipient"]})
    handled: Any = SimpleNamespace(meta=meta, sender=row["sender"], recipient=row["recipient"])
    obey(handled, request.data)
    return named(row, vars(handled))


def restored(row: Row, before: Row, after: Row) -> Row:
    """What an undo makes of a message that is as the rebind left it."""
    changed = envelope_of(before, after)
    domain = before["domain"] if "recipient" in changed else row["domain"]
    due = before["due"] if row["num_attempts"] == before["num_attempts"] else row["due"]
    had = {name: before[name] for name in ("queue", "meta", *changed)}
    return copy.deepcopy(had) | {"domain": domain, "due": due}


def named(row: Row, new: Row) -> Row:
    """A message's new state with the domain and the queue that follow from it."""
    recipient = new["recipient"]
    if recipient != row["recipient"]:  # the event has set it: a list
        recipient = [f"{address.split('@')[0]}@{domain_of(address)}" for address in recipient]
        recipient = recipient[0] if len(recipient) == 1 else recipient
    domain = row["domain"] if recipient == row["recipient"] else domain_of(recipient)
    return new | {"recipient": recipient, "domain": domain, "queue": name(new["meta"], domain)}


def name(meta: Row, domain: str) -> str:
    """The name of a message's queue: docs/contract.md, "The name of a message's queue"."""
    queue, campaign, tenant, route = (meta[key] if isinstance(meta.get(key), str) else None for key in NAMING)
    before = f"{campaign}:{tenant or ''}@" if campaign is not None else "" if tenant is None else f"{tenant}@"
    return before + domain + ("" if route is None else f"!{route}") if queue is None else queue


def matches(wanted: Criteria, row: Row) -> bool:
    """Whether the criteria pick the message."""
    found = re.fullmatch(r"(?s:(?:(?:([^:@]*):)?([^@]*)@)?([^!]*)(?:!(.*))?)", row["queue"])
    assert found
    campaign, tenant, domain, route = found.groups()
    pairs = [(wanted.campaign, campaign), (wanted.tenant, tenant)]
    pairs += [(lower(wanted.domain), lower(domain)), (lower(wanted.routing_domain), lower(route))]
    lists = [(wanted.queue, row["queue"]), (wanted.id, row["id"])]
    return all(criterion is None or criterion == component for criterion, component in pairs) and all(
        not names or name in names for names, name in lists
    )


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
places = st.integers(0, 20)
few = st.just(()) | st.just(()) | st.lists(places.map(str), min_size=1, max_size=4).map(tuple)
criteria = st.builds(
    Criteria,
    queue=few,  # those of the messages at these places
    id=few,
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
steps = st.one_of(
    st.tuples(st.just("ask"), by_data | by_event),
    st.tuples(st.just("ask"), by_data | by_event),
    st.tuples(st.just("undo"), st.builds(RebindRequest, data=st.just({}), undo=places.map(str), **common)),
    st.tuples(st.just("undo"), st.builds(RebindRequest, data=st.just({}), undo=places.map(str), **common)),
    st.tuples(st.sampled_from(["again", "deliver to one", "deliver", "postpone", "hold"]), places),
)
sessions = st.lists(steps, min_size=3, max_size=8)


@pytest.fixture(scope="module")
def registry(url: str) -> QueueRegistry:
    """One for all examples, which empty it themselves."""
    registry = QueueRegistry()
    registry.bind(url, busy_timeout=30)
    registry.database.prepare(create=True)
    return registry


@settings(derandomize=True, deadline=None, max_examples=15)
@given(loaded, sessions)
def test_the_registry_does_what_the_model_does(
    url: str, registry: QueueRegistry, new: list[NewMessage], session: list[tuple[str, Any]]
) -> None:
    compare(url, registry, new, session)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=100)
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
    loaded = registry.load(new)
    assert (loaded["added"], loaded["discarded"]) == (len(kept), len(new) - len(kept))
    model = Model([as_loaded(each, row) for each, row in zip(kept, stored(url), strict=True)])
    assert stored(url) == model.rows
    assert all(start <= row["created"] <= time.time() for row in model.rows)
    asked: list[RebindRequest] = []
    with connected_to(obey):
        for step, what in session:
            if step in ("deliver", "deliver to one", "postpone", "hold") and model.rows:
                work(registry, model, what % len(model.rows), step)
            elif step == "again" and asked:
                same(url, registry, model, asked[what % len(asked)])
            elif step in ("ask", "undo"):
                ids = [*(row["rebind_id"] for row in model.history), "unknown"]
                undo = None if step == "ask" else ids[int(what.undo) % len(ids)]
                asked.append(replace(what, undo=undo, criteria=placed(what.criteria, model.rows)))
                same(url, registry, model, asked[-1])


def placed(criteria: Criteria, rows: list[Row]) -> Criteria:
    """The criteria, with names and ids instead of places of messages; an unknown one if there are no more messages."""

    def at(key: str, places: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted({rows[int(place)][key] if int(place) < len(rows) else "unknown" for place in places}))

    return replace(criteria, queue=at("queue", criteria.queue), id=at("id", criteria.id))


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
        for record in in_order(deliverylog.records(registry.database))
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
    return replace(result, plan=None), replace(result.plan, moves=sorted(result.plan.moves))


def in_log(record: Row) -> Row:
    """What readers of the log see of the model's record."""
    before, after, request = record["before"], record["after"], record["of"]
    shown = {name: after[name] for name in ("sender", "recipient", "queue", "meta")}
    shown |= {name: before[name] for name in ("id", "size", "num_attempts")}
    content = f"Rebound from {before['queue']} to {after['queue']}: {request.reason}"
    shown |= {"rebind_id": record["rebind_id"], "old_queue": before["queue"], "actor": request.actor}
    return shown | {"content": content}


def work(registry: QueueRegistry, model: Model, place: int, what: str) -> None:
    """A worker delivers a message, or to its first recipient if there are several, puts it off, or claims it."""
    row = model.rows[place]
    this = tables.messages.c.id == row["id"]
    with registry.database.begin_write() as db:
        if what == "deliver" or (what == "deliver to one" and isinstance(row["recipient"], str)):
            del model.rows[place]
            db.execute(delete(tables.messages).where(this))
            return
        changes: Row = {"leased_until": 9e9}
        if what == "postpone":
            changes = {"leased_until": 0.0, "due": 5e9, "num_attempts": row["num_attempts"] + 1}
        elif what == "deliver to one":
            left = row["recipient"][1:]
            changes = {"recipient": left if len(left) > 1 else left[0], "domain": domain_of(left)}
        row |= changes
        db.execute(update(tables.messages).where(this).values(changes))


def as_loaded(new: NewMessage, row: Row) -> Row:
    """What is stored of a message that was loaded; `created` is the registry's."""
    recipient = new.recipient[0] if len(new.recipient) == 1 else new.recipient
    domain = domain_of(recipient)
    fields = {key: getattr(new, key) for key in ("id", "sender", "due", "num_attempts")}
    named = {"recipient": recipient, "domain": domain, "queue": name(new.meta, domain), "size": len(new.content)}
    meta = json.loads(json.dumps(new.meta))  # an example may have the same list at two keys
    return fields | named | {"meta": meta, "created": row["created"], "leased_until": 0.0}
