"""The command line: flask load · queues · log."""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, BinaryIO, TypeVar

import click
from flask import Flask
from marshmallow import ValidationError

from queues import DuplicateMessage, NewMessage, QueueName, registry
from schemas import NotJSON, inspected_messages, parse_json
from store import StoreUnavailable

Answer = TypeVar("Answer")

POLL = 0.5  # seconds between two looks for new records


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
    new = itertools.chain.from_iterable(map(read_messages, files))
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
        table = [columns, *(tuple("-" if row[c] is None else str(row[c]) for c in columns) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@click.command()
@click.option("--follow", is_flag=True, help="Go on with new records as they are written.")
@click.option("--after", metavar="N", type=click.IntRange(0), default=0, help="Leave out the first N records.")
def log(follow: bool, after: int) -> None:
    """Print the delivery log, one JSON object a line, oldest first."""
    records = registry.records(after, POLL if follow else None)
    while record := answered(lambda: next(records, None)):
        click.echo(json.dumps(record))


def read_messages(file: BinaryIO) -> Iterator[NewMessage]:
    """The messages of a file, with a progress bar on a terminal; one line, or one whole document, is in memory at once.

    Raises click.ClickException with file, line and field of what is wrong.
    """
    size = os.fstat(file.fileno()).st_size
    with click.progressbar(itertools.count(), size or None, f"loading {file.name}", file=sys.stderr) as bar:
        for number, text in documents(file):
            source = f"{file.name}:{number}"
            bar.update(len(text))
            try:
                yield from inspected_messages(parse_json(text), source)
            except NotJSON as error:
                raise click.ClickException(f"{source}: this is not JSON that can be read: {error}") from error
            except ValidationError as error:
                reasons = "; ".join(f"{field}: {reason}" for field, reason in by_field(error.messages))
                raise click.ClickException(f"{source}: {reasons}") from error


def documents(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each line of a file with its number, or the whole file where its first line is no object of its own."""
    first = file.readline()
    if not first.rstrip().endswith(b"}"):
        first += file.read()
    for number, text in enumerate(itertools.chain([first], file), 1):
        if text.strip():
            yield number, text


def by_field(messages: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """marshmallow's tree of error messages as pairs of a field's path and a reason."""
    if isinstance(messages, dict):
        for field, below in messages.items():
            yield from by_field(below, f"{path}.{field}" if path else str(field))
    else:
        yield path, " ".join(messages)


def answered(question: Callable[[], Answer]) -> Answer:
    """What the registry answers, or the end of the command with a line that says why there is none."""
    try:
        return question()
    except (DuplicateMessage, StoreUnavailable) as error:
        raise click.ClickException(str(error)) from error
