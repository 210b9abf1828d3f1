"""Tests of the route, from outside: what of HTTP reaches the registry, and what comes back.

What a rebind does is tested in test_registry.py, and which JSON is a request in test_schemas.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import (
    MIB,
    PATH,
    Service,
    Start,
    done,
    is_problem,
    is_unavailable,
    locked,
    logged,
    message,
    names,
    new_database,
    nothing_changes,
    until,
)

from app import create_app
from event import PolicyError
from queues import QueueRegistry
from store import MAX_NAME, StoreUnusable

BODY = b'{"reason": "a test", "data": {"queue": "elsewhere"}, "always_flush": true}'  # would change all that is there
JSON = {"Content-Type": "application/json"}
RUN = f"POST {PATH} HTTP/1.1", "Content-Type: application/json"  # the first lines of a request


def chunks(body: bytes, size: int = 65536) -> Iterator[bytes]:
    """The body in pieces: requests sends an iterator chunked, without a Content-Length."""
    return (body[i : i + size] for i in range(0, len(body), size))


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
    (rebind_id,) = {record["rebind_id"] for record in logged(url)}
    assert {name: value for name, value in response.headers.items() if name.startswith("Rebind-")} == {
        "Rebind-Id": rebind_id,
        "Rebind-Matched": "3",
        "Rebind-Moved": "1",
        "Rebind-Flushed": "1",
    }


def test_every_field_of_the_body_reaches_the_registry(queues: QueueRegistry, url: str, service: Service) -> None:
    body: dict[str, Any] = {"campaign": "c", "tenant": "t", "domain": "example.com", "routing_domain": "r"}
    queues.load([message(meta={"campaign": "c", "tenant": "t", "routing_domain": "r"}), message(due=4e9)])
    reason = "Cleaning up “a” 'n' \"c\"; :actor ? %s \\'\n-- END"
    rebound = service.rebind(**body, reason=reason, data={"queue": "b", "sign": "é"}, trigger_rebind_event=True)
    assert done(rebound) == (1, 1, 1)
    assert [(row["queue"], row["reason"], row["actor"], row["meta"]["signed"]) for row in logged(url)] == [
        ("b", reason, "127.0.0.1", {"by": ["policy", "é"], "times": 1})
    ]
    assert done(service.rebind(always_flush=True, suppress_logging=True)) == (2, 0, 2)
    assert (names(url), len(logged(url))) == (["b", "example.com"], 1)


def test_every_parameter_of_the_query_reaches_the_registry(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message(due=due, meta={"queue": queue}) for due, queue in ((3, "a"), (2, "b"), (1, "c"))])
    with nothing_changes(url):
        assert done(service.rebind("?dry_run=true&limit=2", data={"queue": "d"})) == (2, 2, 2)
    assert done(service.rebind("?dry_run=false&limit=2", data={"queue": "d"})) == (2, 2, 2)
    assert names(url) == ["a", "d", "d"]


# The event


HANDLER_FAILURES = {
    "it raises": (
        None,
        {"fail": "m-bob"},
        "the handler rebind_policy.obey failed for message m-bob: RuntimeError: as it was told",
    ),
    "it leaves no address": (
        "example.com",
        {"recipient": "nobody"},
        "the handler rebind_policy.obey failed for message m-ada: ValueError: 'nobody' is no address local@domain",
    ),
}


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
@pytest.mark.parametrize(("domain", "data", "detail"), HANDLER_FAILURES.values(), ids=HANDLER_FAILURES)
@pytest.mark.usefixtures("unchanged")
def test_a_handler_that_fails_is_named_with_its_message(
    service: Service, query: str, domain: str, data: dict[str, str], detail: str
) -> None:
    response = service.rebind(query, domain=domain, data=data | {"queue": "elsewhere"}, trigger_rebind_event=True)
    assert is_problem(response, 500, detail)


@pytest.mark.usefixtures("unchanged")
def test_a_name_too_long_for_a_queue_is_refused_and_not_to_be_sent_again(service: Service) -> None:
    response = service.rebind(data={"queue": "q" * (MAX_NAME + 1)})
    assert is_problem(response, 422, f"the name of a queue is longer than {MAX_NAME} bytes")
    assert "Retry-After" not in response.headers


# The query


NO_BOOLEAN, NO_LIMIT = ["Not a valid boolean."], ["Not a whole number from 1 to 10^18 - 1."]
BAD_QUERIES: dict[str, dict[str, Any]] = {
    "dry_run": {"dry_run": NO_BOOLEAN},
    "dry_run=true;limit=1": {"dry_run": NO_BOOLEAN},
    "limit=%2B1": {"limit": NO_LIMIT},
    "limit=+1": {"limit": NO_LIMIT},
    "limit=%D9%A3": {"limit": NO_LIMIT},
    "limit=" + "9" * 3000: {"limit": NO_LIMIT},
    "limit=x&dry_run=x": {"limit": NO_LIMIT, "dry_run": NO_BOOLEAN},
    "limit=1&limit=1": {"limit": ["Given twice."]},
    "dryrun=true": {"dryrun": ["Unknown field."]},
    "Dry_run=true": {"Dry_run": ["Unknown field."]},
    "domain=example.com": {"domain": ["Unknown field."]},
    "=": {"": ["Unknown field."]},
    "%FF=%FF": {"%FF": ["Unknown field."]},
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("query", "errors"), BAD_QUERIES.items(), ids=[query[:40] for query in BAD_QUERIES])
@pytest.mark.usefixtures("unchanged")
def test_a_query_that_is_not_understood_is_refused(service: Service, query: str, errors: dict[str, Any]) -> None:
    length = f"Content-Length: {len(BODY)}"
    response = service.send(f"POST {PATH}?{query} HTTP/1.1", RUN[1], length, body=BODY)
    assert is_problem(response, 400, "the query is not understood: see errors", errors)


# The body


NOT_JSON = {
    "empty": (b"", "Expecting value: line 1 column 1 (char 0)"),
    "bad UTF-8": (BODY.replace(b"a test", b"\xff"), "it is not UTF-8: invalid start byte at byte 12"),
    "a key twice": (BODY[:-1] + b', "reason": ""}', "the key 'reason' is given twice in one object"),
    "100,000 brackets": (b"[" * 100_000, "it is nested too deep to read"),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("body", "reason"), NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.usefixtures("unchanged")
def test_a_body_that_is_not_json_is_refused(service: Service, body: bytes, reason: str) -> None:
    assert is_problem(service.post(body), 400, f"the body is not JSON that can be read: {reason}")


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
def test_a_body_that_is_not_a_request_is_refused_with_every_error(service: Service) -> None:
    body = {"campaing": "spring", "always_flush": "yes", "data": {"x": 5, "a\0": "\ud800"}}
    assert is_problem(
        service.post(json.dumps(body).encode()),
        422,
        "the body is not a request to rebind: see errors",
        {
            "reason": ["Missing data for required field."],
            "campaing": ["Unknown field."],
            "always_flush": NO_BOOLEAN,
            "data": {
                "x": {"value": ["Not a valid string."]},
                "a\0": {
                    "key": ["a string must not hold a NUL"],
                    "value": ["a string must not hold a lone surrogate"],
                },
            },
        },
    )


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
def test_a_body_that_ends_before_its_content_length_is_refused(service: Service) -> None:
    response = service.send(*RUN, f"Content-Length: {len(BODY) + 1}", body=BODY)
    assert is_problem(response, 400, "the body ends before its Content-Length")


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "end", [b"", b"\r\n", b"\r\n5\r\n  ", b"\r\nno size\r\n"], ids=["in it", "after it", "in the next", "no size"]
)
def test_a_chunked_body_that_ends_before_its_last_chunk_is_refused(service: Service, end: bytes) -> None:
    response = service.send(*RUN, "Transfer-Encoding: chunked", body=b"%x\r\n%s%s" % (len(BODY), BODY, end))
    assert is_problem(response, 400, re.compile(".+"))


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
def test_no_body_at_all_is_refused(service: Service) -> None:
    assert service.send(*RUN).status_code == 400


@pytest.mark.sqlite
@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
def test_a_body_of_exactly_1_mib_is_read(queues: QueueRegistry, service: Service, chunked: bool) -> None:
    queues.load([message()])
    body = BODY.ljust(MIB)
    response = requests.post(service.base + PATH, chunks(body) if chunked else body, headers=JSON, timeout=60)
    assert done(response) == (1, 1, 1)


@pytest.mark.sqlite
@pytest.mark.parametrize("length", [MIB + 1, MIB + 2, 3 * MIB])
@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
@pytest.mark.usefixtures("unchanged")
def test_a_body_of_more_than_1_mib_is_refused(service: Service, chunked: bool, length: int) -> None:
    """It would be a request if it were cut at any of the spaces at its end."""
    body = BODY.ljust(length)
    response = requests.post(service.base + PATH, chunks(body) if chunked else body, headers=JSON, timeout=60)
    assert is_problem(response, 413, "The data value transmitted exceeds the capacity limit.")


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
def test_a_body_that_says_that_it_is_too_large_is_refused_unread(service: Service) -> None:
    response = service.send(*RUN, "Content-Length: 99999999999999999999", body=BODY)
    assert is_problem(response, 413, "The data value transmitted exceeds the capacity limit.")


# The content type


@pytest.mark.sqlite
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


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
def test_a_body_without_a_content_type_is_refused(service: Service) -> None:
    response = service.send(RUN[0], f"Content-Length: {len(BODY)}", body=BODY)
    assert is_problem(response, 415, "the content type must be application/json")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON", "application/json;charset=utf-8", 'application/json ; x="y;z"'],
)
def test_the_content_type_may_have_parameters(service: Service, content_type: str) -> None:
    assert done(service.post(BODY, content_type)) == (0, 0, 0)


# The path and the method


@pytest.mark.sqlite
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
    response = service.send(f"POST {path} HTTP/1.1", RUN[1], f"Content-Length: {len(BODY)}", body=BODY)
    assert is_problem(response, 404, re.compile(r"The requested URL was not found on the server\..*"))


@pytest.mark.sqlite
@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "REBIND"])
@pytest.mark.usefixtures("unchanged")
def test_another_method_is_not_allowed(service: Service, method: str) -> None:
    response = requests.request(method, service.base + PATH, data=BODY, timeout=60)
    assert is_problem(response, 405, "The method is not allowed for the requested URL.")
    assert response.headers["Allow"] == "POST"


@pytest.mark.sqlite
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


# The database


@pytest.fixture(scope="module")
def impatient(shared: Start) -> Service:
    """A gunicorn without a policy that does not wait long for a lock."""
    return shared(REBIND_BUSY_TIMEOUT="0.2")


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
@pytest.mark.usefixtures("unchanged")
def test_the_event_without_a_handler_is_a_conflict(impatient: Service, query: str) -> None:
    response = impatient.rebind(query, data={"queue": "b"}, trigger_rebind_event=True)
    assert is_problem(response, 409, "no handler is connected to the rebind event")


ROW_LOCK = "SELECT * FROM messages WHERE id = 'm-ada' FOR UPDATE"


@pytest.mark.parametrize("lock", ["", pytest.param(ROW_LOCK, marks=pytest.mark.postgresql)], ids=["all", "one row"])
@pytest.mark.usefixtures("unchanged")
def test_a_lock_held_too_long_is_503_and_the_next_request_succeeds(url: str, impatient: Service, lock: str) -> None:
    with locked(url, lock):
        assert is_unavailable(impatient.rebind(data={"queue": "b"}, always_flush=True))
        assert done(impatient.rebind("?dry_run=true", data={"queue": "b"})) == (2, 2, 2), "it waits for nobody"
    assert done(impatient.rebind("?dry_run=false", domain="no.such.example")) == (0, 0, 0)


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


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(2))
def test_two_services_that_start_at_once_on_an_empty_database_both_come_up(
    url: str, start: Start, tmp_path: Path, attempt: int
) -> None:
    with new_database(url, tmp_path) as new:
        # With one worker each, which has answered: gunicorn waits for one that was told to stop before it could listen.
        services = [start("--workers", "1", url=new, wait=False) for _ in range(2)]
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
    assert service.output.read_text().splitlines() == [f"rebind cannot start: {reason}"]
    return service.process.returncode != 0


@pytest.mark.sqlite
def test_a_policy_that_cannot_be_loaded_stops_gunicorn(start: Start, tmp_path: Path) -> None:
    policy = tmp_path / "site.py"
    policy.write_text("import no_such_module")
    service = start(REBIND_POLICY=str(policy))
    reason = "ModuleNotFoundError: No module named 'no_such_module'"
    assert stops(service, f"the policy {policy} cannot be loaded: {reason}")


@pytest.mark.slow
@pytest.mark.sqlite
def test_a_bad_database_url_stops_gunicorn(start: Start) -> None:
    service = start(url="mysql://localhost/x")
    assert stops(service, "the database URL cannot be used: mysql is neither sqlite nor postgresql")


@pytest.mark.slow
@pytest.mark.sqlite
def test_a_file_that_is_no_database_stops_gunicorn_and_stays_as_it_is(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "queues.db"
    file.write_bytes(b"no database" * 1000)
    service = start(url=f"sqlite:///{file}")
    assert stops(service, "the database is damaged, or is none: file is not a database")
    assert file.read_bytes() == b"no database" * 1000


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


@pytest.mark.sqlite
def test_a_path_cannot_forge_a_line_of_the_log(service: Service) -> None:
    assert service.send("GET /a%0Ab%0Dc HTTP/1.1").status_code == 404
    assert [line for line in service.output.read_text().splitlines() if line.endswith(r"GET '/a\nb\rc' 404 ")] != []
