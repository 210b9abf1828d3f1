"""The command line: flask load · queues · log."""

import itertools
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TypeVar

import click
from flask import Flask

from history import printable
from kumo import WrongFile, read_messages
from message import NewMessage
from names import QueueName
from queues import DuplicateMessage, Loaded, registry
from store import StoreError

Answer = TypeVar("Answer")

POLL = 0.5  # seconds between two looks for new records
DRAW = 2**16  # bytes between two drawings of the progress bar
MAX_KEY = 2**63 - 1  # what both engines can count to


def init_app(app: Flask) -> None:
    """Give the application its commands."""
    for command in (load, queues, log):
        app.cli.add_command(command)


@click.command()
@click.argument("files", type=click.Path(allow_dash=True), nargs=-1, required=True)
def load(files: tuple[str, ...]) -> None:
    """Load messages from FILES, or standard input (-): all of them or, when something is wrong, none.

    A file holds answers of KumoMTA's inspect-message or inspect-sched-q, one after the other.
    """
    sizes = answered(lambda: [(os.fstat(0) if file == "-" else Path(file).stat()).st_size for file in files])
    length = sum(sizes) if all(sizes) else None  # of a pipe it is not known
    label, hidden = "loading", not sys.stderr.isatty()
    with click.progressbar(
        itertools.count(), length, label, file=sys.stderr, hidden=hidden, update_min_steps=DRAW
    ) as bar:
        loaded = answered(lambda: load_checked(files, bar.update))
    empty = f", {loaded.empty} of them without content" if loaded.empty else ""
    click.echo(f"{loaded.messages} messages loaded{empty}, {loaded.discarded} discarded")


def load_checked(files: tuple[str, ...], progress: Callable[[int], None]) -> Loaded:
    """Load messages after all of them were read and checked, which may take long: no lock is held meanwhile.

    docs/contract.md, "Loading and printing messages".
    """
    with TemporaryFile() as kept:
        for name in files:
            with click.open_file(name, "rb") as file:
                for message in read_messages(file, progress):
                    pickle.dump(message, kept)
        kept.seek(0)
        registry.prepare()
        return registry.load(unpickled(kept))


def unpickled(file: IO[bytes]) -> Iterator[NewMessage]:
    """The messages in a file of our own."""
    with suppress(EOFError):
        while True:
            yield pickle.load(file)  # noqa: S301


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def queues(as_json: bool) -> None:
    """List the scheduled queues."""
    rows = [{**asdict(QueueName.parse(summary.queue)), **asdict(summary)} for summary in answered(registry.queues)]
    columns = ("queue", "campaign", "tenant", "domain", "routing_domain", "messages", "due")
    if as_json:
        for row in rows:
            click.echo(json.dumps({column: row[column] for column in columns}))
    else:
        table = [columns, *(tuple("-" if row[c] is None else printable(str(row[c])) for c in columns) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@click.command()
@click.option("--follow", is_flag=True, help="Continue with new records as they are written.")
@click.option(
    "--after", metavar="KEY", type=click.IntRange(0, MAX_KEY), default=0, help="Start after the record with this key."
)
def log(follow: bool, after: int) -> None:
    """Print the delivery log, one JSON object per line, oldest first."""
    if follow:
        # Ctrl-C is its usual end: no KeyboardInterrupt, which a driver may turn into an error of its own.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    records = registry.records(after, POLL if follow else None)
    while record := answered(lambda: next(records, None)):
        click.echo(json.dumps(record))


def answered(question: Callable[[], Answer]) -> Answer:
    """What the registry answers.

    Raises click.ClickException, with why there is no answer.
    """
    try:
        return question()
    except (DuplicateMessage, WrongFile, OSError) as error:
        raise failure(str(error)) from error
    except StoreError as error:
        raise failure(error.in_full) from error


def failure(reason: str) -> click.ClickException:
    """The end of the command with one line that says why, whatever the reason quotes."""
    return click.ClickException(printable(reason))
