"""The command line: flask load · queues · messages · rebind · log · history · prune."""

import errno
import getpass
import json
import math
import os
import pickle
import re
import select
import shlex
import signal
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click
from flask import Blueprint
from marshmallow import ValidationError

import deliverylog
import event
import schemas
from display import UNITS, age, counted, json_line, on_terminal, print_lines, print_table
from history import KeyReused, NothingToUndo, UnknownRebind, rebinds_done
from kumo import read_messages, shown_message
from moving import batches
from names import EVERYTHING, NAMING_KEYS, Criteria, QueueName, state_of
from queues import DuplicateMessage, QueueSummary, registry
from rebinding import RebindRequest, RebindResult, printable
from store import StoreError

VERSION: str = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text("utf-8"))["project"]["version"]


def time_of(text: str) -> float:
    """A time of RFC 3339 or a date, in UTC unless it says otherwise, or one ago, such as 2h; in seconds since 1970."""
    if ago := re.fullmatch(r"(\d{1,6})([smhd])", text, re.ASCII):
        return time.time() - int(ago[1]) * UNITS[ago[2]]
    for rest in ("", "Z", "T00:00:00Z"):
        with suppress(ValueError):
            return schemas.seconds(text + rest)
    raise click.BadParameter(f"{text!r} is not a time such as 2026-11-25, 2026-11-25T03:00:00Z, or 2h or 30d ago")


LIMIT = click.IntRange(1, schemas.MAX_LIMIT)
KEY = click.IntRange(0, 2**63 - 1)  # the last that both engines can give to a record
SORT: dict[str, Callable[[QueueSummary], Any]] = {
    "name": lambda one: one.queue,
    "messages": lambda one: -one.messages,
    "due": lambda one: -one.due,
    "overdue": lambda one: math.inf if one.due_since is None else one.due_since,
    "oldest": lambda one: one.oldest,
}
OF_QUEUES = [name for name in vars(EVERYTHING) if name != "id"]  # the criteria of queues
POLL = 0.5  # seconds between two looks for new records
TELL = ("load", "prune")  # what cannot be taken back must not happen to another store unseen
REFUSALS = (DuplicateMessage, event.NoHandler, event.HandlerFailed, UnknownRebind, NothingToUndo, KeyReused)


class StoreCommand(click.Command):
    """A command about the store. First it says which store, on a terminal or if it is one of TELL, and its version."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Refuse an option that is given twice and not repeatable: click would take the last one in silence."""
        _, _, given = self.make_parser(context).parse_args([*args])
        for option, times in Counter(given).items():
            if isinstance(option, click.Option) and times > 1 and not (option.multiple or option.is_flag):
                raise click.BadParameter("given more than once", context, option)
        return super().parse_args(context, args)

    def invoke(self, context: click.Context) -> Any:
        """Run it. Raises click.ClickException, with one line that says why, if it is refused or fails."""
        if on_terminal(sys.stderr) or self.name in TELL:
            click.echo(f"rebind {VERSION}, store: {printable(registry.database.shown)}", err=True)
        try:
            return super().invoke(context)
        except (StoreError, schemas.Unreadable, *REFUSALS) as error:
            raise click.ClickException(printable(str(getattr(error, "in_full", error)))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it ends
            raise click.ClickException(f"standard output: {error.strerror}") from error


commands = Blueprint("commands", __name__, cli_group=None)  # beside the commands of the application, not below a name


@commands.cli.command(cls=StoreCommand)
@click.argument("files", type=click.Path(allow_dash=True), nargs=-1, required=True)
@click.option("--skip-existing", is_flag=True, help="Skip messages whose ids are in the store already.")
def load(files: tuple[str, ...], skip_existing: bool) -> None:
    """Load messages from FILES, or standard input (-): all of them or, when something is wrong, none.

    A file holds answers of KumoMTA's inspect-message or inspect-sched-q, one after the other.
    """
    remarks: Counter[str] = Counter()
    try:
        with TemporaryFile() as kept:  # all is read and checked, which may take long, before the store is locked
            for name in files:
                with click.open_file(name, "rb") as file, counter("loading", read_messages(file, remarks)) as bar:
                    for batch in batches(bar, lambda message: len(message.content)):
                        pickle.dump(batch, kept)
            pickle.dump(None, kept)
            kept.seek(0)
            registry.database.prepare(create=True)
            every_batch = iter(lambda: pickle.load(kept), None)  # noqa: S301
            loaded = registry.load(chain.from_iterable(every_batch), skip_existing)
    except OSError as error:
        raise schemas.Unreadable(str(error)) from error
    empty = f", {loaded['empty']} of them without content" if loaded["empty"] else ""
    skipped = f", {loaded['skipped']} skipped" if loaded["skipped"] else ""
    click.echo(f"{counted(loaded['added'], 'message')} loaded{empty}, {loaded['discarded']} discarded{skipped}")
    for remark, number in (+remarks).items():
        click.echo(f"{counted(number, 'message')} {remark}", err=True)


def counter(label: str, counted: Iterable[Any] = count()) -> Any:
    """On a terminal, a bar that counts what is taken from it, or what it is told to."""
    hidden = not on_terminal(sys.stderr)
    return click.progressbar(counted, None, label, hidden, show_pos=True, file=sys.stderr, update_min_steps=1000)


def queue_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that pick queues."""
    for name in reversed(OF_QUEUES):
        option, of_these = f"--{name.replace('_', '-')}", f"Only queues of this {name.replace('_', ' ')}."
        if name == "queue":
            of_these = "Only the queue of this name. Repeatable."
        command = click.option(option, metavar="NAME", multiple=name == "queue", help=of_these)(command)
    return command


def given_ids(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """The ids on the command line, those on standard input in the place of `-`."""
    if "-" not in values:
        return values
    lines = [line for line in sys.stdin.read().replace("\r\n", "\n").split("\n") if line]
    if not lines:  # it would be as if --id were not given
        raise click.BadParameter("there is no id on standard input")
    return tuple(one for one in values if one != "-") + tuple(lines)


of_this_id = "Only the message with this id, or with -, those on standard input, one per line. Repeatable."
id_option = click.option("--id", metavar="ID", multiple=True, callback=given_ids, help=of_this_id)


def say_missing(ids: tuple[str, ...], limit: int | None, found: int) -> None:
    """Say on standard error how many of the messages that were named by their ids were found, if it is not all."""
    if limit is None and found < len({*ids}):
        click.echo(f"{found} of {counted(len({*ids}), 'message')} found", err=True)


@commands.cli.command(cls=StoreCommand)
@queue_options
@id_option
@click.option("--everything", is_flag=True, help="Rebind all queues. Needed if there is no criterion.")
@click.option("--reason", metavar="TEXT", required=True, help="Logged with every message.")
@click.option("--data", metavar="JSON", default="{}", help="The metadata to set, as a JSON object of strings.")
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set this metadata. Repeatable.")
@click.option("--unset", metavar="KEY", multiple=True, help="Remove this metadata. Repeatable.")
@click.option("--always-flush", is_flag=True, help="Make all due now, not only those that move.")
@click.option("--suppress-logging", is_flag=True, help="Write no AdminRebind records.")
@click.option("--trigger-rebind-event", is_flag=True, help="Let the policy's handlers decide.")
@click.option("--limit", metavar="N", help="Handle at most N messages, those due soonest.")
@click.option("--undo", metavar="REBIND_ID", help="Take back what this rebind did.")
@click.option("--idempotency-key", "key", metavar="KEY", help="If done before with this key, only repeat its answer.")
@click.option("--dry-run", flag_value="true", help="Show the plan and change nothing.")
def rebind(everything: bool, **options: Any) -> None:
    """Move messages into other queues, as POST /api/admin/rebind/v1 does, but on the database itself."""
    try:
        request = request_of(options)
    except schemas.Unreadable as error:
        raise click.UsageError(str(error)) from error
    except ValidationError as error:
        raise click.UsageError(schemas.in_a_line(error.messages)) from error
    if request.criteria == EVERYTHING and not everything and request.undo is None:
        raise click.UsageError("give a criterion, or --everything for all queues")
    result = rebound(request)
    if result.plan is not None:
        print_table(("from", "to", "messages"), result.plan.moves)
        if result.plan.more:
            click.echo(f"and {counted(result.plan.more, 'more pair')} of queues")
    click.echo(result.in_a_line() + (f", rebind {result.rebind_id}" if result.rebind_id else ""))
    say_missing(request.criteria.id, request.limit, result.matched)
    for key in () if result.moved else (*request.data, *request.unset):
        meant = get_close_matches(key, NAMING_KEYS, n=1, cutoff=0.8)
        if meant and meant[0] != key:
            click.echo(f"nothing moved; is {printable(key)} misspelt for {meant[0]}?", err=True)


def request_of(options: dict[str, Any]) -> RebindRequest:
    """What these options of `flask rebind` ask for. Raises UsageError, Unreadable and ValidationError."""
    key, data = options.pop("key"), schemas.parse_json(os.fsencode(options.pop("data")), "--data")
    pairs = list(map(key_and_value, options.pop("sets")))
    if len(set_one_by_one := dict(pairs)) < len(pairs):
        raise click.UsageError("--set gives a key more than once")
    query = {name: options.pop(name) for name in schemas.RebindQuerySchema().fields}
    given = {name: [value] if isinstance(value, str) else value for name, value in query.items() if value is not None}
    body = options | {"data": data | set_one_by_one if isinstance(data, dict) else data}
    parsed_key = schemas.idempotency_key(None if key is None else json.dumps(key))
    return schemas.rebind_request(body, schemas.rebind_query(given), parsed_key, login())


def key_and_value(text: str) -> tuple[str, str]:
    """What --set sets: blanks around both are removed, as kcli does. Raises UsageError."""
    key, equals, value = map(str.strip, text.partition("="))
    if not (key and equals):
        raise click.UsageError("--set needs KEY=VALUE")
    return key, value


def rebound(request: RebindRequest) -> RebindResult:
    """Do it. A last handler of the event counts the messages that the others have had."""
    if not (request.trigger_rebind_event and event.rebind.handlers):
        return registry.rebind(request)
    with counter("rebinding") as bar:
        event.rebind.connect(lambda message, data: bar.update(1))
        return registry.rebind(request)


@commands.cli.command(cls=StoreCommand)
@queue_options
@click.option("--deliverable", is_flag=True, help="Leave out queues on hold and the queue null.")
@click.option("--sort", type=click.Choice(list(SORT)), default="name", show_default=True)
@click.option("--limit", metavar="N", type=LIMIT, help="Show only the first N queues.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def queues(deliverable: bool, sort: str, limit: int | None, as_json: bool, **criteria: Any) -> None:
    """List the scheduled queues.

    How many messages, how many of them due, how long the first of those has been due, the oldest's age, the most
    attempts, and whether workers skip the queue (hold) or discard its messages.
    """
    found = [one for one in registry.queues(Criteria(**criteria)) if not (deliverable and state_of(one.queue))]
    shown = sorted(found, key=SORT[sort])[:limit]
    if as_json:
        each = (asdict(one) | asdict(QueueName.parse(one.queue)) | {"state": state_of(one.queue)} for one in shown)
        print_lines(map(json_line, each))
        return
    now = time.time()
    rows = []
    for one in shown:
        overdue = "" if one.due_since is None else age(now - one.due_since)
        state = state_of(one.queue) or ""
        rows.append((one.queue, one.messages, one.due, overdue, age(now - one.oldest), one.attempts, state))
    print_table(("queue", "messages", "due", "overdue", "oldest", "attempts", "state"), rows)
    in_all = counted(sum(one.messages for one in found), "message")
    total = f"{counted(len(found), 'queue')}, {in_all}, {sum(one.due for one in found)} due"
    click.echo(total + (f"; {len(rows)} shown" if len(rows) < len(found) else ""))


@commands.cli.command(cls=StoreCommand)
@queue_options
@id_option
@click.option("--limit", metavar="N", type=LIMIT, help="At most N messages, those due soonest.")
@click.option("--content", is_flag=True, help="With the content, so that `flask load` can read the messages.")
def messages(limit: int | None, content: bool, **criteria: Any) -> None:
    """Print messages, one JSON object per line. If one cannot be read, the others are printed nevertheless."""
    unreadable: list[str] = []

    def readable() -> Iterator[str]:
        for row, data in registry.messages(Criteria(**criteria), limit, content):
            try:
                yield json_line(shown_message(row, data))
            except (ValueError, RecursionError) as error:
                click.echo(printable(f"the message {row.id} cannot be read: {error}"), err=True)
                unreadable.append(row.id)

    say_missing(criteria["id"], limit, print_lines(readable()) + len(unreadable))
    sys.exit(bool(unreadable))


@commands.cli.command(cls=StoreCommand)
@queue_options
@click.option("--follow", is_flag=True, help="Continue with new records as they are written.")
@click.option("--after", metavar="KEY", type=KEY, help="Start after the record with this key.")
@click.option("--type", metavar="TYPE", help="Only records of this type, such as AdminRebind, Delivery or Bounce.")
@click.option("--id", metavar="ID", help="Only records of the message with this id.")
@click.option("--rebind-id", metavar="ID", help="Only what this rebind wrote.")
@click.option("--since", metavar="TIME", type=time_of, help="Only records from this time on (UTC by default).")
@click.option("--until", metavar="TIME", type=time_of, help="Only records before this time.")
def log(follow: bool, after: int | None, **wanted: Any) -> None:
    """Print the delivery log, oldest first: one JSON object per line, in the shape of KumoMTA's log records.

    A record of a rebind is of the queue before it, and of the one after it.
    """
    if follow:
        # Ctrl-C is its usual end: no KeyboardInterrupt, which a driver may turn into an error of its own.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        threading.Thread(target=end_with_the_reader, daemon=True).start()
    criteria = Criteria(**{name: wanted.pop(name) for name in OF_QUEUES})
    which = deliverylog.LogFilter(**wanted, criteria=criteria)
    found = deliverylog.records(registry.database, after, POLL if follow else None, which)
    if not print_lines(map(json_line, found), each_at_once=follow):
        click.echo("no record found", err=True)


def end_with_the_reader() -> None:
    """End this process when nobody reads its standard output any more, even if there is nothing to write."""
    output = select.poll()
    output.register(1, 0)  # POLLHUP and POLLERR are always told
    output.poll()
    os._exit(1)


@commands.cli.command(cls=StoreCommand)
@click.option("--since", metavar="TIME", type=time_of, help="Only rebinds from this time on (UTC by default).")
@click.option("--limit", metavar="N", type=LIMIT, help="At most N rebinds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with all that was asked.")
def history(since: float | None, limit: int | None, as_json: bool) -> None:
    """List the rebinds that were done, newest first."""
    rebinds = rebinds_done(registry.database, since, limit)
    if as_json:
        print_lines(map(json_line, rebinds))
        return
    columns = ("when", "rebind_id", "matched", "moved", "actor", "what", "reason")
    for one in rebinds:
        one |= {"when": f"{one['time'][:19]}Z", "what": as_options(one["request"])}
    print_table(columns, [[one[column] for column in columns] for one in rebinds], columns.index("actor"))


def as_options(asked: dict[str, Any]) -> str:
    """What was asked, except the reason, as options of `flask rebind`. Of several ids, it shows how many they are."""
    words = [] if asked.keys() & {"undo", *vars(EVERYTHING)} else ["--everything"]
    for name in sorted(asked.keys() - {"reason"}):
        option, given = f"--{name.replace('_', '-')}", asked[name]
        if name == "data":
            option, given = "--set", [f"{key}={value}" for key, value in given.items()]
        if name == "id" and len(given) > 1:
            given = f"{len(given)} ids"
        for value in given if isinstance(given, list) else [given]:
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


@commands.cli.command(cls=StoreCommand)
@click.option("--before", metavar="TIME", type=time_of, required=True, help="Remove what is older (UTC by default).")
@click.option("--dry-run", is_flag=True, help="Only say how much would be removed.")
def prune(before: float, dry_run: bool) -> None:
    """Remove old records and old history.

    They are removed a few at a time, so that nobody waits. A rebind whose records are gone cannot be undone. Its
    Idempotency-Key is forgotten too: the same request, sent again, is done again.
    """
    old_records, old_rebinds = deliverylog.prune(registry.database, before, dry_run)
    done = "would be removed" if dry_run else "removed"
    click.echo(f"{counted(old_records, 'record')} and {counted(old_rebinds, 'rebind')} {done}")


def login() -> str:
    """Who asks: the name of the login, or the number of a user without a name, as containers may have."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
