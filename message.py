"""A message: its envelope and metadata, what of them can be stored, and what differs between two states of it."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, TypedDict

MAX_DEPTH = 200  # nesting of what a handler or a file may set: well within what Python and both engines can read
MAX_BITS = 14_000  # of a whole number: Python reads and writes at most 4,300 digits


@dataclass(slots=True)
class Message:
    """A message as a handler of the `rebind` event gets it.

    The handler may change `sender`, `recipient` and `meta`; the rest is read-only.
    """

    sender: str
    """The envelope sender; empty for a bounce."""
    recipient: str | list[str]
    """The envelope recipient, or a list if there are several."""
    meta: dict[str, Any]
    """The metadata: any JSON."""
    id: str
    queue: str
    """The scheduled queue that it is in now."""
    size: int
    """The content's size, in bytes."""
    created: float
    """When it was received, in seconds since 1970."""
    due: float
    """When it is next eligible for delivery, in seconds since 1970."""
    num_attempts: int


@dataclass(frozen=True)
class NewMessage:
    """A message to load."""

    id: str
    sender: str
    recipient: str | list[str]
    content: bytes = b""
    meta: dict[str, Any] = field(default_factory=dict)
    created: float | None = None
    """When it was received, in seconds since 1970; None is now."""
    due: float | None = None
    """When it is eligible for delivery, in seconds since 1970; None is now."""
    num_attempts: int = 0
    domain: str | None = None
    """The domain that names its queue; None is the first recipient's."""
    queue: str | None = None
    """The queue that it is in; None is the one that its metadata names."""
    source: str = ""
    """Where it comes from, for error messages: a file and line."""


class Changes(TypedDict, total=False):
    """What a rebind changed of a message. A part that did not change is missing."""

    data: dict[str, Any]
    """The metadata that was set."""
    unset: list[str]
    """The keys that were removed, before `data` was set."""
    sender: str
    recipient: str | list[str]


def changes(before: Message, after: Message) -> Changes:
    """What differs between two states of a message.

    Raises TypeError and ValueError if the new sender or metadata cannot be stored. A new recipient is not checked.
    """
    if not isinstance(after.meta, dict):
        raise TypeError("meta must be a dict")
    found = Changes()
    old = before.meta
    # Two strings are the same JSON if they are equal; most values are strings.
    data = {
        key: value
        for key, value in after.meta.items()
        if old.get(key) != value or (type(value) is not str and not is_same(old.get(key, ...), value))
    }
    if data:
        check_json(data)
        if {*map(type, data.values())} != {str}:
            data = from_json(to_json(data))  # plain types, whatever classes a handler used
        found["data"] = data
    if unset := [key for key in old if key not in after.meta]:
        found["unset"] = unset
    if after.sender != before.sender:
        check_text(after.sender)
        found["sender"] = after.sender
    if after.recipient != before.recipient:
        found["recipient"] = recipient_of(recipient_text(after.recipient))  # a list of one is stored as an address
    return found


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON. In Python, [1] == [True]."""
    if type(one) is not type(other):
        return False
    return to_json(one) == to_json(other) if isinstance(one, dict | list) else bool(one == other)


def changed_meta(meta: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """The metadata with `changes` applied."""
    if unset := {*changes.get("unset", [])}:
        meta = {key: value for key, value in meta.items() if key not in unset}
    return meta | changes.get("data", {})


def domain_of(recipient: str | list[str]) -> str:
    """The domain that names a message's queue: the first recipient's, in lower case.

    Raises ValueError unless `recipient` is an address `local@domain`, or a list of at least one.
    """
    addresses = addresses_of(recipient)
    for address in addresses:
        local, _, domain = address.rpartition("@")
        if not local or not domain:
            raise ValueError(f"{address!r} is not an address (local@domain)")
    return addresses[0].rpartition("@")[2].lower()


def addresses_of(recipient: str | list[str]) -> list[str]:
    """The addresses of a recipient, which may be without a domain, such as `Postmaster` (RFC 5321, section 4.5.1).

    Raises ValueError if one of them could not be stored, or if there is none.
    """
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
        raise ValueError("a string must not contain a lone surrogate")


def check_json(value: Any, depth: int = 0) -> None:
    """Raise ValueError unless `value` is JSON that both engines can store.

    Numbers must be finite, whole ones at most MAX_BITS long, strings as `check_text` says, nesting at most MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nesting is deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
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


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps builds an encoder each time
_decoder = json.JSONDecoder(parse_float=_finite)


def to_json(value: Any) -> str:
    """A value as JSON, as the tables hold it."""
    text = _encode(value)
    # Half a character, which JSON can escape and UTF-8 has not, stays the escape that its sender wrote.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def from_json(text: str) -> Any:
    """The value of JSON from the tables.

    Raises ValueError and RecursionError for what Python cannot read, such as a number of 5,000 digits.
    """
    return _decoder.raw_decode(text.lstrip())[0]  # half the time of json.loads
