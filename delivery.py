"""What a delivery worker does to the queues: it claims messages that are due, and then says what became of each.

It is for workers in Python; others do the same with plain SQL (docs/contract.md, "Delivery workers"). A claim is a
lease by `due`: the message is not due again before the lease ends, so that a crashed worker's messages come back.
"""

import random
import time
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Select, case, delete, insert, literal, select, update

from history import NODEID
from message import Message
from names import DISCARDED, QueueName
from queues import registry
from store import Recipient, contents, log, messages

DISCARD = 1000  # messages that one claim discards


@dataclass(slots=True, kw_only=True)
class Claim(Message):
    """A message that is this worker's to deliver until `due`."""

    content: bytes


def claim(count: int, lease: float) -> list[Claim]:
    """At most `count` messages that are due, each claimed by nobody else, for `lease` seconds.

    Queues on hold are skipped, and what is due in queue `null` is discarded. On PostgreSQL, messages that others hold,
    a rebind included, are passed over without waiting.
    Raises StoreUnavailable.
    """
    now = time.time()
    claims: list[Claim] = []
    with registry.database.autocommit() as db:
        names = [name for name in registry.due_queues(db, now) if not QueueName.parse(name).on_hold]
    if not names:
        return []
    random.shuffle(names)  # so that a queue with many messages does not keep the others waiting
    with registry.database.begin_write() as db:
        for name in names:
            if name == DISCARDED:
                _discard(db, now)
            else:
                claims += _claim_from(db, name, count - len(claims), now, now + lease)
            if len(claims) == count:
                break
    return claims


def _discard(db: Connection, now: float) -> None:
    waiting = _due(select(messages.c.id), DISCARDED, now).limit(DISCARD).with_for_update(skip_locked=True)
    db.execute(delete(messages).where(messages.c.id.in_(waiting)))


def _claim_from(db: Connection, name: str, count: int, now: float, until: float) -> list[Claim]:
    found = _due(select(messages), name, now).order_by(messages.c.due).limit(count)
    claims = []
    for row in db.execute(found.with_for_update(skip_locked=True)).all():
        db.execute(update(messages).where(messages.c.id == row.id).values(due=until))
        content = db.scalar(select(contents.c.data).where(contents.c.id == row.id)) or b""
        known = {f.name: getattr(row, f.name) for f in fields(Message)}
        claims.append(Claim(**(known | {"due": until, "content": content})))
    return claims


def _due(found: Select[Any], name: str, now: float) -> Select[Any]:
    return found.where(messages.c.queue == name, messages.c.due <= now)


def delivered(claim: Claim, details: dict[str, Any]) -> bool:
    """Take the message away and log its Delivery. False, and no record, where another took it away before."""
    return _end(claim, "Delivery", details)


def bounced(claim: Claim, details: dict[str, Any]) -> bool:
    """Take the message away and log its Bounce. False, and no record, where another took it away before."""
    return _end(claim, "Bounce", details)


def postponed(claim: Claim, due: float, details: dict[str, Any], recipient: str | list[str] | None = None) -> None:
    """Make the message due again at `due`, in seconds since 1970, with one attempt more, and log its TransientFailure.

    recipient: who of several recipients has not got it yet; None is all of them.
    Where a rebind made the message due in the meantime it stays due: a failure by the old route says nothing of the new
    one. So do recipients that a handler of the rebind changed.
    """
    with registry.database.begin_write() as db:
        still_ours = messages.c.due == claim.due
        left = recipient or claim.recipient
        unchanged = messages.c.recipient == literal(claim.recipient, Recipient)
        values = {
            "due": case((still_ours, due), else_=messages.c.due),
            "recipient": case((unchanged, literal(left, Recipient)), else_=messages.c.recipient),
            "num_attempts": messages.c.num_attempts + 1,
        }
        if db.execute(update(messages).where(messages.c.id == claim.id).values(values)).rowcount:
            _log(db, claim, "TransientFailure", claim.num_attempts + 1, details)


def _end(claim: Claim, kind: str, details: dict[str, Any]) -> bool:
    with registry.database.begin_write() as db:
        if not db.execute(delete(messages).where(messages.c.id == claim.id)).rowcount:
            return False
        _log(db, claim, kind, claim.num_attempts, details)
        return True


def _log(db: Connection, claim: Claim, kind: str, num_attempts: int, details: dict[str, Any]) -> None:
    row = {name: getattr(claim, name) for name in ("id", "sender", "recipient", "queue", "meta", "size", "created")}
    of_event = {"type": kind, "num_attempts": num_attempts, "event_time": time.time(), "nodeid": NODEID}
    db.execute(insert(log).values(row | of_event | {"details": details}))
