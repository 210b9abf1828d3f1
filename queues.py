"""Scheduled queues: their names, the messages in them, and rebinding, which moves messages from queue to queue.

`registry` is the one instance that the route, the command line and delivery workers use. It knows nothing of HTTP, and
keeps nothing in memory: every process and host that is bound to the same database sees the same queues.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

from blinker import ANY, Signal
from sqlalchemy import (
    ColumnElement,
    Connection,
    Text,
    bindparam,
    case,
    func,
    insert,
    literal,
    select,
    text,
    update,
)

from deliverylog import NODEID, record
from mail import Message, NewMessage, check_json, check_text, domain_of
from store import (
    MAX_NAME,
    Database,
    StoreConflict,
    StoreRefused,
    contents,
    in_queues,
    log,
    matched,
    merge,
    messages,
    meta_text,
    take_turns,
    wait_for_writers,
)

BATCH = 500  # messages or records that are in memory at once
ATTEMPTS = 3  # at a rebind, where another transaction that locks the same messages in another order is in the way


@dataclass(frozen=True)
class QueueName:
    """The parts of a scheduled queue's name; None is a part that is not there.

    SPEC.md, "The name of a message's queue".
    """

    campaign: str | None
    tenant: str | None
    domain: str
    routing_domain: str | None

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a name, whatever made it: every string is one."""
        before, at, after = name.partition("@")
        if not at:
            before, after = "", name
        campaign, colon, tenant = before.partition(":")
        domain, bang, routing_domain = after.partition("!")
        return cls(
            campaign=campaign if colon else None,
            tenant=tenant if colon else before if at else None,
            domain=domain,
            routing_domain=routing_domain if bang else None,
        )

    def __str__(self) -> str:
        name = self.domain
        if self.campaign is not None:
            name = f"{self.campaign}:{self.tenant or ''}@{name}"
        elif self.tenant is not None:
            name = f"{self.tenant}@{name}"
        return name if self.routing_domain is None else f"{name}!{self.routing_domain}"


def queue_name(meta: Mapping[str, Any], domain: str) -> str:
    """The name of the queue of a message with this metadata and recipient's domain.

    A value that is no string counts as not set; an empty string is set. `_new_name` says the same in SQL.
    """

    def part(key: str) -> str | None:
        value = meta.get(key)
        return value if isinstance(value, str) else None

    pinned = part("queue")
    if pinned is not None:
        return pinned
    return str(QueueName(part("campaign"), part("tenant"), domain, part("routing_domain")))


def _new_name(data: Mapping[str, str]) -> ColumnElement[str]:
    """`queue_name` in SQL, of each message with `data` set over its metadata."""

    def part(key: str) -> ColumnElement[str]:
        return literal(data[key], Text) if key in data else meta_text(messages.c.meta, literal(key, Text))

    if "queue" in data:
        return part("queue")
    campaign, tenant, routing_domain = part("campaign"), part("tenant"), part("routing_domain")
    # What is joined to a NULL is NULL: the first of these that is not names those who send.
    before = func.coalesce(campaign + ":" + func.coalesce(tenant, "") + "@", tenant + "@", "")
    built = before + messages.c.domain + func.coalesce("!" + routing_domain, "")
    return func.coalesce(part("queue"), built, type_=Text)


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
        if request.trigger_rebind_event and not rebind.handlers():
            raise NoHandler("no handler is connected to the rebind event")
        for _ in range(ATTEMPTS - 1):
            with suppress(StoreConflict):
                return self._rebind(request, actor, dry_run, limit)
        return self._rebind(request, actor, dry_run, limit)

    def _rebind(self, request: RebindRequest, actor: str, dry_run: bool, limit: int | None) -> RebindResult:
        """One transaction, which does it or does nothing."""
        rebind_id, count, moved = str(uuid.uuid4()), 0, 0
        with self.database.read() if dry_run else self.database.write() as db:
            if not dry_run:
                take_turns(db)
            now = time.time()
            names = [name for name in queue_names(db) if request.matches(QueueName.parse(name))]
            if names:
                matched.create(db)
                count = _match(db, names, request, limit, lock=not dry_run)
                if request.trigger_rebind_event:
                    moved = _call_handlers(db, request, now, dry_run)
                else:
                    moved = _set_data(db, request, now, dry_run)
                if not (dry_run or request.suppress_logging):
                    _log_rebind(db, request, now, rebind_id, actor)
                matched.drop(db)
        return RebindResult(rebind_id, count, moved, count if request.always_flush else moved)

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
        with self.database.read() as db:
            return [QueueSummary(*row) for row in db.execute(statement)]

    def records(self, after: int = 0, poll: float | None = None) -> Iterator[dict[str, Any]]:
        """The delivery log's records, oldest first, but for the first `after`. SPEC.md, "Records".

        poll: do not end, but look for new ones every so many seconds.
        Raises StoreUnavailable.
        """
        key, skip = 0, after
        while True:
            statement = select(log).where(log.c.key > key).order_by(log.c.key).offset(skip).limit(BATCH)
            with self.database.read() as db:
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


def queue_names(db: Connection, due: float | None = None) -> list[str]:
    """The name of every queue or, with `due` in seconds since 1970, of those with a message that is due then.

    What it costs grows with the number of queues, not of messages (a loose index scan).
    """
    first = select(func.min(messages.c.queue).label("queue")).cte("names", recursive=True)
    following = select(func.min(messages.c.queue)).where(messages.c.queue > first.c.queue).scalar_subquery()
    names = first.union_all(select(following).where(first.c.queue.is_not(None)))
    statement = select(names.c.queue).where(names.c.queue.is_not(None))
    if due is not None:
        is_due = select(messages.c.key).where(messages.c.queue == names.c.queue, messages.c.due <= due)
        statement = statement.where(is_due.exists())
    return list(db.scalars(statement))


def _match(db: Connection, names: list[str], request: RebindRequest, limit: int | None, lock: bool) -> int:
    """Decide once which messages are handled, and lock them; with the name that `data` gives each. Returns how many."""
    new_name = messages.c.queue if request.trigger_rebind_event else _new_name(request.data)
    found = select(messages.c.key, messages.c.queue, new_name.label("new_queue")).where(in_queues(db, names))
    if limit is None:
        # In the order of keys, but not by their index: that would read every message to find those of a few queues.
        found = found.order_by(messages.c.key + 0)
    else:
        found = found.order_by(messages.c.due, messages.c.key).limit(limit)
    if lock:
        found = found.with_for_update(key_share=True, of=messages)
    db.execute(insert(matched).from_select(["key", "queue", "new_queue"], found))
    db.execute(text("ANALYZE matched"))  # or the planner, which knows nothing of it, may start from all the messages
    return db.scalar(select(func.count()).select_from(matched)) or 0


def _set_data(db: Connection, request: RebindRequest, now: float, dry_run: bool) -> int:
    """Set `data` over each matched message's metadata, and name its queue anew. Returns how many moved."""
    changed = matched.c.queue != matched.c.new_queue
    if not dry_run:
        due = literal(now) if request.always_flush else case((changed, now), else_=messages.c.due)
        meta = merge(messages.c.meta, literal(request.data, messages.c.meta.type))
        change = update(messages).values(meta=meta, queue=matched.c.new_queue, due=due)
        db.execute(change.where(messages.c.key == matched.c.key))
    return db.scalar(select(func.count()).select_from(matched).where(changed)) or 0


def _call_handlers(db: Connection, request: RebindRequest, now: float, dry_run: bool) -> int:
    """Let the event's handlers decide what becomes of each matched message. Returns how many moved."""
    moved = 0
    statement = select(messages).join(matched, messages.c.key == matched.c.key).order_by(matched.c.key)
    fields = ("sender", "recipient", "domain", "meta", "queue", "due")
    change = update(messages).where(messages.c.key == bindparam("_key")).values({f: bindparam("_" + f) for f in fields})
    for rows in db.execute(statement, execution_options={"yield_per": BATCH}).partitions():
        changes = []
        for row in rows:
            message, domain = _decided(row, request.data)
            queue = queue_name(message.meta, domain)
            if len(queue.encode()) > MAX_NAME:  # the table refuses it too, but not in a dry run
                raise StoreRefused(f"the name of a queue is longer than {MAX_NAME} bytes")
            moved += queue != row.queue
            due = now if request.always_flush or queue != row.queue else row.due
            values = (message.sender, message.recipient, domain, message.meta, queue, due)
            changes.append({"_key": row.key} | {"_" + f: value for f, value in zip(fields, values, strict=True)})
        if not dry_run:
            db.execute(change, changes)
    return moved


def _decided(row: Any, data: Mapping[str, str]) -> tuple[Message, str]:
    """The message of `row` after each handler, and its domain. Raises HandlerFailed."""
    message = Message(**{name: getattr(row, name) for name in Message.__slots__})
    domain = row.domain
    for handler in rebind.handlers():
        try:
            handler(message, data=dict(data))
            check_text(message.sender)
            check_json(message.meta)
            if not isinstance(message.meta, dict):
                raise TypeError("meta must be a dict")
            domain = domain_of(message.recipient)
        except (Exception, SystemExit) as error:
            raise HandlerFailed(
                f"the handler {_name_of(handler)} failed for message {row.id}: {type(error).__name__}: {error}"
            ) from error
    return message, domain


def _name_of(handler: Callable[..., object]) -> str:
    # Not every callable has a name: a functools.partial has none.
    return f"{handler.__module__}.{handler.__qualname__}" if hasattr(handler, "__qualname__") else repr(handler)


def _log_rebind(db: Connection, request: RebindRequest, now: float, rebind_id: str, actor: str) -> None:
    """Write an AdminRebind record of each matched message, as it is now."""
    of_message = {c.name: messages.c[c.name] for c in log.c if c.name in messages.c and c.name != "key"}
    of_rebind = {"type": "AdminRebind", "event_time": now, "nodeid": NODEID}
    of_rebind |= {"rebind_id": rebind_id, "reason": request.reason, "actor": actor}
    columns = of_message | {"old_queue": matched.c.queue} | {k: literal(v, log.c[k].type) for k, v in of_rebind.items()}
    records = select(*columns.values()).join_from(matched, messages, messages.c.key == matched.c.key)
    db.execute(insert(log).from_select(list(columns), records.order_by(matched.c.key)))


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
