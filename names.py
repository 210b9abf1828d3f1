"""The names of scheduled queues: parsed, built, and matched. docs/contract.md, "The name of a message's queue"."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import sqlalchemy as sa

from tables import messages

NAMING_KEYS = ("queue", "campaign", "tenant", "routing_domain")
DISCARDED = "null"  # the queue whose messages are discarded: docs/contract.md, "Delivery workers"


@dataclass(frozen=True)
class QueueName:
    """The components of a scheduled queue's name; None is a component that the name does not have."""

    campaign: str | None
    tenant: str | None
    domain: str
    routing_domain: str | None

    @classmethod
    @lru_cache(maxsize=10_000)  # with more queues than this, parsing is not faster, but still correct
    def parse(cls, name: str) -> Self:
        """Split a name into its components. Every string is a valid name."""
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

    @property
    def site(self) -> str:
        """The host that a worker delivers to, perhaps with a port. An empty routing domain names none."""
        return self.routing_domain or self.domain


def state_of(queue: str) -> Literal["hold", "discard"] | None:
    """What workers do with a queue instead of delivering its messages: docs/contract.md, "Delivery workers"."""
    if queue == DISCARDED:
        return "discard"
    site = QueueName.parse(queue).site
    host = site.rpartition(":")[0] or site
    # No host can have a name in `.invalid` (RFC 6761, section 6.4).
    return "hold" if host.lower().rpartition(".")[2] == "invalid" else None


@dataclass(frozen=True)
class Criteria:
    """Which messages to pick. docs/contract.md, "The request" and "Beyond the page"."""

    campaign: str | None = None
    tenant: str | None = None
    domain: str | None = None  # in any case
    routing_domain: str | None = None  # in any case
    queue: tuple[str, ...] = ()  # only queues of these names; empty is any
    id: tuple[str, ...] = ()  # only messages of these ids; empty is any

    def match(self, queue: str) -> bool:
        """Whether the queue of this name is picked."""
        name = QueueName.parse(queue)
        return (
            self.campaign in (None, name.campaign)
            and self.tenant in (None, name.tenant)
            and _is_domain(self.domain, name.domain)
            and _is_domain(self.routing_domain, name.routing_domain)
            and (not self.queue or queue in self.queue)
        )


EVERYTHING = Criteria()


def _is_domain(criterion: str | None, component: str | None) -> bool:
    return criterion is None or (component is not None and criterion.lower() == component.lower())


def queue_name(meta: Mapping[str, Any], domain: str) -> str:
    """The name of the queue of a message with this metadata, whose first recipient has this domain.

    A value that is not a string counts as not set; an empty string counts as set. `new_name` says the same in SQL.
    """

    def component(key: str) -> str | None:
        value = meta.get(key)
        return str.__str__(value) if isinstance(value, str) else None  # a handler may set an Enum of strings

    pinned, campaign, tenant, routing_domain = map(component, NAMING_KEYS)
    if pinned is not None:
        return pinned
    name = domain
    if campaign is not None:
        name = f"{campaign}:{tenant or ''}@{name}"
    elif tenant is not None:
        name = f"{tenant}@{name}"
    return name if routing_domain is None else f"{name}!{routing_domain}"


def new_name(
    meta_text: Callable[[str], sa.ColumnElement[str]], data: Mapping[str, str], unset: Collection[str]
) -> sa.ColumnElement[str]:
    """`queue_name` in SQL, for each message with `data` set and `unset` removed. meta_text: see moving.Backend."""

    def component(key: str) -> sa.ColumnElement[str]:
        if key in data:
            return sa.literal(data[key], sa.Text)
        return sa.cast(sa.null(), sa.Text) if key in unset else meta_text(key)

    if "queue" in data:
        return component("queue")
    campaign, tenant, routing_domain = component("campaign"), component("tenant"), component("routing_domain")
    # NULL || x is NULL, so coalesce picks the first prefix whose components are all set.
    prefix = sa.func.coalesce(campaign + ":" + sa.func.coalesce(tenant, "") + "@", tenant + "@", "", type_=sa.Text)
    name = prefix + messages.c.domain + sa.func.coalesce("!" + routing_domain, "", type_=sa.Text)
    return sa.func.coalesce(component("queue"), name, type_=sa.Text)
