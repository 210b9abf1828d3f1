"""The story of a message from its loading to its delivery, with a real delivery worker and real SMTP."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from conftest import ROOT, Service, free_port, message, stored
from deliverylog import response

from delivery import bounced, claim, delivered, postponed
from queues import QueueRegistry, RebindRequest


class Sink:
    """An SMTP server that takes every message, or answers every recipient with `refusal`."""

    def __init__(self, refusal: str = "", quit: str = "221 Bye") -> None:
        self.refusal = refusal
        self.quit = quit
        self.envelopes: list[Envelope] = []
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.controller = Controller(self, hostname="127.0.0.1", port=port)
        self.controller.start()

    async def handle_RCPT(self, _server: SMTP, _session: Session, envelope: Envelope, address: str, *_: Any) -> str:
        if address.startswith("bad"):
            return "550 5.1.1 no such user"
        if self.refusal and not address.startswith("good"):
            return self.refusal
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_QUIT(self, _server: SMTP, _session: Session, _envelope: Envelope) -> str:
        return self.quit

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        self.envelopes.append(envelope)
        return "250 OK"


@pytest.fixture
def sink() -> Iterator[Callable[..., Sink]]:
    sinks: list[Sink] = []

    def start(refusal: str = "", **answers: str) -> Sink:
        sinks.append(Sink(refusal, **answers))
        return sinks[-1]

    yield start
    for each in sinks:
        each.controller.stop()


def deliver(url: str, **routes: str) -> None:
    """Run the example's worker once over what is due."""
    options = [f"--route={domain}={address}" for domain, address in routes.items()]
    command = [sys.executable, "examples/deliver.py", "--once", *options]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"REBIND_DATABASE_URL": url}, check=True, timeout=60)


def types(queues: QueueRegistry) -> list[str]:
    return [record["type"] for record in queues.records()]


CONTENT = b"Subject: hello\r\n\r\nHello Ada\r\n"


@pytest.mark.parametrize(
    "rebind",
    [
        pytest.param({"data": {"queue": "rebound.com"}}, id="to a queue of another domain"),
        pytest.param({"data": {"queue": "rebound.example.com!{sink}"}}, id="to a routing domain with a port"),
        pytest.param(
            {"data": {"queue": "rebound.com", "sign": "me"}, "trigger_rebind_event": True}, id="by the event's handler"
        ),
    ],
)
def test_a_message_that_its_route_refuses_is_rebound_and_delivered_once(
    service: Service, queues: QueueRegistry, url: str, sink: Callable[..., Sink], rebind: dict[str, Any]
) -> None:
    refusing, taking = sink("451 4.7.1 try again later"), sink()
    queues.load([message("ada@example.com", content=CONTENT)])
    routes = {"example.com": refusing.address, "rebound.com": taking.address}

    deliver(url, **routes)
    assert types(queues) == ["TransientFailure"]
    deliver(url, **routes)
    assert types(queues) == ["TransientFailure"], "it is not due, and was not tried again"

    data = {key: value.format(sink=taking.address) for key, value in rebind["data"].items()}
    answer = service.rebind(domain="example.com", **(rebind | {"data": data}))
    assert answer.headers["Rebind-Flushed"] == "1"
    deliver(url, **routes)

    assert types(queues) == ["TransientFailure", "AdminRebind", "Delivery"]
    assert [(e.mail_from, e.rcpt_tos) for e in taking.envelopes] == [("news@acme.example", ["ada@example.com"])]
    assert taking.envelopes[0].content == CONTENT
    assert (refusing.envelopes, stored(url)) == ([], [])
    if "sign" in data:
        assert list(queues.records())[-1]["meta"]["signed"] == {"by": ["policy", "me"], "times": 1}


def test_a_permanent_refusal_bounces(queues: QueueRegistry, url: str, sink: Callable[..., Sink]) -> None:
    queues.load([message("ada@example.com")])
    deliver(url, **{"example.com": sink("550 5.1.1 no such user").address})
    (record,) = queues.records()
    assert (record["type"], stored(url)) == ("Bounce", [])
    assert record["response"] == {
        "code": 550,
        "enhanced_code": {"class": 5, "subject": 1, "detail": 1},
        "content": "no such user",
        "command": None,
    }


def test_recipients_that_were_refused_for_now_are_tried_again_without_the_others(
    queues: QueueRegistry, url: str, sink: Callable[..., Sink]
) -> None:
    queues.load([message(["good@example.com", "ada@example.com", "bad@example.com"])])
    some = sink("451 4.2.2 mailbox full")
    deliver(url, **{"example.com": some.address})
    assert [envelope.rcpt_tos for envelope in some.envelopes] == [["good@example.com"]]
    assert [(row["recipient"], row["num_attempts"]) for row in stored(url)] == [("ada@example.com", 1)]


def test_a_claimed_message_is_nobody_elses_until_its_lease_ends(queues: QueueRegistry) -> None:
    queues.load([message(content=CONTENT) for _ in range(3)])
    claims = claim(2, lease=60)
    assert len({each.id for each in claims + claim(2, lease=-1)}) == 3
    assert claims[0].content == CONTENT
    assert len(claim(5, lease=60)) == 1, "a lease that has ended comes back"
    assert claim(5, lease=60) == []


def test_a_failure_by_the_old_route_leaves_a_message_due_that_was_rebound_meanwhile(
    queues: QueueRegistry, url: str
) -> None:
    queues.load([message()])
    (claimed,) = claim(1, lease=60)
    queues.rebind(RebindRequest("r", {"queue": "other"}), actor="me")
    (rebound,) = stored(url)
    postponed(claimed, 4e9, {"response": response(451, "later")})
    assert stored(url) == [rebound | {"num_attempts": 1}]


def test_who_has_a_message_does_not_get_it_again_after_a_rebind(queues: QueueRegistry, url: str) -> None:
    queues.load([message(["good@example.com", "ada@example.com"])])
    (claimed,) = claim(1, lease=60)
    queues.rebind(RebindRequest("r", {"queue": "other"}), actor="me")
    postponed(claimed, 4e9, {"response": response(451, "later")}, recipient=["ada@example.com"])
    assert [(row["queue"], row["recipient"]) for row in stored(url)] == [("other", "ada@example.com")]


def test_a_message_that_was_taken_is_delivered_whatever_the_answer_to_quit_is(
    queues: QueueRegistry, url: str, sink: Callable[..., Sink]
) -> None:
    queues.load([message()])
    rude = sink(quit="421 4.3.2 go away")
    deliver(url, **{"example.com": rude.address})
    assert (types(queues), len(rude.envelopes)) == (["Delivery"], 1)


def test_a_message_is_taken_away_once(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    (claimed,) = claim(1, lease=60)
    details = {"response": response(250, "OK")}
    assert (delivered(claimed, details), bounced(claimed, details)) == (True, False)
    assert (types(queues), stored(url)) == (["Delivery"], [])
