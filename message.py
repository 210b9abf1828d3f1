"""A message: its envelope and metadata, what of them can be stored, and what handlers changed of them."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

MAX_DEPTH = 200  # nesting of what a handler or a file may set: well within what Python and both engines can read
MAX_BITS = 14_000  # of a whole number: Python reads and writes at most 4,300 digits

# RFC 5321, section 4.1.2, and more: a local part may have any dots, and both may be Unicode.
_LABEL = r"[-\w\x80-\U0010ffff]+"
_ADDRESS = re.compile(rf'("([^"\\]|\\.)*"|[^\s"<>@[]+)@(\[[A-Za-z0-9.:-]+\]|{_LABEL}(\.{_LABEL})*)')


@dataclass(slots=True)
class Message:
    """A message as a handler of the `rebind` event gets it: `sender`, `recipient` and `meta` are its to change."""

    sender: str  # the envelope sender; empty for a bounce
    recipient: str | list[str]  # the envelope recipient, or a list if there are several
    meta: dict[str, Any]  # the metadata: any JSON
    id: str
    queue: str  # the scheduled queue that it is in now
    size: int  # the content's size, in bytes
    created: float  # when it was received, in seconds since 1970
    due: float  # when it is next eligible for delivery, in seconds since 1970
    num_attempts: int


class NewMessage(NamedTuple):
    """A message to load."""

    id: str
    sender: str
    recipient: str | list[str]
    content: bytes = b""
    meta: dict[str, Any] = {}
    created: float | None = None  # when it was received, in seconds since 1970; None is now
    due: float | None = None  # when it is eligible for delivery, in seconds since 1970; None is now
    num_attempts: int = 0
    domain: str | None = None  # the domain that names its queue; None is the first recipient's
    queue: str | None = None  # the queue that it is in; None is the one that its metadata names
    source: str = ""  # where it comes from, for error messages: a file and line


# The sender, recipient and metadata after the event's handlers, as the columns hold them; None if they are as before.
Changes = tuple[str | None, str | None, str | None]


def read_message(row: Any) -> Message:
    """The message of a row, a moving.MessageRow or one with its names. Raises ValueError if Python cannot read it."""
    try:
        recipient, meta = recipient_of(row.recipient), from_json(row.meta)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the message {row.id} cannot be read: {error}") from error
    known = (row.id, row.queue, row.size, row.created, row.due, row.num_attempts)
    return Message(row.sender, recipient, meta, *known)


def changes(row: Any, meta_read: dict[str, Any], message: Message) -> Changes:
    """What differs from the row that a message was read from. Raises TypeError, ValueError if it cannot be stored.

    meta_read: a shallow copy of the metadata, from before anybody could change it.
    """
    sender = recipient = None
    if message.sender != row.sender:
        check_text(message.sender)
        sender = message.sender
    if message.recipient != row.recipient and message.recipient != recipient_of(row.recipient):
        domain_of(message.recipient)
        parts = [address.rpartition("@") for address in addresses_of(message.recipient)]
        text = recipient_text([f"{local}@{domain.lower()}" for local, _, domain in parts])
        recipient = None if text == row.recipient else text
    return sender, recipient, _new_meta(row.meta, meta_read, message.meta)


def _new_meta(stored: str, read: dict[str, Any], meta: Any) -> str | None:
    """The metadata as JSON; None if it is what is stored. Only what is new is checked."""
    if not isinstance(meta, dict):
        raise TypeError("meta must be a dict")
    if "[" in stored or "{" in stored[1:]:  # what is nested may have changed in `read` too
        read = from_json(stored)
    new = {
        key: value
        for key, value in meta.items()
        if key not in read or (read[key] is not value and _differ(read[key], value))
    }
    if not new and len(meta) == len(read):
        return None
    check_json(new)
    return to_json(meta)


def _differ(before: Any, after: Any) -> bool:
    """Whether two values are not the same JSON: 1 and True are equal in Python."""
    return before != after or (type(after) is not str and to_json(before) != to_json(after))


def domain_of(recipient: str | list[str]) -> str:
    """The domain that names a message's queue: the first recipient's, in lower case.

    Raises ValueError unless `recipient` is an address, as `check_address` says, or a list of at least one.
    """
    addresses = addresses_of(recipient)
    for address in addresses:
        check_address(address)
    return addresses[0].rpartition("@")[2].lower()


def check_address(text: str) -> None:
    """Raise ValueError unless `text` is an address, `local@domain`, without angle brackets or a port."""
    if not _ADDRESS.fullmatch(text) or not text.isprintable():
        raise ValueError(f"{text!r} is not an address (local@domain)")


def addresses_of(recipient: str | list[str]) -> list[str]:
    """The addresses of a recipient, some perhaps without a domain. Raises ValueError if they cannot be stored."""
    addresses = recipient if isinstance(recipient, list) else [recipient]
    for address in addresses:
        check_text(address)
        if not address or address.startswith("["):
            raise ValueError(f"{address!r} is not an address (local@domain)")
    if not addresses:
        raise ValueError("there is no recipient")
    return addresses


def recipient_text(recipient: str | list[str]) -> str:
    """What the column `recipient` holds: an address as it stands, or several as a JSON list.

    An address cannot start with `[` (RFC 5321, section 4.1.2), so the two cannot be confused.
    """
    if isinstance(recipient, str):
        return recipient
    return recipient[0] if len(recipient) == 1 else to_json(recipient)


def recipient_of(text: str) -> str | list[str]:
    """What `recipient_text` wrote. Raises ValueError and RecursionError for what no sender should have written."""
    if not text.startswith("["):
        return text
    recipients: list[str] = from_json(text)
    if {*map(type, recipients)} != {str}:
        raise ValueError("a recipient is not a string")
    return recipients


def check_text(value: Any) -> None:
    """Raise ValueError unless `value` is a string that both engines can store: no NUL, no lone surrogate."""
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {type(value).__name__}")
    if "\0" in value:
        raise ValueError("a string must not contain NUL")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("a string must be text that UTF-8 can express")


def check_json(value: Any, depth: int = 0) -> None:
    """Raise ValueError unless `value` is JSON that both engines can store.

    Numbers must be finite, whole ones at most MAX_BITS long, strings as `check_text` says, nesting at most MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nesting is deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, dict):
        for key, member in value.items():
            check_text(key)
            check_json(member, depth + 1)
    elif isinstance(value, list):
        for member in value:
            check_json(member, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not JSON")
    elif isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise ValueError("a whole number has too many digits")
    elif value is not None:
        check_text(value)


def finite(digits: str) -> float:
    """The number that a JSON text gives. Raises ValueError if it is beyond a double, or is none."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is not in the range of a double")
    return number


def to_json(value: Any) -> str:
    """A value that is JSON, as the tables hold it: msgspec would take a NaN or a time for some JSON too."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError):  # half a character, for example
        return strict_json(value)


def strict_json(value: Any) -> str:
    """Any value as JSON, as the tables hold it. Raises TypeError and ValueError for what is not JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Half a character, which JSON can escape and UTF-8 has not, stays the escape that its sender wrote.
    return text.encode("utf-8", "backslashreplace").decode()


def from_json(text: str | bytes) -> Any:
    """The value of JSON from the tables. Raises ValueError and RecursionError for what Python cannot read."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError):  # half a character, for example
        return json.loads(text, parse_float=finite)
