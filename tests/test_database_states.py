"""The states that a database can be in while the service runs, as clients and operators see them.

While the database cannot be used, a request fails for now; afterwards the service works again by itself. What such an
error is answered with is in test_app.py, and what ends the start in test_start.py.
"""

import itertools
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
import requests
from answers import done, is_unavailable
from databases import engine_for, history, locked, logged, names, run_sql
from factories import ask, connected_to, counts, message
from links import Link
from servers import Server
from services import PATH, Start
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from waiting import PATIENCE, until

import sqlite
from message import Message
from queues import QueueRegistry
from store import StoreConflict, StoreDamaged, StoreError, StoreRefused, StoreUnavailable, StoreUnusable
from tables import SCHEMA_VERSION

OUT_OF_REACH = "the database is out of reach"
NO_STORE = "there is no store"


def used_by(queues: QueueRegistry, url: str) -> None:
    """Let the registry use this database, and load a message into queue `a`."""
    queues.bind(url, busy_timeout=PATIENCE)
    queues.database.prepare(create=True)
    queues.load([message(meta={"queue": "a"})])


def with_options(url: str, options: str) -> str:
    return make_url(url).update_query_dict({"options": options}).render_as_string(hide_password=False)


# What a transaction is, whatever the server's settings are


@pytest.mark.postgresql
def test_a_rebind_outlives_a_kill_of_a_server_whose_commits_do_not(server: Server, queues: QueueRegistry) -> None:
    run_sql(server.url(), "ALTER ROLE postgres SET synchronous_commit = off")
    used_by(queues, server.url())
    ask(queues, {"queue": "b"})
    server.stop()
    server.start()
    assert names(server.url()) == ["b"]


@pytest.mark.postgresql
@pytest.mark.parametrize(
    ("setting", "name", "used"),
    [
        ("synchronous_commit=off", "synchronous_commit", "on"),
        ("synchronous_commit=remote_write", "synchronous_commit", "on"),
        ("synchronous_commit=remote_apply", "synchronous_commit", "remote_apply"),
        ("default_transaction_isolation=serializable", "transaction_isolation", "read committed"),
    ],
)
def test_commits_are_synchronous_or_stronger_and_see_what_is_committed(
    queues: QueueRegistry, url: str, setting: str, name: str, used: str
) -> None:
    queues.bind(with_options(url, f"-c {setting}"), busy_timeout=PATIENCE)
    with queues.database.begin_write() as db:
        assert db.scalar(text(f"SHOW {name}")) == used


@pytest.mark.postgresql
def test_any_text_is_kept_whatever_encoding_the_role_has(site: str, queues: QueueRegistry) -> None:
    run_sql(site, f"ALTER ROLE {make_url(site).username} SET client_encoding = 'LATIN1'")
    used_by(queues, site)
    ask(queues, {"queue": "\u20ac", "\U0001f600": "\u017f"}, reason="\u0416")
    with queues.database.begin_read() as db:
        assert db.scalar(text("SELECT meta->>'\U0001f600' FROM messages WHERE queue = '\u20ac'")) == "\u017f"


@pytest.mark.postgresql
@pytest.mark.parametrize("dry_run", [False, True], ids=["", "dry run"])
def test_a_slow_handler_is_not_ended_by_the_servers_timeout_for_idle_transactions(
    site: str, url: str, queues: QueueRegistry, dry_run: bool
) -> None:
    """To the server, a transaction whose statements are sent as one pipeline is not idle."""
    run_sql(url, f"ALTER ROLE {make_url(site).username} SET idle_in_transaction_session_timeout = '200ms'")
    used_by(queues, site)
    age = "SELECT extract(epoch FROM max(clock_timestamp() - xact_start)) FROM pg_stat_activity WHERE datname = "

    def take_long(message: Message, data: dict[str, str]) -> None:
        with engine_for(url).connect() as db:
            until(lambda: float(db.scalar(text(f"{age}'{make_url(site).database}'")) or 0) > 0.5)
        message.meta["queue"] = "b"

    with connected_to(take_long):
        assert counts(ask(queues, trigger_rebind_event=True, dry_run=dry_run)) == (1, 1, 1)


# States that pass


def test_a_store_that_could_not_be_used_is_looked_at_again(site: str, queues: QueueRegistry) -> None:
    """It may have been replaced by one of another version, whose tables must not be taken for ours."""
    used_by(queues, site)
    run_sql(site, "ALTER TABLE messages RENAME TO away")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"no such table|does not exist"):
            ask(queues, {"queue": "b"})
    run_sql(site, "ALTER TABLE away RENAME TO messages", "UPDATE schema_version SET version = 99")
    with pytest.raises(StoreUnusable, match=f"the store has schema version 99, and this is version {SCHEMA_VERSION}"):
        ask(queues, {"queue": "b"})
    run_sql(site, f"UPDATE schema_version SET version = {SCHEMA_VERSION}")
    assert counts(ask(queues, {"queue": "b"})) == (1, 1, 1)


DISCONNECT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "


@pytest.mark.postgresql
def test_a_database_that_is_read_only_for_a_while_is_not_used_until_then(site: str, queues: QueueRegistry) -> None:
    """Also on connections that were made in the meantime, whose sessions stay read-only."""
    used_by(queues, site)
    setting = "default_transaction_read_only"
    run_sql(site, f"ALTER ROLE {make_url(site).username} SET {setting} = on", DISCONNECT + "pg_backend_pid()")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="set to read-only"):
            ask(queues, {"queue": "b"})
        assert counts(ask(queues, {"queue": "b"}, dry_run=True)) == (1, 1, 1)
    run_sql(site, "SET TRANSACTION READ WRITE", f"ALTER ROLE {make_url(site).username} RESET {setting}")
    with suppress(StoreUnavailable):
        ask(queues)  # in a session that began as read-only; the next one is new
    assert counts(ask(queues, {"queue": "b"})) == (1, 1, 1)


@pytest.mark.postgresql
def test_a_database_that_was_dropped_and_made_again_is_not_used_until_it_has_a_store(
    site: str, url: str, queues: QueueRegistry
) -> None:
    used_by(queues, site)
    with engine_for(url).connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text(f"DROP DATABASE {make_url(site).database} WITH (FORCE)"))
        with pytest.raises((StoreUnavailable, StoreUnusable)):
            ask(queues)
        db.execute(text(f"CREATE DATABASE {make_url(site).database}"))
    for _ in range(2):
        with pytest.raises(StoreUnusable, match=NO_STORE):
            ask(queues)
    other = QueueRegistry()
    used_by(other, site)
    assert counts(ask(queues, {"queue": "b"})) == (1, 1, 1)


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
def test_a_host_that_vanishes_while_a_rebind_waits_for_it_is_out_of_reach(
    link: Link, queues: QueueRegistry, url: str
) -> None:
    queues.load([message(meta={"queue": "a"})])
    queues.bind(link.url, busy_timeout=4)
    with ThreadPoolExecutor(1) as pool, locked(url) as db:
        rebound = pool.submit(ask, queues, {"queue": "b"})
        until(lambda: db.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")) == 1)
        link.down()
        with pytest.raises(StoreUnavailable, match=OUT_OF_REACH):
            rebound.result()
    link.up()
    assert counts(ask(queues, {"queue": "b"})) == (1, 1, 1)


# A standby


@pytest.fixture
def pair(new_server: Callable[..., Server], queues: QueueRegistry) -> tuple[Server, Server]:
    """A primary with one message, and its hot standby."""
    primary, standby = new_server(), new_server(empty=True)
    primary.start()
    used_by(queues, primary.url())
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
def test_on_a_hot_standby_dry_runs_are_done_and_rebinds_only_when_it_is_the_primary(
    pair: tuple[Server, Server], queues: QueueRegistry
) -> None:
    _, standby = pair
    queues.bind(standby.url(), busy_timeout=PATIENCE)
    for _ in range(2):
        assert counts(ask(queues, {"queue": "b"}, dry_run=True)) == (1, 1, 1)
        with pytest.raises(StoreUnavailable):
            ask(queues, {"queue": "b"})
    standby.promote()
    assert counts(ask(queues, {"queue": "b"})) == (1, 1, 1)


# SQLite's file


@pytest.mark.sqlite
def test_a_file_that_vanishes_is_not_created_again(queues: QueueRegistry, tmp_path: Path) -> None:
    file, away = tmp_path / "queues.db", tmp_path / "away"
    used_by(queues, f"sqlite:///{file}")
    file.rename(away)
    for dry_run in (False, True, False):
        with pytest.raises((StoreUnavailable, StoreUnusable), match=f"{NO_STORE}|the database's file cannot be opened"):
            ask(queues, {"queue": "b"}, dry_run=dry_run)
    assert not file.exists()
    away.rename(file)
    assert counts(ask(queues, {"queue": "b"})) == (1, 1, 1)


@pytest.mark.sqlite
def test_a_file_that_is_replaced_is_not_used_and_stays_as_it_is(queues: QueueRegistry, tmp_path: Path) -> None:
    """It would be read together with the old one's -wal: its operator has to end the service first."""
    file, backup, other = tmp_path / "queues.db", tmp_path / "backup.db", QueueRegistry()
    used_by(other, f"sqlite:///{backup}")
    other.database.close()
    before = backup.read_bytes()
    used_by(queues, f"sqlite:///{file}")
    backup.rename(file)
    for dry_run in (False, True, False):
        with pytest.raises(StoreError, match="the database's file was replaced while it was in use") as refused:
            ask(queues, {"queue": "b"}, dry_run=dry_run)
        said = f"stop all programs that use {file}, remove {file}-wal and {file}-shm"
        assert said in refused.value.in_full
    assert file.read_bytes() == before


CONNECT = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('SELECT * FROM messages').connection.close()"


@pytest.mark.sqlite
def test_a_store_that_is_prepared_again_is_not_taken_from_those_who_use_it(queues: QueueRegistry, url: str) -> None:
    """A process that opens and closes the file by itself loses its locks: SQLite, "How To Corrupt", section 2.2.

    Another process that ends its use then takes itself for the last, and removes the log (-wal) that is in use.
    """
    queues.load([message()])
    with engine_for(url).connect() as db:
        assert db.scalar(text("SELECT count(*) FROM messages")) == 1
        queues.bind(url, busy_timeout=PATIENCE)
        queues.database.prepare(create=True)
        file = str(make_url(url).database)
        subprocess.run([sys.executable, "-c", CONNECT, file], check=True)
        assert Path(f"{file}-wal").exists()


@pytest.mark.sqlite
@pytest.mark.parametrize("page", ["SELECT rootpage FROM sqlite_master WHERE name = 'log'", "PRAGMA page_count"])
def test_a_damaged_log_is_told_and_leaves_the_messages_where_they_are(
    queues: QueueRegistry, tmp_path: Path, page: str
) -> None:
    """The damage is in the log's first page, or in its last one, which is read in the middle of `flask log`."""
    file = tmp_path / "queues.db"
    used_by(queues, f"sqlite:///{file}")
    queues.load(message(meta={"queue": "a"}) for _ in range(499))
    ask(queues, {"note": "x"})
    queues.database.close()
    with closing(sqlite3.connect(file)) as db:
        ((number,), (size,)) = db.execute(page).fetchone(), db.execute("PRAGMA page_size").fetchone()
    with file.open("r+b") as damaged:
        damaged.seek((number - 1) * size)
        damaged.write(b"\xff" * size)
    for way in (lambda: ask(queues, {"queue": "b"}), lambda: logged(f"sqlite:///{file}")) * 2:
        with pytest.raises(StoreDamaged, match="database disk image is malformed"):
            way()
    assert names(f"sqlite:///{file}") == ["a"] * 500
    assert counts(ask(queues, {"queue": "b"}, suppress_logging=True)) == (500, 500, 500)


# What the database's errors mean

SQLSTATES: dict[str, type[StoreError] | None] = {
    "40001": StoreConflict,  # serialization_failure
    "22P02": StoreRefused,  # invalid_text_representation
    "23505": StoreRefused,  # unique_violation
    "28P01": StoreUnusable,  # invalid_password
    "42501": StoreUnusable,  # insufficient_privilege
    "08006": StoreUnavailable,  # connection_failure
    "25006": StoreUnavailable,  # read_only_sql_transaction
    "25P03": StoreUnavailable,  # idle_in_transaction_session_timeout
    "42P01": StoreUnavailable,  # undefined_table
    "53100": StoreUnavailable,  # disk_full
    "55P03": StoreUnavailable,  # lock_not_available
    "57014": StoreUnavailable,  # query_canceled
    "58030": StoreUnavailable,  # io_error
    "XX001": StoreUnavailable,  # data_corrupted
    "25001": None,  # active_sql_transaction
    "42601": None,  # syntax_error
}


@pytest.mark.postgresql
@pytest.mark.parametrize(("state", "meaning"), SQLSTATES.items())
def test_an_error_of_postgresql_means_what_its_sqlstate_does(
    queues: QueueRegistry, state: str, meaning: type[StoreError] | None
) -> None:
    raising = f"DO $$ BEGIN RAISE EXCEPTION 'as it was told' USING ERRCODE = '{state}'; END $$"
    with pytest.raises((StoreError, DBAPIError)) as caught, queues.database.begin_read() as db:
        db.exec_driver_sql(raising)
    assert caught.type is meaning or (meaning is None and isinstance(caught.value, DBAPIError))


RESULT_CODES: dict[str, type[StoreError] | None] = {
    "SQLITE_BUSY": StoreUnavailable,
    "SQLITE_READONLY": StoreUnavailable,
    "SQLITE_IOERR_WRITE": StoreUnavailable,
    "SQLITE_FULL": StoreUnavailable,
    "SQLITE_CANTOPEN": StoreUnavailable,
    "SQLITE_TOOBIG": StoreRefused,
    "SQLITE_CONSTRAINT_CHECK": StoreRefused,
    "SQLITE_CORRUPT_INDEX": StoreDamaged,
    "SQLITE_NOTADB": StoreDamaged,
    "SQLITE_ERROR": None,
    "SQLITE_MISUSE": None,
}


@pytest.mark.parametrize(("code", "meaning"), RESULT_CODES.items())
def test_an_error_of_sqlite_means_what_its_result_code_does(code: str, meaning: type[StoreError] | None) -> None:
    """Their numbers are those that SQLite documents; most cannot be provoked here."""
    error = sqlite3.DatabaseError("as it was told")
    error.sqlite_errorcode = getattr(sqlite3, code)
    assert type(sqlite.meaning(OperationalError("", {}, error))) is (meaning or type(None))
