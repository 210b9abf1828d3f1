"""The service's commands as programs, on a terminal too."""

import fcntl
import functools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flask.testing import FlaskCliRunner
from services import ROOT
from waiting import PATIENCE

from app import create_app

PROGRAM = [sys.executable, "-m", "flask"]
# The same, and at its end the most memory that it had, in KiB. (What a parent learns, ru_maxrss, is at least its own.)
MEASURED = """
import atexit, re, sys
from pathlib import Path
from flask.cli import main
atexit.register(lambda: sys.stderr.write(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
main()
"""
Flask = Callable[..., tuple[int, str, str]]
Command = Callable[..., subprocess.Popen[bytes]]


@functools.cache
def commands_for(url: str) -> FlaskCliRunner:
    """The application's commands. They use the database to which the registry is bound."""
    return create_app({"DATABASE_URL": url}).test_cli_runner()


def on_a_terminal(start_command: Command, *arguments: str | Path, columns: int, stdin: str = "") -> str:
    """What a command shows on a terminal of so many columns."""
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = start_command(*arguments, stdin=subprocess.PIPE, stdout=its_end, stderr=its_end)
    os.close(its_end)
    assert process.stdin
    process.stdin.write(stdin.encode())
    process.stdin.close()
    shown = b""
    with suppress(OSError):  # EIO: Linux's end of a terminal
        while True:
            shown += os.read(terminal, 4096)
    os.close(terminal)
    process.wait(PATIENCE)
    return shown.decode().replace("\r\n", "\n")


def peak(url: str, *arguments: str, **streams: Any) -> int:
    """The most memory that a command had, in KiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=ROOT,
        env=os.environ | {"REBIND_DATABASE_URL": url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
        timeout=120,
        **streams,
    )
    return int(done.stderr.splitlines()[-1])


def without_store(error: str) -> str:
    """What is on standard error, without the line that `load` and `prune` begin with."""
    return re.sub(r"\Arebind \S+, store: .*\n", "", error)
