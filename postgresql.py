"""PostgreSQL's way: connections, what its errors mean, expressions, and selecting and changing messages.

sqlite.py has the same functions. queues.py chooses one of the two modules when the registry is bound.
"""

import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any

import psycopg
from sqlalchemy import (
    CTE,
    JSON,
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Select,
    Text,
    Update,
    and_,
    bindparam,
    case,
    cast,
    column,
    create_engine,
    event,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from message import from_json, to_json
from moving import (
    BEFORE,
    FIRST_ROWS,
    UPDATED_COLUMNS,
    Decide,
    NewState,
    Selection,
    batches,
    record_columns,
    rows_to_read,
)
from moving import Update as MessageUpdate
from names import MetaText
from store import StoreConflict, StoreRefused, StoreUnavailable, StoreUnusable
from tables import TOO_LONG, log, messages

BEGIN_WRITE = "BEGIN"

ENCODING = ("SHOW server_encoding", "UTF8")  # how to ask for it, and what it must be: then any text can be stored

# SQLSTATEs and their classes (PostgreSQL's documentation, appendix A), by what they mean to us.
CONFLICT = ("40",)  # transaction rollback: a deadlock, a serialization failure
REFUSED = ("22", "23", "54")  # data exception, integrity violation, a limit of the program
UNUSABLE = ("28", "3D", "3F", "42501")  # who we are, which database, which schema, no right
# Connection lost, out of resources, a lock that was not to be had, an operator's intervention, the system's errors;
# read-only (a standby or a demoted primary); the timeouts of a transaction; a missing table or column (the database was
# made again); a damaged file.
UNAVAILABLE = ("08", "53", "55", "57", "58", "25006", "25P03", "25P04", "42P01", "42703", "F0", "XX")
# Why a connection fails is told in words alone, without an SQLSTATE. These reasons do not pass by themselves. What a
# server says in another language is not known here, and taken for one that may.
REFUSED_CONNECTION = re.compile(
    r"does not exist|authentication failed|no password supplied|pg_hba\.conf|not permitted|permission denied|not found"
    r"|unrecognized configuration|requires a value|(?<![\w.])invalid [a-z]"
)


def connect_to(url: str, busy_timeout: float) -> Engine:
    """Connections to the database at `url`. Raises ArgumentError."""
    half = max(2, round(busy_timeout / 2))  # libpq takes no less
    engine = create_engine(
        url,
        json_serializer=to_json,
        json_deserializer=lambda value: from_json(value.decode()),
        pool_pre_ping=True,  # a connection that was cut is replaced before it is used
        max_overflow=-1,  # the server's threads are the bound
        connect_args={
            "client_encoding": "utf8",
            # A host that vanishes costs the busy timeout: half to notice it, half to try a new connection.
            "connect_timeout": half,
            "tcp_user_timeout": half * 1000,
            "keepalives_idle": max(1, half // 2),
            "keepalives_interval": max(1, half // 4),
            "keepalives_count": 2,
        },
    )
    event.listen(engine, "connect", lambda connection, _: _set_up(connection, busy_timeout))
    return engine


def _set_up(connection: Any, busy_timeout: float) -> None:
    connection.autocommit = True  # the driver begins nothing by itself: store.Database does
    connection.execute("SET default_transaction_isolation = 'read committed'")
    connection.execute(f"SET lock_timeout = {max(1, busy_timeout * 1000):.0f}")  # 0 would be for ever
    # A 200 is durable, whatever the role's setting; remote_apply is stronger.
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') <> 'remote_apply'"
    )


def shown(url: str) -> str:
    """The store for people: its URL, whose password SQLAlchemy hides, without options: one may be a password."""
    return make_url(url).set(query={}).render_as_string()


def open_file(url: str, create: bool) -> None:
    """Nothing: a database is created by its administrator, and the server tells whether it is there."""


def refuse_damaged(db: Connection) -> None:
    """Nothing: PostgreSQL has no file that we could read."""


def meaning(error: DBAPIError) -> Exception | None:
    """What a driver's error means to us; None if it is a fault in our own code."""
    reason = " ".join(str(error.orig).split())
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        if error.statement is None and REFUSED_CONNECTION.search(reason):
            return StoreUnusable("the database cannot be used", reason)
        known = isinstance(error.orig, psycopg.OperationalError)
        return StoreUnavailable("the database is out of reach", reason) if known else None
    said = error.orig.diag.message_primary or state  # type: ignore[union-attr]
    if state.startswith(CONFLICT):
        return StoreConflict(f"the database ended the transaction: {said}")
    if state.startswith(REFUSED):
        return StoreRefused(TOO_LONG if "queue_length" in reason else f"the tables do not allow it: {said}")
    if state.startswith(UNUSABLE):
        return StoreUnusable("the database cannot be used", reason)
    if state.startswith(UNAVAILABLE):
        return StoreUnavailable(f"the database cannot do this now: {said}")
    return None


def take_turn(db: Connection) -> None:
    """Wait until no other rebind is running."""
    db.execute(text("SELECT pg_advisory_xact_lock(hashtext('rebind'))"))


def tidy(db: Connection) -> None:
    """Nothing: the server does it by itself."""


def writers_of_log(db: Connection) -> set[str]:
    """The transactions that may still commit records with smaller keys than the last one that can be read.

    Each of them took this lock before it took a key.
    """
    return set(
        db.scalars(
            text(
                "SELECT virtualtransaction FROM pg_locks WHERE relation = 'log'::regclass AND granted "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
                "AND mode = 'RowExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid()"
            )
        )
    )


def last_key(db: Connection) -> int:
    """The last key of the log that was given to anybody."""
    return int(db.scalar(text("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM log_key_seq")) or 0)


def octets(value: ColumnElement[str]) -> ColumnElement[int]:
    """How many bytes a text has in UTF-8."""
    return func.octet_length(value)


def in_queues(names: Sequence[str]) -> ColumnElement[Any]:
    """Whether a message is in one of the queues; the names, however many, are one parameter."""
    return messages.c.queue == _any_of(names)


def following(name: ColumnElement[str]) -> ColumnElement[str]:
    """The first text after `name`, in the order of bytes: no text has a NUL here."""
    return name + func.chr(1)


def from_meta(build: Callable[[MetaText], ColumnElement[str]], with_record: bool) -> ColumnElement[str]:
    """What `build` makes of an expression for the string at a key of a message's metadata, or of its record's."""

    def meta_text(table: str, key: str) -> ColumnElement[str]:
        value = f"{table}.meta -> '{key}'"
        return literal_column(f"CASE jsonb_typeof({value}) WHEN 'string' THEN {table}.meta ->> '{key}' END", Text)

    return build(meta_text)


def merge(data: Mapping[str, str], unset: Collection[str]) -> ColumnElement[Any]:
    """A message's metadata with every key of `data` set and the keys `unset` removed."""
    meta: ColumnElement[Any] = messages.c.meta
    if unset:
        meta = meta.op("-", return_type=JSONB())(literal(list(unset), ARRAY(Text)))
    return meta.op("||", return_type=JSONB())(literal(data, JSONB)) if data else meta


def restored(keys: Sequence[str]) -> ColumnElement[Any]:
    """A message's metadata with these keys as they were when its record was written."""
    return merge({}, keys).op("||", return_type=JSONB())(_part(log.c.meta, keys))


def _part(meta: ColumnElement[Any], keys: Sequence[str]) -> ColumnElement[Any]:
    """These keys of some metadata."""
    # For a few keys, an undo takes two thirds of the time that it takes with jsonb_each.
    members = (case((meta.has_key(key), func.jsonb_build_object(key, meta[key]))) for key in keys)
    return reduce(lambda one, more: one.op("||")(more), (func.coalesce(each, literal({}, JSONB)) for each in members))


def _changes(meta: ColumnElement[Any], keys: Sequence[str]) -> ColumnElement[Any]:
    """What a record says of these keys of the new metadata: message.Changes, as JSON."""
    return func.jsonb_build_object("unset", literal(list(keys), JSONB), "data", _part(meta, keys))


def _any_of(texts: Sequence[str]) -> ColumnElement[Any]:
    return func.any(literal(list(texts), ARRAY(Text)))


def select_from(db: Connection, found: Selection) -> Selection:
    """The same messages: the planner has statistics of its own."""
    return found


def update_all(db: Connection, found: Selection, new: NewState, rebind_id: str | None) -> tuple[int, int]:
    """Set the new state of all messages in one statement.

    A message that another transaction has changed meanwhile is evaluated again. Messages are locked as they come: if a
    worker locks several in another order, the database ends one of the two.

    rebind_id: for the record of each; None to write no records.
    Returns how many there were, and how many moved.
    """
    if new.restored:
        found = replace(found, where=found.where & new.differs)
    where = and_(found.where, messages.c.id == log.c.id) if found.of_records else found.where
    old: dict[str, ColumnElement[Any]] = {n: literal_column(f"old.{n}", messages.c[n].type) for n in ("queue", "meta")}
    if found.limit is not None or not _returns_old(db):
        keys = [log.c.key] if found.of_records else []
        locked = found.select(messages.c.id, messages.c.queue, messages.c.meta, *keys)
        before = locked.with_for_update(key_share=True, of=messages).cte("locked")
        where, old = messages.c.id == before.c.id, {"queue": before.c.queue, "meta": before.c.meta}
        if found.of_records:
            where &= log.c.key == before.c.key
    values = new.values() or {"meta": messages.c.meta}
    returned = [*(messages.c[name] for name in (*BEFORE[:-1], "queue")), messages.c.meta.label("new_meta")]
    changed: CTE = (
        update(messages)
        .where(where)
        .values(values)
        .returning(*returned, old["queue"].label("old_queue"), old["meta"].label("meta"))
        .cte("changed")
    )
    moved = func.count().filter(changed.c.queue != changed.c.old_queue)
    counts = select(func.count(), moved).select_from(changed)
    if rebind_id is not None:
        columns = record_columns(rebind_id, changed.c, changed.c.queue, changed.c.old_queue)
        if new.restored:
            columns["changes"] = _changes(changed.c.new_meta, new.restored)
        counts = counts.add_cte(insert(log).from_select(list(columns), select(*columns.values())).cte("records"))
    matched, moving = db.execute(counts).one()
    return matched, moving


def _returns_old(db: Connection) -> bool:
    """Whether UPDATE can return what was there before, as `old`: a fifth faster than to lock the messages first."""
    return (db.dialect.server_version_info or (0,)) >= (18,)


def rows(db: Connection, found: Selection) -> Generator[Sequence[Any]]:
    """The rows of each message, in a transaction that changes nothing."""
    _open_cursor(db, found.select(*found.columns(messages.c.id)))
    with _pipeline(db) as driver:
        yield from _read_ahead(driver)


def update_each(db: Connection, found: Selection, decide: Decide, rebind_id: str | None) -> None:
    """Make each message what `decide` says, and write a record of each unless `rebind_id` is None.

    The cursor finds what was there when it was opened, and not what this transaction has made of it since. It locks as
    it goes: another transaction that is in the way may end this one after handlers were called. While `decide` looks
    at some messages, the server changes those before and reads those after them: that saves a third of the time.
    """
    _open_cursor(db, found.select(*found.columns(messages.c.id)).with_for_update(key_share=True, of=messages))
    change = _update_batch(rebind_id).compile(db)
    with _pipeline(db) as driver:
        for batch in batches(decide(_read_ahead(driver)), lambda one: len(one.meta)):
            updates = to_json([one._asdict() for one in batch])
            driver.execute(str(change), change.params | {"updates": updates})


def _open_cursor(db: Connection, each: Select[Any]) -> None:
    db.execute(text("SET LOCAL cursor_tuple_fraction = 1"))  # the planner may expect that it is read to its end
    compiled = each.compile(db)
    db.exec_driver_sql(f"DECLARE each_message CURSOR FOR {compiled}", compiled.params)


def _read_ahead(driver: psycopg.Connection) -> Iterator[Sequence[Any]]:
    """The cursor's rows. The next ones are asked for before these are used."""
    size = FIRST_ROWS
    reading = driver.execute(f"FETCH {size} FROM each_message")
    while found := reading.fetchall():
        size = rows_to_read(size, sum(len(row[2]) for row in found))
        reading = driver.execute(f"FETCH {size} FROM each_message")
        yield from found


def _update_batch(rebind_id: str | None) -> Update | Insert:
    """Make messages what `updates` says, a JSON list of moving.Update, and write their records if wanted."""
    each = (
        func.json_to_recordset(bindparam("updates", type_=JSON))
        .table_valued(*(column(name, JSONB() if name == "changes" else Text()) for name in MessageUpdate._fields))
        .render_derived(with_types=True)
    )
    new = {name: cast(each.c[name], messages.c[name].type) for name in UPDATED_COLUMNS}
    change = update(messages).where(messages.c.id == each.c.at).values(new)
    if rebind_id is None:
        return change
    # Both parts of the statement see the messages as they were before it.
    columns = record_columns(rebind_id, messages.c, each.c.queue, messages.c.queue) | {"changes": each.c.changes}
    records = select(*columns.values()).where(messages.c.id == each.c.at)
    return insert(log).from_select(list(columns), records).add_cte(change.cte("changed"))


@contextmanager
def _pipeline(db: Connection) -> Iterator[psycopg.Connection]:
    """The driver's own connection, on which a statement does not wait for the one before it.

    Its errors are turned into SQLAlchemy's, which has no pipeline.
    """
    driver: Any = db.connection.driver_connection
    try:
        with driver.pipeline():
            yield driver
    except psycopg.Error as error:
        raise DBAPIError.instance(None, None, error, psycopg.Error) from error
