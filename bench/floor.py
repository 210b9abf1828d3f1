"""The floor: each kind of rebind as bare SQL by hand, on one connection that is already open.

It knows nothing of the service, and does no more than must be done: the same messages changed, the same records and row
of history written, the same counts told, as durably.
"""

import json
import sqlite3
import time
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
from kinds import KINDS, MOVED, ONE_QUEUE, REASON, RETRY_KEY, SALE

Counts = tuple[int, int]
"""How many messages matched, and how many moved."""

NODEID = str(uuid.uuid4())
INDEX = "CREATE INDEX messages_queue_due ON messages (queue, due)"
NAMES = """WITH RECURSIVE names (queue) AS (SELECT min(queue) FROM messages UNION ALL
    SELECT (SELECT min(queue) FROM messages WHERE queue > names.queue) FROM names WHERE names.queue IS NOT NULL)
    SELECT queue FROM names WHERE queue IS NOT NULL"""
BEFORE = ("id", "sender", "recipient", "size", "created", "num_attempts", "meta", "domain", "due")
LOG = f"INSERT INTO log (type, rebind_id, queue, old_queue, {', '.join(BEFORE)})"
HISTORY = """INSERT INTO rebinds (rebind_id, event_time, actor, nodeid, reason, request, idempotency_key, matched,
    moved, flushed, first_key, last_key) VALUES ({0}, {0}, '127.0.0.1', {0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}, {0})"""

OF_ONE_QUEUE = {"queue": ONE_QUEUE, "none": "nobody@"}
"""By kind, what is in the names of the queues that match."""
ALREADY_THERE = {"queue": f"queue = '{MOVED}'", "campaign": f"queue GLOB '{SALE}:*'"}
"""By the key that is set, which messages do not move."""


def _new_name(data: dict[str, str], text: Callable[[str], str]) -> str:
    """The SQL for the new name of a message's queue; `text` gives that of a string in its metadata."""

    def part(key: str) -> str:
        return f"'{data[key]}'" if key in data else text(key)

    if "queue" in data:
        return part("queue")
    before = f"{part('campaign')} || ':' || coalesce({part('tenant')}, '') || '@', {part('tenant')} || '@', ''"
    return f"coalesce({part('queue')}, coalesce({before}) || domain || coalesce('!' || {part('routing_domain')}, ''))"


def _row(kind: str, rebind_id: str, now: float, counts: Counts, keys: tuple[int, int]) -> tuple[Any, ...]:
    """The row of history."""
    body = KINDS[kind].body
    matched, moved = counts
    flushed = matched if body.get("always_flush") else moved
    asked = json.dumps({"reason": REASON, "unset": [], **body})
    return rebind_id, now, NODEID, REASON, asked, KINDS[kind].key, matched, moved, flushed, *keys


# SQLite


def open_sqlite(file: str) -> sqlite3.Connection:
    """A connection as the service's, as far as it matters for durability and memory."""
    db = sqlite3.connect(file, isolation_level=None)
    for pragma in ("busy_timeout = 30000", "synchronous = FULL", "foreign_keys = ON", "journal_mode = WAL"):
        db.execute(f"PRAGMA {pragma}")
    db.execute("PRAGMA cache_size = -32768")
    return db


def sqlite(db: sqlite3.Connection, kind: str) -> Counts:
    """One rebind of this kind, from BEGIN to COMMIT. Returns the counts."""
    name = _new_name(KINDS[kind].body["data"], _sqlite_text)
    if kind == "dry":
        counts: Counts = db.execute(f"SELECT count(*), sum(queue <> {name}) FROM messages").fetchone()
        return counts
    db.execute("BEGIN IMMEDIATE")
    if KINDS[kind].key:
        db.execute("SELECT * FROM rebinds WHERE idempotency_key = ?", (RETRY_KEY,)).fetchall()
    now, rebind_id, before = time.time(), str(uuid.uuid4()), _sqlite_last_key(db)
    counts = _sqlite_update(db, kind, name, now, rebind_id)
    row = _row(kind, rebind_id, now, counts, (before + 1, _sqlite_last_key(db)))
    db.execute(HISTORY.format("?"), row)
    db.execute("COMMIT")
    return counts


def _sqlite_text(key: str) -> str:
    return f"CASE json_type(meta, '$.{key}') WHEN 'text' THEN json_extract(meta, '$.{key}') END"


def _sqlite_last_key(db: sqlite3.Connection) -> int:
    (key,) = db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'log'").fetchone()
    return int(key)


def _sqlite_update(db: sqlite3.Connection, kind: str, name: str, now: float, rebind_id: str) -> Counts:
    """Change the messages, and write their records."""
    data, where = KINDS[kind].body["data"], ""
    if kind in OF_ONE_QUEUE:
        matching = [queue for (queue,) in db.execute(NAMES) if OF_ONE_QUEUE[kind] in queue]
        if not matching:
            return 0, 0
        where = f"WHERE rowid IN (SELECT rowid FROM messages WHERE queue = '{matching[0]}')"
    moves = [already for key, already in ALREADY_THERE.items() if key in data]
    staying = 0
    if moves and not where:
        (staying,) = db.execute(f"SELECT count(*) FROM messages WHERE {moves[0]}").fetchone()
    elif not moves and db.execute(f"SELECT count(*) FROM messages WHERE queue <> {name}").fetchone()[0]:
        # Each message's queue must be named again, so that somebody has to look whether its name stays.
        raise AssertionError("a message is in a queue that is not its own, which this floor does not move")
    sets = ["meta = json_patch(meta, :data)"] if data else []
    if moves:
        sets += [f"queue = {name}", f"due = CASE WHEN queue <> {name} THEN :now ELSE due END"]
    sets += ["due = :now"] if kind == "flush" else []
    recorded, rebuilt = kind != "suppressed", not where and (moves or kind == "flush")
    if recorded:
        old = ", ".join(f"old.{column}" for column in BEFORE)
        values = f"VALUES ('AdminRebind', '{rebind_id}', new.queue, old.queue, {old})"
        db.execute(f"CREATE TEMP TRIGGER rebound AFTER UPDATE ON main.messages BEGIN {LOG} {values}; END")
    if rebuilt:  # if all its entries change, an index is made again in less time than it is kept up
        db.execute("DROP INDEX messages_queue_due")
    parameters = {"data": json.dumps(data), "now": now}
    matched = db.execute(f"UPDATE messages SET {', '.join(sets)} {where}", parameters).rowcount
    if rebuilt:
        db.execute(INDEX)
    if recorded:
        db.execute("DROP TRIGGER rebound")
    return matched, matched - staying if moves else 0


# PostgreSQL


def postgresql(db: psycopg.Connection[Any], kind: str) -> Counts:
    """One rebind of this kind, from its first statement to the commit. Returns the counts."""
    data = KINDS[kind].body["data"]
    name = _new_name(data, _postgresql_text)
    if kind == "dry":
        counts = _pair(db, f"SELECT count(*), count(*) FILTER (WHERE queue <> {name}) FROM messages", {})
        db.commit()
        return counts
    if KINDS[kind].key:
        db.execute("SELECT * FROM rebinds WHERE idempotency_key = %s", (RETRY_KEY,)).fetchall()
    now, rebind_id, before = time.time(), str(uuid.uuid4()), _postgresql_last_key(db)
    matching = []
    if kind in OF_ONE_QUEUE:
        matching = [queue for (queue,) in db.execute(NAMES) if OF_ONE_QUEUE[kind] in queue]
    parameters = {"now": now, "rebind_id": rebind_id, "data": json.dumps(data), "queues": matching}
    counts = (0, 0) if kind == "none" else _pair(db, _postgresql_update(kind, name, data), parameters)
    row = _row(kind, rebind_id, now, counts, (before + 1, _postgresql_last_key(db)))
    db.execute(HISTORY.format("%s"), row)
    db.commit()
    return counts


def _postgresql_text(key: str) -> str:
    return f"CASE jsonb_typeof(meta -> '{key}') WHEN 'string' THEN meta ->> '{key}' END"


def _postgresql_last_key(db: psycopg.Connection[Any]) -> int:
    return _pair(db, "SELECT last_value - 1 + is_called::integer, 0 FROM log_key_seq", {})[0]


def _postgresql_update(kind: str, name: str, data: dict[str, str]) -> str:
    """Change the messages, write their records, and count, all in one: PostgreSQL 18 returns the old row too."""
    meta = ", meta = meta || %(data)s::jsonb" if data else ""
    due = "%(now)s" if kind == "flush" else f"CASE WHEN queue <> {name} THEN %(now)s ELSE due END"
    where = "WHERE queue = ANY(%(queues)s)" if kind in OF_ONE_QUEUE else ""
    returned = ", ".join(f"old.{column}" for column in BEFORE)
    values = f"'AdminRebind', %(rebind_id)s, queue, old_queue, {', '.join(BEFORE)}"
    records = "" if kind == "suppressed" else f", records AS ({LOG} SELECT {values} FROM changed)"
    return f"""WITH changed AS (UPDATE messages SET queue = {name}, due = {due}{meta} {where}
            RETURNING new.queue, old.queue AS old_queue, {returned}){records}
        SELECT count(*), count(*) FILTER (WHERE queue <> old_queue) FROM changed"""


def _pair(db: psycopg.Connection[Any], statement: str, parameters: dict[str, Any]) -> Counts:
    ((first, second),) = db.execute(statement, parameters).fetchall()
    return first, second
