"""Messages as KumoMTA prints them, read, checked and printed. docs/contract.md, "Loading and printing messages"."""

import time
import uuid
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import IO, Any

from marshmallow import ValidationError, validate

from deliverylog import MAX_ATTEMPTS
from history import rfc3339
from message import NewMessage, addresses_of, check_address, check_json, check_text, domain_of, from_json, recipient_of
from moving import MessageRow
from names import queue_name
from schemas import Unreadable, in_a_line, json_documents, seconds
from tables import MAX_NAME

REPLACEMENT = "\ufffd".encode()
UUID_EPOCH = 12219292800  # seconds from 1582-10-15, when the time of a UUID begins, to 1970

# What is said of messages after their number: they are not all, or not all of what they were in KumoMTA.
MISSING = "that KumoMTA counted in a queue and did not print: see kcli's --no-limit"
DAMAGED = "with U+FFFD in the content: KumoMTA prints it for what is not UTF-8"
LIMITED = "with an expiry or a delivery window, which is not kept"


def read_messages(file: IO[bytes], remarks: Counter[str]) -> Iterator[NewMessage]:
    """The messages of a file. One document, or one line, is in memory at once. Raises Unreadable and OSError.

    remarks: gets the number of messages of which each remark is true.
    """
    for source, document in json_documents(file, file.name):
        try:
            yield from _new_messages(document, source, remarks)
        except ValidationError as error:
            raise Unreadable(f"{source}: {in_a_line(error.messages)}") from error


def _new_messages(document: Any, source: str, remarks: Counter[str]) -> Iterator[NewMessage]:
    """The messages of one answer; `source` says where it stands. Raises ValidationError."""
    if isinstance(document, dict) and "messages" in document:
        queue = _object(document, INSPECTED_QUEUE, others=True)
    else:
        queue = {"messages": [_answer(document)]}
    remarks[MISSING] += max(queue.get("num_scheduled", 0) - len(queue["messages"]), 0)
    for answer in queue["messages"]:
        message = answer["message"]
        data, scheduling = message.pop("data", b""), message.pop("scheduling", {})
        remarks[DAMAGED] += not data.isascii() and REPLACEMENT in data
        remarks[LIMITED] += any(name in scheduling for name in LIMITS)
        message["content"] = message.pop("data_base64", data)
        message.setdefault("due", scheduling.get("first_attempt"))
        message.setdefault("created", _created(answer["id"]))
        yield NewMessage(id=answer["id"], source=source, **message)


# Not marshmallow: this takes 15 µs for a message instead of 73, of about 130 that `flask load` took for it.
Fields = Mapping[Any, tuple[type, Callable[[Any], Any]]]
"""The type of each field, and what gives its value, or None if it stays. That raises ValueError or ValidationError."""

TYPES = {str: "string", int: "integer", list: "list", dict: "mapping type"}
REQUIRED = ("id", "message", "messages", "sender", "recipient")
NOT_NULL = {*REQUIRED, "meta"}


def _object(given: Any, fields: Fields, others: bool = False) -> dict[Any, Any]:
    """The fields that are not null. Raises ValidationError, with all that is wrong. others: there may be others."""
    if not isinstance(given, dict):
        raise ValidationError("Invalid input type.")
    found = {}
    missing = [name for name in REQUIRED if name in fields and name not in given]
    wrong: dict[Any, Any] = {name: ["Missing data for required field."] for name in missing}
    for name, value in given.items():
        if name not in fields:
            if not others:
                wrong[name] = ["Unknown field."]
            continue
        if value is None and name not in NOT_NULL and isinstance(name, str):  # a member of a list has a number
            continue
        kind, read = fields[name]
        try:
            if value is None:
                raise ValueError("Field may not be null.")
            if type(value) is not kind and kind is not object:
                raise ValueError(f"Not a valid {TYPES[kind]}.")
            became = read(value)
            found[name] = value if became is None else became
        except ValueError as error:
            wrong[name] = [str(error)]
        except ValidationError as error:
            wrong[name] = error.messages
    if wrong:
        raise ValidationError(wrong)
    return found


def _answers(given: list[Any]) -> list[dict[str, Any]]:
    each = dict.fromkeys(range(len(given)), (object, _answer))
    return [*_object(dict(enumerate(given)), each).values()]


def _message(given: Any) -> dict[str, Any]:
    """What KumoMTA tells of a message, with the domain and the queue that follow from it."""
    message = {"meta": {}} | _object(given, MESSAGE)
    if "domain" not in message:
        message["domain"] = _object(message, ADDRESSES, others=True)["recipient"]
    if "queue" not in message:
        message["queue"] = queue_name(message["meta"], message["domain"])
    if len(message["queue"].encode()) > MAX_NAME:
        raise ValidationError({"meta": [f"the name of its queue is longer than {MAX_NAME} bytes"]})
    return message


def _check_id(id: str) -> None:
    check_text(id)
    if not 1 <= len(id.encode()) <= MAX_NAME:
        raise ValueError(f"not 1 to {MAX_NAME} bytes long")


INSPECTED_QUEUE: Fields = {"messages": (list, _answers), "num_scheduled": (int, int)}
INSPECTED_MESSAGE: Fields = {"id": (str, _check_id), "message": (object, _message)}
_answer = partial(_object, fields=INSPECTED_MESSAGE)
MESSAGE: Fields = {
    "sender": (str, check_text),
    "recipient": (object, addresses_of),
    "meta": (dict, check_json),
    "data": (str, str.encode),
    "due": (object, seconds),
    "num_attempts": (int, validate.Range(0, MAX_ATTEMPTS)),
    "scheduling": (object, lambda given: _object(given, SCHEDULING, others=True)),
    # What KumoMTA does not print, and `flask messages` does:
    "created": (object, seconds),
    "domain": (str, check_text),
    "queue": (str, check_text),
    "data_base64": (str, b64decode),
}
LIMITS = ("expires", "dow", "tz", "start", "end")
SCHEDULING: Fields = {"first_attempt": (object, seconds)} | dict.fromkeys(LIMITS, (object, lambda _: True))
# If a message has no `domain`, that of its first recipient names its queue, and all must be addresses.
ADDRESSES: Fields = {
    "sender": (str, lambda sender: check_address(sender) if sender else None),  # that of a bounce is empty
    "recipient": (list, domain_of),
}


def _created(id: str) -> float | None:
    """When KumoMTA received the message, in seconds since 1970, if its id is a UUID of version 1 that says so."""
    try:
        parsed = uuid.UUID(id)
    except ValueError:
        return None
    created = parsed.time / 1e7 - UUID_EPOCH
    is_one = parsed.version == 1 and id.lower() in (parsed.hex, str(parsed))
    return created if is_one and 0 <= created <= time.time() else None


def shown_message(row: MessageRow, data: bytes | None) -> dict[str, Any]:
    """A message of `registry.messages`, as `read_messages` reads it. Raises ValueError and RecursionError."""
    recipient, meta = recipient_of(row.recipient), from_json(row.meta)
    message = {"sender": row.sender, "recipient": recipient, "domain": row.domain, "meta": meta}
    message |= {"created": rfc3339(row.created), "due": rfc3339(row.due)}
    message["num_attempts"] = min(row.num_attempts, MAX_ATTEMPTS)
    if row.queue != queue_name(meta, row.domain):
        message["queue"] = row.queue
    if data is not None:
        try:
            message["data"] = data.decode()
        except UnicodeDecodeError:
            message["data_base64"] = b64encode(data).decode()
    return {"id": row.id, "message": message}
