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
    beside: float = 0
    """How many times as fast as at commit 34cd0cd it should be; 0 if it is not measured beside an older commit."""
    requests: int = 1
    """How many are sent one after another in one run: a single one that takes a few ms is not a measurement."""


RECORDS = ("records",)  # of the rebind before, read in a process that has started already

_MOVED, _SALE = {"data": {"queue": MOVED}}, {"data": {"campaign": SALE}}
_OF_ONE_QUEUE = {"campaign": "spring-sale", "tenant": "tenant-1", "domain": "gmail.example"}
_BY_EVENT = {"trigger_rebind_event": True}
_UNDO, _LOGGED = "?undo={rebind_id}", ("metadata", "queue")
_COMMAND = ("rebind", "--reason", REASON, "--set", f"queue={MOVED}")
_PRINT = ("messages", "--limit", str(OF_COMMANDS))

KINDS = {
    "constant": Kind("all messages into one queue", _MOVED, floor=True, beside=1),
    "campaign": Kind("all messages to another campaign", _SALE, floor=True, beside=1),
    "keyed": Kind("the same, with an `Idempotency-Key`", _SALE, key=RETRY_KEY, floor=True),
    "metadata": Kind("other metadata only, nothing moves", {"data": {"note": "seen by support"}}, floor=True, beside=1),
    "flush": Kind("flush of all messages", {"data": {}, "always_flush": True}, floor=True),
    "suppressed": Kind("into one queue, no records", _MOVED | {"suppress_logging": True}, floor=True),
    "undo_campaign": Kind("undo of the change of campaign", {"data": {}}, _UNDO, after=("campaign",), beside=1),
    "undo_metadata": Kind("undo of other metadata", {"data": {}}, _UNDO, after=("metadata",), beside=1),
    "event": Kind("into one queue, by the event", _MOVED | _BY_EVENT, beside=1.5),
    "undo_event": Kind("undo of the event", {"data": {}}, _UNDO, after=("event",), beside=1),
    "dry": Kind("plan of another campaign", _SALE, query="?dry_run=true", floor=True),
    "queue": Kind("one queue of 200", _MOVED | _OF_ONE_QUEUE, floor=True, beside=1),
    "by_name": Kind("the same, by its name", _MOVED, query=f"?queue={ONE_QUEUE}"),
    "none": Kind("no queue matches", _MOVED | {"tenant": "nobody"}, floor=True, requests=50),
    "none_by_name": Kind("the same, by a name", _MOVED, query="?queue=nobody.example", requests=50),
    "everything": Kind("`flask rebind --everything`", command=(*_COMMAND, "--everything")),
    "by_id": Kind("`flask rebind --id -`, every message", command=(*_COMMAND, "--id", "-")),
    "log": Kind("`flask log` from its start", after=_LOGGED, command=("log",), beside=2),
    "records": Kind("one rebind's records", after=_LOGGED, command=RECORDS),
    "prune": Kind("`flask prune` of all records", after=_LOGGED, command=("prune", "--before", "2100-01-01")),
    "messages": Kind("`flask messages`", command=_PRINT, beside=3),
    "content": Kind("`flask messages --content`", command=(*_PRINT, "--content"), beside=3),
    "load": Kind("`flask load` of as many messages", command=("load",), beside=3),
}
