"""The pages: their commands print what they say, and all that can be said to the service is on one of them."""

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click import Command
from databases import POSTGRESQL_BIN, empty, engine_for, new_database, run_sql
from factories import ask, message
from flask import Flask
from services import ROOT, Start, installed
from sqlalchemy import make_url, select
from terminal import PROGRAM
from test_openapi import RESPONSES

import cli
import deliverylog
from app import SETTINGS
from queues import QueueRegistry
from schemas import RebindQuerySchema, RebindRequestSchema
from tables import metadata

CONTRACT = (ROOT / "docs" / "contract.md").read_text()
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")]
CODE = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("bench/*.py")]
ALL = "\n".join(page.read_text() for page in PAGES)
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
LONG = 300  # seconds for all commands of a document
MARK = "@@@"

# What is different each time, and what stands for it in both texts.
MASKS = [
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "TIME"),
    (r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", "DATE"),
    (r"(?<=[ ])\d+ +(\d+[smhd] +)?\d+[smhd]\b", "DUE  AGE"),  # one message more is due every 14 seconds
    (r"\b\d+ due\b", "N due"),
    (r'"(timestamp|created|key)": \d+', r'"\1": N'),
    (r'"overdue":\d+', '"overdue":N'),
    (rf"\b(root|{re.escape(getpass.getuser())})\b", "USER"),
    (r"[ ]{2,}", "  "),
]

Block = tuple[str, str]
"""A command, and what it prints."""


def blocks(text: str, prompt: str = "$") -> Iterator[Block]:
    """The commands of a document's console blocks; those of root, after a `#`, are for a host that is set up."""
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for command in re.split(rf"^{re.escape(prompt)} ", block, flags=re.MULTILINE)[1:]:
            lines = command.splitlines(keepends=True)
            ends = next(n for n, line in enumerate(lines) if not line.endswith("\\\n"))
            yield "".join(lines[: ends + 1]).strip(), "".join(lines[ends + 1 :])


def masked(text: str) -> str:
    for pattern, name in MASKS:
        text = re.sub(pattern, name, text)
    return text.replace("\r", "").strip()


def says(documented: str, printed: str) -> bool:
    """Whether a command printed what the document says; `…` stands for anything."""
    pattern = ".*".join(map(re.escape, masked(documented).split("…")))
    return re.fullmatch(pattern, masked(printed), re.DOTALL) is not None


def run_all(
    commands: list[str], here: dict[str, str], folder: Path, programs: dict[str, str], **environment: str
) -> list[str]:
    """What each command prints, on standard output or error, in one shell.

    here: what stands for names of the document.
    programs: what stands for programs of the host that the document is about, as shell scripts in this folder.
    """
    for name, does in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    for there, name in here.items():
        commands = [command.replace(there, name) for command in commands]
    done = subprocess.run(
        ["bash"],
        input="".join(f"echo {MARK}\n{one}\n" for one in commands),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment,
        text=True,
        timeout=LONG,
        check=False,
    )
    return done.stdout.split(f"{MARK}\n")[1:]


def load_sample(url: str) -> None:
    sample = subprocess.run([sys.executable, "examples/sample.py"], cwd=ROOT, capture_output=True, check=True).stdout
    run_flask(url, "load", "-", stdin=sample)


def run_flask(url: str, *arguments: str, stdin: bytes = b"") -> None:
    environment = os.environ | {"REBIND_DATABASE_URL": url}
    subprocess.run([*PROGRAM, *arguments], cwd=ROOT, input=stdin, env=environment, check=True)


NOT_RUN = ("make ",)  # it sets up an environment, and then serves until it is stopped


@pytest.mark.sqlite
@pytest.mark.timeout(LONG)
@pytest.mark.parametrize("document", ["README.md", "docs/runbook.md"])
def test_every_command_prints_what_the_document_says(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str
) -> None:
    url = f"sqlite:///{tmp_path / 'queues.db'}"
    policy = tmp_path / "policy.py"
    policy.write_text(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0])
    monkeypatch.setenv("REBIND_POLICY", str(policy))
    monkeypatch.setenv("REBIND_DATABASE_URL", url)
    service = start(url=url)
    load_sample(url)
    documented = [one for one in blocks((ROOT / document).read_text()) if not one[0].startswith(NOT_RUN)]
    here = {".venv/bin/flask": "flask", "localhost:8000": service.base.removeprefix("http://")}
    flask = f'cd {ROOT}; exec {sys.executable} -m flask "$@"'
    printed = run_all([command for command, _ in documented], here, tmp_path, {"rebind": flask, "flask": flask})
    wrong = [(*one, out) for one, out in zip(documented, printed, strict=True) if not says(one[1], out)]
    assert wrong == []


@pytest.mark.sqlite
def test_the_log_is_written_as_a_segment_that_kumomtas_readers_take_as_finished(
    queues: QueueRegistry, url: str, tmp_path: Path
) -> None:
    """They wait at a file that is not read-only. Without zstd, another program takes its place."""
    queues.load([message()])
    ask(queues)
    recipe = [one for one, _ in blocks((ROOT / "docs" / "kumomta.md").read_text()) if "$file" in one or "file=" in one]
    flask = f'cd {ROOT}; exec {sys.executable} -m flask "$@"'
    programs = {"flask": flask} | ({} if shutil.which("zstd") else {"zstd": "exec cat"})
    commands = ["last_key=0", *recipe, 'zstd -dc < "$file"', 'stat -c %A "$file"']
    *_, log, mode = run_all(commands, {"/var/log/rebind": str(tmp_path)}, tmp_path, programs, REBIND_DATABASE_URL=url)
    assert [json.loads(line) for line in log.splitlines()] == list(deliverylog.records(queues.database))
    assert "w" not in mode


@pytest.mark.slow
def test_what_was_backed_up_is_restored(url: str, tmp_path: Path) -> None:
    section = RUNBOOK.partition("## Back up and restore\n")[2].partition("\n## ")[0]
    each = [list(blocks(block, "#")) for block in re.findall(r"```console\n.*?```", section, re.DOTALL)]
    back_up, restore = each[:2] if url.startswith("sqlite") else each[2:]
    backup = tmp_path / ("queues.db" if url.startswith("sqlite") else "rebind.dump")
    with new_database(url, tmp_path) as store:
        database = make_url(store)
        here = {"/var/backups": str(tmp_path), "--dbname rebind": f"--dbname {database.database}"}
        here |= {"/var/lib/rebind/queues.db": str(database.database), "-o rebind -g rebind ": ""}
        programs = {"systemctl": "", "runuser": 'shift 3; exec "$@"'}
        programs |= {name: f'exec {POSTGRESQL_BIN / name} "$@"' for name in ("pg_dump", "pg_restore")}
        if url.startswith("sqlite"):
            installed("sqlite3")

        def run(documented: list[Block]) -> None:
            host = {"PGHOST": str(database.query.get("host", "")), "PGUSER": str(database.username)}
            printed = run_all([command for command, _ in documented], here, tmp_path, programs, **host)
            assert [masked(one) for one in printed] == [masked(output) for _, output in documented]

        load_sample(store)
        run_sql(store, "UPDATE messages SET meta = '{}'")
        run_flask(store, "rebind", "--everything", "--reason", "r")
        before = everything(store)
        run(back_up)
        assert backup.stat().st_mode & 0o777 == 0o600
        empty(store)
        load_sample(store)
        engine_for(store).dispose()
        run(restore)
        assert everything(store) == before
        engine_for(store).dispose()


def everything(url: str) -> dict[str, list[Any]]:
    """The rows of each table."""
    with engine_for(url).connect() as db:
        return {table.name: sorted(db.execute(select(table)), key=str) for table in metadata.sorted_tables}


# Names


def options(command: Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


def test_every_name_is_on_the_page_where_its_users_look() -> None:
    ours = Flask("ours")
    ours.register_blueprint(cli.commands)
    documented = {f"| `REBIND_{setting}` |": README for setting in SETTINGS}
    documented |= {f"| `{field}` |": CONTRACT for field in RebindRequestSchema().fields}
    documented |= {f"`{name}=": CONTRACT for name in RebindQuerySchema().fields}
    documented |= {f"| {status} |": CONTRACT for status in RESPONSES if status != "200"}
    documented |= {f"`{name}`": CONTRACT for each in RESPONSES.values() for name in each.get("headers", {})}
    documented |= {"header `Idempotency-Key`": CONTRACT}
    documented |= {f"flask {command}": ALL for command in ours.cli.commands}
    assert [name for name, page in documented.items() if name not in page] == []
    known = {option for command in ours.cli.commands.values() for option in options(command)}
    assert known - {*re.findall(r"--[\w-]+", ALL)} == set()


def test_what_is_cited_of_the_contract_is_there() -> None:
    titles = re.findall("^## (.*)$", CONTRACT, re.MULTILINE)
    text = " ".join(" ".join(file.read_text() for file in [*CODE, *PAGES]).split())
    cited = re.findall(r'contract\.md\)?, ((?:"[A-Z][^"]+"(?:, and | and |, )?)+)', text)
    assert {title for titles in cited for title in re.findall('"([^"]+)"', titles)} - {*titles} == set()


def test_no_page_names_a_module_that_is_not_there() -> None:
    a_module = r"`((?:tests/|bench/|examples/)?\w+\.py)`"
    named = {name for page in PAGES for name in re.findall(a_module, page.read_text())}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
