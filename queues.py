"""Scheduled queues: the messages in them, and rebinding, which moves messages from queue to queue.

`registry` is the one instance that the route, the command line and delivery workers use. It knows nothing of HTTP, and
keeps nothing in memory: every process and host that is bound to the same database sees the same queues.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from sqlalchemy import CTE, ColumnElement, Connection, func, insert, select, true
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

import deliverylog
import event
import history
import postgresql
import sqlite
from deliverylog import EVERY_RECORD, LogFilter, Pruned
from message import NewMessage, domain_of
from moving import MANY, MESSAGE_COLUMNS, NewState, Selection, batches, fit_in_sql, plan
from names import ALL_QUEUES, DISCARDED, NAMING_KEYS, Criteria, QueueName, new_name, queue_name
from rebinding import RebindRequest, RebindResult, in_a_line
from store import Database, StoreConflict, StoreUnusable
from streaming import Stream, handled, restored
from tables import contents, messages

ENGINES = {"sqlite": sqlite, "postgresql": postgresql}
ATTEMPTS = 3  # per rebind: PostgreSQL may end ours if another transaction locks the same messages in another order
CONTENTS = 16  # that are in memory at once: each may have many megabytes

NOTHING = RebindRequest(reason="", data={}, criteria=Criteria(domain="nobody.invalid"), dry_run=True)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueueSummary:
    """A scheduled queue, and what is in it."""

    queue: str
    messages: int
    due: int
    """How many of its messages are due now."""
    oldest: float
    """When the oldest of its messages was received, in seconds since 1970."""
    attempts: int
    """The most attempts that one of its messages has had."""


class Loaded(NamedTuple):
    """How many messages were added, how many of those have no content, and how many were discarded."""

    messages: int
    empty: int
    discarded: int


class DuplicateMessage(Exception):
    """A message with this id already exists."""


class QueueRegistry:
    """The scheduled queues of one database."""

    database: Database

    def bind(self, url: str, busy_timeout: float | str) -> None:
        """Use the database at `url`, and wait at most `busy_timeout` seconds for others who use it.

        The database is not touched before it is used. Raises StoreUnusable.
        """
        self.database = Database(_engine(url), url, busy_timeout)

    def prepare(self) -> None:
        """Create the store if there is none, and check it. Raises StoreUnavailable and StoreUnusable."""
        self.database.prepare(create=True)

    def check(self) -> None:
        """Find a damaged store now, and compile a rebind's statements, before the first rebind does.

        Raises StoreDamaged and StoreUnavailable.
        """
        self.database.check()
        self.rebind(NOTHING)
        self.database.close()

    def rebind(self, request: RebindRequest, progress: Callable[[], None] = lambda: None) -> RebindResult:
        """Handle each matched message exactly once, all or none of them, durably.

        progress: is called for each message that the event or an undo streams.

        docs/contract.md, "What one request does" and "Beyond the page".

        Raises NoHandler, HandlerFailed, UnknownRebind, NothingToUndo, KeyReused and StoreRefused: nothing was done.
        Raises StoreUnavailable: nothing was done unless the answer to the commit was lost, as its message says.
        """
        if request.dry_run:
            with self.database.begin_read() as db:
                return self._rehearse(db, request, progress)
        rebind_id, start = history.new_id(), time.monotonic()
        logger.info("rebind %s begins: %s", rebind_id, in_a_line(request))
        try:
            result = self._attempt(request, rebind_id, progress)
        except BaseException as error:
            logger.info("rebind %s failed after %.3f s: %s", rebind_id, time.monotonic() - start, type(error).__name__)
            raise
        repeated = "" if result.rebind_id == rebind_id else f" (the answer of {result.rebind_id} again)"
        seconds = time.monotonic() - start
        logger.info("rebind %s ends after %.3f s: %s%s", rebind_id, seconds, result.in_a_line(), repeated)
        return result

    def tidy(self, result: RebindResult) -> None:
        """Do what a rebind left to be done after its answer: for a few messages it is not worth the time."""
        if result.matched >= MANY and result.plan is None:
            self.database.tidy()

    def _attempt(self, request: RebindRequest, rebind_id: str, progress: Callable[[], None]) -> RebindResult:
        for _ in range(ATTEMPTS - 1):
            with suppress(StoreConflict):
                return self._rebind(request, rebind_id, progress)
        return self._rebind(request, rebind_id, progress)

    def _rebind(self, request: RebindRequest, rebind_id: str, progress: Callable[[], None]) -> RebindResult:
        """Do it in one transaction: which messages, what becomes of them, their records, the row of history."""
        engine = self.database.engine
        with self.database.begin_write() as db:
            engine.take_turn(db)
            if done := history.answered(db, request):
                return done
            now, first_key = time.time(), engine.last_key(db) + 1
            recorded = None if request.suppress_logging else rebind_id
            found, left, change = _work(engine, db, request, now, progress)
            if isinstance(change, Stream):
                engine.update_each(db, found, change, recorded)
                matched, moved = change.matched, change.moved
            else:
                matched, moved = engine.update_all(db, found, change, recorded)
            flushed = matched if request.always_flush else moved
            result = RebindResult(matched, moved, flushed, left, rebind_id)
            history.keep(db, request, result, now, (first_key, engine.last_key(db)))
        return result

    def _rehearse(self, db: Connection, request: RebindRequest, progress: Callable[[], None]) -> RebindResult:
        """Plan a rebind."""
        engine, now = self.database.engine, time.time()
        found, left, change = _work(engine, db, request, now, progress)
        if isinstance(change, Stream):
            with closing(engine.rows(db, found)) as rows:
                for _ in change(rows):
                    pass
            planned = change.plan()
        else:
            planned = plan(db, found, change, engine.octets)
        flushed = planned.matched if request.always_flush else planned.moved
        return RebindResult(planned.matched, planned.moved, flushed, left, plan=planned)

    def load(self, new: Iterable[NewMessage]) -> Loaded:
        """Add messages, all or none of them, except those for the queue `null`, which are discarded.

        The store may be locked for as long as they take to be read.
        Raises DuplicateMessage, StoreRefused and StoreUnavailable, and ValueError if a recipient has no domain.
        """
        added = empty = discarded = 0
        with self.database.begin_write() as db:
            for batch in batches(new, lambda one: len(one.content)):
                rows = [row for row in map(_row, batch) if row["queue"] != DISCARDED]
                _refuse_duplicates(db, batch)
                if rows:
                    db.execute(insert(messages), rows)
                    db.execute(insert(contents), [{"id": row["id"], "data": row["content"]} for row in rows])
                added += len(rows)
                empty += sum(not row["content"] for row in rows)
                discarded += len(batch) - len(rows)
        return Loaded(added, empty, discarded)

    def queues(self, criteria: Criteria = ALL_QUEUES) -> list[QueueSummary]:
        """The queues that match, by name. Raises StoreUnavailable."""
        due = func.count().filter(messages.c.due <= time.time())
        oldest, attempts = func.min(messages.c.created), func.max(messages.c.num_attempts)
        statement = select(messages.c.queue, func.count(), due, oldest, attempts).group_by(messages.c.queue)
        with self.database.autocommit() as db:
            matching = statement.where(_matching(self.database.engine, db, criteria)).order_by(messages.c.queue)
            return [QueueSummary(*row) for row in db.execute(matching)]

    def messages(
        self, criteria: Criteria = ALL_QUEUES, id: str | None = None, limit: int | None = None
    ) -> Iterator[Any]:
        """The messages that match, or those of them that are due soonest: MESSAGE_COLUMNS and `data`, the content.

        They are streamed, and all are as they were at one moment. Raises StoreUnavailable.
        """
        with self.database.begin_read() as db:
            matching = _matching(self.database.engine, db, criteria)
            found = Selection(matching if id is None else matching & (messages.c.id == id), limit)
            data = select(contents.c.data).where(contents.c.id == messages.c.id).scalar_subquery().label("data")
            yield from db.execute(found.select(*MESSAGE_COLUMNS, data), execution_options={"yield_per": CONTENTS})

    def due_queues(self, db: Connection, due: float) -> list[str]:
        """The names of the queues with a message that is due then, in seconds since 1970."""
        names = _loose_index_scan(self.database.engine)
        is_due = select(messages.c.id).where(messages.c.queue == names.c.queue, messages.c.due <= due)
        return list(db.scalars(select(names.c.queue).where(names.c.queue.is_not(None), is_due.exists())))

    def records(
        self, after: int = 0, poll: float | None = None, wanted: LogFilter = EVERY_RECORD
    ) -> Iterator[dict[str, Any]]:
        """The delivery log. See deliverylog.records."""
        return deliverylog.records(self.database, after, poll, wanted)

    def rebinds_done(self, since: float | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """The rebinds that were done, newest first. See history.rebinds_done."""
        return history.rebinds_done(self.database, since, limit)

    def prune(self, before: float, dry_run: bool = False) -> Pruned:
        """Remove old records and old history. See deliverylog.prune."""
        return deliverylog.prune(self.database, before, dry_run)


def _engine(url: str) -> ModuleType:
    """The module for this database. Raises StoreUnusable."""
    try:
        backend = make_url(url).get_backend_name()
    except (ArgumentError, ValueError) as error:
        raise StoreUnusable(f"the database URL cannot be used: {error}") from error
    if backend not in ENGINES:
        raise StoreUnusable(f"the database URL cannot be used: {backend} is neither sqlite nor postgresql")
    return ENGINES[backend]


def _loose_index_scan(engine: ModuleType) -> CTE:
    """The queues' names, each found from the one before, and a last NULL.

    The cost grows with the number of queues, not of messages.
    """
    first = select(func.min(messages.c.queue).label("queue")).cte("names", recursive=True)
    start = engine.following(first.c.queue)
    following = select(messages.c.queue).where(messages.c.queue >= start).order_by(messages.c.queue).limit(1)
    return first.union(select(following.scalar_subquery()).where(first.c.queue.is_not(None)))


def matching_queues(engine: ModuleType, db: Connection, criteria: Criteria) -> list[str]:
    """The names of the queues that match."""
    names = _loose_index_scan(engine).c.queue
    found = db.scalars(select(names).where(names.is_not(None)))
    return [name for name in found if criteria.match(QueueName.parse(name))]


def _matching(engine: ModuleType, db: Connection, criteria: Criteria) -> ColumnElement[bool]:
    """Whether a message is in a queue that matches."""
    return true() if criteria.match_all else engine.in_queues(matching_queues(engine, db, criteria))


def _work(
    engine: ModuleType, db: Connection, request: RebindRequest, now: float, progress: Callable[[], None]
) -> tuple[Selection, int | None, NewState | Stream]:
    """Which messages to handle; of an undo, how many are left alone; and what becomes of each message."""
    matching = _matching(engine, db, request.criteria)
    left = None
    change: NewState | Stream
    if request.undo is not None:
        undo = history.undoable(db, request.undo)
        matching, left = matching & undo.found, undo.left
        if undo.keys and fit_in_sql(undo.keys):
            change = _state_before(engine, request, undo.keys, now)
            found = Selection(matching, request.limit, of_records=True)
        else:
            change = Stream(request, now, progress, partial(restored, undo.shared))
            found = Selection(matching, request.limit, of_records=True, skips=True)
    elif request.trigger_rebind_event:
        found = Selection(matching, request.limit)
        change = Stream(request, now, progress, partial(handled, event.connected(), request.data))
    else:
        change = _new_state(engine, request, now)
        if request.limit is not None and change.renames:
            matching &= messages.c.queue != change.queue  # so that the same request moves the next ones
        found = Selection(matching, request.limit)
    return engine.select_from(db, found), left, change


def _new_state(engine: ModuleType, request: RebindRequest, now: float) -> NewState:
    """What a rebind by data makes of each message."""
    return NewState(
        queue=new_name(engine.from_meta, request.data, request.unset),
        meta=engine.merge(request.data, request.unset) if request.data or request.unset else None,
        now=now,
        flush=request.always_flush,
        renames=not {*request.data, *request.unset}.isdisjoint(NAMING_KEYS),
    )


def _state_before(engine: ModuleType, request: RebindRequest, keys: tuple[str, ...], now: float) -> NewState:
    """What the undo of a rebind by data makes of each message: these keys are what they were before."""
    return NewState(
        queue=new_name(engine.from_meta, {}, restored=keys),
        meta=engine.restored(keys),
        now=now,
        flush=request.always_flush,
        renames=True,
        restored=keys,
    )


def _row(new: NewMessage) -> dict[str, Any]:
    now, domain = time.time(), domain_of(new.recipient) if new.domain is None else new.domain
    return {
        "id": new.id,
        "sender": new.sender,
        "recipient": new.recipient,
        "domain": domain,
        "queue": queue_name(new.meta, domain) if new.queue is None else new.queue,
        "meta": new.meta,
        "size": len(new.content),
        "created": now if new.created is None else new.created,
        "due": now if new.due is None else new.due,
        "num_attempts": new.num_attempts,
        "content": new.content,
    }


def _refuse_duplicates(db: Connection, batch: list[NewMessage]) -> None:
    there = set(db.scalars(select(messages.c.id).where(messages.c.id.in_([new.id for new in batch]))))
    for new in batch:
        if new.id in there:
            raise DuplicateMessage(f"{new.source}: message id {new.id} already exists")
        there.add(new.id)


registry = QueueRegistry()
