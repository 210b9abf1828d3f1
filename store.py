"""The database: its connections, its transactions, and what its errors mean.

What a rebind means is in queues.py, not here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError

from tables import SCHEMA_VERSION, metadata, schema_version

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
        sa.event.listen(connections, "begin", _begin)
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
                if (encoding := db.scalar(sa.text(question))) != needed:
                    raise StoreUnusable(f"the encoding of the database is {encoding}: it must be {needed}")
                found = set(sa.inspect(db).get_table_names()) & metadata.tables.keys()
                version = (db.scalar(sa.select(schema_version)) or 0) if schema_version.name in found else 1
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
            if not db.scalar(sa.select(schema_version.c.version)):
                db.execute(sa.insert(schema_version).values(version=SCHEMA_VERSION))

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
