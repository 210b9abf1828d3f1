"""A load test: eight clients at once, whose requests are right, wrong or a stranger's, and what is left afterwards."""

import http.client
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest
from databases import engine_for, logged, stored
from factories import message
from services import PATH, SITE_POLICY, Service, Start, workers
from waiting import until

from queues import QueueRegistry

CLIENTS = 8
WARM_UP, RUN = 2, 8  # seconds
MESSAGES = 200
THREADS = 4  # of each worker: fewer than gunicorn.conf.py says, so that the clients need all of them
SPARE = 2 * THREADS  # file descriptors: a database connection a thread, some of which the warm-up may not have needed
GROWTH = 1.25  # of a worker's memory

RIGHT, WRONG, STRANGE = {200, 503}, {400, 404, 405, 413, 415, 422}, {401, 403}


@dataclass(frozen=True)
class Request:
    """A request, and the statuses that may answer it."""

    expected: set[int]
    body: bytes
    query: str = ""
    method: str = "POST"
    content_type: str = "application/json"
    stranger: bool = False
    """It names an address in X-Forwarded-For, and no proxy is configured: it is not trusted."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Type": self.content_type} | ({"X-Forwarded-For": "127.0.0.1"} if self.stranger else {})


def body(queue: str) -> bytes:
    """A rebind of every message."""
    return json.dumps({"reason": "load", "data": {"queue": queue}}).encode()


REQUESTS = [
    Request(RIGHT, body("a.example"), "?limit=5"),
    Request(WRONG, b"{"),
    Request(RIGHT, body("b.example"), "?dry_run=true"),
    Request(STRANGE, body("c.example"), stranger=True),
    Request(RIGHT, body("b.example"), "?limit=5"),
    Request(WRONG, b'{"reason": "load", "data": {}, "tennant": "acme"}'),
    Request(RIGHT, b'{"reason": "load", "data": {"sign": "load"}, "trigger_rebind_event": true}', "?limit=1"),
    Request(WRONG, body("c.example"), "?dryrun=true"),
    Request(WRONG, body("c.example"), content_type="text/plain"),
    Request(STRANGE, b"{", stranger=True),
    Request(WRONG, body("c.example"), "/"),
    Request(WRONG, b"", method="GET"),
    Request(RIGHT, b'{"reason": "load", "data": {}, "domain": "no.such.example"}'),
    Request(WRONG, b" " * (1024 * 1024 + 1)),
]


def client(service: Service, first: int, end: float, answers: Counter[tuple[bool, int]]) -> None:
    """Send one request after the other, on a connection that is kept, and now and then on a new one."""
    connection = http.client.HTTPConnection(*service.address, timeout=60)
    for number, request in enumerate(cycle(REQUESTS[first:] + REQUESTS[:first])):
        if time.monotonic() > end:
            break
        if number % 10 == 9:
            connection.close()  # the next request opens another, which may be the other worker's
        connection.request(request.method, PATH + request.query, request.body, request.headers)
        response = connection.getresponse()
        response.read()
        answers[response.status in request.expected, response.status] += 1
    connection.close()


def load(service: Service, seconds: float) -> Counter[tuple[bool, int]]:
    """How often which status came, and whether it was one that was expected there, from all clients."""
    answers: list[Counter[tuple[bool, int]]] = [Counter() for _ in range(CLIENTS)]
    end = time.monotonic() + seconds
    clients = [threading.Thread(target=client, args=(service, n, end, answers[n])) for n in range(CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return sum(answers, Counter())


@dataclass(frozen=True)
class Level:
    """What a worker holds."""

    files: int
    threads: int
    memory: int  # KiB, resident


def level(worker: int) -> Level:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines())
    return Level(
        files=len(list(Path(f"/proc/{worker}/fd").iterdir())),
        threads=int(status["Threads"]),
        memory=int(status["VmRSS"].split()[0]),
    )


def connections(url: str) -> int:
    """How many connections PostgreSQL has; an SQLite database's are files of the workers, and counted there."""
    if url.startswith("sqlite"):
        return 0
    with engine_for(url).connect() as db:
        count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        return int(db.exec_driver_sql(count).scalar_one())


def test_under_load_every_answer_is_right_and_nothing_leaks(
    queues: QueueRegistry, start: Start, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    queues.load([message(f"ada@{n % 20}.example", id=f"m-{n}") for n in range(MESSAGES)])
    service = start("--threads", str(THREADS), REBIND_POLICY=SITE_POLICY)
    load(service, WARM_UP)
    while any(level(worker).threads <= THREADS for worker in workers(service)):
        load(service, 0.2)
    before = {worker: level(worker) for worker in workers(service)}
    open_before = connections(url)
    answers = load(service, RUN)
    # A connection that a client closed is closed by the worker when it gets to it.
    until(lambda: all(level(worker).files <= before[worker].files + SPARE for worker in before))
    after = {worker: level(worker) for worker in workers(service)}

    with capsys.disabled():
        print(f"\n{url.split(':')[0]}: {answers.total() / RUN:.0f} requests/s", dict(answers))
        print(*(f"worker {pid}: {before[pid]} -> {after[pid]}" for pid in after), sep="\n")
    assert {status for expected, status in answers if not expected} == set()
    assert {200, 400, 403, 404, 405, 413, 415, 422} <= {status for _, status in answers} <= RIGHT | WRONG | STRANGE
    assert after.keys() == before.keys(), "a worker was replaced"
    assert [level.threads for level in after.values()] == [level.threads for level in before.values()]
    assert all(after[worker].memory <= before[worker].memory * GROWTH for worker in after)
    assert connections(url) <= open_before + SPARE

    assert {row["id"] for row in stored(url)} == {f"m-{n}" for n in range(MESSAGES)}
    assert {row["queue"] for row in stored(url)} <= {"a.example", "b.example"} | {f"{n}.example" for n in range(20)}
    assert {record["response"]["content"].rpartition(": ")[2] for record in logged(url)} == {"load"}
    assert "Traceback" not in service.output.read_text()
