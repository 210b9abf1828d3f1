"""The command line: flask load · queues · log."""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, BinaryIO, TypeVar

import click
from flask import Flask
from marshmallow import ValidationError
from marshmallow.exceptions import SCHEMA

from history import printable
from message import NewMessage
from names import QueueName
from queues import DuplicateMessage, registry
from schemas import NotJSON, inspected_messages, parse_json
from store import StoreError

Answer = TypeVar("Answer")

POLL = 0.5  # seconds between two looks for new records
DRAW = 2**16  # bytes between two drawings of the progress bar
MAX_KEY = 2**63 - 1  # what both engines can count to
MAX_REASONS = 5  # that an error names, of all that is wrong in one answer


def init_app(app: Flask) -> None:
    """Give the application its commands."""
    for command in (load, queues, log):
        app.cli.add_command(command)


@click.command()
@click.argument("files", type=click.File("rb"), nargs=-1, required=True)
def load(files: tuple[BinaryIO, ...]) -> None:
    """Load messages from FILES, or standard input (-): all of them or, when something is wrong, none.

    A file holds answers of KumoMTA's inspect-message or inspect-sched-q, one in all or one a line.
    """
    sizes = [os.fstat(file.fileno()).st_size for file in files]
    length = sum(sizes) if all(sizes) else None  # of a pipe it is not known
    label, hidden = "loading", not sys.stderr.isatty()
    with click.progressbar(
        itertools.count(), length, label, file=sys.stderr, hidden=hidden, update_min_steps=DRAW
    ) as bar:
        new = (message for file in files for message in read_messages(file, bar.update))
        answered(registry.prepare)
        loaded, discarded = answered(lambda: registry.load(new))
    click.echo(f"{loaded} messages loaded, {discarded} discarded")


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


def read_messages(file: BinaryIO, progress: Callable[[int], None]) -> Iterator[NewMessage]:
    """The messages of a file; one line, or one whole document, is in memory at once.

    progress: is told of each text that was read, how many bytes it has.
    Raises click.ClickException with file, line and field of what is wrong.
    """
    for line, text in documents(file):
        progress(len(text))
        text = text.rstrip()  # so that what ends too early ends on its own line
        if not text:
            continue
        source = f"{file.name}:{line}"
        try:
            yield from inspected_messages(parse_json(text, line), source)
        except NotJSON as error:
            raise failure(f"{source}: this is not JSON that can be read: {error}") from error
        except ValidationError as error:
            reasons = list(by_field(error.messages))
            more = [f"and {len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
            raise failure(f"{source}: {'; '.join(reasons[:MAX_REASONS] + more)}") from error


def documents(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, blank ones too.

    Where the first that is not blank is no object of its own, it comes with all that follows it.
    """
    lines = enumerate(file, 1)
    for line, text in lines:
        if text.strip():
            yield line, text if text.rstrip().endswith(b"}") else text + file.read()
            break
        yield line, text
    yield from lines


def by_field(messages: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """marshmallow's tree of error messages as lines `field: reason`, the field with its path."""
    if isinstance(messages, dict):
        for field, below in messages.items():
            yield from by_field(below, path if field == SCHEMA else (*path, str(field)))
    else:
        yield ": ".join(filter(None, (".".join(path), " ".join(messages))))


def answered(question: Callable[[], Answer]) -> Answer:
    """What the registry answers.

    Raises click.ClickException, with why there is no answer.
    """
    try:
        return question()
    except DuplicateMessage as error:
        raise failure(str(error)) from error
    except StoreError as error:
        raise failure(error.in_full) from error


def failure(reason: str) -> click.ClickException:
    """The end of the command with one line that says why, whatever the reason quotes."""
    return click.ClickException(printable(reason))
