"""What is read from outside, and what is refused: JSON itself, and the request's body and query.

marshmallow converts many values to the type that it wants. Here a value has its type, or is an error.
"""

import json
import math
import re
from codecs import BOM_UTF8
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from message import check_text
from names import NAMING_KEYS, Criteria
from rebinding import RebindRequest

MAX_KEYS = 1000  # of `data`

_NOT_SPACE = re.compile(r"[^ \t\r\n]")


class NotJSON(ValueError):
    """A text that is not JSON, or that cannot be read without guessing what it means.

    line: in a file, the number of the line on which the document begins.
    """

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def parse_json(text: bytes) -> Any:
    """Read JSON (RFC 8259) from UTF-8, and refuse what Python's own reader lets pass.

    Raises NotJSON: bad syntax or UTF-8, NaN, a number beyond a double, a key given twice, nesting too deep.
    """
    with _strictly():
        return json.loads(text.decode(), **_HOOKS)


def json_documents(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """The JSON documents of a file, one after the other, each with the number of the line on which it begins.

    What is in memory is at most a document, and as much again. Raises NotJSON as `parse_json` does.
    """
    parts, size, enough, line = [""], 0, 0, 1
    for number, each in enumerate(chain(lines, [b""]), 1):  # the empty one is the end
        with _strictly(number):
            parts.append((each.removeprefix(BOM_UTF8) if number == 1 else each).decode())
        size += len(parts[-1])
        if size >= enough or not each:
            rest, line = yield from _complete_documents("".join(parts), line, ended=not each)
            parts, size, enough = [rest], len(rest), 2 * len(rest)  # so that all attempts together take linear time


def _complete_documents(text: str, line: int, ended: bool) -> Generator[tuple[int, Any], None, tuple[str, int]]:
    """The documents that are complete; returns the rest of the text, and the number of its first line."""
    text, at = text.rstrip(" \t\r\n") if ended else text, 0  # what ends too early ends on its own line
    while begin := _NOT_SPACE.search(text, at):
        line += text.count("\n", at, begin.start())
        with _strictly(line):
            try:
                document, at = _decoder.raw_decode(text, begin.start())
            except json.JSONDecodeError as error:
                # No token of JSON spans lines, so the lines of an incomplete document fail at their end.
                if not ended and not text[error.pos :].strip():
                    return text[begin.start() :], line
                wrong = line + text.count("\n", begin.start(), error.pos)
                raise ValueError(f"{error.msg}: line {wrong} column {error.colno}") from None
        yield line, document
        line += text.count("\n", begin.start(), at)
    return "", line + text.count("\n", at)


@contextmanager
def _strictly(line: int = 1) -> Iterator[None]:
    """Turn whatever a decoder raises into NotJSON."""
    try:
        yield
    except RecursionError:
        raise NotJSON("nested too deeply", line) from None
    except UnicodeDecodeError as error:
        raise NotJSON(f"it is not UTF-8: {error.reason} at byte {error.start}", line) from None
    except ValueError as error:
        raise NotJSON(str(error), line) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise NotJSON(f"the key {key[:40]!a} is given twice in one object")
        members[key] = value
    return members


def _no_constant(name: str) -> None:
    raise NotJSON(f"{name} is not a number in JSON")


def _finite_float(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise NotJSON(f"the number {digits[:40]} is too large")
    return number


_HOOKS: Any = {"object_pairs_hook": _unique, "parse_constant": _no_constant, "parse_float": _finite_float}
_decoder = json.JSONDecoder(**_HOOKS)


def checked(check: Any) -> Any:
    """A validator of marshmallow's that calls `check`."""

    def validator(value: Any) -> None:
        try:
            check(value)
        except ValueError as error:
            raise ValidationError(str(error)) from None

    return validator


def text(**kwargs: Any) -> fields.String:
    """A string that both databases can hold."""
    return fields.String(validate=checked(check_text), **kwargs)


class StrictBoolean(fields.Boolean):
    """`true` or `false`, and nothing that marshmallow would convert to them."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class StrictInteger(fields.Integer):
    """A whole number, and not a string, a boolean or a float that looks like one."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.make_error("invalid", input=value)
        return value


FEW_KEYS = validate.Length(max=MAX_KEYS, error="Must not have more than {max} keys.")


class RebindRequestSchema(Schema):
    """The body of a rebind. docs/contract.md, "The request". An unknown field is an error by default."""

    reason = text(required=True)
    data = fields.Dict(keys=text(), values=text(), required=True, validate=FEW_KEYS)
    campaign = text(allow_none=True, load_default=None)
    tenant = text(allow_none=True, load_default=None)
    domain = text(allow_none=True, load_default=None)
    routing_domain = text(allow_none=True, load_default=None)
    trigger_rebind_event = StrictBoolean(load_default=False)
    always_flush = StrictBoolean(load_default=False)
    suppress_logging = StrictBoolean(load_default=False)

    @validates_schema
    def _names_are_not_empty(self, body: dict[str, Any], **_: Any) -> None:
        empty = [key for key in NAMING_KEYS if body["data"].get(key) == "" and not body["trigger_rebind_event"]]
        if empty:
            reason = "Must not be empty: ?unset={key} removes the key."
            raise ValidationError({"data": {key: {"value": [reason.format(key=key)]} for key in empty}})


class RebindQuerySchema(Schema):
    """The query parameters of a rebind, each a list of what was given. docs/contract.md, "Beyond the page"."""

    dry_run = fields.Boolean(truthy={"true"}, falsy={"false"}, load_default=False)
    limit = fields.String(
        validate=validate.Regexp(r"[1-9][0-9]{0,17}\Z", error="Not a whole number from 1 to 10^18 - 1."),
        load_default=None,
    )
    unset = fields.List(text(), load_default=[])
    undo = text(load_default=None)


class QueryError(ValidationError):
    """A query parameter or the Idempotency-Key is unknown, repeated, has a bad value or conflicts with the body."""


_body, _query = RebindRequestSchema(), RebindQuerySchema()

# RFC 9651, section 3.3.3: a string is printable ASCII in quotes, with " and \ escaped.
_STRING = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\]){1,255})"')


def rebind_query(args: Mapping[str, list[str]]) -> dict[str, Any]:
    """The query parameters as fields of RebindRequest. Raises QueryError."""
    repeated = [name for name, values in args.items() if len(values) > 1 and name != "unset"]
    if repeated:
        raise QueryError({name: ["Given more than once."] for name in repeated})
    try:
        query: dict[str, Any] = _query.load(
            {name: values if name == "unset" else values[0] for name, values in args.items()}
        )
    except ValidationError as error:
        raise QueryError(error.messages) from error
    return query | {"limit": query["limit"] and int(query["limit"]), "unset": tuple(dict.fromkeys(query["unset"]))}


def idempotency_key(header: str | None) -> str | None:
    """The key in an Idempotency-Key header. Raises QueryError."""
    if header is None:
        return None
    if not (match := _STRING.fullmatch(header.strip())):
        raise QueryError({"Idempotency-Key": ['Not a string in quotes, such as "8e03978e", of 1 to 255 characters.']})
    return re.sub(r"\\(.)", r"\1", match[1])


def rebind_request(body: Any, query: dict[str, Any], key: str | None, actor: str) -> RebindRequest:
    """What is asked for, from a parsed body and what `rebind_query` and `idempotency_key` gave.

    Raises ValidationError for the body, and QueryError for a parameter that conflicts with it.
    """
    fields = _body.load(body)
    criteria = Criteria(*(fields.pop(name) for name in ("campaign", "tenant", "domain", "routing_domain")))
    request = RebindRequest(**fields, **query, criteria=criteria, idempotency_key=key, actor=actor)
    if conflicts := dict(_conflicts(request)):
        raise QueryError(conflicts)
    return request


def _conflicts(request: RebindRequest) -> Iterator[tuple[str, list[str]]]:
    if request.unset and request.trigger_rebind_event:
        yield "unset", ["Not allowed with trigger_rebind_event."]
    elif both := [key for key in request.unset if key in request.data]:
        yield "unset", [f"Set by data: {', '.join(map(ascii, both))}."]
    if request.undo is not None and (request.data or request.unset or request.trigger_rebind_event):
        yield "undo", ["data must be {}, and undo cannot be combined with unset or trigger_rebind_event."]
