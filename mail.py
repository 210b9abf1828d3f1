"""A message: its envelope and metadata, and what of them may be kept. It knows nothing of queues."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

MAX_DEPTH = 200  # of a message's metadata, well within what Python and both databases read
MAX_BITS = 14_000  # of a whole number in it: Python writes and reads no more than 4300 digits


@dataclass(slots=True)
class Message:
    """A message as a handler of the `rebind` event gets it.

    The handler may change `sender`, `recipient` and `meta`; the rest is to read.
    """

    sender: str
    """The envelope sender; empty for a bounce."""
    recipient: str | list[str]
    """The envelope recipient, or the list of them where there are several."""
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
    due: float | None = None
    """When it is eligible for delivery, in seconds since 1970; None is now."""
    num_attempts: int = 0
    source: str = ""
    """Where it comes from, for error messages: a file and line."""


def domain_of(recipient: str | list[str]) -> str:
    """The domain that names a message's queue: the first recipient's, in lower case.

    Raises ValueError where `recipient` is no address `local@domain`, and no list of at least one.
    """
    addresses = recipient if isinstance(recipient, list) else [recipient]
    for address in addresses:
        check_text(address)
        local, _, domain = address.rpartition("@")
        if not local or not domain or local.startswith("["):
            raise ValueError(f"{address!r} is no address local@domain")
    if not addresses:
        raise ValueError("there is no recipient")
    return addresses[0].rpartition("@")[2].lower()


def check_text(value: Any) -> None:
    """Raise ValueError unless `value` is a string that both databases can hold: no NUL, no lone surrogate."""
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} is no string")
    if "\0" in value:
        raise ValueError("a string must not hold a NUL")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("a string must not hold a lone surrogate")


_decoder = json.JSONDecoder()

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps would build one each time
"""A value as the databases keep it."""


def from_json(text: str | bytes) -> Any:
    """The value of what a database keeps as JSON; a sender may have written bytes."""
    if not isinstance(text, str):
        return json.loads(text)
    return _decoder.raw_decode(text.lstrip())[0]  # json.loads would look for what cannot be, at twice the time


def meta_json(meta: Any) -> str:
    """Metadata as JSON. Raises TypeError where it is no dict, and ValueError as `check_json` does."""
    if not isinstance(meta, dict):
        raise TypeError("meta must be a dict")
    # Most is nothing but strings in ASCII, which can be checked in one piece.
    strings = {*map(type, meta), *map(type, meta.values())} <= {str}
    if not strings:
        check_json(meta)
    text = to_json(meta)
    if strings and (not text.isascii() or "\\u0000" in text):
        check_json(meta)
    return text


def check_json(value: Any, depth: int = 0) -> None:
    """Raise ValueError unless `value` is JSON that both databases can hold.

    Numbers must be finite, whole ones of at most MAX_BITS, strings as `check_text` says, and nesting at most MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        for key, member in value.items():
            check_text(key)
            check_json(member, depth + 1)
    elif isinstance(value, list):
        for member in value:
            check_json(member, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no JSON")
    elif isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise ValueError("a whole number has too many digits")
    elif value is not None:
        check_text(value)
