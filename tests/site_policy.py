"""The policy of the gunicorns in the tests: what its handlers do is told by `data`."""

import os
import time
from pathlib import Path

from event import rebind
from message import Message


@rebind.connect
def obey(message: Message, data: dict[str, str]) -> None:
    """Do as `data` says."""
    if message.id == data.get("fail"):
        raise RuntimeError("as it was told")
    if "recipient" in data:
        message.recipient = data["recipient"]
    if "sender" in data:
        message.sender = data["sender"]
    if "queue" in data:
        message.meta["queue"] = data["queue"]
    if "mark" in data:
        message.meta[data["mark"]] = "by the event"


@rebind.connect
def sign(message: Message, data: dict[str, str]) -> None:
    """Leave a trace, of any JSON."""
    if "sign" in data:
        message.meta["signed"] = {"by": ["policy", data["sign"]], "times": 1}


@rebind.connect
def wait(message: Message, data: dict[str, str]) -> None:
    """Wait at one of the messages until the test lets it go. See slow.py."""
    if message.id == data.get("wait_at"):
        folder = Path(data["folder"])
        (folder / str(os.getpid())).touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
