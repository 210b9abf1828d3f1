"""How a rebind reads and changes many messages at once, by the shortest way that each database has.

What it does to them is said in queues.py; what the ways cost, and which others were tried, in docs/performance.md.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import (
    CTE,
    JSON,
    Column,
    ColumnElement,
    Connection,
    CursorResult,
    FromClause,
    Insert,
    MetaData,
    Row,
    Select,
    Table,
    Text,
    Update,
    bindparam,
    cast,
    column,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    true,
    update,
)
from sqlalchemy.exc import DBAPIError

from mail import to_json
from sqlfunctions import octets
from store import (
    MAX_NAME,
    TOO_LONG,
    Key,
    Name,
    StoreRefused,
    in_queues,
    log,
    messages,
    messages_queue_due,
)

BATCH = 500  # messages or records that are in memory at once

Values = Mapping[str, Any]
"""What to set or write, by column."""

OF_MESSAGE = [column.name for column in log.c if column.name in messages.c and column.name != "key"]
OF_REBIND = ["type", "event_time", "nodeid", "rebind_id", "reason", "actor"]  # with the old queue, a record's others

# In SQLite, the messages that the event is called with, for the length of its transaction: what they are is decided
# once, when it starts, though a message may move to a queue that is still to be read.
marked = Table(
    "marked",
    MetaData(),
    Column("key", Key, primary_key=True, autoincrement=False),
    Column("queue", Name, nullable=False),
    prefixes=["TEMPORARY"],
)


class Change(NamedTuple):
    """What a message is to be, as it is kept, and which one it is."""

    sender: str
    recipient: str
    domain: str
    meta: str
    queue: str
    due: float
    """In seconds since 1970."""
    key: int
    old_queue: str


Columns = Sequence[ColumnElement[Any]]
Decide = Callable[[Sequence[Any]], Change]
"""From these columns of a message."""

TO_SET = Change._fields[:-2]  # all but those that say which message it is, and where it was


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


def matching(db: Connection, names: Sequence[str] | None, limit: int | None) -> Matching:
    """The messages in the queues `names`, None being all queues, or at most `limit` of them."""
    where = true() if names is None else in_queues(db, messages.c.queue, names)
    if db.dialect.name == "postgresql":
        return Matching(where, limit, are_most=False)
    if names is None and limit is None:
        return Matching(where, limit, are_most=True)
    found = _count(db, select(messages.c.key).where(where).limit(limit))
    are_most = _count(db, select(messages.c.key).limit(2 * found)) < 2 * found
    if are_most and names is not None and limit is None:
        where = in_queues(db, messages.c.queue + "", names)  # not by the index, which leads all over the table
    return Matching(where, limit, are_most)


def _count(db: Connection, found: Select[Any]) -> int:
    return db.scalar(select(func.count()).select_from(found.subquery())) or 0


def count(db: Connection, found: Matching, new_queue: ColumnElement[str]) -> tuple[int, int]:
    """How many messages there are, and how many of them are in another queue than `new_queue`.

    Raises StoreRefused where the table would, if `new_queue` were set.
    """
    # With an offset, or both databases would name a message anew at each place that looks at its name.
    each = found.select(messages.c.queue, new_queue.label("new_queue")).offset(literal_column("0")).subquery()
    moved = func.count().filter(each.c.queue != each.c.new_queue)
    longest = func.max(octets(each.c.new_queue))
    matched, moving, length = db.execute(select(func.count(), moved, longest).select_from(each)).one()
    if matched and length > MAX_NAME:
        raise StoreRefused(TOO_LONG)
    return matched, moving


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
    if db.dialect.name == "postgresql":
        return _change_in_postgresql(db, found, values(new_queue), record)
    if moving:
        with _counted(db) as moved:
            return _change_in_sqlite(db, found, values(new_queue), record), moved()
    named = found.select(messages.c.queue, new_queue.label("new_queue")).subquery()
    to_move = _count(db, select(named).where(named.c.queue != named.c.new_queue))
    # To set `queue` and `due` to what they are would cost as much as to change them, for the sake of their index.
    return _change_in_sqlite(db, found, values(new_queue if to_move else None), record), to_move


def _change_in_postgresql(db: Connection, found: Matching, values: Values, record: Values | None) -> tuple[int, int]:
    """In one statement: a message that another transaction has changed meanwhile is looked at again, as it is now.

    They are locked as they come: where a worker locks several in another order, the database ends one of the two.
    """
    old_queue: ColumnElement[str] = literal_column("old.queue", messages.c.queue.type)
    where = found.where
    if found.limit is not None or not _returns_old(db):
        columns = (messages.c.key, messages.c.queue)
        locked = found.select(*columns).with_for_update(key_share=True, of=messages).cte("locked")
        where, old_queue = messages.c.key == locked.c.key, locked.c.queue
    changed = _changed(update(messages).where(where).values(values), old_queue)
    moved = func.count().filter(changed.c.queue != changed.c.old_queue)
    counts = select(func.count(), moved).select_from(changed)
    if record is not None:
        counts = counts.add_cte(_records(changed.c, changed.c.old_queue, changed, record).cte("records"))
    matched, moving = db.execute(counts).one()
    return matched, moving


def _returns_old(db: Connection) -> bool:
    """Whether PostgreSQL's UPDATE can return what was there before, as `old`, beside what is there now."""
    return (db.dialect.server_version_info or (0,)) >= (18,)


def _changed(changing: Update, old_queue: ColumnElement[str]) -> CTE:
    """What PostgreSQL's UPDATE leaves, with the queue in which each message was."""
    columns = [messages.c[name] for name in OF_MESSAGE]
    return changing.returning(*columns, old_queue.label("old_queue")).cte("changed")


def _record(message: Any, old_queue: ColumnElement[str], record: Values) -> dict[str, ColumnElement[Any]]:
    """A record's columns, with what is the message's from those of `message`."""
    of_rebind = {name: literal(record[name], log.c[name].type) for name in OF_REBIND}
    return {name: message[name] for name in OF_MESSAGE} | {"old_queue": old_queue} | of_rebind


def _records(message: Any, old_queue: ColumnElement[str], each: FromClause, record: Values) -> Insert:
    """Write a record of each message in `each`; the columns of `message` have what is the message's."""
    columns = _record(message, old_queue, record)
    return insert(log).from_select(list(columns), select(*columns.values()).select_from(each))


def _change_in_sqlite(db: Connection, found: Matching, values: Values, record: Values | None) -> int:
    """In one pass, in the order in which the messages are stored. Returns how many there were."""
    where = found.where
    if found.limit is not None or not found.are_most:
        where = messages.c.key.in_(found.select(messages.c.key))
    # With nothing to set a message is written all the same, for its record.
    values = values or {"meta": messages.c.meta}
    statement = update(messages).where(where).values(values)
    with _recorded(db, record, values), _index_aside(db, found.are_most and "due" in values):
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
    message: Values = {name: literal_column(f"new.{name}") for name in OF_MESSAGE}
    values = _record(message, literal_column("old.queue"), record)
    # A trigger has no parameters: what it writes stands in it, quoted by SQLAlchemy.
    insertion = insert(log).values(values).compile(db, compile_kwargs={"literal_binds": True})
    update_of_them = f"UPDATE OF {', '.join(changed)} ON main.messages"
    db.exec_driver_sql(f"CREATE TEMPORARY TRIGGER write_record AFTER {update_of_them} BEGIN {insertion}; END")
    yield
    db.exec_driver_sql("DROP TRIGGER write_record")


@contextmanager
def _index_aside(db: Connection, aside: bool) -> Iterator[None]:
    """Build the index of the queues anew, rather than change most of its entries one by one, all over it.

    Everybody else sees it as it was, until the transaction ends, and then as it is.
    """
    if aside:
        messages_queue_due.drop(db, checkfirst=True)
    yield
    if aside:
        messages_queue_due.create(db)


def each_message(db: Connection, found: Matching, columns: Columns) -> Iterator[Row[Any]]:
    """These columns of each message, in any order, in a transaction that changes nothing."""
    return itertools.chain.from_iterable(_batches(db, found.select(*columns)))


def change_each(db: Connection, found: Matching, columns: Columns, decide: Decide, record: Values | None) -> None:
    """Make each message what `decide` says, and write a record of each, if there is one to write.

    columns: of types that a driver reads by itself.
    decide: is called with these columns of each message, once, in any order.
    """
    if db.dialect.name == "postgresql":
        _change_each_in_postgresql(db, found, columns, decide, record)
    else:
        _change_each_in_sqlite(db, found, columns, decide, record)


def _change_each_in_postgresql(
    db: Connection, found: Matching, columns: Columns, decide: Decide, record: Values | None
) -> None:
    """A cursor finds what was there when it was opened, and not what this transaction has made of it since.

    It locks as it goes: another transaction that is in the way may end this one after handlers were called. While
    `decide` looks at some messages, the server changes those before and reads those after them.
    """
    each = found.select(*columns).with_for_update(key_share=True, of=messages).compile(db)
    _plan_to_the_end(db)
    db.exec_driver_sql(f"DECLARE each_message CURSOR FOR {each}", each.params)
    change_them = _changes(record).compile(db)
    next_ones, changes = f"FETCH {BATCH} FROM each_message", "[]"
    with _pipeline(db) as driver:
        reading = driver.execute(next_ones)
        while rows := reading.fetchall():
            # The changes of those before, none at first. Sent only now: answers come in the order of the statements, so
            # that the rows just read would have had to wait for this one.
            driver.execute(str(change_them), change_them.params | {"changes": changes})
            reading = driver.execute(next_ones)
            decided = (decide(row) for row in rows)
            changes = to_json([change._asdict() | {"due": str(change.due)} for change in decided])
        driver.execute(str(change_them), change_them.params | {"changes": changes})


def _changes(record: Values | None) -> Update | Insert:
    """Make messages what `changes` says, JSON of a list of Change's fields, and write a record of each if wanted."""
    # Text, cast there: what JSON cannot say, such as an infinite `due`, passes too.
    each = func.json_to_recordset(bindparam("changes", type_=JSON)).table_valued(
        *(column(name, Text()) for name in Change._fields)
    )
    to = each.render_derived(with_types=True).c
    new = {name: cast(to[name], messages.c[name].type) for name in TO_SET}
    changing = update(messages).where(messages.c.key == cast(to.key, Key)).values(new)
    if record is None:
        return changing
    changed = _changed(changing, to.old_queue)
    return _records(changed.c, changed.c.old_queue, changed, record)


@contextmanager
def _pipeline(db: Connection) -> Iterator[psycopg.Connection]:
    """The driver's own connection, on which a statement does not wait for the one before it to end.

    Its errors are turned into SQLAlchemy's, which has no pipeline.
    """
    driver: Any = db.connection.driver_connection
    try:
        with driver.pipeline():
            yield driver
    except psycopg.Error as error:
        raise DBAPIError.instance(None, None, error, psycopg.Error) from error


def _change_each_in_sqlite(
    db: Connection, found: Matching, columns: Columns, decide: Decide, record: Values | None
) -> None:
    """What is still to be read must not be found by an index that changes meanwhile: it is written down before."""
    marked.create(db)
    # In the order of keys, but not by their index where that would read every message to find those of a few queues.
    order = messages.c.key if found.are_most else messages.c.key + 0
    db.execute(
        insert(marked).from_select(["key", "queue"], found.select(messages.c.key, messages.c.queue).order_by(order))
    )
    db.execute(text("ANALYZE marked"))  # or the planner, which knows nothing of it, may start from all the messages
    # By the driver itself: SQLAlchemy would take longer to bind the values than the database to write them.
    statement = f"UPDATE messages SET {', '.join(f'{name} = ?' for name in TO_SET)} WHERE key = ?"  # noqa: S608
    each = marked.join(messages, messages.c.key == marked.c.key)
    with _index_aside(db, found.are_most):
        for rows in _batches(db, select(*columns).select_from(each).order_by(marked.c.key)):
            db.exec_driver_sql(statement, [decide(row)[:-1] for row in rows])  # all but the old queue
    if record is not None:
        db.execute(_records(messages.c, marked.c.queue, each, record))
    marked.drop(db)


def _batches(db: Connection, statement: Select[Any]) -> Iterator[Sequence[Row[Any]]]:
    """What it finds, so many at a time."""
    _plan_to_the_end(db)
    return db.execute(statement, execution_options={"yield_per": BATCH}).partitions()


def _plan_to_the_end(db: Connection) -> None:
    """Let PostgreSQL plan a cursor to be read to its end."""
    if db.dialect.name == "postgresql":
        db.execute(text("SET LOCAL cursor_tuple_fraction = 1"))
