"""The policy of a rebind that takes as long as a test likes. See slow.py."""

import os
import time
from pathlib import Path

from event import rebind
from message import Message


@rebind.connect
def wait(message: Message, data: dict[str, str]) -> None:
    """Move each message, and wait at one of them until the test lets it go."""
    message.meta["queue"] = "b"
    if message.id == data["wait_at"]:
        folder = Path(data["folder"])
        (folder / str(os.getpid())).touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
