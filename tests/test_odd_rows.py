"""Tests that one row that only a sender can write keeps nobody from the others, whichever way they are read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from databases import engine_for, nothing_changes, run_sql, stored
from factories import ask, connected_to, message, settled
from sqlalchemy.exc import StatementError
from terminal import Flask

import deliverylog
from delivery import Outcome, claim, settle
from deliverylog import response
from message import Message
from queues import QueueRegistry
from store import StoreRefused

IDS = ["first", "odd", "last"]
OK = {"response": response(250, "OK")}
ODD: list[Any] = []


def odd(name: str, engine: str = "", readable: bool = True, **columns: str) -> None:
    """Add a row, these columns as SQL: of one engine if only that takes it, `readable` if Python can read it."""
    marks = [getattr(pytest.mark, engine)] if engine else []
    ODD.append(pytest.param(columns, readable, id=name, marks=marks))


def nested(levels: int) -> str:
    return f"""{{"n": {"[" * levels}{"]" * levels}}}"""


def can_read(document: str) -> bool:
    """Later versions of Python read deeper nesting."""
    try:
        return bool(json.loads(document))
    except RecursionError:
        return False


odd("a number of 5,000 digits", readable=False, meta=f"""'{{"n": {"1" * 5000}}}'""")
odd("a number beyond a double", "sqlite", readable=False, meta="""'{"n": 1e400}'""")
odd("990 levels", readable=can_read(nested(990)), meta=f"'{nested(990)}'")
odd("3,000 levels", "postgresql", readable=can_read(nested(3000)), meta=f"'{nested(3000)}'")
odd("a list of recipients with a number", readable=False, recipient="""'["ada@example.com", 5]'""")
odd("a list of recipients with a list", readable=False, recipient="""'[["ada@example.com"]]'""")
odd("a recipient without a domain", recipient="'Postmaster'")
odd("half a character", "sqlite", meta="""'{"n": "\\ud800"}'""")
odd("half a character in a name", "sqlite", meta="""'{"campaign": "\\ud800"}'""")
odd("a NUL in a name", "sqlite", meta="""'{"campaign": "\\u0000"}'""")
odd("a sender that is not UTF-8", "sqlite", sender="CAST(x'ff' AS TEXT)")
odd("metadata that is not UTF-8", "sqlite", meta="CAST(x'7b226e223a22ff227d' AS TEXT)")
odd("a queue that is not UTF-8", "sqlite", queue="CAST(x'ff' AS TEXT)")
odd("half a character for a queue", "sqlite", queue="CAST(x'eda080' AS TEXT)")
odd("more digits than a double has", meta="""'{"\\u006e": 0.1000000000000000055}'""")
odd("blanks before the metadata", meta="""' \r\n\t{"n": 1}'""")


@dataclass
class Store:
    """A store with an odd row between two others, and how to look at it."""

    queues: QueueRegistry
    flask: Flask
    url: str
    columns: dict[str, str]
    """The row's odd ones, as SQL."""
    readable: bool

    def rows(self, columns: str = "id, sender, recipient, domain, queue, meta, due, num_attempts") -> list[Any]:
        """What the messages are, as the tables hold it."""
        kind = "BLOB" if self.url.startswith("sqlite") else "TEXT"
        casts = ", ".join(f"CAST({name} AS {kind})" for name in columns.split(", "))
        with engine_for(self.url).connect() as db:
            return [tuple(row) for row in db.exec_driver_sql(f"SELECT {casts} FROM messages ORDER BY due, id")]

    def logged(self) -> list[str]:
        """Of which messages there are records."""
        return sorted(record["id"] for record in deliverylog.records(self.queues.database))

    def noted(self) -> int:
        """How many messages have the note that a rebind leaves."""
        return sum('"note"' in str(meta) for (meta,) in self.rows("meta"))


def by_data(store: Store) -> None:
    assert ask(store.queues, {"note": "x"}).matched == 3
    assert (store.noted(), store.logged()) == (3, sorted(IDS))
    assert ("0055" in str(store.rows())) == ("0055" in str(store.columns))


def by_a_dry_run(store: Store) -> None:
    before = store.rows()
    planned = ask(store.queues, {"queue": "x"}, dry_run=True).plan
    assert planned
    assert (planned.matched, planned.moved, store.rows(), store.logged()) == (3, 3, before, [])


def by_the_event(store: Store) -> None:
    before = store.rows()
    names_half = "campaign" in store.columns.get("meta", "")
    with connected_to(note):
        if store.readable and not names_half:
            assert ask(store.queues, trigger_rebind_event=True).matched == 3
            assert (store.noted(), store.logged()) == (3, sorted(IDS))
            assert ("ud800" in str(store.rows())) == ("ud800" in str(store.columns))
            return
        with pytest.raises(StoreRefused, match=r"^the message odd cannot be (read|stored): "):
            ask(store.queues, trigger_rebind_event=True)
        assert (store.rows(), store.logged()) == (before, [])
        run_sql(store.url, "UPDATE messages SET queue = 'aside' WHERE id = 'odd'")
        assert ask(store.queues, domain="example.com", trigger_rebind_event=True).matched == 2


def note(message: Message, data: dict[str, str]) -> None:
    message.meta["note"] = "x"


def by_an_undo(store: Store) -> None:
    first = ask(store.queues, {"note": "x"})
    assert ask(store.queues, undo=first.rebind_id).matched == 3
    assert (store.noted(), store.logged()) == (0, sorted(IDS * 2))


def by_queues(store: Store) -> None:
    status, output, error = store.flask("queues")
    assert (status, output.splitlines()[-1].partition(", ")[2], error) == (0, "3 messages, 3 due", "")


def by_messages(store: Store) -> None:
    status, output, error = store.flask("messages", "--limit", "9")
    shown = [json.loads(line)["id"] for line in output.splitlines()]
    if store.readable:
        assert (status, shown, error) == (0, IDS, "")
        return
    assert (status, shown, error.count("\n")) == (1, ["first", "last"], 1)
    assert error.startswith("the message odd cannot be read: ")


def by_the_log(store: Store) -> None:
    ask(store.queues)
    status, output, error = store.flask("log")
    assert (status, sorted(json.loads(line)["id"] for line in output.splitlines()), error) == (0, sorted(IDS), "")


def by_a_claim(store: Store) -> None:
    before = {row[0]: row for row in store.rows("id, sender, recipient, domain, queue, meta, num_attempts")}
    claims = claim(10, lease=60)
    left = ["odd"] if not store.readable or "queue" in store.columns else []
    assert sorted(each.id for each in claims) == sorted({*IDS} - {*left})
    assert [settled(each, "Delivery", OK) for each in claims] == [True] * len(claims)
    assert store.logged() == sorted(each.id for each in claims)
    rows = store.rows("id, sender, recipient, domain, queue, meta, num_attempts")
    assert rows == [row for id, row in before.items() if left and id in ("odd", b"odd")]
    assert claim(10, lease=60) == []


WAYS = [by_data, by_a_dry_run, by_the_event, by_an_undo, by_queues, by_messages, by_the_log, by_a_claim]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.replace("_", " "))
@pytest.mark.parametrize(("columns", "readable"), ODD)
def test_an_odd_row_does_not_hide_the_others(
    queues: QueueRegistry, flask: Flask, url: str, columns: dict[str, str], readable: bool, way: Callable[[Store], None]
) -> None:
    queues.load(message(id=id, due=1e9 + n) for n, id in enumerate(IDS))
    changes = ", ".join(f"{name} = {value}" for name, value in columns.items())
    run_sql(url, f"UPDATE messages SET {changes} WHERE id = 'odd'")
    way(Store(queues, flask, url, columns, readable))


def test_an_outcome_that_the_log_does_not_take_changes_nothing(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    (claimed,) = claim(1, lease=60)
    refused = r"^the tables do not allow it: .*response_is_readable"
    with nothing_changes(url), pytest.raises(StoreRefused, match=refused):
        settle(claimed, [Outcome("Delivery", ["ada@example.com"], {"response": {"code": 250}})])


@pytest.mark.parametrize("no_json", [float("nan"), {1}], ids=str)
def test_details_that_are_no_json_are_not_taken_for_some(queues: QueueRegistry, url: str, no_json: Any) -> None:
    queues.load([message()])
    (claimed,) = claim(1, lease=60)
    with nothing_changes(url), pytest.raises((StatementError, TypeError, ValueError), match="JSON"):
        settle(claimed, [Outcome("Delivery", ["ada@example.com"], {"a": no_json})])


def test_the_exit_status_does_not_depend_on_how_many_messages_cannot_be_read(
    queues: QueueRegistry, flask: Flask, url: str
) -> None:
    queues.load([message(), message()])
    run_sql(url, "UPDATE messages SET recipient = '[5]'")
    status, output, error = flask("messages")
    assert (status, output, error.count("cannot be read")) == (1, "", 2)


@pytest.mark.parametrize(
    ("became", "left"),
    [('["bob@example.com", 5]', '["bob@example.com", 5]'), ('["ada@example.com", "postmaster"]', "postmaster")],
    ids=["unreadable", "without a domain"],
)
def test_the_outcome_of_a_claim_is_written_whatever_its_recipients_became(
    queues: QueueRegistry, url: str, became: str, left: str
) -> None:
    queues.load([message()])
    (claimed,) = claim(1, lease=60)
    run_sql(url, f"UPDATE messages SET recipient = '{became}', domain = 'odd.example'")
    assert settle(claimed, [Outcome("Delivery", ["ada@example.com"], OK)], due=4e9)
    (record,) = deliverylog.records(queues.database)
    assert (record["type"], record["recipient"]) == ("Delivery", "ada@example.com")
    (row,) = stored(url)
    assert (row["recipient"], row["domain"], row["num_attempts"]) == (left, "odd.example", 1)
