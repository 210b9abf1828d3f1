"""The delivery log's records, in the shape of KumoMTA's, so that what reads those reads these. SPEC.md, "Records"."""

import platform
import re
import uuid
from datetime import UTC, datetime
from typing import Any

# One a host, and the same as long as the host keeps its name.
NODEID = str(uuid.uuid5(uuid.NAMESPACE_DNS, platform.node()))

LAST_SECOND = 253402300799  # of the year 9999, the last that RFC 3339 can tell


def record(row: Any) -> dict[str, Any]:
    """The record of a row of the table `log`."""
    return {
        "type": row.type,
        "id": row.id,
        "sender": row.sender,
        "recipient": row.recipient,
        "queue": row.queue,
        "site": "",
        "size": row.size,
        "response": response(250, f"Rebound from {row.old_queue} to {row.queue}: {row.reason}"),
        "peer_address": None,
        "timestamp": int(row.event_time),
        "created": int(row.created),
        "event_time": _rfc3339(row.event_time),
        "created_time": _rfc3339(row.created),
        "num_attempts": row.num_attempts,
        "bounce_classification": "Uncategorized",
        "egress_pool": None,
        "egress_source": None,
        "source_address": None,
        "feedback_report": None,
        "delivery_protocol": None,
        "reception_protocol": row.meta.get("reception_protocol"),
        "meta": row.meta,
        "headers": {},
        "nodeid": row.nodeid,
        "rebind_id": row.rebind_id,
        "old_queue": row.old_queue,
        "actor": row.actor,
    } | (row.details or {})


def response(code: int, content: str, command: str | None = None) -> dict[str, Any]:
    """A peer's answer, or ours. An enhanced status code (RFC 3463) that the text starts with is told apart."""
    enhanced = re.match(r"([245])\.(\d{1,3})\.(\d{1,3}) ", content)
    if not enhanced:
        return {"code": code, "enhanced_code": None, "content": content, "command": command}
    numbers = dict(zip(("class", "subject", "detail"), map(int, enhanced.groups()), strict=True))
    return {"code": code, "enhanced_code": numbers, "content": content[enhanced.end() :], "command": command}


def _rfc3339(seconds: float) -> str:
    # A sender's error, such as milliseconds, must not keep the rest from being read.
    seconds = min(max(seconds, 0), LAST_SECOND)
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
