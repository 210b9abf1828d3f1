"""Messages and rebinds: a test says what matters to it, and the rest is plausible."""

import itertools
from typing import Any

from message import Message, NewMessage
from names import Criteria
from queues import QueueRegistry
from rebinding import RebindRequest, RebindResult

ODD_TEXT = "é€\U0001f600 \"\\/\t\x7f\u2028'%:@!"
numbers = itertools.count(1)


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
