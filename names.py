"""The names of scheduled queues: built from a message's metadata and recipient, and read back.

SPEC.md, "The name of a message's queue". `queue_name` says it in Python and `new_name` in SQL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

from sqlalchemy import ColumnElement, Text, func, literal

from sqlfunctions import meta_text
from store import messages


@dataclass(frozen=True)
class QueueName:
    """The parts of a scheduled queue's name; None is a part that is not there.

    SPEC.md, "The name of a message's queue".
    """

    campaign: str | None
    tenant: str | None
    domain: str
    routing_domain: str | None

    @classmethod
    @lru_cache(maxsize=10_000)  # where there are more queues, none of them is read any faster
    def parse(cls, name: str) -> Self:
        """Read a name, whatever made it: every string is one."""
        before, at, after = name.partition("@")
        if not at:
            before, after = "", name
        campaign, colon, tenant = before.partition(":")
        domain, bang, routing_domain = after.partition("!")
        return cls(
            campaign=campaign if colon else None,
            tenant=tenant if colon else before if at else None,
            domain=domain,
            routing_domain=routing_domain if bang else None,
        )

    def __str__(self) -> str:
        name = self.domain
        if self.campaign is not None:
            name = f"{self.campaign}:{self.tenant or ''}@{name}"
        elif self.tenant is not None:
            name = f"{self.tenant}@{name}"
        return name if self.routing_domain is None else f"{name}!{self.routing_domain}"


def queue_name(meta: Mapping[str, Any], domain: str) -> str:
    """The name of the queue of a message with this metadata and recipient's domain.

    A value that is no string counts as not set; an empty string is set. `new_name` says the same in SQL.
    """

    def part(key: str) -> str | None:
        value = meta.get(key)
        return value if isinstance(value, str) else None

    pinned = part("queue")
    if pinned is not None:
        return pinned
    return str(QueueName(part("campaign"), part("tenant"), domain, part("routing_domain")))


def named_by_parts(data: Mapping[str, str]) -> bool:
    """Whether `data` sets a part that names are built from, so that most messages have another name with it."""
    return "queue" not in data and not data.keys().isdisjoint(("campaign", "tenant", "routing_domain"))


def new_name(data: Mapping[str, str]) -> ColumnElement[str]:
    """`queue_name` in SQL, of each message with `data` set over its metadata."""

    def part(key: str) -> ColumnElement[str]:
        return literal(data[key], Text) if key in data else meta_text(messages.c.meta, key)

    if "queue" in data:
        return part("queue")
    campaign, tenant, routing_domain = part("campaign"), part("tenant"), part("routing_domain")
    # What is joined to a NULL is NULL: the first of these that is not names those who send.
    before = func.coalesce(campaign + ":" + func.coalesce(tenant, "") + "@", tenant + "@", "")
    built = before + messages.c.domain + func.coalesce("!" + routing_domain, "")
    return func.coalesce(part("queue"), built, type_=Text)
