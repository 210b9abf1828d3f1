"""The start: of a service or a command that cannot work, of several services at once, and of one that must wait.

What does not pass by itself ends the start, in one line. Until the rest has passed, requests are answered with 503.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
from answers import done, is_unavailable
from databases import engine_for, locked, run_sql
from servers import Server
from services import PATH, ROOT, Service, Start, workers
from sqlalchemy import create_engine, make_url, text
from terminal import Flask
from waiting import PATIENCE, until

from queues import QueueRegistry
from store import StoreUnusable

AT = "postgresql+psycopg://{user}@/{database}?host={host}"
NO_FILE = "the database URL cannot be used: after sqlite:/// must be the name of a file, and nothing else$"
URLS = {
    "a port of 1x": ("postgresql+psycopg://x@127.0.0.1:1x/x", "the database URL cannot be used: "),
    "a port beyond 16 bits": (f"{AT}&port=70000", "the database cannot be used: .*invalid port number"),
    "an unknown option": (f"{AT}&colour=red", 'the database cannot be used: invalid connection option "colour"'),
    "another database": ("mysql://x/x", "the database URL cannot be used: mysql is neither sqlite nor postgresql"),
    "no such database": (AT, 'the database cannot be used: .*database "nowhere" does not exist', "", "nowhere"),
    "no such role": (AT, 'the database cannot be used: .*role "nobody" does not exist', "nobody"),
    "a role that may not log in": (AT, "the database cannot be used: .*not permitted to log in", "group_role"),
    "a wrong password": (AT, "the database cannot be used: .*password authentication failed", "guarded:wrong"),
    "no right to connect": (AT, "the database cannot be used: .*permission denied for database", "reader", "private"),
    "no right to create": (AT, "the database cannot be used: permission denied for schema closed", "reader"),
    "SQL_ASCII": (AT, "the encoding of the database is SQL_ASCII: it must be UTF8", "", "ascii"),
    "UTF-16": ("sqlite:///{folder}/utf-16.db", "the encoding of the database is UTF-16le: it must be UTF-8"),
    "in memory": ("sqlite:///:memory:", NO_FILE),
    "an option of SQLite": ("sqlite:///{folder}/x.db?timeout=3", NO_FILE),
    "a question mark in a file's name": ("sqlite:///{folder}/a?b.db", NO_FILE),
    "a question mark at the end": ("sqlite:///{folder}/a.db?", NO_FILE),
    "an @ in a password": ("postgresql+psycopg://u:p@ss@x/x", "the database URL cannot be used: write an @ .* as %40$"),
    "no folder": ("sqlite:///{folder}/no/x.db", "the database's file cannot be opened: .*/no/x.db: No such file"),
    "a folder for a file": ("sqlite:///{folder}", "the database's file cannot be opened: /.*: Is a directory"),
    "another version": ("sqlite:///{folder}/old.db", "the store has schema version 1, .*: sqlite:///.*/old.db$"),
    "no database": ("sqlite:///{folder}/text", "the file is damaged, or is not a database: "),
}
SETTINGS = {
    "proxies that are a word": ("REBIND_PROXIES", "many", "REBIND_PROXIES must be a whole number from 0 to 99: 'many'"),
    "a misspelt setting": ("REBIND_TRUSTED_HOST", "::1", "unknown setting REBIND_TRUSTED_HOST"),
    "an empty name": ("REBIND_", "x", "unknown setting REBIND_$"),
    "a policy that exits": ("REBIND_POLICY", "{folder}/policy.py", r"the policy .* cannot be loaded: .*Exit: a\\nb"),
}


@pytest.fixture(scope="module")
def strict(server: Server) -> Server:
    """A server with roles and databases that the service cannot use."""
    statements = """
        CREATE ROLE group_role; CREATE ROLE guarded LOGIN PASSWORD 'right';
        CREATE SCHEMA closed; GRANT USAGE ON SCHEMA closed TO public;
        CREATE ROLE reader LOGIN; ALTER ROLE reader SET search_path = closed;
        CREATE DATABASE ascii TEMPLATE template0 ENCODING SQL_ASCII LOCALE 'C';
        CREATE DATABASE private; REVOKE CONNECT ON DATABASE private FROM public
    """
    with create_engine(server.url(), isolation_level="AUTOCOMMIT").connect() as db:
        for statement in statements.split(";"):
            db.exec_driver_sql(statement)
    server.allow("local all guarded scram-sha-256")
    return server


def ends_with_one_line(service: Service, reason: str) -> None:
    """Assert that gunicorn has ended, with the code after which nothing starts it again."""
    assert service.process.wait(PATIENCE) == 4
    (line,) = service.output.read_text().splitlines()
    assert re.match(f"rebind cannot start: {reason}", line), line


def fails_with_one_line(command: tuple[int, str, str], reason: str) -> None:
    status, output, error = command
    assert (status, output) == (1, "")
    (line,) = error.splitlines()
    assert re.match(f"(rebind cannot start|Error): {reason}", line), line


@pytest.mark.postgresql
@pytest.mark.parametrize("case", URLS)
def test_a_database_that_never_can_be_used_ends_the_start_and_any_command_with_one_line(
    strict: Server, start: Start, shell: Flask, tmp_path: Path, case: str
) -> None:
    url, reason, user, database, *_ = *URLS[case], "", ""
    url = url.format(host=strict.folder, folder=tmp_path, user=user or "postgres", database=database or "postgres")
    (tmp_path / "text").write_text("no database" * 1000)
    run_sql(f"sqlite:///{tmp_path}/old.db", "CREATE TABLE messages (key)")
    run_sql(f"sqlite:///{tmp_path}/utf-16.db", "PRAGMA encoding = 'UTF-16le'", "CREATE TABLE mine (a)")
    ends_with_one_line(start(url=url), reason)
    fails_with_one_line(shell("load", "/dev/null", REBIND_DATABASE_URL=url), reason)


@pytest.mark.sqlite
@pytest.mark.parametrize(("name", "value", "reason"), SETTINGS.values(), ids=SETTINGS)
def test_a_wrong_setting_ends_the_start_and_any_command_with_one_line(
    start: Start, shell: Flask, tmp_path: Path, name: str, value: str, reason: str
) -> None:
    (tmp_path / "policy.py").write_text("raise SystemExit('a\\nb')")
    setting = {name: value.format(folder=tmp_path)}
    ends_with_one_line(start(**setting), reason)
    fails_with_one_line(shell("queues", **setting), reason)


@pytest.mark.parametrize("timeout", ["soon", "true", "NaN", "-1", "172800", "1e999", "", None])
def test_a_busy_timeout_is_a_number_of_seconds_up_to_a_day(timeout: str) -> None:
    with pytest.raises(StoreUnusable, match="the busy timeout must be a number of seconds from 0 to 86400: "):
        QueueRegistry().bind("sqlite:///queues.db", timeout)


@pytest.mark.sqlite
def test_a_command_says_once_that_the_database_is_out_of_reach(shell: Flask) -> None:
    said = 'connection failed: connection to server at "127.0.0.1", port 1 failed: Connection refused'
    nowhere = "postgresql+psycopg://x@127.0.0.1:1/x"
    fails_with_one_line(shell("queues", REBIND_DATABASE_URL=nowhere), f"the database is out of reach: {said}")


# What passes


@contextmanager
def read_only(server: Server) -> Iterator[None]:
    run_sql(server.url(), "ALTER DATABASE postgres SET default_transaction_read_only = on")
    yield
    run_sql(server.url(), "SET TRANSACTION READ WRITE", "ALTER DATABASE postgres RESET default_transaction_read_only")


@contextmanager
def down(server: Server) -> Iterator[None]:
    server.stop()
    yield
    server.start()


def taken(server: Server) -> AbstractContextManager[object]:
    """Somebody else has the turn that a service needs to create its tables."""
    return locked(server.url())


Wait = Callable[[Server], AbstractContextManager[object]]
WAITS: dict[str, tuple[Wait, str]] = {
    "down": (down, "the database is out of reach: connection .*"),
    "read-only": (read_only, "the database cannot do this now: it is a standby, a demoted primary or set to read-only"),
    "locked": (taken, "the database cannot do this now: canceling statement due to lock timeout"),
}


@pytest.mark.postgresql
@pytest.mark.parametrize(("wait", "reason"), WAITS.values(), ids=WAITS)
def test_what_cannot_be_used_at_the_start_is_503_until_it_can(
    new_server: Callable[..., Server], start: Start, wait: Wait, reason: str
) -> None:
    """It gets its tables then."""
    server = new_server()
    server.start()
    with wait(server):
        service = start("--workers", "1", url=server.url(), REBIND_BUSY_TIMEOUT="0.5")
        (line,) = (line for line in service.output.read_text().splitlines() if "until then" in line)
        assert re.search(f"{reason}; until then, requests are answered with 503$", line), line
        for _ in range(2):
            assert is_unavailable(service.rebind())
    assert done(service.rebind()) == (0, 0, 0)
    assert "Traceback" not in service.output.read_text()


@pytest.mark.parametrize("prepared", [True, False], ids=["", "locked at the start"])
def test_no_connection_is_carried_into_the_workers(url: str, site: str, start: Start, prepared: bool) -> None:
    """Two processes would speak on it at once. All have been forked, and none has had a request."""
    with nullcontext() if prepared else locked(site):
        service = start(url=site, REBIND_BUSY_TIMEOUT="0.2")
    engine_for(site).dispose()
    until(lambda: len(workers(service)) == 2)
    for process in (service.process.pid, *workers(service)):
        files = {link.readlink().name for link in Path(f"/proc/{process}/fd").iterdir()}
        assert {name for name in files if name.startswith("new.db")} == set()
    connected = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{make_url(site).database}'"
    if not url.startswith("sqlite"):
        with engine_for(url).connect() as db:
            until(lambda: db.scalar(text(connected)) == 0)
    assert done(service.rebind()) == (0, 0, 0)


def test_two_services_that_start_at_once_on_an_empty_database_both_come_up(site: str, start: Start) -> None:
    # With one worker each, which has answered: gunicorn waits for one that was told to stop before it could listen.
    services = [start("--workers", "1", url=site, wait=False) for _ in range(2)]
    for service in services:
        until(service.listens_or_ended)
        assert done(service.rebind()) == (0, 0, 0)
    for service in services:
        service.process.terminate()
    assert [service.process.wait(60) for service in services] == [0, 0]
    output = [line for service in services for line in service.output.read_text().splitlines()]
    assert [line for line in output if "INFO" not in line and f'"POST {PATH} HTTP/1.1" 200' not in line] == []


# Who may read the store


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [["flask", "load", "/dev/null"], ["gunicorn", "--bind", "unix:socket", "wsgi:app"]],
    ids=["load", "serve"],
)
def test_the_default_store_is_for_its_own_user_alone_whatever_creates_it(tmp_path: Path, program: list[str]) -> None:
    """With the usual umask, as `make run` has it."""
    for source in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(source, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "REBIND_DATABASE_URL"}
    command = [sys.executable, "-m", *program]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, umask=0o022, stderr=subprocess.DEVNULL) as process:
        until((tmp_path / "instance" / "queues.db").exists)
        process.terminate()
    assert mode(tmp_path / "instance") == "700"
    assert {mode(file) for file in (tmp_path / "instance").iterdir()} == {"600"}


def mode(path: Path) -> str:
    return f"{path.stat().st_mode & 0o777:o}"
