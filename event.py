"""The `rebind` event: the signal, the site's policy file, and what handlers make of a message.

docs/contract.md, "What one request does".
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from blinker import ANY, Signal

from message import Changes, Message, changes, domain_of

Handler = Callable[..., object]


class NoHandler(Exception):
    """The `rebind` event was asked for, and no handler is connected."""


class HandlerFailed(Exception):
    """A handler of the `rebind` event raised, or left a message that cannot be stored."""


class PolicyError(Exception):
    """The policy cannot be loaded."""


class _Ordered(dict[Any, None]):
    """A set that keeps the order of its members, for blinker's `set_class`."""

    def add(self, member: Any) -> None:
        self.setdefault(member)

    def discard(self, member: Any) -> None:
        self.pop(member, None)


class RebindEvent(Signal):
    """The `rebind` event: `@rebind.connect` a function of a message and `data`.

    Handlers are called in the order in which they were connected. blinker holds them weakly: connect a function that
    nothing else holds with `weak=False`.
    """

    set_class = _Ordered  # type: ignore[assignment]

    def handlers(self) -> list[Handler]:
        """The connected handlers, in that order."""
        return list(self.receivers_for(ANY))


rebind = RebindEvent()


def connected() -> list[Handler]:
    """The handlers of the `rebind` event, which stay as long as the list does. Raises NoHandler."""
    if handlers := rebind.handlers():
        return handlers
    raise NoHandler("no handler is connected to the rebind event")


def load_policy(path: str) -> None:
    """Run the site's Python file at `path`, which connects its handlers, and keep it, since handlers are held weakly.

    Raises PolicyError, with the file and the reason.
    """
    spec = spec_from_file_location("rebind_policy", Path(path).absolute())
    if spec is None or spec.loader is None:
        raise PolicyError(f"the policy {path} is not a Python file (*.py)")
    module = module_from_spec(spec)
    sys.modules["rebind_policy"] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise PolicyError(f"the policy {path} cannot be loaded: {type(error).__name__}: {error}") from error


def call_handlers(handlers: Sequence[Handler], before: Message, message: Message, data: Mapping[str, str]) -> Changes:
    """Let the handlers change `message`, which starts equal to `before`. Returns what they changed.

    Raises HandlerFailed.
    """
    changed = Changes()
    for handler in handlers:
        try:
            handler(message, data=dict(data))
            changed = changes(before, message)
            if "recipient" in changed:
                domain_of(message.recipient)
        except BaseException as error:  # whatever it is, the answer is a 500 and the worker lives on
            if isinstance(error, KeyboardInterrupt) and current_thread() is main_thread():
                raise  # the Ctrl-C that ends a command arrives there and nowhere else
            raise HandlerFailed(
                f"the handler {_name_of(handler)} failed for message {before.id}: {type(error).__name__}: {error}"
            ) from error
    return changed


def _name_of(handler: Handler) -> str:
    # Not every callable has a name: a functools.partial has none.
    return f"{handler.__module__}.{handler.__qualname__}" if hasattr(handler, "__qualname__") else repr(handler)
