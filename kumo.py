"""Messages as KumoMTA prints them, read, checked and printed. docs/contract.md, "Loading and printing messages"."""

import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Iterator
from typing import IO, Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate, validates_schema

from deliverylog import MAX_ATTEMPTS
from history import rfc3339
from message import NewMessage, addresses_of, check_address, check_json, check_text, domain_of, from_json, recipient_of
from names import queue_name
from schemas import NotJSON, checked, in_a_line, json_documents, seconds, text
from tables import MAX_NAME

UUID_EPOCH = 12219292800  # seconds from 1582-10-15, when the time of a UUID begins, to 1970


class WrongFile(ValueError):
    """What is wrong in a file, with the file's name, the line and the field."""


def read_messages(file: IO[bytes]) -> Iterator[NewMessage]:
    """The messages of a file. One document, or one line, is in memory at once. Raises WrongFile and OSError."""
    try:
        for line, document in json_documents(file):
            yield from _new_messages(document, f"{file.name}:{line}")
    except NotJSON as error:
        raise WrongFile(f"{file.name}:{error.line}: this is not valid JSON: {error}") from error


_optional: dict[str, Any] = {"allow_none": True, "load_default": None}
_time = {"deserialize": seconds} | _optional


class MessageSchema(Schema):
    """What KumoMTA tells of a message."""

    sender = text(required=True)
    recipient = fields.Raw(required=True, validate=checked(addresses_of))
    meta = fields.Dict(load_default=dict, validate=checked(check_json))
    data = fields.String(validate=checked(str.encode), **_optional)
    due = fields.Function(**_time)
    num_attempts = fields.Integer(strict=True, validate=validate.Range(0, MAX_ATTEMPTS), **_optional)
    # KumoMTA's limits to the time of delivery; the hours and days are not kept.
    scheduling = fields.Nested({"first_attempt": fields.Function(**_time)}, unknown=EXCLUDE, **_optional)
    # What KumoMTA does not print, and `flask messages` does:
    created = fields.Function(**_time)
    domain = text(load_default=None)
    queue = text(load_default=None)
    data_base64 = fields.String(load_default=None, validate=checked(b64decode))

    @validates_schema
    def _can_be_queued(self, message: dict[str, Any], **_: Any) -> None:
        domain = message["domain"]
        if domain is None:
            if message["sender"]:  # that of a bounce is empty
                checked(check_address, "sender")(message["sender"])
            checked(domain_of, "recipient")(message["recipient"])
            domain = domain_of(message["recipient"])
        queue = message["queue"] or queue_name(message["meta"], domain)
        if len(queue.encode()) > MAX_NAME:
            raise ValidationError(f"the name of its queue is longer than {MAX_NAME} bytes", "meta")


def _check_id(id: str) -> None:
    check_text(id)
    if not 1 <= len(id.encode()) <= MAX_NAME:
        raise ValueError(f"not 1 to {MAX_NAME} bytes long")


class InspectedMessageSchema(Schema):
    """The answer of KumoMTA's `inspect-message`; that of `inspect-sched-q` has a list of them."""

    id = fields.String(required=True, validate=checked(_check_id))
    message = fields.Nested(MessageSchema, required=True)


_answers: Any = {"messages": fields.List(fields.Nested(InspectedMessageSchema), required=True)}
_inspected_message, _inspected_queue = InspectedMessageSchema(), Schema.from_dict(_answers)(unknown=EXCLUDE)


def _new_messages(document: Any, source: str) -> Iterator[NewMessage]:
    """The messages of one answer; `source` says where it stands. Raises WrongFile."""
    try:
        if isinstance(document, dict) and "messages" in document:
            answers = _inspected_queue.load(document)["messages"]
        else:
            answers = [_inspected_message.load(document)]
    except ValidationError as error:
        raise WrongFile(f"{source}: {in_a_line(error.messages)}") from error
    for answer in answers:
        message = answer["message"]
        scheduling, data, coded = (message.pop(name) for name in ("scheduling", "data", "data_base64"))
        if message["due"] is None and scheduling:
            message["due"] = scheduling["first_attempt"]
        if message["created"] is None:
            message["created"] = _created(answer["id"])
        message["num_attempts"] = message["num_attempts"] or 0
        content = (data or "").encode() if coded is None else b64decode(coded)
        yield NewMessage(id=answer["id"], content=content, source=source, **message)


def _created(id: str) -> float | None:
    """When KumoMTA received the message, in seconds since 1970, if its id is a UUID of version 1 that says so."""
    try:
        parsed = uuid.UUID(id)
    except ValueError:
        return None
    created = parsed.time / 1e7 - UUID_EPOCH
    is_one = parsed.version == 1 and id.lower() in (parsed.hex, str(parsed))
    return created if is_one and 0 <= created <= time.time() else None


def shown_message(row: Any, content: bool) -> dict[str, Any]:
    """A row of `registry.messages`, as `read_messages` reads it. Raises ValueError and RecursionError if it cannot."""
    recipient, meta = recipient_of(row.recipient), from_json(row.meta)
    message = {"sender": row.sender, "recipient": recipient, "domain": row.domain, "meta": meta}
    message |= {"created": rfc3339(row.created), "due": rfc3339(row.due)}
    message["num_attempts"] = min(row.num_attempts, MAX_ATTEMPTS)
    if row.queue != queue_name(meta, row.domain):
        message["queue"] = row.queue
    if content and row.data is not None:
        try:
            message["data"] = row.data.decode()
        except UnicodeDecodeError:
            message["data_base64"] = b64encode(row.data).decode()
    return {"id": row.id, "message": message}
