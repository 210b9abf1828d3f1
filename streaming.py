"""Messages that stream through Python: what the event's handlers or an undo make of each of them.

The engines read and write them in batches; moving.Update is what they write.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import event
import history
from message import Changes, Message, changed_meta, domain_of, from_json, is_same, recipient_of, recipient_text, to_json
from moving import Row, Update
from names import queue_name
from rebinding import MAX_MOVES, Move, Plan, RebindRequest
from store import StoreRefused
from tables import MAX_NAME, TOO_LONG


class Stream:
    """Makes updates of a stream of messages, as the event's handlers or an undo decide, and counts them."""

    def __init__(
        self,
        request: RebindRequest,
        now: float,
        progress: Callable[[], None],
        change: Callable[[Message, Row], Changes],
    ) -> None:
        self._request, self._now, self._progress, self._change = request, now, progress, change
        self.matched = self.moved = 0
        self._moves: Counter[tuple[str, str]] = Counter()

    def __call__(self, rows: Iterable[Row]) -> Iterator[Update]:
        for row in rows:
            if self.matched == self._request.limit:
                return
            self._progress()
            update = self._update(row)
            if update is None:
                continue
            self.matched += 1
            self.moved += update.queue != update.old_queue
            if self._request.dry_run:
                self._moves[update.old_queue, update.queue] += 1
            yield update

    def _update(self, row: Row) -> Update | None:
        """What becomes of one message; None if an undo finds it as it was. Raises HandlerFailed and StoreRefused."""
        sender, recipient, meta, id, old_queue, _, _, due, _, domain, at = row[:11]
        before = read_message(row)
        changed = self._change(before, row)
        new_meta = before.meta
        if "data" in changed or "unset" in changed:
            new_meta = changed_meta(before.meta, changed)
            meta = to_json(new_meta)
        if "recipient" in changed:
            recipient = recipient_text(changed["recipient"])
            with suppress(ValueError):  # an undo may restore `Postmaster`, without a domain (RFC 5321, 4.5.1)
                domain = domain_of(changed["recipient"])
        envelope_stays = "sender" not in changed and "recipient" not in changed
        if self._request.undo and envelope_stays and is_same(new_meta, before.meta):
            return None
        queue = queue_name(new_meta, domain)
        try:
            size, _ = len(queue.encode()), f"{sender}{recipient}{domain}{meta}".encode()
        except UnicodeEncodeError as error:  # SQLite kept it
            raise StoreRefused(f"the message {id} cannot be stored: it contains a lone surrogate") from error
        if size > MAX_NAME:  # the table refuses it too, but not in a dry run
            raise StoreRefused(TOO_LONG)
        if self._request.always_flush or queue != old_queue:
            due = self._now
        return Update(changed.get("sender", sender), recipient, domain, meta, queue, due, at, changed, old_queue)

    def plan(self) -> Plan:
        """What was seen."""
        largest = sorted(self._moves.items(), key=lambda move: (-move[1], move[0]))
        moves = [Move(*queues, number) for queues, number in largest[:MAX_MOVES]]
        return Plan(self.matched, self.moved, moves, len(largest) - len(moves))


def handled(handlers: list[event.Handler], data: dict[str, str], before: Message, row: Row) -> Changes:
    """What the event's handlers change. Raises HandlerFailed."""
    return event.call_handlers(handlers, before, read_message(row), data)


def restored(shared: Changes, before: Message, row: Row) -> Changes:
    """What an undo changes. Raises StoreRefused if Python cannot read what the message was."""
    try:
        return history.restored(before, row[11:], shared)
    except (ValueError, RecursionError) as error:
        raise StoreRefused(f"message {before.id} cannot get back what it had: {error}") from error


def read_message(row: Row) -> Message:
    """The message of a row of MESSAGE_COLUMNS. Raises StoreRefused if Python cannot read it."""
    sender, recipient, text, id, *fields = row[:9]
    try:
        return Message(sender, recipient_of(recipient), from_json(text), id, *fields)
    except (ValueError, RecursionError) as error:
        raise StoreRefused(f"the message {id} cannot be read: {error}") from error
