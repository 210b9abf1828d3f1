"""The HTTP side: the application, its one route, and how errors become problem documents (RFC 9457)."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import click
from flask import Blueprint, Flask, Response, current_app, g, jsonify, request
from flask.logging import default_handler
from marshmallow import ValidationError
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    RequestEntityTooLarge,
    ServiceUnavailable,
    UnsupportedMediaType,
)

import access
import cli
import event
import queues
from access import actor
from event import HandlerFailed, NoHandler
from history import KeyReused, NothingToUndo, UnknownRebind
from queues import registry
from rebinding import RebindResult, printable
from schemas import NotJSON, QueryError, idempotency_key, parse_json, rebind_query, rebind_request
from store import StoreConflict, StoreDamaged, StoreError, StoreRefused, StoreUnavailable, StoreUnusable

MAX_BODY = 1024 * 1024  # bytes
RETRY_AFTER = 5  # seconds
SETTINGS = {
    "DATABASE_URL": None,
    "BUSY_TIMEOUT": 30,
    "POLICY": None,
    "TRUSTED_HOSTS": "127.0.0.0/8,::1",
    "HTPASSWD": None,
    "PROXIES": 0,
}
MAX_REBINDS = 8  # at a time in each process; each may wait in a thread, so gunicorn.conf.py has more threads

# What the registry raises, and the status for it. Everything else is a 500 that does not tell its cause.
STATUS = {UnknownRebind: 404, NoHandler: 409, NothingToUndo: 409, KeyReused: 422, StoreRefused: 422}
STATUS |= {HandlerFailed: 500, StoreDamaged: 500, StoreUnusable: 503, StoreUnavailable: 503, StoreConflict: 503}

admin = Blueprint("admin", __name__)
_rebinds = BoundedSemaphore(MAX_REBINDS)


class SettingError(Exception):
    """A setting that does not exist."""


def create_app(config: dict[str, Any] | None = None) -> Flask:
    """The service, with its settings from the environment (REBIND_…) or from `config`, which takes precedence.

    Raises SettingError, StoreUnusable, event.PolicyError and access.AccessError.
    """
    app = Flask(__name__, static_folder=None)
    app.config.from_mapping(SETTINGS)
    read_environment(app)
    app.config.from_mapping(config or {})
    app.url_map.merge_slashes = False  # a path with a double slash is another path, not a redirect
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.logger.setLevel(logging.INFO)

    if app.config["DATABASE_URL"] is None:
        app.config["DATABASE_URL"] = f"sqlite:///{Path(app.instance_path, 'queues.db')}"
        with suppress(OSError):  # then the file cannot be opened, which is told when it is used
            Path(app.instance_path).mkdir(mode=0o700, exist_ok=True)
    registry.bind(app.config["DATABASE_URL"], app.config["BUSY_TIMEOUT"])
    if app.config["POLICY"]:
        event.load_policy(app.config["POLICY"])
    access.init_app(app)
    app.register_blueprint(admin)
    app.register_error_handler(HTTPException, http_problem)
    app.register_error_handler(ValidationError, fields_problem)
    for error_class in STATUS:
        app.register_error_handler(error_class, registry_problem)
    cli.init_app(app)
    if serves():
        start(app)
    return app


def read_environment(app: Flask) -> None:
    """Take the settings from REBIND_… Raises SettingError: a misspelt one must not be ignored."""
    unknown = [name for name in os.environ if name.startswith("REBIND_") and name[7:] not in SETTINGS]
    if unknown:
        raise SettingError(f"unknown setting {unknown[0]}")
    app.config.from_prefixed_env("REBIND", loads=str)


def serves() -> bool:
    """Whether requests will be served, and not only a command run: `flask load`, for example."""
    command = click.get_current_context(silent=True)
    return command is None or command.info_name == "run"


def start(app: Flask) -> None:
    """Let the registry write to the diagnostic log, create the store if there is none, check it once, and say so.

    Raises StoreUnusable.
    """
    queues.logger.setLevel(logging.INFO)
    queues.logger.addHandler(default_handler)
    try:
        registry.prepare()
        registry.check()
    except StoreUnavailable as error:
        app.logger.warning("%s; until then, requests are answered with 503", error.in_full)
    app.logger.info("rebind %s on %s", cli.VERSION, registry.database.shown)


@admin.post("/api/admin/rebind/v1", provide_automatic_options=False)
def rebind() -> Response:
    """Rebind messages. docs/contract.md, "The request" and "Beyond the page"."""
    query = rebind_query(dict(request.args.lists()))
    key = None if query["dry_run"] else idempotency_key(request.headers.get("Idempotency-Key"))
    asked = rebind_request(read_json(), query, key, actor())
    with room_for_a_rebind(asked.dry_run):
        result = registry.rebind(asked)
    response = answer(result)
    response.call_on_close(partial(registry.tidy, result))
    return response


def answer(result: RebindResult) -> Response:
    """What was done, in headers; of a dry run the plan, as the body."""
    body: dict[str, Any] = {}
    if result.plan is not None:
        moves = [{"from": move.source, "to": move.to, "messages": move.messages} for move in result.plan.moves]
        body = {"moves": moves, "more": result.plan.more}
    response = jsonify(body)
    numbers = {"Matched": result.matched, "Moved": result.moved, "Flushed": result.flushed, "Left": result.left}
    headers = {"Id": result.rebind_id, **numbers}
    response.headers.extend((f"Rebind-{name}", str(value)) for name, value in headers.items() if value is not None)
    return response


@contextmanager
def room_for_a_rebind(dry_run: bool) -> Iterator[None]:
    """Hold one of the MAX_REBINDS places. A dry run needs none, because it does not wait for others.

    Raises ServiceUnavailable at once if all places are taken.
    """
    if dry_run:
        yield
        return
    if not _rebinds.acquire(blocking=False):
        raise ServiceUnavailable(f"{MAX_REBINDS} rebinds are running or waiting already")
    try:
        yield
    finally:
        _rebinds.release()


def read_json() -> Any:
    """The body, as JSON. Raises BadRequest, RequestEntityTooLarge and UnsupportedMediaType."""
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("the content type must be application/json")
    if "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("the body must not have a Content-Encoding")
    # werkzeug silently truncates a chunked body at this limit, so allow one byte more.
    request.max_content_length = MAX_BODY + 1
    try:
        body = request.get_data(cache=False)
    except HTTPException:
        raise
    except Exception as error:  # each server has its own for a chunk that is malformed or missing
        raise BadRequest(f"the body cannot be read to its end: {error}") from error
    if len(body) > MAX_BODY:
        raise RequestEntityTooLarge
    if request.content_length not in (None, len(body)):
        raise BadRequest("the body ends before its Content-Length")
    try:
        return parse_json(body)
    except NotJSON as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error


def problem(
    status: int, detail: str, errors: Any = None, reason: str = "", cause: BaseException | None = None
) -> Response:
    """A problem document, and a line about it in the diagnostic log.

    errors: by field, as marshmallow gives them.
    reason: for the log, if it is more than `detail`.
    cause: for the log too, with its traceback.
    """
    asked = f"{g.get('actor', 'unknown')} {request.method} {request.full_path.rstrip('?')}"
    current_app.logger.info("%s", printable(f"{asked} {status} {reason or detail}"), exc_info=cause)
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if errors:
        document["errors"] = errors
    response = Response(json.dumps(document) + "\n", status, content_type="application/problem+json")
    if status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER)
    return response


def http_problem(error: HTTPException) -> Response:
    """What Flask and werkzeug raise, an unknown error included, with the headers that belong to it, such as Allow."""
    response = error.get_response()
    document = problem(error.code or 500, error.description or "")
    document.headers.extend(
        (name, value) for name, value in response.headers if name not in ("Content-Type", "Content-Length")
    )
    return document


def fields_problem(error: ValidationError) -> Response:
    """A query, an Idempotency-Key or a body that is not understood."""
    if isinstance(error, QueryError):
        return problem(400, "a query parameter or a header is wrong: see errors", error.messages)
    return problem(422, "the body is not a request to rebind: see errors", error.messages)


def registry_problem(error: Exception) -> Response:
    """What the registry raises. A failed handler leaves its traceback in the diagnostic log."""
    reason = error.in_full if isinstance(error, StoreError) else ""
    cause = error.__cause__ if isinstance(error, HandlerFailed) else None
    return problem(STATUS[type(error)], str(error), reason=reason, cause=cause)
