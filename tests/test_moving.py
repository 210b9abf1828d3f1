"""Tests of moving.py and the engines: every way to change messages has the same result, and leaves the tables intact.

What a rebind does is tested in test_registry.py, however it is done.
"""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from databases import engine_for, logged, run_sql, stored
from factories import ask, connected_to, counts, message, set_data
from sqlalchemy import inspect, make_url, text
from waiting import until

import postgresql
from event import HandlerFailed
from queues import QueueRegistry
from sqlite import MANY
from store import StoreRefused

OLDER = pytest.param("older PostgreSQL", marks=pytest.mark.postgresql)


def go_back_to(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as before PostgreSQL 18, whose UPDATE returns what was there before, if `way` says so."""
    if way == "older PostgreSQL":
        monkeypatch.setattr(postgresql, "RETURNS_OLD", (99,))


def indexes(url: str) -> list[Any]:
    """Those of the messages."""
    return sorted(map(str, inspect(engine_for(url)).get_indexes("messages")))


def described(rows: list[dict[str, Any]], *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[column] for column in columns) for row in rows]


@pytest.mark.parametrize("bystanders", [0, 30], ids=["most", "few"])
@pytest.mark.parametrize("way", ["data", "event", OLDER])
@pytest.mark.parametrize("data", [{"queue": "b"}, {"campaign": "b"}, {"note": "b"}, {}], ids=str)
@pytest.mark.parametrize("flush", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "flush"])
def test_most_messages_and_a_few_are_changed_alike_in_every_way(
    queues: QueueRegistry,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    bystanders: int,
    way: str,
    data: dict[str, str],
    flush: bool,
) -> None:
    go_back_to(way, monkeypatch)
    others = [message("ada@other.example") for _ in range(bystanders)]
    metas = [{"campaign": "a"}, {"campaign": "b"}, {"queue": "pinned@a.example"}, {}]
    queues.load(others[::2] + [message("ada@a.example", meta=meta) for meta in metas] + others[1::2])
    with connected_to(set_data):
        result = ask(queues, data, domain="a.example", always_flush=flush, trigger_rebind_event=way == "event")

    old = ["a:@a.example", "b:@a.example", "pinned@a.example", "a.example"]
    new = {"queue": ["b"] * 4, "campaign": ["b:@a.example"] * 4}.get("".join(data), old)
    if "campaign" in data:
        new[2] = old[2]  # what is pinned stays
    handled = [row for row in stored(url) if row["domain"] == "a.example"]
    assert described(handled, "queue", "meta") == list(zip(new, [meta | data for meta in metas], strict=True))
    assert [row["due"] > 1e9 for row in handled] == [flush or a != b for a, b in zip(old, new, strict=True)]
    moved = sum(a != b for a, b in zip(old, new, strict=True))
    assert counts(result) == (4, moved, 4 if flush else moved)
    records = [(row["id"], queue, row["queue"], row["meta"]) for row, queue in zip(handled, old, strict=True)]
    assert described(logged(url), "id", "old_queue", "queue", "meta") == records
    bystanding = [row for row in stored(url) if row["domain"] != "a.example"]
    assert described(bystanding, "queue", "meta", "due") == [("other.example", {}, 1e9)] * bystanders


@pytest.mark.parametrize("way", ["data", OLDER])
@pytest.mark.parametrize("limit", [None, 1, 2, 9])
def test_without_a_criterion_every_message_is_changed_or_those_due_soonest(
    queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch, way: str, limit: int | None
) -> None:
    go_back_to(way, monkeypatch)
    old = ["c.example", "b.example", "a.example"]
    queues.load([message(f"ada@{name}", due=due) for name, due in zip(old, (3.0, 1.0, 2.0), strict=True)])
    handled = [limit is None or rank < limit for rank in (2, 0, 1)]
    for dry_run in (True, False):
        assert counts(ask(queues, {"queue": "b"}, dry_run=dry_run, limit=limit)) == (sum(handled),) * 3
    new = ["b" if one else name for one, name in zip(handled, old, strict=True)]
    assert described(stored(url), "queue") == [(name,) for name in new]
    assert described(logged(url), "old_queue") == [(name,) for one, name in zip(handled, old, strict=True) if one]


def test_a_message_in_a_queue_that_is_not_its_own_moves_when_other_metadata_is_set(
    queues: QueueRegistry, url: str
) -> None:
    queues.load([message("ada@a.example") for _ in range(3)])
    run_sql(url, f"UPDATE messages SET queue = 'wrong@a.example' WHERE id = '{stored(url)[-1]['id']}'")
    assert counts(ask(queues, {"note": "x"}, dry_run=True)) == (3, 1, 1)
    assert counts(ask(queues, {"note": "x"})) == (3, 1, 1)
    assert [(row["queue"], row["due"] > 1e9) for row in stored(url)] == [("a.example", n == 2) for n in range(3)]


@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_the_indexes_are_the_same_after_most_messages_moved_and_after_that_failed(
    queues: QueueRegistry, url: str, event: bool
) -> None:
    queues.load([message("ada@a.example") for _ in range(20)])
    before = indexes(url)
    with connected_to(set_data):
        with pytest.raises((StoreRefused, HandlerFailed)):
            ask(queues, {"queue": "b" * 2001}, trigger_rebind_event=event)
        assert indexes(url) == before
        assert counts(ask(queues, {"queue": "b"}, trigger_rebind_event=event)) == (20,) * 3
    assert indexes(url) == before
    if url.startswith("sqlite"):
        with engine_for(url).connect() as db:
            assert db.scalar(text("PRAGMA integrity_check")) == "ok"


@pytest.mark.sqlite
@pytest.mark.parametrize("page_size", [4096, 8192])
def test_a_new_sqlite_store_has_large_pages_and_one_with_others_is_used_as_it_is(
    queues: QueueRegistry, tmp_path: Path, page_size: int
) -> None:
    file = tmp_path / "queues.db"
    if page_size == 4096:
        with closing(sqlite3.connect(file)) as db:
            db.execute("CREATE TABLE of_an_earlier_version (x)")
    queues.bind(f"sqlite:///{file}", busy_timeout=30)
    queues.database.prepare(create=True)
    queues.load([message("ada@a.example")])
    assert counts(ask(queues, {"queue": "b"})) == (1,) * 3
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA page_size").fetchone() == (page_size,)


@pytest.mark.sqlite
def test_a_store_whose_index_somebody_dropped_gets_it_back(queues: QueueRegistry, url: str) -> None:
    queues.load([message("ada@a.example") for _ in range(3)])
    before = indexes(url)
    run_sql(url, "DROP INDEX messages_queue_due")
    assert counts(ask(queues, {"queue": "b"})) == (3,) * 3
    assert indexes(url) == before


@pytest.mark.sqlite
@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_sites_own_trigger_on_messages_causes_no_record(queues: QueueRegistry, tmp_path: Path, event: bool) -> None:
    url = f"sqlite:///{tmp_path / 'queues.db'}"
    queues.bind(url, busy_timeout=30)
    queues.database.prepare(create=True)
    queues.load([message() for _ in range(3)])
    count_tries = "UPDATE messages SET num_attempts = num_attempts + 1 WHERE id = new.id"
    run_sql(url, f"CREATE TRIGGER tried AFTER UPDATE OF queue ON messages BEGIN {count_tries}; END")
    with connected_to(set_data):
        assert counts(ask(queues, {"queue": "b"}, trigger_rebind_event=event)) == (3, 3, 3)
    assert [row["num_attempts"] for row in stored(url)] == [1] * 3
    assert len(logged(url)) == 3


def in_file(url: str) -> list[str]:
    """The queue of each message, as the file has it without its -wal; none in the middle of a checkpoint."""
    file = sqlite3.connect(f"file:{make_url(url).database}?immutable=1", uri=True)
    with closing(file), suppress(sqlite3.DatabaseError):
        return [queue for (queue,) in file.execute("SELECT queue FROM messages")]
    return []


@pytest.mark.sqlite
@pytest.mark.parametrize("way", ["data", "event"])
def test_a_checkpoint_follows_a_large_rebind(queues: QueueRegistry, url: str, way: str) -> None:
    queues.load([message() for _ in range(MANY)])
    with connected_to(set_data):
        ask(queues, {"queue": "q"}, trigger_rebind_event=way == "event")
    until(lambda: in_file(url) == ["q"] * MANY)


@pytest.mark.sqlite
def test_rebinds_of_a_few_messages_leave_the_checkpoint_to_sqlite(queues: QueueRegistry, url: str) -> None:
    queues.load([message(meta={"large": "x" * 1_000_000}) for _ in range(20)])
    ask(queues, {"queue": "q"})
    assert in_file(url) == ["q"] * 20
