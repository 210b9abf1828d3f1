"""`python bench/millions.py`: what grows with the store, and what only with what matches.

It fills stores of 1,000,000 and 10,000,000 messages without content. In each of them the same number is of one campaign
(100,000) and in one queue (5,000). At the end each store gets 200,000 more queues, with one message each. It prints a
table, and takes twenty minutes and 30 GB.
"""

import argparse
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from kinds import Kind
from measure import ask, serving
from stores import KINDS_OF_STORE
from waits import claims_while

from queues import registry

RUNS = 3
QUEUES = 200_000  # of one message each
DOMAINS = [f"{name}.example" for name in ("gmail", "outlook", "yahoo", "gmx", "icloud", "proton", "web", "mail")]
COLUMNS = ("id", "sender", "recipient", "domain", "queue", "meta", "created", "due", "num_attempts")

_MOVED = {"data": {"routing_domain": "relay.example"}}
NO_MATCH = Kind("no match", _MOVED | {"tenant": "nobody"})
DRY_RUN = Kind("dry run of everything", _MOVED, query="?dry_run=true")
QUEUE = Kind("one queue of 5,000", _MOVED | {"tenant": "one"})
CAMPAIGN = Kind("one campaign of 100,000", _MOVED | {"campaign": "sale"})
UNDO = Kind("its undo", {"data": {}}, query="?undo={rebind_id}")

Row = tuple[Any, ...]


def row(number: int, tenant: str, campaign: str, domain: str, routing_domain: str = "") -> Row:
    """A message of about 200 bytes of metadata, due now."""
    meta = {"tenant": tenant, "campaign": campaign, "routing_domain": routing_domain}
    meta = {key: value for key, value in meta.items() if value}
    before = f"{campaign}:{tenant}@" if campaign else f"{tenant}@"
    queue = before + domain + (f"!{routing_domain}" if routing_domain else "")
    meta |= {"reception_protocol": "ESMTP", "hostname": "mta1.provider.example", "job": f"{number:0100x}"}
    recipient = f"user{number}@{domain}"
    return f"{number:032x}", "", recipient, domain, queue, json.dumps(meta), 1.7e9, 1.7e9 + number % 10**6, 0


def rows(count: int) -> Iterator[Row]:
    """So many messages."""
    for number in range(count):
        domain = DOMAINS[number // 100 % 8]
        if number % (count // 5_000) == 0:
            yield row(number, "one", "", "queue.example")
        elif number % (count // 100_000) == 1:
            yield row(number, f"tenant-{number % 5}", "sale", domain)
        elif number % 100 == 2:  # what the workers claim
            yield row(number, "tenant-4", "welcome", domain, "relay.pool-4.example")
        else:
            yield row(number, f"tenant-{number % 7}", f"newsletter-{number % 5}", domain)


def insert(url: str, messages: Iterator[Row]) -> None:
    """Add messages as fast as the engine can."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file, file:
            values = ", ".join("?" * len(COLUMNS))
            file.executemany(f"INSERT INTO messages ({', '.join(COLUMNS)}) VALUES ({values})", messages)
        return
    into = f"COPY messages ({', '.join(COLUMNS)}) FROM STDIN"
    with psycopg.connect(url.replace("+psycopg", "", 1)) as db, db.cursor() as cursor, cursor.copy(into) as copy:
        for each in messages:
            copy.write_row(each)


class Filled:
    """Messages of our own, instead of those of stores.py."""

    def _load(self: Any, url: str) -> None:
        registry.bind(url, busy_timeout=30)
        registry.database.prepare(create=True)
        insert(url, rows(self.size))


STORES: dict[str, Any] = {name: type(name, (Filled, kind), {}) for name, kind in KINDS_OF_STORE.items()}


def measure(url: str, where: str) -> None:
    """Each kind of rebind, and how long claims take meanwhile."""
    with serving(url) as (service, session):
        for kind in (NO_MATCH, DRY_RUN):
            say(where, kind.title, [asked(session, service, kind) for _ in range(RUNS)])
        for kind in (QUEUE, CAMPAIGN):
            there, back = [], []
            for _ in range(RUNS):
                there.append(asked(session, service, kind))
                back.append(asked(session, service, UNDO, there[-1][2]))
            say(where, kind.title, there)
            say(where, f"{kind.title}: its undo", back)
        _, quiet = claims_while(lambda: time.sleep(5), url)
        seconds, busy = claims_while(lambda: asked(session, service, CAMPAIGN), url)
    for what, found in (("nothing else runs", quiet), (f"a rebind of {seconds:.1f} s runs", busy)):
        times = f"p50 {found['p50']:.1f} ms, p99 {found['p99']:.1f} ms, at most {found['max']:.0f} ms"
        print(f"{where:<22}claims while {what}: {times}", flush=True)


def measure_names(url: str, where: str) -> None:
    """What depends on the number of queues."""
    with serving(url) as (service, session):
        for kind in (NO_MATCH, QUEUE):
            say(where, f"{kind.title}, {QUEUES:,} queues", [asked(session, service, kind) for _ in range(RUNS)])
    registry.bind(url, busy_timeout=30)
    start = time.perf_counter()
    found = len(registry.queues())
    say(where, "flask queues", [(time.perf_counter() - start, found, "")])
    registry.database.close()


def asked(session: Any, service: Any, kind: Kind, rebind_id: str = "") -> tuple[float, int, str]:
    """How long one request took, what it matched, and its id."""
    start = time.perf_counter()
    headers = ask(session, service, kind, rebind_id).headers
    return time.perf_counter() - start, int(headers["Rebind-Matched"]), headers.get("Rebind-Id", "")


def say(where: str, title: str, runs: list[tuple[float, int, str]]) -> None:
    """Print the median."""
    print(f"{where:<22}{title:<40}{median(run[0] for run in runs):>10.3f} s{runs[0][1]:>12,}", flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1_000_000, 10_000_000], help="messages in a store")
    parser.add_argument("--databases", nargs="+", choices=STORES, default=[*STORES])
    options = parser.parse_args()
    for database, size in itertools.product(options.databases, options.sizes):
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            store = STORES[database](Path(folder), size, 0)
            store.work.mkdir()
            store.fill()
            with store.open() as url:
                measure(url, f"{database} {size:,}")
                insert(url, (row(size + n, f"own-{n}", "", "gmail.example") for n in range(QUEUES)))
                measure_names(url, f"{database} {size:,}")


if __name__ == "__main__":
    main()
