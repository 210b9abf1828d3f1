"""Tests of hosts, roles and poolers that are not like ours."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from databases import engine_for, history, names, run_sql
from factories import ask, connected_to, message, settled, undo
from servers import Server
from services import ROOT, free_port, installed
from sqlalchemy import text
from terminal import PROGRAM, without_store
from waiting import PATIENCE, until

import deliverylog
from delivery import claim
from deliverylog import records
from history import rebinds_done
from message import Message
from queues import QueueRegistry, registry
from store import StoreUnavailable, StoreUnusable

BUSY_TIMEOUT = 8  # seconds


@pytest.fixture
def server(new_server: Callable[..., Server]) -> Server:
    """A PostgreSQL server of the test's own, which does not run yet."""
    return new_server()


def bound(url: str, busy_timeout: float = PATIENCE) -> QueueRegistry:
    """`queues.registry` on this database."""
    registry.bind(url, busy_timeout)
    registry.database.prepare(create=True)
    return registry


# A host that vanishes


@contextmanager
def host_by_a_cable(ours: str, its: str) -> Iterator[tuple[str, str]]:
    """A host, as a network namespace, on the other end of a cable: its name, and the name of our end."""
    ip, name, cable = installed("ip", as_root=True), f"host{os.getpid()}", f"cable{os.getpid() % 100_000}"
    steps = f"""
        netns add {name}
        link add {cable} type veth peer name eth0 netns {name}
        addr add {ours}/24 dev {cable}
        link set {cable} up
        -n {name} addr add {its}/24 dev eth0
        -n {name} link set eth0 up
    """
    try:
        for step in filter(None, map(str.split, steps.splitlines())):
            subprocess.run([ip, *step], check=True)
        yield name, cable
    finally:
        subprocess.run([ip, "netns", "del", name], check=True)


REBIND_FOR_EVER = """
import signal, sys
from pathlib import Path
from event import rebind
from queues import registry
from rebinding import RebindRequest

@rebind.connect
def wait(message, data):
    Path(data["begun"]).touch()
    signal.pause()

registry.bind(sys.argv[1], sys.argv[2])
registry.rebind(RebindRequest("r", {"begun": sys.argv[3]}, trigger_rebind_event=True))
"""


@pytest.mark.postgresql
def test_a_host_that_vanishes_in_the_middle_of_a_rebind_keeps_others_waiting_for_no_longer_than_their_timeout(
    server: Server, tmp_path: Path
) -> None:
    with host_by_a_cable("10.99.0.1", "10.99.0.2") as (host, cable):
        server.start(listen="10.99.0.1")
        server.allow("host all all 10.99.0.2/32 trust")
        queues = bound(server.url(), BUSY_TIMEOUT)
        queues.load([message()])
        begun, url = tmp_path / "begun", "postgresql+psycopg://postgres@10.99.0.1/postgres"
        doing = [sys.executable, "-c", REBIND_FOR_EVER, url, str(BUSY_TIMEOUT), str(begun)]
        with subprocess.Popen([installed("ip", as_root=True), "netns", "exec", host, *doing], cwd=ROOT) as vanishing:
            until(begun.exists)
            subprocess.run([installed("ip", as_root=True), "link", "set", cable, "down"], check=True)
            vanishing.kill()
        assert ask(queues, {"tenant": "t"}).moved == 1
        queues.database.close()


# A role with least rights

GRANTS = re.findall(r"```sql\n(GRANT.*?)```", (ROOT / "deploy" / "README.md").read_text(), re.DOTALL)


@pytest.mark.postgresql
def test_the_grants_of_the_page_are_all_that_the_service_needs(server: Server) -> None:
    server.start()
    bound(server.url()).database.close()
    run_sql(server.url(), "CREATE ROLE rebind LOGIN", *GRANTS)
    queues = bound(server.url(user="rebind"))
    queues.load([message(), message(meta={"queue": "null"})])
    undo(queues, ask(queues, {"queue": "null"}))
    ask(queues, {"tenant": "t"}, dry_run=True)
    (claimed,) = claim(1, lease=60)
    assert settled(claimed, "Delivery", {})
    with connected_to(lambda message, data: None):
        ask(queues, trigger_rebind_event=True)
    assert len(list(deliverylog.records(queues.database, after=0))) == 3
    assert [len(rebinds_done(queues.database)), *deliverylog.prune(queues.database, 9e9)] == [3, 3, 3]
    queues.database.close()


@pytest.mark.postgresql
def test_a_log_whose_numbers_are_behind_is_no_fault_of_the_request(queues: QueueRegistry, url: str) -> None:
    """docs/runbook.md has the cure."""
    queues.load([message()])
    ask(queues, {"tenant": "t"})
    run_sql(url, "SELECT setval('log_key_seq', max(key), false) FROM log")
    with pytest.raises(StoreUnusable, match="a row of the service's own"):
        ask(queues, {"tenant": "u"})
    run_sql(url, *re.findall(r"SELECT setval\(.*;", (ROOT / "docs" / "runbook.md").read_text()))
    assert ask(queues, {"tenant": "u"}).moved == 1


# A pooler


@pytest.mark.postgresql
def test_a_pooler_whose_sessions_are_not_ours_is_told_in_one_line(server: Server) -> None:
    server.start()
    bound(server.url()).database.close()
    port, settings = free_port(), server.folder / "pgbouncer.ini"
    settings.write_text(f"""
        [databases]
        postgres = host={server.folder} user=postgres pool_size=2
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        auth_type = any
        auth_file = {server.folder / "users"}
        pool_mode = transaction
        unix_socket_dir =
        server_reset_query_always = 1
        server_reset_query = DISCARD ALL
        so_reuseport = 1
        ignore_startup_parameters = extra_float_digits
    """)
    (server.folder / "users").write_text('"postgres" ""')
    pooler = subprocess.Popen([installed("pgbouncer", as_root=True), "-q", "-u", "pgserver", str(settings)])
    try:
        registry.bind(f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres", PATIENCE)
        until(lambda: is_reached(registry))
        with pytest.raises(StoreUnusable, match="pool_mode = session"):
            ask(registry, {"tenant": "t"})
    finally:
        registry.database.close()
        pooler.kill()
        pooler.wait()


def is_reached(queues: QueueRegistry) -> bool:
    with suppress(StoreUnavailable):
        queues.queues()
        return True
    return False


# A host without a folder for temporary files

READ_ONLY_ROOT = """
mount --bind {store} /mnt
for folder in /tmp /var/tmp; do mount --bind $folder $folder && mount -o remount,bind,ro $folder; done
cd /var/tmp && exec {python} {program}
"""
REBIND = f"-m flask --app {ROOT / 'wsgi.py'} rebind --everything --reason r --set tenant=t --limit 1"
NO_FOLDER = "SQLite has no folder for temporary files: set SQLITE_TMPDIR to one that it can write to"


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("program", "says"),
    [(REBIND, (1, "Error: ")), ("-c 'import wsgi'", (4, "rebind cannot start: "))],
    ids=["command", "start"],
)
def test_a_missing_folder_for_temporary_files_is_named(tmp_path: Path, program: str, says: tuple[int, str]) -> None:
    bound(f"sqlite:///{tmp_path}/queues.db").load(message(meta={"large": "x" * 100_000}) for _ in range(50))
    script = READ_ONLY_ROOT.format(store=tmp_path, python=sys.executable, program=program)
    done = subprocess.run(
        [installed("unshare", as_root=True), "--mount", "sh", "-ec", script],
        env={"PATH": os.environ["PATH"], "REBIND_DATABASE_URL": "sqlite:////mnt/queues.db", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (says[0], f"{says[1]}{NO_FOLDER}\n")


# A server that takes no messages

FAILURES = {
    "no right": "CREATE ROLE odd LOGIN; GRANT SELECT ON schema_version, messages TO odd",
    "read-only": "CREATE ROLE odd SUPERUSER LOGIN; ALTER ROLE odd SET default_transaction_read_only = on",
    "a table that refuses": "CREATE ROLE odd SUPERUSER LOGIN; ALTER TABLE contents ADD CHECK (data = '')",
}


@pytest.mark.postgresql
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_whatever_fails_while_messages_are_loaded_is_told_in_one_line(server: Server, failure: str) -> None:
    server.start()
    bound(server.url()).database.close()
    run_sql(server.url(), failure)
    lines = "".join(
        json.dumps({"id": str(n), "message": {"sender": "", "recipient": "ada@example.com", "data": "Hello"}}) + "\n"
        for n in range(2000)
    )
    done = subprocess.run(
        [*PROGRAM, "load", "-"],
        env=os.environ | {"REBIND_DATABASE_URL": server.url(user="odd")},
        cwd=ROOT,
        input=lines,
        capture_output=True,
        text=True,
    )
    said = without_store(done.stderr)
    assert (done.returncode, done.stdout, len(said.splitlines())) == (1, "", 1), said


# Readers of the log


@pytest.mark.parametrize("poll", [None, 0.01], ids=["again and again", "follow"])
def test_who_reads_on_beside_a_long_rebind_and_short_writers_misses_nothing(
    queues: QueueRegistry, url: str, poll: float | None
) -> None:
    queues.load(message(meta={"queue": "short"}) for _ in range(60))
    last, *claims = claim(60, lease=60)
    queues.load(message(meta={"queue": "long"}) for _ in range(3000))
    keys: list[int] = []

    def read() -> None:
        while True:
            for record in records(queues.database, keys[-1] if keys else 0, poll):
                keys.append(record["key"])
                if record["type"] == "Bounce":
                    return

    def deliver_beside(message: Message, data: dict[str, str]) -> None:
        if claims and url.startswith("postgresql") and int(message.id[1:]) % 50 == 0:
            settled(claims.pop(), "Delivery", {})

    reader = threading.Thread(target=read)
    reader.start()
    with connected_to(deliver_beside):
        ask(queues, domain="long", trigger_rebind_event=True)
    settled(last, "Bounce", {})
    reader.join(PATIENCE)
    with engine_for(url).connect() as db:
        assert keys == list(db.scalars(text("SELECT key FROM log ORDER BY key")))
    assert len(keys) > 3000


@pytest.mark.postgresql
def test_a_standby_refuses_those_who_must_miss_nothing_and_shows_the_log_to_others(
    new_server: Callable[..., Server],
) -> None:
    primary, standby = new_server(), new_server(empty=True)
    primary.start()
    queues = bound(primary.url())
    queues.load([message()])
    ask(queues, {"tenant": "t"})
    standby.copy_of(primary)
    standby.start()
    reader = QueueRegistry()
    reader.bind(standby.url(), PATIENCE)
    until(lambda: names(standby.url()) == ["t@example.com"])
    assert len(list(deliverylog.records(reader.database))) == len(history(standby.url())) == 1
    for options in ({"after": 0}, {"poll": 0.1}):
        with pytest.raises(StoreUnusable, match="ask the primary server"):
            next(deliverylog.records(reader.database, **options))
    for each in (queues, reader):
        each.database.close()
