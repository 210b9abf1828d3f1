"""Scheduled queues: the messages in them, and rebinding, which moves messages from queue to queue.

`registry` is the one instance that the route, the commands and delivery workers use. It keeps nothing in memory: every
process and host that is bound to the same database sees the same queues.
"""

import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sqlalchemy as sa

import history
import postgresql
import sqlite
from event import Decider
from message import NewMessage, domain_of, recipient_text, to_json
from moving import Backend, MessageRow, NewState, Selection, batches
from names import DISCARDED, EVERYTHING, NAMING_KEYS, Criteria, new_name, queue_name
from rebinding import Plan, RebindRequest, RebindResult, in_a_line
from store import Database, StoreConflict, StoreRefused
from tables import MAX_NAME, TOO_LONG, contents, messages

BACKENDS: dict[str, Backend] = {"sqlite": sqlite, "postgresql": postgresql}
ATTEMPTS = 3  # per rebind: PostgreSQL may end ours if another transaction locks the same messages in another order
UNKNOWN_SIZE = 2**16  # bytes that a content is taken to have if its sender did not say its size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueueSummary:
    """A scheduled queue, and what is in it."""

    queue: str
    messages: int
    due: int  # how many of its messages are due now
    due_since: float | None  # since when the first of those is due, in seconds since 1970
    oldest: float  # when the oldest of its messages was received, in seconds since 1970
    attempts: int  # the most attempts that one of its messages has had


class DuplicateMessage(Exception):
    """A message with this id already exists."""


class QueueRegistry:
    """The scheduled queues of one database."""

    database: Database

    def bind(self, url: str, busy_timeout: float | str) -> None:
        """Use the database at `url`, and wait at most `busy_timeout` seconds for others. Raises StoreUnusable."""
        self.database = Database(BACKENDS, url, busy_timeout)

    def rebind(self, request: RebindRequest) -> RebindResult:
        """Handle each matched message exactly once, all or none of them, durably: docs/contract.md.

        Raises NoHandler, HandlerFailed, UnknownRebind, NothingToUndo, KeyReused and StoreRefused: nothing was done.
        Raises StoreUnavailable: nothing was done unless the answer to the commit was lost, as its message says.
        """
        if request.dry_run:
            return self._rehearse(request)
        rebind_id, start = str(uuid.uuid4()), time.monotonic()
        logger.info("rebind %s begins: %s", rebind_id, in_a_line(request))
        try:
            result = self._attempt(request, rebind_id)
        except BaseException as error:
            logger.info("rebind %s failed after %.3f s: %s", rebind_id, time.monotonic() - start, type(error).__name__)
            raise
        seconds, done = time.monotonic() - start, result.in_a_line()
        if result.rebind_id != rebind_id:
            done += f" (the answer of {result.rebind_id} again)"
        logger.info("rebind %s ends after %.3f s: %s", rebind_id, seconds, done)
        return result

    def _attempt(self, request: RebindRequest, rebind_id: str) -> RebindResult:
        for _ in range(ATTEMPTS - 1):
            try:
                return self._rebind(request, rebind_id)
            except StoreConflict:
                continue
        return self._rebind(request, rebind_id)

    def _rebind(self, request: RebindRequest, rebind_id: str) -> RebindResult:
        """Do it in one transaction: which messages, what becomes of them, their records, the row of history."""
        backend = self.database.backend
        recorded = None if request.suppress_logging else rebind_id
        with self.database.begin_write() as db:
            backend.take_turn(db)
            if earlier := history.earlier_answer(db, request):
                return earlier
            now, first_key = backend.now(db), backend.last_key(db) + 1
            work = _work(backend, db, request, now)
            matched, moved = _change(backend, db, work, now, recorded)
            left = work.undo.count_left(db) if work.undo else None
            result = RebindResult(matched, moved, _flushed(request, matched, moved), left, rebind_id)
            history.keep(db, request, result, now, (first_key, backend.last_key(db)))
        return result

    def _rehearse(self, request: RebindRequest) -> RebindResult:
        """Plan a rebind."""
        backend = self.database.backend
        with self.database.begin_read() as db:
            work = _work(backend, db, request, backend.now(db))
            pairs = _pairs(backend, db, work)
            left = work.undo.count_left(db) if work.undo else None
        if any(len(to.encode("utf-8", "surrogatepass")) > MAX_NAME for _, to in pairs):
            raise StoreRefused(TOO_LONG)
        plan = Plan.of(pairs)
        return RebindResult(plan.matched, plan.moved, _flushed(request, plan.matched, plan.moved), left, plan=plan)

    def load(self, new: Iterable[NewMessage], skip_existing: bool = False) -> Counter[str]:
        """Add messages, all or none of them, except those for the queue `null`, which are discarded.

        skip_existing: pass over messages whose ids are there already.
        Returns how many were added, how many of those are empty (no content), and how many were discarded or skipped.
        Raises DuplicateMessage, StoreRefused and StoreUnavailable, and ValueError if a recipient has no domain.
        """
        backend = self.database.backend
        numbers: Counter[str] = Counter()
        with self.database.begin_write() as db:
            now = backend.now(db)
            for batch in batches(new, lambda one: len(one.content)):
                missing = [*_missing(db, batch, skip_existing)]
                rows = [row for row in (_row(one, now) for one in missing) if row["queue"] != DISCARDED]
                held = [{"id": row["id"], "data": row.pop("content")} for row in rows]
                if rows:
                    backend.insert(db, messages, rows)
                    backend.insert(db, contents, held)
                numbers["added"] += len(rows)
                numbers["empty"] += sum(not row["size"] for row in rows)
                numbers["discarded"] += len(missing) - len(rows)
                numbers["skipped"] += len(batch) - len(missing)
        return numbers

    def queues(self, criteria: Criteria = EVERYTHING) -> list[QueueSummary]:
        """The queues that match, by name. Raises StoreUnavailable."""
        oldest, attempts = sa.func.min(messages.c.created), sa.func.max(messages.c.num_attempts)
        with self.database.autocommit() as db:
            is_due = claimable(self.database.backend.now(db))
            due, since = sa.func.count().filter(is_due), sa.func.min(messages.c.due).filter(is_due)
            found = sa.select(messages.c.queue, sa.func.count(), due, since, oldest, attempts)
            matching = found.where(_matching(self.database.backend, db, criteria))
            rows = db.execute(matching.group_by(messages.c.queue).order_by(messages.c.queue))
            return [QueueSummary(*row) for row in rows]

    def messages(
        self, criteria: Criteria = EVERYTHING, limit: int | None = None, content: bool = False
    ) -> Iterator[tuple[MessageRow, bytes | None]]:
        """The messages that match, or those due soonest, each with its content if wanted. Raises StoreUnavailable."""
        backend = self.database.backend
        with self.database.begin_read() as db:
            found = Selection(_matching(backend, db, criteria), limit)
            with closing(backend.rows(db, found)) as rows:
                for batch in batches(rows, lambda row: len(row.meta) + (row.size or UNKNOWN_SIZE)):
                    held = backend.contents_of(db, [row.id for row in batch]) if content else {}
                    yield from ((row, held.get(row.id)) for row in batch)


def claimable(now: Any) -> sa.ColumnElement[bool]:
    """Whether a message is due, and no worker holds it."""
    return sa.and_(messages.c.due <= now, messages.c.leased_until <= now)


def queue_names() -> sa.CTE:
    """The queues' names from `:start` on, each found from the one before; NULL is at the end."""
    start = messages.c.queue >= sa.bindparam("start", "")
    names = sa.select(sa.func.min(messages.c.queue).label("queue")).where(start).cte("names", recursive=True)
    following = sa.select(messages.c.queue).where(messages.c.queue > names.c.queue).order_by(messages.c.queue).limit(1)
    return names.union_all(sa.select(following.scalar_subquery()).where(names.c.queue.is_not(None)))


_names = queue_names().c.queue
_every_name = sa.select(_names).where(_names.is_not(None))  # built once: it takes longer than to find no queue


def _matching(backend: Backend, db: sa.Connection, criteria: Criteria) -> sa.ColumnElement[bool]:
    """Whether a message matches."""
    matching: sa.ColumnElement[bool] = sa.true()
    if replace(criteria, id=()) != EVERYTHING:
        names = [name for name in criteria.queue or db.scalars(_every_name) if criteria.match(name)]
        matching = backend.among(messages.c.queue, names) if names else sa.false()
    return matching & backend.among(messages.c.id, criteria.id) if criteria.id else matching


class Work(NamedTuple):
    """What a request asks for, in terms of this database."""

    selection: Selection  # which messages
    change: NewState | Decider  # what becomes of each
    undo: history.Undo | None = None  # if it takes back an earlier rebind


def _work(backend: Backend, db: sa.Connection, request: RebindRequest, now: float) -> Work:
    matching = _matching(backend, db, request.criteria)
    if request.undo is not None:
        undo = history.undo(backend, db, request, now)
        found = Selection(matching & undo.matching, request.limit, of_records=True, at_most=undo.rebind.matched)
        return Work(found, undo.new, undo)
    selection = Selection(matching, request.limit, at_most=len(request.criteria.id) or None)
    if request.trigger_rebind_event:
        return Work(selection, Decider(request))
    new = _new_state(backend, request, now)
    if request.limit is not None and new.renames:
        # So the same request moves the next ones.
        selection = replace(selection, where=matching & (messages.c.queue != new.values["queue"]))
    return Work(selection, new)


def _change(backend: Backend, db: sa.Connection, work: Work, now: float, rebind_id: str | None) -> tuple[int, int]:
    """Do the work. Returns how many messages matched, and how many of them moved."""
    selection = work.selection if work.selection.is_empty else backend.sized(db, work.selection)
    if selection.is_empty:
        return 0, 0
    if not isinstance(work.change, Decider):
        return backend.update_all(db, selection, work.change, rebind_id)
    backend.update_each(db, selection, work.change, now, rebind_id)
    done = Plan.of(work.change.pairs)
    return done.matched, done.moved


def _new_state(backend: Backend, request: RebindRequest, now: float) -> NewState:
    """What a rebind by data makes of each message."""
    queue = new_name(backend.meta_text, request.data, request.unset)
    due = sa.literal(now)
    values: dict[str, Any] = {"queue": queue, "due": due}
    if not request.always_flush:
        values["due"] = sa.case((messages.c.queue != queue, due), else_=messages.c.due)
    if request.data or request.unset:
        values["meta"] = backend.merge(messages.c.meta, request.data, request.unset)
    renames = not {*request.data, *request.unset}.isdisjoint(NAMING_KEYS)
    return NewState(values, renames, due_if_moved=not request.always_flush)


def _pairs(backend: Backend, db: sa.Connection, work: Work) -> Mapping[tuple[str, str], int]:
    """How many messages there would be of each pair of queues, the old and the new one."""
    if work.selection.is_empty:
        return {}
    selection = backend.sized(db, work.selection)
    if isinstance(work.change, Decider):
        with closing(backend.rows(db, selection)) as rows:
            for row in rows:
                work.change(row)
        return work.change.pairs
    to = work.change.values.get("queue", messages.c.queue)
    # OFFSET 0 keeps the planner from evaluating the new name at each place that uses it.
    each = selection.select(messages.c.queue, to.label("to")).offset(sa.literal_column("0")).subquery()
    counts = sa.select(each.c.queue, each.c.to, sa.func.count()).group_by(each.c.queue, each.c.to)
    return {(queue, to): number for queue, to, number in db.execute(counts)}


def _flushed(request: RebindRequest, matched: int, moved: int) -> int:
    """How many messages are due now because of this: an undo gives them back the time at which they were due."""
    if request.always_flush:
        return matched
    return 0 if request.undo is not None else moved


def _row(new: NewMessage, now: float) -> dict[str, Any]:
    """A row of the table of messages, and its content. Each value is as the driver takes it."""
    domain = domain_of(new.recipient) if new.domain is None else new.domain
    return {
        "id": new.id,
        "sender": new.sender,
        "recipient": recipient_text(new.recipient),
        "domain": domain,
        "queue": queue_name(new.meta, domain) if new.queue is None else new.queue,
        "meta": to_json(new.meta),
        "size": len(new.content),
        "created": now if new.created is None else new.created,
        "due": now if new.due is None else new.due,
        "num_attempts": new.num_attempts,
        "content": new.content,
    }


def _missing(db: sa.Connection, batch: list[NewMessage], skip_existing: bool) -> Iterator[NewMessage]:
    """The messages whose ids are not there. Raises DuplicateMessage for another one, unless it may be skipped."""
    there = set(db.scalars(sa.select(messages.c.id).where(messages.c.id.in_([new.id for new in batch]))))
    for new in batch:
        if new.id not in there:
            yield new
        elif not skip_existing:
            raise DuplicateMessage(f"{new.source}: message id {new.id} already exists")
        there.add(new.id)


registry = QueueRegistry()
