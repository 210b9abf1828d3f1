"""The history, one row per rebind: what was asked, by whom, and what came of it. Undo and safe retries follow from it.

docs/contract.md, "History", "Undo" and "Retries". The records of a rebind are in deliverylog.py.
"""

import os
import platform
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, insert, select

from message import Changes, Message, from_json, recipient_of
from moving import Row, of_rebind
from rebinding import RebindRequest, RebindResult
from store import Database
from tables import log, messages, rebinds

# One per host, and the same as long as the host keeps its name.
NODEID = str(uuid.uuid5(uuid.NAMESPACE_DNS, platform.node()))


class UnknownRebind(Exception):
    """The history has no rebind of this id."""


class NothingToUndo(Exception):
    """The rebind wrote no records, or they have been pruned."""


class KeyReused(Exception):
    """The Idempotency-Key was used by a different request."""


# The history


def new_id() -> str:
    """A UUID of version 7 (RFC 9562): ids are in the order of time, and an id tells when its rebind was."""
    stamp, noise = int(time.time() * 1000), int.from_bytes(os.urandom(10), "big")
    bits = stamp << 80 | noise
    return str(uuid.UUID(int=bits & ~(0xF << 76) & ~(0b11 << 62) | 7 << 76 | 0b10 << 62))


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


def rebinds_done(database: Database, since: float | None, limit: int | None) -> list[dict[str, Any]]:
    """The history, newest first: what was asked, by whom, when, and what came of it. docs/contract.md, "History".

    since: in seconds since 1970; None is from the beginning.
    Raises StoreUnavailable.
    """
    newest = select(rebinds).order_by(rebinds.c.event_time.desc(), rebinds.c.rebind_id.desc()).limit(limit)
    with database.autocommit() as db:
        rows = db.execute(newest if since is None else newest.where(rebinds.c.event_time >= since)).mappings().all()
    counts = ("matched", "moved", "flushed")
    return [
        {"time": rfc3339(row["event_time"]), "rebind_id": row["rebind_id"], "actor": row["actor"]}
        | {"reason": row["reason"], "idempotency_key": row["idempotency_key"]}
        | {name: row[name] for name in counts}
        | {"left": row["left_alone"], "request": row["request"]}
        for row in rows
    ]


# Undo


@dataclass(frozen=True)
class Undo:
    """What an undo finds: the messages that are still where the first rebind left them."""

    found: ColumnElement[bool]
    left: int
    """How many messages of the first rebind are not."""
    shared: Changes
    """What the first rebind changed of every message, unless a record says what it changed of its own."""
    keys: tuple[str, ...] | None
    """The keys that it set and removed, the same of every message; None if each record has its own."""


def undoable(db: Connection, rebind_id: str) -> Undo:
    """Look up a rebind in the history. Raises UnknownRebind and NothingToUndo."""
    first = db.execute(select(rebinds).where(rebinds.c.rebind_id == rebind_id)).one_or_none()
    if first is None and _is_pruned(db, rebind_id):
        raise NothingToUndo(f"the rebind {rebind_id} has been pruned")
    if first is None:
        raise UnknownRebind(f"the history has no rebind {rebind_id}")
    of_first, in_place = of_rebind(rebind_id, first.first_key, first.last_key), messages.c.queue == log.c.queue
    each = log.outerjoin(messages, (messages.c.id == log.c.id) & in_place)
    counts = select(func.count(), func.count(messages.c.id)).select_from(each).where(of_first)
    records, there = db.execute(counts).one()
    if not records:
        raise NothingToUndo(f"the rebind {rebind_id} wrote no records, or they have been pruned")
    shared, own = shared_changes(first.request), first.request.keys() & {"trigger_rebind_event", "undo"}
    return Undo(of_first & in_place, records - there, shared, None if own else (*shared["data"], *shared["unset"]))


def _is_pruned(db: Connection, rebind_id: str) -> bool:
    """Whether the id is older than all that the history still has."""
    try:
        made = uuid.UUID(rebind_id)
    except ValueError:
        return False
    oldest = db.scalar(select(func.min(rebinds.c.event_time)))
    return made.version == 7 and (made.int >> 80) / 1000 < (time.time() if oldest is None else oldest)


def restored(message: Message, record: Row, shared: Changes) -> Changes:
    """What gives a message back what a rebind changed of it: the keys, and the envelope if nobody changed that since.

    A worker may have delivered to some of the recipients since; those must not get the message twice.
    record: its RECORD_COLUMNS.
    """
    sender, recipient, meta, own = record
    changed: Changes = from_json(own) if own is not None else shared
    before = from_json(meta)
    keys = [*changed.get("data", {}), *changed.get("unset", [])]
    found = Changes(
        data={key: before[key] for key in keys if key in before}, unset=[key for key in keys if key not in before]
    )
    if "sender" in changed and message.sender == changed["sender"]:
        found["sender"] = sender
    if "recipient" in changed and message.recipient == changed["recipient"]:
        found["recipient"] = recipient_of(recipient)
    return found


def shared_changes(asked: dict[str, Any]) -> Changes:
    """What a rebind changed of every message by what it asked for."""
    return Changes(data=asked["data"], unset=asked["unset"])


def rfc3339(seconds: float) -> str:
    """The time in UTC, as records show it. The tables keep it within the years 1 to 9999."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
