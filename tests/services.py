"""Real gunicorns: start one, ask it, and stop it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from answers import Answer
from requests.adapters import HTTPAdapter
from waiting import until

ROOT = Path(__file__).parent.parent
PATH = "/api/admin/rebind/v1"
SITE_POLICY = str(ROOT / "tests" / "site_policy.py")
MIB = 1024 * 1024
GUNICORN = [sys.executable, "-m", "gunicorn", "--workers", "2", "--bind"]
bound_sockets: list[socket.socket] = []


class From(HTTPAdapter):
    """Mounted in a session of requests, it asks from an address of one's choice: all of 127.0.0.0/8 is this host's."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, source_address=(self.address, 0), **options)


@dataclass
class Service:
    """A running gunicorn, and how to ask it."""

    base: str
    process: subprocess.Popen[bytes]
    output: Path
    """The file that gunicorn and the application write to."""

    def rebind(self, query: str = "", **body: Any) -> requests.Response:
        """POST a rebind with `body`; `reason` and `data` have defaults."""
        return requests.post(f"{self.base}{PATH}{query}", json={"reason": "a test", "data": {}} | body, timeout=60)

    def post(self, body: bytes, content_type: str = "application/json") -> requests.Response:
        """POST any bytes."""
        return requests.post(self.base + PATH, data=body, headers={"Content-Type": content_type}, timeout=60)

    def send(self, *lines: str, body: bytes = b"") -> Answer:
        """Send a request as it stands, for what no client library would send; then say that nothing more will come."""
        head = "\r\n".join([*lines, "Host: localhost", "Connection: close", "", ""])
        with socket.create_connection(self.address, timeout=60) as connection:
            connection.sendall(head.encode() + body)
            connection.shutdown(socket.SHUT_WR)
            return Answer.read(connection)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.base.removeprefix("http://").split(":")
        return host, int(port)

    def listens_or_ended(self) -> bool:
        """Whether there is nothing more to wait for: this gunicorn listens, or has ended."""
        return self.process.poll() is not None or _listens(self.address)


def start_service(folder: Path, url: str, *arguments: str, **settings: str) -> Service:
    """A gunicorn with two workers on a free port, and on a unix socket in the folder; `stop_service` ends it."""
    service = launch(folder, url, *arguments, **settings)
    until(service.listens_or_ended)
    return service


def launch(folder: Path, url: str, *arguments: str, **settings: str) -> Service:
    """A gunicorn that may not have started yet, or never will."""
    port = free_port()
    environment = os.environ | {"REBIND_DATABASE_URL": url} | settings
    command = [*GUNICORN, f"unix:{folder / 'socket'}", "--bind", f"127.0.0.1:{port}", *arguments, "wsgi:app"]
    output = folder / "gunicorn.log"
    with output.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    return Service(f"http://127.0.0.1:{port}", process, output)


def stop_service(service: Service) -> None:
    """End a gunicorn at once. Whatever happens, it does not outlive the tests."""
    service.process.send_signal(signal.SIGINT)
    try:
        service.process.wait(60)
    except subprocess.TimeoutExpired:
        service.process.kill()
        raise


def free_port() -> int:
    """A port of loopback that nobody listens at.

    It stays bound until the tests end, so that no other process gets it meanwhile. A server that sets SO_REUSEADDR, as
    all of ours do, may listen at it nevertheless.
    """
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    bound_sockets.append(bound)
    return int(bound.getsockname()[1])


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def installed(program: str, as_root: bool = False) -> str:
    """The path of a program. Without it, or without root if it needs that, the test is skipped or, in CI, fails."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if os.environ.get("CI"):
        assert found, f"{program} is not installed"
    elif found is None or (as_root and os.geteuid() != 0):
        pytest.skip(f"{program} is not installed, or not for us")
    return str(found)


def workers(service: Service) -> set[int]:
    """The process ids of gunicorn's workers."""
    pid = service.process.pid
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


Start = Callable[..., Service]
