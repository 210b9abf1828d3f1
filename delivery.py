"""What a delivery worker does: it claims messages that are due, and says what became of each.

It is for workers in Python; others do the same with plain SQL. docs/contract.md, "Delivery workers".
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from history import NODEID
from message import Message, domain_of, read_message, recipient_of, recipient_text
from moving import MESSAGE_COLUMNS
from names import DISCARDED, state_of
from queues import claimable, queue_names, registry
from rebinding import printable
from tables import OF_MESSAGE, contents, log, messages

DISCARD = 1000  # messages that one claim discards
SPARE = 15  # queues that one claim looks at beyond `count`, since others may have been there first
EVERY = 2**31 - 1  # queues

_name, _now = queue_names().c.queue, sa.bindparam("now", type_=sa.Double)
# Not EXISTS, which PostgreSQL may answer by a join with every queue.
_work = sa.select(messages.c.id).where(messages.c.queue == _name, claimable(_now)).limit(1).scalar_subquery()
# By name, from `:start` on. SQL finds them one by one, and so no more than `:limit`.
DUE_QUEUES = sa.select(_name).where(_work.is_not(None)).limit(sa.bindparam("limit", type_=sa.Integer))

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Claim(Message):
    """A message that is this worker's to deliver until `leased_until`."""

    content: bytes
    leased_until: float  # in seconds since 1970


class _Place:
    """Where the next claim begins: after this queue, in the order of names. So each queue has its turn."""

    queue = ""


def claim(count: int, lease: float) -> list[Claim]:
    """At most `count` messages that are due, each claimed by nobody else, for `lease` seconds. Raises StoreUnavailable.

    What is due in queue `null` is discarded first. Queues on hold are skipped; the others take turns. Messages that
    PostgreSQL has locked for others are passed over, and so is one that Python cannot read, which is logged.
    """
    with registry.database.autocommit() as db:
        now = registry.database.backend.now(db)
        discards = db.scalar(_due(sa.select(messages.c.id), DISCARDED, now).limit(1)) is not None
        names = _deliverable_queues(db, now, count + SPARE)[: count + SPARE]
    claims: list[Claim] = []
    if not (names or discards):
        return claims
    with registry.database.begin_write() as db:
        now = registry.database.backend.now(db)  # it may have waited for others
        if discards:
            waiting = _due(sa.select(messages.c.id), DISCARDED, now).limit(DISCARD).with_for_update(skip_locked=True)
            db.execute(sa.delete(messages).where(messages.c.id.in_(waiting)))
        for name in names:
            claims += _claim_from(db, name, count - len(claims), now, now + lease)
            _Place.queue = name
            if len(claims) == count:
                break
    return claims


def _deliverable_queues(db: sa.Connection, now: float, wanted: int) -> list[str]:
    """The first queues with something to deliver, beginning after the place, once around: `wanted`, or all."""
    for limit in (2 * wanted, EVERY):
        names = _due_queues(db, now, _Place.queue, limit)
        if len(names) < limit:
            names += _due_queues(db, now, "", limit)
        found = [name for name in dict.fromkeys(names) if _is_exact(name) and state_of(name) is None]
        if len(found) >= wanted or len(names) < limit:
            break
    return sorted(found, key=lambda name: name == _Place.queue)  # the others keep their order


def _due_queues(db: sa.Connection, now: float, start: str, limit: int) -> list[str]:
    return [*db.scalars(DUE_QUEUES, {"now": now, "start": start, "limit": limit})]


def _is_exact(name: str) -> bool:
    """Whether the name is in the table as it was read. One that is not UTF-8 is not, and cannot be asked for."""
    return name.isascii() or ("\ufffd" not in name and name == name.encode(errors="replace").decode())


def _claim_from(db: sa.Connection, name: str, count: int, now: float, until: float) -> list[Claim]:
    found = _due(sa.select(*MESSAGE_COLUMNS), name, now).order_by(messages.c.due).limit(count)
    claims = []
    for row in db.execute(found.with_for_update(skip_locked=True)).all():
        db.execute(sa.update(messages).where(messages.c.id == row.id).values(leased_until=until))
        try:
            message = read_message(row)
        except ValueError as error:  # its lease keeps it from being the first again, so that the others are claimed
            logger.error("%s", printable(str(error)))
            continue
        content = db.scalar(sa.select(contents.c.data).where(contents.c.id == row.id)) or b""
        known = {name: getattr(message, name) for name in Message.__slots__}
        claims.append(Claim(**known, content=content, leased_until=until))
    return claims


def _due(found: sa.Select[Any], name: str, now: float) -> sa.Select[Any]:
    return found.where(messages.c.queue == name, claimable(now))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The same answer to one attempt, for one or more recipients of a message."""

    type: Literal["Delivery", "Bounce", "TransientFailure"]
    recipients: list[str]
    details: dict[str, Any]  # the fields that its record has besides those of every record, such as `response`


def settle(claim: Claim, outcomes: Sequence[Outcome], due: float | None = None) -> bool:
    """Write what one attempt came to: a record for each outcome, all in one transaction.

    The message stays for those of its recipients whom no Delivery and no Bounce names, with one attempt more and
    without a lease. It is due again at `due`, in seconds since 1970; None is at the end of the lease. If a rebind made
    it due in the meantime it stays due. If nobody is left the message is removed.

    If the answer to a call was lost, call it again with the same arguments: nothing is written twice before the lease
    is over, nor later unless `due` has changed since.
    Returns False, and writes nothing, if the message is gone. Raises StoreUnavailable, and StoreRefused if the log does
    not take the `details` of an outcome: docs/tables.md, "log".
    """
    this, later = messages.c.id == claim.id, claim.leased_until if due is None else due
    with registry.database.begin_write() as db:
        row = db.execute(sa.select(messages).where(this).with_for_update()).one_or_none()
        if row is None:
            return False
        settled = row.leased_until != claim.leased_until and row.num_attempts > claim.num_attempts
        # Then its answer was lost. But after the end of the lease, another worker may have had the message.
        if settled and (row.due == later or registry.database.backend.now(db) < claim.leased_until):
            return True
        recipients = _recipients(row.recipient)
        done = {each for outcome in outcomes if outcome.type != "TransientFailure" for each in outcome.recipients}
        left = [each for each in recipients if each not in done]
        if left:
            changes = {
                "recipient": recipient_text(left),
                "domain": row.domain if left == recipients else _domain(left, row.domain),
                "due": later if row.due == claim.due else row.due,
                "num_attempts": row.num_attempts + 1,
                "leased_until": 0 if row.leased_until == claim.leased_until else row.leased_until,
            }
            db.execute(sa.update(messages).where(this).values(changes))
        else:
            db.execute(sa.delete(messages).where(this))
        db.execute(sa.insert(log), [_record(claim, outcome) for outcome in outcomes])
    return True


def recipient_list(message: Message) -> list[str]:
    """The recipients of a message, each once."""
    return _each_once(message.recipient)


def _each_once(recipient: str | list[str]) -> list[str]:
    return list(dict.fromkeys([recipient] if isinstance(recipient, str) else recipient))


# What a sender wrote without a domain, or so that nobody can read it, must not keep the outcomes from being written.
def _domain(recipients: list[str], before: str) -> str:
    with suppress(ValueError):
        return domain_of(recipients)
    return before


def _recipients(text: str) -> list[str]:
    with suppress(ValueError, RecursionError):
        return _each_once(recipient_of(text))
    return [text]


def _record(claim: Claim, outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(claim, name) for name in OF_MESSAGE} | {
        "type": outcome.type,
        "recipient": recipient_text(outcome.recipients),
        "details": outcome.details,
        "event_time": time.time(),
        "nodeid": NODEID,
    }
