"""The story of a message from its loading to its delivery, with the example's worker and real SMTP servers."""

import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from databases import engine_for, run_sql, stored
from factories import message
from services import ROOT, Service, free_port
from sqlalchemy import text
from waiting import until

import deliverylog
from queues import QueueRegistry
from tables import SCHEMA_VERSION

CONTENT = b"Subject: hello\r\n\r\nHello Ada\r\n"

pytestmark = pytest.mark.slow  # each starts a worker of its own


class Sink:
    """An SMTP server that refuses recipients by their names, or all of them with `refusal`, and takes the rest."""

    def __init__(self, refusal: str = "", host: str = "127.0.0.1", utf8: bool = True) -> None:
        self.refusal = refusal
        self.envelopes: list[Envelope] = []
        self.on_data: Callable[[], object] = lambda: None
        """Called with each mail, before it is taken."""
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.controller = Controller(self, hostname=host, port=self.port, enable_SMTPUTF8=utf8)
        self.controller.start()

    async def handle_RCPT(self, server: SMTP, _session: Session, envelope: Envelope, address: str, *_: Any) -> str:
        if address.startswith("cut"):
            assert server.transport
            server.transport.close()
        if address.startswith("bad"):
            return "550 5.1.1 no such user"
        if address.startswith("full"):
            return "451 4.2.2 mailbox full"
        if self.refusal:
            return self.refusal
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        self.on_data()
        self.envelopes.append(envelope)
        return f"250 2.0.0 taken as {len(self.envelopes)}"


@pytest.fixture
def sink() -> Iterator[Callable[..., Sink]]:
    with ExitStack() as stack:

        def start(refusal: str = "", **options: Any) -> Sink:
            sink = Sink(refusal, **options)
            stack.callback(sink.controller.stop)
            return sink

        yield start


@dataclass
class Worker:
    """The example's worker, as a process of its own."""

    process: subprocess.Popen[bytes]
    output: Path

    def says(self) -> str:
        return self.output.read_text()


@pytest.fixture
def start(tmp_path: Path, url: str) -> Iterator[Callable[..., Worker]]:
    with ExitStack() as stack:

        def worker(*options: str) -> Worker:
            command = [sys.executable, "examples/deliver.py", *options]
            environment = os.environ | {"REBIND_DATABASE_URL": url, "REBIND_BUSY_TIMEOUT": "0.1"}
            output = stack.enter_context((tmp_path / "worker.log").open("wb"))
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=output))
            stack.callback(process.kill)
            return Worker(process, tmp_path / "worker.log")

        yield worker


def deliver(url: str, **routes: str) -> None:
    """Run the example's worker once over what is due."""
    options = [f"--route={domain}={address}" for domain, address in routes.items()]
    command = [sys.executable, "examples/deliver.py", "--once", *options]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"REBIND_DATABASE_URL": url}, check=True, timeout=60)


def types(queues: QueueRegistry) -> list[str]:
    return [type for type, _, _ in outcomes(queues)]


def outcomes(queues: QueueRegistry) -> list[tuple[str, Any, str]]:
    """The type and recipient of each record, and what the peer said."""
    records = deliverylog.records(queues.database)
    return [(each["type"], each["recipient"], each["response"]["content"]) for each in records]


@pytest.mark.parametrize(
    "queue",
    [
        pytest.param("rebound.com", id="of another domain"),
        pytest.param("rebound.example.com!{sink}", id="of a routing domain with a port"),
    ],
)
def test_a_message_that_its_route_refuses_is_rebound_and_delivered_once(
    service: Service, queues: QueueRegistry, url: str, sink: Callable[..., Sink], queue: str
) -> None:
    refusing, taking = sink("451 4.7.1 try again later"), sink()
    queues.load([message("ada@example.com", content=CONTENT)])
    routes = {"example.com": refusing.address, "rebound.com": taking.address}

    deliver(url, **routes)
    assert types(queues) == ["TransientFailure"]
    deliver(url, **routes)
    assert types(queues) == ["TransientFailure"], "it is not due, and was not tried again"

    answer = service.rebind(domain="example.com", data={"queue": queue.format(sink=taking.address)})
    assert answer.headers["Rebind-Flushed"] == "1"
    deliver(url, **routes)

    assert types(queues) == ["TransientFailure", "AdminRebind", "Delivery"]
    assert [(e.mail_from, e.rcpt_tos) for e in taking.envelopes] == [("news@acme.example", ["ada@example.com"])]
    assert taking.envelopes[0].content == CONTENT
    assert (refusing.envelopes, stored(url)) == ([], [])


def test_a_permanent_refusal_bounces(queues: QueueRegistry, url: str, sink: Callable[..., Sink]) -> None:
    queues.load([message("ada@example.com")])
    refusing = sink("550-5.1.1 no such\r\n550 5.1.1 user")
    deliver(url, **{"example.com": f"localhost:{refusing.port}"})
    (record,) = deliverylog.records(queues.database)
    assert (record["type"], stored(url)) == ("Bounce", [])
    said = {"code": 550, "content": "no such user", "command": None}
    assert record["response"] == said | {"enhanced_code": {"class": 5, "subject": 1, "detail": 1}}
    assert record["peer_address"] == {"name": "localhost", "addr": "127.0.0.1"}


def test_each_outcome_has_a_record_that_names_its_recipients(
    queues: QueueRegistry, url: str, sink: Callable[..., Sink]
) -> None:
    queues.load([message([f"{name}@example.com" for name in ("good", "full1", "bad", "full2", "ada")])])
    some = sink()
    deliver(url, **{"example.com": some.address})
    assert [envelope.rcpt_tos for envelope in some.envelopes] == [["good@example.com", "ada@example.com"]]
    assert outcomes(queues) == [
        ("Delivery", ["good@example.com", "ada@example.com"], "taken as 1"),
        ("TransientFailure", ["full1@example.com", "full2@example.com"], "mailbox full"),
        ("Bounce", "bad@example.com", "no such user"),
    ]
    left = ["full1@example.com", "full2@example.com"]
    assert [(row["recipient"], row["num_attempts"]) for row in stored(url)] == [(left, 1)]


def test_a_connection_that_breaks_between_recipients_loses_none_of_them(
    queues: QueueRegistry, url: str, sink: Callable[..., Sink]
) -> None:
    recipients = ["good@example.com", "cut@example.com", "ada@example.com"]
    queues.load([message(recipients)])
    deliver(url, **{"example.com": sink().address})
    assert (types(queues), [row["recipient"] for row in stored(url)]) == (["TransientFailure"], [recipients])


def test_an_address_that_is_not_ascii_is_delivered_to_a_peer_that_takes_it(
    queues: QueueRegistry, url: str, sink: Callable[..., Sink]
) -> None:
    """RFC 6531. By another peer it bounces, and the others still get their mail."""
    recipients = ["jörg@one.example", "ada@one.example"]
    queues.load([message(recipients, meta={"queue": name}) for name in ("one.example", "two.example")])
    both, ascii_only = sink(), sink(utf8=False)
    deliver(url, **{"one.example": both.address, "two.example": ascii_only.address})
    assert [envelope.rcpt_tos for envelope in both.envelopes + ascii_only.envelopes] == [recipients, recipients[1:]]
    assert sorted(outcomes(queues), key=str) == [
        ("Bounce", "jörg@one.example", "the peer takes ASCII addresses only"),
        ("Delivery", "ada@one.example", "taken as 1"),
        ("Delivery", recipients, "taken as 1"),
    ]


def test_a_routing_domain_may_be_an_address_literal(queues: QueueRegistry, url: str, sink: Callable[..., Sink]) -> None:
    """RFC 5321, section 4.1.3, with a port or without the tag, as people write it."""
    four, six = sink(), sink(host="::1")
    sites = [f"[127.0.0.1]:{four.port}", f"[IPv6:::1]:{six.port}", f"[::1]:{six.port}"]
    queues.load([message(meta={"routing_domain": site}) for site in sites])
    deliver(url)
    assert {each["site"]: (each["type"], each["peer_address"]) for each in deliverylog.records(queues.database)} == {
        sites[0]: ("Delivery", {"name": "127.0.0.1", "addr": "127.0.0.1"}),
        sites[1]: ("Delivery", {"name": "::1", "addr": "::1"}),
        sites[2]: ("Delivery", {"name": "::1", "addr": "::1"}),
    }


def test_a_queue_that_names_no_host_keeps_its_messages_and_stops_nobody(
    queues: QueueRegistry, url: str, sink: Callable[..., Sink]
) -> None:
    names = ["", "::1", "[::1", "[]:25", "relay..example", "relay.example:smtp", "127.0.0.1:65536", "good.example"]
    queues.load([message(meta={"queue": name}) for name in names])
    deliver(url, **{"good.example": sink().address})
    assert sorted(types(queues)) == ["Delivery"] + ["TransientFailure"] * 7
    peers = [each["peer_address"] for each in deliverylog.records(queues.database) if each["type"] != "Delivery"]
    assert peers == [None] * 7


@pytest.mark.parametrize(
    ("replies", "type", "code"),
    [
        (["250 hello"], "TransientFailure", 400),
        (["HTTP/1.1 200 OK"], "TransientFailure", 400),
        (["220 hello", "250 you", "250", "250", "250 taken"], "TransientFailure", 400),
        (["220 hello", "250 you", "250", "250", "354", "250 taken"], "Delivery", 250),
        (["220 hello", "250 you", "252", "???"], "TransientFailure", 0),
        (["220 hello", "250 you", "250", "551 \0 \x1b \xff"], "Bounce", 551),
    ],
    ids=["another greeting", "no SMTP", "250, not 354", "no answer to QUIT", "no code", "a NUL"],
)
def test_a_peer_that_breaks_the_protocol_took_the_mail_if_it_said_so(
    queues: QueueRegistry, url: str, replies: list[str], type: str, code: int
) -> None:
    class Peer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for reply in replies:
                self.wfile.write(f"{reply}\r\n".encode("latin-1"))
                self.rfile.readline()

    queues.load([message()])
    with socketserver.TCPServer(("127.0.0.1", 0), Peer) as server:
        threading.Thread(target=server.serve_forever).start()
        deliver(url, **{"example.com": f"127.0.0.1:{server.server_address[1]}"})
        server.shutdown()
    assert [(each["type"], each["response"]["code"]) for each in deliverylog.records(queues.database)] == [(type, code)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_is_stopped_writes_what_became_of_the_message_at_hand(
    queues: QueueRegistry, sink: Callable[..., Sink], start: Callable[..., Worker], number: int
) -> None:
    queues.load([message(), message()])
    taking = sink()
    taking.on_data = lambda: worker.process.send_signal(number)
    worker = start(f"--route=example.com={taking.address}")
    assert worker.process.wait(60) == 0
    assert (types(queues), len(taking.envelopes), worker.says()) == (["Delivery"], 1, "")


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (["--route=example.com"], {}, "error: argument --route: .*'example.com'"),
        (["--route=example.com=[::1]:99999"], {}, r"error: argument --route: .*'example.com=\[::1\]:99999'"),
        (["--once"], {"REBIND_BUSY_TIMEOUT": "soon"}, "^the busy timeout must be a number of .*: 'soon'"),
    ],
    ids=["a route to nowhere", "a port beyond 16 bits", "a timeout of no number"],
)
def test_what_is_wrong_with_its_options_is_told_in_a_line(
    options: list[str], environment: dict[str, str], said: str
) -> None:
    command = [sys.executable, "examples/deliver.py", *options]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode > 0
    assert re.search(f"{said}\n$", ended.stderr)


def test_mail_that_was_taken_is_acknowledged_when_a_store_that_could_not_be_used_is_back(
    queues: QueueRegistry, url: str, sink: Callable[..., Sink], start: Callable[..., Worker]
) -> None:
    queues.load([message()])
    taking = sink()
    taking.on_data = lambda: run_sql(url, "ALTER TABLE log RENAME TO away", "UPDATE schema_version SET version = 99")
    worker = start("--once", f"--route=example.com={taking.address}")
    try:
        unusable = "waiting for the store: the store has schema version 99"
        until(lambda: unusable in worker.says() or worker.process.poll() is not None)
    finally:
        run_sql(url, "ALTER TABLE away RENAME TO log", f"UPDATE schema_version SET version = {SCHEMA_VERSION}")
    assert worker.process.wait(60) == 0, worker.says()
    assert (types(queues), len(taking.envelopes), stored(url)) == (["Delivery"], 1, [])


def test_a_store_out_of_reach_is_waited_for_and_mail_that_was_taken_is_not_sent_again(
    queues: QueueRegistry, url: str, sink: Callable[..., Sink], start: Callable[..., Worker]
) -> None:
    queues.load([message()])
    lock = "BEGIN IMMEDIATE" if url.startswith("sqlite") else "BEGIN; LOCK TABLE messages"
    taking = sink()
    said_before: list[str] = []

    def lock_again() -> None:
        db.execute(text(lock))
        said_before.append(worker.says())

    taking.on_data = lock_again
    with engine_for(url).execution_options(isolation_level="AUTOCOMMIT").connect() as db:
        db.execute(text(lock))
        worker = start("--once", f"--route=example.com={taking.address}")
        until(lambda: "waiting for the store:" in worker.says())
        db.execute(text("ROLLBACK"))
        until(lambda: bool(taking.envelopes) and len(worker.says()) > len(said_before[0]))
        db.execute(text("ROLLBACK"))
    assert worker.process.wait(60) == 0
    assert (types(queues), len(taking.envelopes), stored(url)) == (["Delivery"], 1, [])
    assert "Traceback" not in worker.says()
