"""Tests of bulk.py: every way in which messages are changed does the same, and leaves the tables as they were.

What a rebind does is tested in test_registry.py, however it is done.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import logged, engine_for, message, stored
from sqlalchemy import event, text
from sqlalchemy.engine import Engine

import bulk
from mail import Message
from queues import HandlerFailed, QueueRegistry, RebindRequest, RebindResult, rebind
from store import StoreRefused

INDEXES = {
    "sqlite": "SELECT name, sql FROM sqlite_schema WHERE type IN ('index', 'trigger') ORDER BY name",
    "postgresql": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname",
}


def ask(queues: QueueRegistry, data: dict[str, str], dry_run: bool = False, **fields: Any) -> RebindResult:
    return queues.rebind(RebindRequest("a test", data, domain="a.example", **fields), actor="me", dry_run=dry_run)


def pin(message: Message, data: dict[str, str]) -> None:
    """A handler that does what is done without the event."""
    message.meta |= data


def older_postgresql(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as before 18, whose UPDATE returns what was there before."""
    if url.startswith("sqlite"):
        pytest.skip("of PostgreSQL alone")
    monkeypatch.setattr(bulk, "_returns_old", lambda _: False)


def indexes(url: str) -> list[Any]:
    """Those of the database, and in SQLite its triggers."""
    with engine_for(url).connect() as db:
        return list(db.execute(text(INDEXES[db.dialect.name])).all())


def described(rows: list[dict[str, Any]], *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[column] for column in columns) for row in rows]


@contextmanager
def statements() -> Iterator[list[str]]:
    """The SQL of whatever is executed meanwhile."""
    seen: list[str] = []

    def note(_db: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield seen
    event.remove(Engine, "before_cursor_execute", note)


@pytest.mark.parametrize("bystanders", [0, 30], ids=["most", "few"])
@pytest.mark.parametrize("way", ["data", "event", "older PostgreSQL"])
@pytest.mark.parametrize("data", [{"queue": "b"}, {"campaign": "b"}, {"note": "b"}, {}], ids=str)
@pytest.mark.parametrize("flush", [False, True], ids=["", "flush"])
def test_most_messages_and_a_few_are_changed_alike_in_every_way(
    queues: QueueRegistry,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    bystanders: int,
    way: str,
    data: dict[str, str],
    flush: bool,
) -> None:
    if way == "older PostgreSQL":
        older_postgresql(url, monkeypatch)
    others = [message("ada@other.example") for _ in range(bystanders)]
    metas = [{"campaign": "a"}, {"campaign": "b"}, {"queue": "pinned@a.example"}, {}]
    queues.load(others[::2] + [message("ada@a.example", meta=meta) for meta in metas] + others[1::2])
    with rebind.connected_to(pin):
        result = ask(queues, data, always_flush=flush, trigger_rebind_event=way == "event")

    old = ["a:@a.example", "b:@a.example", "pinned@a.example", "a.example"]
    new = {"queue": ["b"] * 4, "campaign": ["b:@a.example"] * 4}.get("".join(data), old)
    if "campaign" in data:
        new[2] = old[2]  # what is pinned stays
    handled = [row for row in stored(url) if row["domain"] == "a.example"]
    assert described(handled, "queue", "meta") == list(zip(new, [meta | data for meta in metas], strict=True))
    assert [row["due"] > 1e9 for row in handled] == [flush or a != b for a, b in zip(old, new, strict=True)]
    moved = sum(a != b for a, b in zip(old, new, strict=True))
    assert (result.matched, result.moved, result.flushed) == (4, moved, 4 if flush else moved)
    records = [(row["id"], queue, row["queue"], row["meta"]) for row, queue in zip(handled, old, strict=True)]
    assert described(logged(url), "id", "old_queue", "queue", "meta") == records
    bystanding = [row for row in stored(url) if row["domain"] != "a.example"]
    assert described(bystanding, "queue", "meta", "due") == [("other.example", {}, 1e9)] * bystanders


@pytest.mark.parametrize("older", [False, True], ids=["", "older PostgreSQL"])
@pytest.mark.parametrize("limit", [None, 1, 2, 9])
def test_without_a_criterion_every_message_is_changed_or_those_due_soonest(
    queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch, older: bool, limit: int | None
) -> None:
    if older:
        older_postgresql(url, monkeypatch)
    old = ["c.example", "b.example", "a.example"]
    queues.load([message(f"ada@{name}", due=due) for name, due in zip(old, (3.0, 1.0, 2.0), strict=True)])
    handled = [limit is None or rank < limit for rank in (2, 0, 1)]
    rebound = RebindRequest("a test", {"queue": "b"})
    for dry_run in (True, False):
        result = queues.rebind(rebound, actor="me", dry_run=dry_run, limit=limit)
        assert (result.matched, result.moved, result.flushed) == (sum(handled),) * 3
    new = ["b" if one else name for one, name in zip(handled, old, strict=True)]
    assert described(stored(url), "queue") == [(name,) for name in new]
    assert described(logged(url), "old_queue") == [(name,) for one, name in zip(handled, old, strict=True) if one]


def test_a_message_in_a_queue_that_is_not_its_own_moves_when_other_metadata_is_set(
    queues: QueueRegistry, url: str
) -> None:
    queues.load([message("ada@a.example") for _ in range(3)])
    with engine_for(url).begin() as db:
        db.execute(text("UPDATE messages SET queue = 'wrong@a.example' WHERE key = (SELECT max(key) FROM messages)"))
    assert ask(queues, {"note": "x"}, dry_run=True).moved == 1
    assert ask(queues, {"note": "x"}).moved == 1
    assert [(row["queue"], row["due"] > 1e9) for row in stored(url)] == [("a.example", n == 2) for n in range(3)]


@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_the_indexes_are_the_same_after_most_messages_moved_and_after_that_failed(
    queues: QueueRegistry, url: str, event: bool
) -> None:
    queues.load([message("ada@a.example") for _ in range(20)])
    before = indexes(url)
    with rebind.connected_to(pin):
        with pytest.raises((StoreRefused, HandlerFailed)):
            ask(queues, {"queue": "b" * 2001}, trigger_rebind_event=event)
        assert indexes(url) == before
        assert ask(queues, {"queue": "b"}, trigger_rebind_event=event).moved == 20
    assert indexes(url) == before
    if url.startswith("sqlite"):
        with engine_for(url).connect() as db:
            assert db.scalar(text("PRAGMA integrity_check")) == "ok"


def test_an_index_is_built_anew_where_most_messages_move_and_kept_where_few_do_or_none(
    queues: QueueRegistry, url: str
) -> None:
    """In SQLite: on PostgreSQL it would lock everybody out."""
    queues.load([message("ada@a.example"), *(message("ada@other.example") for _ in range(9))])
    rebuilt = []
    for fields in ({"queue": "ada@a.example"}, {"note": "x"}):
        with statements() as few:
            ask(queues, fields)
        rebuilt.append(any("CREATE INDEX" in each for each in few))
    queues.load([message("ada@a.example") for _ in range(30)])
    for fields in ({"note": "y"}, {"queue": "b"}):
        with statements() as most:
            ask(queues, fields)
        rebuilt.append(any("CREATE INDEX" in each for each in most))
    assert rebuilt == [False, False, False, url.startswith("sqlite")]


def test_most_messages_are_most_of_those_that_are_left(queues: QueueRegistry, url: str) -> None:
    """As in a store that has been in use, where old keys are gone but for a few."""
    queues.load([message("ada@a.example") for _ in range(9)] + [message("ada@other.example") for _ in range(2)])
    with engine_for(url).begin() as db:
        db.execute(text("UPDATE messages SET key = key - 1000000 WHERE key = (SELECT min(key) FROM messages)"))
    for domain in ("a.example", None):
        with statements() as seen:
            assert queues.rebind(RebindRequest("a test", {"queue": "b"}, domain=domain), actor="me").moved > 1
        assert any("CREATE INDEX" in each for each in seen) == url.startswith("sqlite")


@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_what_matches_nothing_and_a_dry_run_wait_for_no_other_rebind(
    queues: QueueRegistry, url: str, event: bool
) -> None:
    queues.load([message("ada@a.example")])
    queues.bind(url, busy_timeout=0)
    lock = "BEGIN IMMEDIATE" if url.startswith("sqlite") else "SELECT pg_advisory_xact_lock(hashtext('rebind'))"
    with engine_for(url).connect() as holder, rebind.connected_to(pin):
        holder.exec_driver_sql(lock)
        nothing = RebindRequest("a test", {"queue": "b"}, domain="no.example", trigger_rebind_event=event)
        assert queues.rebind(nothing, actor="me").matched == 0
        assert ask(queues, {"queue": "b"}, dry_run=True, trigger_rebind_event=event).moved == 1
        holder.rollback()


@pytest.mark.parametrize("page_size", [4096, 8192])
def test_a_new_sqlite_store_has_large_pages_and_one_with_others_is_used_as_it_is(
    queues: QueueRegistry, tmp_path: Path, page_size: int
) -> None:
    file = tmp_path / "queues.db"
    if page_size == 4096:
        with closing(sqlite3.connect(file)) as db:
            db.execute("CREATE TABLE of_an_earlier_version (x)")
    queues.bind(f"sqlite:///{file}", busy_timeout=30)
    queues.load([message("ada@a.example")])
    assert ask(queues, {"queue": "b"}).moved == 1
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA page_size").fetchone() == (page_size,)


def test_a_store_whose_index_somebody_dropped_gets_it_back(queues: QueueRegistry, url: str) -> None:
    """In SQLite, when most messages move."""
    if not url.startswith("sqlite"):
        pytest.skip("of SQLite alone")
    queues.load([message("ada@a.example") for _ in range(3)])
    before = indexes(url)
    with engine_for(url).begin() as db:
        db.execute(text("DROP INDEX messages_queue_due"))
    assert ask(queues, {"queue": "b"}).moved == 3
    assert indexes(url) == before


@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_sites_own_trigger_on_messages_causes_no_record(queues: QueueRegistry, tmp_path: Path, event: bool) -> None:
    url = f"sqlite:///{tmp_path / 'queues.db'}"
    queues.bind(url, busy_timeout=30)
    queues.load([message("ada@a.example") for _ in range(3)])
    with engine_for(url).begin() as db:
        db.execute(
            text(
                "CREATE TRIGGER tried AFTER UPDATE OF queue ON messages BEGIN "
                "UPDATE messages SET num_attempts = num_attempts + 1 WHERE key = new.key; END"
            )
        )
    with rebind.connected_to(pin):
        assert ask(queues, {"queue": "b"}, trigger_rebind_event=event).moved == 3
    assert [row["num_attempts"] for row in stored(url)] == [1] * 3
    assert len(logged(url)) == 3
