"""Tests of the operator's commands: flask rebind · queues · messages · history · prune, and what each says of a log."""

import getpass
import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import terminal
from databases import contents, engine_for, history, names, new_database, nothing_changes, run_sql, stored
from factories import ODD_TEXT, ask, message
from services import SITE_POLICY
from sqlalchemy import inspect, make_url
from terminal import PROGRAM, Command, Flask, on_a_terminal
from wcwidth import width

from app import create_app
from cli import VERSION, time_of
from deliverylog import MAX_ATTEMPTS
from display import fitted
from event import rebind as rebind_event
from message import Message
from names import Criteria
from queues import QueueRegistry, logger
from tables import FIRST_SECOND, LAST_SECOND

UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
MATCHED = re.compile(rf"(\d+) matched, (\d+) moved, (\d+) flushed(, \d+ left alone)?, rebind ({UUID})\n")
SPRING = {"campaign": "spring", "tenant": "acme"}
ALL = ("rebind", "--reason", "r", "--everything")


@pytest.fixture(autouse=True)
def without_diagnostics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service in this process writes a diagnostic log. A command does not."""
    monkeypatch.setattr(logger, "disabled", True)


def done(answer: tuple[int, str, str]) -> tuple[int, int, int, str]:
    """How many messages a rebind matched, moved and flushed, and its id. Asserts that it says nothing else."""
    status, output, error = answer
    found = MATCHED.fullmatch(output)
    assert (status, error, bool(found)) == (0, "", True), answer
    assert found
    matched, moved, flushed, _, rebind_id = found.groups()
    return int(matched), int(moved), int(flushed), rebind_id


def refused(answer: tuple[int, str, str]) -> str:
    """Why a command was refused: one line."""
    status, output, error = answer
    assert (status, output, error.count("\n")) == (1, "", 1), answer
    return error.removeprefix("Error: ").strip()


def lines(answer: tuple[int, str, str]) -> list[Any]:
    """The JSON objects that a command printed."""
    status, output, error = answer
    assert (status, error in ("", "no record found\n"), output.isascii()) == (0, True, True), answer
    return [json.loads(line) for line in output.splitlines()]


# flask rebind


def test_rebind_takes_what_the_endpoint_takes(flask: Flask, queues: QueueRegistry, url: str) -> None:
    queues.load([message(meta=SPRING | {"routing_domain": "relay.example", "old": "x"}), message()])
    criteria = SPRING | {"domain": "EXAMPLE.com", "routing_domain": "relay.example"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in criteria.items()]
    options += ["--data", '{"a": "1", "b": "2"}', "--set", " b = 3=4 ", "--reason", "why not", "--unset", "old"]
    flags = ["--limit", "5", "--always-flush", "--suppress-logging", "--idempotency-key", 'a "key"']
    assert done(flask("rebind", *options, *flags))[:3] == (1, 0, 1)
    (row,) = history(url)
    asked = {"data": {"a": "1", "b": "3=4"}, "unset": ["old"], "limit": 5, "reason": "why not"}
    assert row["request"] == criteria | asked | {"always_flush": True, "suppress_logging": True}
    assert (row["idempotency_key"], row["actor"]) == ('a "key"', getpass.getuser())
    assert refused(flask("rebind", *options, *flags[2:])) == "the Idempotency-Key was used by a different request"
    assert stored(url)[0]["meta"] == SPRING | {"routing_domain": "relay.example", "a": "1", "b": "3=4"}


def test_rebind_calls_the_event(flask: Flask, queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    event = ("--trigger-rebind-event", "--set", "to=vip.example")
    assert refused(flask(*ALL, *event)) == "no handler is connected to the rebind event"

    @rebind_event.connect
    def to_queue(message: Message, data: dict[str, str]) -> None:
        message.meta["queue"] = data["to"]

    assert done(flask(*ALL, *event))[:3] == (1, 1, 1)
    assert names(url) == ["vip.example"]


WRONG_OPTIONS = {
    "": "give a criterion, or --everything for all queues",
    "--everything --set x": "--set needs KEY=VALUE",
    "--everything --set x=1 --set x=2": "--set gives a key more than once",
    "--tenant a --tenant b": "Invalid value for '--tenant': given more than once",
    "--everything --limit 1 --limit 2": "Invalid value for '--limit': given more than once",
    "--everything --set \t=x": "--set needs KEY=VALUE",
    "--everything --data []": "data: Not a valid mapping type.",
    "--everything --data=": "--data is not valid JSON: Expecting value: line 1 column 1 (char 0)",
    '--everything --data {"a":1}': "data.a.value: Not a valid string.",
    "--tenant \udcff": "tenant: a string must be text that UTF-8 can express",
    "--undo x --set a=1": "undo: data must be {}, and undo cannot be combined with unset or trigger_rebind_event.",
    "--tenant x --idempotency-key=": (
        'Idempotency-Key: Not a string in quotes, such as "8e03978e", of 1 to 255 characters.'
    ),
}


@pytest.mark.sqlite
@pytest.mark.parametrize(("options", "reason"), WRONG_OPTIONS.items(), ids=map(ascii, WRONG_OPTIONS))
def test_rebind_refuses_what_it_cannot_understand(
    flask: Flask, queues: QueueRegistry, url: str, options: str, reason: str
) -> None:
    queues.load([message()])
    with nothing_changes(url):
        status, output, error = flask("rebind", "--reason", "r", *options.split())
    assert (status, output, error.splitlines()[-1]) == (2, "", f"Error: {reason}")


def test_a_dry_run_shows_the_plan_as_a_table(flask: Flask, queues: QueueRegistry, url: str) -> None:
    queues.load([message(meta=SPRING) for _ in range(10)] + [message("bela@example.org", meta=SPRING), message()])
    with nothing_changes(url):
        assert flask("rebind", "--dry-run", "--reason", "r", "--campaign", "spring", "--unset", "campaign") == (
            0,
            "from                     to                messages\n"
            "spring:acme@example.com  acme@example.com        10\n"
            "spring:acme@example.org  acme@example.org         1\n"
            "11 matched, 11 moved, 11 flushed\n",
            "",
        )
        assert flask("rebind", "--dry-run", "--reason", "r", "--tenant", "nobody")[1].endswith("0 flushed\n")


def test_a_key_that_may_be_misspelt_is_told_if_nothing_moved(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message()])
    said = {key: flask(*ALL, "--set", f"{key}=x")[2] for key in ("tennant", "Queue", "note", "domain", "campaign")}
    hint = "nothing moved; is {} misspelt for {}?\n"
    misspelt = {"tennant": hint.format("tennant", "tenant"), "Queue": hint.format("Queue", "queue")}
    assert said == dict.fromkeys(said, "") | misspelt


def test_a_limit_takes_the_next_ones_and_an_undo_brings_them_back(
    flask: Flask, queues: QueueRegistry, url: str
) -> None:
    queues.load([message(due=1e9 + n) for n in range(3)])
    first = done(flask(*ALL, "--limit", "2", "--set", "queue=x"))
    assert (first[:3], names(url)) == ((2, 2, 2), ["x", "x", "example.com"])
    undone = flask("rebind", "--reason", "r", "--undo", first[3])
    assert (done(undone)[:3], names(url)) == ((2, 2, 0), ["example.com"] * 3)
    assert "0 flushed, 0 left alone, rebind" in undone[1]


@pytest.mark.sqlite
def test_the_actor_is_the_number_of_a_user_without_a_name(
    flask: Flask, queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    assert done(flask(*ALL))[:3] == (0, 0, 0)
    assert [row["actor"] for row in history(url)] == ["uid 987654321"]


# flask queues


def fill(queues: QueueRegistry) -> None:
    """Four queues, one of them on hold, with seven messages; a tenant's name may be empty."""
    first = message(meta=SPRING, created=1e9, num_attempts=3)
    queues.load([first, message(meta=SPRING, due=4e9), message(meta=SPRING)])
    queues.load([message(meta={"campaign": "spring"}), message("chidi@example.org", due=4e9)])
    held = {"tenant": "acme", "routing_domain": "Hold.invalid"}
    queues.load([message("bela@bücher.example", meta=held, due=due) for due in (1.5e9, 2.5)])


def ages_hidden(output: str) -> str:
    return re.sub(r"\b\d+[smhd] ", lambda found: "AGE".ljust(len(found[0])), output)


def test_queues_are_a_table_with_a_total(flask: Flask, queues: QueueRegistry) -> None:
    fill(queues)
    status, output, error = flask("queues")
    assert (status, ages_hidden(output), error) == (
        0,
        "queue                             messages  due  overdue  oldest  attempts  state\n"
        "acme@bücher.example!Hold.invalid         2    2  AGE      AGE            0  hold\n"
        "example.org                              1    0           AGE            0\n"
        "spring:@example.com                      1    1  AGE      AGE            0\n"
        "spring:acme@example.com                  3    2  AGE      AGE            3\n"
        "4 queues, 7 messages, 5 due\n",
        "",
    )


FIRST, SECOND, HELD = "spring:acme@example.com", "spring:@example.com", "acme@bücher.example!Hold.invalid"


@pytest.mark.parametrize(
    ("options", "shown", "total"),
    [
        ("--sort messages --limit 1", [FIRST], "4 queues, 7 messages, 5 due; 1 shown"),
        ("--sort oldest --limit 1", [FIRST], "4 queues, 7 messages, 5 due; 1 shown"),
        ("--sort due --domain EXAMPLE.com", [FIRST, SECOND], "2 queues, 4 messages, 3 due"),
        ("--campaign spring --tenant acme", [FIRST], "1 queue, 3 messages, 2 due"),
        ("--tenant= --limit 2", [SECOND], "1 queue, 1 message, 1 due"),
        ("--routing-domain hold.INVALID", [HELD], "1 queue, 2 messages, 2 due"),
        ("--sort overdue", [HELD, SECOND, FIRST, "example.org"], "4 queues, 7 messages, 5 due"),
        ("--sort overdue --deliverable --domain bücher.example", [], "0 queues, 0 messages, 0 due"),
        (f"--deliverable --queue {HELD} --queue {FIRST}", [FIRST], "1 queue, 3 messages, 2 due"),
        ("--tenant nobody", [], "0 queues, 0 messages, 0 due"),
    ],
)
def test_queues_are_picked_and_sorted(
    flask: Flask, queues: QueueRegistry, options: str, shown: list[str], total: str
) -> None:
    fill(queues)
    _, *rows, last = flask("queues", *options.split())[1].splitlines()
    assert ([row.split()[0] for row in rows], last) == (shown, total)


def test_as_json_an_empty_tenant_is_not_a_missing_one(flask: Flask, queues: QueueRegistry) -> None:
    fill(queues)
    found = lines(flask("queues", "--json"))
    assert [(one["campaign"], one["tenant"], one["domain"], one["routing_domain"]) for one in found] == [
        (None, "acme", "bücher.example", "Hold.invalid"),
        (None, None, "example.org", None),
        ("spring", "", "example.com", None),
        ("spring", "acme", "example.com", None),
    ]
    numbers = {"messages": 3, "due": 2, "due_since": 1e9, "oldest": 1e9, "attempts": 3}
    parts = {"queue": FIRST, "domain": "example.com", "routing_domain": None, "state": None}
    assert found[-1] == SPRING | parts | numbers
    assert [(one["state"], one["due_since"]) for one in found[:2]] == [("hold", 2.5), (None, None)]


@pytest.mark.sqlite
def test_a_name_cannot_break_the_table_or_command_the_terminal(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message(meta={"queue": "a\n\x1b[2J"})])
    assert flask("queues")[1].splitlines()[1].split()[0] == r"a\n\x1b[2J"


# flask messages

ODD_MESSAGES: list[dict[str, Any]] = [
    {"recipient": ["ada@example.com", "bela@example.org"], "content": bytes(range(256))},
    {"recipient": "Postmaster", "domain": "acme.example", "content": b""},
    {"recipient": ["ada@example.com", "Postmaster"], "domain": ""},
    {"recipient": "<ada@example.com>", "domain": "example.com>", "sender": "<>"},
    {"domain": "Example.COM:2525", "sender": "", "content": "Grüße\0\r\n".encode()},
    {"id": ODD_TEXT, "sender": ODD_TEXT, "queue": ODD_TEXT, "meta": {ODD_TEXT: ODD_TEXT, "\n": "\r\n"}},
    {"meta": {"a": None, "tenant": "", "campaign": 5, "nested": [{}, [1, -2.5, True, None, {"b": 10**30, "c": 1e-7}]]}},
    {"meta": {"queue": "vip.example"}, "num_attempts": MAX_ATTEMPTS},
    {"queue": "another.example"},
    {"queue": ""},
    {"created": FIRST_SECOND, "due": LAST_SECOND},
    {"created": 1764000000.123456, "due": -1764000000.123456},
    {"created": 0.1, "due": -1.25},
]


@pytest.mark.slow
@pytest.mark.sqlite
def test_a_store_goes_to_the_other_engine_and_back(
    shell: Flask, queues: QueueRegistry, url: str, postgresql: str, tmp_path: Path
) -> None:
    queues.load([message(**({"created": 1764000000.654321} | fields)) for fields in ODD_MESSAGES])
    before = stored(url), contents(url)
    loaded = f"{len(ODD_MESSAGES)} messages loaded, 1 of them without content, 0 discarded\n"
    with new_database(postgresql, tmp_path) as other, new_database(url, tmp_path) as back:
        for source, target in ((url, other), (other, back)):
            _, printed, _ = shell("messages", "--content", REBIND_DATABASE_URL=source)
            assert shell("load", "-", stdin=printed, REBIND_DATABASE_URL=target) == (0, loaded, "")
            assert (stored(target), contents(target)) == before
        engine_for(other).dispose()


def test_messages_are_picked_soonest_due_first(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message(id=id, meta=SPRING, due=1e9 + n) for n, id in enumerate("cab")] + [message(id="x")])
    assert [one["id"] for one in lines(flask("messages", "--tenant", "acme", "--limit", "2"))] == ["c", "a"]
    (one,) = lines(flask("messages", "--id", "b"))
    assert (one["message"]["recipient"], "data" in one["message"]) == ("ada@example.com", False)
    assert flask("messages", "--id", "b", "--campaign", "summer") == (0, "", "0 of 1 message found\n")


def test_messages_are_picked_by_their_ids(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message(id=id, meta=meta) for id, meta in (("a", SPRING), ("b", SPRING), ("c", {}), ("-x", {}))])
    status, printed, said = flask("messages", "--id", "b", "--id", "-", "--id", "a", stdin="-x\r\nnowhere\n\nb\n")
    assert sorted(json.loads(line)["id"] for line in printed.splitlines()) == ["-x", "a", "b"]
    assert (status, said) == (0, "3 of 4 messages found\n")
    rebind = ("rebind", "--reason", "r", "--always-flush")
    assert flask(*rebind, "--id", "-", "--queue", FIRST, stdin="a\nb\nc\n")[1].startswith("2 matched, 0 moved, 2 fl")
    status, printed, said = flask(*rebind, "--tenant", "acme", "--id", "-", stdin="\n")
    assert (status, printed) == (2, "")
    assert said.endswith("Error: Invalid value for '--id': there is no id on standard input\n")


# flask log


def test_log_is_filtered(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message(id="a"), message(id="b", meta=SPRING)])
    first, second = ask(queues, reason="1"), ask(queues, reason="2", tenant="acme")

    def found(*options: str | None) -> list[str]:
        return sorted(f"{one['id']}{one['response']['content'][-1]}" for one in lines(flask("log", *map(str, options))))

    assert found() == ["a1", "b1", "b2"]
    assert found("--id", "b") == ["b1", "b2"]
    assert found("--rebind-id", first.rebind_id) == ["a1", "b1"]
    assert found("--rebind-id", second.rebind_id, "--type", "AdminRebind") == ["b2"]
    assert found("--type", "Delivery") == found("--until", "2026-01-01") == found("--since", "2100-01-01") == []
    assert found("--since", "2001-01-01", "--until", "2100-01-01") == ["a1", "b1", "b2"]
    ask(queues, {"campaign": "summer"}, reason="3", campaign="spring")
    before, after, other = FIRST, "summer:acme@example.com", "example.com"
    assert found("--campaign", "summer") == found("--queue", after, "--queue", "none") == ["b3"]
    assert found("--queue", before) == found("--tenant", "acme", "--domain", "EXAMPLE.com") == ["b1", "b2", "b3"]
    assert found("--queue", before, "--queue", other, "--type", "AdminRebind") == ["a1", "b1", "b2", "b3"]
    assert flask("log", "--routing-domain", "r") == (0, "", "no record found\n")
    assert refused(flask("log", "--rebind-id", "x")).startswith("the history has no rebind x: ")


@pytest.mark.sqlite
@pytest.mark.parametrize("command", ["log", "history --json"])
def test_since_is_inclusive_and_until_is_not(flask: Flask, queues: QueueRegistry, url: str, command: str) -> None:
    queues.load([message()])
    ask(queues)
    run_sql(url, "UPDATE rebinds SET event_time = 1000000000.25")

    def found(*options: str) -> int:
        return len(lines(flask(*command.split(), *options)))

    assert found("--since", "2001-09-09T01:46:40.25Z") == 1
    assert found("--since", "2001-09-09T01:46:40.250001Z") == 0
    if command == "log":
        assert found("--until", "2001-09-09T01:46:40.25Z") == 0
        assert found("--until", "2001-09-09T01:46:40.250001Z") == 1


# flask history


def test_history_is_a_table_newest_first(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message(meta=SPRING)])
    made, by_name = ["--set", "queue=x y", "--tenant", "acme"], "--id '2 ids' --queue 'x y' --queue z"
    first = ask(queues, {"queue": "x y"}, reason="first", tenant="acme")
    second = ask(queues, reason="second", always_flush=True, unset=("queue",), limit=2)
    third = ask(queues, reason="third", criteria=Criteria(queue=("x y", "z"), id=("a", "b")))
    of, everything = "1      1  me     ", "--everything --always-flush --limit 2 --unset queue"
    assert re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME".ljust(20), flask("history")[1]).splitlines() == [
        f"when                  {'rebind_id':36}  matched  moved  actor  {'what':51}  reason",
        f"TIME                  {third.rebind_id}        0      0  me     {by_name:51}  third",
        f"TIME                  {second.rebind_id}        {of}{everything}  second",
        f"TIME                  {first.rebind_id}        {of}{shlex.join(made):51}  first",
    ]


def test_history_as_json_says_all_that_was_asked(flask: Flask, queues: QueueRegistry) -> None:
    queues.load([message()])
    results = [ask(queues, {"a": str(n)}, reason="why", suppress_logging=True) for n in range(3)]
    found = lines(flask("history", "--json", "--limit", "2", "--since", "2001-01-01"))
    assert [one["rebind_id"] for one in found] == [results[2].rebind_id, results[1].rebind_id]
    assert found[0]["request"] == {"reason": "why", "data": {"a": "2"}, "suppress_logging": True, "unset": []}
    assert [found[0][name] for name in ("actor", "matched", "moved", "flushed", "left")] == ["me", 1, 0, 0, None]
    assert lines(flask("history", "--json", "--since", "2100-01-01")) == []


# flask prune


def test_prune_removes_what_is_old(flask: Flask, queues: QueueRegistry, url: str) -> None:
    queues.load([message(), message()])
    old = ask(queues, {"queue": "x"})
    (last,) = lines(flask("log"))[-1:]
    with nothing_changes(url):
        assert flask("prune", "--before", "2001-01-01")[1] == "0 records and 0 rebinds removed\n"
        would = flask("prune", "--before", "2100-01-01", "--dry-run")
    assert would == (0, "2 records and 1 rebind would be removed\n", "")
    assert flask("prune", "--before", "2100-01-01") == (0, "2 records and 1 rebind removed\n", "")
    undo = flask("rebind", "--reason", "r", "--undo", str(old.rebind_id))
    assert refused(undo).startswith(f"the history has no rebind {old.rebind_id}: ")
    ask(queues, reason="later")
    after = lines(flask("log", "--after", str(last["key"])))
    assert [one["response"]["content"][-5:] for one in after] == ["later", "later"]


@pytest.mark.sqlite
def test_a_time_is_in_utc_wherever_the_command_runs(shell: Flask, queues: QueueRegistry, url: str) -> None:
    """1e9 is 2001-09-09T01:46:40Z."""
    ask(queues)
    run_sql(url, "UPDATE rebinds SET event_time = 1e9")
    for second, old in ((40, 0), (41, 1)):
        _, output, _ = shell("prune", "--dry-run", "--before", f"2001-09-09T01:46:{second}", TZ="America/New_York")
        assert output.startswith(f"0 records and {old} rebind")


# all of them

COMMANDS = ["queues", "messages", "log", "history", "prune --before 2026-01-01", "rebind --everything --reason r"]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_creates_a_store(shell: Flask, url: str, tmp_path: Path, command: str) -> None:
    with new_database(url, tmp_path) as empty:
        shown = empty.removeprefix("sqlite:///") if "sqlite" in empty else make_url(empty).set(query={})
        assert refused(shell(*command.split(), REBIND_DATABASE_URL=empty)) == f"there is no store: {shown}"
        if "sqlite" not in empty:
            assert inspect(engine_for(empty)).get_table_names() == []
            engine_for(empty).dispose()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "seconds"), {"2001-09-09": 999993600, "2001-09-09T01:46:40": 1e9}.items())
def test_a_time_may_be_a_date_or_without_its_offset(text: str, seconds: float) -> None:
    assert time_of(text) == seconds


@pytest.mark.parametrize(("text", "seconds"), {"90s": 90, "5m": 300, "2h": 7200, "30d": 2_592_000}.items())
def test_a_time_may_be_so_long_ago(text: str, seconds: float) -> None:
    before = time.time()
    assert before <= time_of(text) + seconds <= time.time()


@pytest.mark.sqlite
@pytest.mark.parametrize("text", ["", "now", "2026-11", "2026-02-30", "2026-11-25T03", "2026-11-25Z", "h", "2w", "-1d"])
def test_what_is_no_time_is_refused_in_one_line(flask: Flask, text: str) -> None:
    reason = f"{text!r} is not a time such as 2026-11-25, 2026-11-25T03:00:00Z, or 2h or 30d ago"
    for command, option in (("log", "--since"), ("log", "--until"), ("history", "--since"), ("prune", "--before")):
        status, output, error = flask(command, option, text)
        assert (status, output) == (2, "")
        assert error.splitlines()[-1] == f"Error: Invalid value for '{option}': {reason}"


ENCODED = {"latin-1": r"ü\u20ac\u2026\u65e5", "cp1252": "ü€…", "ascii": r"\xfc\u20ac", "shift_jis": r"\xfc\u20ac…日本"}
LIMITS = ["queues --limit", "messages --limit", "history --limit", "rebind --reason r --everything --limit"]
NUMBERS = [("log --after", 0, 2**63 - 1), *((option, 1, 10**18 - 1) for option in LIMITS)]


@pytest.mark.parametrize(("option", "least", "largest"), NUMBERS, ids=[option for option, _, _ in NUMBERS])
def test_a_number_is_taken_within_its_limits_and_refused_beyond(
    flask: Flask, queues: QueueRegistry, url: str, option: str, least: int, largest: int
) -> None:
    queues.load([message()])
    ask(queues)
    for number in (least, least + 1, 2**31, 2**53 + 1, largest - 1, largest):
        assert (flask(*option.split(), str(number))[0], number) == (0, number)
    beyond = (least - 1, -1, -(2**63), largest + 1, 2**64, 10**400, "9" * 5000)
    with nothing_changes(url):
        for wrong in (*beyond, "", "x", "1.5", "1e3", "0x1", "NaN"):
            status, output, error = flask(*option.split()[:-1], f"{option.split()[-1]}={wrong}")
            assert (status, output, error.count("Error: ")) == (2, "", 1), wrong


@pytest.mark.sqlite
@pytest.mark.parametrize(("encoding", "name"), ENCODED.items())
@pytest.mark.parametrize("command", COMMANDS)
def test_no_text_is_too_odd_for_an_encoding(
    queues: QueueRegistry, url: str, command: str, encoding: str, name: str
) -> None:
    queues.load([message(id="メ", meta={"queue": "ü€…日本\U0001f600", "campaign": "日本"})])
    ask(queues, {"tenant": "日本"}, reason="日本…")
    runner = create_app({"DATABASE_URL": url}).test_cli_runner(charset=encoding)
    for arguments in (command.split(), [*command.split(), "--dry-run"], [*command.split(), "--help"]):
        result = runner.invoke(args=arguments)
        assert (result.exit_code in (0, 2), result.stderr_bytes.count(b"Traceback")) == (True, 0), result.exception
        assert isinstance(result.exception, SystemExit | None)
    shown = runner.invoke(args=["queues"]).stdout_bytes.splitlines()[1].split()[0]
    assert shown.decode(encoding).startswith(name)


def test_a_terminal_shows_the_store_and_a_table_that_fits(
    start_command: Command, queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no colours."""
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    queues.load([message(f"ada@{'x' * 50}.example")])
    shown = url
    if not url.startswith("sqlite"):
        shown = "postgresql+psycopg://postgres:***@/postgres"
        secret = make_url(url).set(password="secret").render_as_string(hide_password=False)
        monkeypatch.setattr(terminal, "PROGRAM", ["env", f"REBIND_DATABASE_URL={secret}", *PROGRAM])
    store, *table = on_a_terminal(start_command, "queues", columns=70).splitlines()
    assert (store, [len(line) <= 70 for line in table]) == (f"rebind {VERSION}, store: {shown}", [True, True, True])
    assert ("…" in table[1].split()[0], "\x1b" in "".join(table)) == (True, False)
    rebind_id = ask(queues, {"note": "x" * 35}).rebind_id
    _, *history = on_a_terminal(start_command, "history", columns=80).splitlines()
    note = f"--everything --set note={'x' * 35}"
    assert [line.split() for line in history] == [
        ["when", "rebind_id", "matched", "moved"],
        ["actor", "what", "reason"],
        [history[2].split()[0], rebind_id, "1", "0"],
        ["me", *note.split(), "a", "test"],
    ]
    assert max(map(len, history)) <= 80
    assert len(on_a_terminal(start_command, "history", columns=200).splitlines()) == 3


@pytest.mark.sqlite
@pytest.mark.parametrize("command", [("load", "/dev/null"), ("prune", "--before", "30d")])
def test_what_cannot_be_taken_back_names_its_store_in_a_pipe_too(
    start_command: Command, queues: QueueRegistry, command: tuple[str, ...]
) -> None:
    _, error = start_command(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE).communicate(timeout=30)
    assert error.decode() == f"rebind {VERSION}, store: {queues.database.shown}\n"


@pytest.mark.sqlite
def test_a_terminal_shows_how_many_messages_an_event_has_had(
    start_command: Command, queues: QueueRegistry, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues.load([message(), message()])
    event = (*ALL, "--trigger-rebind-event", "--set", "queue=x")
    assert on_a_terminal(start_command, *event, columns=120).endswith(" no handler is connected to the rebind event\n")
    monkeypatch.setenv("REBIND_POLICY", SITE_POLICY)
    shown = on_a_terminal(start_command, *event, columns=120)
    assert re.search(r"rebinding .* 2\b", shown)
    assert MATCHED.fullmatch(shown.splitlines(keepends=True)[-1])
    assert names(url) == ["x", "x"]
    assert "rebinding" not in on_a_terminal(start_command, *ALL, columns=120)


WIDE = "日本語" * 20
MARKS = "e\u0301" * 60
MIXED = ("a" * 27 + "日") * 3


@pytest.mark.parametrize("text", ["x" * 60, WIDE, MARKS, MIXED, "\uff58" * 40, "한" * 40], ids=ascii)
@pytest.mark.parametrize("room", [12, 13, 30])
def test_a_cell_has_its_width_whatever_is_in_it(text: str, room: int) -> None:
    """Terminals show a wide character in two columns, and a combining mark in none. A cut wide one leaves a space."""
    cell = fitted(text, room, right=False)
    assert width(cell) == room
    head, tail = cell.rstrip().split("…")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert abs(width(head) - width(tail)) <= 2


WIDTHS = {"": 0, "abc": 3, "é": 1, "e\u0301": 1, "日本": 4, "ｱ": 1, "\uff21": 2, "ก็": 1, "हि": 2, "\U0001f600": 2}


@pytest.mark.parametrize(("text", "columns"), WIDTHS.items(), ids=ascii)
def test_the_width_of_a_text(text: str, columns: int) -> None:
    assert width(text) == columns


@pytest.mark.sqlite
@pytest.mark.parametrize(("encoding", "cut"), [("utf-8", "…"), ("latin-1", "~")])
def test_a_table_fits_a_terminal_whatever_its_names_and_encoding(
    start_command: Command, queues: QueueRegistry, monkeypatch: pytest.MonkeyPatch, encoding: str, cut: str
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    queues.load([message(meta={"queue": name}) for name in (WIDE, MARKS, MIXED, "short")])
    ask(queues, {"note": WIDE})
    _, *table = on_a_terminal(start_command, "queues", columns=70).splitlines()
    assert [width(line) <= 70 for line in table] == [True] * 6
    assert sum(cut in line for line in table) == 3
    assert cut in on_a_terminal(start_command, "history", columns=77).splitlines()[-1]


@pytest.mark.sqlite
@pytest.mark.parametrize("command", ["queues", "messages", "log", "history --json"])
def test_a_full_standard_output_is_one_line_and_a_closed_pipe_is_none(
    start_command: Command, queues: QueueRegistry, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # Python writes what is left when it ends
    queues.load([message(meta={"queue": str(n), "note": "x" * 1000}) for n in range(500)])
    for _ in range(2):
        ask(queues)
    with Path("/dev/full").open("wb") as full:
        process = start_command(*command.split(), stdout=full, stderr=subprocess.PIPE)
        assert process.communicate(timeout=30)[1] == b"Error: standard output: No space left on device\n"
    assert process.returncode == 1
    reader, writer = os.pipe()
    os.close(reader)
    process = start_command(*command.split(), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (process.communicate(timeout=30)[1], process.returncode) == (b"", 1)


@pytest.mark.slow
@pytest.mark.sqlite
@pytest.mark.parametrize("closed", [1, 2], ids=["output", "error"])
def test_a_standard_stream_may_be_closed(
    shell: Flask, queues: QueueRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed: int
) -> None:
    queues.load([message()])
    undo = ("rebind", "--undo", str(ask(queues, {"queue": "x"}).rebind_id), "--reason", "r")
    new = tmp_path / "new"
    new.write_text('{"id": "new", "message": {"sender": "", "recipient": "ada@example.com"}}')
    monkeypatch.setattr(terminal, "PROGRAM", ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *PROGRAM])
    for command in (undo, ("load", str(new)), ("queues",), ("messages",), ("history",)):
        status, output, error = shell(*command)
        assert (status, output != "", error) == (0, closed == 2, ""), command
    assert shell("load", str(new))[0] == 1
