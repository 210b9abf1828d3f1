"""Tests with what no honest client sends: bodies made to confuse, and bytes that are hardly HTTP.

Each is answered or its connection closed, changes nothing, and leaves the service to others. What an honest client may
get wrong is in test_app.py.
"""

import re
import socket
from contextlib import suppress

import pytest
from answers import done, is_problem
from databases import nothing_changes
from factories import message
from services import PATH, Service, Start
from waiting import until

from queues import QueueRegistry

BODY = b'{"reason": "a test", "data": {"queue": "elsewhere"}, "always_flush": true}'  # would change all that is there
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
    own.database.prepare(create=True)
    own.load([message(id="m-ada")])
    return shared()


# Bodies


def test_about_the_depth_that_can_just_be_read_nothing_breaks(wire: Service) -> None:
    for depth in range(450, 500):
        response = wire.post(BODY.replace(b'"elsewhere"', b'[{"a": ' * depth + b"0" + b"}]" * depth))
        if response.status_code == 400:
            assert is_problem(response, 400, "the body is not valid JSON: nested too deeply")
        else:
            assert is_problem(response, 422, SHOULD_BE, {"data": {"queue": {"value": ["Not a valid string."]}}})


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

REFUSED: dict[str, bytes] = {
    # How long the body is, told in two ways: what smuggles a request past a proxy
    "a length, and chunked": head(LENGTH, CHUNKED) + CHUNKS,
    "chunked, and length 0 before another request": head(b"Content-Length: 0", CHUNKED) + head(LENGTH) + BODY,
    "two lengths": head(LENGTH, b"Content-Length: 0") + BODY,
    "a negative length": head(b"Content-Length: -1") + BODY,
    "a length beyond 64 bits": head(b"Content-Length: 99999999999999999999") + BODY,
    "a space before the colon": head(b"Content-Length : %d" % len(BODY)) + BODY,
    "chunked on a line that goes on": head(b"Transfer-Encoding:\r\n chunked") + CHUNKS,
    "chunked in HTTP/1.0": head(CHUNKED, line=on_path(b"POST %s HTTP/1.0")) + CHUNKS,
    # The size of a chunk
    "a chunk of no size": head(CHUNKED) + b"xyz\r\n" + BODY,
    "a chunk's size beyond 64 bits": head(CHUNKED) + b"f" * 40 + b"\r\n" + BODY,
    "a chunk's size without end": head(CHUNKED) + b"f" * 40_000,
    "a chunk longer than its size": head(CHUNKED) + b"5\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk that ends in a bare LF": head(CHUNKED) + CHUNKS.replace(b"\r\n", b"\n"),
    "a trailer that is a length": head(CHUNKED) + CHUNKS[:-2] + b"Content-Length: 5\r\n\r\n",
    "a body that ends in a chunk": head(CHUNKED) + CHUNKS[:20],
    # Headers
    "51 headers": head(LENGTH, *(b"X-%d: a" % n for n in range(48))) + BODY,
    "a header of 4,100 bytes": head(LENGTH, b"X: " + b"a" * 4097) + BODY,
    "a name without end": head(LENGTH)[:-2] + b"a" * 2_000_000,
    "lines that end in a bare LF": head(LENGTH).replace(b"\r\n", b"\n") + BODY,
    "a bare CR in a value": head(b"X: a\r" + LENGTH) + BODY,
    "two hosts": head(LENGTH, b"Host: evil.example") + BODY,
    # The first line
    "a path of 4,100 bytes": head(LENGTH, line=b"POST /" + b"a" * 4099 + b" HTTP/1.1") + BODY,
    "%00 in the path": head(LENGTH, line=on_path(b"POST %s%%00 HTTP/1.1")) + BODY,
    "an absolute URI that is broken": head(LENGTH, line=on_path(b"POST http://[::1%s HTTP/1.1")) + BODY,
    # No HTTP at all
    "garbage": bytes(range(256)),
}


def exchange(service: Service, raw: bytes) -> list[int]:
    """Send bytes as they stand, and say that nothing more will come. Returns the statuses of the answers."""
    with socket.create_connection(service.address, timeout=60) as connection:
        # It may be closed before all is sent.
        with suppress(OSError):
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
        return [int(status) for status in re.findall(rb"^HTTP/1\.\d (\d+) ", received(connection), re.MULTILINE)]


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


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_what_is_hardly_http_is_refused(wire: Service, url: str, raw: bytes) -> None:
    """By gunicorn or by the application, whichever sees first what is wrong."""
    with nothing_changes(url):
        statuses = exchange(wire, raw)
    # More bytes than it reads make its close a reset, which may overtake the answer.
    assert len(statuses) == 1 or (statuses == [] and len(raw) > 20_000)
    assert all(400 <= status < 600 and status != 500 for status in statuses)
    assert serves_others(wire)


@pytest.mark.parametrize("raw", [b"", b"POST", head()[:-2]], ids=["nothing", "half a line", "half a head"])
def test_what_ends_before_it_is_a_request_is_closed(wire: Service, url: str, raw: bytes) -> None:
    with nothing_changes(url):
        assert exchange(wire, raw) == []
    assert serves_others(wire)


def test_what_follows_a_body_that_was_not_read_is_no_request(wire: Service, url: str) -> None:
    """Where the first request is refused unread, its body must not be taken for the next request."""
    smuggled = head(LENGTH) + BODY
    with nothing_changes(url):
        assert exchange(wire, head(b"Content-Length: %d" % len(smuggled), line=b"POST / HTTP/1.1") + smuggled) == [404]
    assert serves_others(wire)


HARMLESS = {
    "another path in PATH_INFO": head(LENGTH, b"PATH_INFO: /x", line=DRY),
    "a length with another name": head(LENGTH, b"Content_Length: 0", line=DRY),
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
