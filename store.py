"""The database: its tables, its transactions and its connections.

The tables are a public interface (SPEC.md, "Messages come and go"): senders add messages and delivery workers take them
away, in any language, while rebinds run. What a rebind means is not here but in queues.py.
"""

import codecs
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import methodcaller
from typing import Any

from psycopg.errors import DeadlockDetected, SerializationFailure
from sqlalchemy import (
    DDL,
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    Double,
    Engine,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    bindparam,
    column,
    create_engine,
    event,
    func,
    inspect,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.types import TypeDecorator

from mail import from_json, to_json
from sqlfunctions import octets

MAX_NAME = 2000  # bytes of a queue's name: what an index of PostgreSQL takes, with room to spare
TOO_LONG = f"the name of a queue is longer than {MAX_NAME} bytes"

# PostgreSQL writes a changed row anew, beside the old one: where its page has room for that, a rebind takes three
# quarters of the time (docs/performance.md).
ROOM = {"fillfactor": 50}

MAX_WAIT = 2_000_000  # seconds, in milliseconds within what both engines count


class StoreUnavailable(Exception):
    """The database is locked, full or out of reach: nothing was done, unless the answer to a commit was lost.

    Either way the same request may be sent again.
    """


class StoreConflict(StoreUnavailable):
    """Another transaction was in the way, and the database ended this one; tried again at once, it should pass."""


class StoreRefused(Exception):
    """A message cannot be kept as it would be: the name of its queue is too long."""


class StoreUnusable(Exception):
    """The database cannot be used as it is configured: a bad URL, or a file that is no database."""


class Recipient(TypeDecorator[Any]):
    """An address as it stands, or several as a JSON list of them.

    No address starts with `[` (RFC 5321, section 4.1.2), so the two cannot be mistaken for one another.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | list[str] | None, dialect: Any) -> str | None:
        return recipient_text(value) if isinstance(value, list) else value

    def process_result_value(self, value: str | None, dialect: Any) -> str | list[str] | None:
        return None if value is None else recipient_of(value)


def recipient_text(value: str | list[str]) -> str:
    """What stands in the column `recipient`."""
    if isinstance(value, str):
        return value
    return value[0] if len(value) == 1 else json.dumps(value, ensure_ascii=False)


def recipient_of(text: str) -> str | list[str]:
    """What `recipient_text` wrote."""
    recipient: str | list[str] = json.loads(text) if text.startswith("[") else text
    return recipient


Document = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Key = BigInteger().with_variant(Integer, "sqlite")
Name = Text().with_variant(Text(collation="C"), "postgresql")  # ordered by its bytes, as SQLite orders text

metadata = MetaData()


messages = Table(
    "messages",
    metadata,
    Column("key", Key, Identity(), primary_key=True),
    Column("id", Text, nullable=False),
    Column("sender", Text, nullable=False),
    Column("recipient", Recipient, nullable=False),
    Column("domain", Text, nullable=False),
    Column("queue", Name, nullable=False),
    Column("meta", Document, nullable=False),
    Column("size", BigInteger, nullable=False, server_default="0"),
    Column("created", Double, nullable=False),
    Column("due", Double, nullable=False),
    Column("num_attempts", Integer, nullable=False, server_default="0"),
    # In one reading of it; json_type alone would let JSON5 pass, in a sender's later version of SQLite.
    CheckConstraint("json_valid(meta) AND ltrim(meta, char(9, 10, 13, 32)) GLOB '{*'", name="meta_is_object").ddl_if(
        dialect="sqlite"
    ),
    CheckConstraint("jsonb_typeof(meta) = 'object'", name="meta_is_object").ddl_if(dialect="postgresql"),
    CheckConstraint(octets(column("queue")) <= literal_column(str(MAX_NAME)), name="queue_length"),
    Index("messages_id", "id", unique=True, postgresql_with=ROOM),
    postgresql_with=ROOM,
)

messages_queue_due = Index("messages_queue_due", messages.c.queue, messages.c.due)

contents = Table(
    "contents",
    metadata,
    Column("id", Text, ForeignKey(messages.c.id, ondelete="CASCADE"), primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

# The foreign key does so in SQLite only on connections that ask for it, which a worker in another language may not.
event.listen(
    contents,
    "after_create",
    DDL(  # type: ignore[no-untyped-call]
        "CREATE TRIGGER content_goes AFTER DELETE ON messages BEGIN DELETE FROM contents WHERE id = old.id; END"
    ).execute_if(dialect="sqlite"),
)

log = Table(
    "log",
    metadata,
    Column("key", Key, Identity(), primary_key=True),
    Column("type", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("sender", Text, nullable=False),
    Column("recipient", Recipient, nullable=False),
    Column("queue", Text, nullable=False),
    Column("meta", Document, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created", Double, nullable=False),
    Column("num_attempts", Integer, nullable=False),
    Column("event_time", Double, nullable=False),
    Column("nodeid", Text, nullable=False),
    # of an AdminRebind record alone:
    Column("rebind_id", Text),
    Column("old_queue", Text),
    Column("reason", Text),
    Column("actor", Text),
    # of a delivery attempt's record alone: the fields that it has beside those of every record
    Column("details", Document),
    sqlite_autoincrement=True,  # a key is never used again, so that a reader who holds one misses nothing
)


def in_queues(db: Connection, queue: ColumnElement[str], names: Sequence[str]) -> ColumnElement[bool]:
    """Whether `queue` is one of the queues `names`, however many: they travel as one parameter."""
    if db.dialect.name == "sqlite":
        return queue.in_(select(func.json_each(json.dumps(names)).table_valued("value").c.value))
    return queue == func.any(bindparam("queues", names, ARRAY(Text)))


# To look, to read and to write. In SQLite a transaction that reads first and writes later fails at once where another
# wrote in between, whatever the busy timeout: a writer takes its turn at its beginning. A reader neither waits nor is
# waited for.
BEGIN = {"sqlite": (None, "BEGIN", "BEGIN IMMEDIATE"), "postgresql": (None, "BEGIN", "BEGIN")}
ENCODING = {"sqlite": "PRAGMA encoding", "postgresql": "SHOW server_encoding"}


class Database:
    """A database of messages, and its transactions. It keeps nothing in memory but connections.

    url: SQLAlchemy's, `sqlite:///FILE` or `postgresql+psycopg://…`.
    busy_timeout: how long a statement waits for others, in seconds.
    Raises StoreUnusable where one of them cannot be used.
    """

    def __init__(self, url: str, busy_timeout: float) -> None:
        if not isinstance(busy_timeout, int | float) or not 0 <= busy_timeout <= MAX_WAIT:
            raise StoreUnusable(f"the busy timeout {busy_timeout!r} is no number of seconds from 0 to {MAX_WAIT}")
        try:
            engine = _engine(url, busy_timeout)
        except (ArgumentError, ImportError) as error:
            raise StoreUnusable(f"the database URL cannot be used: {error}") from error
        self._looking, self._reading, self._writing = (
            engine.execution_options(begin=begin) for begin in BEGIN[engine.name]
        )
        self._prepared = False

    @contextmanager
    def look(self) -> Iterator[Connection]:
        """For statements that read, each by itself: no transaction, which takes longer to begin and to end.

        They wait for no writer. Raises StoreUnavailable.
        """
        with self._begin(self._looking) as db:
            yield db

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that changes nothing, and waits for no writer: whatever it did is rolled back at its end.

        Raises StoreUnavailable.
        """
        with self._begin(self._reading) as db:
            yield db
            db.rollback()  # or a commit whose answer is lost would be told of, where nothing was to be done

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may change everything: committed at the end of the block, rolled back by any exception.

        Raises StoreUnavailable.
        """
        with self._begin(self._writing) as db:
            yield db

    def prepare(self) -> None:
        """Create the tables where they are missing; of several processes at once, one does.

        Raises StoreUnavailable and StoreUnusable.
        """
        if self._prepared:
            return
        try:
            with _translated(), self._looking.begin() as db:
                missing = not all(inspect(db).has_table(name) for name in metadata.tables)
            if missing:
                with _translated(), self._writing.begin() as db:
                    take_turns(db)
                    metadata.create_all(db)
            with _translated(), self._looking.begin() as db:
                _refuse_encoding(db)
                _refuse_damaged(db)
        finally:
            self._looking.dispose()  # a connection must not be carried into a forked worker
        self._prepared = True

    @contextmanager
    def _begin(self, engine: Engine) -> Iterator[Connection]:
        self.prepare()
        committing = False
        try:
            with _translated(), engine.begin() as db:
                yield db
                committing = True
        except StoreUnavailable as error:
            if not (committing and _is_cut(error)):
                raise
            message = "the database's answer to the commit was lost: all of it is done or nothing; it may be sent again"
            raise StoreUnavailable(message) from error.__cause__


def take_turns(db: Connection) -> None:
    """Wait until no other transaction that took turns is running. SQLite's writing transactions do so anyway."""
    if db.dialect.name == "postgresql":
        db.execute(text("SELECT pg_advisory_xact_lock(hashtext('rebind'))"))


def expect_many(db: Connection) -> None:
    """Let SQLite keep 32 MiB of pages in memory on this connection, and not 2, as its index is changed all over."""
    if db.dialect.name == "sqlite":
        db.execute(text("PRAGMA cache_size = -32768"))


def wait_for_writers(db: Connection) -> None:
    """Wait until every transaction that has written something by now has ended, so that it can be read or never was."""
    if db.dialect.name == "postgresql":  # SQLite has one at a time, which nobody overtakes
        begun = db.scalar(text("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))
        running = text("SELECT pg_snapshot_xmin(pg_current_snapshot()) < CAST(:begun AS xid8)")
        while db.scalar(running, {"begun": begun}):
            time.sleep(0.05)


def _refuse_encoding(db: Connection) -> None:
    """Any text must be kept, and names be ordered as UTF-8's bytes are. Raises StoreUnusable."""
    encoding = db.scalar(text(ENCODING[db.dialect.name]))
    if encoding not in ("UTF-8", "UTF8"):
        raise StoreUnusable(f"the encoding of the database is {encoding}: it must be UTF-8")


def _refuse_damaged(db: Connection) -> None:
    """Read the messages through, and not only the tables' names: at the start, rather than at the first rebind.

    Their contents and the log, which may be many times as large, are not read. Raises StoreUnusable.
    """
    if db.dialect.name == "sqlite":  # PostgreSQL has no file that we could read
        fault = db.scalar(text("PRAGMA quick_check(messages)"))
        if fault != "ok":
            raise StoreUnusable(f"the database is damaged: {' '.join(str(fault).split())}")


def _is_cut(error: StoreUnavailable) -> bool:
    return isinstance(error.__cause__, DBAPIError) and error.__cause__.connection_invalidated


@contextmanager
def _translated() -> Iterator[None]:
    """The one place where a driver's errors become ours."""
    try:
        yield
    except PoolTimeout as error:
        raise StoreUnavailable(f"no database connection was free: {error}") from error
    except IntegrityError as error:
        if "queue_length" in str(error.orig):
            raise StoreRefused(TOO_LONG) from error
        raise StoreRefused(f"the tables do not allow it: {str(error.orig).splitlines()[0]}") from error
    except (OperationalError, InterfaceError) as error:
        if isinstance(error.orig, (DeadlockDetected, SerializationFailure)):
            raise StoreConflict(f"the database ended the transaction: {error.orig}") from error
        raise StoreUnavailable(f"the database cannot do this now: {error.orig}") from error
    except DBAPIError as error:
        if "not a database" in str(error.orig) or "malformed" in str(error.orig):
            raise StoreUnusable(f"the database is damaged, or is none: {error.orig}") from error
        raise


def _engine(url: str, busy_timeout: float) -> Engine:
    parts = make_url(url)
    dialect = parts.get_backend_name()
    if dialect not in ("sqlite", "postgresql"):
        raise ArgumentError(f"{dialect} is neither sqlite nor postgresql")
    if dialect == "sqlite" and parts.database in (None, "", ":memory:"):
        raise ArgumentError("a database in memory is not shared: name a file")
    if dialect == "sqlite":
        engine = create_engine(url, json_serializer=to_json, json_deserializer=from_json)
        event.listen(engine, "connect", lambda connection, _: _set_up_sqlite(connection, busy_timeout))
    else:
        engine = create_engine(
            url,
            json_serializer=to_json,
            json_deserializer=lambda value: from_json(value.decode()),
            pool_pre_ping=True,  # a connection that was cut is replaced before it is used
            connect_args={"connect_timeout": max(2, int(busy_timeout))},  # libpq takes no less
        )
        event.listen(engine, "connect", lambda connection, _: _set_up_postgresql(connection, busy_timeout))
    event.listen(engine, "begin", _begin)
    return engine


def _set_up_sqlite(connection: Any, busy_timeout: float) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: _begin does
    connection.execute(f"PRAGMA busy_timeout = {busy_timeout * 1000:.0f}")
    connection.execute("PRAGMA page_size = 8192")  # bytes, of a new file; docs/performance.md says why so many
    connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power loss, in WAL mode too
    connection.execute("PRAGMA foreign_keys = ON")
    connection.text_factory = methodcaller("decode", "utf-8", "rebind.lenient")
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
    """Text that is no UTF-8 must not keep everybody from reading the rest.

    Half a character, as a sender can write it by JSON's escapes, is kept, so that its queue is found by its name.
    """
    try:
        return codecs.lookup_error("surrogatepass")(error)
    except UnicodeError:
        return codecs.replace_errors(error)


codecs.register_error("rebind.lenient", _lenient)


def _set_up_postgresql(connection: Any, busy_timeout: float) -> None:
    connection.autocommit = True  # the driver begins nothing by itself: _begin does
    connection.execute("SET default_transaction_isolation = 'read committed'")
    connection.execute(f"SET lock_timeout = {max(1, busy_timeout * 1000):.0f}")  # 0 would be for ever


def _begin(db: Connection) -> None:
    if begin := db.get_execution_options()["begin"]:
        db.exec_driver_sql(begin)
