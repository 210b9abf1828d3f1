"""What is read from outside, and what is refused: JSON itself, the request's body and query, a message to load.

marshmallow converts many values to the type that it wants. Here a value has its type, or is an error.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate, validates_schema

from history import RebindRequest
from message import NewMessage, check_json, check_text, domain_of
from names import NAMING_KEYS, Criteria, queue_name
from store import MAX_NAME

MAX_KEYS = 1000  # of `data`


class NotJSON(ValueError):
    """A text that is not JSON, or that cannot be read without guessing what it means."""


def parse_json(text: bytes, line: int = 1) -> Any:
    """Read JSON (RFC 8259) from UTF-8, and refuse what Python's own reader lets pass.

    line: the number of the text's first line, for error messages.
    Raises NotJSON: bad syntax or UTF-8, NaN, a number beyond a double, a key given twice, nesting too deep.
    """
    try:
        return json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite_float
        )
    except RecursionError:
        raise NotJSON("it is nested too deep to read") from None
    except UnicodeDecodeError as error:
        raise NotJSON(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        position = f"line {line + error.lineno - 1} column {error.colno} (char {error.pos})"
        raise NotJSON(f"{error.msg}: {position}") from None
    except ValueError as error:
        raise NotJSON(str(error)) from None


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


def _checked(check: Any) -> Any:
    """A validator of marshmallow's that calls `check`."""

    def validator(value: Any) -> None:
        try:
            check(value)
        except ValueError as error:
            raise ValidationError(str(error)) from None

    return validator


def text(**kwargs: Any) -> fields.String:
    """A string that both databases can hold."""
    return fields.String(validate=_checked(check_text), **kwargs)


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


class RebindRequestSchema(Schema):
    """The body of a rebind. docs/contract.md, "The request". An unknown field is an error by default."""

    reason = text(required=True)
    data = fields.Dict(keys=text(), values=text(), required=True, validate=validate.Length(max=MAX_KEYS))
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
        yield "undo", ["Needs data to be {}, and is not allowed with unset or trigger_rebind_event."]


class RecipientField(fields.Field[str | list[str]]):
    """An address, or a list of at least one."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str | list[str]:
        _checked(domain_of)(value)
        return value  # type: ignore[no-any-return]


class MessageSchema(Schema):
    """What KumoMTA tells of a message."""

    sender = text(required=True)
    recipient = RecipientField(required=True)
    meta = fields.Dict(load_default=dict, validate=_checked(check_json))
    data = fields.String(load_default="", allow_none=True, validate=_checked(str.encode))
    due = fields.AwareDateTime(load_default=None, allow_none=True)
    num_attempts = StrictInteger(load_default=0, validate=validate.Range(0, 2**31 - 1))
    scheduling = fields.Raw(load_only=True)  # KumoMTA's limits to the hours of delivery, which we do not keep

    @validates_schema
    def _can_be_queued(self, message: dict[str, Any], **_: Any) -> None:
        if len(queue_name(message["meta"], domain_of(message["recipient"])).encode()) > MAX_NAME:
            raise ValidationError(f"the name of its queue is longer than {MAX_NAME} bytes", "meta")


class InspectedMessageSchema(Schema):
    """The answer of KumoMTA's `inspect-message`."""

    id = fields.String(required=True, validate=[validate.Length(1), _checked(check_text)])
    message = fields.Nested(MessageSchema, required=True)


class InspectedQueueSchema(Schema):
    """The answer of KumoMTA's `inspect-sched-q`: what it says of the queue besides the messages is of no use here."""

    class Meta:
        unknown = EXCLUDE

    messages = fields.List(fields.Nested(InspectedMessageSchema), required=True)


_inspected_message, _inspected_queue = InspectedMessageSchema(), InspectedQueueSchema()


def inspected_messages(value: Any, source: str) -> Iterable[NewMessage]:
    """The messages of one of KumoMTA's answers, to load; `source` says where it stood.

    Raises ValidationError.
    """
    if isinstance(value, dict) and "messages" in value:
        answers = _inspected_queue.load(value)["messages"]
    else:
        answers = [_inspected_message.load(value)]
    return [_new_message(answer["id"], answer["message"], source) for answer in answers]


def _new_message(id: str, message: dict[str, Any], source: str) -> NewMessage:
    return NewMessage(
        id=id,
        sender=message["sender"],
        recipient=message["recipient"],
        content=(message["data"] or "").encode(),
        meta=message["meta"],
        due=message["due"] and message["due"].timestamp(),
        num_attempts=message["num_attempts"],
        source=source,
    )
