"""Tests of `flask load`: what it takes and refuses, what becomes of it in the store, and when it locks the store."""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from databases import contents, locked, logged, names, nothing_changes, stored
from factories import ask, message
from terminal import Command, Flask, on_a_terminal, peak, without_store

from kumo import DAMAGED, LIMITED, MISSING
from moving import BATCH
from queues import QueueRegistry
from rebinding import printable
from schemas import Unreadable, json_documents

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
    config = {"retry_interval": "20m", "max_age": "7days", "egress_pool": None}
    rest = {"num_scheduled": len(answers), "queue_config": config, "now": "2025-08-01T12:00:00Z", "delayed_metric": 0}
    return {"queue_name": "example.com", "messages": [*answers], **rest}


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


def loaded(count: int, rest: str = "0 discarded", remark: str = "") -> tuple[int, str, str]:
    """The outcome of a load of so many messages."""
    return 0, f"{count} message{'' if count == 1 else 's'} loaded, {rest}\n", remark and f"{remark}\n"


def refused(reason: str) -> tuple[int, str, str]:
    """The outcome of a load that is refused."""
    return 1, "", f"Error: {reason}\n"


# What a file may look like

A, B = answer("a"), answer("b")
ONE_LINE = json.dumps(A)
PRETTY = json.dumps(A, indent=2)
PRETTY_B = json.dumps(queue_answer(B), indent=2)
MANY = [str(number) for number in range(BATCH + 1)]

FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "an empty file": ("", []),
    "nothing but blank lines": ("\n \r\n\t\n", []),
    "one answer without an end of line": (ONE_LINE, ["a"]),
    "one a line": (f"{ONE_LINE}\n{json.dumps(B)}\n", ["a", "b"]),
    "one a line, with CRLF": (f"{ONE_LINE} \r\n{json.dumps(B)}\r\n", ["a", "b"]),
    "one a line, with blank lines": (f"\n{ONE_LINE}\n\n  \n{json.dumps(B)}\n\n", ["a", "b"]),
    "two without anything between them": (f"{ONE_LINE}{json.dumps(B)}", ["a", "b"]),
    "two over many lines, as kcli prints them": (f"{PRETTY}\n{PRETTY_B}\n", ["a", "b"]),
    "two over many lines, without a line's end between them": (f"{PRETTY}{PRETTY_B}", ["a", "b"]),
    "one on a line, then one over many": (f"{ONE_LINE}\n{PRETTY_B}", ["a", "b"]),
    "one over many lines, then one on a line": (f"{PRETTY_B}\n{ONE_LINE}", ["a", "b"]),
    "a value a line": (PRETTY.replace(" ", "\n"), ["a"]),
    "a byte order mark": (b"\xef\xbb\xbf" + PRETTY.encode(), ["a"]),
    "a queue": (json.dumps(queue_answer(A, B)), ["a", "b"]),
    "an empty queue": (json.dumps(queue_answer()), []),
    "more messages than are stored at once": ("".join(map(line, MANY)), MANY),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
def test_a_file_holds_any_number_of_answers(load: Load, url: str, text: str | bytes, expected: list[str]) -> None:
    assert load(text) == loaded(len(expected))
    assert ids(url) == expected


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
    assert load(line(ID, **fields)) == loaded(1, remark=f"1 message {LIMITED}")
    kept = {name: fields[name] for name in ("sender", "recipient", "meta", "num_attempts")}
    named = {"id": ID, "domain": "bücher.example", "queue": "spring:acme@bücher.example", "size": 28}
    times = {"created": pytest.approx(1678065214.31018, abs=1e-5), "due": 1754049600.5, "leased_until": 0}
    assert stored(url) == [kept | named | times]
    assert contents(url) == {ID: "Subject: Grüße\r\n\r\nHello\0\r\n".encode()}


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
    texts += [line(name, meta={"queue": name}) for name in ("Null", "t@null", "null@a")]
    assert load("".join(texts)) == loaded(5, "1 of them without content, 2 discarded")
    assert ids(url) == ["a", "b", "Null", "null@a", "t@null"]
    assert contents(url).keys() == {*ids(url)}


REMARKS: dict[str, tuple[dict[str, Any], int, str]] = {
    "five of 10,000": (queue_answer(*map(answer, "abcde")) | {"num_scheduled": 10_000}, 5, f"9995 messages {MISSING}"),
    "none of one": (queue_answer() | {"num_scheduled": 1}, 0, f"1 message {MISSING}"),
    "fewer counted than printed": (queue_answer(answer()) | {"num_scheduled": 0}, 1, ""),
    "content that was not UTF-8": (answer(data="Gr\ufffd\ufffde"), 1, f"1 message {DAMAGED}"),
    "an expiry": (answer(scheduling={"expires": "2026-11-28T10:00:00Z"}), 1, f"1 message {LIMITED}"),
    "no limits": (answer(scheduling={"first_attempt": "2026-11-28T10:00:00Z", "expires": None}), 1, ""),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("printed", "count", "remark"), REMARKS.values(), ids=REMARKS)
def test_what_is_not_as_it_was_in_kumomta_is_counted(load: Load, printed: Any, count: int, remark: str) -> None:
    assert load(json.dumps(printed)) == loaded(count, remark=remark)


@pytest.mark.parametrize(
    ("due", "seconds"), [("1969-12-31T23:59:58.75Z", -1.25), (None, 2)], ids=["due", "the first attempt"]
)
def test_a_message_is_due_when_it_says_or_at_its_first_attempt(
    load: Load, url: str, due: str | None, seconds: float
) -> None:
    assert load(line(due=due, scheduling={"first_attempt": "1970-01-01T00:00:02Z"})) == loaded(1)
    assert [row["due"] for row in stored(url)] == [seconds]


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


def test_a_reception_protocol_that_is_no_string_is_null_in_records(queues: QueueRegistry, url: str) -> None:
    queues.load([message(meta={"reception_protocol": 5})])
    ask(queues)
    assert [record["reception_protocol"] for record in logged(url)] == [None]


@pytest.mark.sqlite
def test_a_store_is_created_by_a_load_that_is_right_and_by_no_other(shell: Flask, tmp_path: Path) -> None:
    store = tmp_path / "new.db"
    new = {"REBIND_DATABASE_URL": f"sqlite:///{store}"}
    assert shell("load", "-", stdin=line(5), **new) == refused("<stdin>:1: id: Not a valid string.")
    assert not store.exists()
    assert shell("load", "-", stdin=line(), **new) == loaded(1)


# What is refused

NO_TIME = "Not a time of RFC 3339, such as 2026-11-24T10:00:00Z."
RANGE = "Must be greater than or equal to 0 and less than or equal to 65535."
ID_LENGTH = "not 1 to 2000 bytes long"

SURROGATE = r"'utf-8' codec can't encode character '\udc80' in position 0: surrogates not allowed"

NO_ADDRESSES = ["<u@x.example>", "u@x.example>", "<u@x.example", "Ada <u@x.example>", "<>", "u v@x.example"]
NO_ADDRESSES += [" u@x.example", "u@x.example ", "u@x .example", "u\n@x.example", "u@x.example\n", "u@x.example\t"]
NO_ADDRESSES += ["u@x.exa\x7fmple", "u", "u@x.example,v@y.example", "u@x.example;v@y.example", "mailto:u@x.example?a"]
NO_ADDRESSES += ["u@x!y", "u@x/y", "u@x:25", "u@x:", "u@v@x.example", "u@", "@x", "u@.", "u@x..example", "u@.x"]
NO_ADDRESSES += ["u@x.", "u@(x)x", "u@x\\y", 'u@"x"', "u@x'y", "u@*", '"u@x.example', 'u"v@x.example', "u@[1.2.3.4"]
NO_ADDRESSES += ["u@1.2.3.4]", "u@[]", "u@[<a>]", "u@x\xa0y", "u@\u3000x", "u@x\u200b.example", "u@x\u2028y"]
NO_ADDRESSES += ["u@\ufeffx.example", "\u202eu@x.example", "u@{x}", "u@x=y", "u@x%y", "u@x&y", "[u@x", "u@x:٣", "u@[٣]"]
ADDRESSES = {
    "u@x.example": "x.example",
    "u.v+w@X.Example": "x.example",
    "u..v.@x": "x",
    "!#$%&'*+-/=?^_`{|}~@x": "x",
    '"u v"@x.example': "x.example",
    '"<u@v>"@x.example': "x.example",
    r'"u\"v"@x.example': "x.example",
    "ü@bücher.example": "bücher.example",
    "用户@例子.example": "例子.example",
    "u@हिन्दी.example": "हिन्दी.example",
    "u@xn--bcher-kva.example": "xn--bcher-kva.example",
    "u@under_score.example": "under_score.example",
    "u@[192.0.2.1]": "[192.0.2.1]",
    "u@[IPv6:2001:db8::1]": "[ipv6:2001:db8::1]",
}

WRONG_FIELDS: dict[str, tuple[str, Any, str]] = {
    "sender null": ("sender", None, "Field may not be null."),
    "sender a number": ("sender", 5, "Not a valid string."),
    "one recipient in brackets": ("recipient", ["a@b", "<a@b>"], "'<a@b>' is not an address (local@domain)"),
    "sender with a NUL": ("sender", "\0", "a string must not contain NUL"),
    "recipient null": ("recipient", None, "Field may not be null."),
    "recipient missing": ("recipient", ..., "Missing data for required field."),
    "recipient an object": ("recipient", {"a@b": 1}, "expected a string, got dict"),
    "no recipients": ("recipient", [], "there is no recipient"),
    "no address": ("recipient", "ada", "'ada' is not an address (local@domain)"),
    "one recipient no address": ("recipient", ["a@b", "@b"], "'@b' is not an address (local@domain)"),
    "recipient with a surrogate": ("recipient", "a@\ud800", "a string must be text that UTF-8 can express"),
    "meta null": ("meta", None, "Field may not be null."),
    "meta a list": ("meta", [], "Not a valid mapping type."),
    "meta with a NUL within": ("meta", {"a": [{"b": "\0"}]}, "a string must not contain NUL"),
    "meta with a surrogate for a key": ("meta", {"\ud800": 1}, "a string must be text that UTF-8 can express"),
    "meta too deep": ("meta", {"a": deep(201)}, "nesting is deeper than 200"),
    "a long name": ("meta", {"queue": "ü" * 1001}, "the name of its queue is longer than 2000 bytes"),
    "a long name of parts": ("meta", {"campaign": "c" * 2000}, "the name of its queue is longer than 2000 bytes"),
    "data a number": ("data", 5, "Not a valid string."),
    "data with a surrogate": ("data", "\udc80", SURROGATE),
    "due no time": ("due", "2026-01-01T00:00:00", NO_TIME),
    "created no time": ("created", 5, NO_TIME),
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


@pytest.mark.sqlite
@pytest.mark.parametrize("field", ["sender", "recipient"])
def test_what_is_no_address_is_refused(load: Load, url: str, field: str) -> None:
    for text in NO_ADDRESSES:
        reason = printable(f"{text!r} is not an address (local@domain)")
        assert load(line(**{field: text})) == refused(f"FILE:1: message.{field}: {reason}")


@pytest.mark.sqlite
def test_an_address_is_taken_and_its_domain_names_the_queue(load: Load, url: str) -> None:
    texts = [line(str(number), sender=address, recipient=address) for number, address in enumerate(ADDRESSES)]
    assert load("".join(texts) + line("bounce", sender="")) == loaded(len(ADDRESSES) + 1)
    assert names(url) == [*ADDRESSES.values(), "example.com"]


@pytest.mark.sqlite
def test_a_message_with_a_domain_may_have_any_addresses(load: Load, url: str) -> None:
    """As `flask messages` prints what a sender stored."""
    assert load(line(sender="<>", recipient="<u@x.example>", domain="x.example")) == loaded(1)
    assert names(url) == ["x.example"]


WRONG_ANSWERS: dict[str, tuple[Any, str]] = {
    "a number": (5, "Invalid input type."),
    "a list": ([A], "Invalid input type."),
    "no message": ({"id": "a"}, "message: Missing data for required field."),
    "no id": ({"message": A["message"]}, "id: Missing data for required field."),
    "an empty id": (answer(""), f"id: {ID_LENGTH}"),
    "a long id": (answer("ü" * 1001), f"id: {ID_LENGTH}"),
    "an id with a NUL": (answer("\0"), "id: a string must not contain NUL"),
    "an unknown field": (A | {"queue": "a"}, "queue: Unknown field."),
    "a first attempt": (answer(scheduling={"first_attempt": ""}), f"message.scheduling.first_attempt: {NO_TIME}"),
    "several fields": (answer(5, meta=5), "id: Not a valid string.; message.meta: Not a valid mapping type."),
    "an object for a list": ({"messages": {"0": A}}, "messages: Not a valid list."),
    "no list": ({"messages": None}, "messages: Field may not be null."),
    "null in a queue": ({"messages": [A, None]}, "messages.1: Field may not be null."),
    "two of a queue": ({"messages": [0, A, 0]}, "messages.0: Invalid input type.; messages.2: Invalid input type."),
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
    "wrong on its third line": (b"[\n1,\n2 3\n]", "Expecting ',' delimiter: line 5 column 3"),
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
    with pytest.raises(Unreadable):
        list(json_documents(lines, "FILE"))
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


def test_messages_whose_ids_are_in_the_store_may_be_skipped(
    flask: Flask, queues: QueueRegistry, url: str, file: Path
) -> None:
    queues.load([message(id="a")])
    (before,) = stored(url)
    file.write_text(line("a") + line("b") + line("b"))
    assert flask("load", "--skip-existing", file) == loaded(1, "0 discarded, 2 skipped")
    assert (stored(url)[0], ids(url)) == (before, ["a", "b"])


@pytest.mark.sqlite
def test_of_several_files_all_are_loaded_or_none(flask: Flask, url: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two", "three")]
    for wrong in files:
        for file in files:
            file.write_text(line(5 if file == wrong else file.name))
        assert flask("load", *files) == refused(f"{wrong}:1: id: Not a valid string.")
    assert stored(url) == []
    wrong.write_text(line("three"))
    assert flask("load", *files) == loaded(3)
    assert ids(url) == ["one", "two", "three"]


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
    output, error = process.communicate(timeout=60)
    assert (output, without_store(error.decode())) == (b"", "Error: [Errno 27] File too large\n")
    assert (process.returncode, stored(url)) == (1, [])


# Locks


def test_a_wrong_file_is_refused_while_the_store_is_locked(load: Load, url: str) -> None:
    """All is read and checked before the load needs a lock."""
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
    output, error = process.communicate(timeout=30)
    assert (output, without_store(error.decode())) == (b"", "\nAborted!\n")
    assert process.returncode == 1
    assert stored(url) == []


def loading(folder: Path, count: int, text: str) -> int:
    """The memory that it takes, in KiB, to load so many messages of this text from a pipe."""
    program = f"import sys\ntext = sys.stdin.read()\nfor number in range({count}): print(text % number)"
    (folder / "text").write_text(text)
    with (folder / "text").open() as stdin:
        printing = subprocess.Popen([sys.executable, "-c", program], stdin=stdin, stdout=subprocess.PIPE)
    with printing:
        return peak(f"sqlite:///{folder / str(count)}", "load", "-", stdin=printing.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("indent", [None, 1], ids=["one a line", "over many lines"])
def test_more_messages_need_no_more_memory(tmp_path: Path, indent: int | None) -> None:
    """One more KiB a message, which it is at least, would be 16 MiB."""
    text = json.dumps(answer("%d", data="x" * 1000), indent=indent)
    assert loading(tmp_path, 20_000, text) - loading(tmp_path, 4_000, text) < 6 * 1024


@pytest.mark.slow
def test_large_messages_are_not_all_in_memory_at_once(tmp_path: Path) -> None:
    assert loading(tmp_path, 100, json.dumps(answer("%d", data="x" * 2**20))) < 150 * 1024


# On a terminal


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        pytest.param(line(data="x" * 2**17), "1 message loaded, 0 discarded", id="loaded"),
        pytest.param(line(5), "Error: <stdin>:1: id: Not a valid string.", id="a wrong field"),
        pytest.param(2 * line(), "Error: <stdin>:2: message id a already exists", id="an id twice"),
    ],
)
def test_a_terminal_shows_that_messages_are_loaded_and_the_outcome_on_a_line_of_its_own(
    start_command: Command, text: str, outcome: str
) -> None:
    shown = on_a_terminal(start_command, "load", "-", stdin=text, columns=200)
    assert "loading" in shown
    assert shown.splitlines()[-1] == outcome
