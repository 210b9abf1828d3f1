"""Tests of what is read from outside, without HTTP or a database: JSON itself, the body and the query of a request."""

import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from marshmallow import Schema, ValidationError

from names import NAMING_KEYS, Criteria
from rebinding import RebindRequest
from schemas import (
    NotJSON,
    QueryError,
    RebindRequestSchema,
    idempotency_key,
    parse_json,
    rebind_query,
    rebind_request,
)

# JSON

JSON: dict[str, tuple[bytes, Any]] = {
    "object": (
        b'{"a": {"a": [1, -2.5e3, true, false, null, "\\u00e9"]}}',
        {"a": {"a": [1, -2500.0, True, False, None, "é"]}},
    ),
    "white space": (b" \t\r\n[ ] \n", []),
    "string": (b'"a"', "a"),
    "UTF-8": ('"é💌"'.encode(), "é💌"),
    "a pair of surrogates": (rb'"\ud83d\udc8c"', "💌"),
    "a lone surrogate": (rb'"\ud800"', "\ud800"),  # is JSON; check_text refuses it
    "NUL": (rb'"\u0000"', "\0"),
    "an empty key": (b'{"": 1}', {"": 1}),
    "keys that differ in case": (b'{"a": 1, "A": 2}', {"a": 1, "A": 2}),
    "one key in two objects": (b'[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
    "the largest double": (b"1.7976931348623157e308", 1.7976931348623157e308),
    "too small for a double": (b"1e-999", 0.0),
    "4300 digits": (b"9" * 4300, 10**4300 - 1),
}


@pytest.mark.parametrize(("text", "value"), JSON.values(), ids=JSON)
def test_json_is_read(text: bytes, value: Any) -> None:
    assert parse_json(text) == value


NOT_JSON = {
    "empty": (b"", "Expecting value: line 1 column 1 (char 0)"),
    "cut": (b'{"a": 1', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
    "more after it": (b"{} {}", "Extra data: line 1 column 4 (char 3)"),
    "bad UTF-8": (b'"\xff"', "it is not UTF-8: invalid start byte at byte 1"),
    "a surrogate as UTF-8": (b'"\xed\xa0\x80"', "it is not UTF-8: invalid continuation byte at byte 1"),
    "UTF-16": ("{}".encode("utf-16"), "it is not UTF-8: invalid start byte at byte 0"),
    "UTF-16 without a BOM": (
        "{}".encode("utf-16-le"),
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "BOM": (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)"),
    "NaN": (b"NaN", "NaN is not a number in JSON"),
    "Infinity": (b'{"a": Infinity}', "Infinity is not a number in JSON"),
    "-Infinity": (b"[-Infinity]", "-Infinity is not a number in JSON"),
    "1e999": (b"1e999", "the number 1e999 is too large"),
    "-1e999": (b'{"a": [-1e999]}', "the number -1e999 is too large"),
    "a key twice": (b'{"a": 1, "a": 1}', "the key 'a' is given twice in one object"),
    "a key twice inside": (b'[{"b": {"": 1, "": 2}}]', "the key '' is given twice in one object"),
    "a key twice, escaped": (rb'{"\ud800": 1, "\ud800": 1}', r"the key '\ud800' is given twice in one object"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize(("text", "reason"), NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_refused_with_the_reason(text: bytes, reason: str) -> None:
    with pytest.raises(NotJSON) as refused:
        parse_json(text)
    assert str(refused.value) == reason


BODY = b'{"reason": "a test", "data": {"queue": "elsewhere"}, "always_flush": true}'
LOOKS_LIKE_JSON: dict[str, bytes] = {
    "a pickle": pickle.dumps(json.loads(BODY)),
    "MessagePack": b"\x82\xa6reason\xa1a\xa4data\x80",
    "CBOR": b"\xa2freasonaadddata\xa0",
    "BSON": b"\x1b\x00\x00\x00\x02reason\x00\x02\x00\x00\x00a\x00\x03data\x00\x05\x00\x00\x00\x00\x00",
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><reason>&b;</reason>',
    "YAML": b"reason: a\ndata: {}\n",
    "a YAML tag": b"!!python/object/apply:os.system [reboot]",
    "multipart": b'--x\r\nContent-Disposition: form-data; name="reason"\r\n\r\na\r\n--x--\r\n',
    "JSONP": b"f(" + BODY + b")",
    "a prefix against JSON hijacking": b")]}',\n" + BODY,
    "a JSON text sequence": b"\x1e" + BODY + b"\n",
    "UTF-7": BODY.replace(b'"a test"', b"+ACI-a test+ACI-"),
    "a request": b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "every byte": bytes(range(256)),
    "a key of a million letters twice": b'{"%s": 1, "%s": 2}' % ((b"a" * 1_000_000,) * 2),
    "1 MiB of NUL": bytes(1024 * 1024),
    "a quote without end": b'"' + b"a" * 1_000_000,
    "a backslash without end": b'{"reason": "' + b"\\" * 999_999,
    "half a \\u": BODY.replace(b"a test", b"\\u00"),
    "a tab in a string": BODY.replace(b"a test", b"a\ttest"),
    "spaces of Unicode": BODY.replace(b" ", "\u00a0".encode()),
    "a form feed": BODY + b"\f",
    "quotes of typography": BODY.replace(b'"', "”".encode()),
    "a word of Python's": BODY.replace(b"true", b"True"),
    "a word of JavaScript's": BODY.replace(b"true", b"undefined"),
    "a key without quotes": BODY.replace(b'"reason"', b"reason"),
    "a plus sign": BODY.replace(b"true", b"+1"),
    "a leading zero": BODY.replace(b"true", b"01"),
    "no digit after the point": BODY.replace(b"true", b"1."),
    "hexadecimal": BODY.replace(b"true", b"0x1"),
    "a million digits": BODY.replace(b"true", b"1" * 1_000_000),
    "a million digits and a point": BODY.replace(b"true", b"1" * 1_000_000 + b".0"),
    "a key twice, deep in a wrong value": BODY.replace(b"true", b'[[{"a": {"b": 1, "b": 2}}]]'),
    "a key twice, one of them a surrogate pair": BODY[:-1] + '"😀": 1, "\\ud83d\\ude00": 2}'.encode(),
    "braces and brackets crossed": b"{[}]" * 1000,
    "a million commas": b"[" + b"," * 1_000_000 + b"]",
}


@pytest.mark.parametrize("text", LOOKS_LIKE_JSON.values(), ids=LOOKS_LIKE_JSON)
def test_what_only_looks_like_json_is_refused_with_a_short_reason(text: bytes) -> None:
    with pytest.raises(NotJSON) as refused:
        parse_json(text)
    assert len(str(refused.value)) < 300


def test_a_number_with_too_many_digits_is_refused() -> None:
    with pytest.raises(NotJSON, match="4300 digits"):
        parse_json(b"9" * 5000)


# A request to rebind

DATA = {"reason": "r", "data": {}}
NO_STRING, NO_BOOLEAN, NO_MAPPING = (["Not a valid string."], ["Not a valid boolean."], ["Not a valid mapping type."])
NULL, UNKNOWN, MISSING = ["Field may not be null."], ["Unknown field."], ["Missing data for required field."]
NUL, SURROGATE = ["a string must not contain NUL"], ["a string must not contain a lone surrogate"]


def errors(schema: Schema, value: Any) -> Any:
    """What the schema says is wrong with the value."""
    with pytest.raises(ValidationError) as refused:
        schema.load(value)
    return refused.value.messages


def read(body: Any, key: str | None = None, **query: str | list[str]) -> RebindRequest:
    """The request that ada sends with this body and these query parameters."""
    given = {name: value if isinstance(value, list) else [value] for name, value in query.items()}
    return rebind_request(body, rebind_query(given), key, "ada")


def test_a_request_needs_a_reason_and_data_alone() -> None:
    assert read({"reason": "", "data": {}}) == RebindRequest("", {}, actor="ada")
    assert errors(RebindRequestSchema(), {}) == {"reason": MISSING, "data": MISSING}


def test_every_field_of_a_request_is_read_as_it_stands() -> None:
    criteria = {"campaign": "", "tenant": " acme ", "domain": "Example.COM", "routing_domain": "mx"}
    body = {
        "reason": " Cleaning up ",
        "data": {"": "", "é": "💌", "queue": "null"},
        "trigger_rebind_event": True,
        "always_flush": True,
        "suppress_logging": True,
    }
    expected = RebindRequest(**body, criteria=Criteria(**criteria), actor="ada")  # type: ignore[arg-type]
    assert read(body | criteria) == expected


def test_a_criterion_that_is_null_is_none() -> None:
    body = DATA | dict.fromkeys(("campaign", "tenant", "domain", "routing_domain"))
    assert read(body) == RebindRequest("r", {}, actor="ada")


def wrong_fields() -> Iterator[tuple[str, Any, Any]]:
    """Each field, with each value that it must not have, and the errors that it gives."""
    value: Any
    for field in ("reason", "campaign", "tenant", "domain", "routing_domain"):
        for value in (0, 5, 1.5, 2**64, 10**4299, True, False, [], ["a"], {}, {"a": "b"}, {"$ne": None}):
            yield field, value, NO_STRING
        yield field, "a\0b", NUL
        yield field, "a\ud800", SURROGATE
        yield field, "\udc00\ud800", SURROGATE
    yield "reason", None, NULL
    for field in ("trigger_rebind_event", "always_flush", "suppress_logging"):
        yield field, None, NULL
        for value in (0, 1, 0.0, -0.0, 1.0, "true", "false", "yes", "no", "on", "1", "", [], [True], {}):
            yield field, value, NO_BOOLEAN
    yield "data", None, NULL
    for value in (0, 5, True, False, "", "a", "queue", [], [["queue", "b"]], '{"queue": "b"}'):
        yield "data", value, NO_MAPPING
    for value in (0, 5, 1.5, True, False, [], {}):
        yield "data", {"queue": value}, {"queue": {"value": NO_STRING}}
    yield "data", {"queue": None}, {"queue": {"value": NULL}}
    yield "data", {"queue": "b", "x": 5, "y": None}, {"x": {"value": NO_STRING}, "y": {"value": NULL}}
    yield "data", {"queue": "\0"}, {"queue": {"value": NUL}}
    yield "data", {"queue": "\udfff"}, {"queue": {"value": SURROGATE}}
    yield "data", {"a\0": "b"}, {"a\0": {"key": NUL}}
    yield "data", {"\ud800": "b"}, {"\ud800": {"key": SURROGATE}}
    yield "data", {"\ud800": "\0"}, {"\ud800": {"key": SURROGATE, "value": NUL}}
    yield "data", {str(n): "" for n in range(1001)}, ["Must not have more than 1000 keys."]
    for key in NAMING_KEYS:
        yield "data", {key: "", "x": ""}, {key: {"value": [f"Must not be empty: ?unset={key} removes the key."]}}
    misspelt = ("campaing", "Domain", "domain ", "domain\u200b", "dom\u0430in")  # the last with a Cyrillic letter
    for field in (*misspelt, "$where", "__class__", "_schema", "dry_run", "limit", "", "\0", "\ud800", "a" * 100_000):
        yield field, "example.com", UNKNOWN


@pytest.mark.parametrize(
    ("field", "value", "wrong"), [pytest.param(*case, id=ascii(case[:2])[:60]) for case in wrong_fields()]
)
def test_a_wrong_value_is_an_error_and_never_coerced(field: str, value: Any, wrong: Any) -> None:
    assert errors(RebindRequestSchema(), DATA | {field: value}) == {field: wrong}


def test_every_wrong_field_is_named() -> None:
    body = {"data": {"a": 1}, "domain": 5, "always_flush": 1, "x": 1}
    assert errors(RebindRequestSchema(), body) == {
        "reason": MISSING,
        "data": {"a": {"value": NO_STRING}},
        "domain": NO_STRING,
        "always_flush": NO_BOOLEAN,
        "x": UNKNOWN,
    }


@pytest.mark.parametrize("value", [None, [], [DATA], "data", "", 0, 1.5, True], ids=ascii)
def test_what_is_no_object_is_no_request(value: Any) -> None:
    assert errors(RebindRequestSchema(), value) == {"_schema": ["Invalid input type."]}


def test_data_may_have_1000_keys() -> None:
    data = {str(n): "" for n in range(1000)}
    assert read(DATA | {"data": data}).data == data


def test_with_the_event_data_says_nothing_of_a_name() -> None:
    data = dict.fromkeys(NAMING_KEYS, "")
    assert read(DATA | {"data": data, "trigger_rebind_event": True}).data == data


# The query


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ({"dry_run": "true"}, {"dry_run": True}),
        ({"dry_run": "false", "limit": "1"}, {"limit": 1}),
        ({"limit": "999999999999999999"}, {"limit": 10**18 - 1}),
        ({"unset": ["b", "a", "", "b"]}, {"unset": ("b", "a", "")}),
        ({"undo": "x", "limit": "2", "dry_run": "true"}, {"undo": "x", "limit": 2, "dry_run": True}),
        ({"undo": ""}, {"undo": ""}),
    ],
    ids=str,
)
def test_a_query_is_read(query: dict[str, Any], fields: dict[str, Any]) -> None:
    assert read(DATA, **query) == RebindRequest("r", {}, actor="ada", **fields)


def query_errors(body: Any = DATA, **query: Any) -> Any:
    """What is wrong with the query."""
    with pytest.raises(QueryError) as refused:
        read(body, **query)
    return refused.value.messages


@pytest.mark.parametrize(
    "limit", ["", "0", "-1", "1.5", "+1", " 1", "1 ", "1\n", "1\0", "01", "٣", "1e3", "1_0", "9" * 19]
)
def test_a_limit_is_a_whole_number_from_1(limit: str) -> None:
    assert query_errors(limit=limit) == {"limit": ["Not a whole number from 1 to 10^18 - 1."]}


@pytest.mark.parametrize("dry_run", ["", "True", "TRUE", "yes", "on", "1", "0", "true ", "false,true"])
def test_a_dry_run_is_true_or_false(dry_run: str) -> None:
    assert query_errors(dry_run=dry_run) == {"dry_run": NO_BOOLEAN}


TWICE = ["Given more than once."]


def test_every_parameter_but_unset_may_be_given_once() -> None:
    assert query_errors(limit=["1", "1"], dry_run=["true", "false"], undo=["a", "a"]) == dict.fromkeys(
        ("limit", "dry_run", "undo"), TWICE
    )


def test_a_key_or_an_id_that_cannot_be_stored_is_refused() -> None:
    assert query_errors(unset=["a", "\0"], undo="\ud800") == {"unset": {1: NUL}, "undo": SURROGATE}


EVENT = {"trigger_rebind_event": True}
UNDO = {"undo": ["data must be {}, and undo cannot be combined with unset or trigger_rebind_event."]}
CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "unset with the event": (EVENT, {"unset": "a"}, {"unset": ["Not allowed with trigger_rebind_event."]}),
    "unset of keys that data sets": (
        {"data": {"a": "", "b": "", "é": ""}},
        {"unset": ["é", "c", "a"]},
        {"unset": ["Set by data: '\\xe9', 'a'."]},
    ),
    "undo with data": ({"data": {"a": ""}}, {"undo": "x"}, UNDO),
    "undo with the event": (EVENT, {"undo": "x"}, UNDO),
    "undo with unset": ({}, {"undo": "x", "unset": "a"}, UNDO),
}


@pytest.mark.parametrize(("body", "query", "wrong"), CONFLICTS.values(), ids=CONFLICTS)
def test_a_query_that_conflicts_is_refused(body: dict[str, Any], query: dict[str, Any], wrong: Any) -> None:
    assert query_errors(DATA | body, **query) == wrong


# The Idempotency-Key

KEYS = {
    '"a"': "a",
    '"8e03978e-40d5-43e8-bc93-6894a57f9324"': "8e03978e-40d5-43e8-bc93-6894a57f9324",
    '" ~!#[]"': " ~!#[]",
    r'"\\\""': '\\"',
    '"' + "a" * 255 + '"': "a" * 255,
    '"' + r"\"" * 255 + '"': '"' * 255,
}
NO_KEYS = ["", "a", '""', '"', '"a', 'a"', "'a'", r'"\"', r'"\a"', '"a"b"', '"é"', '"a\t"', '"a\x7f"']
NO_KEYS += ['"a", "b"', '"a";b', '"' + "a" * 256 + '"', "5", "?1", ":YQ==:"]


@pytest.mark.parametrize(("header", "key"), [(None, None), *KEYS.items()])
def test_an_idempotency_key_is_a_string_in_quotes(header: str | None, key: str | None) -> None:
    assert idempotency_key(header) == key


@pytest.mark.parametrize("header", NO_KEYS)
def test_no_other_idempotency_key_is_taken(header: str) -> None:
    wrong = 'Not a string in quotes, such as "8e03978e", of 1 to 255 characters.'
    with pytest.raises(QueryError) as refused:
        idempotency_key(header)
    assert refused.value.messages == {"Idempotency-Key": [wrong]}
