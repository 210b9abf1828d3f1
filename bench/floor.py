"""The floor: each kind of rebind as bare SQL by hand, on one connection that is already open.

It knows nothing of the service, and does no more than must be done: the same messages changed, the same records
written, the same counts told, as durably.
"""

import json
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import psycopg

NODEID, REBIND_ID = "b" * 36, "a" * 36
Counts = tuple[int, int]
"""How many messages matched, and how many moved."""

SALE, MOVED, ONE_QUEUE = "summer-sale", "moved.example", "spring-sale:tenant-1@gmail.example"
INDEX = "CREATE INDEX messages_queue_due ON messages (queue, due)"
OF_MESSAGE = ("id", "sender", "recipient", "queue", "meta", "size", "created", "num_attempts")
LOG = f"type, {', '.join(OF_MESSAGE)}, event_time, nodeid, rebind_id, old_queue, reason, actor"
NAMES = """WITH RECURSIVE names (queue) AS (SELECT min(queue) FROM messages UNION ALL
    SELECT (SELECT min(queue) FROM messages WHERE queue > names.queue) FROM names WHERE names.queue IS NOT NULL)
    SELECT queue FROM names WHERE queue IS NOT NULL"""


def _record(new: str, old_queue: str, now: float) -> str:
    of_message = ", ".join(new + name for name in OF_MESSAGE)
    return f"'AdminRebind', {of_message}, {now}, '{NODEID}', '{REBIND_ID}', {old_queue}, 'wrong campaign', '127.0.0.1'"


def _named(part: Callable[[str], str]) -> str:
    """The name of a message's queue, where `part` gives the SQL of a part of it."""
    before = f"{part('campaign')} || ':' || coalesce({part('tenant')}, '') || '@', {part('tenant')} || '@', ''"
    return f"coalesce({part('queue')}, coalesce({before}) || domain || coalesce('!' || {part('routing_domain')}, ''))"


# SQLite


def open_sqlite(file: str) -> sqlite3.Connection:
    """A connection as the service's, as far as it matters for durability and memory."""
    db = sqlite3.connect(file, isolation_level=None)
    for pragma in ("busy_timeout = 30000", "synchronous = FULL", "foreign_keys = ON", "journal_mode = WAL"):
        db.execute(f"PRAGMA {pragma}")
    db.execute("PRAGMA cache_size = -32000")
    return db


def sqlite(db: sqlite3.Connection, kind: str) -> Counts:
    """One rebind of this kind (kinds.KINDS), from BEGIN to COMMIT. Returns the counts."""
    if kind == "none":
        return _no_match(db.execute(NAMES).fetchall())
    if kind == "dry":
        name = _named(_sqlite_part({"campaign": SALE}))
        matched, moved = db.execute(f"SELECT count(*), sum(queue <> {name}) FROM messages").fetchone()
        return matched, moved
    db.execute("BEGIN IMMEDIATE")
    counts = _SQLITE[kind](db, time.time())
    db.execute("COMMIT")
    return counts


def _sqlite_part(data: dict[str, str]) -> Callable[[str], str]:
    def part(key: str) -> str:
        if key in data:
            return f"'{data[key]}'"
        return f"CASE json_type(meta, '$.{key}') WHEN 'text' THEN json_extract(meta, '$.{key}') END"

    return part


def _all_logged(db: sqlite3.Connection, statement: str, parameters: tuple[Any, ...], now: float) -> int:
    """Run an UPDATE of messages that writes a record of each. Returns how many."""
    record = _record("new.", "old.queue", now)
    db.execute(f"""CREATE TEMP TRIGGER rebound AFTER UPDATE ON main.messages
        BEGIN INSERT INTO log ({LOG}) VALUES ({record}); END""")
    matched = db.execute(statement, parameters).rowcount
    db.execute("DROP TRIGGER rebound")
    return matched


def _constant(db: sqlite3.Connection, now: float, logged: bool = True) -> Counts:
    already = db.execute("SELECT count(*) FROM messages WHERE queue = ?", (MOVED,)).fetchone()[0]
    # Where every row of it changes, an index is made anew in less time than it is kept up.
    db.execute("DROP INDEX messages_queue_due")
    statement = """UPDATE messages SET meta = json_patch(meta, ?), queue = ?,
        due = CASE WHEN queue <> ? THEN ? ELSE due END"""
    parameters = (json.dumps({"queue": MOVED}), MOVED, MOVED, now)
    matched = _all_logged(db, statement, parameters, now) if logged else db.execute(statement, parameters).rowcount
    db.execute(INDEX)
    return matched, matched - already


def _suppressed(db: sqlite3.Connection, now: float) -> Counts:
    return _constant(db, now, logged=False)


def _campaign(db: sqlite3.Connection, now: float) -> Counts:
    already = db.execute(f"SELECT count(*) FROM messages WHERE queue GLOB '{SALE}:*'").fetchone()[0]
    name = _named(_sqlite_part({"campaign": SALE}))
    db.execute("DROP INDEX messages_queue_due")
    statement = f"""UPDATE messages SET meta = json_patch(meta, ?), queue = {name},
        due = CASE WHEN queue <> {name} THEN ? ELSE due END"""
    matched = _all_logged(db, statement, (json.dumps({"campaign": SALE}), now), now)
    db.execute(INDEX)
    return matched, matched - already


def _metadata(db: sqlite3.Connection, now: float) -> Counts:
    _refuse_misnamed(db)
    data = json.dumps({"note": "seen by support"})
    return _all_logged(db, "UPDATE messages SET meta = json_patch(meta, ?)", (data,), now), 0


def _flush(db: sqlite3.Connection, now: float) -> Counts:
    _refuse_misnamed(db)
    db.execute("DROP INDEX messages_queue_due")
    matched = _all_logged(db, "UPDATE messages SET due = ?", (now,), now)
    db.execute(INDEX)
    return matched, 0


def _refuse_misnamed(db: sqlite3.Connection) -> None:
    """Each message is to be named anew, so that somebody has to look whether its queue's name stays."""
    name = _named(_sqlite_part({}))
    if db.execute(f"SELECT count(*) FROM messages WHERE queue <> {name}").fetchone()[0]:
        raise AssertionError("a message is in a queue that is not its own, which this floor does not move")


def _one_queue(db: sqlite3.Connection, now: float) -> Counts:
    statement = """UPDATE messages SET meta = json_patch(meta, ?), queue = ?, due = ?
        WHERE key IN (SELECT key FROM messages WHERE queue = ?)"""
    matched = _all_logged(db, statement, (json.dumps({"queue": MOVED}), MOVED, now, ONE_QUEUE), now)
    return matched, matched


_SQLITE: dict[str, Callable[[sqlite3.Connection, float], Counts]] = {
    "constant": _constant,
    "campaign": _campaign,
    "metadata": _metadata,
    "flush": _flush,
    "suppressed": _suppressed,
    "queue": _one_queue,
}

# PostgreSQL


def postgresql(db: psycopg.Connection[Any], kind: str) -> Counts:
    """One rebind of this kind (kinds.KINDS), from its first statement to the commit. Returns the counts."""
    now = time.time()
    names = [ONE_QUEUE] if kind == "queue" else [name for (name,) in db.execute(NAMES)]
    if kind == "none":
        counts = _no_match([(name,) for name in names])
    elif kind == "dry":
        name = _named(_postgresql_part({"campaign": SALE}))
        counts = _counts(db, f"SELECT count(*), count(*) FILTER (WHERE queue <> {name}) FROM messages", {})
    else:
        parameters: dict[str, Any] = {"names": names, "now": now}
        counts = _counts(db, *_postgresql_statement(kind, parameters))
    db.commit()
    return counts


def _postgresql_statement(kind: str, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """All in one: PostgreSQL 18 returns the old queue beside the new row."""
    data = {"campaign": {"campaign": SALE}, "metadata": {"note": "seen by support"}, "flush": {}}.get(
        kind, {"queue": MOVED}
    )
    name = _named(_postgresql_part(data)) if "queue" not in data else f"'{MOVED}'"
    meta = ", meta = meta || %(data)s::jsonb" if data else ""
    due = "%(now)s" if kind == "flush" else f"CASE WHEN queue <> {name} THEN %(now)s ELSE due END"
    records = (
        ""
        if kind == "suppressed"
        else f""",
        records AS (INSERT INTO log ({LOG}) SELECT {_record("", "old_queue", parameters["now"])} FROM changed)"""
    )
    statement = f"""WITH changed AS (UPDATE messages SET queue = {name}, due = {due}{meta}
            WHERE queue = ANY(%(names)s) RETURNING new.*, old.queue AS old_queue){records}
        SELECT count(*), count(*) FILTER (WHERE queue <> old_queue) FROM changed"""
    return statement, parameters | {"data": json.dumps(data)}


def _counts(db: psycopg.Connection[Any], statement: str, parameters: dict[str, Any]) -> Counts:
    ((matched, moved),) = db.execute(statement, parameters).fetchall()
    return matched, moved


def _postgresql_part(data: dict[str, str]) -> Callable[[str], str]:
    def part(key: str) -> str:
        if key in data:
            return f"'{data[key]}'"
        return f"CASE jsonb_typeof(meta -> '{key}') WHEN 'string' THEN meta ->> '{key}' END"

    return part


def _no_match(names: list[tuple[str]]) -> Counts:
    return sum(name.startswith("nobody@") or ":nobody@" in name for (name,) in names), 0
