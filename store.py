"""The database: its connections, its transactions, and its errors. What a rebind means is in queues.py, not here."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import sqlalchemy as sa

from moving import Backend
from tables import SCHEMA_VERSION, metadata, schema_version

LOST = "the answer to the commit was lost: all was done or nothing; send it again with its Idempotency-Key"
OTHER_VERSION = (
    f"the store has schema version {{}}, and this is version {SCHEMA_VERSION}: print its messages with the old code, "
    "and load them into a new store with `flask load`"
)
MAX_WAIT = 86_400  # seconds: within what both engines, and TCP's timers, can count


class StoreError(Exception):
    """What the database cannot do. Its text is for anybody; `reason`, for this host alone, may name the server."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.in_full = f"{message}: {reason}" if reason else message


class StoreUnavailable(StoreError):
    """The database is locked, full, read-only or out of reach. Nothing was done, unless a commit's answer was lost."""


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

    busy_timeout: how long a statement waits for others, in seconds: a number, or its text. Raises StoreUnusable.
    """

    def __init__(self, backends: Mapping[str, Backend], url: str, busy_timeout: Any) -> None:
        with suppress(ValueError):  # what is not a number is refused
            busy_timeout = json.loads(str(busy_timeout))
        if type(busy_timeout) not in (int, float) or not 0 <= busy_timeout <= MAX_WAIT:
            raise StoreUnusable(f"the busy timeout must be a number of seconds from 0 to {MAX_WAIT}: {busy_timeout!r}")
        self._url = url
        try:
            name = sa.make_url(url).get_backend_name()
            if name not in backends:
                raise ValueError(f"{name} is neither {' nor '.join(backends)}")
            self.backend = backends[name]
            self._engine = self.backend.connect_to(url, busy_timeout)
        except (sa.exc.ArgumentError, ImportError, ValueError) as error:
            raise StoreUnusable(f"the database URL cannot be used: {error}") from error
        self._prepared = self._may_create = False

    @property
    def shown(self) -> str:
        """The store for people: its URL without a password. An option may be one too."""
        return sa.make_url(self._url).set(query={}).render_as_string()

    def autocommit(self) -> AbstractContextManager[sa.Connection]:
        """For statements that read, each by itself, without a transaction. Raises StoreUnavailable."""
        return self._transaction()

    def begin_read(self) -> AbstractContextManager[sa.Connection]:
        """A transaction that changes nothing, waits for no writer, and sees one moment. Raises StoreUnavailable."""
        return self._transaction(self.backend.BEGIN_READ)

    def begin_write(self) -> AbstractContextManager[sa.Connection]:
        """A transaction that is committed, or rolled back by any exception. Raises StoreUnavailable, StoreRefused."""
        return self._transaction(self.backend.BEGIN_WRITE)

    def prepare(self, create: bool = False) -> None:
        """Check that the store can be used, and with `create`, once, make its tables if it has none.

        Raises StoreUnavailable, and does that when it is used, or StoreUnusable.
        """
        self._may_create |= create
        if self._prepared:
            return
        try:
            self.backend.open_file(self._url, self._may_create)
            with self._translated(), self._engine.begin() as db:
                question, needed = self.backend.ENCODING
                if (encoding := db.scalar(sa.text(question))) != needed:
                    raise StoreUnusable(f"the encoding of the database is {encoding}: it must be {needed}")
                found = set(sa.inspect(db).get_table_names()) & metadata.tables.keys()
                version = (db.scalar(sa.select(schema_version)) or 0) if schema_version.name in found else 1
            if not found and not self._may_create:
                raise StoreUnusable("there is no store", self.shown)
            if not found:
                with self._translated(), self._engine.begin() as db:
                    db.exec_driver_sql(self.backend.BEGIN_WRITE)
                    self.backend.take_turn(db)  # of several processes at once, one creates them
                    metadata.create_all(db)
                    if not db.scalar(sa.select(schema_version.c.version)):
                        db.execute(sa.insert(schema_version).values(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                raise StoreUnusable(OTHER_VERSION.format(version), self.shown)
        finally:
            self.close()
        self._prepared, self._may_create = True, False

    def close(self) -> None:
        """Close the connections: one must not be carried into a forked worker."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self, begin: str | None = None) -> Iterator[sa.Connection]:
        self.prepare()
        committing = False
        try:
            with self._translated(), self._engine.begin() as db:
                if begin:
                    db.exec_driver_sql(begin)
                yield db
                committing = begin == self.backend.BEGIN_WRITE
                if not committing:
                    db.rollback()  # who reads leaves no trace
        except (StoreUnavailable, StoreUnusable) as error:
            if not isinstance(error, StoreConflict):
                self._prepared = False  # the next one looks at the store again
            cause = error.__cause__
            if not (committing and isinstance(cause, sa.exc.DBAPIError) and cause.connection_invalidated):
                raise
            raise StoreUnavailable(LOST) from cause

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The one place where a driver's errors become ours. What they mean is in a table of each engine."""
        try:
            yield
        except (sa.exc.DBAPIError, self.backend.DriverError) as error:  # our own use of the driver raises its own
            known = error if isinstance(error, sa.exc.DBAPIError) else sa.exc.DBAPIError(None, None, error)
            if meaning := self.backend.meaning(known):
                raise meaning from known
            raise
        except UnicodeEncodeError as error:
            raise StoreRefused("a text contains a lone surrogate, which is not UTF-8") from error
