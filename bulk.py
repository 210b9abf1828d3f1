"""How a rebind reads and changes many messages at once, by the shortest way that each database has.

What it does to them is said in queues.py; what the ways cost, and which others were tried, in docs/performance.md.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    CursorResult,
    FromClause,
    Insert,
    MetaData,
    Select,
    Table,
    Text,
    cast,
    column,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    update,
)

from store import (
    MAX_NAME,
    TOO_LONG,
    Key,
    Name,
    StoreRefused,
    in_queues,
    limit_of_names,
    log,
    messages,
    messages_queue_due,
    octets,
    returns_old,
)

Values = Mapping[str, Any]
"""What to set or write, by column."""

OF_MESSAGE = [column.name for column in log.c if column.name in messages.c and column.name != "key"]
OF_REBIND = ["type", "event_time", "nodeid", "rebind_id", "reason", "actor"]  # with the old queue, a record's others
# The messages that a rebind handles, for the length of its transaction: what they are is decided once, when it starts.
marked = Table(
    "marked",
    MetaData(),
    Column("key", Key, primary_key=True, autoincrement=False),
    Column("queue", Name, nullable=False),
    Column("new_queue", Name, nullable=False),
    limit_of_names("new_queue"),
    prefixes=["TEMPORARY"],
)

# What a trigger of SQLite's knows of the rebind.
rebinding = Table(
    "rebinding", MetaData(), *(Column(name, log.c[name].type) for name in OF_REBIND), prefixes=["TEMPORARY"]
)


class Change(NamedTuple):
    """What a message is to be, in the columns of these names, as they are kept."""

    sender: str
    recipient: str
    domain: str
    meta: str
    queue: str
    due: float
    """In seconds since 1970."""
    key: int


@dataclass(frozen=True)
class Matching:
    """The messages in some queues or, with a limit, so many of them, those due soonest."""

    where: ColumnElement[bool]
    limit: int | None
    are_most: bool
    """Whether it is SQLite and they are most of all messages, which its planner would not know. PostgreSQL's does."""

    def select(self, *columns: ColumnElement[Any]) -> Select[Any]:
        """These columns of each."""
        found = select(*columns).where(self.where)
        return found if self.limit is None else found.order_by(messages.c.due, messages.c.key).limit(self.limit)


def matching(db: Connection, names: Sequence[str], limit: int | None) -> Matching:
    """The messages in the queues `names`, or at most `limit` of them."""
    where = in_queues(db, messages.c.queue, names)
    if db.dialect.name == "postgresql":
        return Matching(where, limit, are_most=False)
    found = db.scalar(select(func.count()).where(where)) or 0
    ends = select(func.min(messages.c.key)).scalar_subquery(), select(func.max(messages.c.key)).scalar_subquery()
    span = db.scalar(select(ends[1] - ends[0])) or 0
    are_most = 2 * min(found, limit or found) > span
    if are_most and limit is None:
        where = in_queues(db, messages.c.queue + "", names)  # not by the index, which leads all over the table
    return Matching(where, limit, are_most)


def count(db: Connection, found: Matching, new_queue: ColumnElement[str]) -> tuple[int, int]:
    """How many messages there are, and how many of them are in another queue than `new_queue`."""
    each = found.select(messages.c.queue, new_queue.label("new_queue")).subquery()
    moved = func.count().filter(each.c.queue != each.c.new_queue)
    matched, moving = db.execute(select(func.count(), moved).select_from(each)).one()
    return matched, moving


def refuse_too_long(db: Connection, found: Matching, new_queue: ColumnElement[str]) -> None:
    """Raise StoreRefused where the table would, if `new_queue` were set."""
    each = found.select(octets(new_queue).label("octets")).subquery()
    if (db.scalar(select(func.max(each.c.octets))) or 0) > MAX_NAME:
        raise StoreRefused(TOO_LONG)


def change(
    db: Connection,
    found: Matching,
    new_queue: ColumnElement[str],
    values: Callable[[ColumnElement[str] | None], Values],
    record: Values | None,
    moving: bool,
) -> tuple[int, int]:
    """Set values in each message, and write a record of each, if there is one to write.

    values: what to set, by the name of its new queue, or None where no message moves.
    moving: whether it is to be expected that most will move, and dear to find out how many before it is done.
    Returns how many messages there were, and how many moved.
    """
    if db.dialect.name == "sqlite":
        if moving:
            with _counted(db) as moved:
                return _change_in_sqlite(db, found, values(new_queue), record), moved()
        to_move = count(db, found, new_queue)[1]
        # To set `queue` and `due` to what they are would cost as much as to change them, for the sake of their index.
        return _change_in_sqlite(db, found, values(new_queue if to_move else None), record), to_move
    if found.limit is None and returns_old(db):
        return _change_in_one_statement(db, found, values(new_queue), record)
    with mark(db, found, new_queue) as matched:
        db.execute(update(messages).where(messages.c.key == marked.c.key).values(values(marked.c.new_queue)))
        record_marked(db, record)
        return matched, db.scalar(select(func.count()).where(marked.c.queue != marked.c.new_queue)) or 0


def _change_in_one_statement(db: Connection, found: Matching, values: Values, record: Values | None) -> tuple[int, int]:
    """In PostgreSQL 18: a message that another transaction has changed meanwhile is looked at again, as it is now.

    They are locked as they come: where a worker locks several in another order, the database ends one of the two.
    """
    old_queue = literal_column("old.queue", messages.c.queue.type).label("old_queue")
    returned = [messages.c[name] for name in OF_MESSAGE]
    changed = update(messages).where(found.where).values(values).returning(*returned, old_queue).cte("changed")
    moved = func.count().filter(changed.c.queue != changed.c.old_queue)
    counts = select(func.count(), moved).select_from(changed)
    if record is not None:
        counts = counts.add_cte(_records(changed.c, changed.c.old_queue, changed, record).cte("records"))
    matched, moving = db.execute(counts).one()
    return matched, moving


def _change_in_sqlite(db: Connection, found: Matching, values: Values, record: Values | None) -> int:
    """In one pass, in the order in which the messages are stored. Returns how many there were."""
    where = found.where
    if found.limit is not None or not found.are_most:
        where = messages.c.key.in_(found.select(messages.c.key))
    # With nothing to set a message is written all the same, for its record.
    values = values or {"meta": messages.c.meta}
    statement = update(messages).where(where).values(values)
    with _recorded(db, record, values), index_aside(db, found.are_most and "due" in values):
        changed: CursorResult[Any] = db.execute(statement)
        return changed.rowcount


@contextmanager
def _counted(db: Connection) -> Iterator[Callable[[], int]]:
    """Count in SQLite, by a trigger, the messages that move. Gives what tells how many did."""
    db.execute(text("CREATE TEMPORARY TABLE counted AS SELECT 0 AS moved"))
    db.execute(
        text(
            "CREATE TEMPORARY TRIGGER count_moved AFTER UPDATE OF queue ON main.messages WHEN new.queue <> old.queue "
            "BEGIN UPDATE counted SET moved = moved + 1; END"
        )
    )
    yield lambda: db.scalar(text("SELECT moved FROM counted")) or 0
    db.execute(text("DROP TRIGGER count_moved"))
    db.execute(text("DROP TABLE counted"))


@contextmanager
def _recorded(db: Connection, record: Values | None, changed: Iterable[str]) -> Iterator[None]:
    """Write in SQLite, by a trigger, a record of each message whose columns `changed` are set, if a record is wanted.

    A site's own trigger that sets others causes none.
    """
    if record is None:
        yield
        return
    columns = ", ".join([*OF_MESSAGE, "old_queue", *OF_REBIND])
    values = ", ".join([*("new." + name for name in OF_MESSAGE), "old.queue", *OF_REBIND])
    insertion = f"INSERT INTO log ({columns}) SELECT {values} FROM rebinding"  # noqa: S608
    rebinding.create(db)
    db.execute(insert(rebinding).values(**record))
    update_of_them = f"UPDATE OF {', '.join(changed)} ON main.messages"
    db.execute(text(f"CREATE TEMPORARY TRIGGER write_record AFTER {update_of_them} BEGIN {insertion}; END"))
    yield
    db.execute(text("DROP TRIGGER write_record"))
    rebinding.drop(db)


@contextmanager
def index_aside(db: Connection, aside: bool) -> Iterator[None]:
    """Build the index of the queues anew, rather than change most of its entries one by one, all over it.

    Everybody else sees it as it was, until the transaction ends, and then as it is.
    """
    if aside:
        messages_queue_due.drop(db, checkfirst=True)
    yield
    if aside:
        messages_queue_due.create(db)


@contextmanager
def mark(db: Connection, found: Matching, new_queue: ColumnElement[str], lock: bool = True) -> Iterator[int]:
    """Write the messages down in `marked`, with their new queues, and lock them if asked to. Gives their number."""
    marked.create(db)
    # In the order of keys, but not by their index where that would read every message to find those of a few queues.
    order = messages.c.key if found.are_most else messages.c.key + 0
    each = found.select(messages.c.key, messages.c.queue, new_queue).order_by(order)
    if lock:
        each = each.with_for_update(key_share=True, of=messages)
    db.execute(insert(marked).from_select(["key", "queue", "new_queue"], each))
    db.execute(text("ANALYZE marked"))  # or the planner, which knows nothing of it, may start from all the messages
    yield db.scalar(select(func.count()).select_from(marked)) or 0
    marked.drop(db)


def change_each(db: Connection, changes: list[Change]) -> None:
    """Make each message what it is to be."""
    to_set = [name for name in Change._fields if name != "key"]
    if db.dialect.name == "sqlite":
        # By the driver itself: SQLAlchemy would take longer to bind the values than the database to write them.
        columns = ", ".join(f"{name} = ?" for name in to_set)
        db.exec_driver_sql(f"UPDATE messages SET {columns} WHERE key = ?", changes)  # noqa: S608
        return
    # Text, cast there: what JSON cannot say, such as an infinite `due`, passes too.
    rows = literal([change._asdict() | {"due": str(change.due)} for change in changes], JSON)
    each = func.json_to_recordset(rows).table_valued(*(column(name, Text()) for name in Change._fields))
    new = {name: cast(value, messages.c[name].type) for name, value in each.render_derived(with_types=True).c.items()}
    db.execute(update(messages).where(messages.c.key == new.pop("key")).values(new))


def record_marked(db: Connection, record: Values | None) -> None:
    """Write a record of each message in `marked`, as the message is now, if there is one to write."""
    if record is not None:
        each = marked.join(messages, messages.c.key == marked.c.key)
        db.execute(_records(messages.c, marked.c.queue, each, record))


def _records(message: Any, old_queue: ColumnElement[str], each: FromClause, record: Values) -> Insert:
    """Write a record of each message in `each`; the columns of `message` have what is the message's."""
    columns = {name: message[name] for name in OF_MESSAGE} | {"old_queue": old_queue}
    columns |= {name: literal(record[name], log.c[name].type) for name in OF_REBIND}
    return insert(log).from_select(list(columns), select(*columns.values()).select_from(each))
