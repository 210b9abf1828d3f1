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
from flask import Flask
from services import MIB, PATH, From, Service, Start
from sqlalchemy import make_url

import app as app_module
from app import STATUS, create_app
from cli import VERSION
from event import HandlerFailed, NoHandler
from history import KeyReused, NothingToUndo, UnknownRebind
from queues import QueueRegistry
from rebinding import MAX_SHOWN
from schemas import SettingError, Unreadable
from store import StoreConflict, StoreDamaged, StoreError, StoreRefused, StoreUnavailable, StoreUnusable

BODY = b'{"reason": "a test", "data": {"queue": "elsewhere"}, "always_flush": true}'  # would change all that is there
JSON = "Content-Type: application/json"
NOT_A_REQUEST = "the body is not a request to rebind: see errors"
NOT_UNDERSTOOD = "a query parameter or a header is wrong: see errors"
NO_JSON_TYPE = "the content type must be application/json"
NOT_FOUND = re.compile(r"The requested URL was not found on the server\..*")


@pytest.fixture
def unchanged(queues: QueueRegistry, url: str, service: Service) -> Iterator[None]:
    """There are messages, and a record; the test must leave all as it is."""
    queues.load([message(id="m-ada", meta={"tenant": "acme"}), message("bob@example.org", id="m-bob")])
    assert done(service.rebind(domain="example.org", data={"tenant": "acme"})) == (1, 1, 1)
    with nothing_changes(url):
        yield


def rebind_headers(response: requests.Response) -> dict[str, str]:
    """What the answer says of the rebind."""
    return {name: value for name, value in response.headers.items() if name.startswith("Rebind-")}


class Lines:
    """What a service writes to the diagnostic log, from now on."""

    def __init__(self, service: Service) -> None:
        self._output, self._seen = service.output, service.output.stat().st_size

    def read(self) -> list[str]:
        """The lines of the application, without their time."""
        new = self._output.read_bytes()[self._seen :].decode()
        return re.findall(r"^\[[^]]+\] (\w+ in (?:app|queues): .*)$", new, re.MULTILINE)


PREFIX = f"INFO in app: 127.0.0.1 POST {PATH}"

# The answer


def test_the_answer_is_an_empty_object_and_headers_that_say_what_was_done(
    queues: QueueRegistry, url: str, service: Service
) -> None:
    queues.load([message(meta={"queue": name}) for name in ("a", "b", "b")])
    response = service.rebind(data={"queue": "b"})
    said = (response.status_code, response.headers["Content-Type"], response.content)
    assert said == (200, "application/json", b"{}\n")
    (row,) = history(url)
    counts = {"Rebind-Matched": "3", "Rebind-Moved": "1", "Rebind-Flushed": "1"}
    assert rebind_headers(response) == {"Rebind-Id": row["rebind_id"]} | counts


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
    assert names(url) == ["c:t@example.com!r", "example.com"]
    assert metas(url)[0] == {"campaign": "c", "tenant": "t", "routing_domain": "r"}


def test_a_dry_run_is_answered_with_the_plan(queues: QueueRegistry, url: str, service: Service) -> None:
    assert service.rebind("?dry_run=true").json() == {"moves": [], "more": 0}
    queues.load([message(meta={"queue": name}) for name in ("a", "b", "b", "a", "a")])
    with nothing_changes(url):
        response = service.rebind("?dry_run=true", data={"queue": "c"}, always_flush=True)
    assert rebind_headers(response) == {"Rebind-Matched": "5", "Rebind-Moved": "5", "Rebind-Flushed": "5"}
    moves = b'{"from":"a","to":"c","messages":3},{"from":"b","to":"c","messages":2}'
    assert response.content == b'{"moves":[%s],"more":0}\n' % moves


def test_an_undo_says_how_many_messages_it_left_alone(queues: QueueRegistry, url: str, service: Service) -> None:
    queues.load([message(meta={"tenant": tenant}) for tenant in ("a", "b", "c")])
    first = service.rebind(data={"queue": "wrong"}).headers["Rebind-Id"]
    assert done(service.rebind("?limit=1", data={"queue": "elsewhere"})) == (1, 1, 1)
    undone = service.rebind(f"?undo={first}")
    assert (done(undone)[:2], undone.headers["Rebind-Left"]) == ((2, 2), "1")


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
    """Whoever sends it. A dry run does not even read the key."""
    queues.load([message(), message("bob@example.org")])
    first = with_key(service, '"k"', "?limit=1")
    with nothing_changes(url):
        again = with_key(service, '"k"', "?limit=1", source="127.0.0.2")
        assert (done(again), again.content) == ((1, 1, 1), first.content)
        assert rebind_headers(again) == rebind_headers(first)
        reused = with_key(service, '"k"', "?limit=2")
        assert is_problem(reused, 422, "the Idempotency-Key was used by a different request")
        assert with_key(service, "k", "?dry_run=true").status_code == 200


# What is refused: by name, what differs from a request that would change everything, and the answer

NO_KEY = {"Idempotency-Key": ['Not a string in quotes, such as "8e03978e", of 1 to 255 characters.']}
REFUSED: dict[str, tuple[dict[str, Any], int, Any, Any]] = {
    "twice": ({"path": f"{PATH}?limit=1&limit=1"}, 400, NOT_UNDERSTOOD, {"limit": ["Given more than once."]}),
    "no UTF-8 in the query": ({"path": f"{PATH}?%FF=%FF"}, 400, NOT_UNDERSTOOD, {"%FF": ["Unknown field."]}),
    "two keys": ({"headers": [JSON, 'Idempotency-Key: "a"', 'Idempotency-Key: "b"']}, 400, NOT_UNDERSTOOD, NO_KEY),
    "no JSON": ({"body": BODY[1:]}, 400, "the body is not valid JSON: Extra data: line 1 column 9 (char 8)", None),
    "a short body": ({"length": len(BODY) + 1}, 400, "the body ends before its Content-Length", None),
    "no field that is right": (
        {"body": b'{"campaing": "spring", "always_flush": "yes", "data": {"a\\u0000": 5}}'},
        422,
        NOT_A_REQUEST,
        {
            "reason": ["Missing data for required field."],
            "campaing": ["Unknown field."],
            "always_flush": ["Not a valid boolean."],
            "data": {"a\0": {"key": ["a string must not contain NUL"], "value": ["Not a valid string."]}},
        },
    ),
}
REFUSED |= {
    f"the content type {name!r}": ({"headers": [f"Content-Type: {name}"]}, 415, NO_JSON_TYPE, None)
    for name in ("", "text/json", "application/jsonx", "application/*", "application/json, application/json")
}
REFUSED |= {"no content type": ({"headers": []}, 415, NO_JSON_TYPE, None)}
REFUSED |= {
    f"the coding {coding!r}": (
        {"headers": [JSON, f"Content-Encoding: {coding}"], "body": gzip.compress(BODY)},
        415,
        "the body must not have a Content-Encoding",
        None,
    )
    for coding in ("gzip", "identity", "")
}
REFUSED |= {
    f"the path {path}": ({"path": path}, 404, NOT_FOUND, None)
    for path in ("/", "/api//admin/rebind/v1", f"{PATH}/", "/API/admin/rebind/v1", f"{PATH}%20", "/%FF")
}
REFUSED |= {
    method: ({"method": method}, 405, "The method is not allowed for the requested URL.", None)
    for method in ("GET", "PUT", "OPTIONS", "TRACE", "REBIND")
}


@pytest.mark.sqlite
@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("differs", "status", "detail", "errors"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_a_problem_document_and_changes_nothing(
    service: Service, differs: dict[str, Any], status: int, detail: Any, errors: Any
) -> None:
    request = {"method": "POST", "path": PATH, "headers": [JSON], "body": BODY} | differs
    length = f"Content-Length: {request.get('length', len(request['body']))}"
    line = f"{request['method']} {request['path']} HTTP/1.1"
    response = service.send(line, *request["headers"], length, body=request["body"])
    assert is_problem(response, status, detail, errors)
    assert response.headers.get("Allow") == ("POST" if status == 405 else None)
    assert "Retry-After" not in response.headers, "the same request fails again"


@pytest.mark.sqlite
@pytest.mark.parametrize("content_type", ["Application/JSON", 'application/json ; charset=utf-8; x="y;z"'])
def test_the_content_type_may_have_parameters(service: Service, content_type: str) -> None:
    assert done(service.post(BODY, content_type)) == (0, 0, 0)


# The body's length


def post(service: Service, length: int, chunked: bool) -> requests.Response:
    """POST a body of so many bytes, which would be a request if it were cut at any of the spaces at its end."""
    body = BODY.ljust(length)
    # requests sends an iterator chunked, without a Content-Length.
    chunks = (body[i : i + 65536] for i in range(0, length, 65536))
    headers = {"Content-Type": "application/json"}
    return requests.post(service.base + PATH, chunks if chunked else body, headers=headers, timeout=60)


@pytest.mark.sqlite
@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
def test_a_body_of_exactly_1_mib_is_read_and_a_larger_one_refused(
    queues: QueueRegistry, url: str, service: Service, chunked: bool
) -> None:
    queues.load([message()])
    for length in (MIB + 1, 3 * MIB):
        with nothing_changes(url):
            assert is_problem(post(service, length, chunked), 413, "the body is larger than 1 MiB")
    assert done(post(service, MIB, chunked)) == (1, 1, 1)


# What the registry raises


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    """The application in this process."""
    return create_app({"DATABASE_URL": f"sqlite:///{tmp_path / 'queues.db'}"})


STATUSES: dict[type[Exception], int] = {
    Unreadable: 400,
    UnknownRebind: 404,
    NoHandler: 409,
    NothingToUndo: 409,
    KeyReused: 422,
    StoreRefused: 422,
    HandlerFailed: 500,
    StoreDamaged: 500,
    StoreUnusable: 503,
    StoreUnavailable: 503,
    StoreConflict: 503,
}


@pytest.mark.parametrize(("error", "status"), STATUSES.items(), ids=lambda value: getattr(value, "__name__", value))
def test_what_the_registry_raises_has_a_status(app: Flask, error: type[Exception], status: int) -> None:
    with app.test_request_context(PATH, method="POST"):
        response = app.make_response(app.handle_user_exception(error("as it was told")))
    assert (response.status_code, response.get_json()["detail"]) == (status, "as it was told")
    assert response.headers.get("Retry-After") == ("5" if status == 503 else None)


def test_no_error_of_the_registry_is_without_a_status() -> None:
    """StoreError itself is never raised."""
    of_the_store = {*StoreError.__subclasses__(), *StoreUnavailable.__subclasses__(), *StoreUnusable.__subclasses__()}
    assert STATUSES.keys() == STATUS.keys() >= of_the_store


def test_what_a_server_says_of_itself_is_for_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    client = create_app({"DATABASE_URL": "postgresql+psycopg://postgres@/x?host=/nowhere"}).test_client()
    caplog.clear()
    response = client.post(PATH, data=BODY, content_type="application/json")
    assert (response.status_code, response.get_json()["detail"]) == (503, "the database is out of reach")
    (line,) = (record for record in caplog.records if record.name == app_module.__name__)
    assert line.getMessage().startswith(f"127.0.0.1 POST {PATH} 503 the database is out of reach: ")
    assert ("/nowhere" in line.getMessage(), line.exc_info) == (True, None)


# The database


@pytest.fixture(scope="module")
def impatient(shared: Start) -> Service:
    """A gunicorn that does not wait long for a lock."""
    return shared(REBIND_BUSY_TIMEOUT="0.2")


ROW_LOCK = "SELECT * FROM messages WHERE id = 'm-ada' FOR UPDATE"


@pytest.mark.parametrize("lock", ["", pytest.param(ROW_LOCK, marks=pytest.mark.postgresql)], ids=["all", "one row"])
def test_a_lock_held_too_long_is_503_and_the_next_request_succeeds(
    queues: QueueRegistry, url: str, impatient: Service, lock: str
) -> None:
    queues.load([message(id="m-ada")])
    lines = Lines(impatient)
    with nothing_changes(url), locked(url, lock):
        assert is_unavailable(impatient.rebind(data={"queue": "b"}, always_flush=True))
        begins, failed, refused = lines.read()
        assert done(impatient.rebind("?dry_run=true", data={"queue": "b"})) == (1, 1, 1), "it waits for nobody"
    assert done(impatient.rebind(data={"queue": "b"})) == (1, 1, 1)
    assert re.match(r"INFO in queues: rebind \S+ begins: ", begins)
    assert re.fullmatch(r"INFO in queues: rebind \S+ failed after \d+\.\d{3} s: StoreUnavailable", failed)
    assert refused.startswith(f"{PREFIX} 503 the database cannot do this now: ")
    assert "Traceback" not in impatient.output.read_text()


# Settings


@pytest.mark.parametrize("name", ["REBIND_POLICY", "REBIND_HTPASSWD", "REBIND_TRUSTED_HOSTS", "REBIND_DATABASE_URL"])
@pytest.mark.parametrize("value", ["5", "true", "[]"])
def test_what_is_set_is_text_whatever_else_it_could_be(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises((SettingError, StoreUnusable)):
        create_app()


# The diagnostic log


def test_the_first_line_says_what_was_started_and_no_password(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with new_database(url, tmp_path) as new:
        with_password = make_url(new).set(password="s3cr3t" if "postgresql" in new else None)
        create_app({"DATABASE_URL": with_password.render_as_string(hide_password=False)})
        shown = make_url(new).set(query={}).render_as_string()
        assert caplog.messages == [f"rebind {VERSION} on {shown}"]


LINES: dict[str, tuple[str, bytes, str]] = {
    "a path": ("/a%0Ab%E2%80%A8%1B", b"", r"INFO in app: 127.0.0.1 POST /a\nb\u2028\x1b 404 The requested URL"),
    "a query": (f"{PATH}?%0A=%0D", BODY, rf"{PREFIX}?%0A=%0D 400 a query parameter or a header is wrong: \n: "),
    "a body": (PATH, b'{"\\n": 1, "\\n": 2}', rf"{PREFIX} 400 the body is not valid JSON: the key '\n'"),
    "a field": (PATH, b'{"\\n": 1}', f"{PREFIX} 422 the body is not a request to rebind: reason: Missing data "),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("path", "body", "said"), LINES.values(), ids=LINES)
def test_a_refusal_is_one_line_whatever_the_request_holds(service: Service, path: str, body: bytes, said: str) -> None:
    lines = Lines(service)
    assert service.send(f"POST {path} HTTP/1.1", JSON, f"Content-Length: {len(body)}", body=body).status_code >= 400
    (line,) = lines.read()
    assert line.startswith(said)


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
def test_a_handler_that_fails_is_named_with_its_message_and_its_traceback_logged(
    queues: QueueRegistry, service: Service, query: str
) -> None:
    queues.load([message(id="m\n[2026-11-25] INFO in app: forged")])
    lines = Lines(service)
    response = service.rebind(query, data={"recipient": "x"}, trigger_rebind_event=True)
    failed = "the handler obey failed for message {}: ValueError: .*"
    assert is_problem(response, 500, re.compile(failed.format(r"m\n\[2026-11-25\] INFO in app: forged")))
    refusal = lines.read()[-1]
    said = refusal.removeprefix(f"{PREFIX}{query} 500 ")
    assert re.fullmatch(failed.format(r"m\\n\[2026-11-25\] INFO in app: forged"), said)
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
