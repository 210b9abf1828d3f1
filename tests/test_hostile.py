"""Tests with what no honest client sends: bodies made to confuse, and bytes that are hardly HTTP.

Each is answered or its connection closed, changes nothing, and leaves the service to others. What an honest client may
get wrong is in test_app.py.
"""

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus

import pytest
from answers import done, is_problem
from databases import nothing_changes
from factories import message
from services import PATH, Service, Start
from waiting import until

from queues import QueueRegistry

BODY = b'{"reason": "a test", "data": {"queue": "elsewhere"}, "always_flush": true}'  # would change all that is there
FIELDS = json.loads(BODY)
SHOULD_BE = "the body is not a request to rebind: see errors"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database for what is refused before it gets to one: SQLite stands for both."""
    return f"sqlite:///{tmp_path_factory.mktemp('hostile') / 'queues.db'}"


@pytest.fixture(scope="module")
def wire(url: str, shared: Start) -> Service:
    """A gunicorn on it, with one message there that every request here would change."""
    own = QueueRegistry()
    own.bind(url, busy_timeout=30)
    own.prepare()
    own.load([message(id="m-ada")])
    return shared()


@pytest.fixture
def unchanged(url: str, wire: Service) -> Iterator[None]:
    """The test must leave all as it is."""
    with nothing_changes(url):
        yield


# Bodies


@pytest.mark.usefixtures("unchanged")
def test_about_the_depth_that_can_just_be_read_nothing_breaks(wire: Service) -> None:
    for depth in range(450, 500):
        response = wire.post(BODY.replace(b'"elsewhere"', b'[{"a": ' * depth + b"0" + b"}]" * depth))
        if response.status_code == 400:
            assert is_problem(response, 400, "the body is not valid JSON: nested too deeply")
        else:
            assert is_problem(response, 422, SHOULD_BE, {"data": {"queue": {"value": ["Not a valid string."]}}})


@pytest.mark.parametrize("byte", [b"", b"\0", b'"', b"{", b"9", b"\xff"], ids=["cut out", *map(ascii, '\0"{9ÿ')])
@pytest.mark.usefixtures("unchanged")
def test_one_byte_that_is_wrong_makes_it_a_refusal_or_another_request(wire: Service, byte: bytes) -> None:
    for position in range(len(BODY)):
        connection = http.client.HTTPConnection(*wire.address, timeout=60)
        body = BODY[:position] + byte + BODY[position + 1 :]
        connection.request("POST", f"{PATH}?dry_run=true", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert (response.status, answer.get("status", 200)) in {(200, 200), (400, 400), (422, 422)}, body
        connection.close()


@pytest.mark.usefixtures("unchanged")
def test_as_many_wrong_keys_as_the_body_holds_are_refused(wire: Service) -> None:
    names = [f"{n:x}" for n in range(80_000)]
    response = wire.post(json.dumps(FIELDS | dict.fromkeys(names, 1)).encode())
    assert is_problem(response, 422, SHOULD_BE, {name: ["Unknown field."] for name in names})


# Bytes on the wire


def head(*headers: bytes, line: bytes = f"POST {PATH} HTTP/1.1".encode(), host: bytes = b"Host: localhost") -> bytes:
    """The beginning of a request, up to its body."""
    return b"\r\n".join([line, host, b"Content-Type: application/json", *headers, b"", b""])


def on_path(line: bytes) -> bytes:
    """A request's first line, with the path in place of %s."""
    return line % PATH.encode()


DRY = on_path(b"POST %s?dry_run=true HTTP/1.1")
LENGTH, CHUNKED = b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

REFUSED: dict[str, tuple[int, bytes]] = {
    # How long the body is, told in two ways: what smuggles a request past a proxy
    "a length, and chunked": (400, head(LENGTH, CHUNKED) + CHUNKS),
    "chunked, and a length": (400, head(CHUNKED, LENGTH) + CHUNKS),
    "chunked, and length 0 before another request": (400, head(b"Content-Length: 0", CHUNKED) + head(LENGTH) + BODY),
    "two lengths": (400, head(LENGTH, b"Content-Length: 0") + BODY),
    "the same length twice": (400, head(LENGTH, LENGTH) + BODY),
    "a list of lengths": (400, head(b"Content-Length: 5, 5") + BODY),
    "a negative length": (400, head(b"Content-Length: -1") + BODY),
    "a length with a plus": (400, head(b"Content-Length: +%d" % len(BODY)) + BODY),
    "a length in hexadecimal": (400, head(b"Content-Length: 0x4b") + BODY),
    "a length with an underscore": (400, head(b"Content-Length: 7_5") + BODY),
    "a length of ²": (400, head(b"Content-Length: \xb2") + BODY),
    "a length of nothing": (400, head(b"Content-Length:") + BODY),
    "a length beyond 64 bits": (413, head(b"Content-Length: 99999999999999999999") + BODY),
    "a length of 4,000 digits": (413, head(b"Content-Length: " + b"9" * 4000) + BODY),
    "a length of 5,000 digits": (431, head(b"Content-Length: " + b"9" * 5000) + BODY),
    "a space before the colon": (400, head(b"Content-Length : %d" % len(BODY)) + BODY),
    "chunked twice": (400, head(CHUNKED, CHUNKED) + CHUNKS),
    "chunked, chunked": (400, head(b"Transfer-Encoding: chunked, chunked") + CHUNKS),
    "chunked is not last": (400, head(b"Transfer-Encoding: chunked, identity") + CHUNKS),
    "chunked is not there": (400, head(b"Transfer-Encoding: gzip") + CHUNKS),
    "no such coding": (501, head(b"Transfer-Encoding: xchunked") + CHUNKS),
    "a vertical tab before it": (400, head(b"Transfer-Encoding: \vchunked") + CHUNKS),
    "chunked with a space before the colon": (400, head(b"Transfer-Encoding : chunked") + CHUNKS),
    "chunked on a line that goes on": (400, head(b"Transfer-Encoding:\r\n chunked") + CHUNKS),
    "chunked in HTTP/1.0": (400, head(CHUNKED, line=on_path(b"POST %s HTTP/1.0")) + CHUNKS),
    # The size of a chunk
    "a chunk of no size": (400, head(CHUNKED) + b"xyz\r\n" + BODY),
    "a chunk of negative size": (400, head(CHUNKED) + b"-5\r\n" + BODY),
    "a chunk's size with 0x": (400, head(CHUNKED) + b"0x" + CHUNKS),
    "a chunk's size with an underscore": (400, head(CHUNKED) + b"4_a\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk's size beyond 64 bits": (400, head(CHUNKED) + b"f" * 40 + b"\r\n" + BODY),
    "a chunk's size without end": (400, head(CHUNKED) + b"f" * 40_000),
    "a chunk longer than its size": (400, head(CHUNKED) + b"5\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk that ends in a bare LF": (400, head(CHUNKED) + CHUNKS.replace(b"\r\n", b"\n")),
    "an extension with a bare LF": (400, head(CHUNKED) + b"%x;a\nb\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "a trailer that is a length": (400, head(CHUNKED) + CHUNKS[:-2] + b"Content-Length: 5\r\n\r\n"),
    # Headers
    "51 headers": (431, head(LENGTH, *(b"X-%d: a" % n for n in range(48))) + BODY),
    "a header of 4,100 bytes": (431, head(LENGTH, b"X: " + b"a" * 4097) + BODY),
    "a header without end": (431, head(LENGTH)[:-2] + b"X: " + b"a" * 2_000_000),
    "a name without end": (431, head(LENGTH)[:-2] + b"a" * 2_000_000),
    "lines that end in a bare LF": (400, head(LENGTH).replace(b"\r\n", b"\n") + BODY),
    "a bare LF in a value": (400, head(b"X: a\n" + LENGTH) + BODY),
    "a bare CR in a value": (400, head(b"X: a\r" + LENGTH) + BODY),
    "a NUL in a value": (400, head(LENGTH, b"X: a\0b") + BODY),
    "a NUL in a name": (400, head(LENGTH, b"X\0: a") + BODY),
    "a header without a colon": (400, head(LENGTH, b"X") + BODY),
    "a header without a name": (400, head(LENGTH, b": a") + BODY),
    "a first header that goes on": (400, head(LENGTH, host=b" Host: localhost") + BODY),
    "two hosts": (400, head(LENGTH, b"Host: evil.example") + BODY),
    "two content types": (400, head(LENGTH, b"Content-Type: text/plain") + BODY),
    "http and https": (400, head(LENGTH, b"X-Forwarded-Proto: https", b"X-Forwarded-SSL: off") + BODY),
    "an expectation that cannot be met": (417, head(LENGTH, b"Expect: 200-ok") + BODY),
    # The first line
    "a path of 4,100 bytes": (414, head(LENGTH, line=b"POST /" + b"a" * 4099 + b" HTTP/1.1") + BODY),
    "a path without end": (414, b"POST /" + b"a" * 2_000_000),
    "a NUL in the path": (400, head(LENGTH, line=b"POST /a\0b HTTP/1.1") + BODY),
    "%00 in the path": (404, head(LENGTH, line=on_path(b"POST %s%%00 HTTP/1.1")) + BODY),
    "a space in the path": (400, head(LENGTH, line=b"POST /a b HTTP/1.1") + BODY),
    "a path that is no ASCII": (400, head(LENGTH, line=b"POST /\xff HTTP/1.1") + BODY),
    "dots in the path": (404, head(LENGTH, line=on_path(b"POST /x/..%s HTTP/1.1")) + BODY),
    "no slash": (400, head(LENGTH, line=b"POST api HTTP/1.1") + BODY),
    "an absolute URI of another path": (404, head(LENGTH, line=b"POST http://localhost/ HTTP/1.1") + BODY),
    "an absolute URI that is broken": (400, head(LENGTH, line=on_path(b"POST http://[::1%s HTTP/1.1")) + BODY),
    "an authority": (404, head(LENGTH, line=b"CONNECT localhost:80 HTTP/1.1") + BODY),
    "an asterisk": (404, head(LENGTH, line=b"OPTIONS * HTTP/1.1") + BODY),
    "no version": (400, on_path(b"POST %s\r\n\r\n")),
    "another version": (400, head(LENGTH, line=on_path(b"POST %s HTTP/2.0")) + BODY),
    "a method of one letter": (400, head(LENGTH, line=on_path(b"A %s HTTP/1.1")) + BODY),
    "a method of 21 letters": (400, head(LENGTH, line=on_path(b"A" * 21 + b" %s HTTP/1.1")) + BODY),
    "a method in lower case": (400, head(LENGTH, line=on_path(b"post %s HTTP/1.1")) + BODY),
    "a beginning of HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)),
    # No HTTP at all
    "garbage": (400, bytes(range(256))),
    "a mail": (400, b"EHLO evil.example\r\nMAIL FROM:<>\r\n"),
    "two empty lines": (400, b"\r\n\r\n" + head(LENGTH) + BODY),
}


def exchange(service: Service, raw: bytes) -> list[int]:
    """Send bytes as they stand, and say that nothing more will come. Returns the statuses of the answers.

    Asserts that each refusal is a problem document.
    """
    with socket.create_connection(service.address, timeout=60) as connection:
        # It may be closed before all is sent.
        with suppress(OSError):
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
        answers = re.split(rb"^(?=HTTP/1\.\d \d+ )", received(connection), flags=re.MULTILINE)[1:]
    return [status_of(answer) for answer in answers]


def status_of(answer: bytes) -> int:
    status = int(answer.split()[1])
    if status != 200:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"\r\nContent-Type: application/problem+json\r\n" in head
        problem = json.loads(body)
        assert (problem["status"], problem["title"]) == (status, HTTPStatus(status).phrase)
        assert {*problem} == {"type", "title", "status", "detail"}
        assert problem["detail"]
    return status


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes the connection."""
    answer = b""
    with connection, suppress(ConnectionError):
        while more := connection.recv(65536):
            answer += more
    return answer


def serves_others(service: Service) -> bool:
    """Assert that other clients get their answers."""
    return [done(service.rebind("?dry_run=true", data={"queue": "b"})) for _ in range(3)] == [(1, 1, 1)] * 3


@pytest.mark.parametrize(("status", "raw"), REFUSED.values(), ids=REFUSED)
def test_what_is_hardly_http_is_refused(wire: Service, url: str, status: int, raw: bytes) -> None:
    with nothing_changes(url):
        # More bytes than it reads make its close a reset, which may overtake the answer.
        assert exchange(wire, raw) in ([[status]] if len(raw) < 20_000 else [[status], []])
    assert serves_others(wire)


CLOSED = {
    "nothing": b"",
    "half a line": b"POST",
    "half a head": head()[:-2],
    "TLS": b"\x16\x03\x01\0\xc8\x01" + bytes(9),
}


@pytest.mark.parametrize("raw", CLOSED.values(), ids=CLOSED)
def test_what_ends_before_it_is_a_request_is_closed(wire: Service, url: str, raw: bytes) -> None:
    with nothing_changes(url):
        assert exchange(wire, raw) == []
    assert serves_others(wire)


def test_garbage_after_a_request_is_no_part_of_it(wire: Service, url: str) -> None:
    dry = head(LENGTH, line=DRY) + BODY
    with nothing_changes(url):
        assert exchange(wire, dry + b"\0\1\2 garbage\r\n\r\n") == [200, 400]
    assert serves_others(wire)


def test_what_follows_a_body_that_was_not_read_is_no_request(wire: Service, url: str) -> None:
    """Where the first request is refused unread, its body must not be taken for the next request."""
    smuggled = head(LENGTH) + BODY
    with nothing_changes(url):
        assert exchange(wire, head(b"Content-Length: %d" % len(smuggled), line=b"POST / HTTP/1.1") + smuggled) == [404]
    assert serves_others(wire)


def test_requests_on_one_connection_are_answered_one_by_one(wire: Service, url: str) -> None:
    dry = head(LENGTH, line=DRY) + BODY
    with nothing_changes(url):
        assert exchange(wire, dry * 20) == [200] * 20


HARMLESS = {
    "an absolute URI": head(LENGTH, line=on_path(b"POST http://localhost%s?dry_run=true HTTP/1.1")),
    "another path in SCRIPT_NAME": head(LENGTH, b"SCRIPT_NAME: /x", line=DRY),
    "another path in PATH_INFO": head(LENGTH, b"PATH_INFO: /x", line=DRY),
    "a length with another name": head(LENGTH, b"Content_Length: 0", line=DRY),
    "another method": head(LENGTH, b"X-HTTP-Method-Override: PUT", line=DRY),
    "50 headers": head(LENGTH, *(b"X-%d: a" % n for n in range(47)), line=DRY),
    "a header of 4,000 bytes": head(LENGTH, b"X: " + b"a" * 3997, line=DRY),
    "an upgrade": head(LENGTH, b"Upgrade: h2c, websocket", line=DRY),
}


@pytest.mark.parametrize("raw", HARMLESS.values(), ids=HARMLESS)
def test_what_would_mislead_others_makes_no_difference(wire: Service, url: str, raw: bytes) -> None:
    with nothing_changes(url):
        assert exchange(wire, raw + BODY) == [200]


# Half of each, and then silence: a client that keeps its connection and says no more
STALLED = {
    "in the head": head()[:-2],
    "in the body": head(LENGTH) + BODY[:9],
    "in a chunk": head(CHUNKED) + b"ffff\r\n" + BODY,
    "after a chunk": head(CHUNKED) + CHUNKS[:-2],
}


def test_a_client_that_stalls_is_cut_off_while_others_are_served(wire: Service, url: str) -> None:
    stalled = {name: socket.create_connection(wire.address, timeout=60) for name in STALLED}
    with nothing_changes(url):
        for name, connection in stalled.items():
            connection.sendall(STALLED[name])
        for _ in range(5):
            assert serves_others(wire)
        answers = {name: received(connection)[:13] for name, connection in stalled.items()}
    refused = b"HTTP/1.1 400 "
    assert answers == {"in the head": b"", "in the body": refused, "in a chunk": refused, "after a chunk": refused}
    assert serves_others(wire)


def test_a_worker_ends_for_none_of_this(wire: Service) -> None:
    until(lambda: booted(wire) >= 2)
    assert (booted(wire), wire.process.poll()) == (2, None)


def booted(service: Service) -> int:
    """How many workers gunicorn has started, the first two and each that took the place of another."""
    return service.output.read_text().count("Booting worker")
