"""Messages and rebinds: a test says what matters to it, and the rest is plausible."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from delivery import Claim, Outcome, recipient_list, settle
from event import Handler, rebind
from message import Message, NewMessage
from names import Criteria
from queues import QueueRegistry
from rebinding import RebindRequest, RebindResult

ODD_TEXT = "é€\U0001f600 \"\\/\t\x7f\u2028'%:@!"
numbers = itertools.count(1)
METAS: list[dict[str, Any]] = [
    {"é": []},
    {"campaign": "c", "n": {"a": [1, None, {}]}},
    {"tenant": "t", "n": None},
    {"queue": "pinned", "n": "x", "é": 1.5, 'q"\\': {}},
]


def message(recipient: str | list[str] = "ada@example.com", **fields: Any) -> NewMessage:
    """A message to load. What is not in `fields` is plausible, and its id is new."""
    plausible = {"id": f"m{next(numbers)}", "sender": "news@acme.example", "content": b"Hello", "due": 1e9}
    return NewMessage(**(plausible | {"recipient": recipient} | fields))  # type: ignore[arg-type]


def ask(
    queues: QueueRegistry,
    data: dict[str, str] | None = None,
    *,
    campaign: str | None = None,
    tenant: str | None = None,
    domain: str | None = None,
    routing_domain: str | None = None,
    **fields: Any,
) -> RebindResult:
    """Ask the registry for a rebind. The other fields are those of RebindRequest."""
    plausible = {"reason": "a test", "actor": "me", "criteria": Criteria(campaign, tenant, domain, routing_domain)}
    return queues.rebind(RebindRequest(data=data or {}, **(plausible | fields)))  # type: ignore[arg-type]


def counts(result: RebindResult) -> tuple[int, int, int]:
    """How many messages were matched, moved and flushed."""
    return result.matched, result.moved, result.flushed


def set_data(message: Message, data: dict[str, str]) -> None:
    """A handler that does what a rebind without the event does."""
    message.meta |= data


def undo(queues: QueueRegistry, first: RebindResult, **fields: Any) -> RebindResult:
    """Ask for the undo of a rebind."""
    return ask(queues, undo=first.rebind_id, **fields)


def settled(claim: Claim, type: Any, details: dict[str, Any], due: float | None = None) -> bool:
    """`settle` a claim with the same outcome for all recipients."""
    return settle(claim, [Outcome(type, recipient_list(claim), details)], due)


@contextmanager
def connected_to(*handlers: Handler) -> Iterator[None]:
    """These are the handlers of the event for a while."""
    before = [*rebind.handlers]
    rebind.handlers[:] = handlers
    try:
        yield
    finally:
        rebind.handlers[:] = before


def change_all(message: Message, data: dict[str, str]) -> None:
    """A handler that changes all that a handler may change: keys are added, removed and changed in their depth."""
    if "é" in message.meta:
        del message.meta["é"]
    if isinstance(message.meta.get("n"), dict):
        message.meta["n"]["a"][2]["deep"] = True
    else:
        message.meta["n"] = [1]
    message.meta |= {"campaign": "new", "added": None}
    message.sender, message.recipient = "", ["cyd@c.example", "ada@a.example"]
