"""PostgreSQL's way to do what moving.Backend lists."""

import logging
import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

import moving
from message import to_json
from moving import Decide, MessageRow, NewState, Selection, Update
from store import StoreConflict, StoreRefused, StoreUnavailable, StoreUnusable
from tables import TOO_LONG, contents, log, messages

RETURNS_OLD = (18,)  # from this version on, which takes a fifth less time than to lock the messages first

logging.getLogger("psycopg").addHandler(logging.NullHandler())  # or it prints what we say in our own words

BEGIN_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
BEGIN_WRITE = "BEGIN"

DriverError: type[Exception] = psycopg.Error
ENCODING = ("SHOW server_encoding", "UTF8")  # any text can be stored then

# SQLSTATEs and their classes (PostgreSQL's documentation, appendix A), by what they mean to us.
CONFLICT = ("40",)  # transaction rollback: a deadlock, a serialization failure
REFUSED = ("22", "23", "54")  # data exception, integrity violation, a limit of the program
OURS = ("log", "rebinds")  # tables whose rows no request can make wrong
CHECK_VIOLATION = "23514"  # of a row of the log: one that a worker wrote
UNUSABLE = ("28", "3D", "3F", "42501")  # who we are, which database, which schema, no right
READ_ONLY = "25006"
# Connection lost, out of resources, a lock that was not to be had, an operator's intervention, the system's errors;
# the timeouts of a transaction; a missing table or column (the database was made again); a damaged file.
UNAVAILABLE = (READ_ONLY, "08", "53", "55", "57", "58", "25P03", "25P04", "42P01", "42703", "F0", "XX")

# Why a connection fails is told in words alone, without an SQLSTATE. These reasons do not pass by themselves. What a
# server says in another language is not known here, and taken for one that may.
REFUSED_CONNECTION = re.compile(
    r"does not exist|authentication failed|no password supplied|pg_hba\.conf|not permitted|permission denied|not found"
    r"|unrecognized configuration|requires a value|(?<![\w.])invalid [a-z]"
)


def connect_to(url: str, busy_timeout: float) -> sa.Engine:
    if "@" in (sa.make_url(url).host or ""):
        raise sa.exc.ArgumentError("write an @ in the password as %40")
    # A host that vanishes costs the busy timeout: half to notice it, half to try a new connection.
    half = max(2, round(busy_timeout / 2))  # libpq takes no less
    patience = {"idle": max(1, half // 2), "interval": max(1, half // 4), "count": 2}
    engine = sa.create_engine(
        url,
        **moving.ENGINE,
        pool_pre_ping=True,  # a connection that was cut is replaced before it is used
        connect_args={"client_encoding": "utf8", "connect_timeout": half, "tcp_user_timeout": half * 1000}
        | {f"keepalives_{name}": value for name, value in patience.items()},
    )
    settings = {
        "default_transaction_isolation": "read committed",
        "lock_timeout": f"{max(1, busy_timeout * 1000):.0f}",  # milliseconds; 0 would be for ever
        # If this host vanishes, the server must not keep its locks for two hours.
        **{f"tcp_keepalives_{name}": str(value) for name, value in patience.items()},
        "tcp_user_timeout": str(half * 1000),
        "rebind.set_up": "yes",  # see take_turn
        "extra_float_digits": "1",  # or doubles would not come back as the same numbers
    }
    sa.event.listen(engine, "connect", lambda connection, _: _set_up(connection, settings))
    return engine


def _set_up(connection: Any, settings: Mapping[str, str]) -> None:
    connection.autocommit = True  # the driver begins nothing by itself: store.Database does
    all_of_them = "SELECT set_config(key, value, false) FROM json_each_text(%s)"
    connection.execute(all_of_them, [to_json(settings)])
    # A 200 is durable, whatever the role's setting; remote_apply is stronger.
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') <> 'remote_apply'"
    )


def open_file(url: str, create: bool) -> None:
    pass  # a database is created by its administrator, and the server tells whether it is there


def meaning(error: sa.exc.DBAPIError) -> Exception | None:
    reason = " ".join(str(error.orig).split())
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        if error.statement is None and REFUSED_CONNECTION.search(reason):
            return StoreUnusable("the database cannot be used", reason)
        known = isinstance(error.orig, psycopg.OperationalError)
        return StoreUnavailable("the database is out of reach", reason) if known else None
    said = error.orig.diag.message_primary or state  # type: ignore[union-attr]
    if state == READ_ONLY:
        said = "it is a standby, a demoted primary or set to read-only"
    if state.startswith(CONFLICT):
        return StoreConflict(f"the database ended the transaction: {said}")
    ours = error.orig.diag.table_name in OURS and state != CHECK_VIOLATION  # type: ignore[union-attr]
    if state.startswith(REFUSED) and ours:
        return StoreUnusable("the database refused a row of the service's own; docs/runbook.md says what to do", reason)
    if state.startswith(REFUSED):
        return StoreRefused(TOO_LONG if "queue_length" in reason else f"the tables do not allow it: {said}")
    if state.startswith(UNUSABLE):
        return StoreUnusable("the database cannot be used", reason)
    if state.startswith(UNAVAILABLE):
        return StoreUnavailable(f"the database cannot do this now: {said}")
    return None


def now(db: sa.Connection) -> float:
    return float(db.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())::double precision")))


def writers_of_log(db: sa.Connection) -> set[str]:
    if db.scalar(sa.text("SELECT pg_is_in_recovery()")):
        raise StoreUnusable("a standby cannot tell which records are still to come: ask the primary server")
    # Each of them took this lock before it took a key.
    writing = """
        SELECT virtualtransaction FROM pg_locks WHERE relation = 'log'::regclass AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND mode = 'RowExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid()
    """
    return set(db.scalars(sa.text(writing)))


def last_key(db: sa.Connection) -> int:
    return int(db.scalar(sa.text("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM log_key_seq")) or 0)


def among(column: sa.Column[str], values: Sequence[str]) -> sa.ColumnElement[bool]:
    return column == sa.func.any(sa.literal(list(values), ARRAY(sa.Text)))


def meta_text(key: str) -> sa.ColumnElement[str]:
    found = f"CASE jsonb_typeof(messages.meta -> '{key}') WHEN 'string' THEN messages.meta ->> '{key}' END"
    return sa.literal_column(found, sa.Text)


def merge(meta: sa.ColumnElement[Any], data: Mapping[str, str], unset: Collection[str]) -> sa.ColumnElement[Any]:
    if unset:
        meta = meta.op("-", return_type=JSONB())(sa.literal(list(unset), ARRAY(sa.Text)))
    return meta.op("||", return_type=JSONB())(sa.literal(data, JSONB)) if data else meta


def take_turn(db: sa.Connection) -> None:
    locked = "SELECT current_setting('rebind.set_up', true) FROM pg_advisory_xact_lock(hashtext('rebind'))"
    if not db.scalar(sa.text(locked)):
        raise StoreUnusable("the session's settings do not last: PgBouncer must use pool_mode = session")


def sized(db: sa.Connection, selection: Selection) -> Selection:
    return selection  # the planner has statistics of its own


def update_all(db: sa.Connection, selection: Selection, new: NewState, rebind_id: str | None) -> tuple[int, int]:
    # One statement. A message that another transaction has changed meanwhile is evaluated again. Messages are locked as
    # they come: if a worker locks several in another order, the database ends one of the two.
    where = selection.where
    old: Any = {name: sa.literal_column(f"old.{name}", messages.c[name].type) for name in moving.BEFORE}
    if selection.of_records:
        where &= messages.c.id == log.c.id
    if selection.limit is not None or (db.dialect.server_version_info or (0,)) < RETURNS_OLD:
        keys = [log.c.key] if selection.of_records else []
        found = selection.select(*messages.c[moving.BEFORE], *keys)
        locked = found.with_for_update(key_share=True, of=messages).cte("locked")
        where, old = messages.c.id == locked.c.id, locked.c
        if selection.of_records:
            where &= log.c.key == locked.c.key
    record = moving.record_of(rebind_id, old, messages.c, moving.NEW_OF_UNDO if selection.of_records else ())
    changed, records = _recorded(sa.update(messages).where(where).values({**new.values}), record)
    moves = sa.func.count().filter(changed.c.queue != changed.c.old_queue)
    counts = sa.select(sa.func.count(), moves).select_from(changed)
    if rebind_id is not None:
        counts = counts.add_cte(records.cte("records"))
    matched, moved = db.execute(counts).one()
    return matched, moved


def rows(db: sa.Connection, selection: Selection) -> Generator[MessageRow]:
    _open_cursor(db, selection.select(*moving.MESSAGE_COLUMNS))
    driver = _driver(db)
    with driver.pipeline():
        yield from _read_ahead(driver)


def update_each(db: sa.Connection, selection: Selection, decide: Decide, now: float, rebind_id: str | None) -> None:
    # The cursor finds what was there when it was opened, and not what this transaction has made of it since. It locks
    # as it goes: another transaction that is in the way may end this one after handlers were called. While `decide`
    # looks at some messages, the server changes those before and reads those after them, which saves a third of the
    # time.
    _open_cursor(db, selection.select(*moving.MESSAGE_COLUMNS).with_for_update(key_share=True, of=messages))
    change = _update_batch(now, rebind_id).compile(db)
    waiting: list[Update] = []

    def send() -> None:
        if waiting:
            driver.execute(str(change), change.params | {"updates": to_json([one._asdict() for one in waiting])})
        waiting.clear()

    driver = _driver(db)
    with driver.pipeline():
        # A batch that is sent before the next messages have arrived would hold them up: answers come in order.
        decided = map(decide, _read_ahead(driver, send))
        for batch in moving.batches(decided, lambda one: len(one.meta or "")):
            send()
            waiting += batch
        send()


def contents_of(db: sa.Connection, ids: Sequence[str]) -> dict[str, bytes]:
    found = "SELECT id, data FROM contents WHERE id = ANY(%s)"
    with _driver(db).cursor(binary=True) as cursor:  # half the time of bytes as text
        return dict(cursor.execute(found, [ids]).fetchall())


def insert(db: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    form = "BINARY" if table is contents else "TEXT"  # bytes would be twice as long as text
    statement = f"COPY {table} ({', '.join(rows[0])}) FROM STDIN (FORMAT {form})"  # half the time of INSERT
    with _driver(db).cursor().copy(statement.encode()) as copy:
        for row in rows:
            copy.write_row([*row.values()])


def _open_cursor(db: sa.Connection, each: sa.Select[Any]) -> None:
    db.execute(sa.text("SET LOCAL cursor_tuple_fraction = 1"))  # the planner may expect that it is read to its end
    compiled = each.compile(db)
    db.exec_driver_sql(f"DECLARE each_message CURSOR FOR {compiled}", compiled.params)


def _read_ahead(driver: psycopg.Connection, arrived: Callable[[], object] = lambda: None) -> Iterator[MessageRow]:
    """The cursor's rows. The next ones are asked for before these are used. Calls `arrived` before it asks for more."""
    size = moving.FIRST_ROWS
    reading = driver.execute(f"FETCH {size} FROM each_message")
    while found := list(map(MessageRow._make, reading.fetchall())):
        arrived()
        size = moving.rows_to_read(size, sum(len(row.meta) for row in found))
        reading = driver.execute(f"FETCH {size} FROM each_message")
        yield from found


def _update_batch(now: float, rebind_id: str | None) -> sa.Update | sa.Insert:
    """Make messages what `updates` says, a JSON list of moving.Update, and write their records if wanted."""
    each = (
        sa.func.json_to_recordset(sa.bindparam("updates", type_=sa.JSON))
        .table_valued(*(sa.column(name, sa.Text()) for name in moving.Update._fields))
        .render_derived(with_types=True)
    )
    became = {name: sa.cast(each.c[name], messages.c[name].type) for name in moving.UPDATED_COLUMNS}
    before = messages.alias("before")
    due = {"due": sa.case((each.c.is_due == "true", now), else_=messages.c.due)}
    this = sa.literal_column("messages.ctid") == sa.literal_column("before.ctid")  # its row is locked, and stays there
    change = (
        sa.update(messages)
        .where(before.c.id == each.c.id, this)
        .values({name: sa.func.coalesce(value, messages.c[name]) for name, value in became.items()} | due)
    )
    if rebind_id is None:
        return change
    news = {name: became[name.removeprefix("new_")] for name in moving.NEW_COLUMNS}
    _, records = _recorded(change, moving.record_of(rebind_id, before.c, became) | news)
    return records


def _recorded(change: sa.Update, record: moving.Record) -> tuple[sa.CTE, sa.Insert]:
    """What is changed, as records, and the statement that writes them."""
    changed = change.returning(*(value.label(name) for name, value in record.items())).cte("changed")
    return changed, sa.insert(log).from_select(list(record), sa.select(changed))


def _driver(db: sa.Connection) -> psycopg.Connection:
    """The driver's own connection, for what SQLAlchemy has not."""
    return db.connection.driver_connection  # type: ignore[return-value]
