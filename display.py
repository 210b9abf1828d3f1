"""What commands show to people: tables that fit their terminal, numbers of things, and ages."""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

import click
from wcwidth import clip, ljust, rjust, width

from message import to_json
from moving import batches
from rebinding import printable

MIN_WIDTH = 12  # to which a column is cut at most
GAP = "  "  # between columns
NOT_CUT = ("when", "rebind_id")  # part of an id is of no use
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}  # of a length of time, in seconds


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], second_line: int | None = None) -> None:
    """Print a table. On a narrow terminal, a row has a second line from that column on, and long texts are cut."""
    table = [[encodable(printable(str(cell))) for cell in row] for row in (columns, *rows)]
    widths = [max(map(width, column)) for column in zip(*table, strict=True)]
    numbers = [all(isinstance(row[n], int) for row in rows) for n in range(len(columns))]

    def taken(line: range) -> int:
        return sum(widths[n] for n in line) + len(GAP) * (len(line) - 1 + (line.start > 0))

    every = range(len(columns))
    room, lines = shutil.get_terminal_size().columns if on_terminal(sys.stdout) else taken(every), [every]
    if second_line and taken(every) > room:
        lines = [every[:second_line], every[second_line:]]
    for line in lines:
        cuttable = [n for n in line if columns[n] not in NOT_CUT]
        while taken(line) > room:
            widest = max(cuttable, key=widths.__getitem__)
            if widths[widest] <= MIN_WIDTH:
                break
            widths[widest] -= 1
    for row in table:
        cells = list(map(fitted, row, widths, numbers))
        for line in lines:
            click.echo((GAP * (line.start > 0) + GAP.join(cells[n] for n in line)).rstrip())


def print_lines(lines: Iterable[str], each_at_once: bool = False) -> int:
    """Print lines: many at once, since a print takes as long as to make a line, or each as it comes. How many?"""
    printed = 0
    for several in zip(lines) if each_at_once else batches(lines, len):
        click.echo("\n".join(several))
        printed += len(several)
    return printed


def json_line(value: Any) -> str:
    """A value as JSON in ASCII, which every encoding of standard output has."""
    line = to_json(value)
    return line if line.isascii() else json.dumps(value)


def fitted(cell: str, room: int, right: bool) -> str:
    """A cell of a table, filled to this width, or cut in the middle: names differ at both ends."""
    if (whole := width(cell)) > room:
        head = room // 2
        dots = "…" if encodable("…") == "…" else "~"
        cell = clip(cell, 0, head, fillchar="") + dots + clip(cell, whole - (room - head - 1), whole, fillchar="")
    return rjust(cell, room) if right else ljust(cell, room)


def encodable(text: str) -> str:
    """The text, with escapes for what the encoding of standard output does not have."""
    encoding = sys.stdout.encoding if sys.stdout else "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def on_terminal(stream: IO[str] | None) -> bool:
    """Whether people see this standard stream as it is written. It is None if the caller closed it."""
    return stream is not None and stream.isatty()


def counted(number: int, thing: str) -> str:
    """How many things: 1 queue, 2 queues."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def age(seconds: float) -> str:
    """A length of time in its largest unit."""
    unit = next((unit for unit, length in UNITS.items() if seconds >= length), "s")
    return f"{max(seconds, 0) // UNITS[unit]:.0f}{unit}"
