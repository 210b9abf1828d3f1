"""SQLite's way: connections, what its errors mean, and selecting and changing messages.

postgresql.py has the same functions. queues.py chooses one of the two modules when the registry is bound.
"""

import codecs
import errno
import json
import os
import sqlite3
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    CursorResult,
    Engine,
    Insert,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    Table,
    Text,
    bindparam,
    cast,
    create_engine,
    event,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.schema import DropIndex

from message import to_json
from moving import (
    BEFORE,
    FIRST_ROWS,
    MANY,
    UPDATED_COLUMNS,
    Decide,
    NewState,
    Selection,
    batches,
    record_columns,
    rows_to_read,
)
from sqlitejson import changes, from_meta, merge, plain_keys, restored  # noqa: F401 the registry calls these here
from store import StoreDamaged, StoreRefused, StoreUnavailable, StoreUnusable
from tables import TOO_LONG, log, messages, messages_queue_due

# A transaction that reads first and writes later fails at once if another wrote in between, whatever the busy timeout:
# so a writer takes its turn at its beginning. A reader neither waits nor is waited for.
BEGIN_WRITE = "BEGIN IMMEDIATE"

ENCODING = ("PRAGMA encoding", "UTF-8")  # how to ask for it, and what it must be: then names are ordered by their bytes

CACHE = 32  # MiB of pages that a rebind keeps in memory, since its index changes all over; others keep 2

# The primary result codes (https://www.sqlite.org/rescode.html) that pass by themselves, or when somebody mends the
# disk: PERM, BUSY, LOCKED, NOMEM, READONLY, IOERR, FULL, CANTOPEN, PROTOCOL. The rest are faults of ours.
UNAVAILABLE = {3, 5, 6, 7, 8, 10, 13, 14, 15}
REFUSED = {18, 19, 20}  # TOOBIG, CONSTRAINT, MISMATCH
DAMAGED = {11, 26}  # CORRUPT, NOTADB
# Of the file: what does not mend itself.
WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EACCES}

_rowid: ColumnElement[int] = literal_column("messages.rowid", Integer)

# The messages that `update_each` goes through, for the length of its transaction: which they are is decided once, when
# it starts, though a message may move to a queue that is still to be read.
_marked = Table(
    "marked",
    MetaData(),
    Column("n", Integer, primary_key=True),
    Column("message", BigInteger, nullable=False),
    Column("record", BigInteger),
    prefixes=["TEMPORARY"],
)


def connect_to(url: str, busy_timeout: float) -> Engine:
    """Connections to the database at `url`, as long as its file is the one that was there first. Raises ArgumentError.

    A new file at its place would be read together with the old one's -wal, and so be damaged.
    """
    file = shown(url)
    if file.startswith((":memory:", "file:")) or file in ("", "None") or make_url(url).query:
        raise ArgumentError("after sqlite:/// must be the name of a file, and nothing else")
    first = None

    def refuse_other_file(*_: Any) -> None:
        nonlocal first
        try:
            found = Path(file).stat()
        except OSError as error:
            raise StoreUnavailable("the database's file cannot be opened", f"{file}: {error.strerror}") from error
        first = first or (found.st_dev, found.st_ino)
        if first != (found.st_dev, found.st_ino):
            advice = f"stop all programs that use {file}, remove {file}-wal and {file}-shm, and start them again"
            raise StoreUnavailable("the database's file was replaced while it was in use", advice)

    def connect() -> sqlite3.Connection:
        refuse_other_file()
        try:
            return sqlite3.connect(f"{Path(file).absolute().as_uri()}?mode=rw", uri=True, check_same_thread=False)
        except sqlite3.OperationalError as error:
            raise StoreUnavailable("the database's file cannot be opened", f"{file}: {error}") from error

    engine = create_engine(url, creator=connect, max_overflow=-1)  # the server's threads are the bound
    event.listen(engine, "connect", lambda connection, _: _set_up(connection, busy_timeout))
    event.listen(engine, "checkout", refuse_other_file)
    return engine


def _set_up(connection: Any, busy_timeout: float) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: store.Database does
    connection.execute(f"PRAGMA busy_timeout = {busy_timeout * 1000:.0f}")
    connection.execute("PRAGMA page_size = 8192")  # bytes, of a new file; docs/experiments.md says why
    connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power loss, in WAL mode too
    connection.execute("PRAGMA foreign_keys = ON")
    connection.text_factory = methodcaller("decode", "utf-8", "rebind.lenient")
    connection.create_function("plain_keys", 1, plain_keys, deterministic=True)
    # Two processes that turn a new file to WAL at the same moment do not wait for one another by themselves.
    deadline = time.monotonic() + busy_timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except connection.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _lenient(error: UnicodeError) -> tuple[str | bytes, int]:
    """Text that is not UTF-8 must not keep everybody from reading the rest.

    Half a character, as a sender can write it with JSON's escapes, is kept, so that its queue is found by its name.
    """
    try:
        return codecs.lookup_error("surrogatepass")(error)
    except UnicodeError:
        return codecs.replace_errors(error)


codecs.register_error("rebind.lenient", _lenient)


def shown(url: str) -> str:
    """The store for people: its file."""
    return str(make_url(url).database)


def open_file(url: str, create: bool) -> None:
    """Look whether the file is there; with `create`, create it first if it is not, readable by its own user only.

    One that is there is not opened: to close it would end this process's locks on it, those of its connections included
    (https://www.sqlite.org/howtocorrupt.html, 2.2). To connect to one that is not there would create it.

    Raises StoreUnavailable and StoreUnusable.
    """
    file = shown(url)
    try:
        if create:
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        elif not Path(file).exists():
            raise StoreUnusable("there is no store", file)
    except FileExistsError:
        if Path(file).is_dir():
            raise StoreUnusable("the database's file cannot be opened", f"{file}: Is a directory") from None
    except OSError as error:
        kind = StoreUnusable if error.errno in WRONG_PATH else StoreUnavailable
        raise kind("the database's file cannot be opened", f"{file}: {error.strerror}") from error


def refuse_damaged(db: Connection) -> None:
    """Read all messages. Contents and log, which may be many times as large, are not read. Raises StoreDamaged."""
    fault = db.scalar(text("PRAGMA quick_check(messages)"))
    if fault != "ok":
        raise StoreDamaged(f"the database is damaged: {' '.join(str(fault).split())}")


def meaning(error: DBAPIError) -> Exception | None:
    """What a driver's error means to us; None if it is a fault in our own code."""
    reason = str(error.orig).strip()
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # without the extension
    if code in REFUSED:
        return StoreRefused(TOO_LONG if "queue_length" in reason else f"the tables do not allow it: {reason}")
    if code in DAMAGED:
        return StoreDamaged(f"the file is damaged, or is not a database: {reason}")
    if code in UNAVAILABLE or "no such table" in reason:
        return StoreUnavailable(f"the database cannot do this now: {reason}")
    return None


def take_turn(db: Connection) -> None:
    """Prepare a rebind's transaction, which has had the write lock since it began."""
    db.execute(text(f"PRAGMA cache_size = -{CACHE * 1024}"))


def tidy(db: Connection) -> None:
    """Write what is in the -wal into the file: after the answer, which comes a fifth earlier.

    A passive checkpoint waits for nobody, and nobody waits for it.
    """
    db.execute(text("PRAGMA wal_checkpoint(PASSIVE)"))


def writers_of_log(db: Connection) -> set[str]:
    """The transactions that may still commit records with smaller keys: none, as there is one writer at a time."""
    return set()


def last_key(db: Connection) -> int:
    """The key of the record that was written last."""
    return db.scalar(text("SELECT seq FROM sqlite_sequence WHERE name = 'log'")) or 0


def octets(value: ColumnElement[str]) -> ColumnElement[int]:
    """How many bytes a text has in UTF-8."""
    return func.length(cast(value, LargeBinary))


def in_queues(names: Sequence[str]) -> ColumnElement[Any]:
    """Whether a message is in one of the queues; the names, however many, are one parameter."""
    return messages.c.queue.in_(select(func.json_each(json.dumps(names)).table_valued("value").c.value))


def following(name: ColumnElement[str]) -> ColumnElement[str]:
    """The first text after `name`, in the order of bytes."""
    return name + func.char(0)


def select_from(db: Connection, found: Selection) -> Selection:
    """The same messages, with what the planner must be told."""
    matched = _count(db, found.select(_rowid))
    db.execute(text(f"PRAGMA wal_autocheckpoint = {0 if matched >= MANY else 1000}"))  # see tidy; 1000 pages is usual
    return replace(found, are_most=_count(db, select(_rowid).select_from(messages).limit(2 * matched)) < 2 * matched)


def _count(db: Connection, found: Select[Any]) -> int:
    return db.scalar(select(func.count()).select_from(found.subquery())) or 0


def update_all(db: Connection, found: Selection, new: NewState, rebind_id: str | None) -> tuple[int, int]:
    """Set the new state of all messages in one pass, in the order in which they are stored.

    rebind_id: for the record of each; None to write no records.
    Returns how many there were, and how many moved.
    """
    before, moved, where = last_key(db), None, found.where
    if new.restored:
        where, new = _restoring(found, new)
    elif found.limit is not None or not found.are_most:
        where = _rowid.in_(found.select(_rowid))
    if not (new.renames and rebind_id):
        # To set `queue` and `due` to what they are costs as much as to change them, because of their index.
        names = select(messages.c.queue, new.queue.label("to")).where(where)
        each = (names.with_hint(messages, "NOT INDEXED", "sqlite") if where is found.where else names).subquery()
        moved = _count(db, select(each).where(each.c.queue != each.c.to))
    values: dict[str, Any] = new.values(moves=moved != 0) or {"meta": messages.c.meta}  # written for its record
    statement = update(messages).values(values).where(where)
    if where is found.where:
        statement = statement.with_hint("NOT INDEXED", dialect_name="sqlite")
    with _recorded(db, rebind_id, values, new.restored), _index_rebuilt(db, found.are_most and "due" in values):
        changed: CursorResult[Any] = db.execute(statement)
    if moved is None:
        moved = _count(db, select(log.c.key).where(log.c.key > before, log.c.queue != log.c.old_queue))
    return changed.rowcount, moved


def _restoring(found: Selection, new: NewState) -> tuple[ColumnElement[bool], NewState]:
    """Which messages to change, and their new state, which is computed once for each before the first one changes."""
    if found.limit is not None:
        found = replace(found, where=found.where & new.differs)
    meta: Any = new.meta
    each = found.select(_rowid.label("at"), new.queue.label("to"), meta.label("restored")).offset(0).subquery("each")
    new = replace(new, queue=each.c.to, meta=each.c.restored)
    return (_rowid == each.c.at) & new.differs, new


@contextmanager
def _recorded(db: Connection, rebind_id: str | None, changed: Mapping[str, Any], keys: Sequence[str]) -> Iterator[None]:
    """Write a record of each message whose columns `changed` are set.

    keys: the keys of the metadata whose new values a record tells; none if it tells nothing of them.
    A site's own trigger that sets other columns causes none.
    """
    if rebind_id is None:
        yield
        return
    old: Any = {name: literal_column(f"old.{name}") for name in [*BEFORE, "queue"]}
    columns = record_columns(rebind_id, old, literal_column("new.queue"), old["queue"])
    if keys:
        columns["changes"] = changes(keys)
    # A trigger has no parameters: SQLAlchemy quotes what it writes.
    insertion = insert(log).values(columns).compile(db, compile_kwargs={"literal_binds": True})
    on = f"UPDATE OF {', '.join(changed)} ON main.messages"
    db.exec_driver_sql(f"CREATE TEMPORARY TRIGGER write_record AFTER {on} BEGIN {insertion}; END")
    yield
    db.exec_driver_sql("DROP TRIGGER write_record")


@contextmanager
def _index_rebuilt(db: Connection, rebuilt: bool) -> Iterator[None]:
    """Drop and rebuild the index of the queues: faster than updating most of its entries, by a quarter to a half.

    Others do not see that until the commit.
    """
    if rebuilt:
        db.execute(DropIndex(messages_queue_due, if_exists=True))
    yield
    if rebuilt:
        messages_queue_due.create(db)


def rows(db: Connection, found: Selection) -> Generator[Sequence[Any]]:
    """The rows of each message, in a transaction that changes nothing."""
    return _read(db, found.select(*found.columns(_rowid)))


def _read(db: Connection, statement: Select[Any]) -> Generator[Sequence[Any]]:
    size = FIRST_ROWS
    with db.execute(statement) as found:
        while read := found.fetchmany(size):
            size = rows_to_read(size, sum(len(row[2]) for row in read))
            yield from read


def update_each(db: Connection, found: Selection, decide: Decide, rebind_id: str | None) -> None:
    """Make each message what `decide` says, and write a record of each unless `rebind_id` is None."""
    each = _mark(db, found)
    # By the driver itself: SQLAlchemy takes longer to bind the values than SQLite to write them.
    change = f"UPDATE messages SET {', '.join(f'{name} = ?' for name in UPDATED_COLUMNS)} WHERE rowid = ?"  # noqa: S608
    record = None if rebind_id is None else _record_batch(rebind_id)
    # If `decide` raises, a statement that is still open would keep the next rebind from changing the index.
    with _index_rebuilt(db, found.are_most), closing(_read(db, each)) as read:
        for batch in batches(decide(read), lambda one: len(one.meta)):
            if record is not None:
                db.execute(record, {"updates": to_json([(one.at, one.queue, one.changes) for one in batch])})
            db.exec_driver_sql(change, [one[:7] for one in batch])
    _marked.drop(db)


def _mark(db: Connection, found: Selection) -> Select[Any]:
    """Write down which messages there are. Returns the statement that reads them."""
    _marked.create(db)
    mark = found.select(_rowid, log.c.key if found.of_records else literal_column("NULL"))
    if found.limit is None:
        # In the order of storage, but not by the table's own order if that would read every message to find a few.
        mark = mark.order_by(_rowid if found.are_most and not found.of_records else _rowid + 0)
    db.execute(insert(_marked).from_select(["message", "record"], mark))
    db.execute(text("ANALYZE marked"))  # or the planner may start from all the messages
    source = _marked.join(messages, _rowid == _marked.c.message)
    if found.of_records:
        source = source.join(log, log.c.key == _marked.c.record)
    return select(*found.columns(_rowid)).select_from(source).order_by(_marked.c.n)


def _record_batch(rebind_id: str) -> Insert:
    """Write the records of messages that are about to be updated, while their rows say what they were.

    `updates` is a JSON list of rowid, new queue and changes. One statement per record would take twice as long, because
    each would bring the table that AUTOINCREMENT keeps up to date.
    """
    each = func.json_each(bindparam("updates")).table_valued("value", name="each")
    at, queue, changes = (func.json_extract(each.c.value, literal_column(f"'$[{n}]'"), type_=Text()) for n in range(3))
    columns = record_columns(rebind_id, messages.c, queue, messages.c.queue) | {"changes": changes}
    before = select(*columns.values()).select_from(each.join(messages, _rowid == at))
    return insert(log).from_select(list(columns), before)
