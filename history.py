"""The history, a row per rebind: written, listed, answered again, taken back. docs/contract.md, "History", "Undo"."""

import platform
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from moving import Backend, NewState, of_rebind
from rebinding import RebindRequest, RebindResult
from store import Database
from tables import log, messages, rebinds

# One per host, and the same as long as the host keeps its name.
NODEID = str(uuid.uuid5(uuid.NAMESPACE_DNS, platform.node()))
_EPOCH = datetime(1970, 1, 1)  # in UTC, but without a zone: so a time is written in a quarter of the time


class UnknownRebind(Exception):
    """The history has no rebind of this id."""


class NothingToUndo(Exception):
    """The records of the rebind are not all there."""


class KeyReused(Exception):
    """The Idempotency-Key was used by a different request."""


def earlier_answer(db: sa.Connection, request: RebindRequest) -> RebindResult | None:
    """The answer that the same request with the same Idempotency-Key got, whoever asked. Raises KeyReused."""
    if request.idempotency_key is None:
        return None
    done = db.execute(sa.select(rebinds).where(rebinds.c.idempotency_key == request.idempotency_key)).one_or_none()
    if done is None:
        return None
    if done.request != request.asked():
        raise KeyReused("the Idempotency-Key was used by a different request")
    return RebindResult(done.matched, done.moved, done.flushed, done.left_alone, done.rebind_id)


def keep(db: sa.Connection, request: RebindRequest, result: RebindResult, now: float, keys: tuple[int, int]) -> None:
    """Write the row of history. now: the time of all records. keys: the first and last that they may have."""
    asked = {"actor": request.actor, "reason": request.reason, "idempotency_key": request.idempotency_key}
    done = {name: getattr(result, name) for name in ("rebind_id", "matched", "moved", "flushed")}
    its_records = {"event_time": now, "nodeid": NODEID, "first_key": keys[0], "last_key": keys[1]}
    row = asked | done | its_records | {"request": request.asked(), "left_alone": result.left}
    db.execute(sa.insert(rebinds), row)


def rebinds_done(database: Database, since: float | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """The history, newest first, or what there is `since` then, in seconds since 1970. Raises StoreUnavailable."""
    time, left = rebinds.c.event_time.label("time"), rebinds.c.left_alone.label("left")
    columns = rebinds.c["rebind_id", "actor", "reason", "idempotency_key", "matched", "moved", "flushed", "request"]
    newest = sa.select(time, left, *columns).order_by(rebinds.c.number.desc()).limit(limit)
    if since is not None:
        newest = newest.where(rebinds.c.event_time >= since)
    with database.autocommit() as db:
        return [{**row, "time": rfc3339(row["time"])} for row in db.execute(newest).mappings()]


def rebind_done(db: sa.Connection, rebind_id: str) -> Any:
    """The row of a rebind. Raises UnknownRebind."""
    row = db.execute(sa.select(rebinds).where(rebinds.c.rebind_id == rebind_id)).one_or_none()
    if row is None:
        raise UnknownRebind(f"the history has no rebind {rebind_id}: it was never done, or it has been pruned")
    return row


def rfc3339(seconds: float) -> str:
    """The time in UTC, as records show it. The tables keep it within the years 1 to 9999."""
    return (_EPOCH + timedelta(0, seconds)).isoformat(timespec="microseconds") + "Z"


@dataclass(frozen=True)
class Undo:
    """The way back from one rebind, in terms of a message and its record. docs/contract.md, "Undo"."""

    rebind: Any  # its row of history
    matching: sa.ColumnElement[bool]  # whether the rebind changed a message, which is still as it left it
    left_alone: sa.ColumnElement[bool]  # whether the rebind changed one that is neither as it left it nor back
    new: NewState  # what each message had

    def count_left(self, db: sa.Connection) -> int:
        """How many messages are left alone. Raises NothingToUndo unless all records of the rebind are there."""
        each = log.outerjoin(messages, messages.c.id == log.c.id)
        counts = sa.select(sa.func.count(), sa.func.count().filter(self.left_alone)).select_from(each)
        records, left = db.execute(counts.where(of_rebind(self.rebind))).one()
        if records != self.rebind.matched or self.rebind.request.get("suppress_logging"):
            there = f"{records} of its {self.rebind.matched} records are there"
            raise NothingToUndo(f"the rebind {self.rebind.rebind_id} cannot be undone: {there}")
        return int(left)


def undo(backend: Backend, db: sa.Connection, request: RebindRequest, now: float) -> Undo:
    """How to take back the rebind that `request.undo` names. Raises UnknownRebind."""
    first = rebind_done(db, request.undo or "")
    meta_before, meta_left = _metadata(backend, first.request)
    due_left = sa.func.coalesce(log.c.new_due, first.event_time)
    flushed: sa.ColumnElement[bool] = log.c.new_due.is_not(None)
    if first.request.get("always_flush"):
        flushed |= log.c.due != first.event_time
    if request.always_flush:
        flushed = sa.false()  # there is no `due` to give back
    rewritten = _rewritten(meta_before, meta_left)
    rewritten_as_left = _rewritten(meta_before, messages.c.meta)
    as_left = _as_left(meta_left, now)
    only_due = sa.and_(flushed, messages.c.due == due_left)
    new = _had(first, request, now)
    back = sa.and_(
        messages.c.queue == log.c.old_queue,
        *(messages.c[name] == new.values[name] for name in ("meta", "sender", "recipient")),
        sa.or_(messages.c.due == log.c.due, rewritten),
    )
    back_or_as_left = sa.or_(back, as_left & sa.or_(rewritten, only_due))  # unknown of a message that is gone
    return Undo(
        first,
        matching=sa.and_(of_rebind(first), as_left, sa.or_(rewritten_as_left, only_due)),
        left_alone=sa.case((back_or_as_left, sa.false()), else_=sa.or_(rewritten, flushed)),
        new=new,
    )


_sender_stayed, _recipient_stayed = log.c.new_sender.is_(None), log.c.new_recipient.is_(None)
_not_attempted = messages.c.num_attempts == log.c.num_attempts


def _metadata(backend: Backend, asked: dict[str, Any]) -> tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]]:
    """The metadata of a message before a rebind, and as it left it, written in the same way."""
    before: Any = log.c.meta
    left: Any = log.c.meta
    if not asked.get("trigger_rebind_event") and (asked["data"] or asked["unset"]):
        before, left = backend.merge(before, {}, ()), backend.merge(left, asked["data"], asked["unset"])
    return before, sa.func.coalesce(log.c.new_meta, left, type_=log.c.meta.type)


def _rewritten(before: sa.ColumnElement[Any], left: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Whether a rebind changed more of a message than `due`."""
    return sa.or_(log.c.queue != log.c.old_queue, ~_sender_stayed, ~_recipient_stayed, left != before)


def _as_left(meta: sa.ColumnElement[Any], now: float) -> sa.ColumnElement[bool]:
    """Whether a message is in the queue and has what the rebind gave it."""
    return sa.and_(
        messages.c.queue == log.c.queue,
        sa.or_(_sender_stayed, messages.c.sender == log.c.new_sender),
        sa.or_(_recipient_stayed, messages.c.recipient == log.c.new_recipient),
        # A worker may have delivered to earlier recipients: they must not get the mail again.
        sa.or_(_sender_stayed & _recipient_stayed, _not_attempted & (messages.c.leased_until <= now)),
        messages.c.meta == meta,
    )


def _had(first: Any, request: RebindRequest, now: float) -> NewState:
    """What messages had before the rebind."""
    had: dict[str, Any] = {
        "meta": log.c.meta,
        "sender": sa.case((_sender_stayed, messages.c.sender), else_=log.c.sender),
        "recipient": sa.case((_recipient_stayed, messages.c.recipient), else_=log.c.recipient),
        "domain": sa.case((_recipient_stayed, messages.c.domain), else_=log.c.domain),
    }
    if first.moved:
        had["queue"] = log.c.old_queue
    if first.moved or first.flushed or first.request.get("undo"):
        # What an attempt has set since stays.
        had["due"] = sa.case((_not_attempted, log.c.due), else_=messages.c.due)
    if request.always_flush:
        had["due"] = sa.literal(now)
    return NewState(had, renames=True, due_if_moved=False)
