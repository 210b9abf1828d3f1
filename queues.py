"""Scheduled queues: the messages in them, and rebinding, which moves messages from queue to queue.

`registry` is the one instance that the route, the command line and delivery workers use. It knows nothing of HTTP, and
keeps nothing in memory: every process and host that is bound to the same database sees the same queues.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from blinker import ANY, Signal
from sqlalchemy import CTE, ColumnElement, Connection, Text, bindparam, case, func, insert, literal, select, type_coerce

from bulk import BATCH, Change, Matching, Values, change, change_each, count, each_message, matching
from deliverylog import NODEID, record
from mail import Message, NewMessage, check_text, domain_of, meta_json
from names import QueueName, named_by_parts, new_name, queue_name
from sqlfunctions import following, json_list, merge, position
from store import (
    MAX_NAME,
    TOO_LONG,
    Database,
    StoreConflict,
    StoreRefused,
    contents,
    expect_many,
    log,
    messages,
    recipient_of,
    recipient_text,
    take_turns,
    wait_for_writers,
)

ATTEMPTS = 3  # at a rebind, where another transaction that locks the same messages in another order is in the way


@dataclass(frozen=True)
class RebindRequest:
    """Which messages to rebind, and how: the body of the request. SPEC.md, "POST /api/admin/rebind/v1"."""

    reason: str
    """Logged with every matched message."""
    data: dict[str, str]
    """The metadata to set, or what the event's handlers get."""
    campaign: str | None = None
    """A criterion: None matches any campaign. So with the next three."""
    tenant: str | None = None
    domain: str | None = None
    """Compared without regard to case, as domain names are; so is `routing_domain`."""
    routing_domain: str | None = None
    trigger_rebind_event: bool = False
    """Call the `rebind` event with each message and `data`, instead of setting `data`."""
    always_flush: bool = False
    """Make every matched message due now, not only those whose queue changed."""
    suppress_logging: bool = False
    """Write no AdminRebind records."""

    @property
    def matches_all(self) -> bool:
        """Whether there is no criterion."""
        return self.campaign is self.tenant is self.domain is self.routing_domain is None

    def matches(self, name: QueueName) -> bool:
        """Whether each criterion that is given equals that part of the queue's name."""
        return (
            self.campaign in (None, name.campaign)
            and self.tenant in (None, name.tenant)
            and _is_domain(self.domain, name.domain)
            and _is_domain(self.routing_domain, name.routing_domain)
        )


def _is_domain(criterion: str | None, part: str | None) -> bool:
    return criterion is None or (part is not None and criterion.lower() == part.lower())


@dataclass(frozen=True)
class RebindResult:
    """What a rebind did, or with a dry run would have done."""

    rebind_id: str
    """A UUID, on every record that it wrote."""
    matched: int
    """How many messages were handled."""
    moved: int
    """How many of them are in another queue now."""
    flushed: int
    """How many of them were made due now."""


@dataclass(frozen=True)
class QueueSummary:
    """A scheduled queue, and what is in it."""

    queue: str
    messages: int
    due: int
    """How many of its messages are due now."""


class NoHandler(Exception):
    """The `rebind` event was asked for, and no handler is connected."""


class HandlerFailed(Exception):
    """A handler of the `rebind` event raised, or left a message that cannot be kept."""


class DuplicateMessage(Exception):
    """A message with this id is there already."""


class _Ordered(dict[Any, None]):
    """A set that keeps the order in which its members came, as blinker's `set_class` wants one."""

    def add(self, member: Any) -> None:
        self.setdefault(member)

    def discard(self, member: Any) -> None:
        self.pop(member, None)


class RebindEvent(Signal):
    """The `rebind` event: `@rebind.connect` a function of a message and `data`.

    Handlers are called in the order in which they were connected. They are held weakly, as blinker does it: connect a
    function that nothing else holds with `weak=False`.
    """

    set_class = _Ordered  # type: ignore[assignment]

    def handlers(self) -> list[Callable[..., object]]:
        """The connected handlers, in that order."""
        return list(self.receivers_for(ANY))


rebind = RebindEvent()


class QueueRegistry:
    """The scheduled queues of one database."""

    database: Database

    def bind(self, url: str, busy_timeout: float) -> None:
        """Use the database at `url`, and wait at most `busy_timeout` seconds for others who use it.

        Its tables are created where they are missing; where it is out of reach, when it is first used instead.
        Raises StoreUnusable.
        """
        self.database = Database(url, busy_timeout)

    def prepare(self) -> None:
        """Create the tables where they are missing. Raises StoreUnavailable and StoreUnusable."""
        self.database.prepare()

    def rebind(
        self, request: RebindRequest, *, actor: str, dry_run: bool = False, limit: int | None = None
    ) -> RebindResult:
        """Handle each matched message exactly once, all or none of them, durably. SPEC.md, "What one request does".

        actor: who asked, for the records.
        dry_run: say what would be done, and do nothing; the event's handlers are called.
        limit: handle at most so many, those due soonest.
        Raises NoHandler, HandlerFailed, StoreRefused and StoreUnavailable; then nothing was done.
        """
        if request.trigger_rebind_event:
            _handlers()
        for _ in range(ATTEMPTS - 1):
            with suppress(StoreConflict):
                return self._rebind(request, actor, dry_run, limit)
        return self._rebind(request, actor, dry_run, limit)

    def _rebind(self, request: RebindRequest, actor: str, dry_run: bool, limit: int | None) -> RebindResult:
        """Do all or nothing. Where nothing matches, and for a dry run, nobody need be waited for: look at that first.

        When it is this one's turn what matches is looked up again, as others may have moved it meanwhile.
        """
        rebind_id, matched, moved = str(uuid.uuid4()), 0, 0
        with self.database.look() as db:
            names = matching_queues(db, request)
        if names and dry_run:
            with self.database.read() as db:
                matched, moved = _rehearse(db, request, _found(db, request, limit))
        elif names:
            with self.database.write() as db:
                take_turns(db)
                expect_many(db)
                matched, moved = _change(db, request, _found(db, request, limit), rebind_id, actor)
        return RebindResult(rebind_id, matched, moved, matched if request.always_flush else moved)

    def load(self, new: Iterable[NewMessage]) -> tuple[int, int]:
        """Add messages, all or none of them. Returns how many were added and how many, for queue `null`, discarded.

        Raises DuplicateMessage and StoreUnavailable, and ValueError where a recipient has no domain.
        """
        loaded = discarded = 0
        stream = iter(new)
        with self.database.write() as db:
            while batch := list(islice(stream, BATCH)):
                rows = [row for row in map(_row, batch) if row["queue"] != "null"]
                _refuse_duplicates(db, batch)
                if rows:
                    db.execute(insert(messages), rows)
                    db.execute(insert(contents), [{"id": row["id"], "data": row["content"]} for row in rows])
                loaded += len(rows)
                discarded += len(batch) - len(rows)
        return loaded, discarded

    def queues(self) -> list[QueueSummary]:
        """The queues, by name. Raises StoreUnavailable."""
        due = func.count().filter(messages.c.due <= time.time())
        statement = select(messages.c.queue, func.count(), due).group_by(messages.c.queue).order_by(messages.c.queue)
        with self.database.look() as db:
            return [QueueSummary(*row) for row in db.execute(statement)]

    def records(self, after: int = 0, poll: float | None = None) -> Iterator[dict[str, Any]]:
        """The delivery log's records, oldest first, but for the first `after`. SPEC.md, "Records".

        poll: do not end, but look for new ones every so many seconds.
        Raises StoreUnavailable.
        """
        key, skip = 0, after
        while True:
            statement = select(log).where(log.c.key > key).order_by(log.c.key).offset(skip).limit(BATCH)
            with self.database.look() as db:
                rows = db.execute(statement).all()
                if rows and rows[-1].key > key + skip + len(rows):
                    # A record that is missing may be of a transaction that goes on while later ones have ended.
                    wait_for_writers(db)
                    rows = db.execute(statement.where(log.c.key <= rows[-1].key)).all()
            yield from map(record, rows)
            if rows:
                key, skip = rows[-1].key, 0
            elif poll is None:
                return
            else:
                time.sleep(poll)


def _loose_index_scan() -> CTE:
    """The queues' names, each found from the one before: the last is NULL.

    Where a name cannot match by what is before its `@`, so cannot others with the same before it: they are passed over.
    It can where it has `@campaign:` and `:tenant@`, which are parameters; each is empty for any.
    """
    first = select(func.min(messages.c.queue).label("queue")).cte("names", recursive=True)
    name = first.c.queue
    before = func.substr(name, 1, position(name, "@"))
    has_campaign = position("@" + name, bindparam("campaign", "")) > 0
    has_tenant = position(":" + name, bindparam("tenant", "")) > 0
    # In SQLite a sender may write what is no UTF-8, which substr ends elsewhere, or a blob, which sorts after any text:
    # then none is passed over, or the next name is one that has been there, which ends a UNION.
    passed_over = ~(has_campaign & has_tenant) & (position(before, "@") > 0)
    start = case((passed_over, func.replace(before, "@", "A")), else_=following(name))  # A is what follows @
    next_name = select(messages.c.queue).where(messages.c.queue >= start).order_by(messages.c.queue).limit(1)
    return first.union(select(next_name.scalar_subquery()).where(name.is_not(None)))


_names = _loose_index_scan()
_queue_names = select(json_list(_names.c.queue)).where(_names.c.queue.is_not(None))  # built once, which takes longest


def queue_names(db: Connection, due: float) -> list[str]:
    """The name of every queue with a message that is due then, in seconds since 1970.

    What it costs grows with the number of queues, not of messages.
    """
    is_due = select(messages.c.key).where(messages.c.queue == _names.c.queue, messages.c.due <= due)
    names: list[str] = db.scalars(_queue_names.where(is_due.exists())).one()
    return names


def matching_queues(db: Connection, request: RebindRequest) -> list[str]:
    """The names of the queues that match. What it costs grows with the number of queues, not of messages."""
    # A name begins `campaign:tenant@`, where there are both.
    parts = {"campaign": "" if request.campaign is None else f"@{request.campaign}:"}
    parts["tenant"] = "" if request.tenant is None else f":{request.tenant}@"
    names = db.scalars(_queue_names, parts).one()
    return [name for name in names if request.matches(QueueName.parse(name))]


def _found(db: Connection, request: RebindRequest, limit: int | None) -> Matching:
    """The messages that match; where there is no criterion they are not compared with the queues' names."""
    return matching(db, None if request.matches_all else matching_queues(db, request), limit)


def _rehearse(db: Connection, request: RebindRequest, found: Matching) -> tuple[int, int]:
    """How many messages would be handled, and how many would move."""
    if not request.trigger_rebind_event:
        return count(db, found, new_name(request.data))
    event = _Event(request, time.time())
    for message in each_message(db, found, _Event.columns):
        event.decide(message)
    return event.matched, event.moved


def _change(db: Connection, request: RebindRequest, found: Matching, rebind_id: str, actor: str) -> tuple[int, int]:
    """Handle the messages, and write an AdminRebind record of each. Returns how many there were, and how many moved."""
    now, of_rebind = time.time(), None
    if not request.suppress_logging:
        of_rebind = {"type": "AdminRebind", "event_time": now, "nodeid": NODEID}
        of_rebind |= {"rebind_id": rebind_id, "reason": request.reason, "actor": actor}
    if not request.trigger_rebind_event:
        return _set_data(db, request, found, now, of_rebind)
    event = _Event(request, now)
    change_each(db, found, _Event.columns, event.decide, of_rebind)
    return event.matched, event.moved


def _set_data(
    db: Connection, request: RebindRequest, found: Matching, now: float, of_rebind: Values | None
) -> tuple[int, int]:
    """Set `data` over each message's metadata, and name its queue anew. Returns how many there were, and moved."""

    def values(new_queue: ColumnElement[str] | None) -> Values:
        changes: dict[str, Any] = {}
        if new_queue is not None:
            changes = {"queue": new_queue, "due": case((messages.c.queue != new_queue, now), else_=messages.c.due)}
        if request.always_flush:
            changes["due"] = literal(now)
        if request.data:
            changes["meta"] = merge(messages.c.meta, literal(request.data, messages.c.meta.type))
        return changes

    return change(db, found, new_name(request.data), values, of_rebind, named_by_parts(request.data))


class _Event:
    """One time that the event is triggered: what its handlers make of each message, and how many there were."""

    # The recipient as it is kept: what a row that comes by the driver alone has.
    columns = [messages.c.sender, type_coerce(messages.c.recipient, Text)]
    columns += [messages.c[name] for name in (*Message.__slots__[2:], "key")]

    def __init__(self, request: RebindRequest, now: float) -> None:
        self.matched = self.moved = 0
        self._request, self._now, self._handlers = request, now, _handlers()

    def decide(self, row: Sequence[Any]) -> Change:
        """Call the handlers with the message in `row`. Raises HandlerFailed and StoreRefused."""
        sender, recipient, *fields, key = row
        message = Message(sender, recipient_of(recipient), *fields)
        old_queue, due = message.queue, message.due
        domain, meta = _decide(message, self._handlers, self._request.data)
        queue = queue_name(message.meta, domain)
        if len(queue.encode()) > MAX_NAME:  # the table refuses it too, but not in a dry run
            raise StoreRefused(TOO_LONG)
        self.matched += 1
        self.moved += queue != old_queue
        if self._request.always_flush or queue != old_queue:
            due = self._now
        to = recipient_text(message.recipient)
        return Change(message.sender, to, domain, meta, queue, due, key, old_queue)


def _handlers() -> list[Callable[..., object]]:
    """The event's handlers, which stay as long as the list does. Raises NoHandler."""
    if handlers := rebind.handlers():
        return handlers
    raise NoHandler("no handler is connected to the rebind event")


def _decide(message: Message, handlers: Sequence[Callable[..., object]], data: Mapping[str, str]) -> tuple[str, str]:
    """Let the handlers change the message. Gives its recipient's domain and its metadata as JSON.

    Raises HandlerFailed.
    """
    id, domain, meta = message.id, "", ""
    for handler in handlers:
        try:
            handler(message, data=dict(data))
            check_text(message.sender)
            meta = meta_json(message.meta)
            domain = domain_of(message.recipient)
        except (Exception, SystemExit) as error:
            raise HandlerFailed(
                f"the handler {_name_of(handler)} failed for message {id}: {type(error).__name__}: {error}"
            ) from error
    return domain, meta


def _name_of(handler: Callable[..., object]) -> str:
    # Not every callable has a name: a functools.partial has none.
    return f"{handler.__module__}.{handler.__qualname__}" if hasattr(handler, "__qualname__") else repr(handler)


def _row(new: NewMessage) -> dict[str, Any]:
    now, domain = time.time(), domain_of(new.recipient)
    return {
        "id": new.id,
        "sender": new.sender,
        "recipient": new.recipient,
        "domain": domain,
        "queue": queue_name(new.meta, domain),
        "meta": new.meta,
        "size": len(new.content),
        "created": now,
        "due": now if new.due is None else new.due,
        "num_attempts": new.num_attempts,
        "content": new.content,
    }


def _refuse_duplicates(db: Connection, batch: list[NewMessage]) -> None:
    there = set(db.scalars(select(messages.c.id).where(messages.c.id.in_([new.id for new in batch]))))
    for new in batch:
        if new.id in there:
            raise DuplicateMessage(f"{new.source}: the message id {new.id} is there already")
        there.add(new.id)


registry = QueueRegistry()
