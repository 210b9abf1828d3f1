"""One party of the live traffic in test_live_traffic.py, as a process of its own: a sender, or a delivery worker.

`python tests/traffic.py ROLE URL SECONDS SEED` works for so long, and prints what it did as JSON: the ids that a sender
added, and the id and last metadata of each message that a worker took away.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from sqlalchemy import delete

from delivery import Outcome, claim, recipient_list, settle
from deliverylog import response
from message import NewMessage
from queues import registry
from tables import messages


def send(dice: random.Random, seed: int, end: float) -> list[str]:
    """Add messages in small transactions, to a handful of queues."""
    sent: list[str] = []
    while time.time() < end:
        domains = [f"q{dice.randrange(5)}.example" for _ in range(dice.randint(1, 20))]
        new = [NewMessage(f"{seed}-{len(sent) + n}", "", f"to@{d}", b"Hello") for n, d in enumerate(domains)]
        registry.load(new)
        sent += [message.id for message in new]
        time.sleep(0.01)
    return sent


def work(dice: random.Random, _seed: int, end: float) -> list[tuple[str, dict[str, Any]]]:
    """Claim messages; put some off, and take the others away."""
    taken: list[tuple[str, dict[str, Any]]] = []
    while time.time() < end:
        for claimed in claim(dice.randint(1, 10), lease=1):
            if dice.random() < 0.5:
                later = Outcome("TransientFailure", recipient_list(claimed), {"response": response(451, "later")})
                settle(claimed, [later], time.time() + dice.random())
                continue
            with registry.database.begin_write() as db:
                gone = delete(messages).where(messages.c.id == claimed.id).returning(messages.c.meta)
                taken += [(claimed.id, row.meta) for row in db.execute(gone)]
        time.sleep(0.01)
    return taken


if __name__ == "__main__":
    role, url, seconds, seed = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    registry.bind(url, busy_timeout=30)
    done = {"send": send, "work": work}[role](random.Random(seed), seed, time.time() + seconds)
    json.dump(done, sys.stdout)
