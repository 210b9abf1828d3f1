"""The HTTP side: the application, its one route, and how errors become problem documents (RFC 9457)."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from flask import Blueprint, Flask, Response, current_app, jsonify, request
from marshmallow import ValidationError
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    NotFound,
    RequestEntityTooLarge,
    ServiceUnavailable,
    UnsupportedMediaType,
)

import access
import cli
import policy
from access import actor
from queues import HandlerFailed, NoHandler, registry
from schemas import NotJSON, RebindQuerySchema, RebindRequestSchema, parse_json
from store import StoreConflict, StoreRefused, StoreUnavailable, StoreUnusable

MAX_BODY = 1024 * 1024  # bytes
RETRY_AFTER = 5  # seconds
MAX_REBINDS = 8  # at a time in each process; each may wait in a thread, so gunicorn.conf.py has more threads

# What the registry raises, and the status that says so. Everything else is a 500 that says nothing of its cause.
STATUS = {NoHandler: 409, StoreRefused: 422, HandlerFailed: 500, StoreUnusable: 500}
STATUS |= {StoreUnavailable: 503, StoreConflict: 503}

admin = Blueprint("admin", __name__)
_request, _query = RebindRequestSchema(), RebindQuerySchema()
_rebinds = BoundedSemaphore(MAX_REBINDS)


def create_app(config: dict[str, Any] | None = None) -> Flask:
    """The service, with its settings from the environment (REBIND_…) or from `config`, which goes before.

    Raises StoreUnusable, policy.PolicyError and access.AccessError.
    """
    app = Flask(__name__, static_folder=None)
    app.config.from_mapping(DATABASE_URL=None, BUSY_TIMEOUT=30, POLICY=None)
    app.config.from_mapping(TRUSTED_HOSTS="127.0.0.0/8,::1", HTPASSWD=None, PROXIES=0)
    app.config.from_prefixed_env("REBIND")
    app.config.from_mapping(config or {})
    app.url_map.merge_slashes = False  # a path with a slash too many is another path, not a redirect
    app.logger.setLevel(logging.INFO)

    if app.config["DATABASE_URL"] is None:
        Path(app.instance_path).mkdir(exist_ok=True)
        app.config["DATABASE_URL"] = f"sqlite:///{Path(app.instance_path, 'queues.db')}"
    registry.bind(app.config["DATABASE_URL"], app.config["BUSY_TIMEOUT"])
    try:
        registry.prepare()
    except StoreUnavailable as error:
        app.logger.warning("%s; until it can, the answer is 503", error)
    if app.config["POLICY"]:
        policy.load(app.config["POLICY"])

    app.register_blueprint(admin)
    access.init_app(app)
    app.before_request(refuse_doubled_slash)
    app.after_request(log_request)
    app.register_error_handler(HTTPException, http_problem)
    app.register_error_handler(ValidationError, fields_problem)
    for error_class in STATUS:
        app.register_error_handler(error_class, registry_problem)
    cli.init_app(app)
    return app


@admin.post("/api/admin/rebind/v1", provide_automatic_options=False)
def rebind() -> Response:
    """Rebind messages. SPEC.md, "POST /api/admin/rebind/v1"."""
    query = read_query()
    asked = _request.load(read_json())
    with room_for_a_rebind(dry_run=query.get("dry_run", False)):
        result = registry.rebind(asked, actor=actor(), **query)
    response = jsonify({})
    response.headers["Rebind-Id"] = result.rebind_id
    response.headers["Rebind-Matched"] = str(result.matched)
    response.headers["Rebind-Moved"] = str(result.moved)
    response.headers["Rebind-Flushed"] = str(result.flushed)
    return response


@contextmanager
def room_for_a_rebind(*, dry_run: bool) -> Iterator[None]:
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


def refuse_doubled_slash() -> None:
    """werkzeug takes every slash at the start of a path for one, which no setting changes."""
    if request.environ["PATH_INFO"].startswith("//"):
        raise NotFound


class BadQuery(BadRequest):
    """A query parameter is unknown, given twice or has a bad value."""

    description = "the query is not understood: see errors"

    def __init__(self, errors: dict[str, Any]) -> None:
        super().__init__()
        self.errors = errors


def read_query() -> dict[str, Any]:
    """The query parameters, typed. Raises BadQuery."""
    twice = {name: ["Given twice."] for name, values in request.args.lists() if len(values) > 1}
    if twice:
        raise BadQuery(twice)
    try:
        query: dict[str, Any] = _query.load(request.args)
    except ValidationError as error:
        raise BadQuery(error.messages_dict) from error
    return query


def read_json() -> Any:
    """The body, as JSON. Raises BadRequest, RequestEntityTooLarge and UnsupportedMediaType."""
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("the content type must be application/json")
    if "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("the body must not have a Content-Encoding")
    # One byte more than is allowed: a longer body that comes in chunks is cut there, silently, by what lies below.
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
        raise BadRequest(f"the body is not JSON that can be read: {error}") from error


def problem(status: int, detail: str, errors: Any = None) -> Response:
    """A problem document; `errors` are by field, as marshmallow gives them."""
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
    document = problem(error.code or 500, error.description or "", getattr(error, "errors", None))
    document.headers.extend(
        (name, value) for name, value in response.headers if name not in ("Content-Type", "Content-Length")
    )
    return document


def fields_problem(error: ValidationError) -> Response:
    """A body that is JSON, but not the object that is asked for."""
    return problem(422, "the body is not a request to rebind: see errors", error.messages)


def registry_problem(error: Exception) -> Response:
    """What the registry raises."""
    current_app.logger.error("%s", error, exc_info=error.__cause__)
    return problem(STATUS[type(error)], str(error))


def log_request(response: Response) -> Response:
    """The diagnostic log's one line per request: who asked, for what, and what came of it."""
    done = " ".join(f"{name}={value}" for name, value in response.headers if name.startswith("Rebind-"))
    current_app.logger.info(
        "%s %s %r %s %s", actor(), request.method, request.full_path.rstrip("?"), response.status_code, done
    )
    return response
