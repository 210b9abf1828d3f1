"""SQLite's way to do what moving.Backend lists."""

import codecs
import errno
import json
import os
import re
import sqlite3
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from functools import partial
from operator import methodcaller
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import sqlalchemy as sa

import moving
from message import to_json
from moving import Decide, MessageRow, NewState, Selection, Update
from store import StoreDamaged, StoreRefused, StoreUnavailable, StoreUnusable
from tables import TOO_LONG, log, messages, messages_queue_due

BEGIN_READ = "BEGIN"
# A transaction that reads first and writes later fails at once if another wrote in between, whatever the busy timeout:
# so a writer takes its turn at its beginning. A reader neither waits nor is waited for.
BEGIN_WRITE = "BEGIN IMMEDIATE"

DriverError: type[Exception] = sqlite3.Error
ENCODING = ("PRAGMA encoding", "UTF-8")  # names are ordered by their bytes then

CACHE = 32  # MiB of pages that a rebind keeps in memory, since its index changes all over; others keep 2
MANY = 1000  # messages: with fewer, a checkpoint is left to whoever writes the thousandth page

# The primary result codes (https://www.sqlite.org/rescode.html) that pass by themselves, or when somebody mends the
# disk. The rest are faults of ours.
UNAVAILABLE = {
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY),
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL),
}
REFUSED = {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
# Where SQLite looks for a folder for temporary files, which a large rebind needs (https://www.sqlite.org/tempfiles.html).
TEMPORARY = (os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp", ".")  # noqa: S108
NO_TEMPORARY = "SQLite has no folder for temporary files: set SQLITE_TMPDIR to one that it can write to"
WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EACCES}  # of the file: what does not mend itself

_rowid: sa.ColumnElement[int] = sa.literal_column("messages.rowid", sa.Integer)  # of no table, for SQLAlchemy's linting


def connect_to(url: str, busy_timeout: float) -> sa.Engine:
    file = StoreFile(sa.make_url(url).database or "")
    if file.name.startswith((":memory:", "file:")) or not file.name or "?" in url:
        raise sa.exc.ArgumentError("after sqlite:/// must be the name of a file, and nothing else")
    engine = sa.create_engine(url, creator=file.connect, enable_from_linting=False, **moving.ENGINE)
    sa.event.listen(engine, "connect", lambda connection, _: _set_up(connection, busy_timeout))
    sa.event.listen(engine, "checkout", lambda *_: file.refuse_another())
    sa.event.listen(engine, "checkin", partial(_checkpoint, file))
    return engine


class StoreFile:
    """The database's file, as long as it is the first one: another would be read with the first one's -wal."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._first: tuple[int, int] | None = None

    def connect(self) -> sqlite3.Connection:
        """A connection to the file, which must be there. Raises StoreUnavailable."""
        self.refuse_another()
        try:
            uri = f"{Path(self.name).absolute().as_uri()}?mode=rw"
            return sqlite3.connect(uri, uri=True, check_same_thread=False)
        except sqlite3.OperationalError as error:
            raise StoreUnavailable("the database's file cannot be opened", f"{self.name}: {error}") from error

    def refuse_another(self) -> None:
        """Raises StoreUnavailable if the file is gone or another one."""
        try:
            found = Path(self.name).stat()
        except OSError as error:
            raise StoreUnavailable("the database's file cannot be opened", f"{self.name}: {error.strerror}") from error
        self._first = self._first or (found.st_dev, found.st_ino)
        if self._first != (found.st_dev, found.st_ino):
            aside = f"{self.name}-wal and {self.name}-shm"
            advice = f"stop all programs that use {self.name}, remove {aside}, and start them again"
            raise StoreUnavailable("the database's file was replaced while it was in use", advice)


def _set_up(connection: Any, busy_timeout: float) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: store.Database does
    connection.execute(f"PRAGMA busy_timeout = {busy_timeout * 1000:.0f}")
    connection.execute("PRAGMA page_size = 8192")  # bytes, of a new file; docs/experiments.md says why
    connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power loss, in WAL mode too
    connection.execute("PRAGMA foreign_keys = ON")
    connection.text_factory = methodcaller("decode", "utf-8", "rebind.lenient")
    connection.create_function("plain_keys", 1, plain_keys, deterministic=True)
    with suppress(connection.OperationalError):  # another process turns it to WAL at the same moment
        connection.execute("PRAGMA journal_mode = WAL")


def _lenient(error: UnicodeError) -> tuple[str | bytes, int]:
    """Read what is not UTF-8 somehow. Half a character, from JSON's escapes, is kept, so that its queue is found."""
    try:
        return codecs.lookup_error("surrogatepass")(error)
    except UnicodeError:
        return codecs.replace_errors(error)


codecs.register_error("rebind.lenient", _lenient)


def _checkpoint(file: StoreFile, connection: Any, record: Any) -> None:
    """After a large rebind, write the -wal into the file in a thread of its own: the answer comes a fifth earlier."""
    if not record.info.pop("checkpoint", False):
        return
    connection.execute("PRAGMA wal_autocheckpoint = 1000")  # pages, as usual: `_in_bulk` set it to 0

    def checkpoint() -> None:  # a passive one waits for nobody, and nobody for it; if it fails, a later one does it
        with suppress(sqlite3.Error, StoreUnavailable), closing(file.connect()) as own:
            own.execute("PRAGMA wal_checkpoint(PASSIVE)")

    Thread(target=checkpoint).start()


def open_file(url: str, create: bool) -> None:
    # A file that is there is not opened: to close it would end this process's locks on it, those of its connections
    # included (https://www.sqlite.org/howtocorrupt.html, 2.2). A new one is readable by its own user only.
    file = str(sa.make_url(url).database)
    try:
        if create and not any(os.access(folder, os.W_OK | os.X_OK) for folder in TEMPORARY if folder):
            raise StoreUnusable(NO_TEMPORARY)
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


def meaning(error: sa.exc.DBAPIError) -> Exception | None:
    reason = str(error.orig).strip()
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # without the extension
    if code in REFUSED and re.search(r"failed: (log|rebinds)\.", reason):  # no request can make those wrong
        return StoreUnusable("the database refused a row of the service's own; docs/runbook.md says what to do", reason)
    if code in REFUSED:
        return StoreRefused(TOO_LONG if "queue_length" in reason else f"the tables do not allow it: {reason}")
    if code in DAMAGED:
        return StoreDamaged(f"the file is damaged, or is not a database: {reason}")
    if error.orig.sqlite_errorcode == sqlite3.SQLITE_IOERR_GETTEMPPATH:  # type: ignore[union-attr]
        return StoreUnusable(NO_TEMPORARY)
    if code in UNAVAILABLE or "no such table" in reason:
        return StoreUnavailable(f"the database cannot do this now: {reason}")
    return None


def now(db: sa.Connection) -> float:
    return time.time()  # the file is on this host


def last_key(db: sa.Connection) -> int:
    return db.scalar(sa.text("SELECT seq FROM sqlite_sequence WHERE name = 'log'")) or 0


def writers_of_log(db: sa.Connection) -> set[str]:
    return set()  # one at a time writes


def contents_of(db: sa.Connection, ids: Sequence[str]) -> dict[str, bytes]:
    found = "SELECT id, data FROM contents WHERE id IN (SELECT value FROM json_each(?))"
    return dict(db.exec_driver_sql(found, (json.dumps(ids),)).cursor.fetchall())


def insert(db: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    values = ", ".join(f":{name}" for name in rows[0])
    db.exec_driver_sql(f"INSERT INTO {table} ({', '.join(rows[0])}) VALUES ({values})", rows)  # noqa: S608


def among(column: sa.Column[str], values: Sequence[str]) -> sa.ColumnElement[bool]:
    return column.in_(sa.select(sa.func.json_each(json.dumps(values)).table_valued("value").c.value))


def meta_text(key: str) -> sa.ColumnElement[str]:
    path = f"'$.{key}'"  # as a parameter it would be parsed for each message
    found = f"CASE json_type(messages.meta, {path}) WHEN 'text' THEN json_extract(messages.meta, {path}) END"
    return sa.literal_column(found, sa.Text)


def merge(meta: sa.ColumnElement[Any], data: Mapping[str, str], unset: Collection[str]) -> sa.ColumnElement[Any]:
    # SQLite before 3.45 compares keys as they are written: "gr\\u00f6\\u00dfe" would not be `größe`.
    text = sa.type_coerce(meta, sa.Text)
    plain = sa.cast(sa.func.plain_keys(sa.cast(text, sa.LargeBinary)), sa.Text)
    escaped = sa.func.instr(text, "\\") > 0
    # RFC 7396: a patch whose values are strings sets each key, and null removes it.
    patch = sa.literal(to_json({**data, **dict.fromkeys(unset)}), sa.Text)
    return sa.func.json_patch(sa.case((escaped, plain), else_=text), patch, type_=meta.type)


_exact = msgspec.json.Decoder(float_hook=Decimal)
_plain = msgspec.json.Encoder(decimal_format="number")


def plain_keys(document: bytes) -> bytes:
    """A JSON document without needless escapes, and with every digit of its numbers."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # half a character, or not UTF-8
        return _plain.encode(_exact.decode(document))
    return document


def take_turn(db: sa.Connection) -> None:
    db.execute(sa.text(f"PRAGMA cache_size = -{CACHE * 1024}"))  # BEGIN IMMEDIATE has waited for the others


def sized(db: sa.Connection, selection: Selection) -> Selection:
    matched = _count(db, selection.select(_rowid)) if selection.at_most is None else selection.at_most
    matched = min(matched, selection.limit or matched)
    half = sa.text("SELECT count(*) FROM (SELECT 1 FROM messages LIMIT 2 * :matched)")
    return replace(selection, at_most=matched, are_most=db.scalar(half, {"matched": matched}) < 2 * matched)


def _count(db: sa.Connection, found: sa.Select[Any]) -> int:
    return db.scalar(sa.select(sa.func.count()).select_from(found.subquery())) or 0


def update_all(db: sa.Connection, selection: Selection, new: NewState, rebind_id: str | None) -> tuple[int, int]:
    values, before, moved = {**new.values}, last_key(db), None
    if "queue" not in values:
        moved = 0
    elif not (new.renames and rebind_id):
        names = selection.select(messages.c.queue, values["queue"].label("to")).subquery()
        moved = _count(db, sa.select(names).where(names.c.queue != names.c.to))
    if moved == 0:  # to set a column to what it is costs as much as to change it, because of the index
        unmoved = {"queue", "due"} if new.due_if_moved else {"queue"}
        values = {name: value for name, value in values.items() if name not in unmoved}
    values = values or {"meta": messages.c.meta}  # each is written for its record
    news = moving.NEW_OF_UNDO if selection.of_records else ()
    with _recorded(db, values, rebind_id, news), _in_bulk(db, selection, values):
        changed: sa.CursorResult[Any] = db.execute(_update(selection, values))
    if moved is None:
        moved = db.scalar(sa.text("SELECT count(*) FROM log WHERE key > :key AND queue <> old_queue"), {"key": before})
    return changed.rowcount, moved


def update_each(db: sa.Connection, selection: Selection, decide: Decide, now: float, rebind_id: str | None) -> None:
    # Another thread writes, from JSON alone, while `decide` looks at the next messages: that saves a third of the time.
    each = sa.func.json_each(sa.bindparam("updates")).table_valued("value").c.value
    paths = {"rowid": "'$[0]'"} | {name: f"'$[1][{number}]'" for number, name in enumerate(Update._fields)}
    became = {name: sa.func.json_extract(each, sa.literal_column(path)) for name, path in paths.items()}
    values: dict[str, Any] = {"due": sa.case((became["is_due"], now), else_=messages.c.due)}
    values |= {name: sa.func.coalesce(became[name], messages.c[name]) for name in moving.UPDATED_COLUMNS}
    change = sa.update(messages).values(values).where(_rowid == became["rowid"])
    found = sa.select(*moving.MESSAGE_COLUMNS, _rowid).where(_rowid.in_(selection.select(_rowid)))  # as they are stored
    with (
        _recorded(db, values, rebind_id, moving.NEW_COLUMNS),
        _in_bulk(db, selection, values),
        ThreadPoolExecutor(1) as writer,
        db.engine.connect() as reader,  # which sees all as it was before this transaction
        reader.execute(found) as read,  # a statement that is still open would keep the next rebind from the index
    ):
        cursor: Any = read.cursor
        decided = ((row[-1], decide(MessageRow._make(row[:-1]))) for row in cursor)
        written: Future[Any] = writer.submit(lambda: None)
        for batch in moving.batches(decided, lambda one: len(one[1].meta or "")):
            written.result()
            written = writer.submit(db.execute, change, {"updates": to_json(batch)})
        written.result()


def _update(selection: Selection, values: Mapping[str, Any]) -> sa.Update:
    """In one pass, in the order in which messages are stored."""
    statement = sa.update(messages).values(values)
    if selection.of_records:
        statement = statement.where(selection.where, messages.c.id == log.c.id)
    elif selection.are_most and selection.limit is None:
        return statement.where(selection.where).with_hint("NOT INDEXED", dialect_name="sqlite")
    if selection.of_records and selection.limit is None:
        return statement
    return statement.where(_rowid.in_(selection.select(_rowid)))


@contextmanager
def _recorded(db: sa.Connection, changed: Iterable[str], rebind_id: str | None, news: Iterable[str]) -> Iterator[None]:
    """Write a record of each message when one of the columns `changed` is set, as a site's own trigger does not."""
    if rebind_id is None:
        yield
        return
    old: Any = {name: sa.literal_column(f"old.{name}") for name in moving.BEFORE}
    new: Any = {name: sa.literal_column(f"new.{name}") for name in moving.BEFORE}
    columns = moving.record_of(rebind_id, old, new, news)
    # A trigger has no parameters: SQLAlchemy quotes what it writes.
    insertion = sa.insert(log).values(columns).compile(db, compile_kwargs={"literal_binds": True})
    on = f"UPDATE OF {', '.join(changed)} ON main.messages"
    db.exec_driver_sql(f"CREATE TEMPORARY TRIGGER write_record AFTER {on} BEGIN {insertion}; END")
    yield
    db.exec_driver_sql("DROP TRIGGER write_record")


@contextmanager
def _in_bulk(db: sa.Connection, selection: Selection, changed: Collection[str]) -> Iterator[None]:
    """If many messages change, leave the checkpoint for later; if most of them do, rebuild the index."""
    if (selection.at_most or 0) >= MANY:
        db.execute(sa.text("PRAGMA wal_autocheckpoint = 0"))
        db.info["checkpoint"] = True
    # Faster by a quarter to a half if most of its entries change. Others do not see that until the commit.
    rebuilt = selection.are_most and "due" in changed
    if rebuilt:
        db.execute(sa.schema.DropIndex(messages_queue_due, if_exists=True))
    yield
    if rebuilt:
        messages_queue_due.create(db)


def rows(db: sa.Connection, selection: Selection) -> Generator[MessageRow]:
    with db.execute(selection.select(*moving.MESSAGE_COLUMNS)) as found:
        cursor: Any = found.cursor  # without SQLAlchemy's rows, which take a tenth of the time
        yield from map(MessageRow._make, cursor)
