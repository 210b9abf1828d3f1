"""What a delivery worker does to the queues: it claims messages that are due, and then says what became of each.

It is for workers in Python; others do the same with plain SQL (docs/contract.md, "Delivery workers"). A claim is a
lease by `due`: the message is not due again before the lease ends, so that a crashed worker's messages come back.
"""

import logging
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Literal

from sqlalchemy import Connection, Select, delete, insert, select, update

from history import NODEID
from message import Message, domain_of
from moving import MESSAGE_COLUMNS
from names import DISCARDED, QueueName
from queues import registry
from rebinding import printable
from store import StoreRefused
from streaming import read_message
from tables import contents, log, messages

DISCARD = 1000  # messages that one claim discards

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Claim(Message):
    """A message that is this worker's to deliver until `due`."""

    content: bytes


def claim(count: int, lease: float) -> list[Claim]:
    """At most `count` messages that are due, each claimed by nobody else, for `lease` seconds.

    Queues on hold are skipped, and what is due in queue `null` is discarded. On PostgreSQL, messages that others hold,
    a rebind included, are passed over without waiting. One that Python cannot read is passed over, and logged.
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
    found = _due(select(*MESSAGE_COLUMNS), name, now).order_by(messages.c.due).limit(count)
    claims = []
    for row in db.execute(found.with_for_update(skip_locked=True)).all():
        db.execute(update(messages).where(messages.c.id == row.id).values(due=until))
        try:
            message = read_message(row)
        except StoreRefused as error:  # its lease keeps it from being the first again, so that the others are claimed
            logger.error("%s", printable(str(error)))
            continue
        content = db.scalar(select(contents.c.data).where(contents.c.id == row.id)) or b""
        known = {f.name: getattr(message, f.name) for f in fields(Message)}
        claims.append(Claim(**(known | {"due": until, "content": content})))
    return claims


def _due(found: Select[Any], name: str, now: float) -> Select[Any]:
    return found.where(messages.c.queue == name, messages.c.due <= now)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The same answer to one attempt, for one or more recipients of a message."""

    type: Literal["Delivery", "Bounce", "TransientFailure"]
    recipients: list[str]
    details: dict[str, Any]
    """The fields that its record has besides those of every record, such as `response`."""


def settle(claim: Claim, outcomes: Sequence[Outcome], due: float | None = None) -> bool:
    """Write what one attempt came to: a record for each outcome, all in one transaction.

    The message stays for those of its recipients whom no Delivery and no Bounce names, with one attempt more. It is due
    again at `due`, in seconds since 1970; None is at the end of the lease. If nobody is left the message is removed.
    `domain` follows the first of those who are left; the queue keeps its name until the next rebind.

    If a rebind made the message due in the meantime it stays due: a failure by the old route says nothing of the new
    one. Recipients that a handler of the rebind added stay too.

    If the answer to a call was lost, call it again with the same `due`: unless a rebind made the message due
    in the meantime, nothing is written twice.
    Returns False, and writes nothing, if the message is gone. Raises StoreUnavailable.
    """
    this = messages.c.id == claim.id
    found = select(messages.c.recipient, messages.c.domain, messages.c.due, messages.c.num_attempts).where(this)
    with registry.database.begin_write() as db:
        row = db.execute(found.with_for_update()).one_or_none()
        if row is None:
            return False
        if (row.due, row.num_attempts) == (due, claim.num_attempts + 1):
            return True  # this very call was committed before, and its answer was lost
        done = {each for outcome in outcomes if outcome.type != "TransientFailure" for each in outcome.recipients}
        left = [each for each in recipient_list(row) if each not in done]
        if left:
            changes = {
                "recipient": left,
                "domain": row.domain if left == recipient_list(row) else _domain(left, row.domain),
                "due": due if due is not None and row.due == claim.due else row.due,
                "num_attempts": row.num_attempts + 1,
            }
            db.execute(update(messages).where(this).values(changes))
        else:
            db.execute(delete(messages).where(this))
        db.execute(insert(log), [_record(claim, outcome) for outcome in outcomes])
    return True


def delivered(claim: Claim, details: dict[str, Any]) -> bool:
    """`settle` a Delivery to all recipients."""
    return settle(claim, [Outcome("Delivery", recipient_list(claim), details)])


def bounced(claim: Claim, details: dict[str, Any]) -> bool:
    """`settle` a Bounce for all recipients."""
    return settle(claim, [Outcome("Bounce", recipient_list(claim), details)])


def postponed(claim: Claim, due: float, details: dict[str, Any]) -> bool:
    """`settle` a TransientFailure for all recipients."""
    return settle(claim, [Outcome("TransientFailure", recipient_list(claim), details)], due)


def recipient_list(message: Any) -> list[str]:
    """The recipients of a message, or of a row of `messages`, each once."""
    several = message.recipient if isinstance(message.recipient, list) else [message.recipient]
    return list(dict.fromkeys(several))


def _domain(recipients: list[str], before: str) -> str:
    # A recipient that a sender wrote without a domain must not keep the outcomes from being written.
    with suppress(ValueError):
        return domain_of(recipients)
    return before


def _record(claim: Claim, outcome: Outcome) -> dict[str, Any]:
    names = ("id", "sender", "queue", "meta", "size", "created", "num_attempts")
    return {name: getattr(claim, name) for name in names} | {
        "type": outcome.type,
        "recipient": outcome.recipients,
        "details": outcome.details,
        "event_time": time.time(),
        "nodeid": NODEID,
    }
