"""Tests of the tables as an interface: what others write to them with plain SQL, and what the tables refuse.

docs/tables.md, and docs/contract.md, "Messages come and go".
"""

import json
import re
from typing import Any

import pytest
from databases import contents, engine_for, logged, run_sql, stored
from factories import ask, undo
from services import ROOT
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

import deliverylog
from history import NODEID
from queues import QueueRegistry
from tables import FIRST_SECOND, LAST_SECOND, MAX_NAME

# A row of each table, as SQL.
IN_BOTH = {"id": "'m'", "sender": "''", "recipient": "'ada@example.com'", "queue": "'example.com'", "created": "1"}
IN_BOTH |= {"meta": "'{}'"}
RECORD = IN_BOTH | {"type": "'Delivery'", "size": "0", "num_attempts": "0", "event_time": "2"}
REBIND = dict.fromkeys(("rebind_id", "actor", "nodeid", "reason"), "'r'") | {"request": "'{}'", "event_time": "1"}
REBIND |= {"matched": "0", "moved": "0", "flushed": "0", "first_key": "1", "last_key": "0"}
ROWS = {
    "messages": IN_BOTH | {"domain": "'example.com'", "due": "2"},
    "log": RECORD | {"nodeid": "'01A21189-0776-707d-8281-0c4c8ce1a443'"},
    "rebinds": REBIND,
    "contents": {"id": "'m'", "data": "''"},
}
LONGEST = f"'{'é' * (MAX_NAME // 2)}'"
TOO_LONG = f"'{'é' * (MAX_NAME // 2)}x'"
TIMES = [("messages", "created"), ("messages", "due"), ("messages", "leased_until")]
TIMES += [("log", "created"), ("log", "event_time"), ("rebinds", "event_time")]

NO_UUIDS = ["NULL", "''", "'mx1'", "'01a211890776707d82810c4c8ce1a443'", "'x1a21189-0776-707d-8281-0c4c8ce1a443'"]
NO_RESPONSES = ["null", '"250 OK"', '{"code": 250}', '{"content": "OK"}', '{"code": 250, "content": null}']
NO_RESPONSES += [f'{{"code": {code}, "content": "OK"}}' for code in ('"250"', "250.5", "-1", "65536", "null")]

SQL = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "tables.md").read_text(), re.DOTALL)
# The statements of the page, without their comments.
LEFT_ALONE, SENDER, WORKER = (
    re.sub("^--.*\n", "", block, flags=re.MULTILINE).strip("; \n").split(";") for block in SQL
)


def run(url: str, *statements: str, **parameters: Any) -> list[Any]:
    """Run statements of docs/tables.md in one transaction: the rows of the last one, or how many rows it changed."""
    with engine_for(url).begin() as db:
        if url.startswith("sqlite"):
            statements = tuple(one.replace("FOR UPDATE SKIP LOCKED", "") for one in statements)
        *_, last = (db.execute(text(one), parameters) for one in statements)
        return [row._asdict() for row in last] if last.returns_rows else [last.rowcount]


ADDRESSES = {"sender": "news@acme.example", "recipient": "ada@example.com"}


def send(url: str, id: str, queue: str = "example.com") -> None:
    """Add a message with the statements of docs/tables.md, "A sender"."""
    row = ADDRESSES | {"id": id, "domain": "example.com", "queue": queue, "meta": '{"a": [1]}', "size": 5, "now": 1e9}
    run(url, *SENDER, **row, data=b"Hello")


def test_a_sender_needs_only_the_statements_of_the_page(queues: QueueRegistry, url: str) -> None:
    send(url, "m1")
    columns = {"id": "m1", "domain": "example.com", "queue": "example.com", "meta": {"a": [1]}, "size": 5}
    columns |= {"created": 1e9, "due": 1e9, "num_attempts": 0, "leased_until": 0.0}
    assert (stored(url), contents(url)) == ([ADDRESSES | columns], {"m1": b"Hello"})


def test_a_worker_needs_only_the_statements_of_the_page(queues: QueueRegistry, url: str) -> None:
    """docs/tables.md, "A worker"."""
    due_queues, discard, claim, remove, record, try_later = WORKER
    for id, queue in (("m1", "example.com"), ("m2", "example.com"), ("m3", "example.com"), ("m4", "null")):
        send(url, id, queue)
    now, later = 1.5e9, 1.6e9
    lease = now + 300
    assert {row["queue"] for row in run(url, due_queues, now=now)} == {"example.com", "null"}
    assert (run(url, discard, now=now), {*contents(url)}) == ([1], {"m1", "m2", "m3"})
    claimed = run(url, claim, queue="example.com", now=now)
    assert {(row["id"], row["leased_until"]) for row in claimed} == {("m1", lease), ("m2", lease), ("m3", lease)}
    assert run(url, claim, queue="example.com", now=now) == []

    delivery = ADDRESSES | {"id": "m1", "queue": "example.com", "meta": "{}", "size": 5, "created": 1e9}
    said = {"code": 250, "enhanced_code": None, "content": "OK", "command": None}
    delivery |= {"num_attempts": 0, "now": now, "nodeid": NODEID, "details": json.dumps({"response": said})}
    assert run(url, remove, record, **delivery) == [1]
    assert [(one["type"], one["id"], one["response"]) for one in logged(url)] == [("Delivery", "m1", said)]
    assert (run(url, remove, id="m1"), {*contents(url)}) == ([0], {"m2", "m3"})

    run(url, try_later, id="m2", due=1e9, lease=lease, later=later)
    names = ("due", "num_attempts", "leased_until")
    assert [tuple(row[name] for name in names) for row in stored(url)] == [(later, 1, 0.0), (1e9, 0, lease)]
    assert ask(queues, {"queue": "x"}).moved == 2
    before = stored(url)[1]
    run(url, try_later, id="m3", due=1e9, lease=lease, later=later)
    assert stored(url)[1] == before | {"num_attempts": 1, "leased_until": 0.0}


def test_the_page_tells_which_messages_an_undo_left_alone_and_why(queues: QueueRegistry, url: str) -> None:
    for id in ("back", "gone", "moved", "meta", "stays"):
        send(url, id, "stays" if id == "stays" else "example.com")
    first = ask(queues, {"queue": "stays"})
    run_sql(url, "DELETE FROM messages WHERE id = 'gone'", "UPDATE messages SET queue = 'x' WHERE id = 'moved'")
    run_sql(url, 'UPDATE messages SET meta = \'{"queue": "stays", "b": 1}\' WHERE id = \'meta\'')
    back = undo(queues, first)
    left = run(url, *LEFT_ALONE, rebind_id=first.rebind_id)
    why = {"gone": "gone", "moved": "moved on to x", "meta": "changed"}
    assert {row["id"]: row["why"] for row in left} == why
    assert len(why) == back.left


def insertion(table: str, column: str, value: str) -> str:
    """The statement that adds a row with this value, an SQL literal, in this column."""
    row = ROWS[table] | {column: value}
    return f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(row.values())})"


@pytest.mark.parametrize(
    ("table", "column", "value", "constraint"),
    [
        ("messages", "id", "''", "id_length"),
        ("messages", "id", TOO_LONG, "id_length"),
        ("messages", "queue", TOO_LONG, "queue_length"),
        ("messages", "recipient", "''", "recipient_is_address_or_list"),
        ("messages", "recipient", "'[]'", "recipient_is_address_or_list"),
        *(
            ("messages", "meta", repr(meta), "meta_is_object|JSON|json")
            for meta in ("[]", "null", "", "{", '{"a": NaN}')
        ),
        ("messages", "size", "-1", "counts_are_not_negative"),
        ("messages", "num_attempts", "-1", "counts_are_not_negative"),
        ("log", "event_time", "NULL", "event_time_or_rebind"),
        ("log", "type", "'Delivered'", "type_is_known"),
        *(("log", "nodeid", nodeid, "nodeid_is_uuid_or_rebind") for nodeid in NO_UUIDS),
        *(("log", "details", f"'{{\"response\": {response}}}'", "response_is_readable") for response in NO_RESPONSES),
        *((*time, str(FIRST_SECOND - 1), f"{time[1]}_is_a_time") for time in TIMES),
        *((*time, str(LAST_SECOND + 1), f"{time[1]}_is_a_time") for time in TIMES),
    ],
)
def test_a_row_that_the_service_could_not_handle_is_refused(
    queues: QueueRegistry, url: str, table: str, column: str, value: str, constraint: str
) -> None:
    with pytest.raises(DBAPIError, match=constraint):
        run_sql(url, insertion(table, column, value))


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("messages", "recipient", "'[ada'"),
        ("messages", "size", "'large'"),
        *((*time, "'NaN'") for time in TIMES),
        *((*time, "'infinity'") for time in TIMES),
        ("log", "size", "'large'"),
        ("rebinds", "matched", "'many'"),
        ("contents", "data", "1"),
    ],
)
def test_a_value_of_another_type_is_refused(
    queues: QueueRegistry, url: str, table: str, column: str, value: str
) -> None:
    """PostgreSQL knows NaN and the infinities as numbers, and SQLite as text."""
    refused = r"cannot store|address_or_list|_is_a_time|malformed JSON|invalid input syntax|is of type bytea"
    with pytest.raises(DBAPIError, match=refused):
        run_sql(url, insertion(table, column, value))


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("messages", "id", LONGEST),
        ("messages", "queue", LONGEST),
        ("messages", "queue", "''"),
        ("messages", "recipient", """'["ada@example.com", "bob@example.com"]'"""),
        *((*time, str(FIRST_SECOND)) for time in TIMES),
        *((*time, str(LAST_SECOND)) for time in TIMES),
    ],
)
def test_a_row_that_is_just_within_the_limits_is_taken(
    queues: QueueRegistry, url: str, table: str, column: str, value: str
) -> None:
    run_sql(url, insertion(table, column, value))
    assert (len(stored(url)), len(list(deliverylog.records(queues.database)))) == (table == "messages", table == "log")


@pytest.mark.parametrize(
    ("column", "document", "meta"),
    [
        pytest.param("meta", f'{{"n": {"1" * 5000}}}', None, id="digits"),
        pytest.param("meta", f'{{"n": {"[" * 3000}{"]" * 3000}}}', None, id="levels"),
        pytest.param("meta", '{"n": 1e400}', None, id="more than a double", marks=pytest.mark.sqlite),
        pytest.param("meta", '\n {"n": 1}', {"n": 1}, id="white space"),
        pytest.param("meta", f'{{"n": {10**309}}}', {"n": 10**309}, id="more than KumoMTA's reader takes"),
        pytest.param("details", f'{{"site": {"1" * 5000}}}', {}, id="details of digits"),
        pytest.param("details", "[1]", {}, id="details that are a list"),
    ],
)
def test_a_record_is_shown_as_json_and_hides_no_other_whatever_a_worker_wrote(
    queues: QueueRegistry, url: str, column: str, document: str, meta: dict[str, Any] | None
) -> None:
    """What Python cannot read is shown as text. How many levels it can depends on its version."""
    run_sql(url, insertion("log", column, f"'{document}'"), insertion("log", "id", "'other'"))
    odd, other = logged(url)
    json.dumps(odd, allow_nan=False)
    assert (other["id"], odd["meta"], odd["site"]) == ("other", document if meta is None else meta, "")


def test_a_key_belongs_to_one_rebind(queues: QueueRegistry, url: str) -> None:
    """docs/contract.md, "Retries"."""
    run_sql(url, insertion("rebinds", "idempotency_key", "'k'"))
    with pytest.raises(DBAPIError, match=r"(?i)unique.*idempotency_key"):
        run_sql(url, insertion("rebinds", "idempotency_key", "'k'").replace("'r'", "'another'"))


@pytest.mark.postgresql
def test_names_and_ids_are_ordered_by_their_bytes_whatever_the_language_of_the_database(
    queues: QueueRegistry, url: str
) -> None:
    """The columns say so themselves: the server that the tests bring along knows no language."""
    with engine_for(url).connect() as db:
        of_names = "FROM information_schema.columns WHERE table_name = 'messages' AND column_name IN ('id', 'queue')"
        assert db.scalars(text(f"SELECT collation_name {of_names}")).all() == ["C", "C"]
