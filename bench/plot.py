"""The plot of performance.json. Run by itself, `plot.py FILE.json`, it draws again what was measured before."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot

OURS, FLOOR = "#1f5f99", "#b8c4d0"


def draw(result: dict[str, Any], file: Path) -> None:
    """Above, messages a second in the largest store; below, the time per message as stores grow."""
    databases = sorted({cell["database"] for cell in result["cells"]}, reverse=True)
    figure, axes = pyplot.subplots(
        2, len(databases), figsize=(7 * len(databases), 9), squeeze=False, layout="constrained"
    )
    for column, database in enumerate(databases):
        cells = [cell for cell in result["cells"] if cell["database"] == database and cell["us_each"]]
        title = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[database]
        _rates(axes[0][column], cells, title)
        _growth(axes[1][column], cells, title)
    machine = result["machine"]
    figure.suptitle(f"Rebinding: medians of {result['runs']}, on {machine['cores']} cores, {machine['memory_gib']} GiB")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _rates(axes: Any, cells: list[dict[str, Any]], title: str) -> None:
    size = max(cell["size"] for cell in cells)
    cells = [cell for cell in cells if cell["size"] == size]
    places = range(len(cells))
    ours = [1000 / cell["us_each"] for cell in cells]
    floor = [1000 / cell["us_each"] / (cell["ratio"] or math.inf) for cell in cells]
    axes.barh([place + 0.2 for place in places], floor, 0.38, color=FLOOR, label="bare SQL, by hand")
    bars = axes.barh([place - 0.2 for place in places], ours, 0.38, color=OURS, label="the service")
    labels = [
        f"{rate:,.0f}" + (f"  ({cell['ratio']:.0%})" if cell["ratio"] else "")
        for rate, cell in zip(ours, cells, strict=True)
    ]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(places, [cell["title"] for cell in cells])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=f"{title}, {size:,} messages", xlabel="thousand messages a second (of bare SQL's)")
    axes.legend(loc="lower right", fontsize=8)


def _growth(axes: Any, cells: list[dict[str, Any]], title: str) -> None:
    for kind in dict.fromkeys(cell["kind"] for cell in cells):
        of_kind = [cell for cell in cells if cell["kind"] == kind]
        sizes, times = zip(*((cell["size"], cell["us_each"]) for cell in of_kind), strict=True)
        axes.plot(sizes, times, marker="o", label=of_kind[0]["title"])
    axes.set(
        xscale="log",
        yscale="log",
        title=f"{title}: time per message",
        xlabel="messages in the store",
        ylabel="µs per matched message",
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).with_suffix(".png"))
