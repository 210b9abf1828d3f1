"""Answers of the service, as raw bytes or as requests reads them, and what the contract says of them."""

import http.client
import json
import re
import socket
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import requests

UNAVAILABLE = re.compile("the database (cannot do this now: .+|is out of reach)", re.DOTALL)


@dataclass
class Answer:
    """What came back to raw bytes, with the names that requests gives it."""

    status_code: int
    headers: http.client.HTTPMessage
    content: bytes

    @classmethod
    def read(cls, connection: socket.socket) -> "Answer":
        """The next answer that comes on this connection."""
        response = http.client.HTTPResponse(connection)
        response.begin()
        return cls(response.status, response.headers, response.read())

    def json(self) -> Any:
        return json.loads(self.content)


def done(answer: requests.Response | Answer) -> tuple[int, ...]:
    """How many messages were matched, moved and flushed. Asserts that the answer is 200 and {}, or a plan."""
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert set(answer.json()) == (set() if "Rebind-Id" in answer.headers else {"moves", "more"})
    return tuple(int(answer.headers[f"Rebind-{name}"]) for name in ("Matched", "Moved", "Flushed"))


def is_problem(
    answer: requests.Response | Answer, status: int, detail: str | re.Pattern[str], errors: Any = None
) -> bool:
    """Assert that the answer is this problem document (RFC 9457), and nothing else.

    detail: the text, or a pattern of it.
    """
    problem = answer.json()
    if isinstance(detail, re.Pattern) and detail.fullmatch(problem["detail"]):
        detail = problem["detail"]
    assert (answer.status_code, answer.headers["Content-Type"], problem) == (
        status,
        "application/problem+json",
        {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
        | ({} if errors is None else {"errors": errors}),
    )
    return True


def is_unavailable(answer: requests.Response | Answer, detail: str | re.Pattern[str] = UNAVAILABLE) -> bool:
    """Assert that the answer is a 503 that says when to try again."""
    assert answer.headers.get("Retry-After") == "5"
    return is_problem(answer, 503, detail)
