"""Tests of the tables as an interface: what they refuse from those who write to them with plain SQL.

docs/contract.md, "Messages come and go".
"""

import pytest
from conftest import engine_for, run_sql, stored
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from queues import QueueRegistry
from store import FIRST_SECOND, LAST_SECOND, MAX_NAME

# A row of each table, as SQL.
ROWS = {
    "messages": {
        "id": "'m'",
        "sender": "'news@acme.example'",
        "recipient": "'ada@example.com'",
        "domain": "'example.com'",
        "queue": "'example.com'",
        "meta": "'{}'",
        "created": "1",
        "due": "2",
    },
    "log": {
        "type": "'Delivery'",
        "id": "'m'",
        "sender": "'news@acme.example'",
        "recipient": "'ada@example.com'",
        "queue": "'example.com'",
        "size": "0",
        "created": "1",
        "num_attempts": "0",
        "event_time": "2",
        "meta": "'{}'",
    },
    "rebinds": {
        "rebind_id": "'r'",
        "event_time": "1",
        "actor": "'me'",
        "nodeid": "'n'",
        "reason": "'a test'",
        "request": "'{}'",
        "matched": "0",
        "moved": "0",
        "flushed": "0",
        "first_key": "1",
        "last_key": "0",
    },
    "contents": {"id": "'m'", "data": "''"},
}
LONGEST = f"'{'é' * (MAX_NAME // 2)}'"
TOO_LONG = f"'{'é' * (MAX_NAME // 2)}x'"
TIMES = [("messages", "created"), ("messages", "due"), ("log", "created"), ("log", "event_time")]
TIMES += [("rebinds", "event_time")]


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
        ("messages", "size", "-1", "counts_are_not_negative"),
        ("messages", "num_attempts", "-1", "counts_are_not_negative"),
        ("log", "event_time", "NULL", "event_time_or_rebind"),
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
    assert (len(stored(url)), len(list(queues.records()))) == (table == "messages", table == "log")


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
