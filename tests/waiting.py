"""How long the tests wait for something, and how."""

import time
from collections.abc import Callable

PATIENCE = 30  # seconds: what has not happened by then will not


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until the condition holds. Fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
