"""The delivery log: its records, shown in the shape of KumoMTA's so that the same tools read both, and its pruning.

docs/contract.md, "Records". A record keeps what its message was before the rebind. What the message became follows from
that and what the rebind changed, and is computed when the record is read.
"""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, RowMapping, Text, and_, cast, delete, func, select, true, type_coerce

from history import UnknownRebind, rfc3339, shared_changes
from message import Changes, changed_meta, from_json
from moving import FIRST_ROWS, of_rebind, rows_to_read
from store import Database
from tables import log, rebinds

PRUNED_AT_ONCE = 5000  # keys of the log per transaction
MAX_ATTEMPTS = 65535  # that a reader of KumoMTA's records takes
OWN_FIELDS = {
    *("key", "type", "id", "sender", "recipient", "queue", "size", "timestamp", "created", "event_time"),
    *("created_time", "num_attempts", "reception_protocol", "meta", "nodeid", "rebind_id", "old_queue", "actor"),
}
"""What a record says by its columns, and no `details` can change."""

_COLUMNS: list[ColumnElement[Any]] = [
    type_coerce(log.c.recipient, Text).label("recipient"),
    cast(log.c.meta, Text).label("meta"),
]
_COLUMNS += [cast(log.c[name], Text).label(name) for name in ("changes", "details")]
_COLUMNS += [column for column in log.c if column.name not in ("recipient", "meta", "changes", "details")]


@dataclass(frozen=True)
class LogFilter:
    """Which records of the log to read; None is any."""

    type: str | None = None
    id: str | None = None
    """The message's."""
    rebind_id: str | None = None
    since: float | None = None
    """In seconds since 1970, inclusive."""
    until: float | None = None
    """In seconds since 1970, exclusive."""

    def condition(self, db: Connection) -> ColumnElement[bool]:
        """Whether a record is one of them. Raises UnknownRebind."""
        time_of = func.coalesce(log.c.event_time, _time_of_rebind)
        found: list[ColumnElement[bool]] = [true()]
        found += [] if self.type is None else [log.c.type == self.type]
        found += [] if self.id is None else [log.c.id == self.id]
        found += [] if self.rebind_id is None else [of_rebind(*_ends(db, self.rebind_id))]
        found += [] if self.since is None else [time_of >= self.since]
        found += [] if self.until is None else [time_of < self.until]
        return and_(*found)


_time_of_rebind = select(rebinds.c.event_time).where(rebinds.c.rebind_id == log.c.rebind_id).scalar_subquery()
EVERY_RECORD = LogFilter()


def _ends(db: Connection, rebind_id: str) -> tuple[str, int, int]:
    """A rebind's id, and between which keys of the log its records lie. Raises UnknownRebind."""
    ends = select(rebinds.c.rebind_id, rebinds.c.first_key, rebinds.c.last_key).where(rebinds.c.rebind_id == rebind_id)
    if (found := db.execute(ends).one_or_none()) is None:
        raise UnknownRebind(f"the history has no rebind {rebind_id}")
    first_key, last_key = found[1:]
    return rebind_id, first_key, last_key


def records(
    database: Database, after: int = 0, poll: float | None = None, wanted: LogFilter = EVERY_RECORD
) -> Iterator[dict[str, Any]]:
    """The delivery log's records with keys greater than `after`, oldest first. docs/contract.md, "Records".

    poll: do not end, but look for new ones every so many seconds; each comes once, whatever order transactions
        commit in.
    Raises UnknownRebind and StoreUnavailable.
    """
    size = FIRST_ROWS
    while True:
        with database.autocommit() as db:
            rows = _page(database, db, after, size, wanted, follow=poll is not None)
            ids = {row["rebind_id"] for row in rows}
            of_rebinds = db.execute(select(rebinds).where(rebinds.c.rebind_id.in_(ids))).mappings()
            known = {row["rebind_id"]: row for row in of_rebinds}
        for row in rows:
            yield _record(row, known.get(row["rebind_id"]))
        if rows:
            after, size = rows[-1]["key"], rows_to_read(size, sum(len(row["meta"]) for row in rows))
        elif poll is None:
            return
        else:
            time.sleep(poll)


def _page(
    database: Database, db: Connection, after: int, size: int, wanted: LogFilter, follow: bool
) -> list[RowMapping]:
    """The next records, at most `size`. With `follow`, none with a smaller key can come later than these."""
    page = select(*_COLUMNS).where(log.c.key > after, wanted.condition(db)).order_by(log.c.key).limit(size)
    rows = list(db.execute(page).mappings())
    if not (follow and rows):
        return rows
    writers = database.engine.writers_of_log(db)
    while writers & database.engine.writers_of_log(db):
        time.sleep(0.02)
    # Whoever took a smaller key than the last one has ended by now.
    return list(db.execute(page.where(log.c.key <= rows[-1]["key"])).mappings())


def _record(row: RowMapping, rebind: RowMapping | None) -> dict[str, Any]:
    """A row of the log as a record. A document that Python cannot read is shown as the text that it is."""
    changed = _changed(row["changes"], rebind)
    recipient, meta = changed.get("recipient", row["recipient"]), _document(row["meta"])
    if isinstance(meta, dict):
        meta = changed_meta(meta, changed)
    event_time = row["event_time"] if rebind is None else rebind["event_time"]
    reception = meta.get("reception_protocol") if isinstance(meta, dict) else None
    content = f"Rebound from {row['old_queue']} to {row['queue']}: {rebind['reason'] if rebind else ''}"
    return {
        "key": row["key"],
        "type": row["type"],
        "id": row["id"],
        "sender": changed.get("sender", row["sender"]),
        "recipient": _recipient(recipient) if isinstance(recipient, str) else recipient,
        "queue": row["queue"],
        "site": "",
        "size": max(row["size"], 0),
        "response": response(250, content),
        "peer_address": None,
        "timestamp": math.floor(event_time or 0),
        "created": math.floor(row["created"]),
        "event_time": rfc3339(event_time or 0),
        "created_time": rfc3339(row["created"]),
        "num_attempts": min(max(row["num_attempts"], 0), MAX_ATTEMPTS),
        "bounce_classification": "Uncategorized",
        "egress_pool": None,
        "egress_source": None,
        "source_address": None,
        "feedback_report": None,
        "delivery_protocol": None,
        "reception_protocol": reception if isinstance(reception, str) else None,
        "meta": meta,
        "headers": {},
        "nodeid": row["nodeid"] if rebind is None else rebind["nodeid"],
        "rebind_id": row["rebind_id"],
        "old_queue": row["old_queue"],
        "actor": rebind["actor"] if rebind else None,
    } | _details(row["details"])


def _changed(own: str | None, rebind: RowMapping | None) -> Changes:
    """What the record's rebind changed of its message."""
    if own is None:
        return shared_changes(rebind["request"]) if rebind else Changes()
    changed = _document(own)
    return changed if isinstance(changed, dict) else Changes()  # type: ignore[return-value]


def _document(text: str | None) -> Any:
    try:
        return None if text is None else from_json(text)
    except (ValueError, RecursionError):
        return text


def _details(text: str | None) -> dict[str, Any]:
    """What a worker says beside the record's own columns, if a reader of KumoMTA's records takes it."""
    details = _document(text)
    if not isinstance(details, dict):
        return {}
    try:
        ip_address(str(details.get("peer_address", {})["addr"]))
    except (TypeError, KeyError, ValueError):
        details["peer_address"] = None
    return {name: value for name, value in details.items() if name not in OWN_FIELDS}


def _recipient(text: str) -> Any:
    return _document(text) if text.startswith("[") else text


def response(code: int, content: str, command: str | None = None) -> dict[str, Any]:
    """A peer's answer, or ours. An enhanced status code (RFC 3463) at the start of the text is a field of its own."""
    enhanced = re.match(r"([245])\.(\d{1,3})\.(\d{1,3}) ", content)
    if not enhanced:
        return {"code": code, "enhanced_code": None, "content": content, "command": command}
    numbers = dict(zip(("class", "subject", "detail"), map(int, enhanced.groups()), strict=True))
    return {"code": code, "enhanced_code": numbers, "content": content[enhanced.end() :], "command": command}


# Pruning


class Pruned(NamedTuple):
    """How much was removed."""

    records: int
    rebinds: int


def prune(database: Database, before: float, dry_run: bool = False) -> Pruned:
    """Remove the records and the history of before this time, in seconds since 1970.

    It takes many short transactions, and pauses after each as long as it took, so that nobody waits. Undo and `--after`
    go on to work for what is left.
    dry_run: only count.
    Raises StoreUnavailable.
    """
    old = func.coalesce(log.c.event_time, _time_of_rebind) < before
    old_rebinds = rebinds.c.event_time < before
    with database.autocommit() as db:
        if dry_run:
            return Pruned(*(db.scalar(select(func.count()).where(where)) or 0 for where in (old, old_rebinds)))
    removed = done = 0
    while (key := _next_key(database, done, old)) is not None:
        done = key + PRUNED_AT_ONCE - 1
        with database.begin_write() as db:
            start = time.monotonic()
            removed += db.execute(delete(log).where(log.c.key.between(key, done), old)).rowcount
        time.sleep(time.monotonic() - start)  # SQLite has no queue of writers: whoever waits needs time to try
    # The history goes last: until then its rows tell the time of records.
    with database.begin_write() as db:
        return Pruned(removed, db.execute(delete(rebinds).where(old_rebinds)).rowcount)


def _next_key(database: Database, after: int, old: ColumnElement[bool]) -> int | None:
    """The next key of a record to remove. A stretch of the log without one is only read."""
    with database.autocommit() as db:
        return db.scalar(select(log.c.key).where(log.c.key > after, old).order_by(log.c.key).limit(1))
