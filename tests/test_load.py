"""A load test: eight clients at once, whose requests are right, wrong or a stranger's, and what is left afterwards."""

import http.client
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

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

JSON = {"Content-Type": "application/json"}
STRANGER = JSON | {"X-Forwarded-For": "127.0.0.1"}  # and no proxy is configured: it is not trusted
RIGHT, WRONG, STRANGE = {200, 503}, {400, 404, 405, 413, 415, 422}, {401, 403}
TO_A, TO_B, TO_C = (b'{"reason": "load", "data": {"queue": "%s.example"}}' % queue for queue in (b"a", b"b", b"c"))
BY_EVENT = b'{"reason": "load", "data": {"sign": "load"}, "trigger_rebind_event": true}'

# The statuses that may answer it, and the request: its method, path, body and headers.
REQUESTS = [
    (RIGHT, ("POST", f"{PATH}?limit=5", TO_A, JSON)),
    (WRONG, ("POST", PATH, b"{", JSON)),
    (RIGHT, ("POST", f"{PATH}?dry_run=true", TO_B, JSON)),
    (STRANGE, ("POST", PATH, TO_C, STRANGER)),
    (RIGHT, ("POST", f"{PATH}?limit=5", TO_B, JSON)),
    (WRONG, ("POST", PATH, b'{"reason": "load", "data": {}, "tennant": "acme"}', JSON)),
    (RIGHT, ("POST", f"{PATH}?limit=1", BY_EVENT, JSON)),
    (WRONG, ("POST", f"{PATH}?dryrun=true", TO_C, JSON)),
    (WRONG, ("POST", PATH, TO_C, {"Content-Type": "text/plain"})),
    (STRANGE, ("POST", PATH, b"{", STRANGER)),
    (WRONG, ("POST", f"{PATH}/", TO_C, JSON)),
    (WRONG, ("GET", PATH, b"", JSON)),
    (RIGHT, ("POST", PATH, b'{"reason": "load", "data": {}, "domain": "no.such.example"}', JSON)),
    (WRONG, ("POST", PATH, b" " * (1024 * 1024 + 1), JSON)),
]
Answers = Counter[tuple[bool, int]]


def client(service: Service, first: int, end: float) -> Answers:
    """Send one request after the other, on a connection that is kept, and now and then on a new one.

    Returns how often which status came, and whether it was one that may answer that request.
    """
    answers: Answers = Counter()
    connection = http.client.HTTPConnection(*service.address, timeout=60)
    for number, (expected, request) in enumerate(cycle(REQUESTS[first:] + REQUESTS[:first])):
        if time.monotonic() > end:
            break
        if number % 10 == 9:
            connection.close()  # the next request opens another, which may be the other worker's
        connection.request(*request)
        response = connection.getresponse()
        response.read()
        answers[response.status in expected, response.status] += 1
    connection.close()
    return answers


def load(service: Service, seconds: float) -> Answers:
    """The answers that all clients got."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(lambda first: client(service, first, end), range(CLIENTS)), Counter())


class Level(NamedTuple):
    """What a worker holds."""

    files: int
    threads: int
    memory: int  # KiB, resident


def levels(service: Service) -> dict[int, Level]:
    """That of each worker."""
    found = {}
    for worker in workers(service):
        process = Path(f"/proc/{worker}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        files = len(list((process / "fd").iterdir()))
        found[worker] = Level(files, int(status["Threads"]), int(status["VmRSS"].split()[0]))
    return found


def connections(url: str) -> int:
    """How many connections PostgreSQL has; an SQLite database's are files of the workers, and counted there."""
    if url.startswith("sqlite"):
        return 0
    with engine_for(url).connect() as db:
        count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        return int(db.exec_driver_sql(count).scalar_one())


def test_under_load_every_answer_is_right_and_nothing_leaks(queues: QueueRegistry, start: Start, url: str) -> None:
    queues.load([message(f"ada@{n % 20}.example", id=f"m-{n}") for n in range(MESSAGES)])
    service = start("--threads", str(THREADS), REBIND_POLICY=SITE_POLICY)
    load(service, WARM_UP)
    while any(level.threads <= THREADS for level in levels(service).values()):
        load(service, 0.2)
    before, open_before = levels(service), connections(url)
    answers = load(service, RUN)
    assert {status for expected, status in answers if not expected} == set()
    assert {200, 400, 403, 404, 405, 413, 415, 422} <= {status for _, status in answers}

    # A connection that a client closed is closed by the worker when it gets to it.
    until(lambda: all(level.files <= before[worker].files + SPARE for worker, level in levels(service).items()))
    after = levels(service)
    assert after.keys() == before.keys(), "a worker was replaced"
    assert [level.threads for level in after.values()] == [level.threads for level in before.values()]
    assert all(after[worker].memory <= before[worker].memory * GROWTH for worker in after)
    assert connections(url) <= open_before + SPARE

    queued = {row["id"]: row["queue"] for row in stored(url)}
    assert queued.keys() == {f"m-{n}" for n in range(MESSAGES)}
    assert {*queued.values()} <= {"a.example", "b.example"} | {f"{n}.example" for n in range(20)}
    assert {record["response"]["content"].rpartition(": ")[2] for record in logged(url)} == {"load"}
    assert "Traceback" not in service.output.read_text()
