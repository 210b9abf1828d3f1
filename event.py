"""The `rebind` event: its handlers, the site's policy file that connects them, and what they make of each message."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from runpy import run_path
from threading import current_thread, main_thread

from message import Changes, Message, changes, check_text, domain_of, read_message
from moving import MessageRow, Update
from names import queue_name
from rebinding import RebindRequest
from schemas import SettingError
from store import StoreRefused

Handler = Callable[..., object]


class NoHandler(Exception):
    """The `rebind` event was asked for, and no handler is connected."""


class HandlerFailed(Exception):
    """A handler of the `rebind` event raised, or left a message that cannot be stored."""


class RebindEvent:
    """The `rebind` event. `@rebind.connect` makes a function of a message and `data` one of its handlers."""

    def __init__(self) -> None:
        self.handlers: list[Handler] = []  # in the order in which they are called

    def connect(self, handler: Handler) -> Handler:
        """Call this handler too, after those that are connected already."""
        self.handlers.append(handler)
        return handler


rebind = RebindEvent()


def load_policy(path: str) -> None:
    """Run the site's Python file at `path`, which connects its handlers. Raises SettingError, with the reason."""
    try:
        run_path(path, run_name="rebind_policy")
    except (Exception, SystemExit) as error:
        raise SettingError(f"the policy {path} cannot be loaded: {type(error).__name__}: {error}") from error


class Decider:
    """Decides what becomes of each message, as the event's handlers do. Raises NoHandler."""

    def __init__(self, request: RebindRequest) -> None:
        if not rebind.handlers:
            raise NoHandler("no handler is connected to the rebind event")
        self._handlers, self._request = [*rebind.handlers], request
        self.pairs: Counter[tuple[str, str]] = Counter()  # messages of each pair of queues, the old and the new one

    def __call__(self, row: MessageRow) -> Update:
        """What becomes of one message. Raises HandlerFailed and StoreRefused."""
        try:
            message = read_message(row)
        except ValueError as error:
            raise StoreRefused(str(error)) from error
        sender, recipient, meta = call_handlers(self._handlers, message, row, self._request.data)
        domain = None if recipient is None else domain_of(message.recipient)
        queue = queue_name(message.meta, row.domain if domain is None else domain)
        try:
            check_text(queue)  # SQLite keeps what may be in metadata and not in a name
        except ValueError as error:
            raise StoreRefused(f"the message {row.id} cannot be stored: {error}") from error
        self.pairs[row.queue, queue] += 1
        is_due = self._request.always_flush or queue != row.queue
        return Update(row.id, sender, recipient, meta, domain, queue, is_due)


def call_handlers(handlers: Sequence[Handler], message: Message, row: MessageRow, data: Mapping[str, str]) -> Changes:
    """Let the handlers change the message, which is as its row is. Returns what they changed. Raises HandlerFailed."""
    changed: Changes = (None, None, None)
    meta_read = dict(message.meta)
    for handler in handlers:
        try:
            handler(message, data=dict(data))
            changed = changes(row, meta_read, message)
        except BaseException as error:  # whatever it is, the answer is a 500 and the worker lives on
            if isinstance(error, KeyboardInterrupt) and current_thread() is main_thread():
                raise  # the Ctrl-C that ends a command arrives there and nowhere else
            name = getattr(handler, "__qualname__", repr(handler))  # a functools.partial has none
            reason = f"{type(error).__name__}: {error}"
            raise HandlerFailed(f"the handler {name} failed for message {row.id}: {reason}") from error
    return changed
