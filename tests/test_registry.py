"""Tests of the registry: what a rebind does to messages and to the delivery log."""

import itertools
import json
import platform
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from databases import contents, history, in_order, locked, logged, metas, names, nothing_changes, run_sql, stored
from factories import ODD_TEXT, ask, connected_to, counts, message, set_data
from sqlalchemy import delete, func, insert, select, text

import deliverylog
import tables
from message import Message
from moving import BATCH, MAX_BATCH, batches
from names import queue_name
from queues import QueueRegistry, QueueSummary
from rebinding import Move, Plan
from store import StoreRefused, StoreUnavailable
from tables import MAX_NAME

BY_DATA_AND_BY_EVENT = pytest.mark.parametrize("event", [False, True], ids=["data", "event"])

# Which messages


def test_criteria_pick_queues_by_the_parts_of_their_names_whatever_metadata_says(
    queues: QueueRegistry, url: str
) -> None:
    named = [{"campaign": "a", "tenant": "t"}, {"campaign": "b", "tenant": "t"}, {"tenant": "t"}, {"campaign": "a"}]
    pinned = [{"queue": "a:t@pinned", "campaign": "b"}, {"queue": "pinned", "campaign": "a", "tenant": "t"}]
    queues.load(message(meta=meta) for meta in named + pinned)
    assert counts(ask(queues, {"queue": "q"}, campaign="a", tenant="t")) == (2, 2, 2)
    assert names(url) == ["q", "b:t@example.com", "t@example.com", "a:@example.com", "q", "pinned"]


def test_messages_that_handlers_move_into_matched_queues_are_handled_once(queues: QueueRegistry, url: str) -> None:
    def next_queue(message: Message, data: dict[str, str]) -> None:
        message.meta["n"] += 1
        message.meta["queue"] = f"q{message.meta['n']:05}"

    number = 3 * BATCH + 1
    queues.load(message(meta={"queue": f"q{n:05}", "n": n}) for n in range(number))
    with connected_to(next_queue):
        assert counts(ask(queues, trigger_rebind_event=True)) == (number, number, number)
    assert metas(url) == [{"queue": f"q{n:05}", "n": n} for n in range(1, number + 1)]
    assert names(url) == [meta["queue"] for meta in metas(url)]
    ids = [row["id"] for row in stored(url)]
    assert [(row["id"], row["old_queue"], row["queue"]) for row in logged(url)] == [
        (id, f"q{n:05}", f"q{n + 1:05}") for n, id in enumerate(ids)
    ]


# What becomes of them


def test_data_is_set_over_earlier_values_and_all_others_stay_what_they_are(queues: QueueRegistry, url: str) -> None:
    """A thousand keys may be set. A number stays the same too: 1 is not 1.0, and no digit is lost."""
    earlier: dict[str, Any] = {"a": {"nested": {"x": 1}}, "b": [1, 2], "c": None, "d": {"": None, "b": [{}]}}
    numbers = {"int": 1, "float": 1.0, "true": True, "big": 2**70, "small": -1.5e-7, "exact": 0.1, "no": False}
    queues.load([message(meta=earlier | numbers)])
    data = {"a": "1", "b": "", "c": "null", "new": "{}"} | {f"{n}": "" for n in range(996)}
    ask(queues, data)
    after: dict[str, Any] = data | {"d": {"": None, "b": [{}]}} | numbers
    (found,) = metas(url)
    assert {key: repr(value) for key, value in found.items()} == {key: repr(value) for key, value in after.items()}


HOSTILE = {
    "all sorts": ODD_TEXT,
    "SQL": "' OR 1=1; DROP TABLE messages; --",
    "a parameter": ":key %(key)s $1 ? %s",
    "not a character": "\ufffe\uffff\U0010ffff",
    "a quote and a backslash": "'\"\\`\\'\\\"",
    "a path in JSON": "$.a[0]",
    "much": "x" * 300_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_text_wherever_it_stands(queues: QueueRegistry, url: str, text: str) -> None:
    meta = {"campaign": "c", "tenant": "t", "routing_domain": "r", "kept " + text: [text]}
    queues.load([message(meta=meta)])
    criteria: list[dict[str, Any]] = [{key: text} for key in ("campaign", "tenant", "domain", "routing_domain")]
    assert [counts(ask(queues, {"queue": "b"}, **criterion)) for criterion in criteria] == [(0, 0, 0)] * 4
    ask(queues, {"a": text, text: "b"}, reason=text, domain="example.com")
    (record,) = deliverylog.records(queues.database)
    assert record["meta"] == meta | {"a": text, text: "b"}
    assert record["response"]["content"] == f"Rebound from c:t@example.com!r to c:t@example.com!r: {text}"


KEYS = ("queue", "campaign", "tenant", "routing_domain")
VALUES: tuple[Any, ...] = ("unset", None, 1, {"a": "b"}, "", "a", ":@!é\"'\\")
METAS = [
    {key: value for key, value in zip(KEYS, values, strict=True) if value != "unset"}
    for values in itertools.product(VALUES, repeat=4)
]


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(keys, marks=[] if keys == ("campaign", "tenant") else pytest.mark.slow, id=str(keys))
        for n in range(5)
        for keys in itertools.combinations(KEYS, n)
    ],
)
def test_sql_and_python_give_a_queue_the_same_name(queues: QueueRegistry, url: str, keys: tuple[str, ...]) -> None:
    queues.load(message("ada@[IPv6:::1]", meta=meta) for meta in METAS)
    data = dict.fromkeys(keys, ":@!'b")
    ask(queues, data)
    assert names(url) == [queue_name(meta | data, "[ipv6:::1]") for meta in METAS]


# limit


@BY_DATA_AND_BY_EVENT
def test_a_limit_picks_those_due_soonest_of_all_queues_and_of_those_the_smallest_ids(
    queues: QueueRegistry, url: str, event: bool
) -> None:
    dues = {"a": 5.0, "é": 2.0, "b": 2.0, "B": 2.0, "c": 6.0, "d": 1.0}
    queues.load(message(id=id, meta={"tenant": id}, due=due) for id, due in dues.items())
    with connected_to(set_data):
        assert counts(ask(queues, {"queue": "q"}, limit=3, trigger_rebind_event=event)) == (3, 3, 3)
    assert {row["id"] for row in stored(url) if row["queue"] == "q"} == {"d", "B", "b"}
    assert [record["old_queue"] for record in logged(url)] == [f"{id}@example.com" for id in "Bbd"]


@pytest.mark.parametrize(
    ("data", "unset"), [({"tenant": "t"}, ()), ({"note": "x"}, ("campaign",))], ids=["set", "unset"]
)
def test_the_same_request_with_a_limit_moves_the_next_ones(
    queues: QueueRegistry, url: str, data: dict[str, str], unset: tuple[str, ...]
) -> None:
    queues.load([message(meta=data, due=0.5), *(message(meta={"campaign": "c"}, due=due) for due in (3.0, 1.0, 2.0))])
    seen = []
    for _ in range(3):
        dry = ask(queues, data, unset=unset, limit=2, dry_run=True)
        seen.append(counts(ask(queues, data, unset=unset, limit=2)))
        assert counts(dry) == seen[-1]
    assert seen == [(2, 2, 2), (1, 1, 1), (0, 0, 0)]
    assert [record["id"] for record in logged(url)] == [stored(url)[n]["id"] for n in (2, 3, 1)]


# unset


def test_unset_removes_keys_before_the_queue_is_named_with_the_domain_that_the_sender_gave(
    queues: QueueRegistry, url: str
) -> None:
    pinned = {"queue": "pinned", "campaign": "c", "é.$": [1], "kept": None}
    routed = {"campaign": "c", "routing_domain": "hold.invalid"}
    queues.load([message(meta=pinned), message(meta=routed, domain="relay.example:2525")])
    unset = ("queue", "routing_domain", "é.$", "nobody's")
    assert counts(ask(queues, {"tenant": "t"}, unset=unset)) == (2, 2, 2)
    assert metas(url) == [{"campaign": "c", "tenant": "t", "kept": None}, {"campaign": "c", "tenant": "t"}]
    assert names(url) == ["c:t@example.com", "c:t@relay.example:2525"]
    assert [record["meta"] for record in logged(url)] == metas(url)


# The plan of a dry run


@BY_DATA_AND_BY_EVENT
def test_a_plan_has_a_hundred_entries_at_most(queues: QueueRegistry, event: bool) -> None:
    queues.load([*(message(meta={"queue": f"q{n:03}"}) for n in range(102)), message(meta={"queue": "q101"})])
    with connected_to(set_data):
        planned = ask(queues, {"queue": "to"}, dry_run=True, trigger_rebind_event=event).plan
    moves = [Move("q101", "to", 2), *(Move(f"q{n:03}", "to", 1) for n in range(99))]
    assert planned == Plan(matched=103, moved=103, moves=moves, more=2)


# Records

UNKNOWN = ("peer_address", "egress_pool", "egress_source", "source_address", "feedback_report", "delivery_protocol")


@BY_DATA_AND_BY_EVENT
def test_a_record_says_what_became_of_a_message(queues: QueueRegistry, url: str, event: bool) -> None:
    meta = {"tenant": "t", "reception_protocol": "ESMTP"}
    new = message(["Ada@Example.com", "bob@other.example"], meta=meta, due=4e9, content=b"\xc3\xa9", num_attempts=2)
    queues.load([new])
    before = stored(url)[0]
    start = time.time()
    with connected_to(set_data):
        result = ask(queues, {"tenant": "u"}, reason="réason: %s {}", actor="ada", trigger_rebind_event=event)
    (row,), (rebound,) = stored(url), history(url)
    created, event_time = row["created"], rebound["event_time"]
    assert logged(url) == [
        {
            "type": "AdminRebind",
            "id": new.id,
            "sender": "news@acme.example",
            "recipient": ["Ada@Example.com", "bob@other.example"],
            "queue": "u@example.com",
            "site": "",
            "size": 2,
            "response": {
                "code": 250,
                "enhanced_code": None,
                "content": "Rebound from t@example.com to u@example.com: réason: %s {}",
                "command": None,
            },
            "timestamp": int(event_time),
            "created": int(created),
            "event_time": datetime.fromtimestamp(event_time, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "created_time": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "num_attempts": 2,
            "bounce_classification": "Uncategorized",
            "reception_protocol": "ESMTP",
            "meta": {"tenant": "u", "reception_protocol": "ESMTP"},
            "headers": {},
            "nodeid": str(uuid.uuid5(uuid.NAMESPACE_DNS, platform.node())),
            "rebind_id": result.rebind_id,
            "old_queue": "t@example.com",
            "actor": "ada",
        }
        | dict.fromkeys(UNKNOWN)
    ]
    assert row == before | {"meta": meta | {"tenant": "u"}, "queue": "u@example.com", "due": event_time}
    assert start <= event_time <= time.time()


def test_records_come_oldest_first_and_continue_after_any_key(queues: QueueRegistry) -> None:
    new = [message() for _ in range(BATCH + 1)]
    queues.load(new)
    rebinds = [ask(queues, {"queue": name}).rebind_id for name in ("z", "a")]
    records = list(deliverylog.records(queues.database))
    assert [record["rebind_id"] for record in records] == [each for each in rebinds for _ in new]
    assert [record["id"] for record in in_order(records)] == [each.id for each in new] * 2
    keys = [record["key"] for record in records]
    assert keys == sorted(set(keys))
    for after in (1, BATCH, 2 * BATCH + 2):
        assert list(deliverylog.records(queues.database, after=keys[after - 1])) == records[after:]


# load and queues


def test_a_batch_is_small_if_its_messages_are_large() -> None:
    assert [len(batch) for batch in batches([MAX_BATCH // 2] * 5, size=int)] == [3, 2]
    assert [len(batch) for batch in batches([1] * (BATCH + 1), size=int)] == [BATCH, 1]


def test_the_queues_are_summed_up_by_name(queues: QueueRegistry) -> None:
    queues.load(
        message(meta={"queue": name}, due=due, created=1e9 + due, num_attempts=int(due == 2))
        for name in ("b", "É", "B", "", "é")
        for due in (1.0, 4e9, 2.0)
    )
    assert queues.queues() == [QueueSummary(name, 3, 2, 1.0, 1e9 + 1, 1) for name in ("", "B", "b", "É", "é")]


# Those who use the tables


@BY_DATA_AND_BY_EVENT
@pytest.mark.parametrize("ascii_only", [False, True], ids=["as it is", "escaped"])
def test_metadata_is_the_same_however_its_sender_wrote_it(
    queues: QueueRegistry, url: str, event: bool, ascii_only: bool
) -> None:
    def change(message: Message, data: dict[str, str]) -> None:
        message.meta |= data
        del message.meta["é"]

    meta = {"tenant": 'té\U0001f600"\\', "é\U0001f600": {"ü": ["ö\n"]}, "kept": "ä", "é": 1}
    queues.load([message()])
    run_sql(url, f"UPDATE messages SET meta = '{json.dumps(meta, ensure_ascii=ascii_only, indent=1)}'")
    with connected_to(change):
        unset = () if event else ("é",)
        ask(queues, {"é\U0001f600": "ß", "campaign": "ç"}, unset=unset, trigger_rebind_event=event)
    after = {"tenant": 'té\U0001f600"\\', "é\U0001f600": "ß", "kept": "ä", "campaign": "ç"}
    assert (metas(url), names(url)) == ([after], ['ç:té\U0001f600"\\@example.com'])
    assert [record["meta"] for record in deliverylog.records(queues.database)] == [after]


def test_a_content_without_its_message_is_refused(queues: QueueRegistry, url: str) -> None:
    with pytest.raises(StoreRefused), queues.database.begin_write() as db:
        db.execute(insert(tables.contents).values(id="nobody's", data=b"Hello"))
    assert contents(url) == {}


# Transactions


@pytest.mark.sqlite
def test_a_commit_in_sqlite_survives_a_power_loss(queues: QueueRegistry) -> None:
    """SQLite's documentation of "PRAGMA synchronous" promises that for FULL, which is 2, in WAL mode too."""
    with queues.database.begin_write() as db:
        assert db.scalar(text("PRAGMA synchronous")) == 2


def test_a_transaction_that_reads_leaves_no_trace(queues: QueueRegistry, url: str) -> None:
    """PostgreSQL does not even allow it."""
    queues.load([message()])
    with nothing_changes(url), suppress(StoreUnavailable), queues.database.begin_read() as db:
        db.execute(delete(tables.messages))


def test_a_rebind_does_not_wait_for_those_who_only_read(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    queues.bind(url, busy_timeout=0)
    with locked(url, lock="BEGIN") as reader:
        assert reader.scalar(select(func.count()).select_from(tables.messages)) == 1
        assert counts(ask(queues, {"queue": "b"})) == (1, 1, 1)


@pytest.mark.parametrize("dry_run", [False, True], ids=["", "dry run"])
@BY_DATA_AND_BY_EVENT
def test_a_name_too_long_for_a_queue_is_refused_and_nothing_changes(
    queues: QueueRegistry, url: str, event: bool, dry_run: bool
) -> None:
    """It is measured in bytes. PostgreSQL's index takes no more."""
    queues.load([message(meta={"routing_domain": "r" * 700})])
    names = [{"queue": "é" * (MAX_NAME // 2) + "x"}, {"campaign": "c" * 700, "tenant": "t" * 700}]
    for data in names:
        with nothing_changes(url), connected_to(set_data), pytest.raises(StoreRefused, match="2000 bytes"):
            ask(queues, data, trigger_rebind_event=event, dry_run=dry_run)
    assert counts(ask(queues, {"queue": "é" * (MAX_NAME // 2)}, dry_run=dry_run)) == (1, 1, 1)
