"""Tests of `flask log`, and of what all commands share. The others are in test_commands.py and test_loading.py."""

import json
import os
import pty
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from databases import run_sql
from factories import ask, message
from services import MIB, SITE_POLICY
from terminal import Command, Flask, peak
from waiting import until

import deliverylog
from queues import QueueRegistry


def reasons(output: str | bytes) -> list[str]:
    """Which rebinds the records of an output speak of."""
    contents = [json.loads(record)["response"]["content"] for record in output.splitlines()]
    return [content.rpartition(" ")[2] for content in contents]


# flask log


def test_log_prints_one_record_a_line_oldest_first(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message(id="a"), message(id="b", meta={"tenant": "münchen"})])
    for reason in ("first", "second"):
        ask(queues, reason=reason)
    status, output, error = flask("log")
    assert [json.loads(record) for record in output.splitlines()] == list(deliverylog.records(queues.database))
    assert reasons(output) == ["first", "first", "second", "second"]
    assert (status, output.isascii(), error) == (0, True, "")


def test_log_follows_what_is_written_later_until_ctrl_c(
    start_command: Command, queues: QueueRegistry, tmp_path: Path
) -> None:
    queues.load([message()])
    ask(queues, reason="before")
    output, errors = tmp_path / "output", tmp_path / "errors"
    with output.open("wb") as stdout, errors.open("wb") as stderr:
        process = start_command("log", "--follow", stdout=stdout, stderr=stderr)
    until(lambda: output.read_bytes().count(b"\n") == 1)
    ask(queues, reason="later")
    until(lambda: output.read_bytes().count(b"\n") == 2)
    ask(queues, reason="last")
    until(lambda: output.read_bytes().count(b"\n") == 3)
    assert reasons(output.read_bytes()) == ["before", "later", "last"]
    process.send_signal(signal.SIGINT)
    assert (process.wait(30), errors.read_text()) == (-signal.SIGINT, "")


@pytest.mark.parametrize("reader", ["a pipe", "a socket", "a terminal"])
def test_log_that_follows_ends_with_its_reader_though_there_is_nothing_to_print(
    start_command: Command, queues: QueueRegistry, reader: str
) -> None:
    """As when ssh is cut off. A process in a session of its own gets no SIGHUP."""
    queues.load([message()])
    ask(queues, reason="before")
    ours, its = opened(reader)
    process = start_command("log", "--follow", stdout=its, stderr=subprocess.PIPE, start_new_session=True)
    os.close(its)
    assert reasons(os.read(ours, 65536)) == ["before"]
    os.close(ours)
    assert process.wait(30) == 1
    assert process.stderr is not None
    assert process.stderr.read() == b""


def opened(kind: str) -> tuple[int, int]:
    """Both ends of a way for a standard output: the reader's, and the writer's."""
    if kind == "a pipe":
        return os.pipe()
    if kind == "a terminal":
        return pty.openpty()
    ours, its = socket.socketpair()
    return ours.detach(), its.detach()


@pytest.mark.sqlite
def test_log_follows_from_a_record_that_is_not_there_yet(
    start_command: Command, queues: QueueRegistry, tmp_path: Path
) -> None:
    queues.load([message()])
    ask(queues, reason="1")
    (record,) = deliverylog.records(queues.database)
    output = tmp_path / "output"
    with output.open("wb") as stdout:
        start_command("log", "--follow", "--after", str(record["key"] + 1), stdout=stdout)
    for reason in ("2", "3", "4"):
        ask(queues, reason=reason)
    until(lambda: output.read_bytes().count(b"\n") == 2)
    assert reasons(output.read_bytes()) == ["3", "4"]


# wherever they run


@pytest.mark.sqlite
def test_what_is_not_ascii_is_printed_in_the_c_locale(shell: Flask, queues: QueueRegistry) -> None:
    queues.load([message(id="ü", meta={"queue": "bücher.example"})])
    ask(queues, reason="größer")
    status, output, error = shell("queues", LC_ALL="C")
    assert (status, output.splitlines()[1].split()[0], error) == (0, "bücher.example", "")
    status, output, error = shell("log", LC_ALL="C")
    assert (status, reasons(output), error) == (0, ["größer"], "")
    assert shell("load", "größer", LC_ALL="C") == (1, "", "Error: [Errno 2] No such file or directory: 'größer'\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["log", "messages"])
def test_more_records_or_messages_need_no_more_memory(queues: QueueRegistry, url: str, command: str) -> None:
    """Each is 1 KiB at least, with its metadata."""

    def add(number: int) -> None:
        queues.load(message(meta={"note": "x" * 1000}) for _ in range(number))
        ask(queues, reason="r")

    add(1000)
    few = peak(url, command)
    add(10_000)
    assert peak(url, command) - few < 4 * 1024


@pytest.mark.slow
def test_large_contents_are_not_all_in_memory_at_once_though_their_sizes_are_not_known(
    queues: QueueRegistry, url: str
) -> None:
    queues.load(message(content=b"x" * MIB) for _ in range(200))
    run_sql(url, "UPDATE messages SET size = 0")
    assert peak(url, "messages", "--content") < 200 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("command", ["log", "messages", "rebind"])
def test_large_records_or_messages_are_not_all_in_memory_at_once(
    queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    queues.load(message(meta={"note": "x" * MIB}) for _ in range(200))
    if command == "log":
        ask(queues, reason="large")
    event = ["--everything", "--reason", "r", "--trigger-rebind-event", "--set", "mark=x"]
    monkeypatch.setenv("REBIND_POLICY", SITE_POLICY)
    assert peak(url, command, *(event if command == "rebind" else ())) < 200 * 1024
