"""The delivery log: its records, shown in the shape of KumoMTA's, and its pruning. docs/contract.md, "Records"."""

import math
import re
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import sqlalchemy as sa

from history import rebind_done, rfc3339
from message import from_json
from moving import BATCH, FIRST_ROWS, of_rebind, rows_to_read
from names import EVERYTHING, Criteria
from store import Database, StoreUnavailable
from tables import log, rebinds

PRUNED_AT_ONCE = 5000  # keys of the log per transaction
FEWER = 50  # if that fails, for example because the disk is full
MAX_ATTEMPTS = 65535  # that a reader of KumoMTA's records takes

# As the driver reads them: a document that Python cannot read must not hide other records.
_DOCUMENTS = ("meta", "new_meta", "details", "recipient", "new_recipient")
_SHOWN = [c for c in log.c if c.name not in ("domain", "due", "new_due")]
_COLUMNS = [sa.cast(c, sa.Text).label(c.name) if c.name in _DOCUMENTS else c for c in _SHOWN]
# SQLAlchemy's own rows take longer to be read than a record to be made of them.
_Row = namedtuple("_Row", [c.name for c in _SHOWN])  # type: ignore[misc]
_Rebind = namedtuple("_Rebind", rebinds.c.keys())  # type: ignore[misc]
# What a record says by its columns, and no `details` can change.
OWN_FIELDS = {*_Row._fields, "timestamp", "created_time", "reception_protocol", "actor"}
_time_of_rebind = sa.select(rebinds.c.event_time).where(rebinds.c.rebind_id == log.c.rebind_id).scalar_subquery()
_time = sa.func.coalesce(log.c.event_time, _time_of_rebind)


@dataclass(frozen=True)
class LogFilter:
    """Which records of the log to read; None is any."""

    type: str | None = None
    id: str | None = None  # the message's
    rebind_id: str | None = None
    since: float | None = None  # in seconds since 1970, inclusive
    until: float | None = None  # in seconds since 1970, exclusive
    criteria: Criteria = EVERYTHING  # of the queue that a record names, or of the one before a rebind

    def conditions(self, db: sa.Connection) -> Iterator[sa.ColumnElement[bool]]:
        """What is true of a record that is one of them. Raises UnknownRebind."""
        if self.type is not None:
            yield log.c.type == self.type
        if self.id is not None:
            yield log.c.id == self.id
        if self.rebind_id is not None:
            yield of_rebind(rebind_done(db, self.rebind_id))
        if self.since is not None:
            yield _time >= self.since
        if self.until is not None:
            yield _time < self.until

    def picks(self, row: Any) -> bool:
        """Whether the criteria match a row of the log."""
        before = row.queue if row.old_queue is None else row.old_queue
        return self.criteria.match(row.queue) or self.criteria.match(before)


EVERY_RECORD = LogFilter()


def records(
    database: Database, after: int | None = None, poll: float | None = None, wanted: LogFilter = EVERY_RECORD
) -> Iterator[dict[str, Any]]:
    """The delivery log's records, oldest first. Raises UnknownRebind, StoreUnusable and StoreUnavailable.

    after: only those with greater keys. poll: do not end, but look for new ones every so many seconds.
    With either, no record can come later that has a smaller key than one of these: it waits for those who are writing.
    """
    key, size, waits = after or 0, FIRST_ROWS, after is not None or poll is not None
    rebinds_read: dict[str, Any] = {}
    while True:
        before, last = key, _last_settled(database, key) if waits else None
        while page := _page(database, key, last, size, wanted, rebinds_read):
            yield from (_record(row, rebinds_read.get(row.rebind_id)) for row in page if wanted.picks(row))
            key, size = page[-1].key, rows_to_read(size, sum(len(row.meta) for row in page))
        if poll is None:
            return
        key = last or 0
        if key == before:
            time.sleep(poll)


def _last_settled(database: Database, after: int) -> int:
    """The last key of the log. When this returns, no transaction can commit a smaller one that is not there yet."""
    with database.autocommit() as db:
        last = db.scalar(sa.select(sa.func.max(log.c.key))) or 0
        writers = {*database.backend.writers_of_log(db)} if last > after else set()
        while writers & {*database.backend.writers_of_log(db)}:
            time.sleep(0.02)
    return last  # whoever took a smaller key has ended by now


def _page(
    database: Database, after: int, last: int | None, size: int, wanted: LogFilter, rebinds_read: dict[str, Any]
) -> list[Any]:
    """The next records, at most `size`, all as they were at one moment. Their rebinds are added to those read."""
    with database.begin_read() as db:
        page = sa.select(*_COLUMNS).where(log.c.key > after, *wanted.conditions(db)).order_by(log.c.key).limit(size)
        found = db.execute(page if last is None else page.where(log.c.key <= last))
        rows: list[Any] = list(map(_Row._make, found.cursor.fetchall()))
        if len(rebinds_read) > BATCH:
            rebinds_read.clear()
        if unread := {row.rebind_id for row in rows} - rebinds_read.keys() - {None}:
            found = db.execute(sa.select(rebinds).where(rebinds.c.rebind_id.in_(unread)))
            rebinds_read |= {row.rebind_id: _Rebind._make(row) for row in found}
    return rows


def _record(row: Any, rebind: Any) -> dict[str, Any]:
    """A row of the log as a record. A document that Python cannot read is shown as the text that it is."""
    meta = _meta(row, rebind)
    event_time = row.event_time if rebind is None else rebind.event_time
    recipient = row.recipient if row.new_recipient is None else row.new_recipient
    reception = meta.get("reception_protocol") if isinstance(meta, dict) else None
    said = f"Rebound from {row.old_queue} to {row.queue}: {rebind.reason}" if rebind else ""
    record = {
        "key": row.key,
        "type": row.type,
        "id": row.id,
        "sender": row.sender if row.new_sender is None else row.new_sender,
        "recipient": _document(recipient) if recipient.startswith("[") else recipient,
        "queue": row.queue,
        "site": "",
        "size": max(row.size, 0),
        "response": {"code": 250 if rebind else 0, "enhanced_code": None, "content": said, "command": None},
        "peer_address": None,
        "timestamp": math.floor(event_time or 0),
        "created": math.floor(row.created),
        "event_time": rfc3339(event_time or 0),
        "created_time": rfc3339(row.created),
        "num_attempts": min(max(row.num_attempts, 0), MAX_ATTEMPTS),
        "bounce_classification": "Uncategorized",
        "egress_pool": None,
        "egress_source": None,
        "source_address": None,
        "feedback_report": None,
        "delivery_protocol": None,
        "reception_protocol": reception if isinstance(reception, str) else None,
        "meta": meta,
        "headers": {},
        "nodeid": row.nodeid if rebind is None else rebind.nodeid,
        "rebind_id": row.rebind_id,
        "old_queue": row.old_queue,
        "actor": rebind.actor if rebind else None,
    }
    return record if row.details is None else record | _details(row.details)


def _meta(row: Any, rebind: Any) -> Any:
    """The metadata after what the record tells of."""
    if row.new_meta is not None:
        return _document(row.new_meta)
    meta = _document(row.meta)
    if rebind is None or rebind.request.get("trigger_rebind_event") or not isinstance(meta, dict):
        return meta
    for key in rebind.request["unset"]:
        meta.pop(key, None)
    return meta | rebind.request["data"]


def _document(text: str) -> Any:
    try:
        return from_json(text)
    except (ValueError, RecursionError):
        return text


def _details(text: str) -> dict[str, Any]:
    """What a worker says beside the record's own columns, if a reader of KumoMTA's records takes it."""
    details = _document(text)
    if not isinstance(details, dict):
        return {}
    if not _is_peer(details.get("peer_address")):
        details["peer_address"] = None
    return {name: value for name, value in details.items() if name not in OWN_FIELDS}


def _is_peer(value: Any) -> bool:
    """Whether KumoMTA takes it: a name, and an IP address, perhaps with a port, or the path of a socket."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("name", "addr")):
        return False
    addr = value["addr"]
    with_port = re.fullmatch(r"(?:\[([^]]*)\]|([^:]*)):(\d{1,5})", addr)
    with suppress(ValueError):
        host = addr if with_port is None or int(with_port[3]) > 65535 else with_port[1] or with_port[2]
        return "%" not in addr and bool(ip_address(host))
    return bool(addr.startswith("/"))


def response(code: int, content: str, command: str | None = None) -> dict[str, Any]:
    """A peer's answer, or ours, in one line. The enhanced status code (RFC 3463) of its lines is a field of its own."""
    enhanced = re.match(r"([245])\.(\d{1,3})\.(\d{1,3}) ", content)
    numbers = dict(zip(("class", "subject", "detail"), map(int, enhanced.groups()), strict=True)) if enhanced else None
    line = " ".join(each.removeprefix(enhanced[0] if enhanced else "") for each in content.split("\n"))
    return {"code": code, "enhanced_code": numbers, "content": line, "command": command}


def prune(database: Database, before: float, dry_run: bool = False) -> tuple[int, int]:
    """Remove the records and the history of before this time, in seconds since 1970: how many of each there were.

    dry_run: only count them. Many short transactions, with a pause after each, keep nobody waiting. A rebind leaves
    the history with the last of its records. Raises StoreUnavailable, which says what was removed before.
    """
    old, old_rebinds = _time < before, rebinds.c.event_time < before
    if dry_run:
        with database.autocommit() as db:
            records, history = (db.scalar(sa.select(sa.func.count()).where(each)) or 0 for each in (old, old_rebinds))
            return records, history
    forgotten = sa.delete(rebinds).where(old_rebinds, ~sa.select(log.c.key).where(of_rebind(rebinds.c)).exists())
    removed = rebinds_removed = done = 0
    at_once = PRUNED_AT_ONCE
    while (key := _next_key(database, done, old)) is not None:
        last = key + at_once - 1
        try:
            with database.begin_write() as db:
                start = time.monotonic()
                records = db.execute(sa.delete(log).where(log.c.key.between(key, last), old)).rowcount
                history = db.execute(forgotten.where(rebinds.c.first_key <= last)).rowcount
        except StoreUnavailable as error:
            if at_once == FEWER:
                error.in_full += f"; {removed} records and {rebinds_removed} rebinds were removed before"
                raise
            at_once = FEWER
            continue
        removed, rebinds_removed, done = removed + records, rebinds_removed + history, last
        time.sleep(time.monotonic() - start)  # SQLite has no queue of writers: whoever waits needs time to try
    with database.begin_write() as db:
        rebinds_removed += db.execute(forgotten).rowcount  # those without records
    return removed, rebinds_removed


def _next_key(database: Database, after: int, old: sa.ColumnElement[bool]) -> int | None:
    """The next key of a record to remove. A stretch of the log without one is only read."""
    with database.autocommit() as db:
        return db.scalar(sa.select(log.c.key).where(log.c.key > after, old).order_by(log.c.key).limit(1))
