"""What is read from outside: JSON itself, and the request's body and query. A value has its type, or is an error."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import chain
from typing import Any

import msgspec
from marshmallow import Schema, ValidationError, fields, validate, validates_schema
from marshmallow.exceptions import SCHEMA

from message import check_text, finite
from names import EVERYTHING, NAMING_KEYS, Criteria
from rebinding import RebindRequest, printable
from tables import FIRST_SECOND, LAST_SECOND

MAX_LINE = 500  # characters of a line about errors
NO_TIME = "Not a time of RFC 3339, such as 2026-11-24T10:00:00Z."
MAX_LIMIT = 10**18 - 1  # as in A_LIMIT: both engines can count so far

_NOT_SPACE = re.compile(r"[^ \t\r\n]")


class SettingError(Exception):
    """A setting does not exist, or cannot be used."""


class Unreadable(ValueError):
    """A text is not what it should be, or is ambiguous. It says which text and where, and why."""


def parse_json(text: bytes, what: str) -> Any:
    """Read JSON (RFC 8259). Raises Unreadable about `what`, also for NaN, a number too large, a key given twice."""
    with _strictly(what):
        return json.loads(text.decode(), **_HOOKS)


def json_documents(lines: Iterable[bytes], file: str) -> Iterator[tuple[str, Any]]:
    """The JSON documents of a file, and where each begins, FILE:LINE. At most two are in memory. Raises Unreadable."""
    text, enough, line = "", 0, 1
    for number, each in enumerate(chain(lines, [b""]), 1):  # the empty one is the end
        with _strictly(f"{file}:{number}: this"):
            text += each.decode("utf-8-sig" if number == 1 else "utf-8")
        if each and len(text) < enough:
            continue
        if not each:
            text = text.rstrip(" \t\r\n")  # what ends too early ends on its own line
        at = 0
        while begin := _NOT_SPACE.search(text, at):
            line += text.count("\n", at, begin.start())
            at = begin.start()
            with _strictly(f"{file}:{line}: this"):
                try:
                    document, end = _decoder.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    # No token of JSON spans lines, so the lines of an incomplete document fail at their end.
                    if each and not text[error.pos :].strip():
                        break
                    wrong = line + text.count("\n", at, error.pos)
                    raise ValueError(f"{error.msg}: line {wrong} column {error.colno}") from None
            yield f"{file}:{line}", document
            line += text.count("\n", at, end)
            at = end
        text = text[at:]
        enough = 2 * len(text)  # so that all attempts together take linear time


@contextmanager
def _strictly(what: str) -> Iterator[None]:
    """Turn whatever a decoder raises into Unreadable."""
    try:
        yield
    except RecursionError:
        raise Unreadable(f"{what} is not valid JSON: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"{what} is not valid JSON: it is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise Unreadable(f"{what} is not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:40]!a} is given twice in one object")
    return members


_HOOKS: Any = {"object_pairs_hook": _unique, "parse_constant": finite, "parse_float": finite}
_decoder = json.JSONDecoder(**_HOOKS)


def seconds(text: Any) -> float:
    """A time of RFC 3339, in seconds since 1970, to the microsecond. Raises ValueError."""
    leap = isinstance(text, str) and text[17:19] == "60"  # the last second of a day of UTC (section 5.7)
    try:
        time = msgspec.convert(f"{text[:17]}59{text[19:]}" if leap else text, datetime)
    except (msgspec.ValidationError, UnicodeEncodeError):
        raise ValueError(NO_TIME) from None
    found = time.timestamp() + leap
    if not re.search(r"([Zz]|[+-]\d\d:\d\d)$", text) or (leap and int(found) % 86400):  # msgspec needs no such offset
        raise ValueError(NO_TIME)
    if not FIRST_SECOND <= found <= LAST_SECOND:
        raise ValueError("Not in the years 1 to 9999.")
    return found


def in_a_line(errors: Any) -> str:
    """marshmallow's errors as `field: reason; field: reason`, cut at MAX_LINE. Nothing in them can break the line."""
    line = printable("; ".join(_by_field(errors)))
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…"


def _by_field(errors: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(errors, dict):
        for field, below in errors.items():
            yield from _by_field(below, path if field == SCHEMA else (*path, str(field)))
    else:
        yield ": ".join(filter(None, (".".join(path), " ".join(errors))))


def _can_be_stored(value: str) -> None:
    try:
        check_text(value)
    except ValueError as error:
        raise ValidationError(str(error)) from None


def _is_boolean(value: Any) -> None:
    if not isinstance(value, bool):
        raise ValidationError("Not a valid boolean.")


text = partial(fields.String, validate=_can_be_stored)
flag = partial(fields.Raw, validate=_is_boolean, load_default=False)  # fields.Boolean takes 1 and "yes" too
A_LIMIT = validate.Regexp(r"[1-9][0-9]{0,17}\Z", error="Not a whole number from 1 to 10^18 - 1.")
FEW_KEYS = validate.Length(max=1000, error="Must not have more than {max} keys.")
FEW_IDS = validate.Length(max=100_000, error="Must not be more than {max} ids.")
REPEATABLE = ("unset", "queue", "id")  # query parameters


class RebindRequestSchema(Schema):
    """The body of a rebind. docs/contract.md, "The request". An unknown field is an error by default."""

    reason = text(required=True)
    data = fields.Dict(keys=text(), values=text(), required=True, validate=FEW_KEYS)
    campaign = text(allow_none=True, load_default=None)
    tenant = text(allow_none=True, load_default=None)
    domain = text(allow_none=True, load_default=None)
    routing_domain = text(allow_none=True, load_default=None)
    trigger_rebind_event = flag()
    always_flush = flag()
    suppress_logging = flag()

    @validates_schema
    def _names_are_not_empty(self, body: dict[str, Any], **_: Any) -> None:
        empty = [key for key in NAMING_KEYS if body["data"].get(key) == ""]
        if empty and not body["trigger_rebind_event"]:
            wrong = {key: {"value": ["Must not be empty. To remove the key, use unset."]} for key in empty}
            raise ValidationError({"data": wrong})


class RebindQuerySchema(Schema):
    """The query parameters of a rebind. docs/contract.md, "Beyond the page"."""

    dry_run = fields.Boolean(truthy={"true"}, falsy={"false"}, load_default=False)
    limit = fields.String(validate=A_LIMIT, load_default=None)
    undo = text(load_default=None)
    unset = fields.List(text(), load_default=[])
    queue = fields.List(text(), load_default=[])
    id = fields.List(text(), load_default=[], validate=FEW_IDS)


class QueryError(ValidationError):
    """A query parameter or the Idempotency-Key is unknown, repeated, has a bad value or conflicts with the body."""


_body, _query = RebindRequestSchema(), RebindQuerySchema()

# RFC 9651, section 3.3.3: a string is printable ASCII in quotes, with " and \ escaped.
_STRING = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\]){1,255})"')


def rebind_query(args: Mapping[str, list[str]]) -> dict[str, Any]:
    """The query parameters, with a tuple for each of REPEATABLE. Raises QueryError."""
    if repeated := [name for name, values in args.items() if len(values) > 1 and name not in REPEATABLE]:
        raise QueryError({name: ["Given more than once."] for name in repeated})
    given = {name: values if name in REPEATABLE else values[0] for name, values in args.items()}
    try:
        query: dict[str, Any] = _query.load(given)
    except ValidationError as error:
        raise QueryError(error.messages) from error
    each_once = {name: tuple(dict.fromkeys(query[name])) for name in REPEATABLE}
    return query | each_once | {"limit": query["limit"] and int(query["limit"])}


def idempotency_key(header: str | None) -> str | None:
    """The key in an Idempotency-Key header. Raises QueryError."""
    if header is None:
        return None
    if not (match := _STRING.fullmatch(header.strip())):
        raise QueryError({"Idempotency-Key": ['Not a string in quotes, such as "8e03978e", of 1 to 255 characters.']})
    return re.sub(r"\\(.)", r"\1", match[1])


def rebind_request(body: Any, query: dict[str, Any], key: str | None, actor: str) -> RebindRequest:
    """What is asked for. Raises ValidationError for the body, and QueryError for a parameter that conflicts with it."""
    given = _body.load(body) | query
    criteria = Criteria(**{name: given.pop(name) for name in vars(EVERYTHING)})
    request = RebindRequest(**given, criteria=criteria, idempotency_key=key, actor=actor)
    conflicts: dict[str, list[str]] = {}
    if request.unset and request.trigger_rebind_event:
        conflicts["unset"] = ["Not allowed with trigger_rebind_event."]
    elif both := [key for key in request.unset if key in request.data]:
        conflicts["unset"] = [f"Set by data: {', '.join(map(ascii, both))}."]
    if request.undo is not None and (request.data or request.unset or request.trigger_rebind_event):
        conflicts["undo"] = ["data must be {}, and undo cannot be combined with unset or trigger_rebind_event."]
    if conflicts:
        raise QueryError(conflicts)
    return request
