"""The tables, a public interface for senders and workers in any language: docs/tables.md describes every column."""

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles

SCHEMA_VERSION = 3  # of the tables below; in 2 a claim moved `due`, and records did not say what a message became
MAX_NAME = 2000  # bytes of a queue's name or a message's id: what an index of PostgreSQL takes, with room to spare
TOO_LONG = f"the name of a queue would be longer than {MAX_NAME} bytes"
FIRST_SECOND, LAST_SECOND = -62135596800, 253402300799  # of the years 1 and 9999, in seconds since 1970

# The engines' connections have the serializer, and SQLite's STRICT tables know no type JSON.
Document = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
compiles(sa.JSON, "sqlite")(lambda *_, **__: "TEXT")

Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Seconds: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
Name = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")  # ordered by its bytes, as SQLite orders text


def _is_time(column: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{column} BETWEEN {FIRST_SECOND} AND {LAST_SECOND}", name=f"{column}_is_a_time")


def _by_engine(name: str, sqlite: str, postgresql: str) -> tuple[sa.CheckConstraint, sa.CheckConstraint]:
    return (
        sa.CheckConstraint(sqlite, name=name).ddl_if(dialect="sqlite"),
        sa.CheckConstraint(postgresql, name=name).ddl_if(dialect="postgresql"),
    )


RECORD_TYPES = (  # as KumoMTA knows them
    *("AdminRebind", "Delivery", "Bounce", "TransientFailure", "Expiration", "AdminBounce", "Reception", "Rejection"),
    *("OOB", "Feedback", "DeferredInjectionRebind", "Delayed", "XferOut", "XferIn"),
)

metadata = sa.MetaData()

schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer, primary_key=True))

messages = sa.Table(
    "messages",
    metadata,
    sa.Column("id", Name, primary_key=True),
    sa.Column("sender", sa.Text, nullable=False),
    sa.Column("recipient", sa.Text, nullable=False),
    sa.Column("domain", sa.Text, nullable=False),
    sa.Column("queue", Name, nullable=False),
    sa.Column("meta", Document, nullable=False),
    sa.Column("size", Number, nullable=False, server_default="0"),
    sa.Column("created", Seconds, nullable=False),
    sa.Column("due", Seconds, nullable=False),
    sa.Column("num_attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("leased_until", Seconds, nullable=False, server_default="0"),
    *_by_engine(
        "id_length", f"length(CAST(id AS BLOB)) BETWEEN 1 AND {MAX_NAME}", f"octet_length(id) BETWEEN 1 AND {MAX_NAME}"
    ),
    *_by_engine(
        "recipient_is_address_or_list",
        "CASE WHEN substr(recipient, 1, 1) = '[' THEN json_valid(recipient) AND json_type(recipient) = 'array' "
        "AND json_array_length(recipient) > 0 ELSE recipient <> '' END",
        "CASE WHEN left(recipient, 1) = '[' THEN jsonb_array_length(recipient::jsonb) > 0 ELSE recipient <> '' END",
    ),
    *_by_engine("queue_length", f"length(CAST(queue AS BLOB)) <= {MAX_NAME}", f"octet_length(queue) <= {MAX_NAME}"),
    *_by_engine(
        "meta_is_object",
        # json_type alone would accept JSON5 in later versions of SQLite.
        "json_valid(meta) AND ltrim(meta, char(9, 10, 13, 32)) GLOB '{*'",
        "jsonb_typeof(meta) = 'object'",
    ),
    sa.CheckConstraint("size >= 0 AND num_attempts >= 0", name="counts_are_not_negative"),
    *map(_is_time, ("created", "due", "leased_until")),
    postgresql_with={"fillfactor": 50},  # a changed row goes beside the old one: a rebind takes a quarter less time
)

messages_queue_due = sa.Index("messages_queue_due", messages.c.queue, messages.c.due)

contents = sa.Table(
    "contents",
    metadata,
    sa.Column("id", Name, sa.ForeignKey(messages.c.id, ondelete="CASCADE"), primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

# SQLite honours the foreign key only on connections that ask for it, which a worker in another language may not do.
CONTENT_GOES = "CREATE TRIGGER content_goes AFTER DELETE ON messages BEGIN DELETE FROM contents WHERE id = old.id; END"
sa.event.listen(contents, "after_create", sa.DDL(CONTENT_GOES).execute_if(dialect="sqlite"))  # type: ignore[no-untyped-call]

rebinds = sa.Table(
    "rebinds",
    metadata,
    sa.Column("number", Number, sa.Identity(), primary_key=True),  # in the order in which they were done
    sa.Column("rebind_id", sa.Text, nullable=False, unique=True),
    sa.Column("event_time", Seconds, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("nodeid", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("request", Document, nullable=False),  # all that was asked: RebindRequest.asked
    sa.Column("idempotency_key", sa.Text, unique=True),
    sa.Column("matched", Number, nullable=False),
    sa.Column("moved", Number, nullable=False),
    sa.Column("flushed", Number, nullable=False),
    sa.Column("left_alone", Number),  # of an undo: Rebind-Left
    sa.Column("first_key", Number, nullable=False),  # its records' keys in the log lie from here …
    sa.Column("last_key", Number, nullable=False),  # … to here, with others' between them
    _is_time("event_time"),
    sqlite_autoincrement=True,
)

# What each record has of its message. A record of a rebind has it as it was before, except the queue.
OF_MESSAGE = ("id", "sender", "recipient", "queue", "meta", "size", "created", "num_attempts")

log = sa.Table(
    "log",
    metadata,
    sa.Column("key", Number, sa.Identity(), primary_key=True),
    sa.Column("type", sa.Text, nullable=False),
    *(sa.Column(column.name, column.type, nullable=False) for column in messages.c[OF_MESSAGE]),
    # of an AdminRebind record alone; what all records of a rebind share is in `rebinds`
    sa.Column("rebind_id", sa.Text),
    sa.Column("old_queue", Name),
    sa.Column("domain", sa.Text),
    sa.Column("due", Seconds),
    # what the event or an undo made of it, NULL if nothing else; what a rebind by data made follows from its request
    sa.Column("new_sender", sa.Text),
    sa.Column("new_recipient", sa.Text),
    sa.Column("new_meta", Document),
    sa.Column("new_due", Seconds),  # of an undo alone
    # of all others
    sa.Column("event_time", Seconds),
    sa.Column("nodeid", sa.Text),
    sa.Column("details", Document),  # the fields of the record beside those of every record
    *map(_is_time, ("created", "event_time")),
    # A rebind's own type first: to look it up in the list would take a third of a rebind in SQLite.
    sa.CheckConstraint(f"type = 'AdminRebind' OR type IN {RECORD_TYPES}", name="type_is_known"),
    sa.CheckConstraint("event_time IS NOT NULL OR rebind_id IS NOT NULL", name="event_time_or_rebind"),
    *_by_engine(
        "nodeid_is_uuid_or_rebind",
        f"rebind_id IS NOT NULL OR coalesce(nodeid GLOB '{'-'.join('[0-9a-fA-F]' * n for n in (8, 4, 4, 4, 12))}', 0)",
        "rebind_id IS NOT NULL OR coalesce(nodeid ~ '^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$', false)",
    ),
    *_by_engine(
        "response_is_readable",  # a code of 16 bits and a text, if there is one
        "details IS NULL OR coalesce(json_type(details, '$.response.content') = 'text' "
        "AND json_type(details, '$.response.code') = 'integer' "
        "AND json_extract(details, '$.response.code') BETWEEN 0 AND 65535, json_type(details, '$.response') IS NULL)",
        "details IS NULL OR coalesce(jsonb_typeof(details #> '{response,content}') = 'string' "
        "AND jsonb_typeof(details #> '{response,code}') = 'number' "
        "AND details #>> '{response,code}' ~ '^[0-9]{1,5}$' "
        "AND (details #>> '{response,code}')::numeric <= 65535, details -> 'response' IS NULL)",
    ),
    sqlite_autoincrement=True,  # a key is never used again, so that a reader who holds one misses nothing
)

for table in metadata.tables.values():
    table.dialect_kwargs["sqlite_strict"] = True  # otherwise SQLite takes a value of any type
