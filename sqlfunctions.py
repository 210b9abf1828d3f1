"""SQL functions of our own, each in the words of SQLite and of PostgreSQL."""

from typing import Any

from sqlalchemy import JSON, ColumnElement, Integer, Text, literal_column
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class octets(FunctionElement[int]):
    """`octets(text)`: how many bytes it has in UTF-8."""

    type = Integer()
    inherit_cache = True


@compiles(octets, "sqlite")
def _octets_in_sqlite(element: octets, compiler: Any, **kw: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **kw)} AS BLOB))"


@compiles(octets, "postgresql")
def _octets_in_postgresql(element: octets, compiler: Any, **kw: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **kw)})"


class merge(FunctionElement[Any]):
    """`merge(meta, data)`: `meta` with every key of `data` set, over any earlier value."""

    name = "merge"
    inherit_cache = True

    def __init__(self, meta: ColumnElement[Any], data: ColumnElement[Any]) -> None:
        super().__init__(meta, data)
        self.type = meta.type


@compiles(merge, "sqlite")
def _merge_in_sqlite(element: merge, compiler: Any, **kw: Any) -> str:
    # RFC 7396: where no value of the patch is null or an object, as in `data`, it sets each key and no more.
    return f"json_patch({compiler.process(element.clauses, **kw)})"


@compiles(merge, "postgresql")
def _merge_in_postgresql(element: merge, compiler: Any, **kw: Any) -> str:
    meta, data = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({meta} || {data})"


class meta_text(FunctionElement[str]):
    """`meta_text(meta, key)`: the string at `key`, or NULL where there is none, or a value that is no string."""

    name = "meta_text"
    type = Text()
    inherit_cache = True

    def __init__(self, meta: ColumnElement[Any], key: str) -> None:
        # As they stand: SQLite would put a path together from parameters each time, which is as dear as to follow it.
        super().__init__(meta, literal_column(f"'{key}'"), literal_column(f"'$.{key}'"))


@compiles(meta_text, "sqlite")
def _meta_text_in_sqlite(element: meta_text, compiler: Any, **kw: Any) -> str:
    meta, _, path = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"CASE json_type({meta}, {path}) WHEN 'text' THEN json_extract({meta}, {path}) END"


@compiles(meta_text, "postgresql")
def _meta_text_in_postgresql(element: meta_text, compiler: Any, **kw: Any) -> str:
    meta, key, _ = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"CASE jsonb_typeof({meta} -> {key}) WHEN 'string' THEN {meta} ->> {key} END"


class json_list(FunctionElement[list[str]]):
    """`json_list(text)`: the texts of all rows as one list, which is one row to fetch."""

    type = JSON()
    inherit_cache = True


@compiles(json_list, "sqlite")
def _json_list_in_sqlite(element: json_list, compiler: Any, **kw: Any) -> str:
    return f"json_group_array({compiler.process(element.clauses, **kw)})"


@compiles(json_list, "postgresql")
def _json_list_in_postgresql(element: json_list, compiler: Any, **kw: Any) -> str:
    return f"coalesce(json_agg({compiler.process(element.clauses, **kw)}), '[]')"


class position(FunctionElement[int]):
    """`position(text, part)`: where `part` begins in it, from 1; 0 where it is not in it. An empty one begins at 1."""

    type = Integer()
    inherit_cache = True


@compiles(position, "sqlite")
def _position_in_sqlite(element: position, compiler: Any, **kw: Any) -> str:
    return f"instr({compiler.process(element.clauses, **kw)})"


@compiles(position, "postgresql")
def _position_in_postgresql(element: position, compiler: Any, **kw: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **kw)})"


class following(FunctionElement[str]):
    """`following(text)`: the first text after it, in the order of bytes."""

    type = Text()
    inherit_cache = True


@compiles(following, "sqlite")
def _following_in_sqlite(element: following, compiler: Any, **kw: Any) -> str:
    return f"({compiler.process(element.clauses, **kw)} || char(0))"


@compiles(following, "postgresql")
def _following_in_postgresql(element: following, compiler: Any, **kw: Any) -> str:
    # No text has a NUL there.
    return f"({compiler.process(element.clauses, **kw)} || chr(1))"
