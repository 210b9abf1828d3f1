"""What a rebind of the largest store costs the others: how long a delivery worker's claim waits while it runs."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import requests
from kinds import KINDS, Kind
from measure import ask, serving
from stores import Store

WORKERS = [f"welcome:tenant-4@{name}.example!relay.pool-4.example" for name in ("gmail", "gmx", "web", "mail")]
QUIET = 5  # seconds in which the workers claim while nothing else runs

# PostgreSQL's workers are in other queues, those of the last tenant: four requests, one after another.
TENANTS = [Kind("tenant", {"queue": "moved.example"}, {"tenant": f"tenant-{number}"}, {}) for number in range(4)]


@dataclass(frozen=True)
class Claims:
    """The claims of some workers in a time."""

    milliseconds: list[float]
    messages: int
    """How many they got."""

    @property
    def percentiles(self) -> dict[str, float]:
        """In ms."""
        hundredths = quantiles(self.milliseconds, n=100, method="inclusive")
        return {
            "p50": hundredths[49],
            "p99": hundredths[98],
            "max": max(self.milliseconds),
            "claims": len(self.milliseconds),
        }


def claims_while(action: Callable[[], Any], url: str, queues: list[str | None]) -> tuple[float, Claims]:
    """Let a worker for each of `queues` claim, while `action` runs. Returns how long that took, in seconds."""
    command = [sys.executable, str(Path(__file__).parent / "claims.py"), url]
    workers = [
        subprocess.Popen(
            [*command, *([queue] if queue else [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for queue in queues
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    start = time.perf_counter()
    action()
    end = time.perf_counter()
    answers = [worker.communicate()[0] for worker in workers]
    # Those that began before it had ended, and ended after it had begun.
    during = [claim for answer in answers for claim in json.loads(answer) if claim[0] < end and sum(claim[:2]) > start]
    return end - start, Claims([seconds * 1000 for _, seconds, _ in during], sum(count for *_, count in during))


def waits(store: Store, database: str, runs: int) -> dict[str, Any]:
    """How long claims take, in ms, beside a rebind."""
    return _sqlite(store, runs) if database == "sqlite" else _postgresql(store, runs)


def _sqlite(store: Store, runs: int) -> dict[str, Any]:
    rebinds, longest = [], []
    for _ in range(runs):
        store.restore()
        with store.open() as url, serving(url, "--workers", "1") as service, requests.Session() as session:
            ask(session, service, KINDS["none"])
            seconds, claims = claims_while(lambda: ask(session, service, KINDS["constant"]), url, [None])
        rebinds.append(seconds)
        longest.append(max(claims.milliseconds) / 1000)
    return {
        "rebind_seconds": rebinds,
        "longest_wait_seconds": longest,
        "wait_over_rebind": median(wait / rebind for wait, rebind in zip(longest, rebinds, strict=True)),
    }


def _postgresql(store: Store, runs: int) -> dict[str, Any]:
    quiet, busy, rebinds = [], [], []
    for _ in range(runs):
        store.restore()
        with store.open() as url, serving(url, "--workers", "1") as service, requests.Session() as session:
            ask(session, service, KINDS["none"])
            quiet.append(claims_while(lambda: time.sleep(QUIET), url, [*WORKERS])[1])
            seconds, claims = claims_while(lambda: [ask(session, service, kind) for kind in TENANTS], url, [*WORKERS])
        busy.append(claims)
        rebinds.append(seconds)
    return {
        "rebind_seconds": rebinds,
        "quiet_ms": [claims.percentiles for claims in quiet],
        "during_rebind_ms": [claims.percentiles for claims in busy],
        "p50_ms": [median(claims.percentiles["p50"] for claims in side) for side in (quiet, busy)],
        "p99_ms": [median(claims.percentiles["p99"] for claims in side) for side in (quiet, busy)],
    }
