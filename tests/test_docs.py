"""The README and the runbook: their commands run, and print what the documents say they print."""

import getpass
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Service, Start

PATIENCE = 300  # seconds for all commands of a document
MARK = "@@@"

# What is different each time, and what stands for it in both texts.
MASKS = [
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "TIME"),
    (r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", "DATE"),
    (r"(?<=[ ])\d+ +\d+[smhd]\b", "DUE  AGE"),  # one message more is due every 14 seconds
    (r"\b\d+ due\b", "N due"),
    (r'"(timestamp|created|key)": \d+', r'"\1": N'),
    (rf"\b(root|{re.escape(getpass.getuser())})\b", "USER"),
    (r"[ ]{2,}", "  "),
]

Block = tuple[str, str]
"""A command, and what it prints."""


def blocks(text: str) -> Iterator[Block]:
    """The commands of a document's console blocks; those of root, after a `#`, are for a host that is set up."""
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
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


def run_all(commands: list[str], service: Service, folder: Path) -> list[str]:
    """What each command prints, on standard output or error, in one shell beside a running service."""
    flask = f'#!/bin/sh\ncd {ROOT}\nexec {sys.executable} -m flask "$@"\n'
    for name in ("rebind", "flask"):
        (folder / name).write_text(flask)
        (folder / name).chmod(0o755)
    local = [one.replace(".venv/bin/flask", "flask").replace("localhost:8000", service.base[7:]) for one in commands]
    script = "".join(f"echo {MARK}\n{one}\n" for one in local)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash"],
        input=script,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.stdout.split(f"{MARK}\n")[1:]


NOT_RUN = ("make ",)  # it sets up an environment, and then serves until it is stopped


@pytest.mark.sqlite
@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("document", ["README.md", "docs/runbook.md"])
def test_every_command_prints_what_the_document_says(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str
) -> None:
    url = f"sqlite:///{tmp_path / 'queues.db'}"
    policy = tmp_path / "policy.py"
    policy.write_text(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0])
    monkeypatch.setenv("REBIND_POLICY", str(policy))
    monkeypatch.setenv("REBIND_DATABASE_URL", url)
    service = start(url=url)
    sample = subprocess.run([sys.executable, "examples/sample.py"], cwd=ROOT, capture_output=True, check=True).stdout
    load = [sys.executable, "-m", "flask", "load", "-"]
    subprocess.run(load, cwd=ROOT, input=sample, check=True)
    documented = [one for one in blocks((ROOT / document).read_text()) if not one[0].startswith(NOT_RUN)]
    printed = run_all([command for command, _ in documented], service, tmp_path)
    wrong = [(*one, out) for one, out in zip(documented, printed, strict=True) if not says(one[1], out)]
    assert wrong == []
