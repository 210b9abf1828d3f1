"""What both engines share when they select and change many messages, and what each of them offers: `Backend`."""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import sqlalchemy as sa

from message import from_json, strict_json
from tables import OF_MESSAGE, log, messages

Item = TypeVar("Item")

BATCH = 500  # messages or records that are in memory at once
MAX_BATCH = 2**21  # characters of their metadata, or bytes of their contents
FIRST_ROWS = 16  # that are read while nobody knows how large they are

# Of SQLAlchemy's engines. The server's threads are the bound of their connections.
ENGINE: dict[str, Any] = {"json_serializer": strict_json, "json_deserializer": from_json, "max_overflow": -1}


class MessageRow(NamedTuple):
    """A message as the driver alone reads it, without SQLAlchemy's types."""

    sender: str
    recipient: str
    meta: str
    id: str
    queue: str
    domain: str
    size: int
    created: float
    due: float
    num_attempts: int


MESSAGE_COLUMNS: list[sa.ColumnElement[Any]] = [
    sa.cast(messages.c.meta, sa.Text).label("meta") if name == "meta" else messages.c[name]
    for name in MessageRow._fields
]


class Update(NamedTuple):
    """What `update_each` makes of one message, each field as its column holds it; None is what does not change."""

    id: str  # of the message
    sender: str | None
    recipient: str | None
    meta: str | None
    domain: str | None
    queue: str
    is_due: bool  # now; otherwise it is due when it was


UPDATED_COLUMNS = Update._fields[1:-1]

# Columns of a record that say what the event or an undo made of its message, NULL for what it did not change.
NEW_COLUMNS = ("new_sender", "new_recipient", "new_meta")
NEW_OF_UNDO = (*NEW_COLUMNS, "new_due")

Decide = Callable[[MessageRow], Update]  # makes the update of one message


@dataclass(frozen=True)
class Selection:
    """Some messages, or those of them that are due soonest."""

    where: sa.ColumnElement[bool]
    limit: int | None = None
    of_records: bool = False  # `where` picks a record of the log with each message
    at_most: int | None = None  # how many there can be, if that is known
    are_most: bool = False  # SQLite: they are most of all messages, which its planner does not know

    @property
    def is_empty(self) -> bool:
        """Whether it is known that there are none."""
        return self.at_most == 0 or isinstance(self.where, sa.False_)

    def select(self, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
        """These columns of each."""
        source: sa.FromClause = messages.join(log, messages.c.id == log.c.id) if self.of_records else messages
        found = sa.select(*columns).select_from(source).where(self.where)
        if self.limit is not None:
            return found.order_by(messages.c.due, messages.c.id).limit(self.limit)
        if self.are_most and not self.of_records:
            return found.with_hint(messages, "NOT INDEXED", "sqlite")  # a scan is faster than random access
        return found


@dataclass(frozen=True)
class NewState:
    """What a rebind by data or an undo makes of each message, in SQL."""

    values: Mapping[str, sa.ColumnElement[Any]]  # the new value of each column that may change
    renames: bool  # messages will move, so that nobody needs to look first whether any does
    due_if_moved: bool  # `due` stays the same for messages that do not move


Record = dict[str, sa.ColumnElement[Any]]

# Columns that say what a message was before; `queue` is `old_queue` in a record.
BEFORE = (*OF_MESSAGE, "domain", "due")


def record_of(rebind_id: str | None, before: Any, after: Any, news: Iterable[str] = ()) -> Record:
    """An AdminRebind record: the message's columns before, its queue after, and of `news` what is not as before."""
    columns = {name: before[name] for name in BEFORE}
    columns |= {"type": sa.literal("AdminRebind", sa.Text), "rebind_id": sa.literal(rebind_id, sa.Text)}
    columns |= {"queue": after["queue"], "old_queue": before["queue"]}
    for name in news:
        column = name.removeprefix("new_")
        columns[name] = sa.func.nullif(after[column], before[column], type_=log.c[name].type)
    return columns


def of_rebind(rebind: Any) -> sa.ColumnElement[bool]:
    """Whether a record is of the rebind in this row of `rebinds`: its records' keys are in a range of the log."""
    return sa.and_(log.c.key.between(rebind.first_key, rebind.last_key), log.c.rebind_id == rebind.rebind_id)


def rows_to_read(size: int, characters: int) -> int:
    """How many rows to read next, after `size` rows with so many characters of metadata."""
    return max(1, size // 4) if characters > MAX_BATCH // 2 else min(BATCH, size * 2)


def batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items, BATCH at a time, or fewer if they are large."""
    batch: list[Item] = []
    total = 0
    for one in items:
        batch.append(one)
        total += size(one)
        if len(batch) == BATCH or total > MAX_BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class Backend(Protocol):
    """What an engine offers. The modules sqlite and postgresql have these names, and queues.py chooses one of them."""

    ENCODING: tuple[str, str]  # how to ask for the database's encoding, and what it must be
    BEGIN_READ: str  # begins a transaction that sees everything as it was at one moment
    BEGIN_WRITE: str
    DriverError: type[Exception]  # what its driver raises

    def connect_to(self, url: str, busy_timeout: float) -> sa.Engine:
        """Connections that wait `busy_timeout` seconds for others. Raises ArgumentError, ImportError and ValueError."""

    def open_file(self, url: str, create: bool) -> None:
        """Look for the file, or with `create` create one. Raises StoreUnavailable and StoreUnusable."""

    def meaning(self, error: sa.exc.DBAPIError) -> Exception | None:
        """What a driver's error means to us; None if it is a fault in our own code."""

    def now(self, db: sa.Connection) -> float:
        """The time, in seconds since 1970, by the clock that all who use the database share."""

    def last_key(self, db: sa.Connection) -> int:
        """The last key of the log that was given to anybody; 0 if none was."""

    def writers_of_log(self, db: sa.Connection) -> Collection[str]:
        """The transactions that may still commit records with smaller keys than the last one that can be read."""

    def contents_of(self, db: sa.Connection, ids: Sequence[str]) -> dict[str, bytes]:
        """The contents of these messages, by their ids."""

    def insert(self, db: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
        """Add rows, which have the same columns. Each value is as the driver takes it."""

    def among(self, column: sa.Column[str], values: Sequence[str]) -> sa.ColumnElement[bool]:
        """Whether the column has one of these values; however many they are, they are one parameter."""

    def meta_text(self, key: str) -> sa.ColumnElement[str]:
        """The string at a plain key of a message's metadata; NULL if there is none."""

    def merge(
        self, meta: sa.ColumnElement[Any], data: Mapping[str, str], unset: Collection[str]
    ) -> sa.ColumnElement[Any]:
        """The metadata with every key of `data` set and the keys `unset` removed."""

    def take_turn(self, db: sa.Connection) -> None:
        """Wait until no other rebind is running, and prepare a transaction for one."""

    def sized(self, db: sa.Connection, selection: Selection) -> Selection:
        """The same messages, with what the planner must be told of their number."""

    def update_all(
        self, db: sa.Connection, selection: Selection, new: NewState, rebind_id: str | None
    ) -> tuple[int, int]:
        """Change messages by SQL alone, with a record of each unless `rebind_id` is None: how many, how many moved."""

    def update_each(
        self, db: sa.Connection, selection: Selection, decide: Decide, now: float, rebind_id: str | None
    ) -> None:
        """Make each message what `decide` says, due `now` or not, with a record of each unless `rebind_id` is None."""

    def rows(self, db: sa.Connection, selection: Selection) -> Generator[MessageRow]:
        """Each message, in a transaction that changes nothing. Close it when you have seen enough."""
