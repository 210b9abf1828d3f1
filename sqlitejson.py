"""SQLite's expressions for metadata, which is JSON in a column of text.

postgresql.py has the same functions for its JSONB.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import ColumnElement, Text, case, func, literal, literal_column

from message import to_json
from names import MetaText
from tables import messages

_STRING = re.compile(rb'("(?:[^"\\]|\\.)*")(\s*:)?')  # with a colon after it, a key


def plain_keys(document: bytes) -> bytes:
    """A JSON document with its keys written without needless escapes, and all else as it is."""

    def plain(match: re.Match[bytes]) -> bytes:
        string, colon = match.groups()
        if colon and b"\\" in string:
            with suppress(ValueError):  # half a character, or not UTF-8
                return to_json(json.loads(string)).encode() + colon
        return match[0]

    return _STRING.sub(plain, document)


# SQLite before 3.45 compares keys as they are written: "\\u0074enant" would not be `tenant`.
def _is_escaped(table: str) -> str:
    return f"instr({table}.meta, '\\') > 0"


def _unescaped(table: str) -> str:
    return f"CAST(plain_keys(CAST({table}.meta AS BLOB)) AS TEXT)"


def _plain_meta(table: str) -> str:
    return f"CASE WHEN {_is_escaped(table)} THEN {_unescaped(table)} ELSE {table}.meta END"


def from_meta(build: Callable[[MetaText], ColumnElement[str]], with_record: bool) -> ColumnElement[str]:
    """What `build` makes of an expression for the string at a key of a message's metadata, or of its record's."""

    def text_in(meta: Callable[[str], str]) -> ColumnElement[str]:
        def meta_text(table: str, key: str) -> ColumnElement[str]:
            path = f"'$.{key}'"  # as a parameter it would be parsed for each message
            found = f"json_extract({meta(table)}, {path})"
            return literal_column(f"CASE json_type({meta(table)}, {path}) WHEN 'text' THEN {found} END", Text)

        return build(meta_text)

    # Whether keys are escaped is asked once per message, and not for each key.
    escaped = f"{_is_escaped('messages')} OR {_is_escaped('log')}" if with_record else _is_escaped("messages")
    return case((literal_column(escaped), text_in(_unescaped)), else_=text_in("{}.meta".format))


def merge(data: Mapping[str, str], unset: Collection[str]) -> ColumnElement[Any]:
    """A message's metadata with every key of `data` set and the keys `unset` removed."""
    # RFC 7396: a patch whose values are strings sets each key, and null removes it.
    patch = literal(to_json({**data, **dict.fromkeys(unset)}), Text)
    return func.json_patch(literal_column(_plain_meta("messages")), patch, type_=messages.c.meta.type)


def restored(keys: Sequence[str]) -> ColumnElement[Any]:
    """A message's metadata with these keys as they were when its record was written."""
    now, before = _plain_meta("messages"), _plain_meta("log")
    paths = [f"'$.\"{key}\"'" for key in keys]
    values = [f"{path}, json({before} -> {path})" for path in paths]
    # `$[0]` removes nothing of an object.
    missing = [f"CASE WHEN json_type({before}, {path}) IS NULL THEN {path} ELSE '$[0]' END" for path in paths]
    every = ", ".join(missing)
    return literal_column(f"json_remove(json_set({now}, {', '.join(values)}), {every})", messages.c.meta.type)


def changes(keys: Sequence[str]) -> ColumnElement[str]:
    """What a record says of these keys of the new metadata: message.Changes, as JSON."""
    members = (f"coalesce(',\"{key}\":' || (new.meta -> '$.\"{key}\"'), '')" for key in keys)
    return literal_column(
        f"""'{{"unset":{to_json(keys)},"data":{{' || ltrim({" || ".join(members)}, ',') || '}}}}'""", Text
    )
