"""What a rebind costs the others: how long a delivery worker's claim waits while it runs.

Run by itself, `waits.py URL QUEUE`, it is a worker that only claims, one message after another from one queue, until
its standard input ends. It says "ready", and at the end prints each claim as [start, seconds] in JSON.
"""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import sqlalchemy as sa
from kinds import KINDS, Kind
from measure import ask, serving
from stores import KINDS_OF_STORE, Store

import delivery
from message import NewMessage
from queues import registry
from tables import messages

QUIET = 5  # seconds in which the workers claim while nothing else runs
CLAIMS = 300  # that are measured
PAUSE = 0.01  # seconds between two claims: what a delivery takes at the least

WORKERS = [f"welcome:tenant-4@{name}.example!relay.pool-4.example" for name in ("gmail", "gmx", "web", "mail")]
# PostgreSQL's rebinds leave the workers' tenant alone, since a claim passes over what a rebind holds.
TENANTS = [Kind("", KINDS["constant"].body | {"tenant": f"tenant-{number}"}) for number in range(4)]
REBINDS = {"sqlite": [KINDS["constant"]], "postgresql": TENANTS}

CLAIM = """UPDATE messages SET due = {now} + 300 WHERE id IN (
    SELECT id FROM messages WHERE queue = '{queue}' AND due <= {now} ORDER BY due LIMIT 1 {lock}) RETURNING *"""


def waits(store: Store, database: str, runs: int) -> dict[str, Any]:
    """How long claims take, in ms, while nothing else runs and during rebinds."""
    found: dict[str, list[Any]] = {"rebind_seconds": [], "quiet": [], "during_rebind": []}
    for _ in range(runs):
        store.restore()
        with store.open() as url, serving(url) as (service, session):
            quiet = claims_while(lambda: time.sleep(QUIET), url)[1]
            seconds, busy = claims_while(lambda: [ask(session, service, kind) for kind in REBINDS[database]], url)
        found["rebind_seconds"].append(seconds)
        found["quiet"].append(quiet)
        found["during_rebind"].append(busy)
    return found


def claims(database: str, queues: int, leased: int) -> float:
    """The 99th percentile of a Python worker's claims, in ms, while nothing else runs.

    queues: how many have a message that is due. leased: how many messages others hold at the head of one more queue.
    """
    crowd = [NewMessage(f"q{n}", "", f"user@{n}.example", due=1e9) for n in range(queues)]
    line = [NewMessage(f"h{n}", "", "user@head.example", due=n) for n in range(2 * leased)]
    with TemporaryDirectory() as folder:
        store = KINDS_OF_STORE[database](Path(folder) / "store", 0, 0)
        store.build()
        store.restore()
        with store.open() as url:
            registry.bind(url, busy_timeout=30)
            registry.load(crowd + line)
            with registry.database.begin_write() as db:
                db.execute(sa.update(messages).where(messages.c.due < leased).values(leased_until=4e9))
            times = []
            for _ in range(CLAIMS):
                start = time.perf_counter()
                assert len(delivery.claim(1, lease=900)) == 1
                times.append((time.perf_counter() - start) * 1000)
            registry.database.close()
    return quantiles(times, n=100, method="inclusive")[98]


def in_a_line(found: dict[str, Any]) -> str:
    """The medians."""
    quiet, busy = (
        [median(one[name] for one in found[side]) for name in ("p50", "p99", "max")]
        for side in ("quiet", "during_rebind")
    )
    return (
        f"a claim takes {quiet[0]:.1f} ms (p99 {quiet[1]:.1f}); during a rebind of "
        f"{median(found['rebind_seconds']):.2f} s, {busy[0]:.1f} ms (p99 {busy[1]:.1f}, at most {busy[2]:.0f})"
    )


def claims_while(action: Callable[[], Any], url: str) -> tuple[float, dict[str, float]]:
    """Let a worker for each of WORKERS claim, while `action` runs.

    Returns how long that took, in seconds, and percentiles of the claims' times, in ms.
    """
    commands = ([sys.executable, __file__, url, queue] for queue in WORKERS)
    workers = [subprocess.Popen(c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for c in commands]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    start = time.perf_counter()
    action()
    end = time.perf_counter()
    claims = [claim for worker in workers for claim in json.loads(worker.communicate()[0])]
    # Those that began before it had ended, and ended after it had begun.
    times = [seconds * 1000 for began, seconds in claims if began < end and began + seconds > start]
    hundredths = quantiles(times, n=100, method="inclusive")
    return end - start, {"p50": hundredths[49], "p99": hundredths[98], "max": max(times), "claims": len(times)}


def _claim(url: str, queue: str) -> None:
    """Claim until standard input ends."""
    end = threading.Thread(target=sys.stdin.read, daemon=True)
    end.start()
    if url.startswith("sqlite"):
        db: Any = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=600, isolation_level=None)
        db.execute("PRAGMA synchronous = FULL")
        lock = ""
    else:
        db, lock = psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True), "FOR UPDATE SKIP LOCKED"
    print("ready", flush=True)
    claims = []
    while end.is_alive():
        end.join(PAUSE)
        start = time.perf_counter()
        db.execute(CLAIM.format(now=time.time(), queue=queue, lock=lock)).fetchall()
        claims.append((start, time.perf_counter() - start))
    print(json.dumps(claims))


if __name__ == "__main__":
    _claim(*sys.argv[1:])
