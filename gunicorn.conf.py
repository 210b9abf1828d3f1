"""gunicorn's settings: it finds this file by itself in the folder where it is started."""

import json
import os
import signal
import socket
import struct
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any

from gunicorn import util  # type: ignore[import-untyped]
from gunicorn.http.errors import ParseException  # type: ignore[import-untyped]
from gunicorn.workers.base import Worker  # type: ignore[import-untyped]

bind = "127.0.0.1:8000"
umask = 0o007  # of a unix socket: a proxy is believed about who asks, so that nobody else may connect to it

workers = 2
# Loaded once, before the workers: if it cannot start, it says so once and exits. A new policy needs a restart.
preload_app = True
# Its threads may take as long as they like: the timeout is for a worker that hangs as a whole, and does not show that
# it is alive. A `sync` worker would be killed in the middle of a long rebind.
worker_class = "gthread"
# In each worker, app.MAX_REBINDS of them may do rebinds, or wait to. The others answer everything else meanwhile.
threads = 12
timeout = 30  # seconds
max_requests = 0  # no worker is replaced for having served so many, in the middle of what its other threads do

# After SIGTERM a running rebind has so many seconds to finish. Then it is killed, which rolls it back.
# systemd's TimeoutStopSec must be longer.
graceful_timeout = 300

# A request's line and headers are small; nginx, before it, refuses as much by itself. The body's limit is app.MAX_BODY.
limit_request_line = 4094
limit_request_fields = 50
limit_request_field_size = 4094

# To standard output, while the application's own line per request, with the actor, goes to standard error.
# No %(u)s, the user's name: it is what the client says, unchecked, line breaks included.
accesslog = "-"
access_log_format = '%(h)s %({x-forwarded-for}i)s "%(r)s" %(s)s %(B)s %(M)sms "%(a)s"'

control_socket_disable = True  # whoever may open it could stop the service
forwarder_headers = ""  # or a client on this host could name another path, in a header SCRIPT_NAME or PATH_INFO
STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
UNREAD = 16 * 1024 * 1024  # bytes of a refused body that are read and thrown away
STEP = 64 * 1024  # bytes of it that are read at once
SILENCE = 10  # seconds that a client may be silent within a request; gthread sets no limit, and each holds a thread


def on_starting(server: Any) -> None:
    """After each fork, let the master hear the signals to stop again. See pre_fork."""
    os.register_at_fork(after_in_parent=hear_stop)


def pre_fork(server: Any, worker: Any) -> None:
    """Hold back the signals to stop until the new worker has its own handlers: the kernel keeps them.

    Until then the worker has the master's handlers, which put a signal into a queue that a worker never reads. The
    signal would be lost, and the master would wait for the worker for all of graceful_timeout.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)


def post_worker_init(worker: Any) -> None:
    """The worker has its own handlers now. See pre_fork.

    gthread's handler for SIGINT and SIGQUIT takes a lock of the pool of threads. If it interrupts the main thread while
    that holds the lock, because it hands over a request, it waits for ever. Worker's own handler takes no lock.
    """
    for stop_at_once in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(stop_at_once, partial(Worker.handle_quit, worker))
    hear_stop()


def hear_stop() -> None:
    """Deliver the signals to stop, those that were held back first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)


def when_ready(server: Any) -> None:
    """Let the kernel end what waits for a client that stalls: a TCP connection has this from its listener.

    One by a unix socket does not; there nginx stands before the service, and sends it whole requests.
    """
    for listener in server.LISTENERS:
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SILENCE, 0))


def post_request(worker: Any, request: Any) -> None:
    """Read the rest of the body, so that a refusal reaches a client that is still sending: docs/contract.md, "Errors".

    Closing a socket with unread bytes resets the connection. The client then fails to send, and may never see the
    refusal; nginx answers 502. If reading the body has failed before, nothing more will come.
    """
    left = 0 if request.body.failed else UNREAD
    with suppress(OSError, ParseException):
        while left > 0 and (piece := request.body.read(STEP)):
            left -= len(piece)


def write_problem(client: socket.socket, status: int, reason: str, message: str) -> None:
    """Answer what gunicorn refuses by itself with a problem document, in place of its HTML page.

    docs/contract.md, "Errors".
    """
    title = HTTPStatus(status).phrase
    document = {"type": "about:blank", "title": title, "status": status, "detail": message or title}
    body = json.dumps(document) + "\n"
    headers = f"Connection: close\r\nContent-Type: application/problem+json\r\nContent-Length: {len(body)}"
    util.write_nonblock(client, f"HTTP/1.1 {status} {title}\r\n{headers}\r\n\r\n{body}".encode())


util.write_error = write_problem  # gunicorn has no setting for it
