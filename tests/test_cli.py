"""Tests of the command line: what `flask load` takes and refuses, and what `flask queues` and `flask log` print."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, ask, contents, message, nothing_changes, stored, until

from app import create_app
from queues import QueueRegistry

Flask = Callable[..., tuple[int, str, str]]
Command = Callable[..., subprocess.Popen[bytes]]
PROGRAM = [sys.executable, "-m", "flask"]
# The same, and at its end the most memory that it had, in KiB. (What a parent learns, ru_maxrss, is at least its own.)
MEASURED = """
import atexit, re, sys
from pathlib import Path
from flask.cli import main
atexit.register(lambda: sys.stderr.write(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
main()
"""


@pytest.fixture
def flask(queues: QueueRegistry, url: str) -> Flask:
    """Run a command of the service's in this process: its exit status, standard output and standard error."""
    runner = create_app({"DATABASE_URL": url}).test_cli_runner()

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        result = runner.invoke(args=[str(argument) for argument in arguments])
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def shell(queues: QueueRegistry, url: str) -> Flask:
    """Run a command of the service's as a shell does, with `stdin` and variables of the environment."""

    def run(*arguments: str | Path, stdin: str = "", **environment: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            input=stdin.encode(),
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"REBIND_DATABASE_URL": url} | environment,
            timeout=60,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return run


@pytest.fixture
def start_command(queues: QueueRegistry, url: str) -> Iterator[Command]:
    """Start a command of the service's; it does not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
        environment = os.environ | {"REBIND_DATABASE_URL": url}
        started.append(subprocess.Popen([*PROGRAM, *map(str, arguments)], cwd=ROOT, env=environment, **streams))
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.communicate()


def answer(id: Any = "a", **fields: Any) -> dict[str, Any]:
    """What inspect-message answers; a field that is `...` is left out."""
    fields = {"sender": "news@acme.example", "recipient": "ada@example.com", "meta": {}, "data": "Hello"} | fields
    return {"id": id, "message": {name: value for name, value in fields.items() if value is not ...}}


def queue_answer(*answers: dict[str, Any]) -> dict[str, Any]:
    """What inspect-sched-q answers."""
    return {
        "queue_name": "example.com",
        "messages": [*answers],
        "num_scheduled": len(answers),
        "queue_config": {"retry_interval": "20m", "max_age": "7days", "egress_pool": None},
        "delayed_metric": 0,
        "now": "2025-08-01T12:00:00Z",
        "last_changed": "2025-08-01T11:00:00Z",
    }


def line(*arguments: Any, **fields: Any) -> str:
    """That of `answer`, on one line."""
    return json.dumps(answer(*arguments, **fields)) + "\n"


def deep(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


def ids(url: str) -> list[str]:
    """The ids of the messages in the store, in the order in which they were loaded."""
    return [row["id"] for row in stored(url)]


def rebind(queues: QueueRegistry, reason: str) -> None:
    """Write a record for each message."""
    ask(queues, reason=reason)


def written(queues: QueueRegistry, *reasons: str) -> int:
    """Load a message and write records of it with these reasons. Returns the first one's key."""
    queues.load([message()])
    for reason in reasons:
        rebind(queues, reason)
    return next(int(record["key"]) for record in queues.records())


def reasons(output: str | bytes) -> list[str]:
    """Which rebinds the records of an output speak of."""
    contents = [json.loads(record)["response"]["content"] for record in output.splitlines()]
    return [content.rpartition(" ")[2] for content in contents]


# flask load: what it takes

A, B = answer("a"), answer("b")
SCHEDULING = {"restriction": {"days_of_week": ["Mon"], "timezone": "UTC", "start": "09:00:00", "end": "17:00:00"}}


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("contents", "loaded"),
    [
        pytest.param("", [], id="an empty file"),
        pytest.param("\n \n", [], id="nothing but blank lines"),
        pytest.param(json.dumps(A), ["a"], id="one answer without an end of line"),
        pytest.param(json.dumps(A, indent=2), ["a"], id="one answer over many lines"),
        pytest.param("\n\n" + json.dumps(A, indent="\t") + "\n\n", ["a"], id="that between blank lines"),
        pytest.param(f"{json.dumps(A)}\n{json.dumps(B)}\n", ["a", "b"], id="one a line"),
        pytest.param(f"\n{json.dumps(A)}\n\n  \n{json.dumps(B)}\n\n", ["a", "b"], id="one a line, with blank lines"),
        pytest.param(f"{json.dumps(A)} \r\n{json.dumps(B)}\r\n", ["a", "b"], id="one a line, with CRLF"),
        pytest.param(json.dumps(queue_answer(A, B)), ["a", "b"], id="a queue"),
        pytest.param(json.dumps(queue_answer(A, B), indent=2), ["a", "b"], id="a queue over many lines"),
        pytest.param(json.dumps(queue_answer()), [], id="an empty queue"),
        pytest.param(f"{json.dumps(queue_answer(A))}\n{json.dumps(B)}", ["a", "b"], id="a queue, then a message"),
        pytest.param(json.dumps(queue_answer(answer(scheduling=SCHEDULING))), ["a"], id="hours of delivery"),
        pytest.param(line(num_attempts=None, scheduling=None, due=None, data=None), ["a"], id="nulls"),
        pytest.param(line(sender=""), ["a"], id="a bounce, which has no sender"),
        pytest.param(line(meta={"a": deep(200)}), ["a"], id="metadata as deep as it may be"),
    ],
)
def test_load_takes_what_kumomta_answers(
    flask: Flask, url: str, tmp_path: Path, contents: str, loaded: list[str]
) -> None:
    file = tmp_path / "messages.json"
    file.write_text(contents)
    assert flask("load", file) == (0, f"{len(loaded)} messages loaded, 0 discarded\n", "")
    assert ids(url) == loaded


def test_every_field_of_an_answer_is_kept(flask: Flask, url: str, tmp_path: Path) -> None:
    file = tmp_path / "message.json"
    fields = {
        "sender": "bounce@acmé.example",
        "recipient": ["Ada@Bücher.example", "bela@example.org"],
        "meta": {"campaign": "spring", "tenant": "acme", "nested": {"list": [1, 2.5, True, None, "ü\n"]}},
        "data": "Subject: Grüße\r\n\r\nHello\0\r\n",
        "due": "2025-08-01T14:00:00.5+02:00",
        "num_attempts": 3,
    }
    file.write_text(json.dumps(answer("1d98076abbbc11ed940250ebf67f93bd", **fields)))
    assert flask("load", file) == (0, "1 messages loaded, 0 discarded\n", "")
    (row,) = stored(url)
    assert row.pop("created") == 1678065214.3101807, "as the id says, which KumoMTA made: a UUID of version 1"
    content = "Subject: Grüße\r\n\r\nHello\0\r\n".encode()
    assert row == {
        "id": "1d98076abbbc11ed940250ebf67f93bd",
        "sender": "bounce@acmé.example",
        "recipient": ["Ada@Bücher.example", "bela@example.org"],
        "domain": "bücher.example",
        "queue": "spring:acme@bücher.example",
        "meta": fields["meta"],
        "size": len(content),
        "due": 1754049600.5,
        "num_attempts": 3,
    }
    assert contents(url) == {"1d98076abbbc11ed940250ebf67f93bd": content}


@pytest.mark.sqlite
def test_what_an_answer_leaves_out_is_empty_and_it_is_due_at_once(flask: Flask, url: str, tmp_path: Path) -> None:
    file = tmp_path / "message.json"
    file.write_text(line(meta=..., data=...))
    assert flask("load", file) == (0, "1 messages loaded, 0 discarded\n", "")
    (row,) = stored(url)
    assert row.pop("created") == row.pop("due") > 1.7e9
    assert row == {
        "id": "a",
        "sender": "news@acme.example",
        "recipient": "ada@example.com",
        "domain": "example.com",
        "queue": "example.com",
        "meta": {},
        "size": 0,
        "num_attempts": 0,
    }


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("due", "seconds"),
    [
        pytest.param("2025-08-01T12:00:00Z", 1754049600, id="UTC"),
        pytest.param("2025-08-01T12:00:00.123456789Z", 1754049600.1234567, id="nanoseconds, as KumoMTA writes them"),
        pytest.param("2025-08-01t12:00:00z", 1754049600, id="in lower case"),
        pytest.param("2025-08-01 12:00:00Z", 1754049600, id="a space for the T"),
        pytest.param("1990-12-31T23:59:60Z", 662688000, id="a leap second"),
        pytest.param("2025-08-01T05:00:00-07:00", 1754049600, id="an offset"),
        pytest.param("1969-12-31T23:59:59Z", -1, id="before 1970"),
        pytest.param("0001-01-01T00:00:00Z", -62135596800, id="the earliest"),
        pytest.param("9999-12-31T23:59:59Z", 253402300799, id="the latest"),
    ],
)
def test_due_is_an_rfc_3339_time(flask: Flask, url: str, tmp_path: Path, due: str, seconds: float) -> None:
    file = tmp_path / "message.json"
    file.write_text(line(due=due))
    assert flask("load", file) == (0, "1 messages loaded, 0 discarded\n", "")
    assert [row["due"] for row in stored(url)] == [seconds]


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("due", "seconds"), [(None, 1754049600), ("2025-08-02T12:00:00Z", 1754136000)], ids=["it alone", "beside due"]
)
def test_a_message_without_due_is_due_at_its_first_attempt(
    flask: Flask, url: str, tmp_path: Path, due: str | None, seconds: float
) -> None:
    file = tmp_path / "message.json"
    file.write_text(line(due=due, scheduling=SCHEDULING | {"first_attempt": "2025-08-01T12:00:00Z"}))
    assert flask("load", file) == (0, "1 messages loaded, 0 discarded\n", "")
    assert [row["due"] for row in stored(url)] == [seconds]


@pytest.mark.sqlite
def test_a_message_for_the_queue_null_is_discarded_and_counted(flask: Flask, url: str, tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    file.write_text(line("a", meta={"queue": "null"}) + line("b") + line("c", recipient="ada@NULL"))
    assert flask("load", file) == (0, "1 messages loaded, 2 discarded\n", "")
    assert ids(url) == ["b"]


@pytest.mark.sqlite
def test_several_files_are_loaded_in_their_order(flask: Flask, url: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two", "three")]
    for file, lines in zip(files, [line("a") + line("b"), "", json.dumps(answer("c"), indent=2)], strict=True):
        file.write_text(lines)
    assert flask("load", *files) == (0, "3 messages loaded, 0 discarded\n", "")
    assert ids(url) == ["a", "b", "c"]


@pytest.mark.sqlite
def test_a_pipe_is_loaded_in_silence(shell: Flask, url: str) -> None:
    assert shell("load", "-", stdin=line("a") + line("b")) == (0, "2 messages loaded, 0 discarded\n", "")
    assert ids(url) == ["a", "b"]


# flask load: what it refuses


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        pytest.param(5, "Invalid input type.", id="no object"),
        pytest.param({"id": "a"}, "message: Missing data for required field.", id="no message"),
        pytest.param(A | {"a\n\x1b[31m\ud800": 1}, r"a\n\x1b[31m\ud800: Unknown field.", id="an unprintable field"),
        pytest.param(answer(meta={"a": ["\0"]}), "message.meta: a string must not contain NUL", id="a wrong value"),
        pytest.param(
            answer(meta={"campaign": "ü" * 500, "tenant": "ü" * 500}),
            "message.meta: the name of its queue is longer than 2000 bytes",
            id="a long name",
        ),
        pytest.param(
            answer(data="\udc80"),
            r"message.data: 'utf-8' codec can't encode character '\udc80' in position 0: surrogates not allowed",
            id="data surrogate",
        ),
        pytest.param(
            answer(5, recipient=5),
            "id: Not a valid string.; message.recipient: expected a string, got int",
            id="several fields",
        ),
        pytest.param({"messages": {"0": A}}, "messages: Not a valid list.", id="an object for a list"),
        pytest.param(queue_answer(A, answer(5)), "messages.1.id: Not a valid string.", id="an answer in a queue"),
        pytest.param(
            {"messages": [0] * 12},
            "; ".join(f"messages.{number}: Invalid input type." for number in range(5)) + "; and 7 more",
            id="a queue in which all is wrong",
        ),
        pytest.param({"messages": None}, "messages: Field may not be null.", id="no list"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(
    flask: Flask, queues: QueueRegistry, url: str, tmp_path: Path, wrong: Any, reason: str
) -> None:
    queues.load([message()])
    file = tmp_path / "messages.jsonl"
    file.write_text(f"{line('x')}\n{json.dumps(wrong)}\n{line('y')}")
    with nothing_changes(url):
        assert flask("load", file) == (1, "", f"Error: {file}:3: {reason}\n")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        pytest.param(b"hello", "Expecting value: line 3 column 1 (char 0)", id="no JSON"),
        pytest.param(
            line().encode()[:-2], "Expecting ',' delimiter: line 3 column 116 (char 115)", id="one brace short"
        ),
        pytest.param(line().encode()[:-1] * 2, "Extra data: line 3 column 117 (char 116)", id="two on one line"),
        pytest.param(b'{"a": NaN}', "NaN is not a number in JSON", id="NaN"),
        pytest.param(b'{"a": "\xff"}', "it is not UTF-8: invalid start byte at byte 7", id="bad UTF-8"),
    ],
)
def test_a_line_that_is_no_json_is_named(
    flask: Flask, queues: QueueRegistry, url: str, tmp_path: Path, wrong: bytes, reason: str
) -> None:
    queues.load([message()])
    file = tmp_path / "messages.jsonl"
    file.write_bytes(line("x").encode() + b"\n" + wrong + b"\n" + line("y").encode())
    with nothing_changes(url):
        assert flask("load", file) == (1, "", f"Error: {file}:3: this is not JSON that can be read: {reason}\n")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        pytest.param(
            "\n" + json.dumps(A, indent=2)[:-1],
            "2: this is not JSON that can be read: Expecting ',' delimiter: line 9 column 4 (char 140)",
            id="cut short",
        ),
        pytest.param(
            "\n" + json.dumps(answer(sender=5), indent=2), "2: message.sender: Not a valid string.", id="a wrong field"
        ),
        pytest.param(
            json.dumps(A, indent=2) + "\n" + json.dumps(B, indent=2),
            "1: this is not JSON that can be read: Extra data: line 10 column 1 (char 143)",
            id="two",
        ),
    ],
)
def test_an_answer_over_many_lines_is_named_by_its_first(
    flask: Flask, url: str, tmp_path: Path, contents: str, reason: str
) -> None:
    file = tmp_path / "message.json"
    file.write_text(contents)
    assert flask("load", file) == (1, "", f"Error: {file}:{reason}\n")
    assert stored(url) == []


@pytest.mark.sqlite
@pytest.mark.parametrize("depth", [330, 900, 950, 980, 2000])
@pytest.mark.parametrize("field", ["recipient", "meta", "scheduling", "other"])
def test_no_nesting_is_too_deep_for_an_error_message(flask: Flask, tmp_path: Path, field: str, depth: int) -> None:
    file = tmp_path / "message.json"
    file.write_text(line(**{field: 0}).replace(f'"{field}": 0', f'"{field}": {"[" * depth + "]" * depth}'))
    status, _, error = flask("load", file)
    assert (status, len(error.splitlines())) == (1, 1)


@pytest.mark.sqlite
@pytest.mark.parametrize("lines", [0, 499, 1200])
def test_an_id_twice_in_one_file_is_named(
    flask: Flask, queues: QueueRegistry, url: str, tmp_path: Path, lines: int
) -> None:
    queues.load([message()])
    file = tmp_path / "messages.jsonl"
    file.write_text(line() + "".join(line(f"b{number}") for number in range(lines)) + line())
    with nothing_changes(url):
        assert flask("load", file) == (1, "", f"Error: {file}:{lines + 2}: message id a already exists\n")


@pytest.mark.sqlite
def test_an_id_twice_in_one_answer_is_named(flask: Flask, url: str, tmp_path: Path) -> None:
    file = tmp_path / "queue.json"
    file.write_text(json.dumps(queue_answer(A, B, A)))
    assert flask("load", file) == (1, "", f"Error: {file}:1: message id a already exists\n")
    assert stored(url) == []


@pytest.mark.sqlite
def test_an_id_that_is_there_already_is_named(flask: Flask, queues: QueueRegistry, url: str, tmp_path: Path) -> None:
    queues.load([message(id="here")])
    file = tmp_path / "messages.jsonl"
    file.write_text("".join(line(f"b{number}") for number in range(600)) + "\n" + line("here"))
    with nothing_changes(url):
        assert flask("load", file) == (1, "", f"Error: {file}:602: message id here already exists\n")


@pytest.mark.sqlite
def test_an_id_that_breaks_its_line_is_escaped(flask: Flask, tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    file.write_text(2 * line("ü\n\x1b[2J"))
    assert flask("load", file) == (1, "", rf"Error: {file}:2: message id ü\n\x1b[2J already exists" + "\n")


@pytest.mark.sqlite
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_of_several_files_all_are_loaded_or_none(flask: Flask, url: str, tmp_path: Path, wrong: int) -> None:
    files = [tmp_path / name for name in ("one", "two", "three")]
    for number, file in enumerate(files):
        file.write_text(line(number if number == wrong else str(number)))
    assert flask("load", *files) == (1, "", f"Error: {files[wrong]}:1: id: Not a valid string.\n")
    assert stored(url) == []


@pytest.mark.sqlite
def test_an_id_that_is_in_two_files_is_named_in_the_second(flask: Flask, url: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two")]
    for file in files:
        file.write_text(line())
    assert flask("load", *files) == (1, "", f"Error: {files[1]}:1: message id a already exists\n")
    assert stored(url) == []


@pytest.mark.sqlite
def test_a_wrong_line_of_a_pipe_is_named(shell: Flask, url: str) -> None:
    assert shell("load", "-", stdin=line("a") + line(5)) == (1, "", "Error: <stdin>:2: id: Not a valid string.\n")
    assert stored(url) == []


@pytest.mark.sqlite
def test_a_file_that_is_not_there_is_an_error_before_anything_is_loaded(flask: Flask, url: str, tmp_path: Path) -> None:
    file, missing = tmp_path / "messages.jsonl", tmp_path / "missing"
    file.write_text(line())
    usage = "Usage: app load [OPTIONS] FILES...\nTry 'app load --help' for help.\n\n"
    error = f"Error: Invalid value for 'FILES...': '{missing}': No such file or directory\n"
    assert flask("load", file, missing) == (2, "", usage + error)
    assert stored(url) == []


@pytest.mark.slow
@pytest.mark.sqlite
def test_ctrl_c_loads_nothing(start_command: Command, url: str) -> None:
    process = start_command("load", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    # More than a pipe holds: when it is written, it is being read.
    process.stdin.write("".join(line(f"a{number}", data="x" * 1000) for number in range(1000)).encode())
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"\nAborted!\n")
    assert process.returncode == 1
    assert stored(url) == []


# flask load: the progress bar


def on_a_terminal(start_command: Command, *arguments: str | Path, stdin: bytes = b"") -> Any:
    """What a command prints on a pipe, and what on the terminal that is its standard error."""
    terminal, its_end = pty.openpty()
    process = start_command(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=its_end)
    os.close(its_end)
    output, _ = process.communicate(stdin, timeout=60)
    shown = b""
    while part := read_terminal(terminal):
        shown += part
    os.close(terminal)
    return output.decode(), shown.decode()


def read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # EIO: Linux's end of a terminal
        return b""


@pytest.mark.slow
@pytest.mark.sqlite
def test_a_terminal_shows_that_files_are_loaded_and_how_much_of_them(start_command: Command, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two")]
    for file in files:
        file.write_text(line(file.name, data="x" * 2**17))
    output, shown = on_a_terminal(start_command, "load", *files)
    assert output == "2 messages loaded, 0 discarded\n"
    assert "loading" in shown
    assert "100%" in shown


@pytest.mark.slow
@pytest.mark.sqlite
def test_a_terminal_shows_that_a_pipe_is_loaded(start_command: Command) -> None:
    output, shown = on_a_terminal(start_command, "load", "-", stdin=line().encode())
    assert output == "1 messages loaded, 0 discarded\n"
    assert "loading" in shown
    assert "%" not in shown, "nobody knows how much will come"


@pytest.mark.slow
@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        pytest.param(line(5), "1: id: Not a valid string.", id="a wrong field"),
        pytest.param(2 * line(), "2: message id a already exists", id="an id twice"),
    ],
)
def test_an_error_has_a_line_of_its_own_below_the_bar(
    start_command: Command, tmp_path: Path, contents: str, reason: str
) -> None:
    file = tmp_path / "messages.jsonl"
    file.write_text(contents)
    output, shown = on_a_terminal(start_command, "load", file)
    assert output == ""
    assert shown.endswith(f"\r\nError: {file}:{reason}\r\n")


# flask queues


def fill(queues: QueueRegistry) -> None:
    """Four queues, one with messages that are not due."""
    far = 4e9
    queues.load(
        [
            message(meta={"campaign": "spring", "tenant": "acme"}),
            message(meta={"campaign": "spring", "tenant": "acme"}, due=far),
            message(meta={"campaign": "spring", "tenant": "acme"}),
            message("bela@bücher.example", meta={"tenant": "acme", "routing_domain": "relay.example:25"}, due=far),
            message(meta={"campaign": "spring"}),
            message("chidi@example.org"),
        ]
    )


def test_queues_are_listed_as_a_table(flask: Flask, queues: QueueRegistry) -> None:
    fill(queues)
    assert flask("queues") == (
        0,
        "queue                                 campaign  tenant  domain          routing_domain    messages  due\n"
        "acme@bücher.example!relay.example:25  -         acme    bücher.example  relay.example:25  1         0\n"
        "example.org                           -         -       example.org     -                 1         1\n"
        "spring:@example.com                   spring            example.com     -                 1         1\n"
        "spring:acme@example.com               spring    acme    example.com     -                 3         2\n",
        "",
    )


@pytest.mark.sqlite
def test_queues_are_listed_as_json(flask: Flask, queues: QueueRegistry) -> None:
    fill(queues)
    status, output, error = flask("queues", "--json")
    columns = ("queue", "campaign", "tenant", "domain", "routing_domain", "messages", "due")
    rows: list[tuple[Any, ...]] = [
        ("acme@bücher.example!relay.example:25", None, "acme", "bücher.example", "relay.example:25", 1, 0),
        ("example.org", None, None, "example.org", None, 1, 1),
        ("spring:@example.com", "spring", "", "example.com", None, 1, 1),
        ("spring:acme@example.com", "spring", "acme", "example.com", None, 3, 2),
    ]
    assert [json.loads(row) for row in output.splitlines()] == [dict(zip(columns, row, strict=True)) for row in rows]
    assert (status, output.isascii(), error) == (0, True, "")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("options", "output"),
    [
        pytest.param([], "queue  campaign  tenant  domain  routing_domain  messages  due\n", id="a table"),
        pytest.param(["--json"], "", id="JSON"),
    ],
)
def test_no_queues_are_an_empty_list(flask: Flask, options: list[str], output: str) -> None:
    assert flask("queues", *options) == (0, output, "")


@pytest.mark.sqlite
def test_a_name_cannot_break_the_table_or_command_the_terminal(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message(meta={"queue": "a\n\x1b[2J"})])
    assert flask("queues") == (
        0,
        "queue       campaign  tenant  domain      routing_domain  messages  due\n"
        r"a\n\x1b[2J  -         -       a\n\x1b[2J  -               1         1" + "\n",
        "",
    )


# flask log


def test_log_prints_one_record_a_line_oldest_first(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message(id="a"), message(id="b", meta={"tenant": "münchen"})])
    for reason in ("first", "second"):
        rebind(queues, reason)
    status, output, error = flask("log")
    assert [json.loads(record) for record in output.splitlines()] == list(queues.records())
    assert reasons(output) == ["first", "first", "second", "second"]
    assert (status, output.isascii(), error) == (0, True, "")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("after", "left"),
    [
        pytest.param(0, ["1", "2", "3"], id="all"),
        pytest.param(1, ["2", "3"], id="all but one"),
        pytest.param(3, [], id="at the end"),
        pytest.param(4, [], id="beyond the end"),
    ],
)
def test_log_continues_after_a_key(flask: Flask, queues: QueueRegistry, after: int, left: list[str]) -> None:
    first = written(queues, "1", "2", "3")
    status, output, error = flask("log", "--after", str(first + after - 1))
    assert (status, reasons(output), error) == (0, left, "")


@pytest.mark.sqlite
def test_log_continues_after_a_key_that_is_as_large_as_there_is(flask: Flask, queues: QueueRegistry) -> None:
    written(queues, "1")
    assert flask("log", "--after", str(2**63 - 1)) == (0, "", "")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ("-1", "-1 is not in the range 0<=x<=9223372036854775807."),
        ("9223372036854775808", "9223372036854775808 is not in the range 0<=x<=9223372036854775807."),
        ("x", "'x' is not a valid integer range."),
    ],
    ids=["negative", "too large", "no number"],
)
def test_log_refuses_an_after_that_cannot_be_a_key(flask: Flask, after: str, reason: str) -> None:
    status, output, error = flask("log", f"--after={after}")
    assert (status, output) == (2, "")
    assert error.splitlines()[-1] == f"Error: Invalid value for '--after': {reason}"


@pytest.mark.slow
@pytest.mark.sqlite
def test_log_into_a_pipe_that_closes_ends_quietly(start_command: Command, queues: QueueRegistry) -> None:
    queues.load(message() for _ in range(1000))
    rebind(queues, "r")
    process = start_command("log", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert reasons(process.stdout.readline()) == ["r"]
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 1


def test_log_follows_what_is_written_later_until_ctrl_c(
    start_command: Command, queues: QueueRegistry, tmp_path: Path
) -> None:
    queues.load([message()])
    rebind(queues, "before")
    output, errors = tmp_path / "output", tmp_path / "errors"
    with output.open("wb") as stdout, errors.open("wb") as stderr:
        process = start_command("log", "--follow", stdout=stdout, stderr=stderr)
    until(lambda: output.read_bytes().count(b"\n") == 1)
    rebind(queues, "later")
    until(lambda: output.read_bytes().count(b"\n") == 2)
    rebind(queues, "last")
    until(lambda: output.read_bytes().count(b"\n") == 3)
    assert reasons(output.read_bytes()) == ["before", "later", "last"]
    process.send_signal(signal.SIGINT)
    assert (process.wait(30), errors.read_text()) == (-signal.SIGINT, "")


@pytest.mark.slow
@pytest.mark.sqlite
def test_log_follows_from_a_record_that_is_not_there_yet(
    start_command: Command, queues: QueueRegistry, tmp_path: Path
) -> None:
    first = written(queues, "1")
    output = tmp_path / "output"
    with output.open("wb") as stdout:
        start_command("log", "--follow", "--after", str(first + 1), stdout=stdout)
    for reason in ("2", "3", "4"):
        rebind(queues, reason)
    until(lambda: output.read_bytes().count(b"\n") == 2)
    assert reasons(output.read_bytes()) == ["3", "4"]


# wherever they run


@pytest.mark.slow
@pytest.mark.sqlite
def test_what_is_not_ascii_is_printed_in_the_c_locale(shell: Flask, queues: QueueRegistry) -> None:
    queues.load([message(id="ü", meta={"queue": "bücher.example"})])
    rebind(queues, "größer")
    assert shell("queues", LC_ALL="C") == (
        0,
        "queue           campaign  tenant  domain          routing_domain  messages  due\n"
        "bücher.example  -         -       bücher.example  -               1         1\n",
        "",
    )
    status, output, error = shell("log", LC_ALL="C")
    assert (status, reasons(output), error) == (0, ["größer"], "")
    assert shell("load", "-", stdin=line("ü"), LC_ALL="C") == (
        1,
        "",
        "Error: <stdin>:1: message id ü already exists\n",
    )


def out_of_reach(database: Path) -> None:
    database.unlink()
    database.mkdir()


def damaged(database: Path) -> None:
    database.write_bytes(b"no database" * 1000)


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        pytest.param(
            out_of_reach,
            "the database's file cannot be opened: {file}: unable to open",
            id="out of reach",
        ),
        pytest.param(damaged, "the file is damaged, or is not a database: file is not a database", id="damaged"),
    ],
)
@pytest.mark.parametrize("command", ["load", "queues", "log"])
def test_what_happens_to_the_database_is_an_error_of_one_line(
    tmp_path: Path, command: str, happens: Callable[[Path], None], reason: str
) -> None:
    database, file = tmp_path / "queues.db", tmp_path / "messages.jsonl"
    file.write_text(line())
    runner = create_app({"DATABASE_URL": f"sqlite:///{database}"}).test_cli_runner()
    happens(database)
    result = runner.invoke(args=[command, str(file)] if command == "load" else [command])
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert result.stderr.startswith(f"Error: {reason.format(file=database)}")


def peak(url: str, *arguments: str, **streams: Any) -> int:
    """The most memory that a command had, in KiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=ROOT,
        env=os.environ | {"REBIND_DATABASE_URL": url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
        timeout=120,
        **streams,
    )
    return int(done.stderr)


@pytest.mark.slow
def test_load_needs_no_more_memory_for_more_lines(tmp_path: Path) -> None:
    """One more KiB a line, which a message is at least, would be 16 MiB."""

    def loading(lines: int) -> int:
        text = line("%d", data="x" * 1000)
        program = f"for number in range({lines}): print({text!r} % number, end='')"
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as printing:
            return peak(f"sqlite:///{tmp_path / str(lines)}", "load", "-", stdin=printing.stdout)

    assert loading(20_000) - loading(4_000) < 6 * 1024


@pytest.mark.slow
def test_log_needs_no_more_memory_for_more_records(queues: QueueRegistry, url: str) -> None:
    """A record is 1 KiB at least, with its metadata."""
    queues.load(message(meta={"note": "x" * 1000}) for _ in range(1000))
    rebind(queues, "few")
    few = peak(url, "log")
    for _ in range(10):
        rebind(queues, "many")
    assert peak(url, "log") - few < 4 * 1024
