"""Tests of the route, from outside: what of HTTP reaches the registry, and what comes back.

What a rebind does is tested in test_registry.py, and which JSON is a request in test_schemas.py.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from answers import done, is_problem, is_unavailable
from databases import history, locked, logged, metas, names, new_database, nothing_changes
from factories import message
from services import MIB, PATH, From, Service, Start
from sqlalchemy import make_url
from waiting import PATIENCE, until

from access import AccessError
from app import SettingError, create_app
from cli import VERSION
from event import PolicyError
from queues import QueueRegistry
from rebinding import MAX_SHOWN
from store import StoreUnusable
from tables import MAX_NAME

BODY = b'{"reason": "a test", "data": {"queue": "elsewhere"}, "always_flush": true}'  # would change all that is there
JSON = {"Content-Type": "application/json"}
NOT_A_REQUEST = "the body is not a request to rebind: see errors"
NOT_UNDERSTOOD = "a query parameter or a header is wrong: see errors"
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


def rebind_headers(response: requests.Response) -> dict[str, str]:
    """What the answer says of the rebind."""
    return {name: value for name, value in response.headers.items() if name.startswith("Rebind-")}


def test_every_field_of_the_body_reaches_the_registry(queues: QueueRegistry, url: str, service: Service) -> None:
    body: dict[str, Any] = {"campaign": "c", "tenant": "t", "domain": "example.com", "routing_domain": "r"}
    queues.load([message(meta={"campaign": "c", "tenant": "t", "routing_domain": "r"}), message(due=4e9)])
    reason = "Cleaning up “a” 'n' \"c\"; :actor ? %s \\'\n-- END"
    rebound = service.rebind(**body, reason=reason, data={"queue": "b", "sign": "é"}, trigger_rebind_event=True)
    assert done(rebound) == (1, 1, 1)
    (record,) = logged(url)
    assert record["response"]["content"] == f"Rebound from c:t@example.com!r to b: {reason}"
    assert (record["actor"], record["meta"]["signed"]) == ("127.0.0.1", {"by": ["policy", "é"], "times": 1})
    assert done(service.rebind(always_flush=True, suppress_logging=True)) == (2, 0, 2)
    assert (names(url), len(logged(url))) == (["b", "example.com"], 1)
    assert done(service.rebind("?dry_run=false&limit=1&unset=queue&unset=%C3%A9&unset=signed")) == (1, 1, 1)
    assert (names(url), metas(url)[0]) == (
        ["c:t@example.com!r", "example.com"],
        {"campaign": "c", "tenant": "t", "routing_domain": "r"},
    )


# The query


def test_a_dry_run_is_answered_with_the_plan(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message(meta={"queue": name}) for name in ("a", "b", "b", "a", "a", "c")])
    with nothing_changes(url):
        response = service.rebind("?dry_run=true", data={"queue": "c"}, always_flush=True)
    assert rebind_headers(response) == {"Rebind-Matched": "6", "Rebind-Moved": "5", "Rebind-Flushed": "6"}
    assert response.content == (
        b'{"moves":[{"from":"a","to":"c","messages":3},{"from":"b","to":"c","messages":2},'
        b'{"from":"c","to":"c","messages":1}],"more":0}\n'
    )


def test_a_plan_without_an_entry_is_not_the_answer_of_a_rebind(service: Service) -> None:
    assert service.rebind("?dry_run=true").json() == {"moves": [], "more": 0}


def test_an_undo_says_how_many_messages_it_left_alone(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message(meta={"tenant": tenant}) for tenant in ("a", "b", "c")])
    first = service.rebind(data={"queue": "wrong"}).headers["Rebind-Id"]
    assert done(service.rebind("?limit=1", data={"queue": "elsewhere"})) == (1, 1, 1)
    undo = f"?undo={first}"
    with nothing_changes(url):
        rehearsed = service.rebind(f"{undo}&dry_run=true")
    counts = {"Rebind-Matched": "2", "Rebind-Moved": "2", "Rebind-Flushed": "2", "Rebind-Left": "1"}
    assert rebind_headers(rehearsed) == counts
    undone = service.rebind(undo)
    assert done(undone) == (2, 2, 2)
    assert rebind_headers(undone) == counts | {"Rebind-Id": history(url)[-1]["rebind_id"]}
    assert sorted(names(url)) == ["b@example.com", "c@example.com", "elsewhere"]


def test_an_undo_is_not_found_or_a_conflict(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message()])
    first = service.rebind(data={"queue": "b"}, suppress_logging=True).headers["Rebind-Id"]
    with nothing_changes(url):
        assert is_problem(service.rebind("?undo=x"), 404, "the history has no rebind x")
        gone = f"the rebind {first} wrote no records, or they have been pruned"
        assert is_problem(service.rebind(f"?undo={first}"), 409, gone)


# The Idempotency-Key


def with_key(service: Service, key: str, query: str = "", source: str = "127.0.0.1", **body: Any) -> requests.Response:
    """POST a rebind with this Idempotency-Key, from an address of this host."""
    with requests.Session() as session:
        session.mount("http://", From(source))
        headers = {"Idempotency-Key": key.encode()}
        fields = {"reason": "a test", "data": {"queue": "b"}} | body
        return session.post(service.base + PATH + query, json=fields, headers=headers, timeout=60)


def test_a_request_that_is_sent_again_gets_the_same_answer_and_does_nothing(
    queues: QueueRegistry, url: str, service: Service
) -> None:
    queues.load([message(), message("bob@example.org")])
    first = with_key(service, '"k"', "?limit=1")
    with nothing_changes(url):
        again = with_key(service, '"k"', "?limit=1")
    assert (done(again), again.content) == ((1, 1, 1), first.content)
    assert rebind_headers(again) == rebind_headers(first)
    assert names(url) == ["b", "example.org"]


@pytest.mark.parametrize(
    ("query", "source", "body"),
    [
        pytest.param("", "127.0.0.1", {"reason": "another"}, id="another body"),
        pytest.param("?limit=1", "127.0.0.1", {}, id="another query"),
        pytest.param("", "127.0.0.2", {}, id="another actor"),
    ],
)
def test_a_key_that_another_request_used_is_refused(
    queues: QueueRegistry, url: str, service: Service, query: str, source: str, body: dict[str, Any]
) -> None:
    queues.load([message()])
    assert done(with_key(service, '"k"')) == (1, 1, 1)
    with nothing_changes(url):
        response = with_key(service, '"k"', query, source, **body)
        assert is_problem(response, 422, "the Idempotency-Key was used by a different request")


@pytest.mark.parametrize("key", ['"k"', "k"])
def test_a_dry_run_ignores_the_key(queues: QueueRegistry, url: str, service: Service, key: str) -> None:
    queues.load([message()])
    assert done(with_key(service, '"k"')) == (1, 1, 1)
    with nothing_changes(url):
        assert with_key(service, key, "?dry_run=true", reason="another").status_code == 200


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
def test_a_key_that_is_not_a_string_in_quotes_is_refused(service: Service) -> None:
    wrong = {"Idempotency-Key": ['Not a string in quotes, such as "8e03978e", of 1 to 255 characters.']}
    assert is_problem(with_key(service, "k"), 400, NOT_UNDERSTOOD, wrong)


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
def test_two_keys_are_refused(service: Service) -> None:
    keys = ['Idempotency-Key: "a"', 'Idempotency-Key: "b"', f"Content-Length: {len(BODY)}"]
    assert service.send(*RUN, *keys, body=BODY).status_code == 400


# The event


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
@pytest.mark.usefixtures("unchanged")
def test_a_handler_that_fails_is_named_with_its_message(service: Service, query: str) -> None:
    response = service.rebind(query, data={"fail": "m-bob", "queue": "elsewhere"}, trigger_rebind_event=True)
    failed = "the handler rebind_policy.obey failed for message m-bob: RuntimeError: as it was told"
    assert is_problem(response, 500, failed)
    assert "Retry-After" not in response.headers, "the same request fails again"


@pytest.mark.usefixtures("unchanged")
def test_a_name_too_long_for_a_queue_is_refused_and_not_to_be_sent_again(service: Service) -> None:
    response = service.rebind(data={"queue": "q" * (MAX_NAME + 1)})
    assert is_problem(response, 422, f"the name of a queue would be longer than {MAX_NAME} bytes")
    assert "Retry-After" not in response.headers


# A query that is not understood


NO_BOOLEAN, NO_LIMIT = ["Not a valid boolean."], ["Not a whole number from 1 to 10^18 - 1."]
BAD_QUERIES: dict[str, dict[str, Any]] = {
    "dry_run=true;limit=1": {"dry_run": NO_BOOLEAN},
    "limit=%2B1": {"limit": NO_LIMIT},
    "limit=x&dry_run=x": {"limit": NO_LIMIT, "dry_run": NO_BOOLEAN},
    "limit=1&limit=1": {"limit": ["Given more than once."]},
    "unset=reason&unset=%00": {"unset": {"1": ["a string must not contain NUL"]}},
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
    assert is_problem(response, 400, NOT_UNDERSTOOD, errors)


# The body


NOT_JSON = {
    "empty": (b"", "Expecting value: line 1 column 1 (char 0)"),
    "bad UTF-8": (BODY.replace(b"a test", b"\xff"), "it is not UTF-8: invalid start byte at byte 12"),
    "100,000 brackets": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("body", "reason"), NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.usefixtures("unchanged")
def test_a_body_that_is_not_json_is_refused(service: Service, body: bytes, reason: str) -> None:
    assert is_problem(service.post(body), 400, f"the body is not valid JSON: {reason}")


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
def test_a_body_that_is_not_a_request_is_refused_with_every_error(service: Service) -> None:
    body = {"campaing": "spring", "always_flush": "yes", "data": {"x": 5, "a\0": "\ud800"}}
    assert is_problem(
        service.post(json.dumps(body).encode()),
        422,
        NOT_A_REQUEST,
        {
            "reason": ["Missing data for required field."],
            "campaing": ["Unknown field."],
            "always_flush": NO_BOOLEAN,
            "data": {
                "x": {"value": ["Not a valid string."]},
                "a\0": {
                    "key": ["a string must not contain NUL"],
                    "value": ["a string must not contain a lone surrogate"],
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


@pytest.mark.sqlite
@pytest.mark.parametrize("coding", ["gzip", "br", "GZIP, chunked", "identity", ""])
@pytest.mark.usefixtures("unchanged")
def test_a_content_encoding_is_refused(service: Service, coding: str) -> None:
    headers = JSON | {"Content-Encoding": coding}
    response = requests.post(service.base + PATH, gzip.compress(BODY), headers=headers, timeout=60)
    assert is_problem(response, 415, "the body must not have a Content-Encoding")


# The path and the method


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "path",
    [
        "/",
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
def test_a_lock_held_too_long_is_503_and_the_next_request_succeeds(
    queues: QueueRegistry, url: str, impatient: Service, lock: str
) -> None:
    queues.load([message(id="m-ada")])
    with nothing_changes(url), locked(url, lock):
        assert is_unavailable(impatient.rebind(data={"queue": "b"}, always_flush=True))
        assert done(impatient.rebind("?dry_run=true", data={"queue": "b"})) == (1, 1, 1), "it waits for nobody"
    assert done(impatient.rebind(data={"queue": "b"})) == (1, 1, 1)


def test_what_a_server_says_of_itself_is_for_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    client = create_app({"DATABASE_URL": "postgresql+psycopg://postgres@/x?host=/nowhere"}).test_client()
    caplog.clear()
    response = client.post(PATH, data=BODY, content_type="application/json")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert response.get_json()["detail"] == "the database is out of reach"
    (line,) = (record for record in caplog.records if record.name == "app")
    assert line.getMessage().startswith(f"127.0.0.1 POST {PATH} 503 the database is out of reach: ")
    assert ("/nowhere" in line.getMessage(), line.exc_info) == (True, None)


# Starting


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


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        pytest.param("import no_such", "ModuleNotFoundError: No module named 'no_such'", id="it raises"),
        pytest.param("raise SystemExit('a\\nb')", r"SystemExit: a\nb", id="it exits"),
    ],
)
@pytest.mark.sqlite
def test_a_policy_that_cannot_be_loaded_ends_the_start_with_one_line(
    start: Start, tmp_path: Path, policy: str, reason: str
) -> None:
    file = tmp_path / "site.py"
    file.write_text(policy)
    service = start(REBIND_POLICY=str(file))
    assert service.process.wait(PATIENCE) == 4
    assert service.output.read_text() == f"rebind cannot start: the policy {file} cannot be loaded: {reason}\n"


@pytest.mark.parametrize("name", ["REBIND_POLICY", "REBIND_HTPASSWD", "REBIND_TRUSTED_HOSTS", "REBIND_DATABASE_URL"])
@pytest.mark.parametrize("value", ["5", "true", "[]"])
def test_what_is_set_is_text_whatever_else_it_could_be(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises((PolicyError, AccessError, StoreUnusable)):
        create_app()


@pytest.mark.parametrize("name", ["REBIND_POLICE", "REBIND_", "REBIND_HTPASSWD__FILE"])
def test_a_setting_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(SettingError, match=f"unknown setting {name}$"):
        create_app()


# The diagnostic log


def test_the_first_line_says_what_was_started_and_no_password(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with new_database(url, tmp_path) as new:
        with_password = make_url(new).set(password="s3cr3t" if "postgresql" in new else None)
        create_app({"DATABASE_URL": with_password.render_as_string(hide_password=False)})
        shown = make_url(new).set(query={}).render_as_string() if "postgresql" in new else make_url(new).database
        assert caplog.messages == [f"rebind {VERSION} on {shown}"]


class Lines:
    """What a service writes to the diagnostic log, from now on."""

    def __init__(self, service: Service) -> None:
        self._output, self._seen = service.output, service.output.stat().st_size

    def read(self) -> list[str]:
        """The lines of the application, without their time."""
        new = self._output.read_bytes()[self._seen :].decode()
        return re.findall(r"^\[[^]]+\] (\w+ in (?:app|queues): .*)$", new, re.MULTILINE)


PREFIX = f"INFO in app: 127.0.0.1 POST {PATH}"
REFUSALS: dict[str, tuple[str, bytes, str]] = {
    "a path": ("/a%0Ab%E2%80%A8%1B", b"", r"INFO in app: 127.0.0.1 POST /a\nb\u2028\x1b 404 The requested URL"),
    "a query": (f"{PATH}?%0A=%0D", BODY, f"{PREFIX}?%0A=%0D 400 {NOT_UNDERSTOOD}"),
    "a body": (PATH, b'{"\\n": 1, "\\n": 2}', rf"{PREFIX} 400 the body is not valid JSON: the key '\n'"),
    "a field": (PATH, b'{"\\n": 1}', f"{PREFIX} 422 {NOT_A_REQUEST}"),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("path", "body", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line_whatever_the_request_holds(service: Service, path: str, body: bytes, said: str) -> None:
    lines = Lines(service)
    assert service.send(f"POST {path} HTTP/1.1", RUN[1], f"Content-Length: {len(body)}", body=body).status_code >= 400
    (line,) = lines.read()
    assert line.startswith(said)


@pytest.mark.sqlite
def test_a_handler_s_failure_is_one_line_and_a_traceback_whatever_the_message_is_called(
    queues: QueueRegistry, service: Service
) -> None:
    queues.load([message(id="m\n[2026-11-25] INFO in app: forged")])
    lines = Lines(service)
    assert service.rebind("?dry_run=true", data={"recipient": "x"}, trigger_rebind_event=True).status_code == 500
    (line,) = lines.read()
    failed = "the handler rebind_policy.obey failed for message"
    assert line.startswith(rf"{PREFIX}?dry_run=true 500 {failed} m\n[2026-11-25] INFO in app: forged: ValueError: ")
    assert "Traceback" in service.output.read_text()


def test_a_rebind_is_one_line_when_it_begins_and_one_when_it_ends(queues: QueueRegistry, service: Service) -> None:
    queues.load([message(meta={"tenant": "acme", "é": "1"})])
    lines = Lines(service)
    reason = "a\n" * 1000
    response = with_key(
        service, '"k"', "?limit=5&unset=é&unset=b", data={"queue": "b"}, reason=reason, tenant="acme", always_flush=True
    )
    assert done(response) == (1, 1, 1)
    begins, ends = lines.read()
    rebind_id = response.headers["Rebind-Id"]
    assert begins == (
        rf'INFO in queues: rebind {rebind_id} begins: actor="127.0.0.1" reason={json.dumps(reason)[:MAX_SHOWN]}… '
        rf'data={{"queue":"b"}} always_flush=true limit=5 unset=["b","é"] tenant="acme" idempotency_key="k"'
    )
    pattern = rf"INFO in queues: rebind {rebind_id} ends after \d+\.\d{{3}} s: 1 matched, 1 moved, 1 flushed"
    assert re.fullmatch(pattern, ends)


def test_a_rebind_that_fails_for_now_is_told_in_three_lines_without_a_traceback(
    queues: QueueRegistry, url: str, impatient: Service
) -> None:
    lines = Lines(impatient)
    with locked(url):
        assert is_unavailable(impatient.rebind())
    begins, failed, refused = lines.read()
    assert re.match(r"INFO in queues: rebind \S+ begins: ", begins)
    assert re.fullmatch(r"INFO in queues: rebind \S+ failed after \d+\.\d{3} s: StoreUnavailable", failed)
    assert refused.startswith(f"{PREFIX} 503 the database cannot do this now: ")
    assert "Traceback" not in impatient.output.read_text()
