"""The database: its tables, its transactions, and what its errors mean.

The tables are a public interface (docs/contract.md, "Messages come and go"): senders add messages and delivery workers
remove them, in any language, while rebinds run. What a rebind means is in queues.py, not here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from sqlalchemy import (
    DDL,
    REAL,
    BigInteger,
    CheckConstraint,
    Column,
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
    event,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.types import TypeDecorator, TypeEngine

from message import from_json, recipient_of, recipient_text, to_json

SCHEMA_VERSION = 2  # of the tables below; 1 had a `key` in messages, and no history
MAX_NAME = 2000  # bytes of a queue's name or a message's id: what an index of PostgreSQL takes, with room to spare
TOO_LONG = f"the name of a queue would be longer than {MAX_NAME} bytes"
FIRST_SECOND, LAST_SECOND = -62135596800, 253402300799  # of the years 1 and 9999, in seconds since 1970

# PostgreSQL writes a changed row beside the old one: if its page has room for that, a rebind takes three quarters of
# the time (docs/performance.md).
ROOM = {"fillfactor": 50}

MAX_WAIT = 86_400  # seconds: within what both engines, and TCP's timers, can count


class StoreError(Exception):
    """What the database cannot do. Its text may be shown to anybody.

    reason: the rest, for the log and for those who work on this host: it may name the server.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.in_full = f"{message}: {reason}" if reason else message


class StoreUnavailable(StoreError):
    """The database is locked, full, read-only or out of reach. Nothing was done, unless a commit's answer was lost.

    docs/contract.md, "Retries", says how to send the same request again.
    """


class StoreConflict(StoreUnavailable):
    """The database ended this transaction in favour of another one. Tried again at once, it should pass."""


class StoreRefused(StoreError):
    """The tables do not allow what would be stored."""


class StoreUnusable(StoreError):
    """The database cannot be used as it is configured: a bad URL, no such database, no right, another version."""


class StoreDamaged(StoreUnusable):
    """The file is damaged, or is not a database."""


class Recipient(TypeDecorator[Any]):
    """An envelope's recipient: an address, or a list of several. See `message.recipient_text`."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | list[str] | None, dialect: Any) -> str | None:
        return None if value is None else recipient_text(value)

    def process_result_value(self, value: str | None, dialect: Any) -> str | list[str] | None:
        with suppress(ValueError, RecursionError):  # a list that no sender should have written is left as it is
            return None if value is None else recipient_of(value)
        return value


class TextDocument(TypeDecorator[Any]):
    """JSON in a column of type TEXT, as SQLite's STRICT tables need it."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else to_json(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else from_json(value)


Document = JSONB(none_as_null=True).with_variant(TextDocument(), "sqlite")
Number = BigInteger().with_variant(Integer(), "sqlite")
Seconds: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")
Name = Text().with_variant(Text(collation="C"), "postgresql")  # ordered by its bytes, as SQLite orders text


def _is_time(column: str) -> CheckConstraint:
    # NaN and the infinities are outside these limits too.
    return CheckConstraint(f"{column} BETWEEN {FIRST_SECOND} AND {LAST_SECOND}", name=f"{column}_is_a_time")


def _by_engine(name: str, sqlite: str, postgresql: str) -> tuple[CheckConstraint, CheckConstraint]:
    """A constraint that each engine says in its own words."""
    return (
        CheckConstraint(sqlite, name=name).ddl_if(dialect="sqlite"),
        CheckConstraint(postgresql, name=name).ddl_if(dialect="postgresql"),
    )


metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True), sqlite_strict=True)

messages = Table(
    "messages",
    metadata,
    Column("id", Name, primary_key=True),
    Column("sender", Text, nullable=False),
    Column("recipient", Recipient, nullable=False),
    Column("domain", Text, nullable=False),
    Column("queue", Name, nullable=False),
    Column("meta", Document, nullable=False),
    Column("size", Number, nullable=False, server_default="0"),
    Column("created", Seconds, nullable=False),
    Column("due", Seconds, nullable=False),
    Column("num_attempts", Integer, nullable=False, server_default="0"),
    *_by_engine(
        "id_length",
        f"length(CAST(id AS BLOB)) BETWEEN 1 AND {MAX_NAME}",
        f"octet_length(id) BETWEEN 1 AND {MAX_NAME}",
    ),
    *_by_engine(
        "recipient_is_address_or_list",
        "CASE WHEN substr(recipient, 1, 1) = '[' THEN json_valid(recipient) AND json_type(recipient) = 'array' "
        "AND json_array_length(recipient) > 0 ELSE recipient <> '' END",
        "CASE WHEN left(recipient, 1) = '[' THEN jsonb_array_length(recipient::jsonb) > 0 ELSE recipient <> '' END",
    ),
    *_by_engine("queue_length", f"length(CAST(queue AS BLOB)) <= {MAX_NAME}", f"octet_length(queue) <= {MAX_NAME}"),
    *_by_engine(
        "meta_is_object",
        # json_type alone would accept JSON5 in later versions of SQLite.
        "json_valid(meta) AND ltrim(meta, char(9, 10, 13, 32)) GLOB '{*'",
        "jsonb_typeof(meta) = 'object'",
    ),
    CheckConstraint("size >= 0 AND num_attempts >= 0", name="counts_are_not_negative"),
    _is_time("created"),
    _is_time("due"),
    sqlite_strict=True,
    postgresql_with=ROOM,
)

messages_queue_due = Index("messages_queue_due", messages.c.queue, messages.c.due)

contents = Table(
    "contents",
    metadata,
    Column("id", Name, ForeignKey(messages.c.id, ondelete="CASCADE"), primary_key=True),
    Column("data", LargeBinary, nullable=False),
    sqlite_strict=True,
)

# SQLite honours the foreign key only on connections that ask for it, which a worker in another language may not do.
event.listen(
    contents,
    "after_create",
    DDL(  # type: ignore[no-untyped-call]
        "CREATE TRIGGER content_goes AFTER DELETE ON messages BEGIN DELETE FROM contents WHERE id = old.id; END"
    ).execute_if(dialect="sqlite"),
)

rebinds = Table(
    "rebinds",
    metadata,
    Column("rebind_id", Text, primary_key=True),
    Column("event_time", Seconds, nullable=False),
    Column("actor", Text, nullable=False),
    Column("nodeid", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("request", Document, nullable=False),  # all that was asked, as history.asked gives it
    Column("idempotency_key", Text, unique=True),
    Column("matched", Number, nullable=False),
    Column("moved", Number, nullable=False),
    Column("flushed", Number, nullable=False),
    Column("left_alone", Number),  # of an undo: Rebind-Left
    Column("first_key", Number, nullable=False),  # its records' keys in the log lie from here …
    Column("last_key", Number, nullable=False),  # … to here, with others' between them
    _is_time("event_time"),
    sqlite_strict=True,
)

log = Table(
    "log",
    metadata,
    Column("key", Number, Identity(), primary_key=True),
    Column("type", Text, nullable=False),
    Column("id", Name, nullable=False),
    Column("sender", Text, nullable=False),
    Column("recipient", Recipient, nullable=False),
    Column("queue", Name, nullable=False),
    # of an AdminRebind record alone; what all records of a rebind share is in `rebinds`:
    Column("old_queue", Name),
    Column("rebind_id", Text),
    Column("size", Number, nullable=False),
    Column("created", Seconds, nullable=False),
    Column("num_attempts", Integer, nullable=False),
    # of all others:
    Column("event_time", Seconds),
    Column("nodeid", Text),
    Column("details", Document),  # the fields of the record beside those of every record
    # sender, recipient and meta are what they were before a rebind …
    Column("meta", Document, nullable=False),
    Column("changes", Document),  # … and this is what it changed (message.Changes), if not just what it asked for
    _is_time("created"),
    _is_time("event_time"),
    CheckConstraint("event_time IS NOT NULL OR rebind_id IS NOT NULL", name="event_time_or_rebind"),
    sqlite_autoincrement=True,  # a key is never used again, so that a reader who holds one misses nothing
    sqlite_strict=True,
)


class Database:
    """A database of messages, and its transactions. It keeps nothing in memory except connections.

    engine: the module sqlite or postgresql.
    url: SQLAlchemy's, `sqlite:///FILE` or `postgresql+psycopg://…`.
    busy_timeout: how long a statement waits for others, in seconds: a number, or its text as a setting gives it.
    Raises StoreUnusable.
    """

    def __init__(self, engine: ModuleType, url: str, busy_timeout: Any) -> None:
        with suppress(ValueError):  # what is not a number is refused
            busy_timeout = json.loads(str(busy_timeout))
        if type(busy_timeout) not in (int, float) or not 0 <= busy_timeout <= MAX_WAIT:
            raise StoreUnusable(f"the busy timeout must be a number of seconds from 0 to {MAX_WAIT}: {busy_timeout!r}")
        self.engine, self._url = engine, url
        try:
            connections = engine.connect_to(url, busy_timeout)
        except (ArgumentError, ImportError, ValueError) as error:
            raise StoreUnusable(f"the database URL cannot be used: {error}") from error
        event.listen(connections, "begin", _begin)
        self._autocommit = connections.execution_options(begin=None)
        self._reading = connections.execution_options(begin="BEGIN")
        self._writing = connections.execution_options(begin=engine.BEGIN_WRITE)
        self._prepared = self._may_create = False

    @property
    def shown(self) -> str:
        """The store for people: its file, or its URL without a password."""
        return str(self.engine.shown(self._url))

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """For statements that read, each by itself: no transaction, whose begin and end would take longer.

        They wait for no writer. Raises StoreUnavailable.
        """
        with self._transaction(self._autocommit) as db:
            yield db

    @contextmanager
    def begin_read(self) -> Iterator[Connection]:
        """A transaction that changes nothing and waits for no writer: it is rolled back at its end.

        Raises StoreUnavailable.
        """
        with self._transaction(self._reading) as db:
            yield db
            db.rollback()  # a failed COMMIT must not be reported as "may have been done"

    @contextmanager
    def begin_write(self) -> Iterator[Connection]:
        """A transaction that may change everything: committed at the end of the block, rolled back by any exception.

        Raises StoreUnavailable, StoreConflict and StoreRefused.
        """
        with self._transaction(self._writing) as db:
            yield db

    def prepare(self, create: bool = False) -> None:
        """Check that the store can be used; with `create`, create its tables first if it has none.

        If it is out of reach, that is done when it is used: but a store that was there is never created again.
        Raises StoreUnavailable and StoreUnusable.
        """
        self._may_create |= create
        if self._prepared:
            return
        try:
            self.engine.open_file(self._url, self._may_create)
            with self._translated(), self._autocommit.begin() as db:
                question, needed = self.engine.ENCODING
                if (encoding := db.scalar(text(question))) != needed:
                    raise StoreUnusable(f"the encoding of the database is {encoding}: it must be {needed}")
                found = set(inspect(db).get_table_names()) & metadata.tables.keys()
                version = (db.scalar(select(schema_version)) or 0) if schema_version.name in found else 1
            if found:
                self._refuse_version(version)
            elif self._may_create:
                self._create_tables()
            else:
                raise StoreUnusable("there is no store", self.shown)
        finally:
            self.close()
        self._prepared, self._may_create = True, False

    def check(self) -> None:
        """Read all messages once, so that a damaged file is found now and not by the first rebind.

        Raises StoreDamaged and StoreUnavailable.
        """
        with self.autocommit() as db:
            self.engine.refuse_damaged(db)

    def close(self) -> None:
        """Close the connections: one must not be carried into a forked worker."""
        self._autocommit.dispose()

    def tidy(self) -> None:
        """Do what a rebind left to be done after its answer. If that fails, the next one does it."""
        with suppress(StoreError), self.autocommit() as db:
            self.engine.tidy(db)

    def _create_tables(self) -> None:
        with self._translated(), self._writing.begin() as db:
            self.engine.take_turn(db)  # of several processes at once, one creates them
            metadata.create_all(db)
            if not db.scalar(select(schema_version.c.version)):
                db.execute(insert(schema_version).values(version=SCHEMA_VERSION))

    def _refuse_version(self, version: int) -> None:
        if version != SCHEMA_VERSION:
            raise StoreUnusable(
                f"the store has schema version {version}, and this is version {SCHEMA_VERSION}: print its messages "
                "with the old code, and load them into a new store with `flask load`",
                self.shown,
            )

    @contextmanager
    def _transaction(self, engine: Engine) -> Iterator[Connection]:
        self.prepare()
        committing = False
        try:
            with self._translated(), engine.begin() as db:
                yield db
                committing = True
        except (StoreUnavailable, StoreUnusable) as error:
            self._prepared = isinstance(error, StoreConflict)  # the next one looks at the store again
            cause = error.__cause__
            if not (committing and isinstance(cause, DBAPIError) and cause.connection_invalidated):
                raise
            message = (
                "the answer to the commit was lost: all was done or nothing; send it again with its Idempotency-Key"
            )
            raise StoreUnavailable(message) from cause

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The one place where a driver's errors become ours. What they mean is in a table of each engine."""
        try:
            yield
        except DBAPIError as error:
            if meaning := self.engine.meaning(error):
                raise meaning from error
            raise


def _begin(db: Connection) -> None:
    if begin := db.get_execution_options()["begin"]:
        db.exec_driver_sql(begin)
