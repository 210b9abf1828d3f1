"""The history, one row per rebind, and the delivery log, whose records are shown in the shape of KumoMTA's.

docs/contract.md, "Records" and "History". A record keeps what its message was before the rebind. What the message
became follows from that and what the rebind changed, and is computed when the record is read.
"""

import platform
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Text, cast, func, insert, select, type_coerce

from message import Changes, Message, changed_meta, from_json, recipient_of, to_json
from moving import FIRST_ROWS, Plan, Row, Selection, in_place, of_rebind, rows_to_read
from names import ALL_QUEUES, Criteria
from store import LAST_SECOND, Database, log, messages, rebinds

# One per host, and the same as long as the host keeps its name.
NODEID = str(uuid.uuid5(uuid.NAMESPACE_DNS, platform.node()))

MAX_SHOWN = 200  # characters of a value in the diagnostic log
MAX_ATTEMPTS = 65535  # that a reader of KumoMTA's records takes


@dataclass(frozen=True)
class RebindRequest:
    """What is asked for: which messages to rebind, and how. docs/contract.md, "The request" and "Beyond the page"."""

    reason: str
    """Logged with every matched message."""
    data: dict[str, str]
    """The metadata to set, or what the event's handlers get."""
    criteria: Criteria = ALL_QUEUES
    """Which queues."""
    trigger_rebind_event: bool = False
    """Call the `rebind` event with each message and `data`, instead of setting `data`."""
    always_flush: bool = False
    """Make every matched message due now, not only those whose queue changed."""
    suppress_logging: bool = False
    """Write no AdminRebind records."""
    dry_run: bool = False
    """Only plan: change, record and keep nothing; the event's handlers are called."""
    limit: int | None = None
    """Handle at most this many messages, soonest due first."""
    unset: tuple[str, ...] = ()
    """Keys to remove from the metadata."""
    undo: str | None = None
    """The id of a rebind to take back."""
    idempotency_key: str | None = None
    """A request with the same key is answered once, and repeated answers are the same."""
    actor: str = ""
    """Who asks: a user's name, or an address."""

    def asked(self) -> dict[str, Any]:
        """All that was asked, as the history keeps it; what was left out is missing."""
        fields = asdict(self)
        criteria = fields.pop("criteria")
        for name in ("actor", "idempotency_key", "dry_run"):
            del fields[name]
        return {name: value for name, value in (fields | criteria).items() if value not in (None, False, ())} | {
            "unset": sorted(self.unset)
        }


@dataclass(frozen=True)
class RebindResult:
    """What a rebind did, or with a dry run would do."""

    matched: int
    """How many messages were handled."""
    moved: int
    """How many of them are in another queue now."""
    flushed: int
    """How many of them were made due now."""
    left: int | None = None
    """Of an undo: how many messages of the first rebind have moved on or are gone, and are left alone."""
    rebind_id: str | None = None
    """A UUID, on every record and in the history; None for a dry run."""
    plan: Plan | None = None
    """Of a dry run: from which queue to which queue how many would go."""

    def in_a_line(self) -> str:
        """For the diagnostic log."""
        left = "" if self.left is None else f", {self.left} left alone"
        return f"{self.matched} matched, {self.moved} moved, {self.flushed} flushed{left}"


class UnknownRebind(Exception):
    """The history has no rebind of this id."""


class NothingToUndo(Exception):
    """The rebind wrote no records, or they have been pruned."""


class KeyReused(Exception):
    """The Idempotency-Key was used by a different request."""


def in_a_line(request: RebindRequest) -> str:
    """Who asks, and for what, for the diagnostic log: long values are cut, and nothing can break the line."""
    values = {"actor": request.actor, **request.asked(), "idempotency_key": request.idempotency_key}
    return " ".join(f"{name}={_short(value)}" for name, value in values.items() if value not in (None, []))


def _short(value: Any) -> str:
    text = printable(to_json(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def printable(text: str) -> str:
    """The text with line breaks and terminal control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# The history


def answered(db: Connection, request: RebindRequest) -> RebindResult | None:
    """The answer that the same request with the same Idempotency-Key got, if there was one. Raises KeyReused."""
    if request.idempotency_key is None:
        return None
    of_key = select(rebinds).where(rebinds.c.idempotency_key == request.idempotency_key)
    done = db.execute(of_key).one_or_none()
    if done is None:
        return None
    if (done.actor, done.request) != (request.actor, request.asked()):
        raise KeyReused("the Idempotency-Key was used by a different request")
    return RebindResult(done.matched, done.moved, done.flushed, done.left_alone, done.rebind_id)


def keep(db: Connection, request: RebindRequest, result: RebindResult, now: float, keys: tuple[int, int]) -> None:
    """Write the row of history.

    now: the time of all records, in seconds since 1970.
    keys: the first and last that its records may have in the log.
    """
    db.execute(
        insert(rebinds).values(
            rebind_id=result.rebind_id,
            event_time=now,
            actor=request.actor,
            nodeid=NODEID,
            reason=request.reason,
            request=request.asked(),
            idempotency_key=request.idempotency_key,
            matched=result.matched,
            moved=result.moved,
            flushed=result.flushed,
            left_alone=result.left,
            first_key=keys[0],
            last_key=keys[1],
        )
    )


# Undo


@dataclass(frozen=True)
class Undo:
    """What an undo finds: the messages that are still where the first rebind left them."""

    found: Selection
    left: int
    """How many messages of the first rebind are not."""
    shared: Changes
    """What the first rebind changed of every message, unless a record says what it changed of its own."""


def undoable(db: Connection, rebind_id: str) -> Undo:
    """Look up a rebind in the history. Raises UnknownRebind and NothingToUndo."""
    first = db.execute(select(rebinds).where(rebinds.c.rebind_id == rebind_id)).one_or_none()
    if first is None:
        raise UnknownRebind(f"the history has no rebind {rebind_id}")
    ends = (rebind_id, first.first_key, first.last_key)
    still_there = select(messages.c.id).where(messages.c.id == log.c.id, messages.c.queue == log.c.queue).exists()
    counts = select(func.count(), func.count().filter(still_there)).select_from(log).where(of_rebind(*ends))
    records, there = db.execute(counts).one()
    if not records:
        raise NothingToUndo(f"the rebind {rebind_id} wrote no records, or they have been pruned")
    return Undo(Selection(in_place(*ends), of_records=True), records - there, _shared(first.request))


def restore(message: Message, record: Row, shared: Changes) -> None:
    """Give a message back what a rebind changed of it: the keys, and the envelope if it is still as the rebind left it.

    A worker may have delivered to some of the recipients since; those must not get the message twice.
    record: its RECORD_COLUMNS.
    """
    sender, recipient, meta, own = record
    changed: Changes = from_json(own) if own is not None else shared
    before = from_json(meta)
    for key in (*changed.get("data", {}), *changed.get("unset", [])):
        if key in before:
            message.meta[key] = before[key]
        else:
            message.meta.pop(key, None)
    if "sender" in changed and message.sender == changed["sender"]:
        message.sender = sender
    if "recipient" in changed and message.recipient == changed["recipient"]:
        message.recipient = recipient_of(recipient)


def _shared(asked: dict[str, Any]) -> Changes:
    """What a rebind changed of every message by what it asked for."""
    return Changes(data=asked["data"], unset=asked["unset"])


# The log


_COLUMNS: list[ColumnElement[Any]] = [
    type_coerce(log.c.recipient, Text).label("recipient"),
    cast(log.c.meta, Text).label("meta"),
]
_COLUMNS += [cast(log.c[name], Text).label(name) for name in ("changes", "details")]
_COLUMNS += [column for column in log.c if column.name not in ("recipient", "meta", "changes", "details")]


def records(database: Database, after: int = 0, poll: float | None = None) -> Iterator[dict[str, Any]]:
    """The delivery log's records with keys greater than `after`, oldest first. docs/contract.md, "Records".

    poll: do not end, but look for new ones every so many seconds; each comes once, whatever order transactions
        commit in.
    Raises StoreUnavailable.
    """
    size = FIRST_ROWS
    while True:
        with database.autocommit() as db:
            rows = _page(database, db, after, size, follow=poll is not None)
            ids = {row["rebind_id"] for row in rows}
            of_rebinds = db.execute(select(rebinds).where(rebinds.c.rebind_id.in_(ids))).mappings()
            known = {row["rebind_id"]: row for row in of_rebinds}
        for row in rows:
            yield _record(row, known.get(row["rebind_id"]))
        if rows:
            after, size = rows[-1]["key"], rows_to_read(size, sum(len(row["meta"]) for row in rows))
        elif poll is None:
            return
        else:
            time.sleep(poll)


def _page(database: Database, db: Connection, after: int, size: int, follow: bool) -> list[RowMapping]:
    """The next records, at most `size`. With `follow`, none with a smaller key can come later than these."""
    page = select(*_COLUMNS).where(log.c.key > after).order_by(log.c.key).limit(size)
    rows = list(db.execute(page).mappings())
    if not (follow and rows):
        return rows
    writers = database.engine.writers_of_log(db)
    while writers & database.engine.writers_of_log(db):
        time.sleep(0.02)
    # Whoever took a smaller key than the last one has ended by now.
    return list(db.execute(page.where(log.c.key <= rows[-1]["key"])).mappings())


def _record(row: RowMapping, rebind: RowMapping | None) -> dict[str, Any]:
    """A row of the log as a record. A document that Python cannot read is shown as the text that it is."""
    changed = _changed(row["changes"], rebind)
    recipient, meta = changed.get("recipient", row["recipient"]), _document(row["meta"])
    if isinstance(meta, dict):
        meta = changed_meta(meta, changed)
    event_time = row["event_time"] if rebind is None else rebind["event_time"]
    reception = meta.get("reception_protocol") if isinstance(meta, dict) else None
    content = f"Rebound from {row['old_queue']} to {row['queue']}: {rebind['reason'] if rebind else ''}"
    return {
        "key": row["key"],
        "type": row["type"],
        "id": row["id"],
        "sender": changed.get("sender", row["sender"]),
        "recipient": _recipient(recipient) if isinstance(recipient, str) else recipient,
        "queue": row["queue"],
        "site": "",
        "size": row["size"],
        "response": response(250, content),
        "peer_address": None,
        "timestamp": int(event_time or 0),
        "created": int(row["created"]),
        "event_time": _rfc3339(event_time or 0),
        "created_time": _rfc3339(row["created"]),
        "num_attempts": min(row["num_attempts"], MAX_ATTEMPTS),
        "bounce_classification": "Uncategorized",
        "egress_pool": None,
        "egress_source": None,
        "source_address": None,
        "feedback_report": None,
        "delivery_protocol": None,
        "reception_protocol": reception if isinstance(reception, str) else None,
        "meta": meta,
        "headers": {},
        "nodeid": row["nodeid"] if rebind is None else rebind["nodeid"],
        "rebind_id": row["rebind_id"],
        "old_queue": row["old_queue"],
        "actor": rebind["actor"] if rebind else None,
    } | _details(row["details"])


def _changed(own: str | None, rebind: RowMapping | None) -> Changes:
    """What the record's rebind changed of its message."""
    if own is None:
        return _shared(rebind["request"]) if rebind else Changes()
    changed = _document(own)
    return changed if isinstance(changed, dict) else Changes()  # type: ignore[return-value]


def _document(text: str | None) -> Any:
    try:
        return None if text is None else from_json(text)
    except (ValueError, RecursionError):
        return text


def _details(text: str | None) -> dict[str, Any]:
    details = _document(text)
    return details if isinstance(details, dict) else {}


def _recipient(text: str) -> Any:
    return _document(text) if text.startswith("[") else text


def response(code: int, content: str, command: str | None = None) -> dict[str, Any]:
    """A peer's answer, or ours. An enhanced status code (RFC 3463) at the start of the text is a field of its own."""
    enhanced = re.match(r"([245])\.(\d{1,3})\.(\d{1,3}) ", content)
    if not enhanced:
        return {"code": code, "enhanced_code": None, "content": content, "command": command}
    numbers = dict(zip(("class", "subject", "detail"), map(int, enhanced.groups()), strict=True))
    return {"code": code, "enhanced_code": numbers, "content": content[enhanced.end() :], "command": command}


def _rfc3339(seconds: float) -> str:
    # A sender's error must not break the log; RFC 3339 ends with the year 9999.
    seconds = min(max(seconds, 0), LAST_SECOND)
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
