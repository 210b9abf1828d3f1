"""Tests of deploy/rebind, the command for the deployed host."""

import json
import os
import subprocess
import sys
from getpass import getuser
from pathlib import Path

import pytest
from services import ROOT

MESSAGE = '{"id": "a", "message": {"sender": "a@example.com", "recipient": "b@example.com"}}'


@pytest.fixture
def rebind(tmp_path: Path) -> Path:
    """The script, with the places of this checkout; without root it cannot become another user, and stays this one."""
    script = (ROOT / "deploy" / "rebind").read_text()
    for shipped, here in {
        "/etc/rebind/rebind.env": str(tmp_path / "rebind.env"),
        "/opt/rebind": str(ROOT),
        ".venv/bin/flask": f"{sys.executable} -m flask",
        "runuser -u rebind --": f"runuser -u {getuser()} --" if os.geteuid() == 0 else "",
    }.items():
        assert shipped in script
        script = script.replace(shipped, here)
    file = tmp_path / "rebind"
    file.write_text(script)
    file.chmod(0o755)
    return file


def run(script: Path, *arguments: str, stdin: str = "", **environment: str) -> str:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("REBIND_")} | environment
    done = subprocess.run([script, *arguments], input=stdin, env=settings, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("quote", ["", "'", '"'], ids=["bare", "single quotes", "double quotes"])
def test_it_has_the_settings_of_the_service_and_names_who_called_sudo(rebind: Path, tmp_path: Path, quote: str) -> None:
    """The file is systemd's: no shell expands it."""
    store = tmp_path / "$HOME & `id`.db"
    rebind.with_name("rebind.env").write_text(
        f"# The store:\n;REBIND_NOTHING=1\n  REBIND_DATABASE_URL={quote}sqlite:///{store}{quote}\n"
        f"OTHER=1\nREBIND_BUSY_TIMEOUT={quote}5{quote}"
    )
    assert run(rebind, "load", "-", stdin=MESSAGE) == "1 message loaded, 1 of them without content, 0 discarded\n"
    assert (store.exists(), store.stat().st_mode & 0o777) == (True, 0o600)
    run(rebind, "rebind", "--everything", "--reason", "all of it", SUDO_USER="ada")
    (row,) = run(rebind, "history", "--json").splitlines()
    assert (json.loads(row)["actor"], json.loads(row)["reason"]) == ("ada", "all of it")
