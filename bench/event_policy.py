"""The site's policy while the event is measured: its handler moves each message."""

from typing import Any

from event import rebind
from message import Message


@rebind.connect
def move(message: Message, data: dict[str, Any]) -> None:
    """Pin the message to the queue that `data` names."""
    message.meta["queue"] = data["queue"]
