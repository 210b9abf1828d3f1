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
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plot
import psycopg
from kinds import KINDS
from measure import cell
from stores import ROOT, SETTINGS, Store, built
from waits import in_a_line, waits

DATABASES = ["sqlite", "postgresql"]
LARGE, OF_LARGE = (500, 2**20), ("event", "undo_event", "log")  # messages, bytes of metadata that each has

OF_DATA = ("constant", "campaign", "keyed", "metadata", "flush", "suppressed")
OVER = {f"undo_{name}": name for name in ("campaign", "metadata", "event")}
"""What is compared with another kind."""
MIN_OVER = 0.4
MIN_OF_FLOOR = 0.9  # of each kind of OF_DATA
MAX_PLAN = 1.5  # time of a plan over a bare count's
MAX_GROWTH = 1.3  # of the time per message, from the smallest store to the largest
MAX_MEMORY = 64  # MiB more in the largest store, or with large messages, than in the smallest
MAX_RECORDS_MS = 300  # to read one rebind's records

Cell = dict[str, Any]


def main() -> None:
    """Measure what the command line asks for."""
    options = arguments()
    cells: list[Cell] = []
    result: dict[str, Any] = {"machine": machine(), "postgresql_settings": SETTINGS, "runs": options.runs}
    result |= {"cells": cells, "large": [], "waits": {}}
    sizes = sorted(options.sizes)

    def measure(store: Store, database: str, kinds: list[str], into: list[Cell]) -> None:
        for name in kinds:
            say(f"{database} {store.folder.name} {name}")
            into.append(cell(store, database, name, options.runs))
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")

    for database in options.databases:
        for size in sizes:
            store = built(database, options.folder, size)
            measure(store, database, options.kinds, cells)
        if "waits" in options.extras:
            say(f"{database} waits")
            result["waits"][database] = waits(store, database, options.runs)
        if database == "postgresql":
            result["machine"]["postgresql"] = postgresql_version(store)
        if "large" in options.extras:
            measure(built(database, options.folder, *LARGE), database, [*OF_LARGE], result["large"])
    print(table(cells + result["large"]))
    for database in options.databases:
        of_database = {(one["kind"], one["size"]): one for one in cells if one["database"] == database}
        large = [one for one in result["large"] if one["database"] == database]
        for what, value, goal, met in goals(of_database, sizes, large):
            print(f"{database:<10}  {what:<50}{value:>9.2f}  goal: {goal:g}, {'met' if met else 'NOT MET'}")
    for database, found in result["waits"].items():
        print(f"{database:<10}  {in_a_line(found)}")
    if cells:
        plot.draw(result, options.out.with_suffix(".png"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000], help="messages in a store"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=[*KINDS])
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES)
    parser.add_argument("--extras", nargs="*", choices=["waits", "large"], default=["waits", "large"])
    parser.add_argument("--folder", type=Path, default=ROOT / "bench" / "stores", help="where the stores are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance", help="without .json and .png")
    return parser.parse_args()


def goals(
    cells: dict[tuple[str, int], Cell], sizes: list[int], large: list[Cell]
) -> Iterator[tuple[str, float, float, bool]]:
    """What is compared, its value, its goal, and whether it is as good as that."""

    def at_least(what: str, value: float, goal: float) -> tuple[str, float, float, bool]:
        return what, value, goal, value >= goal

    def at_most(what: str, value: float, goal: float) -> tuple[str, float, float, bool]:
        return what, value, goal, value <= goal

    smallest, largest = sizes[0], sizes[-1]
    for (name, size), one in cells.items():
        title = f"{one['title']}, {size:,}"
        if name in OF_DATA:
            yield at_least(f"{title}, over the floor", one["ratio"], MIN_OF_FLOOR)
        if name == "dry":
            yield at_most(f"{title}, time over a count's", 1 / one["ratio"], MAX_PLAN)
        if (OVER.get(name), size) in cells:
            other = cells[OVER[name], size]
            yield at_least(f"{title}, over {other['title']}", other["us_each"] / one["us_each"], MIN_OVER)
        if name == "records":
            yield at_most(f"{title}, ms", one["ms"], MAX_RECORDS_MS)
        if size == largest > smallest:
            first = cells[name, smallest]
            if name in OF_DATA:
                yield at_most(f"{title}, growth", one["us_each"] / first["us_each"], MAX_GROWTH)
            if one["peak_mib"]:
                yield at_most(f"{title}, growth of memory, MiB", one["peak_mib"] - first["peak_mib"], MAX_MEMORY)
    for one in large:
        if (one["kind"], smallest) in cells:
            growth = one["peak_mib"] - cells[one["kind"], smallest]["peak_mib"]
            yield at_most(f"{one['title']} of large messages, memory, MiB", growth, MAX_MEMORY)


def table(cells: list[Cell]) -> str:
    """The cells as aligned text."""
    columns = {"ms": 1, "floor_ms": 1, "ratio": 2, "us_each": 1, "peak_mib": 0}  # with so many digits
    rows = [("database", "messages", "what", "matched", *columns)]
    for one in cells:
        numbers = ("-" if one[name] is None else f"{one[name]:,.{digits}f}" for name, digits in columns.items())
        rows.append((one["database"], f"{one['size']:,}", one["title"], f"{one['matched']:,}", *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            value.ljust(width) if column in (0, 2) else value.rjust(width)
            for column, (value, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def machine() -> dict[str, Any]:
    """Where it was measured, without its name."""
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
        return str(db.info.server_version)


def say(what: str) -> None:
    """Progress, beside the table."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
