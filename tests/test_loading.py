"""Tests of `flask load`: what it takes and refuses, what becomes of it in the store, and when it locks the store."""

import json
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from databases import contents, locked, logged, nothing_changes, run_sql, stored
from factories import ask, message
from terminal import Command, Flask, on_a_terminal, peak

from moving import BATCH
from queues import QueueRegistry
from schemas import NotJSON, json_documents

Load = Callable[[str | bytes], tuple[int, str, str]]
ID = "1d98076abbbc11ed940250ebf67f93bd"  # as KumoMTA's are: a UUID of version 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "messages.json"


@pytest.fixture
def load(flask: Flask, file: Path) -> Load:
    """`flask load` of a file with these contents. What it prints has FILE for the file's name."""

    def run(contents: str | bytes) -> tuple[int, str, str]:
        file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        status, output, error = flask("load", file)
        return status, output, error.replace(str(file), "FILE")

    return run


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
    return [row["id"] for row in stored(url)]


def loaded(count: int, rest: str = "0 discarded") -> tuple[int, str, str]:
    """The outcome of a load of so many messages."""
    return 0, f"{count} message{'' if count == 1 else 's'} loaded, {rest}\n", ""


def refused(reason: str) -> tuple[int, str, str]:
    """The outcome of a load that is refused."""
    return 1, "", f"Error: {reason}\n"


# What a file may look like

A, B = answer("a"), answer("b")
ONE_LINE = json.dumps(A)
PRETTY = json.dumps(A, indent=2)
PRETTY_B = json.dumps(queue_answer(B), indent=2)

FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "an empty file": ("", []),
    "nothing but blank lines": ("\n \r\n\t\n", []),
    "one answer without an end of line": (ONE_LINE, ["a"]),
    "one a line": (f"{ONE_LINE}\n{json.dumps(B)}\n", ["a", "b"]),
    "one a line, with CRLF": (f"{ONE_LINE} \r\n{json.dumps(B)}\r\n", ["a", "b"]),
    "one a line, with blank lines": (f"\n{ONE_LINE}\n\n  \n{json.dumps(B)}\n\n", ["a", "b"]),
    "two on one line": (f"{ONE_LINE} {json.dumps(B)}", ["a", "b"]),
    "two without anything between them": (f"{ONE_LINE}{json.dumps(B)}", ["a", "b"]),
    "one over many lines": (f"\n\n{PRETTY}\n\n", ["a"]),
    "two over many lines, as kcli prints them": (f"{PRETTY}\n{PRETTY_B}\n", ["a", "b"]),
    "two over many lines, without a line's end between them": (f"{PRETTY}{PRETTY_B}", ["a", "b"]),
    "one on a line, then one over many": (f"{ONE_LINE}\n{PRETTY_B}", ["a", "b"]),
    "one over many lines, then one on a line": (f"{PRETTY_B}\n{ONE_LINE}", ["a", "b"]),
    "a value a line": (PRETTY.replace(" ", "\n"), ["a"]),
    "a byte order mark": (b"\xef\xbb\xbf" + PRETTY.encode(), ["a"]),
    "a queue": (json.dumps(queue_answer(A, B)), ["a", "b"]),
    "an empty queue": (json.dumps(queue_answer()), []),
    "a queue, then a message": (f"{json.dumps(queue_answer(A))}\n{json.dumps(B)}", ["a", "b"]),
    "more messages than are stored at once": (
        "".join(line(str(number)) for number in range(BATCH + 1)),
        [str(number) for number in range(BATCH + 1)],
    ),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
def test_a_file_holds_any_number_of_answers(load: Load, url: str, text: str | bytes, expected: list[str]) -> None:
    assert load(text) == loaded(len(expected))
    assert ids(url) == expected


@pytest.mark.sqlite
def test_several_files_are_loaded_together(flask: Flask, url: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two", "three")]
    for file, text in zip(files, [line("a") + line("b"), "", json.dumps(answer("c"), indent=2)], strict=True):
        file.write_text(text)
    assert flask("load", *files) == loaded(3)
    assert ids(url) == ["a", "b", "c"]


@pytest.mark.sqlite
def test_a_pipe_is_loaded_in_silence(shell: Flask, url: str) -> None:
    assert shell("load", "-", stdin=line("a") + line("b")) == loaded(2)
    assert ids(url) == ["a", "b"]


# What is stored


def test_every_field_of_an_answer_is_kept(load: Load, url: str) -> None:
    fields = {
        "sender": "bounce@acmé.example",
        "recipient": ["Ada@Bücher.example", "bela@example.org"],
        "meta": {"campaign": "spring", "tenant": "acme", "nested": {"list": [1, 2.5, True, None, "ü\n"]}},
        "data": "Subject: Grüße\r\n\r\nHello\0\r\n",
        "due": "2025-08-01T14:00:00.5+02:00",
        "num_attempts": 65535,
        "scheduling": {"dow": "Mon,Tue", "tz": "UTC", "start": "09:00:00", "end": "17:00:00", "first_attempt": None},
    }
    assert load(line(ID, **fields)) == loaded(1)
    content = "Subject: Grüße\r\n\r\nHello\0\r\n".encode()
    assert stored(url) == [
        {
            "id": ID,
            "sender": "bounce@acmé.example",
            "recipient": ["Ada@Bücher.example", "bela@example.org"],
            "domain": "bücher.example",
            "queue": "spring:acme@bücher.example",
            "meta": fields["meta"],
            "size": len(content),
            "created": pytest.approx(1678065214.31018, abs=1e-5),
            "due": 1754049600.5,
            "num_attempts": 65535,
        }
    ]
    assert contents(url) == {ID: content}


@pytest.mark.parametrize("nothing", [..., None], ids=["missing", "null"])
def test_what_may_be_missing_may_be_null(load: Load, url: str, nothing: Any) -> None:
    text = line(meta=..., data=nothing, due=nothing, num_attempts=nothing, scheduling=nothing)
    start = time.time()
    assert load(text) == loaded(1, "1 of them without content, 0 discarded")
    (row,) = stored(url)
    assert start <= row["created"] == row["due"] <= time.time()
    assert row == row | {"queue": "example.com", "meta": {}, "size": 0, "num_attempts": 0}
    assert contents(url) == {"a": b""}


def test_messages_without_content_and_discarded_ones_are_counted(load: Load, url: str) -> None:
    texts = [line("a"), line("b", data=...), line("c", data=..., meta={"queue": "null"}), line("d", recipient="x@NULL")]
    assert load("".join(texts)) == loaded(2, "1 of them without content, 2 discarded")
    assert ids(url) == ["a", "b"]


@pytest.mark.parametrize("field", ["due", "first_attempt"])
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        pytest.param("2025-08-01T12:00:00Z", 1754049600, id="UTC"),
        pytest.param("2030-01-01t00:00:00z", 1893456000, id="small letters"),
        pytest.param("2025-08-01 12:00:00Z", 1754049600, id="a space"),
        pytest.param("2025-08-01T12:00:00.123456789Z", 1754049600.1234567, id="nanoseconds, as KumoMTA writes them"),
        pytest.param("2025-08-01T05:00:00-07:00", 1754049600, id="an offset"),
        pytest.param("2025-08-01T12:00:00-00:00", 1754049600, id="an unknown offset"),
        pytest.param("1990-12-31T23:59:60Z", 662688000, id="a leap second"),
        pytest.param("1990-12-31T15:59:60.5-08:00", 662688000.5, id="a leap second elsewhere"),
        pytest.param("1969-12-31T23:59:58.75Z", -1.25, id="before 1970"),
        pytest.param("0001-01-01T00:00:00Z", -62135596800, id="the earliest"),
        pytest.param("9999-12-31T23:59:59Z", 253402300799, id="the latest"),
    ],
)
def test_a_time_is_one_of_rfc_3339(load: Load, url: str, field: str, text: str, seconds: float) -> None:
    fields = {"due": text} if field == "due" else {"scheduling": {field: text}}
    assert load(line(**fields)) == loaded(1)
    assert [row["due"] for row in stored(url)] == [seconds]


@pytest.mark.sqlite
def test_due_takes_precedence_over_the_first_attempt(load: Load, url: str) -> None:
    text = line(due="1970-01-01T00:00:01Z", scheduling={"first_attempt": "1970-01-01T00:00:02Z"})
    assert load(text) == loaded(1)
    assert [row["due"] for row in stored(url)] == [1]


@pytest.mark.parametrize(
    ("id", "created"),
    [
        pytest.param(ID, 1678065214.31018, id="as KumoMTA writes it"),
        pytest.param("1D98076A-BBBC-11ED-9402-50EBF67F93BD", 1678065214.31018, id="with dashes, in capitals"),
        pytest.param("1d98076a-bbbc11ed940250ebf67f93bd", None, id="dashes elsewhere"),
        pytest.param("1d98076abbbc41ed940250ebf67f93bd", None, id="version 4"),
        pytest.param("1d98076abbbc11edc40250ebf67f93bd", None, id="another variant"),
        pytest.param("1d98076abbbc1fff940250ebf67f93bd", None, id="in the future"),
        pytest.param("1d98076abbbc1000940250ebf67f93bd", None, id="before 1970"),
        pytest.param("a", None, id="no UUID"),
    ],
)
def test_a_message_was_created_when_its_id_says(load: Load, url: str, id: str, created: float | None) -> None:
    start = time.time()
    assert load(line(id)) == loaded(1)
    (row,) = stored(url)
    if created is None:
        assert start <= row["created"] <= time.time()
    else:
        assert row["created"] == pytest.approx(created, abs=1e-5)


def test_records_hold_nothing_that_kumomta_could_not_read(queues: QueueRegistry, url: str) -> None:
    queues.load([message(id=name, meta={"reception_protocol": name}) for name in ("ESMTP", "HTTP")])
    queues.load([message(id="5", meta={"reception_protocol": 5})])
    run_sql(url, "UPDATE messages SET num_attempts = 70000 WHERE id = 'HTTP'")
    ask(queues)
    found = {record["id"]: (record["reception_protocol"], record["num_attempts"]) for record in logged(url)}
    assert found == {"ESMTP": ("ESMTP", 0), "HTTP": ("HTTP", 65535), "5": (None, 0)}


@pytest.mark.sqlite
def test_a_new_store_is_its_owners_alone(shell: Flask, tmp_path: Path) -> None:
    store = tmp_path / "new.db"
    new = {"REBIND_DATABASE_URL": f"sqlite:///{store}"}
    assert shell("load", "-", stdin=line(5), **new) == refused("<stdin>:1: id: Not a valid string.")
    assert not store.exists()
    assert shell("load", "-", stdin=line(), **new) == loaded(1)
    assert stat.S_IMODE(store.stat().st_mode) == 0o600


# What is refused

NO_TIME = "Not a time of RFC 3339, such as 2026-11-24T10:00:00Z."
NO_YEAR = "Not in the years 1 to 9999."
RANGE = "Must be greater than or equal to 0 and less than or equal to 65535."
ID_LENGTH = "not 1 to 2000 bytes long"

WRONG_FIELDS: dict[str, tuple[str, Any, str]] = {
    "sender null": ("sender", None, "Field may not be null."),
    "sender a number": ("sender", 5, "Not a valid string."),
    "sender with a NUL": ("sender", "\0", "a string must not contain NUL"),
    "recipient null": ("recipient", None, "Field may not be null."),
    "recipient missing": ("recipient", ..., "Missing data for required field."),
    "recipient an object": ("recipient", {"a@b": 1}, "expected a string, got dict"),
    "no recipients": ("recipient", [], "there is no recipient"),
    "no address": ("recipient", "ada", "'ada' is not an address (local@domain)"),
    "one recipient no address": ("recipient", ["a@b", "@b"], "'@b' is not an address (local@domain)"),
    "recipient with a surrogate": ("recipient", "a@\ud800", "a string must not contain a lone surrogate"),
    "meta null": ("meta", None, "Field may not be null."),
    "meta a list": ("meta", [], "Not a valid mapping type."),
    "meta with a NUL within": ("meta", {"a": [{"b": "\0"}]}, "a string must not contain NUL"),
    "meta with a surrogate for a key": ("meta", {"\ud800": 1}, "a string must not contain a lone surrogate"),
    "meta too deep": ("meta", {"a": deep(201)}, "nesting is deeper than 200"),
    "a long name": ("meta", {"queue": "ü" * 1001}, "the name of its queue is longer than 2000 bytes"),
    "a long name of parts": ("meta", {"campaign": "c" * 2000}, "the name of its queue is longer than 2000 bytes"),
    "data a number": ("data", 5, "Not a valid string."),
    "data with a surrogate": (
        "data",
        "\udc80",
        r"'utf-8' codec can't encode character '\udc80' in position 0: surrogates not allowed",
    ),
    "due without an offset": ("due", "2026-01-01T00:00:00", NO_TIME),
    "due without punctuation": ("due", "20261124T100000Z", NO_TIME),
    "due without seconds": ("due", "2026-11-24T10:00Z", NO_TIME),
    "due at 24:00": ("due", "2026-11-24T24:00:00Z", NO_TIME),
    "due on 30 February": ("due", "2026-02-30T10:00:00Z", NO_TIME),
    "due with a comma": ("due", "2026-11-24T10:00:00,5Z", NO_TIME),
    "due with a short offset": ("due", "2026-11-24T10:00:00+01", NO_TIME),
    "due with an Arabic fraction": ("due", "2026-11-24T10:00:00.\u0665Z", NO_TIME),
    "due in the midst of a leap second": ("due", "2026-11-24T10:00:60Z", NO_TIME),
    "due a number": ("due", 5, NO_TIME),
    "due before the year 1": ("due", "0001-01-01T00:00:00+00:01", NO_YEAR),
    "due after the year 9999": ("due", "9999-12-31T23:59:59-00:01", NO_YEAR),
    "attempts a float": ("num_attempts", 1.0, "Not a valid integer."),
    "attempts a boolean": ("num_attempts", True, "Not a valid integer."),
    "attempts as text": ("num_attempts", "1", "Not a valid integer."),
    "attempts negative": ("num_attempts", -1, RANGE),
    "attempts beyond 16 bits": ("num_attempts", 65536, RANGE),
    "scheduling a list": ("scheduling", [], "Invalid input type."),
    "unknown": ("recipients", [], "Unknown field."),
    "unknown and unprintable": ("a\n\x1b[31m\ud800", 1, "Unknown field."),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("field", "value", "reason"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_wrong_field_is_named_with_file_and_line(
    load: Load, queues: QueueRegistry, url: str, field: str, value: Any, reason: str
) -> None:
    queues.load([message()])
    shown = field.encode("unicode_escape").decode()
    with nothing_changes(url):
        assert load(f"{line('x')}\n{line(**{field: value})}") == refused(f"FILE:3: message.{shown}: {reason}")
        # The same in a queue, over many lines, after another answer.
        text = f"{PRETTY}\n{json.dumps(queue_answer(B, answer('c', **{field: value})), indent=2)}"
        assert load(text) == refused(f"FILE:10: messages.1.message.{shown}: {reason}")


WRONG_ANSWERS: dict[str, tuple[Any, str]] = {
    "a number": (5, "Invalid input type."),
    "a list": ([A], "Invalid input type."),
    "no message": ({"id": "a"}, "message: Missing data for required field."),
    "no id": ({"message": A["message"]}, "id: Missing data for required field."),
    "an empty id": (answer(""), f"id: {ID_LENGTH}"),
    "a long id": (answer("ü" * 1001), f"id: {ID_LENGTH}"),
    "an id with a NUL": (answer("\0"), "id: a string must not contain NUL"),
    "an unknown field": (A | {"queue": "a"}, "queue: Unknown field."),
    "a first attempt that is no time": (
        answer(scheduling={"first_attempt": "soon"}, due="2026-11-24T10:00:00Z"),
        f"message.scheduling.first_attempt: {NO_TIME}",
    ),
    "several fields": (
        answer(5, sender=5, recipient=5),
        "id: Not a valid string.; message.sender: Not a valid string.; message.recipient: expected a string, got int",
    ),
    "an object for a list": ({"messages": {"0": A}}, "messages: Not a valid list."),
    "no list": ({"messages": None}, "messages: Field may not be null."),
    "a queue in which all is wrong": (
        {"messages": [0] * 12},
        "; ".join(f"messages.{number}: Invalid input type." for number in range(5)) + "; and 7 more",
    ),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("wrong", "reason"), WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_a_wrong_answer_is_named_with_file_and_line(load: Load, url: str, wrong: Any, reason: str) -> None:
    assert load(f"{line('x')}\n{json.dumps(wrong)}\n{line('y')}") == refused(f"FILE:3: {reason}")
    assert stored(url) == []


NOT_JSON: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"hello", "Expecting value: line 3 column 1"),
    "one brace short": (ONE_LINE.encode()[:-1], "Expecting ',' delimiter: line 4 column 1"),
    "one brace too many": (ONE_LINE.encode() + b"}", "Expecting value: line 3 column 117"),
    "a string over two lines": (b'{"a": "b\nc"}', "Invalid control character at: line 3 column 9"),
    "wrong on its third line": (
        b'{\n"a": 1,\nb\n}',
        "Expecting property name enclosed in double quotes: line 5 column 1",
    ),
    "nested too deep": (b"[" * 100_000, "nested too deeply"),
    "bad UTF-8": (b'{"a": "\xff"}', "it is not UTF-8: invalid start byte at byte 7"),
    "a byte order mark in the midst": (b"\xef\xbb\xbf{}", "Expecting value: line 3 column 1"),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("wrong", "reason"), NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_named_with_file_and_line(load: Load, url: str, wrong: bytes, reason: str) -> None:
    text = line("x").encode() + b"\n" + wrong + b"\n" + line("y").encode()
    assert load(text) == refused(f"FILE:3: this is not valid JSON: {reason}")
    assert stored(url) == []


@pytest.mark.sqlite
def test_a_file_that_ends_too_early_ends_on_its_own_line(load: Load) -> None:
    reason = "Expecting ',' delimiter: line 10 column 4"
    assert load(f"\n\n{PRETTY[:-1]}\n\n") == refused(f"FILE:3: this is not valid JSON: {reason}")


def test_a_wrong_line_is_found_without_reading_on() -> None:
    lines = iter([b"{}\n", b"{\n", b"]\n", *[b"{}\n"] * 1000])
    with pytest.raises(NotJSON):
        list(json_documents(lines))
    assert len(list(lines)) > 990


@pytest.mark.sqlite
@pytest.mark.parametrize("depth", [330, 900, 950, 980, 2000])
@pytest.mark.parametrize("field", ["recipient", "meta", "scheduling", "other"])
def test_no_nesting_is_too_deep_for_an_error_message(load: Load, field: str, depth: int) -> None:
    status, _, error = load(line(**{field: 0}).replace(f'"{field}": 0', f'"{field}": {"[" * depth + "]" * depth}'))
    assert (status, len(error.splitlines())) == (1, 1)


@pytest.mark.parametrize("between", [0, BATCH - 1, 2 * BATCH])
def test_an_id_that_comes_twice_is_named(load: Load, queues: QueueRegistry, url: str, between: int) -> None:
    queues.load([message()])
    text = line() + "".join(line(f"b{number}") for number in range(between)) + json.dumps(queue_answer(A))
    with nothing_changes(url):
        assert load(text) == refused(f"FILE:{between + 2}: message id a already exists")


def test_an_id_that_is_in_the_store_is_named(load: Load, queues: QueueRegistry, url: str) -> None:
    queues.load([message(id="ü\n\x1b[2J")])
    with nothing_changes(url):
        assert load(line("x") + line("ü\n\x1b[2J")) == refused(r"FILE:2: message id ü\n\x1b[2J already exists")


@pytest.mark.sqlite
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_of_several_files_all_are_loaded_or_none(flask: Flask, url: str, tmp_path: Path, wrong: int) -> None:
    files = [tmp_path / name for name in ("one", "two", "three")]
    for number, file in enumerate(files):
        file.write_text(line(number if number == wrong else str(number)))
    assert flask("load", *files) == refused(f"{files[wrong]}:1: id: Not a valid string.")
    assert stored(url) == []


@pytest.mark.sqlite
def test_a_file_that_cannot_be_read_is_an_error_of_one_line(flask: Flask, url: str, tmp_path: Path) -> None:
    (file := tmp_path / "messages").write_text(line())
    missing = tmp_path / "missing"
    assert flask("load", file, missing) == refused(f"[Errno 2] No such file or directory: '{missing}'")
    assert flask("load", file, tmp_path) == refused(f"[Errno 21] Is a directory: '{tmp_path}'")
    assert stored(url) == []


@pytest.mark.sqlite
def test_a_full_disk_is_an_error_of_one_line(start_command: Command, url: str, file: Path) -> None:
    file.write_text(line(data="x" * 2**20))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))  # noqa: E731
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start_command("load", file, preexec_fn=limit, **streams)
    assert process.communicate(timeout=60) == (b"", b"Error: [Errno 27] File too large\n")
    assert (process.returncode, stored(url)) == (1, [])


# Locks


def test_no_lock_is_held_while_messages_are_read(start_command: Command, queues: QueueRegistry, url: str) -> None:
    process = start_command("load", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    # More than a pipe holds: when it is written, it is being read.
    process.stdin.write("".join(line(str(number), data="x" * 1000) for number in range(2 * BATCH)).encode())
    with locked(url, "" if url.startswith("sqlite") else "LOCK TABLE messages, contents"):
        process.stdin.write(line("last").encode())
        process.stdin.flush()
    assert stored(url) == []
    output, _ = process.communicate(timeout=60)
    assert output == f"{2 * BATCH + 1} messages loaded, 0 discarded\n".encode()
    assert len(stored(url)) == 2 * BATCH + 1


def test_a_wrong_file_is_refused_while_the_store_is_locked(load: Load, url: str) -> None:
    text = "".join(line(str(number)) for number in range(BATCH)) + line(5)
    with locked(url, "" if url.startswith("sqlite") else "LOCK TABLE messages, contents"):
        assert load(text) == refused(f"FILE:{BATCH + 1}: id: Not a valid string.")


@pytest.mark.sqlite
def test_ctrl_c_loads_nothing(start_command: Command, url: str) -> None:
    process = start_command("load", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("".join(line(str(number), data="x" * 1000) for number in range(1000)).encode())
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"\nAborted!\n")
    assert process.returncode == 1
    assert stored(url) == []


@pytest.mark.slow
@pytest.mark.parametrize("indent", [None, 1], ids=["one a line", "over many lines"])
def test_more_messages_need_no_more_memory(tmp_path: Path, indent: int | None) -> None:
    """One more KiB a message, which it is at least, would be 16 MiB."""

    def loading(count: int) -> int:
        text = json.dumps(answer("%d", data="x" * 1000), indent=indent) + "\n"
        program = f"for number in range({count}): print({text!r} % number, end='')"
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as printing:
            return peak(f"sqlite:///{tmp_path / str(count)}", "load", "-", stdin=printing.stdout)

    assert loading(20_000) - loading(4_000) < 6 * 1024


@pytest.mark.slow
def test_large_messages_are_not_all_in_memory_at_once(tmp_path: Path) -> None:
    text = line("%d", data="%s")
    program = f"for number in range(100): print({text!r} % (number, 'x' * 2**20), end='')"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as printing:
        used = peak(f"sqlite:///{tmp_path / 'queues.db'}", "load", "-", stdin=printing.stdout)
    assert used < 150 * 1024


# On a terminal


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        pytest.param(line(data="x" * 2**17), "1 message loaded, 0 discarded", id="loaded"),
        pytest.param(line(5), "Error: {}:1: id: Not a valid string.", id="a wrong field"),
        pytest.param(2 * line(), "Error: {}:2: message id a already exists", id="an id twice"),
    ],
)
@pytest.mark.parametrize("from_pipe", [False, True], ids=["file", "pipe"])
def test_a_terminal_shows_that_messages_are_loaded_and_the_outcome_on_a_line_of_its_own(
    start_command: Command, file: Path, text: str, outcome: str, from_pipe: bool
) -> None:
    file.write_text(text)
    source, stdin = ("-", text) if from_pipe else (file, "")
    shown = on_a_terminal(start_command, "load", source, stdin=stdin, columns=200)
    assert "loading" in shown
    assert shown.splitlines()[-1] == outcome.format("<stdin>" if from_pipe else file)
