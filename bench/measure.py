"""One run of one kind, by the service or as bare SQL, on a store that was just put back."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import floor
import psycopg
import requests
from kinds import KINDS, OF_COMMANDS, REASON, RECORDS, Kind
from stores import ROOT, Store, file_to_load

sys.path.insert(0, str(ROOT / "tests"))

from services import PATH, Service, start_service, stop_service

from deliverylog import LogFilter, records
from queues import registry

# `flask` with its arguments, which at its end writes to standard error the most memory that it had in it.
FLASK = """import atexit, sys, flask.cli
atexit.register(lambda: print(open("/proc/self/status").read(), file=sys.stderr))
flask.cli.main()"""


@dataclass(frozen=True)
class Run:
    """What one run took, and did."""

    seconds: float
    """One request or command, or one time the same in bare SQL."""
    matched: int
    """Messages, or records of the log."""
    moved: int = 0
    peak: float | None = None
    """The most memory that gunicorn's worker or the command had in it, in MiB."""


def cell(store: Store, database: str, name: str, runs: int, older: Store | None = None) -> dict[str, Any]:
    """One kind on one store: the service, the floor and the service of an older commit in turns, `runs` times each.

    The service and the floor must do the same, or it fails. Returns medians and all runs.
    """
    kind, sides = KINDS[name], {"ours": store}
    if kind.floor:
        sides["floor"] = store
    if kind.beside and older:
        sides["older"] = older
    done: dict[str, list[Run]] = {side: [] for side in sides}
    outcomes = {}
    for number in range(runs):
        for side in sides if number % 2 == 0 else reversed(sides):
            sides[side].restore()
            with sides[side].open() as url:
                done[side].append(by_hand(name, url) if side == "floor" else by_service(kind, url, sides[side]))
                if number == 0 and side != "older":
                    outcomes[side] = outcome(url)
    counts = {(run.matched, run.moved) for of_side in done.values() for run in of_side}
    assert len(counts) == 1, f"not all count the same: {counts}"
    assert outcomes["ours"] == [*outcomes.values()][-1], f"the service and the floor did not do the same: {outcomes}"
    seconds = {side: median(run.seconds for run in of_side) for side, of_side in done.items()}
    matched, moved = counts.pop()
    return {
        "database": database,
        "size": store.size,
        "kind": name,
        "title": kind.title,
        "matched": matched,
        "moved": moved,
        "ms": seconds["ours"] * 1000,
        # How fast the service is beside the floor, or an older commit: 1 is as fast, 0.5 takes twice as long.
        "ratio": seconds["floor"] / seconds["ours"] if "floor" in seconds else None,
        "beside": seconds["older"] / seconds["ours"] if "older" in seconds else None,
        "us_each": seconds["ours"] * 1e6 / matched if matched else None,
        "peak_mib": median(run.peak for run in done["ours"] if run.peak) if done["ours"][0].peak else None,
        "runs": {side: [asdict(run) for run in of_side] for side, of_side in done.items()},
    }


@contextmanager
def serving(url: str, tree: Path = ROOT, **settings: str) -> Iterator[tuple[Service, requests.Session]]:
    """A gunicorn with one worker on the database at `url`, whose first request is done: it connects and compiles.

    tree: the code that it runs.
    """
    its_code = ("--chdir", str(tree), "--config", str(tree / "gunicorn.conf.py"))
    with TemporaryDirectory() as folder, requests.Session() as session:
        service = start_service(Path(folder), url, "--workers", "1", *its_code, **settings)
        try:
            ask(session, service, KINDS["none"])
            yield service, session
        finally:
            stop_service(service)


def ask(session: requests.Session, service: Service, kind: Kind, rebind_id: str = "") -> requests.Response:
    """Send one rebind, however long it takes. rebind_id: of the one before."""
    address = f"{service.base}{PATH}{kind.query.format(rebind_id=rebind_id)}"
    headers = {"Idempotency-Key": f'"{kind.key}"'} if kind.key else {}
    response = session.post(address, json={"reason": REASON} | kind.body, headers=headers)
    assert response.status_code == 200, response.text
    return response


def by_service(kind: Kind, url: str, store: Store) -> Run:
    """One run of the service."""
    rebind_id = ""
    policy = store.tree / "bench" / "event_policy.py"
    with serving(url, store.tree, REBIND_POLICY=str(policy)) as (service, session):
        for before in kind.after:
            rebind_id = ask(session, service, KINDS[before]).headers["Rebind-Id"]
            os.sync()  # what it left to be written must not be written during the next
        if kind.command is None:
            return _requested(session, service, kind, rebind_id)
    if kind.command == RECORDS:
        return _records_read(url, rebind_id)
    count, given = min(store.size, OF_COMMANDS), ""
    if kind.command == ("load",):
        return _commanded(store.tree, url, "load", str(file_to_load(store.folder.parent, count)))
    if "-" in kind.command:
        given = "\n".join(id for (id,) in select(url, f"SELECT id FROM messages LIMIT {count}"))
    return _commanded(store.tree, url, *kind.command, given=given)


def _requested(session: requests.Session, service: Service, kind: Kind, rebind_id: str) -> Run:
    worker = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()[0]
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # its peak starts again: proc_pid_clear_refs(5)
    start = time.perf_counter()
    for _ in range(kind.requests):
        response = ask(session, service, kind, rebind_id)
    seconds = (time.perf_counter() - start) / kind.requests
    peak = _peak(Path(f"/proc/{worker}/status").read_text())
    return Run(seconds, int(response.headers["Rebind-Matched"]), int(response.headers["Rebind-Moved"]), peak)


def _commanded(tree: Path, url: str, *arguments: str, given: str = "") -> Run:
    """A command of `flask`, from start to end. given: its standard input."""
    command = [sys.executable, "-c", FLASK, *arguments]
    environment = os.environ | {"REBIND_DATABASE_URL": url}
    with TemporaryFile() as output:
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=tree, env=environment, input=given.encode(), stdout=output, stderr=subprocess.PIPE, check=False
        )
        seconds = time.perf_counter() - start
        assert done.returncode == 0, done.stderr
        output.seek(0)
        lines, line = 0, b""
        for line in output:  # noqa: B007
            lines += 1
    matched = int(line.split()[0]) if arguments[0] in ("load", "prune", "rebind") else lines
    return Run(seconds, matched, peak=_peak(done.stderr.decode()))


def _records_read(url: str, rebind_id: str) -> Run:
    """The records of one rebind."""
    registry.bind(url, busy_timeout=30)
    start = time.perf_counter()
    matched = sum(1 for _ in records(registry.database, wanted=LogFilter(rebind_id=rebind_id)))
    seconds = time.perf_counter() - start
    registry.database.close()  # nobody may have the store open when it is put back
    return Run(seconds, matched)


def _peak(status: str) -> float:
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def by_hand(name: str, url: str) -> Run:
    """The same as bare SQL. Its connection is open, and has been used, as the service's."""
    if url.startswith("sqlite"):
        with closing(floor.open_sqlite(url.removeprefix("sqlite:///"))) as file:
            return _timed(lambda kind: floor.sqlite(file, kind), name)
    with psycopg.connect(url.replace("+psycopg", "", 1)) as db:
        return _timed(lambda kind: floor.postgresql(db, kind), name)


def _timed(rebind: Callable[[str], floor.Counts], name: str) -> Run:
    rebind("none")
    start = time.perf_counter()
    for _ in range(KINDS[name].requests):
        counts = rebind(name)
    return Run((time.perf_counter() - start) / KINDS[name].requests, *counts)


def outcome(url: str) -> list[Any]:
    """What a rebind left behind, as far as it does not depend on when it was and who did it."""
    meta = "sum(length(CAST(meta AS TEXT)))"
    statements = (
        f"SELECT count(*), count(DISTINCT queue), sum(length(queue)), {meta}, sum(num_attempts) FROM messages",
        "SELECT count(*) FROM messages WHERE due > 1750000000",  # those that were made due now
        f"SELECT count(*), count(DISTINCT rebind_id), sum(length(queue)), sum(length(old_queue)), {meta} FROM log",
        "SELECT sum(length(id || sender || recipient || type)), sum(size), sum(round(created)) FROM log",
        "SELECT sum(num_attempts), count(domain), sum(round(due)), count(new_meta), count(new_due) FROM log",
        "SELECT count(event_time), count(nodeid), count(details) FROM log",
        "SELECT count(*), count(idempotency_key), sum(matched), sum(moved), sum(flushed), count(left_alone), "
        "sum(last_key - first_key), min(reason), max(reason) FROM rebinds",
    )
    return [select(url, statement)[0] for statement in statements]


def select(url: str, statement: str) -> list[Any]:
    """The rows."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
            return file.execute(statement).fetchall()
    with psycopg.connect(url.replace("+psycopg", "", 1)) as db:
        return db.execute(statement.encode()).fetchall()
