"""A small delivery worker: it claims what is due in any queue, delivers it by SMTP, and writes what became of it.

    python examples/deliver.py                                 deliver until Ctrl-C
    python examples/deliver.py --once                          deliver what is due now, and end
    python examples/deliver.py --route example.com=127.0.0.1:2525

It connects to the queue's routing domain, or else its domain: to that host itself, at the port that it carries or 25,
without a look-up of MX records. The database is the service's, by REBIND_DATABASE_URL.
"""

import argparse
import os
import smtplib
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from deliverylog import response

from delivery import Claim, bounced, claim, delivered, postponed
from names import QueueName
from queues import registry

LEASE = 900  # seconds that a message is ours: longer than one attempt may take
TIMEOUT = 60  # seconds for each step of an SMTP conversation
FIRST_RETRY = 60  # seconds after a first failed attempt; doubled at each further one
LAST_RETRY = 4 * 3600  # seconds, the longest wait
ATTEMPTS = 16  # after so many failed ones the message bounces
IDLE = 1  # seconds between two looks at the queues while nothing is due


def main() -> None:
    """Deliver, as the command line says."""
    parser = argparse.ArgumentParser(description="Deliver the messages that are due.")
    parser.add_argument("--once", action="store_true", help="deliver what is due now, and end")
    parser.add_argument("--route", action="append", default=[], metavar="DOMAIN=HOST:PORT", help="where a domain is")
    options = parser.parse_args()
    routes = dict(route.split("=", 1) for route in options.route)
    default = Path(__file__).parent.parent / "instance" / "queues.db"
    registry.bind(os.environ.get("REBIND_DATABASE_URL", f"sqlite:///{default}"), busy_timeout=30)
    while True:
        claims = claim(count=1, lease=LEASE)
        for message in claims:
            attempt(message, routes)
        if not claims and options.once:
            return
        if not claims:
            time.sleep(IDLE)


def attempt(message: Claim, routes: dict[str, str]) -> None:
    """Deliver one message, and write what became of it."""
    name = QueueName.parse(message.queue)
    site = name.routing_domain or name.domain
    host, _, port = routes.get(site, site).partition(":")
    recipients = message.recipient if isinstance(message.recipient, list) else [message.recipient]
    details: dict[str, Any] = {"site": site, "peer_address": {"name": host, "addr": host}, "delivery_protocol": "ESMTP"}
    try:
        with closing(smtplib.SMTP(host, int(port or 25), timeout=TIMEOUT)) as smtp:
            refused = smtp.sendmail(message.sender, recipients, message.content)
            with suppress(OSError, smtplib.SMTPException):
                smtp.quit()  # whatever the answer is: the message was taken
    except smtplib.SMTPRecipientsRefused as error:
        some_refused(message, details, error.recipients)
    except smtplib.SMTPResponseException as error:
        failed(message, details, error.smtp_code, error.smtp_error)
    except (OSError, smtplib.SMTPException, ValueError) as error:
        failed(message, details, 451, f"4.4.1 {type(error).__name__}: {error}")
    else:
        if refused:
            some_refused(message, details, refused)
        else:
            delivered(message, details | {"response": response(250, "OK")})


def some_refused(message: Claim, details: dict[str, Any], refused: dict[str, tuple[int, bytes]]) -> None:
    """Try again later for those recipients who were refused for now; the others have the message, or never will."""
    for_now = {address: answer for address, answer in refused.items() if answer[0] < 500} or refused
    failed(message, details, *max(for_now.values()), recipient=list(for_now))


def failed(
    message: Claim, details: dict[str, Any], code: int, answer: bytes | str, recipient: list[str] | None = None
) -> None:
    """Try again later, or bounce: by the peer's code (RFC 5321, section 4.2.1), and when it was tried often enough."""
    content = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    details |= {"response": response(code, content)}
    if code >= 500 or message.num_attempts + 1 >= ATTEMPTS:
        bounced(message, details)
    else:
        postponed(message, time.time() + min(FIRST_RETRY * 2**message.num_attempts, LAST_RETRY), details, recipient)


if __name__ == "__main__":
    main()
