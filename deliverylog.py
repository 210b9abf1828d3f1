"""The delivery log's records, in the shape of KumoMTA's, so that what reads those reads these. SPEC.md, "Records"."""

import platform
import uuid
from datetime import UTC, datetime
from typing import Any

# One a host, and the same as long as the host keeps its name.
NODEID = str(uuid.uuid5(uuid.NAMESPACE_DNS, platform.node()))


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
        "response": {
            "code": 250,
            "enhanced_code": None,
            "content": f"Rebound from {row.old_queue} to {row.queue}: {row.reason}",
            "command": None,
        },
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
    }


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
