"""The kinds of rebind that are measured: what is asked of the service, and what its bare SQL has to do."""

from dataclasses import dataclass
from typing import Any

REASON = "wrong campaign"
ONE_QUEUE = "spring-sale:tenant-1@gmail.example"


@dataclass(frozen=True)
class Kind:
    """A rebind."""

    title: str
    data: dict[str, str]
    criteria: dict[str, str]
    options: dict[str, bool]
    query: str = ""
    requests: int = 1
    """How many are sent one after another in one run: one alone that takes a few ms is no measurement."""

    @property
    def body(self) -> dict[str, Any]:
        """The request's body."""
        return {"reason": REASON, "data": self.data} | self.criteria | self.options


_MOVED, _SALE = {"queue": "moved.example"}, {"campaign": "summer-sale"}
_OF_ONE_QUEUE = {"campaign": "spring-sale", "tenant": "tenant-1", "domain": "gmail.example"}

KINDS = {
    "constant": Kind("constant queue", _MOVED, {}, {}),
    "campaign": Kind("campaign change", _SALE, {}, {}),
    "metadata": Kind("metadata only", {"note": "seen by support"}, {}, {}),
    "flush": Kind("flush", {}, {}, {"always_flush": True}),
    "suppressed": Kind("suppressed log", _MOVED, {}, {"suppress_logging": True}),
    "dry": Kind("dry run", _SALE, {}, {}, query="?dry_run=true"),
    "queue": Kind("one queue of 200", _MOVED, _OF_ONE_QUEUE, {}),
    "none": Kind("no match", _MOVED, {"tenant": "nobody"}, {}, requests=50),
    "event": Kind("event", _MOVED, {}, {"trigger_rebind_event": True}),
}
