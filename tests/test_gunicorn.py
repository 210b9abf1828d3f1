"""Tests of gunicorn.conf.py in a real gunicorn: what becomes of long rebinds, of stops, and of refused requests."""

import json
import os
import signal
import socket
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from http.client import HTTPConnection
from itertools import repeat
from pathlib import Path

import pytest
import requests
from databases import locked, logged, stored
from factories import message
from services import MIB, PATH, Service, Start, workers
from slow import MESSAGES, POLICY, slow_rebind
from waiting import until

from app import MAX_REBINDS
from queues import QueueRegistry

pytestmark = pytest.mark.sqlite  # what a database does about a client that is gone is tested elsewhere


@pytest.fixture
def serve(start: Start) -> Start:
    """Start a gunicorn with these arguments, and both of its workers."""

    def service(*arguments: str) -> Service:
        service = start(*arguments, REBIND_POLICY=POLICY)
        until(lambda: len(workers(service)) == 2)
        return service

    return service


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a socket would be that gunicorn opens by itself."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def idle(shared: Start, run_folder: Path) -> Service:
    """A gunicorn that no test stops."""
    return shared(XDG_RUNTIME_DIR=str(run_folder))


def ledger(url: str) -> tuple[dict[str, int], int]:
    """How many messages are in each queue, and how many records there are."""
    queues = [row["queue"] for row in stored(url)]
    return {queue: queues.count(queue) for queue in queues}, len(logged(url))


DONE = ({"b": MESSAGES}, MESSAGES)
NOTHING = ({"a": MESSAGES}, 0)


def test_a_rebind_may_take_longer_than_the_worker_timeout(
    serve: Start, queues: QueueRegistry, url: str, tmp_path: Path
) -> None:
    """The timeout has passed, and is watched, when a worker that hangs since then has been killed."""
    service = serve("--timeout", "2")
    with slow_rebind(service.rebind, queues, tmp_path) as slow:
        (hanging,) = workers(service) - {slow.worker}
        os.kill(hanging, signal.SIGSTOP)
        until(lambda: hanging not in workers(service))
        assert slow.worker in workers(service)
        assert slow.let_go().status_code == 200
    assert ledger(url) == DONE


def test_sigterm_lets_a_running_rebind_finish(serve: Start, queues: QueueRegistry, url: str, tmp_path: Path) -> None:
    service = serve()
    with slow_rebind(service.rebind, queues, tmp_path) as slow:
        service.process.terminate()
        until(lambda: workers(service) == {slow.worker})  # the other, which had nothing to do, has obeyed
        assert slow.let_go().status_code == 200
    assert service.process.wait(30) == 0
    assert ledger(url) == DONE


def test_a_rebind_that_outlasts_the_graceful_timeout_is_rolled_back(
    serve: Start, queues: QueueRegistry, url: str, tmp_path: Path
) -> None:
    service = serve("--graceful-timeout", "1")
    with slow_rebind(service.rebind, queues, tmp_path) as slow:
        service.process.terminate()
        with pytest.raises(requests.ConnectionError):
            slow.answer.result()
    assert service.process.wait(30) == 0
    assert ledger(url) == NOTHING


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], ids=lambda stop: stop.name)
def test_a_worker_hears_a_signal_to_stop_from_the_moment_that_it_is_forked(serve: Start, stop: signal.Signals) -> None:
    service = serve()
    seen = workers(service)
    pid = min(seen)
    for _ in range(10):
        os.kill(pid, stop)
        until(lambda ended=pid: ended not in workers(service))  # type: ignore[misc]
        while not (forked := workers(service) - seen):  # without a pause: it has its handlers in a few milliseconds
            assert service.process.poll() is None
        (pid,) = forked
        seen |= forked


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGQUIT], ids=lambda stop: stop.name)
def test_a_worker_ends_at_once_while_clients_keep_coming(serve: Start, stop: signal.Signals) -> None:
    service, ended = serve(), threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            with suppress(ConnectionError), socket.create_connection(service.address) as client:
                client.shutdown(socket.SHUT_WR)
                client.recv(1)  # until the worker has done with it

    with ThreadPoolExecutor(4) as pool:
        coming = [pool.submit(come_and_go) for _ in range(4)]
        try:
            for _ in range(20):
                until(lambda: len(workers(service)) == 2)
                pid = min(workers(service))
                os.kill(pid, stop)
                until(lambda pid=pid: pid not in workers(service))  # type: ignore[misc]
        finally:
            ended.set()
    assert [each.result() for each in coming] == [None] * 4


def test_rebinds_that_wait_leave_threads_for_others_and_one_too_many_is_refused_at_once(
    queues: QueueRegistry, url: str, start: Start
) -> None:
    queues.load([message(meta={"queue": "a"})])
    service = start("--workers", "1")
    with ThreadPoolExecutor(MAX_REBINDS + 1) as pool:
        with locked(url):
            answers = [pool.submit(service.rebind, data={"queue": "b"}) for _ in range(MAX_REBINDS + 1)]
            done, waiting = wait(answers, return_when=FIRST_COMPLETED)
            (refused,) = (answer.result() for answer in done)
            assert refused.json()["detail"] == f"{MAX_REBINDS} rebinds are running or waiting already"
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
            assert requests.get(service.base, timeout=60).status_code == 404
            assert service.rebind("?dry_run=true", data={"queue": "b"}).status_code == 200
        assert [answer.result().status_code for answer in waiting] == [200] * MAX_REBINDS
    failed = [service.rebind("?undo=x").status_code for _ in range(MAX_REBINDS + 1)]
    assert failed == [404] * (MAX_REBINDS + 1)  # whose places are free again, as are those of what was done before


JSON = {"Content-Type": "application/json"}

# Each is refused before its body is read, or before it is read to its end.
UNREAD: dict[str, tuple[int, str, str, dict[str, str]]] = {
    "a client that is not trusted": (403, "POST", PATH, JSON | {"X-Forwarded-For": "192.0.2.1"}),
    "another path": (404, "POST", "/", JSON),
    "another content type": (415, "POST", PATH, {"Content-Type": "text/plain"}),
    "too large": (413, "POST", PATH, JSON),
}


@pytest.mark.parametrize(("status", "method", "path", "headers"), UNREAD.values(), ids=UNREAD)
@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
def test_a_refusal_reaches_a_client_that_sends_first_and_reads_then(
    idle: Service, queues: QueueRegistry, chunked: bool, status: int, method: str, path: str, headers: dict[str, str]
) -> None:
    size = 9 * MIB if status == 413 else 900_000
    body = repeat(bytes(size // 9), 9) if chunked else bytes(size)
    with closing(HTTPConnection(*idle.address, timeout=60)) as client:
        client.connect()
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that it can send what is read, no more
        client.request(method, path, body, headers)
        refused = client.getresponse()
        assert (refused.status, json.load(refused)["status"]) == (status, status)
        # Not a byte of the body is left to be taken for the next request.
        client.request("POST", PATH, b'{"reason": "a test", "data": {}}', JSON)
        assert client.getresponse().status == 200


def test_a_client_that_sends_without_end_is_refused_and_cut_off(idle: Service) -> None:
    with closing(HTTPConnection(*idle.address, timeout=60)) as client:
        client.request("POST", PATH, b"", JSON | {"Content-Length": str(10**12)})
        assert client.getresponse().status == 413
        with pytest.raises(ConnectionError):
            client.send(repeat(bytes(MIB), 1000))


def test_every_request_is_in_the_access_log_and_in_one_line(idle: Service, queues: QueueRegistry) -> None:
    headers = {"User-Agent": 'it is "me"', "X-Forwarded-For": "192.0.2.1"}
    requests.get(f"{idle.base}/logged", headers=headers, auth=("a\nb", ""), timeout=60)
    until(lambda: '192.0.2.1 "GET /logged HTTP/1.1" ' in idle.output.read_text())
    (line,) = (line for line in idle.output.read_text().splitlines() if '"GET /logged' in line)
    assert line.startswith("127.0.0.1 192.0.2.1 ")
    assert line.endswith('ms "it is \\"me\\""')


def test_there_is_no_control_socket(idle: Service, run_folder: Path) -> None:
    idle.process.send_signal(signal.SIGTTIN)  # one worker more: the master listens to signals, and so to all else
    until(lambda: len(workers(idle)) == 3)
    assert list(run_folder.iterdir()) == []
