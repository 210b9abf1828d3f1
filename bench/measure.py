"""One run of one kind of rebind, through HTTP or as bare SQL, on a store that was just put back."""

import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import floor
import psycopg
import requests
from kinds import KINDS, Kind
from stores import ROOT, Store

sys.path.insert(0, str(ROOT / "tests"))

from conftest import PATH, Service, start_service, stop_service

BENCH = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """What one run took, and did."""

    seconds: float
    """One request, or one time the same in bare SQL."""
    matched: int
    moved: int
    peak: float | None = None
    """The most memory that gunicorn's worker had in it, in MiB."""


@dataclass(frozen=True)
class Cell:
    """One kind at one size on one kind of database: every run, in order, ours and the floor's in turns."""

    database: str
    size: int
    kind: str
    ours: list[Run]
    floor: list[Run]
    """Empty where there is no floor."""

    @property
    def seconds(self) -> float:
        """The median."""
        return median(run.seconds for run in self.ours)

    @property
    def floor_seconds(self) -> float | None:
        """The median."""
        return median(run.seconds for run in self.floor) if self.floor else None

    @property
    def ratio(self) -> float | None:
        """How fast ours is beside the floor: 1 is as fast, 0.5 takes twice as long."""
        return self.floor_seconds / self.seconds if self.floor_seconds else None

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.ours[0].matched / self.seconds

    @property
    def peak(self) -> float:
        """The median, in MiB."""
        return median(run.peak or 0 for run in self.ours)


@contextmanager
def serving(url: str, *arguments: str, **settings: str) -> Iterator[Service]:
    """A gunicorn on the database at `url`."""
    with TemporaryDirectory() as folder:
        service = start_service(Path(folder), url, *arguments, **settings)
        try:
            yield service
        finally:
            stop_service(service)


def through_http(kind: Kind, url: str) -> Run:
    """Ask a gunicorn with one worker. Its first request, which connects and compiles, is not measured."""
    policy = {"REBIND_POLICY": str(BENCH / "event_policy.py")} if kind.options.get("trigger_rebind_event") else {}
    with serving(url, "--workers", "1", **policy) as service, requests.Session() as session:
        ask(session, service, KINDS["none"])
        worker = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()[0]
        Path(f"/proc/{worker}/clear_refs").write_text("5")  # its peak starts anew: proc_pid_clear_refs(5)
        start = time.perf_counter()
        for _ in range(kind.requests):
            response = ask(session, service, kind)
        seconds = (time.perf_counter() - start) / kind.requests
        status = Path(f"/proc/{worker}/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return Run(seconds, int(response.headers["Rebind-Matched"]), int(response.headers["Rebind-Moved"]), peak)


def ask(session: requests.Session, service: Service, kind: Kind) -> requests.Response:
    """Send one rebind, however long it takes."""
    response = session.post(f"{service.base}{PATH}{kind.query}", json=kind.body)
    assert response.status_code == 200, response.text
    return response


def bare(name: str, url: str) -> Run:
    """The same as bare SQL. Its connection is open, and has been used, as the service's."""
    if url.startswith("sqlite"):
        with closing(floor.open_sqlite(url.removeprefix("sqlite:///"))) as file:
            return _timed(lambda kind: floor.sqlite(file, kind), name)
    with psycopg.connect(url.replace("+psycopg", "", 1)) as db:
        return _timed(lambda kind: floor.postgresql(db, kind), name)


def _timed(rebind: Any, name: str) -> Run:
    rebind("none")
    start = time.perf_counter()
    for _ in range(KINDS[name].requests):
        counts = rebind(name)
    return Run((time.perf_counter() - start) / KINDS[name].requests, *counts)


def cell(store: Store, database: str, name: str, runs: int) -> Cell:
    """Ours and the floor in turns, `runs` times each. Both must do the same, or it fails."""
    ours: list[Run] = []
    theirs: list[Run] = []
    outcomes = []
    for number in range(runs):
        sides = [ours, theirs] if name != "event" else [ours]
        for side in sides if number % 2 == 0 else reversed(sides):
            store.restore()
            with store.open() as url:
                side.append(through_http(KINDS[name], url) if side is ours else bare(name, url))
                if number == 0:
                    outcomes.append(outcome(url))
        counts = {(run.matched, run.moved) for run in ours + theirs}
        assert len(counts) == 1, f"ours and the floor do not count the same: {counts}"
    assert outcomes[0] == outcomes[-1], f"ours and the floor did not do the same: {outcomes}"
    return Cell(database, store.size, name, ours, theirs)


def outcome(url: str) -> list[Any]:
    """What a rebind left behind, as far as it does not depend on when it was and who did it."""
    tables = (
        "SELECT count(*), sum(length(queue)), sum(length(CAST(meta AS TEXT))), sum(num_attempts) FROM messages",
        "SELECT count(*) FROM messages WHERE due > 1750000000",  # those that were made due now
        "SELECT count(*), sum(length(queue)), sum(length(old_queue)), sum(length(CAST(meta AS TEXT))) FROM log",
        "SELECT count(DISTINCT queue) FROM messages",
    )
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
            return [file.execute(statement).fetchone() for statement in tables]
    with psycopg.connect(url.replace("+psycopg", "", 1)) as db:
        return [db.execute(statement).fetchone() for statement in tables]
