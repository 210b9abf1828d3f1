"""The values that travel: what is asked for, what came of it, and the plan of a dry run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from message import to_json
from names import EVERYTHING, Criteria

MAX_MOVES = 100  # entries of a plan
MAX_SHOWN = 200  # characters of a value in the diagnostic log


@dataclass(frozen=True)
class RebindRequest:
    """What is asked for: which messages to rebind, and how. docs/contract.md, "The request" and "Beyond the page"."""

    reason: str  # logged with every matched message
    data: dict[str, str]  # the metadata to set, or what the event's handlers get
    criteria: Criteria = EVERYTHING  # which messages
    trigger_rebind_event: bool = False  # call the event with each message and `data`, instead of setting `data`
    always_flush: bool = False  # make every matched message due now, not only those whose queue changed
    suppress_logging: bool = False  # write no AdminRebind records
    dry_run: bool = False  # only plan: change, record and keep nothing; the event's handlers are called
    limit: int | None = None  # handle at most this many messages, soonest due first
    unset: tuple[str, ...] = ()  # keys to remove from the metadata
    undo: str | None = None  # the id of a rebind to take back
    idempotency_key: str | None = None  # a request that comes again with it only gets the same answer
    actor: str = ""  # who asks: a user's name, or an address

    def asked(self) -> dict[str, Any]:
        """All that was asked, as the history keeps it; what was left out is missing."""
        fields = vars(self) | vars(self.criteria)
        for name in ("criteria", "actor", "idempotency_key", "dry_run"):
            del fields[name]
        return {
            name: sorted(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name == "unset" or value not in (None, False, ())
        }


class Move(NamedTuple):
    """An entry of a plan: how many messages would go from one queue to another."""

    source: str
    to: str
    messages: int


@dataclass(frozen=True)
class Plan:
    """What a rebind does to messages, or with a dry run would do."""

    matched: int
    moved: int  # how many of them change their queue
    moves: list[Move]  # from which queue to which other one, the largest first, at most MAX_MOVES
    more: int  # how many entries were left out

    @classmethod
    def of(cls, pairs: Mapping[tuple[str, str], int]) -> Self:
        """The plan for so many messages of each pair of queues: where they are, and where they will be."""
        moves = [Move(*queues, number) for queues, number in pairs.items() if queues[0] != queues[1]]
        moves.sort(key=lambda move: (-move.messages, move.source, move.to))
        moved = sum(move.messages for move in moves)
        return cls(sum(pairs.values()), moved, moves[:MAX_MOVES], len(moves[MAX_MOVES:]))


@dataclass(frozen=True)
class RebindResult:
    """What a rebind did, or with a dry run would do."""

    matched: int  # how many messages were handled
    moved: int  # how many of them are in another queue now
    flushed: int  # how many of them were made due now
    left: int | None = None  # of an undo: how many messages that the first rebind changed are left alone
    rebind_id: str | None = None  # A UUID, on every record and in the history; None for a dry run
    plan: Plan | None = None  # of a dry run: from which queue to which queue how many would go

    def in_a_line(self) -> str:
        """For the diagnostic log."""
        left = "" if self.left is None else f", {self.left} left alone"
        return f"{self.matched} matched, {self.moved} moved, {self.flushed} flushed{left}"


def in_a_line(request: RebindRequest) -> str:
    """Who asks, and for what, for the diagnostic log: long values are cut, and nothing can break the line."""
    values = {"actor": request.actor, **request.asked(), "idempotency_key": request.idempotency_key}
    return " ".join(f"{name}={_short(value)}" for name, value in values.items() if value not in (None, []))


def _short(value: Any) -> str:
    text = printable(to_json(value)[: MAX_SHOWN + 1])  # it may be 100,000 ids
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def printable(text: str) -> str:
    """The text with line breaks and terminal control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
