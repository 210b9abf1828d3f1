"""What is measured: requests to the service, and commands."""

from dataclasses import dataclass, field
from typing import Any

REASON = "wrong campaign"
SALE, MOVED, ONE_QUEUE = "summer-sale", "moved.example", "spring-sale:tenant-1@gmail.example"
RETRY_KEY = "retry-1"
OF_COMMANDS = 100_000  # messages that `flask load` adds and `flask messages` prints, at most


@dataclass(frozen=True)
class Kind:
    """One thing that is measured."""

    title: str
    body: dict[str, Any] = field(default_factory=dict)
    """Of the request, besides its reason."""
    query: str = ""
    """`{rebind_id}` stands for the rebind before."""
    key: str | None = None
    """Its Idempotency-Key."""
    after: tuple[str, ...] = ()
    """The kinds that are asked for first, and not measured."""
    command: tuple[str, ...] | None = None
    """What is measured instead of a request: a command of `flask`, or RECORDS."""
    floor: bool = False
    """Whether the same is measured as bare SQL."""
    requests: int = 1
    """How many are sent one after another in one run: a single one that takes a few ms is not a measurement."""


RECORDS = ("records",)  # of the rebind before, read in a process that has started already

_MOVED, _SALE = {"data": {"queue": MOVED}}, {"data": {"campaign": SALE}}
_OF_ONE_QUEUE = {"campaign": "spring-sale", "tenant": "tenant-1", "domain": "gmail.example"}
_BY_EVENT = {"trigger_rebind_event": True}
_UNDO, _LOGGED = "?undo={rebind_id}", ("metadata", "queue")

KINDS = {
    "constant": Kind("constant queue", _MOVED, floor=True),
    "campaign": Kind("campaign change", _SALE, floor=True),
    "keyed": Kind("campaign change, with a key", _SALE, key=RETRY_KEY, floor=True),
    "metadata": Kind("metadata only", {"data": {"note": "seen by support"}}, floor=True),
    "flush": Kind("flush", {"data": {}, "always_flush": True}, floor=True),
    "suppressed": Kind("suppressed log", _MOVED | {"suppress_logging": True}, floor=True),
    "dry": Kind("plan of a dry run", _SALE, query="?dry_run=true", floor=True),
    "queue": Kind("one queue of 200", _MOVED | _OF_ONE_QUEUE, floor=True),
    "none": Kind("no match", _MOVED | {"tenant": "nobody"}, floor=True, requests=50),
    "event": Kind("event", _MOVED | _BY_EVENT),
    "undo_campaign": Kind("undo of a campaign change", {"data": {}}, _UNDO, after=("campaign",)),
    "undo_metadata": Kind("undo of metadata only", {"data": {}}, _UNDO, after=("metadata",)),
    "undo_event": Kind("undo of an event", {"data": {}}, _UNDO, after=("event",)),
    "log": Kind("log from its start", after=_LOGGED, command=("log",)),
    "records": Kind("one rebind's records", after=_LOGGED, command=RECORDS),
    "prune": Kind("prune of all records", after=_LOGGED, command=("prune", "--before", "2100-01-01")),
    "messages": Kind("messages with content", command=("messages", "--content", "--limit", str(OF_COMMANDS))),
    "load": Kind("load", command=("load",)),
}
