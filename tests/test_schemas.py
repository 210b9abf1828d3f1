"""Tests of what is read from outside, without HTTP or a database: JSON itself, the body and the query of a request."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from marshmallow import Schema, ValidationError

from names import NAMING_KEYS, Criteria
from rebinding import RebindRequest
from schemas import (
    QueryError,
    RebindRequestSchema,
    Unreadable,
    idempotency_key,
    in_a_line,
    parse_json,
    rebind_query,
    rebind_request,
    seconds,
)
from tables import FIRST_SECOND, LAST_SECOND

# JSON

JSON: dict[str, tuple[bytes, Any]] = {
    "an object": (b'{"a": {"a": [1, -2.5e3, true, null, "\\u00e9"]}}', {"a": {"a": [1, -2500.0, True, None, "é"]}}),
    "white space": (b" \t\r\n[ ] \n", []),
    "UTF-8": ('"é💌"'.encode(), "é💌"),
    "a pair of surrogates": (rb'"\ud83d\udc8c"', "💌"),
    "a lone surrogate": (rb'"\ud800"', "\ud800"),  # is JSON; check_text refuses it
    "NUL": (rb'"\u0000"', "\0"),
    "an empty key": (b'{"": 1}', {"": 1}),
    "one key in two objects": (b'[{"a": 1, "A": 2}, {"a": 2}]', [{"a": 1, "A": 2}, {"a": 2}]),
    "the largest double": (b"1.7976931348623157e308", 1.7976931348623157e308),
    "too small for a double": (b"1e-999", 0.0),
    "4300 digits": (b"9" * 4300, 10**4300 - 1),
}


@pytest.mark.parametrize(("text", "value"), JSON.values(), ids=JSON)
def test_json_is_read(text: bytes, value: Any) -> None:
    assert parse_json(text, "it") == value


NOT_JSON = {
    "empty": (b"", "Expecting value: line 1 column 1 (char 0)"),
    "cut": (b'{"a": 1', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
    "more after it": (b"{} {}", "Extra data: line 1 column 4 (char 3)"),
    "bad UTF-8": (b'"\xff"', "it is not UTF-8: invalid start byte at byte 1"),
    "a surrogate as UTF-8": (b'"\xed\xa0\x80"', "it is not UTF-8: invalid continuation byte at byte 1"),
    "UTF-16": ("{}".encode("utf-16"), "it is not UTF-8: invalid start byte at byte 0"),
    "BOM": (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)"),
    "NaN": (b"NaN", "NaN is not in the range of a double"),
    "Infinity": (b'{"a": Infinity}', "Infinity is not in the range of a double"),
    "-1e999": (b'{"a": [-1e999]}', "-1e999 is not in the range of a double"),
    "a key twice inside": (b'[{"b": {"": 1, "": 2}}]', "the key '' is given twice in one object"),
    "a key twice, escaped": (rb'{"\ud800": 1, "\ud800": 1}', r"the key '\ud800' is given twice in one object"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize(("text", "reason"), NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_refused_with_the_reason(text: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=rf"^it is not valid JSON: {re.escape(reason)}\Z"):
        parse_json(text, "it")


LOOKS_LIKE_JSON: dict[str, bytes] = {
    "a key of a million letters twice": b'{"%s": 1, "%s": 2}' % ((b"a" * 1_000_000,) * 2),
    "4301 digits": b"9" * 4301,
    "a million digits and a point": b"1" * 1_000_000 + b".0",
    "a key twice, one of them a surrogate pair": '{"😀": 1, "\\ud83d\\ude00": 2}'.encode(),
}


@pytest.mark.parametrize("text", LOOKS_LIKE_JSON.values(), ids=LOOKS_LIKE_JSON)
def test_what_only_looks_like_json_is_refused_with_a_short_reason(text: bytes) -> None:
    with pytest.raises(Unreadable, match=r"(?s)\A.{,299}\Z"):
        parse_json(text, "it")


# What is wrong, in a line

ERRORS: dict[str, tuple[Any, str]] = {
    "a field": ({"reason": ["Unknown."]}, "reason: Unknown."),
    "two reasons": ({"a": ["One.", "Two."]}, "a: One. Two."),
    "fields": ({"a": ["One."], "b": {0: {"c": ["Two."]}}}, "a: One.; b.0.c: Two."),
    "the whole": ({"_schema": ["Invalid input type."]}, "Invalid input type."),
    "a line break": ({"a\n\x1b\ud800": ["One."]}, r"a\n\x1b\ud800: One."),
    "as long as a line": ({"a" * 492: ["Wrong."]}, "a" * 492 + ": Wrong."),
    "longer": ({"a" * 493: ["Wrong."]}, "a" * 493 + ": Wrong…"),
    "thousands": ({str(n): ["x"] for n in range(80_000)}, "; ".join(f"{n}: x" for n in range(99))[:500] + "…"),
}


@pytest.mark.parametrize(("errors", "line"), ERRORS.values(), ids=ERRORS)
def test_errors_are_told_in_one_short_line(errors: Any, line: str) -> None:
    assert in_a_line(errors) == line


# Times

TIMES = {
    "2025-08-01T12:00:00Z": 1754049600,
    "2030-01-01t00:00:00z": 1893456000,
    "2025-08-01 12:00:00Z": 1754049600,
    "2025-08-01T12:00:00.5Z": 1754049600.5,
    "2025-08-01T12:00:00.123456789Z": 1754049600.123457,  # as KumoMTA writes them
    "2025-08-01T05:00:00-07:00": 1754049600,
    "2025-08-01T12:00:00-00:00": 1754049600,
    "1990-12-31T23:59:60Z": 662688000,
    "1990-12-31T15:59:60.5-08:00": 662688000.5,
    "1969-12-31T23:59:58.75Z": -1.25,
    "0001-01-01T00:00:00Z": FIRST_SECOND,
    "9999-12-31T23:59:59Z": LAST_SECOND,
}
NO_TIMES = ["", "now", "1e9", 5, None, "2026-W48", "2026-W48-1", "2026-330", "2026-11", "20261125", "20261124T100000Z"]
NO_TIMES += ["2026-11-25", "2026-11-25T", "2026-11-25Z", "2026-11-25T03", "2026-11-25T03:00", "2026-11-25T03:00Z"]
NO_TIMES += ["2026-11-25T03:00:00", "2026-11-25T24:00:00Z", "2026-11-25T03:00:00,5Z", "2026-11-25T03:00:60Z"]
NO_TIMES += ["2026-11-25T03:00:00+1", "2026-11-25T03:00:00+01", "2026-11-25T03:00:00+0100", "2026-11-25T03:00:00+24:00"]
NO_TIMES += ["0000-01-01T00:00:00Z", "10000-01-01T00:00:00Z", "٢٠٢٦-11-25T00:00:00Z", "2026-11-24T10:00:00.\u0665Z"]
NO_TIMES += [" 2026-11-25T03:00:00Z", "2026-11-25T03:00:00Z\n", "2026-02-30T10:00:00Z"]
NO_YEARS = ["0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01", "9999-12-31T23:59:60Z"]


@pytest.mark.parametrize(("text", "expected"), TIMES.items())
def test_a_time_is_one_of_rfc_3339(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", [*NO_TIMES, *NO_YEARS], ids=ascii)
def test_what_is_no_time_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(NO_YEAR if text in NO_YEARS else NO_TIME)}\Z"):
        seconds(text)


# A request to rebind

DATA = {"reason": "r", "data": {}}
NO_STRING, NO_BOOLEAN, NO_MAPPING = (["Not a valid string."], ["Not a valid boolean."], ["Not a valid mapping type."])
NO_TIME, NO_YEAR = "Not a time of RFC 3339, such as 2026-11-24T10:00:00Z.", "Not in the years 1 to 9999."
NULL, UNKNOWN, MISSING = ["Field may not be null."], ["Unknown field."], ["Missing data for required field."]
NUL, SURROGATE = ["a string must not contain NUL"], ["a string must be text that UTF-8 can express"]


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
    nulls = dict.fromkeys(("campaign", "tenant", "domain", "routing_domain"))
    assert read(DATA) == read(DATA | nulls) == RebindRequest("r", {}, actor="ada")
    assert errors(RebindRequestSchema(), {}) == {"reason": MISSING, "data": MISSING}


def test_every_field_of_a_request_is_read_as_it_stands() -> None:
    criteria = {"campaign": "", "tenant": " acme ", "domain": "Example.COM", "routing_domain": "mx"}
    body: dict[str, Any] = {"reason": " Cleaning up ", "data": {"": "", "é": "💌", "queue": "null"}}
    body |= dict.fromkeys(("trigger_rebind_event", "always_flush", "suppress_logging"), True)
    expected = RebindRequest(**body, criteria=Criteria(**criteria, queue=("b", "a"), id=("m1",)), actor="ada")
    assert read(body | criteria, queue=["b", "a", "b"], id="m1") == expected


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
        yield "data", {key: "", "x": ""}, {key: {"value": ["Must not be empty. To remove the key, use unset."]}}
    misspelt = ("campaing", "Domain", "domain ", "domain\u200b", "dom\u0430in")  # the last with a Cyrillic letter
    for field in (*misspelt, "$where", "__class__", "_schema", "dry_run", "limit", "", "\0", "\ud800", "a" * 100_000):
        yield field, "example.com", UNKNOWN


@pytest.mark.parametrize(
    ("field", "value", "wrong"), [pytest.param(*case, id=ascii(case[:2])[:60]) for case in wrong_fields()]
)
def test_a_wrong_value_is_an_error_and_never_coerced(field: str, value: Any, wrong: Any) -> None:
    assert errors(RebindRequestSchema(), DATA | {field: value}) == {field: wrong}


# The query

QUERIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"dry_run": "true"}, {"dry_run": True}),
    ({"dry_run": "false", "limit": "1"}, {"limit": 1}),
    ({"limit": "999999999999999999"}, {"limit": 10**18 - 1}),
    ({"unset": ["b", "a", "", "b"]}, {"unset": ("b", "a", "")}),
    ({"undo": "", "limit": "2"}, {"undo": "", "limit": 2}),
]


@pytest.mark.parametrize(("query", "fields"), QUERIES, ids=str)
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


def test_every_parameter_that_is_no_list_may_be_given_once() -> None:
    twice = {"limit": ["1", "1"], "dry_run": ["true", "false"], "undo": ["a", "a"]}
    assert query_errors(**twice) == {key: ["Given more than once."] for key in twice}


def test_a_key_or_an_id_that_cannot_be_stored_is_refused() -> None:
    wrong = {"unset": {1: NUL}, "undo": SURROGATE, "queue": {0: SURROGATE}, "id": {0: NUL}}
    assert query_errors(unset=["a", "\0"], undo="\ud800", queue="\ud800", id="\0") == wrong
    assert query_errors(id=[str(n) for n in range(100_001)]) == {"id": ["Must not be more than 100000 ids."]}


EVENT = {"trigger_rebind_event": True}
UNDO = {"undo": ["data must be {}, and undo cannot be combined with unset or trigger_rebind_event."]}
CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "unset with the event": (EVENT, {"unset": "a"}, {"unset": ["Not allowed with trigger_rebind_event."]}),
    "unset of a key that data sets": ({"data": {"é": ""}}, {"unset": ["a", "é"]}, {"unset": ["Set by data: '\\xe9'."]}),
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
