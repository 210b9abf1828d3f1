"""A delivery worker that only claims, as a process of its own, until its standard input ends.

`claims.py URL [QUEUE]` claims one message after another, from any queue by delivery.py or from one by README's SQL for
PostgreSQL. It says "ready"; at the end it prints each claim as [start, seconds, messages], in JSON.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psycopg

import delivery
from queues import registry

LEASE = 300  # seconds
PAUSE = 0.01  # seconds between two claims: what a delivery takes at the least

CLAIM = """UPDATE messages SET due = %(now)s + 300 WHERE key IN (
    SELECT key FROM messages WHERE queue = %(queue)s AND due <= %(now)s ORDER BY due LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING *"""


def claimer(url: str, queue: str | None) -> Callable[[], int]:
    """A function that claims one message, and returns how many it got."""
    if queue is None:
        registry.bind(url, busy_timeout=600)
        return lambda: len(delivery.claim(1, LEASE))
    db = psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True)
    return lambda: len(db.execute(CLAIM, {"queue": queue, "now": time.time()}).fetchall())


def main() -> None:
    """Claim until standard input ends."""
    claim, ended = claimer(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None), threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    claim()  # the first one also imports, connects and compiles
    print("ready", flush=True)
    claims = []
    while not ended.wait(PAUSE):
        start = time.perf_counter()
        count = claim()
        claims.append((start, time.perf_counter() - start, count))
    print(json.dumps(claims))


if __name__ == "__main__":
    main()
