"""What commands show to people: tables that fit their terminal, numbers of things, and ages."""

import shutil
import sys
from collections.abc import Sequence
from typing import IO, Any

import click

from rebinding import printable

MIN_WIDTH = 12  # to which a column is cut at most
GAP = "  "  # between columns
NOT_CUT = ("when", "rebind_id")  # part of an id is of no use


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], second_line: int | None = None) -> None:
    """Print a table: numbers to the right; on a terminal, the widest columns of text are cut to its width.

    second_line: the column with which a second line begins, if the terminal is too narrow for a whole row.
    """
    table = [[printable(str(cell)) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    numbers = [all(isinstance(row[n], int) for row in rows) for n in range(len(columns))]

    def taken(line: range) -> int:
        return sum(widths[n] for n in line) + len(GAP) * (len(line) - 1 + (line.start > 0))

    every = range(len(columns))
    room, lines = shutil.get_terminal_size().columns if on_terminal(sys.stdout) else taken(every), [every]
    if second_line and taken(every) > room:
        lines = [every[:second_line], every[second_line:]]
    for line in lines:
        cuttable = [n for n in line if columns[n] not in NOT_CUT]
        while taken(line) > room and widths[widest := max(cuttable, key=widths.__getitem__)] > MIN_WIDTH:
            widths[widest] -= 1
    for row in table:
        cells = list(map(fitted, row, widths, numbers))
        for line in lines:
            click.echo((GAP * (line.start > 0) + GAP.join(cells[n] for n in line)).rstrip())


def fitted(cell: str, width: int, right: bool) -> str:
    """A cell of a table, cut or filled to this width."""
    text = cell if len(cell) <= width else f"{cell[: width - 1]}…"
    return text.rjust(width) if right else text.ljust(width)


def on_terminal(stream: IO[str] | None) -> bool:
    """Whether people see this standard stream as it is written. It is None if the caller closed it."""
    return stream is not None and stream.isatty()


def counted(number: int, thing: str) -> str:
    """How many things: 1 queue, 2 queues."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def age(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return f"{max(seconds, 0) // 1:.0f}s"
