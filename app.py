"""The HTTP side: the application, its one route, and how errors become problem documents (RFC 9457)."""

import json
import logging
import os
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import click
from flask import Blueprint, Flask, Response, abort, current_app, g, request
from flask.logging import default_handler
from marshmallow import ValidationError
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge, UnsupportedMediaType

import access
import cli
import event
import queues
import schemas
from event import HandlerFailed, NoHandler
from history import KeyReused, NothingToUndo, UnknownRebind
from queues import registry
from rebinding import RebindRequest, RebindResult, printable
from schemas import QueryError, SettingError, Unreadable
from store import StoreConflict, StoreDamaged, StoreError, StoreRefused, StoreUnavailable, StoreUnusable

MAX_BODY = 1024 * 1024  # bytes
TOO_LARGE = "the body is larger than 1 MiB"
RETRY_AFTER = "5"  # seconds
SETTINGS = {
    "DATABASE_URL": None,
    "BUSY_TIMEOUT": 30,
    "POLICY": None,
    "TRUSTED_HOSTS": "127.0.0.0/8,::1",
    "HTPASSWD": None,
    "PROXIES": 0,
}
MAX_REBINDS = 8  # at a time in each process; each may wait in a thread, so gunicorn.conf.py has more threads

# What the registry and parse_json raise, and the status for it. Everything else is a 500 that does not tell its cause.
STATUS = {Unreadable: 400, UnknownRebind: 404, NoHandler: 409, NothingToUndo: 409, KeyReused: 422, StoreRefused: 422}
STATUS |= {HandlerFailed: 500, StoreDamaged: 500, StoreUnusable: 503, StoreUnavailable: 503, StoreConflict: 503}

admin = Blueprint("admin", __name__)
_rebinds = BoundedSemaphore(MAX_REBINDS)


def create_app(config: dict[str, Any] | None = None) -> Flask:
    """The service. Settings: REBIND_… or `config`. Raises SettingError and StoreUnusable."""
    app = Flask(__name__, static_folder=None)
    app.config.from_mapping(SETTINGS)
    if unknown := [name for name in os.environ if name.startswith("REBIND_") and name[7:] not in SETTINGS]:
        raise SettingError(f"unknown setting {unknown[0]}")  # a misspelt one must not be ignored
    app.config.from_prefixed_env("REBIND", loads=str)
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
    app.register_blueprint(cli.commands)
    command = click.get_current_context(silent=True)
    if command is None or command.info_name == "run":  # not for a command such as `flask load`
        start(app)
    return app


def start(app: Flask) -> None:
    """Let the registry write to the diagnostic log, and create the store if there is none. Raises StoreUnusable."""
    queues.logger.setLevel(logging.INFO)
    queues.logger.addHandler(default_handler)
    try:
        registry.database.prepare(create=True)
    except StoreUnavailable as error:
        app.logger.warning("%s; until then, requests are answered with 503", error.in_full)
    app.logger.info("rebind %s on %s", cli.VERSION, registry.database.shown)


@admin.post("/api/admin/rebind/v1", provide_automatic_options=False)
def rebind() -> tuple[dict[str, Any], dict[str, str]]:
    """Rebind messages. docs/contract.md, "The request" and "Beyond the page"."""
    query = schemas.rebind_query(dict(request.args.lists()))
    key = None if query["dry_run"] else schemas.idempotency_key(request.headers.get("Idempotency-Key"))
    asked = schemas.rebind_request(read_json(), query, key, g.actor)
    result = registry.rebind(asked) if asked.dry_run else rebind_in_turn(asked)
    body: dict[str, Any] = {}
    if result.plan is not None:
        moves = [{"from": move.source, "to": move.to, "messages": move.messages} for move in result.plan.moves]
        body = {"moves": moves, "more": result.plan.more}
    numbers = {"Matched": result.matched, "Moved": result.moved, "Flushed": result.flushed, "Left": result.left}
    headers = {"Id": result.rebind_id, **numbers}
    return body, {f"Rebind-{name}": str(value) for name, value in headers.items() if value is not None}


def rebind_in_turn(asked: RebindRequest) -> RebindResult:
    """Do it, at most MAX_REBINDS at a time: one more raises ServiceUnavailable. A dry run waits for nobody."""
    if not _rebinds.acquire(blocking=False):
        abort(503, f"{MAX_REBINDS} rebinds are running or waiting already")
    try:
        return registry.rebind(asked)
    finally:
        _rebinds.release()


def read_json() -> Any:
    """The body, as JSON. Raises Unreadable, BadRequest, RequestEntityTooLarge and UnsupportedMediaType."""
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("the content type must be application/json")
    if "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("the body must not have a Content-Encoding")
    if (request.content_length or 0) > MAX_BODY:
        raise RequestEntityTooLarge(TOO_LARGE)
    try:
        body = request.stream.read(MAX_BODY + 1)
    except Exception as error:  # each server has its own for a chunk that is malformed or missing
        raise BadRequest(f"the body cannot be read to its end: {error}") from error
    if len(body) > MAX_BODY:
        raise RequestEntityTooLarge(TOO_LARGE)
    if request.content_length not in (None, len(body)):
        raise BadRequest("the body ends before its Content-Length")
    return schemas.parse_json(body, "the body")


def problem(status: int, detail: str, reason: str = "", cause: Any = None, **more: Any) -> Response:
    """A problem document, and a line about it in the diagnostic log.

    reason: for the log, instead of `detail`. cause: an exception, for the log. more: members of the document.
    """
    asked = f"{g.get('actor', 'unknown')} {request.method} {request.full_path.rstrip('?')}"
    current_app.logger.info("%s", printable(f"{asked} {status} {reason or detail}"), exc_info=cause)
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    response = Response(json.dumps(document | more) + "\n", status, content_type="application/problem+json")
    if status == 503:
        response.headers["Retry-After"] = RETRY_AFTER
    return response


def http_problem(error: HTTPException) -> Response:
    """What Flask and werkzeug raise, an unknown error included, with the headers that belong to it, such as Allow."""
    document = problem(error.code or 500, error.description or "")
    document.headers.extend(header for header in error.get_headers() if header[0] != "Content-Type")
    return document


def fields_problem(error: ValidationError) -> Response:
    """A query, an Idempotency-Key or a body that is not understood."""
    status, wrong = 422, "the body is not a request to rebind"
    if isinstance(error, QueryError):
        status, wrong = 400, "a query parameter or a header is wrong"
    reason = f"{wrong}: {schemas.in_a_line(error.messages)}"
    return problem(status, f"{wrong}: see errors", reason, errors=error.messages)


def registry_problem(error: Exception) -> Response:
    """What STATUS names. A failed handler leaves its traceback in the diagnostic log."""
    reason = error.in_full if isinstance(error, StoreError) else ""
    cause = error.__cause__ if isinstance(error, HandlerFailed) else None
    return problem(STATUS[type(error)], str(error), reason, cause)
