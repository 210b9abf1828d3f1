"""openapi.yaml: that it says what the schemas in schemas.py accept, and what a real gunicorn answers."""

import itertools
import re
import tomllib
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
import yaml
from databases import engine_for, locked, stored
from factories import message
from hypothesis import assume, settings
from marshmallow import Schema, ValidationError
from services import PATH, ROOT, SITE_POLICY, Service, Start
from test_schemas import KEYS, NO_KEYS

import app
from names import NAMING_KEYS
from queues import QueueRegistry
from schemas import QueryError, RebindQuerySchema, RebindRequestSchema, idempotency_key

DOCUMENT = yaml.safe_load((ROOT / "openapi.yaml").read_text())
POST = DOCUMENT["paths"][PATH]["post"]
RESPONSES: dict[str, Any] = POST["responses"]
BODY = POST["requestBody"]["content"]["application/json"]
PARAMETERS: dict[str, Any] = {parameter["name"]: parameter for parameter in POST["parameters"]}

api = schemathesis.openapi.from_path(ROOT / "openapi.yaml", config=schemathesis.Config(seed=20261124))


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with what its `$ref` names; what stands beside that takes precedence."""
    if "$ref" not in schema:
        return schema
    there = DOCUMENT["components"]["schemas"][schema["$ref"].removeprefix("#/components/schemas/")]
    return resolved(there) | {key: value for key, value in schema.items() if key != "$ref"}


def test_the_version_is_the_project_s() -> None:
    assert DOCUMENT["info"]["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def validator(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    """What tells whether a value is as `schema`, a part of the document, says."""
    return jsonschema_rs.Draft202012Validator(schema | {"components": DOCUMENT["components"]})


# The request, as schemas.py reads it


def test_the_body_has_the_fields_of_the_schema() -> None:
    """What they may be is compared below, value by value."""
    body, fields = resolved(BODY["schema"]), RebindRequestSchema().fields
    assert (list(body["properties"]), body["required"]) == (list(fields), [n for n in fields if fields[n].required])
    described = {name: resolved(field) for name, field in body["properties"].items()}
    assert {name: field["default"] for name, field in described.items() if "default" in field} == {
        name: field.load_default for name, field in fields.items() if not field.required
    }


def test_the_query_has_the_parameters_of_the_schema() -> None:
    """What they may be is compared by schemathesis, below."""
    described = {name: parameter["schema"] for name, parameter in PARAMETERS.items() if parameter["in"] == "query"}
    assert {name: schema.get("default") for name, schema in described.items()} == RebindQuerySchema().load({})
    assert described["limit"] == {"type": "integer", "minimum": 1, "maximum": 10**18 - 1}
    assert not any(parameter.get("required") for parameter in PARAMETERS.values())


def loads(schema: Schema, value: Any) -> bool:
    """Whether marshmallow accepts the value."""
    try:
        schema.load(value)
    except ValidationError:
        return False
    return True


VALUES: list[Any] = [None, True, False, 0, 1, 1.5, "", "a", "a\n", "true", "a\0", [], ["a"]]
VALUES += [{}, {"a": "b"}, {"a": "b", "": ""}]
VALUES += [{"a": None}, {"a": 1}, {"a": {}}, {"a": "\0"}, {"\0": "a"}, {"a": "b", "c": ["d"]}]
VALUES += [{str(n): "" for n in range(keys)} for keys in (1000, 1001)]
VALUES += [{key: ""} for key in NAMING_KEYS]
NO_FIELD = ["", "Reason", "reason ", "d\u0430ta", "tennant", "dry_run"]  # the fourth with a Cyrillic letter


def test_the_document_and_the_schema_agree_on_what_is_a_body() -> None:
    document, schema = validator(BODY["schema"]), RebindRequestSchema()
    names = [*schema.fields, *NO_FIELD]
    bodies = [{"reason": "a", "data": {}} | {name: value} for name in names for value in VALUES]
    bodies += [body | {"trigger_rebind_event": True} for body in bodies]
    bodies += [*VALUES, {"reason": "a"}, {"data": {}}, {"reason": "a", "data": {}}]
    assert [body for body in bodies if document.is_valid(body) != loads(schema, body)] == []


def is_key(header: str) -> bool:
    try:
        return idempotency_key(header) is not None
    except QueryError:
        return False


def test_the_document_and_the_code_agree_on_what_an_idempotency_key_is() -> None:
    pattern = re.compile(PARAMETERS["Idempotency-Key"]["schema"]["pattern"])
    keys = [*KEYS, *NO_KEYS]
    assert [bool(pattern.search(key)) for key in keys] == [is_key(key) for key in keys]


# What a real gunicorn answers


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with some messages: HTTP is the same before each kind of database, so SQLite stands for both."""
    url = f"sqlite:///{tmp_path_factory.mktemp('openapi') / 'queues.db'}"
    own = QueueRegistry()
    own.bind(url, busy_timeout=30)
    own.database.prepare(create=True)
    names = ["spring-sale", "summer-sale", ""]
    own.load([message(f"ada@{d}.example", id=f"m-{c}-{d}", meta={"campaign": c}) for c in names for d in "ab"])
    return url


@pytest.fixture(scope="module")
def open_service(shared: Start) -> Service:
    """It trusts us, has handlers and no users."""
    return shared(REBIND_POLICY=SITE_POLICY, REBIND_BUSY_TIMEOUT="0.2")


@pytest.fixture(scope="module")
def guarded_service(shared: Start, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """It has users, whose passwords nobody knows, and no handlers."""
    htpasswd = tmp_path_factory.mktemp("guarded") / "htpasswd"
    htpasswd.write_text("ada:$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC\n")
    return shared(REBIND_HTPASSWD=str(htpasswd))


@api.parametrize()
@settings(max_examples=200, deadline=None)
def test_schemathesis_finds_nothing(case: "schemathesis.Case[Any]", open_service: Service) -> None:
    """The examples, every boundary of the schema, and what it makes up: right and wrong requests, by a fixed seed."""
    if case.meta is not None and case.meta.generation.mode == schemathesis.GenerationMode.POSITIVE:
        assume(not conflicts(case))
        if "Idempotency-Key" in case.headers:  # another request with the same key would be refused
            case.headers["Idempotency-Key"] = f'"{next(unused)}"'
    else:  # a dry run ignores the key, which OpenAPI cannot say either
        assume("Idempotency-Key" not in (case.headers or {}) or "dry_run" not in (case.query or {}))
    case.call_and_validate(base_url=open_service.base)


unused = itertools.count(1)


def conflicts(case: "schemathesis.Case[Any]") -> bool:
    """Whether the query conflicts with the body, which OpenAPI cannot say."""
    query: Any = case.query
    body: Any = case.body
    unset, data, event = query.get("unset", []), body["data"], body.get("trigger_rebind_event", False)
    return bool(unset and (event or {*unset} & {*data})) or ("undo" in query and bool(data or unset or event))


def test_schemathesis_broke_nothing(open_service: Service, url: str) -> None:
    assert {row["id"] for row in stored(url)} == {
        f"m-{c}-{d}" for c in ("spring-sale", "summer-sale", "") for d in "ab"
    }
    assert "Traceback" not in open_service.output.read_text()
    with engine_for(url).connect() as db:
        assert db.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_every_example_is_as_its_schema_says() -> None:
    contents = [BODY, *(content for response in RESPONSES.values() for content in response["content"].values())]
    examples = [(each["schema"], each["example"]) for each in [*contents, *PARAMETERS.values()] if "example" in each]
    for content in contents:
        examples += [(content["schema"], example["value"]) for example in content.get("examples", {}).values()]
    assert len(examples) == 15
    assert [example for schema, example in examples if not validator(schema).is_valid(example)] == []


def while_locked(url: str, ask: Callable[[], requests.Response]) -> requests.Response:
    """Ask while somebody else has the database's write lock."""
    with locked(url):
        return ask()


FAIL: dict[str, Any] = {"trigger_rebind_event": True, "data": {"recipient": "nobody"}}  # whichever message is first
STRANGER = {"X-Forwarded-For": "192.0.2.1"}  # from where no proxy is configured, so that no address is trusted
PROVOKED: dict[str, Callable[[Service, Service, str], requests.Response]] = {
    "200": lambda open_, guarded, url: open_.rebind("?dry_run=true"),
    "400": lambda open_, guarded, url: open_.rebind("?dryrun=true"),
    "401": lambda open_, guarded, url: requests.post(guarded.base + PATH, json={}, headers=STRANGER, timeout=60),
    "403": lambda open_, guarded, url: requests.post(open_.base + PATH, json={}, headers=STRANGER, timeout=60),
    "404": lambda open_, guarded, url: open_.rebind("/"),
    "405": lambda open_, guarded, url: requests.put(open_.base + PATH, json={}, timeout=60),
    "409": lambda open_, guarded, url: guarded.rebind(trigger_rebind_event=True),
    "413": lambda open_, guarded, url: open_.post(b" " * (app.MAX_BODY + 1)),
    "415": lambda open_, guarded, url: open_.post(b"{}", "text/plain"),
    "422": lambda open_, guarded, url: open_.rebind(tennant="acme"),
    "500": lambda open_, guarded, url: open_.rebind(**FAIL),
    "503": lambda open_, guarded, url: while_locked(url, open_.rebind),
}


def test_no_status_is_missing() -> None:
    assert RESPONSES.keys() == PROVOKED.keys() >= {str(status) for status in app.STATUS.values()}


@pytest.mark.parametrize("status", RESPONSES)
def test_every_status_is_answered_as_documented(
    open_service: Service, guarded_service: Service, url: str, status: str
) -> None:
    response = PROVOKED[status](open_service, guarded_service, url)
    documented = RESPONSES[status]
    assert str(response.status_code) == status
    content = documented["content"][response.headers["Content-Type"]]
    validator(content["schema"]).validate(response.json())
    assert {name for name in response.headers if name.startswith("Rebind-")} <= {*documented.get("headers", {})}
    for name, header in documented.get("headers", {}).items():
        if not header.get("required") and name not in response.headers:
            continue
        value: Any = response.headers[name]
        number = resolved(header["schema"])["type"] == "integer"
        validator(header["schema"]).validate(int(value) if number else value)
