"""`make bench`: how fast rebinding is beside bare SQL, how it grows, and what it costs the others.

Prints a table and the goals; writes both, with every single time, as JSON, and a plot. It may be stopped at any time:
what was measured by then is in the JSON.
"""

import argparse
import json
import os
import platform
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import plot
import psycopg
from kinds import KINDS, ONE_QUEUE
from measure import Cell, cell, serving, through_http
from stores import ROOT, SETTINGS, Store, built
from waits import waits

RATE_SECONDS = 4  # of requests that match nothing, and of the empty route, in turns

# What is compared across kinds and sizes, and its goal.
GOALS = {
    "queue_beside_its_own_store": ("at most", 1.5),
    "no_match_ms": ("at most", 10),
    "event_over_constant": ("at least", 0.4),
    "event_memory_growth_mib": ("at most", 64),
    "no_match_over_empty_route": ("at least", 0.6),
    "dry_run_over_run": ("at most", 1),
}
OF_DATA = ("constant", "campaign", "metadata", "flush", "suppressed")
OF_FLOOR = ("at least", 0.9)  # the goal of each kind of OF_DATA from 100,000 messages on
GROWTH = ("at most", 1.3)  # the goal of each at 1,000,000, over 10,000


def main() -> None:
    """Measure what the command line asks for."""
    options = arguments()
    result: dict[str, Any] = {"machine": machine(), "postgresql_settings": SETTINGS, "runs": options.runs}
    result |= {"cells": [], "ratios": {}, "waits": {}}
    cells: list[Cell] = []

    def save() -> None:
        result["cells"] = [written(one, cells) for one in cells]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")

    for database in options.databases:
        for size in options.sizes:
            store = built(database, options.folder, size)
            for name in options.kinds:
                say(f"{database} {size} {name}")
                cells.append(cell(store, database, name, options.runs))
                save()
        of_database = {(one.size, one.kind): one for one in cells if one.database == database}
        result["ratios"][database] = ratios(of_database, options, database, store)
        if "waits" in options.extras:
            say(f"{database} waits")
            result["waits"][database] = waits(store, database, options.runs)
        if database == "postgresql":
            result["machine"]["postgresql"] = postgresql_version(store)
        save()
    print(table(result["cells"]))
    print(goals(result))
    if cells:
        plot.draw(result, options.out.with_suffix(".png"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)

    def several(known: list[str]) -> Callable[[str], list[str]]:
        def names(value: str) -> list[str]:
            if unknown := set(filter(None, value.split(","))) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
            return [name for name in value.split(",") if name]

        return names

    def sizes(value: str) -> list[int]:
        return sorted(int(size) for size in value.split(","))

    parser.add_argument("--sizes", type=sizes, default=[10_000, 100_000, 1_000_000], help="messages, as 10000,100000")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kinds", type=several([*KINDS]), default=[*KINDS], help=",".join(KINDS))
    parser.add_argument("--databases", type=several(["sqlite", "postgresql"]), default=["sqlite", "postgresql"])
    parser.add_argument("--extras", type=several(["alone", "rate", "waits"]), default=["alone", "rate", "waits"])
    parser.add_argument("--folder", type=Path, default=ROOT / "bench" / "stores", help="where the stores are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance", help="without .json and .png")
    return parser.parse_args()


def ratios(
    cells: dict[tuple[int, str], Cell], options: argparse.Namespace, database: str, store: Store
) -> dict[str, Any]:
    """What is compared across kinds and sizes, at the largest size."""
    smallest, largest = options.sizes[0], options.sizes[-1]
    found: dict[str, Any] = {}
    if "alone" in options.extras:
        say(f"{database} one queue in its own store")
        found |= beside_its_own_store(store, built(database, options.folder, largest, ONE_QUEUE), options.runs)
    if (largest, "none") in cells:
        found["no_match_ms"] = cells[largest, "none"].seconds * 1000
    if (largest, "event") in cells:
        found["event_memory_growth_mib"] = cells[largest, "event"].peak - cells[smallest, "event"].peak
        if (largest, "constant") in cells:
            found["event_over_constant"] = cells[largest, "event"].rate / cells[largest, "constant"].rate
    if (largest, "dry") in cells and (largest, "campaign") in cells:
        found["dry_run_over_run"] = cells[largest, "dry"].seconds / cells[largest, "campaign"].seconds
    if "rate" in options.extras:
        say(f"{database} requests a second")
        found |= no_match_over_empty_route(store, options.runs)
    return found


def beside_its_own_store(big: Store, own: Store, runs: int) -> dict[str, Any]:
    """One queue of the big store, against a store that holds no other, in turns."""
    seconds: list[list[float]] = [[], []]
    for _ in range(runs):
        matched = set()
        for times, store in zip(seconds, (big, own), strict=True):
            store.restore()
            with store.open() as url:
                run = through_http(KINDS["queue"], url)
            times.append(run.seconds)
            matched.add(run.matched)
        assert len(matched) == 1, f"not the same queue: {matched}"
    quotient = median(seconds[0]) / median(seconds[1])
    return {"queue_beside_its_own_store": quotient, "queue_seconds": seconds[0], "queue_own_store_seconds": seconds[1]}


def no_match_over_empty_route(store: Store, runs: int) -> dict[str, Any]:
    """Requests a second that match nothing, over those of an empty route behind the same gunicorn, in turns."""
    store.restore()
    with (
        store.open() as url,
        serving(url) as service,
        # gunicorn takes the first application that it is told.
        serving(url, "--pythonpath", "bench", "empty:app") as empty,
    ):
        rates: list[list[float]] = [[], []]
        for number in range(runs + 1):
            for side, one in zip(rates, (service, empty), strict=True):
                host, port = one.address
                seconds = RATE_SECONDS if number else 1  # the first round warms both up
                command = [str(ROOT / "bench" / "requests_a_second.py"), host, str(port), str(seconds)]
                asked = subprocess.run(
                    [sys.executable, *command, json.dumps(KINDS["none"].body)], check=True, stdout=subprocess.PIPE
                )
                if number:
                    side.append(json.loads(asked.stdout))
    quotient = median(rates[0]) / median(rates[1])
    return {"no_match_over_empty_route": quotient, "no_match_a_second": rates[0], "empty_route_a_second": rates[1]}


def written(one: Cell, cells: list[Cell]) -> dict[str, Any]:
    """A cell for the JSON."""
    smallest = min((c for c in cells if (c.database, c.kind) == (one.database, one.kind)), key=lambda c: c.size)
    matched = one.ours[0].matched
    return {
        "database": one.database,
        "size": one.size,
        "kind": one.kind,
        "title": KINDS[one.kind].title,
        "matched": matched,
        "moved": one.ours[0].moved,
        "ms": one.seconds * 1000,
        "floor_ms": one.floor_seconds and one.floor_seconds * 1000,
        "messages_a_second": one.rate or None,
        "floor_messages_a_second": matched / one.floor_seconds if matched and one.floor_seconds else None,
        "ratio": one.ratio,
        "peak_mib": one.peak,
        # For no match: how the request's time grows.
        "growth": one.seconds / smallest.seconds / ((matched / smallest.ours[0].matched) if matched else 1)
        if one is not smallest
        else None,
        "ours": [asdict(run) for run in one.ours],
        "floor": [asdict(run) for run in one.floor],
    }


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as aligned text."""
    head = (
        "database",
        "messages",
        "kind",
        "matched",
        "ms",
        "floor ms",
        "msg/s",
        "floor msg/s",
        "ratio",
        "peak MiB",
        "growth",
    )
    rows = [head]
    for one in cells:
        numbers = (
            *(_number(one[key], 1) for key in ("ms", "floor_ms")),
            *(_number(one[key], 0) for key in ("messages_a_second", "floor_messages_a_second")),
            _number(one["ratio"], 2),
            _number(one["peak_mib"], 0),
            _number(one["growth"], 2),
        )
        rows.append((one["database"], f"{one['size']:,}", one["title"], f"{one['matched']:,}", *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        aligned = [
            value.ljust(width) if column in (0, 2) else value.rjust(width)
            for column, (value, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    note = (
        "ms: median of one request; ratio: msg/s over the floor's; growth: time per message over the smallest store's"
    )
    return "\n".join([*lines, note])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def goals(result: dict[str, Any]) -> str:
    """The ratios, and whether each is as good as it must be; and the waits."""
    lines = [""]

    def judge(database: str, name: str, value: float, direction: str, limit: float) -> None:
        met = value <= limit if direction == "at most" else value >= limit
        verdict = f"goal: {direction} {limit:g}, {'met' if met else 'NOT MET'}"
        lines.append(f"{database:<10}  {name:<40}{value:>9.2f}  {verdict}")

    for one in result["cells"]:
        if one["kind"] in OF_DATA and one["size"] >= 100_000:
            judge(one["database"], f"{one['title']} over the floor, {one['size']:,}", one["ratio"], *OF_FLOOR)
        if one["kind"] in OF_DATA and one["size"] == 1_000_000 and one["growth"] is not None:
            judge(one["database"], f"{one['title']}, growth", one["growth"], *GROWTH)
    for database, found in result["ratios"].items():
        for name, goal in GOALS.items():
            if name in found:
                judge(database, name.replace("_", " "), found[name], *goal)
    for database, found in result["waits"].items():
        if database == "sqlite":
            wait, rebind = median(found["longest_wait_seconds"]), median(found["rebind_seconds"])
            lines.append(f"{database:<10}  a claim waits {wait:.2f} s during a rebind of {rebind:.2f} s")
        else:
            (p50, p50_busy), (p99, p99_busy) = found["p50_ms"], found["p99_ms"]
            text = f"{p50:.2f} ms (p99 {p99:.2f}), during a rebind {p50_busy:.2f} ms (p99 {p99_busy:.2f})"
            lines.append(f"{database:<10}  a claim takes {text}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where it was measured, but for its name."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    kib = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cores": os.cpu_count(),
        "model": model[1] if model else platform.machine(),
        "memory_gib": round(int(kib[1]) / 2**20) if kib else None,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }


def postgresql_version(store: Store) -> str:
    """Of the server that the store is served by."""
    store.restore()
    with store.open() as url, psycopg.connect(url.replace("+psycopg", "", 1)) as db:
        row = db.execute("SHOW server_version").fetchone()
    return str(row[0]) if row else ""


def say(what: str) -> None:
    """Progress, beside the table."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
