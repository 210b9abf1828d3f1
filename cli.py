"""The command line: flask load · queues · messages · rebind · log · history · prune."""

import errno
import functools
import getpass
import itertools
import json
import os
import pickle
import shlex
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, TypeVar

import click
from flask import Flask
from marshmallow import ValidationError

from deliverylog import LogFilter
from display import age, counted, on_terminal, print_table
from event import HandlerFailed, NoHandler
from history import KeyReused, NothingToUndo, UnknownRebind
from kumo import WrongFile, by_field, read_messages, shown_message
from message import NewMessage, check_text
from names import Criteria, QueueName
from queues import DuplicateMessage, Loaded, QueueSummary, registry
from rebinding import printable
from schemas import NotJSON, idempotency_key, parse_json, rebind_query, rebind_request
from store import StoreError

VERSION: str = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text("utf-8"))["project"]["version"]

Answer = TypeVar("Answer")


class Time(click.ParamType[float]):
    """A time as RFC 3339 or as a date, in UTC unless it says otherwise; in seconds since 1970."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        try:
            given = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a time such as 2026-11-25 or 2026-11-25T03:00:00Z", param, context)
        return given.replace(tzinfo=given.tzinfo or UTC).timestamp()


class StorableText(click.ParamType[str]):
    """A text that both databases can hold, or be asked for."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        try:
            check_text(value)
        except ValueError as error:
            self.fail(str(error), param, context)
        return str(value)


POLL = 0.5  # seconds between two looks for new records
DRAW = 2**16  # bytes between two drawings of the progress bar
MAX_KEY = 2**63 - 1  # what both engines can count to
REFUSALS = (DuplicateMessage, WrongFile, OSError, NoHandler, HandlerFailed, UnknownRebind, NothingToUndo, KeyReused)
# In this order the history shows what was asked.
ASKED: list[str] = ["campaign", "tenant", "domain", "routing_domain", "data", "unset", "undo", "limit"]
ASKED += ["trigger_rebind_event", "always_flush", "suppress_logging"]


class StoreCommand(click.Command):
    """A command that says on a terminal which version it is, and which store it is about."""

    def invoke(self, context: click.Context) -> Any:
        """Run it. Raises click.ClickException if standard output is full."""
        if on_terminal(sys.stderr):
            click.echo(f"rebind {VERSION}, store: {printable(registry.database.shown)}", err=True)
        try:
            return super().invoke(context)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it ends
            raise failure(f"standard output: {error.strerror}") from error


def init_app(app: Flask) -> None:
    """Give the application its commands."""
    for command in (load, queues, messages, rebind, log, history, prune):
        app.cli.add_command(command)


@click.command(cls=StoreCommand)
@click.argument("files", type=click.Path(allow_dash=True), nargs=-1, required=True)
def load(files: tuple[str, ...]) -> None:
    """Load messages from FILES, or standard input (-): all of them or, when something is wrong, none.

    A file holds answers of KumoMTA's inspect-message or inspect-sched-q, one after the other.
    """
    sizes = answered(lambda: [(os.fstat(0) if file == "-" else Path(file).stat()).st_size for file in files])
    length = sum(sizes) if all(sizes) else None  # of a pipe it is not known
    label, hidden = "loading", not on_terminal(sys.stderr)
    with click.progressbar(
        itertools.count(), length, label, file=sys.stderr, hidden=hidden, update_min_steps=DRAW
    ) as bar:
        loaded = answered(lambda: load_checked(files, bar.update))
    empty = f", {loaded.empty} of them without content" if loaded.empty else ""
    click.echo(f"{counted(loaded.messages, 'message')} loaded{empty}, {loaded.discarded} discarded")


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


def criteria_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the four criteria, as one argument `criteria`."""

    @functools.wraps(command)
    def with_criteria(
        campaign: str | None, tenant: str | None, domain: str | None, routing_domain: str | None, **rest: Any
    ) -> None:
        command(criteria=Criteria(campaign, tenant, domain, routing_domain), **rest)

    for name in ("routing-domain", "domain", "tenant", "campaign"):
        of_these = f"Only queues of this {name.replace('-', ' ')}."
        with_criteria = click.option(f"--{name}", metavar="NAME", help=of_these)(with_criteria)
    return with_criteria


@click.command(cls=StoreCommand)
@criteria_options
@click.option("--everything", is_flag=True, help="Rebind all queues. Needed if there is no criterion.")
@click.option("--reason", metavar="TEXT", required=True, help="Logged with every message.")
@click.option("--data", metavar="JSON", help="The metadata to set, as a JSON object of strings.")
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set this metadata. Repeatable.")
@click.option("--unset", metavar="KEY", multiple=True, help="Remove this metadata. Repeatable.")
@click.option("--always-flush", is_flag=True, help="Make all due now, not only those that move.")
@click.option("--suppress-logging", is_flag=True, help="Write no AdminRebind records.")
@click.option("--trigger-rebind-event", is_flag=True, help="Let the policy's handlers decide.")
@click.option("--limit", metavar="N", help="Handle at most N messages, those due soonest.")
@click.option("--undo", metavar="REBIND_ID", help="Take back what this rebind did.")
@click.option(
    "--idempotency-key",
    "key",
    metavar="KEY",
    help="If this request was already done with this key, only repeat its answer.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and change nothing.")
def rebind(
    criteria: Criteria,
    everything: bool,
    data: str | None,
    sets: tuple[str, ...],
    key: str | None,
    dry_run: bool,
    limit: str | None,
    undo: str | None,
    unset: tuple[str, ...],
    **flags: Any,
) -> None:
    """Move messages into other queues.

    It does what POST /api/admin/rebind/v1 does, and works on the database itself.
    """
    if criteria.match_all and not everything and undo is None:
        raise click.UsageError("give a criterion, or --everything for all queues")
    if not all(each.find("=") > 0 for each in sets):
        raise click.UsageError("--set needs KEY=VALUE")
    query = {"dry_run": [str(dry_run).lower()], "unset": list(unset)}
    query |= {name: [given] for name, given in (("limit", limit), ("undo", undo)) if given is not None}
    try:
        values = parse_json(os.fsencode("{}" if data is None else data))
        if isinstance(values, dict):
            values |= dict(each.split("=", 1) for each in sets)
        body = flags | asdict(criteria) | {"data": values}
        quoted = None if key is None else json.dumps(key)
        request = rebind_request(body, rebind_query(query), idempotency_key(quoted), login())
    except NotJSON as error:
        raise click.UsageError(f"--data is not valid JSON: {error}") from error
    except ValidationError as error:
        raise click.UsageError("; ".join(by_field(error.messages))) from error
    with progress_bar(request.trigger_rebind_event or request.undo is not None) as bar:
        result = answered(lambda: registry.rebind(request, lambda: bar.update(1)))
    if result.plan is not None:
        rows = [(move.source, move.to, move.messages) for move in result.plan.moves]
        print_table(("from", "to", "messages"), rows)
        if result.plan.more:
            click.echo(f"and {counted(result.plan.more, 'more pair')} of queues")
    click.echo(result.in_a_line() + (f", rebind {result.rebind_id}" if result.rebind_id else ""))
    registry.tidy(result)


@click.command(cls=StoreCommand)
@criteria_options
@click.option(
    "--sort",
    type=click.Choice(["name", "messages", "due", "oldest"]),
    default="name",
    show_default=True,
    help="Order of the queues.",
)
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Show only the first N queues.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def queues(criteria: Criteria, sort: str, limit: int | None, as_json: bool) -> None:
    """List the scheduled queues.

    The table shows how many messages wait in each, how many of them are due, the age of the oldest one, and the most
    delivery attempts that one of them has had.
    """
    found = answered(lambda: registry.queues(criteria))
    orders: dict[str, Callable[[QueueSummary], Any]] = {
        "messages": lambda one: -one.messages,
        "due": lambda one: -one.due,
        "oldest": lambda one: one.oldest,
    }
    shown = sorted(found, key=orders[sort]) if sort in orders else found
    if as_json:
        for one in shown[:limit]:
            click.echo(json.dumps({"queue": one.queue, **asdict(QueueName.parse(one.queue)), **asdict(one)}))
        return
    now = time.time()
    rows = [(one.queue, one.messages, one.due, age(now - one.oldest), one.attempts) for one in shown[:limit]]
    print_table(("queue", "messages", "due", "oldest", "attempts"), rows)
    in_all = counted(sum(one.messages for one in found), "message")
    total = f"{counted(len(found), 'queue')}, {in_all}, {sum(one.due for one in found)} due"
    click.echo(total + (f"; {len(rows)} shown" if len(rows) < len(found) else ""))


@click.command(cls=StoreCommand)
@criteria_options
@click.option("--id", metavar="ID", type=StorableText(), help="Only the message with this id.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="At most N messages, those due soonest.")
@click.option("--content", is_flag=True, help="With the content, so that `flask load` can read the messages.")
def messages(criteria: Criteria, id: str | None, limit: int | None, content: bool) -> None:
    """Print messages, one JSON object per line.

    With their content, they can be loaded into another store with `flask load`. If one cannot be read, the others are
    printed nevertheless.
    """
    stream = registry.messages(criteria, id, limit)
    unreadable = 0
    while (row := answered(lambda: next(stream, None))) is not None:
        try:
            click.echo(json.dumps(shown_message(row, content)))
        except (ValueError, RecursionError) as error:
            click.echo(printable(f"the message {row.id} cannot be read: {error}"), err=True)
            unreadable = 1
    sys.exit(unreadable)


@click.command(cls=StoreCommand)
@click.option("--follow", is_flag=True, help="Continue with new records as they are written.")
@click.option("--after", metavar="KEY", type=click.IntRange(0), default=0, help="Start after the record with this key.")
@click.option(
    "--type",
    metavar="TYPE",
    type=StorableText(),
    help="Only records of this type, such as AdminRebind, Delivery or Bounce.",
)
@click.option("--id", metavar="ID", type=StorableText(), help="Only records of the message with this id.")
@click.option("--rebind-id", metavar="ID", type=StorableText(), help="Only what this rebind wrote.")
@click.option("--since", metavar="TIME", type=Time(), help="Only records from this time on (RFC 3339; UTC by default).")
@click.option("--until", metavar="TIME", type=Time(), help="Only records before this time.")
def log(follow: bool, after: int, **wanted: Any) -> None:
    """Print the delivery log, oldest first.

    A record is one JSON object on one line, in the shape of KumoMTA's log records.
    """
    if follow:
        # Ctrl-C is its usual end: no KeyboardInterrupt, which a driver may turn into an error of its own.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    records = registry.records(min(after, MAX_KEY), POLL if follow else None, LogFilter(**wanted))
    while record := answered(lambda: next(records, None)):
        click.echo(json.dumps(record))


@click.command(cls=StoreCommand)
@click.option("--since", metavar="TIME", type=Time(), help="Only rebinds from this time on (RFC 3339; UTC by default).")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="At most N rebinds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with all that was asked.")
def history(since: float | None, limit: int | None, as_json: bool) -> None:
    """List the rebinds that were done, newest first."""
    rebinds = answered(lambda: registry.rebinds_done(since, limit))
    if as_json:
        for one in rebinds:
            click.echo(json.dumps(one))
        return
    columns = ("when", "rebind_id", "matched", "moved", "actor", "what", "reason")
    more = [{"when": f"{one['time'][:19]}Z", "what": as_options(one["request"])} for one in rebinds]
    rows = [[(one | its)[column] for column in columns] for one, its in zip(rebinds, more, strict=True)]
    print_table(columns, rows, second_line=columns.index("actor"))


def as_options(asked: dict[str, Any]) -> str:
    """What was asked, except the reason, as options of `flask rebind`."""
    words = []
    for name in ASKED:
        option = "--set" if name == "data" else f"--{name.replace('_', '-')}"
        given = asked.get(name, [])
        if isinstance(given, dict):
            given = [f"{key}={value}" for key, value in given.items()]
        for value in given if isinstance(given, list) else [given]:
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


@click.command(cls=StoreCommand)
@click.option(
    "--before",
    metavar="TIME",
    type=Time(),
    required=True,
    help="Remove what is older than this time (RFC 3339; UTC by default).",
)
@click.option("--dry-run", is_flag=True, help="Only say how much would be removed.")
def prune(before: float, dry_run: bool) -> None:
    """Remove old records and old history.

    They are removed a few at a time, so that nobody waits. A rebind whose records are gone cannot be undone. Its
    Idempotency-Key is forgotten too: the same request, sent again, is done again.
    """
    pruned = answered(lambda: registry.prune(before, dry_run))
    done = "would be removed" if dry_run else "removed"
    click.echo(f"{counted(pruned.records, 'record')} and {counted(pruned.rebinds, 'rebind')} {done}")


def progress_bar(streams: bool) -> Any:
    """A bar that counts messages, on a terminal and if they are streamed one by one; otherwise nothing."""
    return click.progressbar(
        itertools.count(),
        label="rebinding",
        show_pos=True,
        file=sys.stderr,
        hidden=not (streams and on_terminal(sys.stderr)),
        update_min_steps=1000,
    )


def login() -> str:
    """Who asks: the name of the login, or the number of a user without a name, as containers may have."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def answered(question: Callable[[], Answer]) -> Answer:
    """What the registry answers.

    Raises click.ClickException, with why there is no answer.
    """
    try:
        return question()
    except REFUSALS as error:
        raise failure(str(error)) from error
    except StoreError as error:
        raise failure(error.in_full) from error


def failure(reason: str) -> click.ClickException:
    """The end of the command with one line that says why, whatever the reason quotes."""
    return click.ClickException(printable(reason))
