"""A sample of 300 messages, one a line, as KumoMTA's inspect-message shows them.

Four tenants and what they send: newsletters in campaigns, receipts, messages by another route, and one pinned queue.
The same each time, except their times: `due` is around now, and they came in the last three days.
"""

import json
import random
from datetime import UTC, datetime, timedelta

SEED = 20
DOMAINS = ["gmail.example", "outlook.example", "yahoo.example", "gmx.example"]
NAMES = ["ada", "bela", "chidi", "dana", "emre", "fatima", "goran", "hana", "ines", "jun"]
MAILINGS = [  # how many, sender's domain, metadata
    (90, "acme.example", {"tenant": "acme", "campaign": "spring-sale"}),
    (60, "acme.example", {"tenant": "acme", "campaign": "newsletter-47"}),
    (30, "acme.example", {"tenant": "acme"}),
    (60, "globex.example", {"tenant": "globex", "campaign": "newsletter-3"}),
    (20, "globex.example", {"tenant": "globex", "routing_domain": "relay.globex.example:2525"}),
    (15, "initech.example", {"tenant": "initech"}),
    (15, "umbrella.example", {"campaign": "welcome"}),
    (10, "umbrella.example", {"tenant": "umbrella", "queue": "vip.example"}),
]


def main() -> None:
    """Print the sample."""
    dice = random.Random(SEED)
    now = datetime.now(UTC)
    for count, domain, meta in MAILINGS:
        for _ in range(count):
            due = now + timedelta(seconds=dice.randint(-600, 3600))
            print(json.dumps(message(dice, domain, meta, now, due)))


def message(
    dice: random.Random, sender_domain: str, meta: dict[str, str], now: datetime, due: datetime
) -> dict[str, object]:
    """A message with one recipient, or now and then with two in the same domain."""
    to_domain = dice.choice(DOMAINS)
    names = dice.sample(NAMES, 2 if dice.random() < 0.05 else 1)
    recipients = [f"{name}{dice.randint(1, 99)}@{to_domain}" for name in names]
    id = f"{dice.getrandbits(128):032x}"
    sender = f"bounce-{id[:8]}@{sender_domain}"
    content = (
        f"From: news@{sender_domain}\r\nTo: {', '.join(recipients)}\r\n"
        f"Subject: {meta.get('campaign', 'Your receipt')}\r\n"
        f"Message-ID: <{id}@{sender_domain}>\r\n\r\nHello {names[0].title()},\r\n\r\nthank you.\r\n"
    )
    attempts = dice.choice([0, 0, 0, 1, 2])
    created = min(now, due) - timedelta(days=attempts, seconds=int(id[:4], 16))
    return {
        "id": id,
        "message": {
            "sender": sender,
            "recipient": recipients if len(recipients) > 1 else recipients[0],
            "meta": {**meta, "reception_protocol": "ESMTP", "received_from": "192.0.2.10:40213"},
            "data": content,
            "created": created.isoformat(),
            "due": due.isoformat(),
            "num_attempts": attempts,
        },
    }


if __name__ == "__main__":
    main()
