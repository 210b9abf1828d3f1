"""Tests of the route, from outside: requests to a real gunicorn, on each database, and what is in it afterwards."""

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import requests
from bulk import BATCH
from conftest import PATH, Service, launch, logged, message, start_service, stop_service, stored, until
from policy import PolicyError
from sqlalchemy import create_engine, make_url, text

from app import create_app
from queues import QueueRegistry
from store import MAX_NAME, StoreUnusable

MIB = 1024 * 1024
BODY = b'{"reason": "a test", "data": {"queue": "elsewhere"}, "always_flush": true}'  # would change all that is there


@dataclass
class Answer:
    """What came back to raw bytes, with the names that requests gives it."""

    status_code: int
    headers: http.client.HTTPMessage
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


def send(service: Service, *lines: str, body: bytes = b"") -> Answer:
    """Send a request as it stands, for what no client library would send; then say that nothing more will come."""
    head = "\r\n".join([*lines, "Host: localhost", "Connection: close", "", ""])
    with socket.create_connection(service.address) as connection:
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return Answer(response.status, response.headers, response.read())


def post(service: Service, *headers: str, body: bytes) -> Answer:
    """POST as `send` does."""
    return send(service, f"POST {PATH} HTTP/1.1", "Content-Type: application/json", *headers, body=body)


def chunks(body: bytes, size: int = 65536) -> Iterator[bytes]:
    """The body in pieces: requests sends an iterator chunked, without a Content-Length."""
    return (body[i : i + size] for i in range(0, len(body), size))


def padded(length: int) -> bytes:
    """BODY with as many spaces after it as make it `length` bytes: JSON that can be read wherever it is cut."""
    return BODY.ljust(length)


def is_problem(
    response: requests.Response | Answer, status: int, detail: str, errors: dict[str, Any] | None = None
) -> bool:
    """Assert that the answer is this problem document (RFC 9457), and nothing else."""
    problem = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    assert (response.status_code, response.headers["Content-Type"], response.json()) == (
        status,
        "application/problem+json",
        problem | ({"errors": errors} if errors else {}),
    )
    return True


def done(response: requests.Response | Answer) -> tuple[int, ...]:
    """How many messages were matched, moved and flushed, of an answer that is 200 and {}."""
    assert (response.status_code, response.headers["Content-Type"], response.json()) == (200, "application/json", {})
    return tuple(int(response.headers[f"Rebind-{name}"]) for name in ("Matched", "Moved", "Flushed"))


def state(url: str) -> dict[str, Any]:
    """All that a rebind may change."""
    return {"messages": stored(url), "log": logged(url)}


@contextmanager
def nothing_changes(url: str) -> Iterator[None]:
    """The messages and the log are the same afterwards."""
    before = state(url)
    yield
    assert state(url) == before


@pytest.fixture
def unchanged(queues: QueueRegistry, url: str, service: Service) -> Iterator[None]:
    """There are messages, and a record; the test must leave all as it is."""
    queues.load([message(id="m-ada", meta={"tenant": "acme"}), message("bob@example.org", id="m-bob")])
    assert done(service.rebind(domain="example.org", data={"tenant": "acme"})) == (1, 1, 1)
    with nothing_changes(url):
        yield


# The answer


def test_the_answer_is_an_empty_object_and_headers_that_say_what_was_done(
    queues: QueueRegistry, url: str, service: Service
) -> None:
    queues.load([message(meta={"queue": name}) for name in ("a", "b", "b")])
    response = service.rebind(data={"queue": "b"})
    assert (response.status_code, response.headers["Content-Type"], response.content) == (
        200,
        "application/json",
        b"{}\n",
    )
    ids = {record["rebind_id"] for record in logged(url)}
    assert len(ids) == 1
    assert {name: value for name, value in response.headers.items() if name.startswith("Rebind-")} == {
        "Rebind-Id": ids.pop(),
        "Rebind-Matched": "3",
        "Rebind-Moved": "1",
        "Rebind-Flushed": "1",
    }


def test_an_empty_database_has_nothing_to_match(url: str, service: Service) -> None:
    assert done(service.rebind()) == (0, 0, 0)
    assert state(url) == {"messages": [], "log": []}


def test_each_rebind_has_an_id_of_its_own(service: Service) -> None:
    assert service.rebind().headers["Rebind-Id"] != service.rebind().headers["Rebind-Id"]


# What one request does


def test_a_message_that_moves_into_another_matched_queue_is_handled_once(
    queues: QueueRegistry, url: str, service: Service
) -> None:
    queues.load([message(meta={"campaign": name}) for name in ("a", "b", "c")])
    assert done(service.rebind(data={"campaign": "b"})) == (3, 2, 2)
    assert [row["queue"] for row in stored(url)] == ["b:@example.com"] * 3
    assert [record["old_queue"] for record in logged(url)] == ["a:@example.com", "b:@example.com", "c:@example.com"]


CRITERIA = {
    "none": ({}, "abcdefg"),
    "null is none": ({"campaign": None, "tenant": None, "domain": None, "routing_domain": None}, "abcdefg"),
    "campaign": ({"campaign": "spring"}, "abf"),
    "a campaign is exact": ({"campaign": "Spring"}, ""),
    "tenant": ({"tenant": "acme"}, "ac"),
    "a tenant is exact": ({"tenant": "ACME"}, ""),
    "an empty tenant": ({"tenant": ""}, "bf"),
    "domain": ({"domain": "example.com"}, "abcde"),
    "a domain has no case": ({"domain": "EXAMPLE.Com"}, "abcde"),
    "a domain with a port": ({"domain": "relay.example:2525"}, "g"),
    "a domain without its port": ({"domain": "relay.example"}, ""),
    "routing domain": ({"routing_domain": "mx.example"}, "e"),
    "a routing domain has no case": ({"routing_domain": "MX.EXAMPLE"}, "e"),
    "an empty routing domain": ({"routing_domain": ""}, ""),
    "all of them": ({"campaign": "spring", "tenant": "", "domain": "PINNED.example"}, "f"),
    "all but one": ({"campaign": "spring", "tenant": "acme", "domain": "pinned.example"}, ""),
    "the name, not the metadata": ({"domain": "example.net"}, ""),
}


@pytest.mark.parametrize(("criteria", "ids"), CRITERIA.values(), ids=CRITERIA)
def test_criteria_choose_the_queues_by_their_names(
    queues: QueueRegistry, service: Service, url: str, criteria: dict[str, Any], ids: str
) -> None:
    queues.load(
        [
            message("x@Example.COM", id="a", meta={"campaign": "spring", "tenant": "acme"}),
            message(id="b", meta={"campaign": "spring"}),
            message(id="c", meta={"tenant": "acme"}),
            message(id="d"),
            message(id="e", meta={"routing_domain": "mx.example"}),
            message("x@example.net", id="f", meta={"queue": "spring:@Pinned.example", "tenant": "acme"}),
            message("x@example.net", id="g", meta={"queue": "relay.example:2525"}),
        ]
    )
    assert done(service.rebind(**criteria)) == (len(ids), 0, 0)
    assert "".join(record["id"] for record in logged(url)) == ids


def test_data_is_set_over_any_earlier_value_and_the_rest_stays(
    queues: QueueRegistry, url: str, service: Service
) -> None:
    kept = {"null": None, "object": {"null": None, "é": [1, 2.5, True]}, "big": 2**53 + 1, "": "empty"}
    queues.load([message(meta=kept | {"a": "old", "b": {"deep": "old"}, "c": ["old"], "d": None, "e": 1})])
    data = {name: f"new {name}" for name in "abcdef"}
    assert done(service.rebind(data=data)) == (1, 0, 0)
    assert stored(url)[0]["meta"] == kept | data


@pytest.mark.parametrize(
    "key",
    [
        "",
        " ",
        "é",
        "ключ",
        "💌",
        '"',
        "'",
        "a.b",
        "$.a",
        "a[0]",
        "\\",
        "\n",
        "\x01",
        "\x7f",
        "%s",
        ":key",
        "__proto__",
        "x" * 999,
    ],
    ids=ascii,
)
def test_a_key_of_data_may_be_any_text(queues: QueueRegistry, url: str, service: Service, key: str) -> None:
    queues.load([message(meta={key: "old", "other": "stays"}), message()])
    assert done(service.rebind(data={key: f"<{key}>"})) == (2, 0, 0)
    assert [row["meta"] for row in stored(url)] == [{key: f"<{key}>", "other": "stays"}, {key: f"<{key}>"}]


NAMES = {
    "none": ({}, {"x": "y"}, "example.com"),
    "tenant": ({}, {"tenant": "acme"}, "acme@example.com"),
    "campaign": ({}, {"campaign": "spring"}, "spring:@example.com"),
    "routing domain": ({}, {"routing_domain": "mx.example"}, "example.com!mx.example"),
    "set and had": ({"tenant": "acme"}, {"campaign": "s", "routing_domain": "r"}, "s:acme@example.com!r"),
    "empty is set": ({"tenant": "acme"}, {"tenant": ""}, "@example.com"),
    "pinned": ({"tenant": "acme"}, {"queue": "relay.example:2525"}, "relay.example:2525"),
    "null is a name like any other": ({}, {"queue": "null"}, "null"),
    "pinned to nothing": ({}, {"queue": ""}, ""),
    "pinned before": ({"queue": "there"}, {"campaign": "spring"}, "there"),
    "quotes": ({}, {"tenant": "o'\"hara", "campaign": "é\\"}, "é\\:o'\"hara@example.com"),
}


@pytest.mark.parametrize(("meta", "data", "name"), NAMES.values(), ids=NAMES)
def test_the_queue_is_named_anew(
    queues: QueueRegistry, url: str, service: Service, meta: dict[str, Any], data: dict[str, str], name: str
) -> None:
    queues.load([message("ada@Example.COM", meta=meta)])
    assert service.rebind(data=data).ok
    assert [(row["queue"], row["meta"]) for row in stored(url)] == [(name, meta | data)]


def test_only_a_moved_message_is_due_now_and_all_else_of_it_stays(
    queues: QueueRegistry, url: str, service: Service
) -> None:
    queues.load([message(due=4e9, num_attempts=3, meta={"queue": "a"}), message(due=4e9, meta={"queue": "b"})])
    moves, stays = stored(url)
    start = time.time()
    assert done(service.rebind(data={"queue": "b"})) == (2, 1, 1)
    moved, stayed = stored(url)
    assert start <= moved["due"] <= time.time()
    assert moved == moves | {"queue": "b", "meta": {"queue": "b"}, "due": moved["due"]}
    assert stayed == stays


def test_always_flush_makes_every_matched_message_due_now(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message(due=4e9), message(due=1e9), message("bob@example.org", due=4e9)])
    one, two, other = stored(url)
    start = time.time()
    assert done(service.rebind(domain="example.com", always_flush=True)) == (2, 0, 2)
    due = stored(url)[0]["due"]
    assert start <= due <= time.time()
    assert stored(url) == [one | {"due": due}, two | {"due": due}, other]


def test_a_record_is_written_of_each_matched_message_moved_or_not(
    queues: QueueRegistry, url: str, service: Service
) -> None:
    queues.load([message(meta={"queue": "a"}), message(meta={"queue": "b"}), message(meta={"queue": "c"})])
    reason = "Cleaning up “a” 'n' \"c\"; :actor ? %s \\'\n-- END"
    response = service.rebind(data={"queue": "b"}, reason=reason)
    assert [
        {k: record[k] for k in ("type", "queue", "old_queue", "reason", "actor", "rebind_id", "meta")}
        for record in logged(url)
    ] == [
        {
            "type": "AdminRebind",
            "queue": "b",
            "old_queue": old,
            "reason": reason,
            "actor": "127.0.0.1",
            "rebind_id": response.headers["Rebind-Id"],
            "meta": {"queue": "b"},
        }
        for old in "abc"
    ]


def test_suppress_logging_writes_no_records(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message()])
    assert done(service.rebind(data={"queue": "b"}, suppress_logging=True)) == (1, 1, 1)
    assert logged(url) == []


def test_every_field_at_once(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message(meta={"campaign": "c", "tenant": "t", "routing_domain": "r"}), message()])
    rebound = service.rebind(
        campaign="c",
        tenant="t",
        domain="example.com",
        routing_domain="r",
        data={"queue": "q"},
        trigger_rebind_event=True,
        always_flush=True,
        suppress_logging=True,
    )
    assert done(rebound) == (1, 1, 1)
    assert ([row["queue"] for row in stored(url)], logged(url)) == (["q", "example.com"], [])


# The event


def test_with_the_event_the_handlers_alone_decide(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message(meta={"tenant": "acme"})])
    before = stored(url)[0]
    data = {"recipient": "Bob@Example.ORG", "sender": "", "sign": "é", "not": "set"}
    assert done(service.rebind(data=data, trigger_rebind_event=True)) == (1, 1, 1)
    after = stored(url)[0]
    assert after == before | {
        "sender": "",
        "recipient": "Bob@Example.ORG",
        "domain": "example.org",
        "queue": "acme@example.org",
        "meta": {"tenant": "acme", "signed": {"by": ["policy", "é"], "times": 1}},
        "due": after["due"],
    }
    assert [(r["old_queue"], r["queue"], r["recipient"]) for r in logged(url)] == [
        ("acme@example.com", "acme@example.org", "Bob@Example.ORG")
    ]


def test_handlers_that_do_nothing_leave_the_message_as_it_is(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message(meta={"tenant": "acme"})])
    before = stored(url)
    assert done(service.rebind(data={"x": "y"}, trigger_rebind_event=True)) == (1, 0, 0)
    assert (stored(url), len(logged(url))) == (before, 1)


HANDLER_FAILURES = {
    "it raises": (
        {"fail": "m-bob"},
        "the handler rebind_policy.obey failed for message m-bob: RuntimeError: as it was told",
    ),
    "it leaves no address": (
        {"recipient": "nobody"},
        "the handler rebind_policy.obey failed for message m-ada: ValueError: 'nobody' is no address local@domain",
    ),
}


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
@pytest.mark.parametrize(("data", "detail"), HANDLER_FAILURES.values(), ids=HANDLER_FAILURES)
@pytest.mark.usefixtures("unchanged")
def test_a_handler_that_fails_is_named_with_its_message(
    service: Service, query: str, data: dict[str, str], detail: str
) -> None:
    response = service.rebind(query, data=data | {"queue": "elsewhere"}, trigger_rebind_event=True)
    assert is_problem(response, 500, detail)


def test_a_handler_that_fails_late_undoes_what_was_done_before(
    queues: QueueRegistry, url: str, service: Service
) -> None:
    queues.load([message(id=f"m-{n}") for n in range(BATCH + 1)])
    with nothing_changes(url):
        response = service.rebind(data={"fail": f"m-{BATCH}", "queue": "elsewhere"}, trigger_rebind_event=True)
    assert response.status_code == 500
    assert done(service.rebind(data={"queue": "elsewhere"}, trigger_rebind_event=True)) == (BATCH + 1,) * 3


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
@pytest.mark.parametrize("query", ["", "?dry_run=true"])
def test_a_name_too_long_for_a_queue_is_refused_and_not_to_be_sent_again(
    service: Service, event: bool, query: str
) -> None:
    response = service.rebind(query, data={"queue": "é" * (MAX_NAME // 2) + "x"}, trigger_rebind_event=event)
    assert is_problem(response, 422, f"the name of a queue is longer than {MAX_NAME} bytes")
    assert "Retry-After" not in response.headers


# The query


@pytest.mark.parametrize("event", [False, True], ids=["data", "event"])
def test_a_dry_run_answers_the_same_and_changes_nothing(
    queues: QueueRegistry, url: str, service: Service, event: bool
) -> None:
    queues.load([message(), message(meta={"queue": "b"}), message("bob@example.org")])
    body: dict[str, Any] = {"data": {"queue": "b"}, "trigger_rebind_event": event}
    with nothing_changes(url):
        dry = service.rebind("?dry_run=true", **body)
    assert done(dry) == done(service.rebind("?dry_run=false", **body)) == (3, 2, 2)


def test_a_dry_run_with_a_limit_and_always_flush_answers_the_same(
    queues: QueueRegistry, url: str, service: Service
) -> None:
    queues.load([message(due=due, meta={"queue": queue}) for due, queue in ((3, "a"), (2, "b"), (1, "b"))])
    with nothing_changes(url):
        dry = service.rebind("?dry_run=true&limit=2", data={"queue": "a"}, always_flush=True)
    assert done(dry) == done(service.rebind("?limit=2", data={"queue": "a"}, always_flush=True)) == (2, 2, 2)


LIMITS = {"1": "d", "2": "db", "3": "dba", "4": "dbac", "999999999999999999": "dbac"}


@pytest.mark.parametrize(("limit", "ids"), LIMITS.items(), ids=LIMITS)
def test_a_limit_handles_those_due_soonest(
    queues: QueueRegistry, url: str, service: Service, limit: str, ids: str
) -> None:
    queues.load([message(id=id, due=due) for id, due in (("a", 3e9), ("b", 2e9), ("c", 4e9), ("d", 1e9))])
    assert done(service.rebind(f"?limit={limit}", data={"queue": "b"})) == (len(ids),) * 3
    assert {row["id"] for row in stored(url) if row["queue"] == "b"} == set(ids)
    assert {record["id"] for record in logged(url)} == set(ids)


def test_a_limit_counts_matched_messages_only(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message("bob@example.org", due=1), message(due=2), message(due=3)])
    assert done(service.rebind("?limit=1", domain="example.com", data={"queue": "b"})) == (1, 1, 1)
    assert [row["queue"] for row in stored(url)] == ["example.org", "b", "example.com"]


NO_BOOLEAN, NO_LIMIT = ["Not a valid boolean."], ["Not a whole number from 1 to 10^18 - 1."]
BAD_QUERIES: dict[str, dict[str, Any]] = {
    "dry_run=yes": {"dry_run": NO_BOOLEAN},
    "dry_run=True": {"dry_run": NO_BOOLEAN},
    "dry_run=1": {"dry_run": NO_BOOLEAN},
    "dry_run=": {"dry_run": NO_BOOLEAN},
    "dry_run": {"dry_run": NO_BOOLEAN},
    "dry_run=true%20": {"dry_run": NO_BOOLEAN},
    "dry_run=true;limit=1": {"dry_run": NO_BOOLEAN},
    "limit=0": {"limit": NO_LIMIT},
    "limit=-1": {"limit": NO_LIMIT},
    "limit=1.5": {"limit": NO_LIMIT},
    "limit=%2B1": {"limit": NO_LIMIT},
    "limit=+1": {"limit": NO_LIMIT},
    "limit=%201": {"limit": NO_LIMIT},
    "limit=1%0A": {"limit": NO_LIMIT},
    "limit=1%00": {"limit": NO_LIMIT},
    "limit=01": {"limit": NO_LIMIT},
    "limit=%D9%A3": {"limit": NO_LIMIT},
    "limit=1e3": {"limit": NO_LIMIT},
    "limit=1_0": {"limit": NO_LIMIT},
    "limit=": {"limit": NO_LIMIT},
    "limit=null": {"limit": NO_LIMIT},
    "limit=1000000000000000000": {"limit": NO_LIMIT},
    "limit=" + "9" * 3000: {"limit": NO_LIMIT},
    "limit=x&dry_run=x": {"limit": NO_LIMIT, "dry_run": NO_BOOLEAN},
    "limit=1&limit=1": {"limit": ["Given twice."]},
    "dry_run=true&dry_run=false": {"dry_run": ["Given twice."]},
    "dryrun=true": {"dryrun": ["Unknown field."]},
    "Dry_run=true": {"Dry_run": ["Unknown field."]},
    "domain=example.com": {"domain": ["Unknown field."]},
    "=": {"": ["Unknown field."]},
    "%FF=%FF": {"%FF": ["Unknown field."]},
}


@pytest.mark.parametrize(("query", "errors"), BAD_QUERIES.items(), ids=[query[:40] for query in BAD_QUERIES])
@pytest.mark.usefixtures("unchanged")
def test_a_query_that_is_not_understood_is_refused(service: Service, query: str, errors: dict[str, Any]) -> None:
    response = send(
        service,
        f"POST {PATH}?{query} HTTP/1.1",
        "Content-Type: application/json",
        f"Content-Length: {len(BODY)}",
        body=BODY,
    )
    assert is_problem(response, 400, "the query is not understood: see errors", errors)


# The body as JSON

NOT_JSON = {
    "empty": b"",
    "blank": b" \n",
    "text": b"data",
    "form": b"reason=a&data=b",
    "cut": BODY[:-1],
    "more after it": BODY + b"}",
    "two": BODY * 2,
    "trailing comma": BODY[:-1] + b",}",
    "comment": BODY + b"// done",
    "single quotes": BODY.replace(b'"', b"'"),
    "raw newline": BODY.replace(b"a test", b"a\ntest"),
    "NUL after it": BODY + b"\0",
    "bad UTF-8": BODY.replace(b"a test", b"\xff"),
    "overlong UTF-8": BODY.replace(b"a test", b"\xc0\xaf"),
    "a surrogate as UTF-8": BODY.replace(b"a test", b"\xed\xa0\x80"),
    "latin-1": BODY.replace(b"a test", "é".encode("latin-1")),
    "UTF-16": BODY.decode().encode("utf-16"),
    "UTF-16 without a BOM": BODY.decode().encode("utf-16-le"),
    "UTF-32": BODY.decode().encode("utf-32"),
    "BOM": b"\xef\xbb\xbf" + BODY,
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    "NaN": BODY.replace(b"true", b"NaN"),
    "Infinity": BODY.replace(b"true", b"Infinity"),
    "-Infinity": BODY.replace(b"true", b"-Infinity"),
    "1e999": BODY.replace(b"true", b"1e999"),
    "5000 digits": BODY.replace(b"true", b"9" * 5000),
    "a key twice": BODY[:-1] + b', "always_flush": false}',
    "a key twice, escaped": BODY[:-1] + rb', "always\u005fflush": false}',
    "a key twice in data": BODY.replace(b'{"queue"', b'{"queue": "there", "queue"'),
    "nested 100,000 deep": BODY.replace(b"true", b"[" * 100_000 + b"]" * 100_000),
    "100,000 brackets": b"[" * 100_000,
    "100,000 braces": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.usefixtures("unchanged")
def test_a_body_that_is_not_json_is_refused(service: Service, body: bytes) -> None:
    response = service.post(body)
    detail = response.json()["detail"]
    assert detail.startswith("the body is not JSON that can be read: ")
    assert is_problem(response, 400, detail)


@pytest.mark.usefixtures("unchanged")
def test_a_body_that_ends_before_its_content_length_is_refused(service: Service) -> None:
    response = post(service, f"Content-Length: {len(BODY) + 1}", body=BODY)
    assert is_problem(response, 400, "the body ends before its Content-Length")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "end", [b"", b"\r\n", b"\r\n5\r\n  ", b"\r\nno size\r\n"], ids=["in it", "after it", "in the next", "no size"]
)
def test_a_chunked_body_that_ends_before_its_last_chunk_is_refused(service: Service, end: bytes) -> None:
    response = post(service, "Transfer-Encoding: chunked", body=b"%x\r\n%s%s" % (len(BODY), BODY, end))
    assert is_problem(response, 400, response.json()["detail"])


@pytest.mark.usefixtures("unchanged")
def test_no_body_at_all_is_refused(service: Service) -> None:
    assert post(service, body=b"").status_code == 400


# The size of the body


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
def test_a_body_of_exactly_1_mib_is_read(queues: QueueRegistry, url: str, service: Service, chunked: bool) -> None:
    queues.load([message()])
    body = padded(MIB)
    response = requests.post(
        service.base + PATH,
        data=chunks(body) if chunked else body,
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert done(response) == (1, 1, 1)


@pytest.mark.parametrize("length", [MIB + 1, MIB + 2, 3 * MIB])
@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
@pytest.mark.usefixtures("unchanged")
def test_a_body_of_more_than_1_mib_is_refused(service: Service, chunked: bool, length: int) -> None:
    body = padded(length)
    response = requests.post(
        service.base + PATH,
        data=chunks(body) if chunked else body,
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert is_problem(response, 413, "The data value transmitted exceeds the capacity limit.")


@pytest.mark.usefixtures("unchanged")
def test_a_body_that_says_that_it_is_too_large_is_refused_unread(service: Service) -> None:
    response = post(service, "Content-Length: 99999999999999999999", body=BODY)
    assert is_problem(response, 413, "The data value transmitted exceeds the capacity limit.")


# The content type


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "application/json-seq",
        "application/problem+json",
        "application/*",
        "application/json, application/json",
        "application",
        "; application/json",
    ],
)
@pytest.mark.usefixtures("unchanged")
def test_another_content_type_is_refused(service: Service, content_type: str) -> None:
    assert is_problem(service.post(BODY, content_type), 415, "the content type must be application/json")


@pytest.mark.usefixtures("unchanged")
def test_a_body_without_a_content_type_is_refused(service: Service) -> None:
    response = send(service, f"POST {PATH} HTTP/1.1", f"Content-Length: {len(BODY)}", body=BODY)
    assert is_problem(response, 415, "the content type must be application/json")


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON", "application/json;charset=utf-8", 'application/json ; x="y;z"'],
)
def test_the_content_type_may_have_parameters(service: Service, content_type: str) -> None:
    assert done(service.post(BODY, content_type)) == (0, 0, 0)


# The path and the method


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "//api/admin/rebind/v1",
        "/api//admin/rebind/v1",
        "/api/admin/rebind/v1/",
        "/api/admin/rebind/v1//",
        "/api/admin/rebind",
        "/api/admin/rebind/v2",
        "/API/admin/rebind/v1",
        "/api/admin/rebind/v1%20",
        "/static/app.js",
        "/%FF",
    ],
)
@pytest.mark.usefixtures("unchanged")
def test_another_path_is_not_found(service: Service, path: str) -> None:
    response = send(
        service, f"POST {path} HTTP/1.1", "Content-Type: application/json", f"Content-Length: {len(BODY)}", body=BODY
    )
    detail = response.json()["detail"]
    assert detail.startswith("The requested URL was not found on the server.")
    assert is_problem(response, 404, detail)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "REBIND"])
@pytest.mark.usefixtures("unchanged")
def test_another_method_is_not_allowed(service: Service, method: str) -> None:
    response = requests.request(method, service.base + PATH, data=BODY, timeout=60)
    assert is_problem(response, 405, "The method is not allowed for the requested URL.")
    assert response.headers["Allow"] == "POST"


@pytest.mark.usefixtures("unchanged")
def test_head_is_not_allowed(service: Service) -> None:
    response = requests.head(service.base + PATH, timeout=60)
    headers = {name: response.headers[name] for name in ("Allow", "Content-Type")}
    assert (response.status_code, headers, response.content) == (
        405,
        {"Allow": "POST", "Content-Type": "application/problem+json"},
        b"",
    )


def test_the_application_has_one_route_and_one_blueprint(tmp_path: Path) -> None:
    app = create_app({"DATABASE_URL": f"sqlite:///{tmp_path / 'queues.db'}"})
    assert [(rule.rule, rule.methods) for rule in app.url_map.iter_rules()] == [(PATH, {"POST"})]
    assert list(app.blueprints) == ["admin"]


# The body as a request

SHOULD_BE = "the body is not a request to rebind: see errors"
NO_STRING, NULL = ["Not a valid string."], ["Field may not be null."]
NUL, SURROGATE = ["a string must not hold a NUL"], ["a string must not hold a lone surrogate"]
WRONG_FIELDS: dict[str, tuple[str, Any, Any]] = {
    "reason null": ("reason", None, NULL),
    "reason a number": ("reason", 5, NO_STRING),
    "reason with a NUL": ("reason", "a\0b", NUL),
    "reason with a surrogate": ("reason", "a\ud800", SURROGATE),
    "campaign a number": ("campaign", 5, NO_STRING),
    "tenant a list": ("tenant", ["acme"], NO_STRING),
    "domain a boolean": ("domain", False, NO_STRING),
    "domain with a NUL": ("domain", "example.com\0", NUL),
    "routing domain with a surrogate": ("routing_domain", "\udc00\ud800", SURROGATE),
    "event 1": ("trigger_rebind_event", 1, NO_BOOLEAN),
    "flush yes": ("always_flush", "yes", NO_BOOLEAN),
    "flush null": ("always_flush", None, NULL),
    "logging true as text": ("suppress_logging", "true", NO_BOOLEAN),
    "data null": ("data", None, NULL),
    "data a list": ("data", [["queue", "b"]], ["Not a valid mapping type."]),
    "data with a number": ("data", {"queue": "b", "x": 5}, {"x": {"value": NO_STRING}}),
    "data with a null": ("data", {"queue": None}, {"queue": {"value": NULL}}),
    "data with NULs": ("data", {"a\0": "\0"}, {"a\0": {"key": NUL, "value": NUL}}),
    "data with surrogates": ("data", {"\ud800": "\udfff"}, {"\ud800": {"key": SURROGATE, "value": SURROGATE}}),
    "misspelt": ("campaing", "spring", ["Unknown field."]),
    "a surrogate for a name": ("\ud800", "", ["Unknown field."]),
    "a parameter of the query": ("dry_run", True, ["Unknown field."]),
}


@pytest.mark.parametrize(("field", "value", "errors"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
@pytest.mark.usefixtures("unchanged")
def test_a_field_with_a_wrong_value_is_named(service: Service, field: str, value: Any, errors: Any) -> None:
    body = {"reason": "a test", "data": {"queue": "elsewhere"}, "always_flush": True} | {field: value}
    assert is_problem(service.post(json.dumps(body).encode()), 422, SHOULD_BE, {field: errors})


MISSING = ["Missing data for required field."]
NOT_THE_OBJECT = {
    "{}": {"reason": MISSING, "data": MISSING},
    '{"reason": "a"}': {"data": MISSING},
    '{"data": {"queue": "b"}}': {"reason": MISSING},
    '{"data": {"queue": "b"}, "x": 1}': {"reason": MISSING, "x": ["Unknown field."]},
    "[]": {"_schema": ["Invalid input type."]},
    "[" + BODY.decode() + "]": {"_schema": ["Invalid input type."]},
    '"data"': {"_schema": ["Invalid input type."]},
    "null": {"_schema": ["Invalid input type."]},
    "0": {"_schema": ["Invalid input type."]},
    "false": {"_schema": ["Invalid input type."]},
}


@pytest.mark.parametrize(("body", "errors"), NOT_THE_OBJECT.items(), ids=NOT_THE_OBJECT)
@pytest.mark.usefixtures("unchanged")
def test_json_that_is_not_the_object_is_refused(service: Service, body: str, errors: dict[str, Any]) -> None:
    assert is_problem(service.post(body.encode()), 422, SHOULD_BE, errors)


@pytest.mark.usefixtures("unchanged")
def test_deep_nesting_that_can_be_read_is_a_wrong_value(service: Service) -> None:
    response = service.post(BODY.replace(b'"elsewhere"', b"[" * 500 + b"]" * 500))
    assert is_problem(response, 422, SHOULD_BE, {"data": {"queue": {"value": NO_STRING}}})


# The database


@pytest.fixture(scope="module")
def plain_gunicorn(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gunicorn without a policy, that does not wait long for a lock."""
    service = start_service(tmp_path_factory.mktemp("plain"), url, REBIND_BUSY_TIMEOUT="0.2")
    yield service
    stop_service(service)


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
@pytest.mark.usefixtures("unchanged")
def test_the_event_without_a_handler_is_a_conflict(plain_gunicorn: Service, query: str) -> None:
    response = plain_gunicorn.rebind(query, data={"queue": "b"}, trigger_rebind_event=True)
    assert is_problem(response, 409, "no handler is connected to the rebind event")


@contextmanager
def locked(url: str, row_only: bool) -> Iterator[None]:
    """While this lasts, another has the database's write lock, or on PostgreSQL the rebinds' turn or one row's lock."""
    engine = create_engine(url)
    with engine.connect() as db:
        if db.dialect.name == "sqlite":
            db.exec_driver_sql("BEGIN IMMEDIATE")
        elif row_only:
            db.execute(text("SELECT * FROM messages ORDER BY key LIMIT 1 FOR UPDATE"))
        else:
            db.execute(text("SELECT pg_advisory_xact_lock(hashtext('rebind'))"))
        yield
        db.rollback()
    engine.dispose()


@pytest.mark.parametrize("row_only", [False, True], ids=["all", "one row"])
@pytest.mark.usefixtures("unchanged")
def test_a_lock_held_too_long_is_503_and_the_next_request_succeeds(
    url: str, plain_gunicorn: Service, row_only: bool
) -> None:
    with locked(url, row_only):
        response = plain_gunicorn.rebind(data={"queue": "b"}, always_flush=True)
    detail = response.json()["detail"]
    assert detail.startswith("the database cannot do this now: ")
    assert is_problem(response, 503, detail)
    assert response.headers["Retry-After"] == "5"
    assert done(plain_gunicorn.rebind(domain="no.such.example")) == (0, 0, 0)


@pytest.mark.usefixtures("unchanged")
def test_a_dry_run_waits_for_no_lock(url: str, plain_gunicorn: Service) -> None:
    with locked(url, row_only=False), locked(url, row_only=True) if "postgresql" in url else nothing_changes(url):
        assert done(plain_gunicorn.rebind("?dry_run=true", data={"queue": "b"})) == (2, 2, 2)


@pytest.mark.parametrize(
    "nowhere", ["sqlite:////nowhere/queues.db", "postgresql+psycopg://postgres@/x?host=/nowhere"], ids=["file", "host"]
)
def test_a_database_out_of_reach_is_503(nowhere: str) -> None:
    client = create_app({"DATABASE_URL": nowhere}).test_client()
    response = client.post(PATH, data=BODY, content_type="application/json")
    problem = response.get_json()
    assert problem.pop("detail").startswith("the database cannot do this now: ")
    assert problem == {"type": "about:blank", "title": "Service Unavailable", "status": 503}
    assert (response.status_code, response.headers["Content-Type"]) == (503, "application/problem+json")
    assert response.headers["Retry-After"] == "5"


# Starting


@pytest.fixture
def new_url(url: str, tmp_path: Path) -> Iterator[str]:
    """A database of the same kind, with nothing in it."""
    if url.startswith("sqlite"):
        yield f"sqlite:///{tmp_path / 'new.db'}"
        return
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as db:
        db.execute(text("CREATE DATABASE new"))
        yield make_url(url).set(database="new").render_as_string(hide_password=False)
        db.execute(text("DROP DATABASE new WITH (FORCE)"))
    engine.dispose()


@pytest.mark.parametrize("attempt", range(2))
def test_two_services_that_start_at_once_on_an_empty_database_both_come_up(
    new_url: str, tmp_path: Path, attempt: int
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    # With one worker each, which has answered: gunicorn waits for one that was told to stop before it could listen.
    services = [launch(folder, new_url, "--workers", "1") for folder in folders]
    for service in services:
        until(service.listens_or_ended)
        assert done(service.rebind()) == (0, 0, 0)
    for service in services:
        service.process.terminate()
    assert [service.process.wait(60) for service in services] == [0, 0]
    output = [line for service in services for line in service.output.read_text().splitlines()]
    unexpected = [line for line in output if "INFO" not in line and f'"POST {PATH} HTTP/1.1" 200' not in line]
    assert unexpected == []


def stops(service: Service, reason: str) -> bool:
    """Assert that gunicorn stopped by itself, and that nothing but one line tells why: no traceback, no second try."""
    until(lambda: service.process.poll() is not None)
    output = service.output.read_text().splitlines()
    assert output == [f"rebind cannot start: {reason}"]
    return service.process.returncode != 0


def test_a_policy_that_cannot_be_loaded_stops_gunicorn(tmp_path: Path) -> None:
    policy = tmp_path / "site.py"
    policy.write_text("import no_such_module")
    service = launch(tmp_path, f"sqlite:///{tmp_path / 'queues.db'}", REBIND_POLICY=str(policy))
    reason = "ModuleNotFoundError: No module named 'no_such_module'"
    assert stops(service, f"the policy {policy} cannot be loaded: {reason}")


def test_a_bad_database_url_stops_gunicorn(tmp_path: Path) -> None:
    service = launch(tmp_path, "mysql://localhost/x")
    assert stops(service, "the database URL cannot be used: mysql is neither sqlite nor postgresql")


def test_a_file_that_is_no_database_stops_gunicorn_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "queues.db"
    file.write_bytes(b"no database" * 1000)
    service = launch(tmp_path, f"sqlite:///{file}")
    assert stops(service, "the database is damaged, or is none: file is not a database")
    assert file.read_bytes() == b"no database" * 1000


POLICIES = {
    "syntax": ("def", "SyntaxError: "),
    "raises": ("raise KeyError('x')", "KeyError: 'x'"),
    "exits": ("raise SystemExit(0)", "SystemExit: 0"),
    "missing": (None, "FileNotFoundError: "),
}


@pytest.mark.parametrize(("source", "reason"), POLICIES.values(), ids=POLICIES)
def test_a_policy_that_cannot_be_loaded_is_named_with_the_reason(
    tmp_path: Path, source: str | None, reason: str
) -> None:
    policy = tmp_path / "site.py"
    if source is not None:
        policy.write_text(source)
    with pytest.raises(PolicyError, match=re.escape(f"the policy {policy} cannot be loaded: {reason}")):
        create_app({"DATABASE_URL": f"sqlite:///{tmp_path / 'queues.db'}", "POLICY": str(policy)})


def test_a_policy_that_is_no_python_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=re.escape("the policy README is no Python file (*.py)")):
        create_app({"DATABASE_URL": f"sqlite:///{tmp_path / 'queues.db'}", "POLICY": "README"})


@pytest.mark.parametrize(
    "bad", ["", "queues.db", "//", "sqlite+nothing:///x", "postgresql+psycopg2://localhost/x", "oracle://localhost/x"]
)
def test_a_bad_database_url_is_refused(bad: str) -> None:
    with pytest.raises(StoreUnusable, match="the database URL cannot be used: "):
        create_app({"DATABASE_URL": bad})


# The diagnostic log


def test_a_path_cannot_forge_a_line_of_the_log(service: Service) -> None:
    assert send(service, "GET /a%0Ab%0Dc HTTP/1.1").status_code == 404
    assert [line for line in service.output.read_text().splitlines() if line.endswith(r"GET '/a\nb\rc' 404 ")] != []
