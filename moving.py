"""What both engines share when many messages are selected and changed. Their own ways are in their modules.

An engine offers two ways to change messages: `update_all` changes them by SQL alone, and Python never sees one;
`update_each` streams them through Python in batches.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    Text,
    and_,
    case,
    cast,
    func,
    literal,
    literal_column,
    select,
    type_coerce,
)

from message import Changes
from rebinding import MAX_MOVES, Move, Plan
from store import StoreRefused
from tables import MAX_NAME, TOO_LONG, log, messages

Item = TypeVar("Item")

BATCH = 500  # messages or records that are in memory at once
MAX_BATCH = 2**21  # characters of their metadata, or bytes of their contents
FIRST_ROWS = 4  # that are read, while nobody knows how large they are
MANY = 1000  # messages: what rebinding them leaves to be done is done after the answer
MAX_KEYS = 30  # that are restored by SQL

Row = Sequence[Any]

# A message as a row that is read by the driver alone, without SQLAlchemy's types: `update_each` reads these columns.
MESSAGE_COLUMNS: list[ColumnElement[Any]] = [
    messages.c.sender,
    type_coerce(messages.c.recipient, Text),
    cast(messages.c.meta, Text),
    *(messages.c[name] for name in ("id", "queue", "size", "created", "due", "num_attempts", "domain")),
]
# With `Selection.of_records`, these follow: what a record says of the message.
RECORD_COLUMNS: list[ColumnElement[Any]] = [
    log.c.sender,
    type_coerce(log.c.recipient, Text),
    cast(log.c.meta, Text),
    cast(log.c.changes, Text),
]

BEFORE = ["id", "sender", "recipient", "size", "created", "num_attempts", "meta"]
"""A record's columns that hold what its message was before."""


@dataclass(frozen=True)
class Selection:
    """Some messages, or those of them that are due soonest."""

    where: ColumnElement[bool]
    limit: int | None = None
    of_records: bool = False
    """Each message comes with a record of it, which `where` picks too."""
    skips: bool = False
    """Python may leave some out: the limit is only an order."""
    are_most: bool = False
    """SQLite: they are most of all messages, which its planner does not know."""

    def columns(self, at: ColumnElement[Any]) -> list[ColumnElement[Any]]:
        """What `update_each` reads of each message; `at` is what the engine finds it by."""
        return [*MESSAGE_COLUMNS, at, *(RECORD_COLUMNS if self.of_records else [])]

    def select(self, *columns: ColumnElement[Any]) -> Select[Any]:
        """These columns of each."""
        source: FromClause = messages.join(log, messages.c.id == log.c.id) if self.of_records else messages
        found = select(*columns).select_from(source).where(self.where)
        if self.are_most and self.limit is None and not self.of_records:
            found = found.with_hint(messages, "NOT INDEXED", "sqlite")  # a scan is faster than random access
        if self.limit is not None:
            found = found.order_by(messages.c.due, messages.c.id)
        return found if self.skips else found.limit(self.limit)


@dataclass(frozen=True)
class NewState:
    """What a rebind by data makes of each message, in SQL."""

    queue: ColumnElement[str]
    """Its new name."""
    meta: ColumnElement[Any] | None
    """Its new metadata; None if that does not change."""
    now: float
    """When those that move are due, in seconds since 1970."""
    flush: bool
    """All are due now, not only those that move."""
    renames: bool
    """A naming key is set or removed, so that most messages will move."""
    restored: tuple[str, ...] = ()
    """The keys that get back what they were when a message's record was written: its new record says so."""

    @property
    def differs(self) -> ColumnElement[bool]:
        """Whether a message is not as it was yet."""
        return messages.c.meta != self.meta

    def values(self, moves: bool = True) -> dict[str, Any]:
        """What to set, by column. `moves`: whether any message moves."""
        values: dict[str, Any] = {} if self.meta is None else {"meta": self.meta}
        if moves:
            due = case((messages.c.queue != self.queue, self.now), else_=messages.c.due)
            values |= {"queue": self.queue, "due": due}
        return values | ({"due": literal(self.now)} if self.flush else {})


class Update(NamedTuple):
    """What `update_each` makes of one message, each field as its column holds it."""

    sender: str
    recipient: str
    domain: str
    meta: str
    queue: str
    due: float
    """In seconds since 1970."""
    at: Any
    """What the engine finds the message by."""
    changes: Changes
    """For its record."""
    old_queue: str


UPDATED_COLUMNS = Update._fields[:6]

Decide = Callable[[Iterable[Row]], Iterator[Update]]
"""Makes updates of rows of `Selection.columns`, lazily and in their order. It may leave messages out, or stop."""


def fit_in_sql(keys: Sequence[str]) -> bool:
    """Whether SQL can restore these keys: some that need no quoting, and not too many for a function of SQLite."""
    return len(keys) <= MAX_KEYS and all(re.fullmatch("[A-Za-z0-9_-]{1,100}", key) for key in keys)


def plan(db: Connection, found: Selection, new: NewState, octets: Any) -> Plan:
    """What would become of the messages.

    octets: the engine's expression for the length of a text in bytes.
    Raises StoreRefused if the tables would refuse a name.
    """
    # OFFSET 0 keeps the planner from evaluating the new name at each place that uses it.
    if new.restored:
        found = replace(found, where=found.where & new.differs)
    each = found.select(messages.c.queue, new.queue.label("to")).offset(literal_column("0")).subquery()
    pairs = select(each.c.queue, each.c.to, func.count().label("n")).group_by(each.c.queue, each.c.to).subquery()
    moved = func.sum(pairs.c.n).filter(pairs.c.queue != pairs.c.to)
    totals = (func.count(), func.sum(pairs.c.n), moved, func.max(octets(pairs.c.to)))
    rows = db.execute(
        select(pairs, *(total.over() for total in totals))
        .order_by(pairs.c.n.desc(), pairs.c.queue, pairs.c.to)
        .limit(MAX_MOVES)
    ).all()
    if not rows:
        return Plan(0, 0, [], 0)
    entries, matched, moving, longest = rows[0][3:]
    if longest > MAX_NAME:
        raise StoreRefused(TOO_LONG)
    return Plan(int(matched), int(moving or 0), [Move(*row[:3]) for row in rows], entries - len(rows))


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


def record_columns(rebind_id: str, before: Any, new_queue: Any, old_queue: Any) -> dict[str, Any]:
    """A record's columns, with what the message was from the columns of `before`."""
    columns = {name: before[name] for name in BEFORE}
    columns |= {"type": literal("AdminRebind", Text), "rebind_id": literal(rebind_id, Text)}
    return columns | {"queue": new_queue, "old_queue": old_queue}


def of_rebind(rebind_id: str, first_key: int, last_key: int) -> ColumnElement[bool]:
    """Whether a record is of this rebind, whose records' keys lie in this range."""
    return and_(log.c.key.between(first_key, last_key), log.c.rebind_id == rebind_id)
