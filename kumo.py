"""Messages as KumoMTA prints them: the answers of inspect-message and inspect-sched-q, read, checked and printed.

docs/contract.md, "Loading and printing messages".
"""

import math
import re
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Context, Decimal
from typing import IO, Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate, validates_schema
from marshmallow.exceptions import SCHEMA

from deliverylog import MAX_ATTEMPTS
from message import NewMessage, addresses_of, check_json, check_text, domain_of, from_json, recipient_of
from names import queue_name
from schemas import NotJSON, StrictInteger, checked, json_documents, text
from tables import FIRST_SECOND, LAST_SECOND, MAX_NAME

MAX_REASONS = 5  # that an error names, of all that is wrong in one answer
EXACT = Context(prec=400)  # digits: the difference of a double and its whole seconds has no more
UUID_EPOCH = 12219292800  # seconds from 1582-10-15, when the time of a UUID begins, to 1970

_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d[Tt ](?:[01]\d|2[0-3]):[0-5]\d:)([0-5]\d|60)(\.\d+)?([Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)


class WrongFile(ValueError):
    """What is wrong in a file, with the file's name, the line and the field."""


def read_messages(file: IO[bytes], progress: Callable[[int], None]) -> Iterator[NewMessage]:
    """The messages of a file. One document, or one line, is in memory at once.

    progress: is called with the number of bytes that were read since the last call.
    Raises WrongFile and OSError.
    """
    try:
        for line, document in json_documents(_lines(file, progress)):
            yield from _new_messages(document, f"{file.name}:{line}")
    except NotJSON as error:
        raise WrongFile(f"{file.name}:{error.line}: this is not valid JSON: {error}") from error


def _lines(file: IO[bytes], progress: Callable[[int], None]) -> Iterator[bytes]:
    for line in file:
        progress(len(line))
        yield line


def _seconds(value: Any) -> float:
    """A time of RFC 3339, in seconds since 1970. Raises ValidationError."""
    wrong = ValidationError("Not a time of RFC 3339, such as 2026-11-24T10:00:00Z.")
    match = _RFC3339.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise wrong
    minute, second, fraction, offset = match.groups("")
    leap = second == "60"
    try:
        whole = datetime.fromisoformat(f"{minute}{59 if leap else second}{offset}".upper()).timestamp() + leap
    except ValueError:  # such as a 30th of February
        raise wrong from None
    if leap and whole % 86400:  # a leap second is the last of a day of UTC (RFC 3339, section 5.7)
        raise wrong
    seconds = float(EXACT.add(Decimal(int(whole)), Decimal(f"0{fraction}")))
    if not FIRST_SECOND <= seconds <= LAST_SECOND:
        raise ValidationError("Not in the years 1 to 9999.")
    return seconds


_time: dict[str, Any] = {"deserialize": _seconds, "allow_none": True, "load_default": None}


class SchedulingSchema(Schema):
    """KumoMTA's limits to the time of delivery. The hours and days are not kept."""

    first_attempt = fields.Function(**_time)


class MessageSchema(Schema):
    """What KumoMTA tells of a message."""

    sender = text(required=True)
    recipient = fields.Raw(required=True, validate=checked(addresses_of))
    meta = fields.Dict(load_default=dict, validate=checked(check_json))
    data = fields.String(load_default=None, allow_none=True, validate=checked(str.encode))
    due = fields.Function(**_time)
    num_attempts = StrictInteger(load_default=None, allow_none=True, validate=validate.Range(0, MAX_ATTEMPTS))
    # What KumoMTA does not print, and `flask messages` does:
    created = fields.Function(**_time)
    domain = text(load_default=None)
    queue = text(load_default=None)
    data_base64 = fields.String(load_default=None, validate=checked(b64decode))
    scheduling = fields.Nested(SchedulingSchema, unknown=EXCLUDE, load_default=None, allow_none=True)

    @validates_schema
    def _can_be_queued(self, message: dict[str, Any], **_: Any) -> None:
        try:
            domain = domain_of(message["recipient"]) if message["domain"] is None else message["domain"]
        except ValueError as error:
            raise ValidationError(str(error), "recipient") from None
        queue = message["queue"] or queue_name(message["meta"], domain)
        if len(queue.encode()) > MAX_NAME:
            raise ValidationError(f"the name of its queue is longer than {MAX_NAME} bytes", "meta")


def _check_id(id: str) -> None:
    check_text(id)
    if not 1 <= len(id.encode()) <= MAX_NAME:
        raise ValueError(f"not 1 to {MAX_NAME} bytes long")


class InspectedMessageSchema(Schema):
    """The answer of KumoMTA's `inspect-message`."""

    id = fields.String(required=True, validate=checked(_check_id))
    message = fields.Nested(MessageSchema, required=True)


class InspectedQueueSchema(Schema):
    """The answer of KumoMTA's `inspect-sched-q`: what it says of the queue besides the messages is of no use here."""

    messages = fields.List(fields.Nested(InspectedMessageSchema), required=True)


_inspected_message, _inspected_queue = InspectedMessageSchema(), InspectedQueueSchema(unknown=EXCLUDE)


def _new_messages(document: Any, source: str) -> list[NewMessage]:
    """The messages of one answer; `source` says where it stands. Raises WrongFile."""
    try:
        if isinstance(document, dict) and "messages" in document:
            answers = _inspected_queue.load(document)["messages"]
        else:
            answers = [_inspected_message.load(document)]
    except ValidationError as error:
        reasons = list(by_field(error.messages))
        more = [f"and {len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
        raise WrongFile(f"{source}: {'; '.join(reasons[:MAX_REASONS] + more)}") from error
    return [_new_message(answer["id"], answer["message"], source) for answer in answers]


def _new_message(id: str, message: dict[str, Any], source: str) -> NewMessage:
    scheduling = message["scheduling"] or {}
    coded = message["data_base64"]
    return NewMessage(
        id=id,
        sender=message["sender"],
        recipient=message["recipient"],
        content=(message["data"] or "").encode() if coded is None else b64decode(coded),
        meta=message["meta"],
        domain=message["domain"],
        queue=message["queue"],
        created=_created(id) if message["created"] is None else message["created"],
        due=scheduling.get("first_attempt") if message["due"] is None else message["due"],
        num_attempts=message["num_attempts"] or 0,
        source=source,
    )


def _created(id: str) -> float | None:
    """When KumoMTA received the message, in seconds since 1970: its ids are UUIDs of version 1 (RFC 9562, section 5.1).

    None if this id is not one, or names a time before 1970 or after now.
    """
    try:
        parsed = uuid.UUID(id)
    except ValueError:
        return None
    seconds = parsed.time / 1e7 - UUID_EPOCH
    is_one = parsed.version == 1 and id.lower() in (parsed.hex, str(parsed))
    return seconds if is_one and 0 <= seconds <= time.time() else None


def shown_message(row: Any, content: bool) -> dict[str, Any]:
    """A row of `registry.messages`, in the shape in which `read_messages` reads it.

    Raises ValueError and RecursionError if Python cannot read it.
    """
    recipient, meta = recipient_of(row.recipient), from_json(row.meta)
    message = {"sender": row.sender, "recipient": recipient, "meta": meta, "due": _rfc3339(row.due)}
    message |= {"num_attempts": min(row.num_attempts, MAX_ATTEMPTS), "created": _rfc3339(row.created)}
    if not _is_usual(row.domain, recipient):
        message["domain"] = row.domain
    if row.queue != queue_name(meta, row.domain):
        message["queue"] = row.queue
    if content and row.data is not None:
        try:
            message["data"] = row.data.decode()
        except UnicodeDecodeError:
            message["data_base64"] = b64encode(row.data).decode()
    return {"id": row.id, "message": message}


def _rfc3339(seconds: float) -> str:
    """The time in UTC, with all digits that the number has, so that it is read as the same number."""
    whole = math.floor(seconds)
    fraction = f"{EXACT.subtract(Decimal(repr(seconds)), whole):f}".partition(".")[2].rstrip("0")
    return datetime.fromtimestamp(whole, UTC).strftime("%04Y-%m-%dT%H:%M:%S") + (f".{fraction}Z" if fraction else "Z")


def _is_usual(domain: str, recipient: str | list[str]) -> bool:
    """Whether the domain is the one that a message to this recipient has if its sender does not say otherwise."""
    with suppress(ValueError):
        return domain == domain_of(recipient)
    return False


def by_field(messages: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """marshmallow's tree of error messages as lines `field: reason`, the field with its path."""
    if isinstance(messages, dict):
        for field, below in messages.items():
            yield from by_field(below, path if field == SCHEMA else (*path, str(field)))
    else:
        yield ": ".join(filter(None, (".".join(path), " ".join(messages))))
