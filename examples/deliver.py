"""A small delivery worker: it claims what is due in any queue, delivers it by SMTP, and writes what became of it.

    python examples/deliver.py                                 deliver until Ctrl-C
    python examples/deliver.py --once                          deliver what is due now, and end
    python examples/deliver.py --route example.com=127.0.0.1:2525

It connects to the queue's routing domain, or else its domain: to that host itself, at the port that it carries or 25,
without a look-up of MX records. The database is the service's, by REBIND_DATABASE_URL and
REBIND_BUSY_TIMEOUT.
"""

import argparse
import os
import re
import signal
import smtplib
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from delivery import Claim, Outcome, claim, recipient_list, settle
from deliverylog import response
from names import QueueName
from queues import registry
from store import StoreError, StoreUnavailable, StoreUnusable

LEASE = 900  # seconds that a message is ours: longer than one attempt may take
TIMEOUT = 60  # seconds for each step of an SMTP conversation
FIRST_RETRY = 60  # seconds after a first failed attempt; doubled at each further one
LAST_RETRY = 4 * 3600  # seconds, the longest wait
ATTEMPTS = 16  # after this many failed ones the message bounces
PAUSE = 1  # seconds between two looks at the store while nothing is due or it is out of reach

# relay.example, relay.example:2525, or an address literal: [192.0.2.1]:2525, [IPv6:2001:db8::1], and [::1] as well
SITE = re.compile(r"(?:\[(?:IPv6:)?([^][]+)\]|([^][:]+))(?::([0-9]{1,5}))?", re.IGNORECASE)

Reply = tuple[int, bytes | str]  # an SMTP server's: its code, and the text after that
ASCII_ONLY: Reply = (553, "5.6.7 the peer takes ASCII addresses only")  # RFC 6531, section 3.5

stopping = False


def main() -> None:
    """Deliver, as the command line says."""
    parser = argparse.ArgumentParser(description="Deliver the messages that are due.")
    parser.add_argument("--once", action="store_true", help="deliver what is due now, and end")
    parser.add_argument("--route", type=route, action="append", default=[], help="where a domain is: DOMAIN=HOST:PORT")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    default = Path(__file__).parent.parent / "instance" / "queues.db"
    try:
        busy_timeout = os.environ.get("REBIND_BUSY_TIMEOUT", "30")
        registry.bind(os.environ.get("REBIND_DATABASE_URL", f"sqlite:///{default}"), busy_timeout)
        work(options.once, dict(options.route))
    except StoreUnusable as error:
        sys.exit(str(error))


def route(text: str) -> tuple[str, tuple[str, int]]:
    """A domain, and where it is. Raises ValueError."""
    domain, _, site = text.partition("=")
    return domain.lower(), host_of(site)


def host_of(site: str) -> tuple[str, int]:
    """The host and port that a domain names. Raises ValueError."""
    match = SITE.fullmatch(site)
    if not match or int(match[3] or 25) > 65535:
        raise ValueError(f"{site!r} does not name a host")
    return match[1] or match[2], int(match[3] or 25)


def stop(number: int, _: object) -> None:
    """End when the attempt that is under way has been written; the second time, at once."""
    global stopping
    stopping = True
    signal.signal(number, signal.SIG_DFL)


def work(once: bool, routes: dict[str, tuple[str, int]]) -> None:
    """Deliver one message after another."""
    while not stopping:
        try:
            claims = claim(count=1, lease=LEASE)
        except StoreUnavailable as error:
            wait_for_store(error)
            continue
        if claims:
            write(claims[0], *attempt(claims[0], routes))
        elif once:
            return
        else:
            time.sleep(PAUSE)


def attempt(message: Claim, routes: dict[str, tuple[str, int]]) -> tuple[dict[str, Any], dict[str, Reply]]:
    """Try to deliver a message. Gives what its records will say of the peer, and the reply for each recipient."""
    site = QueueName.parse(message.queue).site
    peer: dict[str, Any] = {"site": site, "peer_address": None, "delivery_protocol": "ESMTP"}
    recipients = recipient_list(message)
    try:
        host, port = routes.get(site.lower()) or host_of(site)
        with closing(smtplib.SMTP(host, port, timeout=TIMEOUT)) as smtp:
            address, *_ = smtp.sock.getpeername()  # type: ignore[union-attr]  # it is connected
            peer["peer_address"] = {"name": host, "addr": address.partition("%")[0]}  # without a zone
            replies = send(smtp, message.sender, recipients, message.content)
            with suppress(OSError, smtplib.SMTPException):
                smtp.quit()  # whatever the answer is: the message was taken, or it was not
            return peer, replies
    except smtplib.SMTPResponseException as error:
        return peer, dict.fromkeys(recipients, refusal(error))
    except (OSError, smtplib.SMTPException, ValueError) as error:
        return peer, dict.fromkeys(recipients, (451, f"4.4.1 {type(error).__name__}: {error}"))


def send(smtp: smtplib.SMTP, sender: str, recipients: list[str], content: bytes) -> dict[str, Reply]:
    """Each recipient's reply: to RCPT if it was refused there, otherwise to the content (RFC 5321, section 3.3)."""
    smtp.ehlo_or_helo_if_needed()
    utf8 = smtp.has_extn("smtputf8")
    replies = dict.fromkeys(recipients, ASCII_ONLY)
    possible = [each for each in recipients if utf8 or (sender + each).isascii()]
    if possible:
        plain = "".join([sender, *possible]).isascii()
        reply: Reply = smtp.mail(sender, [] if plain else ["SMTPUTF8", "BODY=8BITMIME"])
        replies |= {each: smtp.rcpt(each) if is_success(reply) else reply for each in possible}
    accepted = [each for each in recipients if is_success(replies[each])]
    if accepted:
        try:
            reply = smtp.data(content)
        except smtplib.SMTPDataError as error:
            reply = refusal(error)
        replies |= dict.fromkeys(accepted, reply)
    return replies


def is_success(reply: Reply) -> bool:
    """RFC 5321, section 4.2.1."""
    return 200 <= reply[0] < 300


def refusal(error: smtplib.SMTPResponseException) -> Reply:
    """The reply in place of another that was due, which is not a success whatever its code is."""
    return max(error.smtp_code, 400), error.smtp_error


def write(message: Claim, peer: dict[str, Any], replies: dict[str, Reply]) -> None:
    """Write a record for each different reply, naming who got it; who was refused for now is tried again later.

    RFC 5321, section 4.5.4. It waits for the store as long as need be: the peer has the message already.
    """
    outcomes = []
    for reply in dict.fromkeys(replies.values()):
        code, text = reply
        said = text.decode(errors="replace") if isinstance(text, bytes) else text
        details = peer | {"response": response(max(code, 0), said.replace("\0", " "))}  # no database keeps a NUL
        who = [each for each in replies if replies[each] == reply]
        final = code >= 500 or message.num_attempts + 1 >= ATTEMPTS
        outcomes.append(
            Outcome("Delivery" if is_success(reply) else "Bounce" if final else "TransientFailure", who, details)
        )
    due = time.time() + min(FIRST_RETRY * 2**message.num_attempts, LAST_RETRY)
    while True:
        try:
            settle(message, outcomes, due)
            return
        except (StoreUnavailable, StoreUnusable) as error:  # one that is gone may come back too
            wait_for_store(error)


def wait_for_store(error: StoreError) -> None:
    """Say why, in one line, and wait a moment."""
    print("waiting for the store:", *str(error).split(), file=sys.stderr)
    time.sleep(PAUSE)


if __name__ == "__main__":
    main()
