"""`make bench`: how fast rebinding is beside bare SQL, how it grows, and what it costs the others.

Prints the table of docs/performance.md and the goals, and writes all single times as JSON. It may be stopped at any
time: what was measured by then is in the JSON. With `--beside COMMIT`, an older commit is measured in turns with this
one; what it requires must be installed.
"""

import argparse
import json
import math
import os
import platform
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kinds import KINDS
from measure import cell
from stores import KINDS_OF_STORE, ROOT, SETTINGS, Store, built
from waits import claims, in_a_line, waits

RUNS, MEDIUM = 3, 100_000  # runs of each kind, in stores of up to so many messages; in larger ones, a single run
OF_LARGER = ("constant", "campaign", "event", "none")  # what is measured there
LARGE, OF_LARGE = (500, 2**20), ("event", "undo_event", "log")  # messages, bytes of metadata that each has
CROWDS = {"6,000 queues": (6_000, 0), "a queue with 1,000 leased messages": (10, 1_000)}

OF_DATA = ("constant", "campaign", "keyed", "metadata", "flush", "suppressed")
OVER = {
    **{(f"undo_{name}", ""): (name, 0.4) for name in ("campaign", "metadata", "event")},
    ("event", "sqlite"): ("constant", 0.45),
    ("by_name", ""): ("queue", 0.8),
    ("by_id", ""): ("everything", 0.8),
}
"""What is compared with another kind, on one engine or on both, and how fast it should be beside that."""
MIN_OF_FLOOR = 0.85  # of each kind of OF_DATA
MAX_PLAN = 1.5  # time of a plan over a bare count's
MAX_NO_MATCH = 5  # ms, on SQLite
MAX_CLAIM = 10  # ms
MAX_GROWTH = 1.3  # of the time per message, from the smallest store to the largest
MAX_MEMORY = 64  # MiB more in the largest store, or with large messages, than in the smallest

Cell = dict[str, Any]


def main() -> None:
    """Measure what the command line asks for."""
    options = arguments()
    cells: list[Cell] = []
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "postgresql_settings": SETTINGS}
    result |= {"beside": options.beside, "cells": cells, "large": [], "waits": {}, "claims": {}}
    tree = checked_out(options.folder, options.beside) if options.beside else None

    def measure(store: Store, database: str, kinds: list[str], into: list[Cell], older: Store | None = None) -> None:
        runs = options.runs or (RUNS if store.size <= MEDIUM else 1)
        for name in kinds:
            print(f"{database} {store.folder.name} {name}", file=sys.stderr, flush=True)
            into.append(cell(store, database, name, runs, older))
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")

    for database in options.databases:
        for size in sorted(options.sizes):
            kinds = [name for name in options.kinds if size <= MEDIUM or name in OF_LARGER]
            older = built(database, options.folder, size, tree=tree) if tree and size <= MEDIUM else None
            measure(built(database, options.folder, size), database, kinds, cells, older)
        if "waits" in options.extras:
            print(f"{database} waits", file=sys.stderr, flush=True)
            store = built(database, options.folder, min(max(options.sizes), MEDIUM))
            result["waits"][database] = waits(store, database, 1)
            result["claims"][database] = {what: claims(database, *crowd) for what, crowd in CROWDS.items()}
        if "large" in options.extras:
            store = built(database, options.folder, *LARGE)
            measure(store, database, [*OF_LARGE], result["large"])
    print("\n".join(table(cells, options.beside)))
    for goal in goals(result):
        print(goal)
    for database, found in result["waits"].items():
        print(f"{database:<10}  {in_a_line(found)}")
    print(f"measured on {result['date']}: {result['machine']}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000], help="messages in a store"
    )
    parser.add_argument("--runs", type=int, help="of each kind, whatever the store's size")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=[*KINDS])
    parser.add_argument("--databases", nargs="+", choices=KINDS_OF_STORE, default=[*KINDS_OF_STORE])
    parser.add_argument("--extras", nargs="*", choices=["waits", "large"], default=["waits", "large"])
    parser.add_argument("--beside", metavar="COMMIT", help="measure the code of this commit too")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench" / "stores", help="where the stores are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance", help="without .json")
    return parser.parse_args()


def checked_out(folder: Path, commit: str) -> Path:
    """The code of a commit, in a folder of its own."""
    tree = folder.resolve() / commit
    if not tree.exists():
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), commit], check=True)
    return tree


def goals(result: dict[str, Any]) -> Iterator[str]:
    """A line for each goal: what is compared, its value, the goal, and whether it is met."""

    def goal(database: str, what: str, value: float, least: float = -math.inf, most: float = math.inf) -> str:
        met = "met" if least <= value <= most else "NOT MET"
        return f"{database:<10}  {what:<72}{value:>8.2f}  goal: {least if most == math.inf else most:g}, {met}"

    cells = {(one["database"], one["kind"], one["size"]): one for one in result["cells"]}
    sizes = [size for _, _, size in cells]
    for (database, name, size), one in cells.items():
        title, first = f"{one['title']}, {size:,}", cells[database, name, min(sizes)]
        if name in OF_DATA:
            yield goal(database, f"{title}, over the floor", one["ratio"], least=MIN_OF_FLOOR)
        if name == "dry":
            yield goal(database, f"{title}, time over a count's", 1 / one["ratio"], most=MAX_PLAN)
        if name in ("none", "none_by_name") and database == "sqlite":
            yield goal(database, f"{title}, ms", one["ms"], most=MAX_NO_MATCH)
        over, least = OVER.get((name, database)) or OVER.get((name, ""), ("", 0.0))
        if other := cells.get((database, over, size)):
            yield goal(database, f"{title}, over {other['title']}", other["us_each"] / one["us_each"], least)
        if one["beside"]:
            yield goal(database, f"{title}, over {result['beside']}", one["beside"], KINDS[name].beside)
        if size > first["size"] and name in OF_DATA:
            yield goal(database, f"{title}, growth", one["us_each"] / first["us_each"], most=MAX_GROWTH)
        if size > first["size"] and one["peak_mib"]:
            yield goal(
                database, f"{title}, growth of memory, MiB", one["peak_mib"] - first["peak_mib"], most=MAX_MEMORY
            )
    for one in result["large"]:
        if first := cells.get((one["database"], one["kind"], min(sizes))):
            growth = one["peak_mib"] - first["peak_mib"]
            yield goal(one["database"], f"{one['title']} of large messages, memory, MiB", growth, most=MAX_MEMORY)
    for database, found in result["claims"].items():
        for what, value in found.items():
            yield goal(database, f"a claim with {what}, 99th percentile, ms", value, most=MAX_CLAIM)


def table(cells: list[Cell], beside: str | None) -> Iterator[str]:
    """The cells in Markdown, as docs/performance.md has them: ms, and in brackets how fast that is beside the floor."""
    by_column: dict[tuple[str, int], dict[str, Cell]] = {}
    for one in cells:
        by_column.setdefault((one["database"], one["size"]), {})[one["kind"]] = one
    names = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
    yield f"| what | {' | '.join(f'{names[database]} {size:,}' for database, size in by_column)} |"
    yield f"| --- |{' ---: |' * len(by_column)}"
    for name in dict.fromkeys(one["kind"] for one in cells):
        of_kind = [column.get(name) for column in by_column.values()]
        yield f"| {KINDS[name].title} | {' | '.join(map(_shown, of_kind))} |"
    if beside:
        yield f"\nIn square brackets: how fast it is beside {beside}."


def _shown(one: Cell | None) -> str:
    if one is None:
        return "-"
    digits = 1 if one["ms"] < 10 else 0
    ratio = f" ({one['ratio']:.2f})" if one["ratio"] else ""
    return f"{one['ms']:,.{digits}f}{ratio}" + (f" [{one['beside']:.2f}]" if one["beside"] else "")


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


if __name__ == "__main__":
    main()
