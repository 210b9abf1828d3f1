"""gunicorn's settings: it finds this file by itself in the folder where it is started."""

import os
import signal
import socket
import struct
from contextlib import suppress
from functools import partial
from typing import Any

from gunicorn.http.errors import ParseException  # type: ignore[import-untyped]
from gunicorn.workers.base import Worker  # type: ignore[import-untyped]

# Put nginx before it if strangers can connect: 200 connections that send nothing keep everybody waiting for 50 seconds.
bind = "127.0.0.1:8000"
umask = 0o007  # of a unix socket: a proxy is believed about who asks, so that nobody else may connect to it

workers = 2
# Loaded once, before the workers: if it cannot start, it says so once and exits. A new policy needs a restart.
preload_app = True
# A `sync` worker would be killed in the middle of a long rebind. Threads may take as long as they like.
worker_class = "gthread"
# In each worker, app.MAX_REBINDS of them may do rebinds, or wait to. The others answer everything else meanwhile.
threads = 12

# After SIGTERM a running rebind has so many seconds to finish. Then it is killed, which rolls it back.
# systemd's TimeoutStopSec must be longer.
graceful_timeout = 300

# A request's headers are small; nginx, before it, refuses as much by itself. The body's limit is app.MAX_BODY.
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
SILENCE = 10  # seconds that a client may be silent within a request; gthread sets no limit, and each holds a thread

hear_stop = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOP)  # those that were held back are delivered
os.register_at_fork(after_in_parent=hear_stop)


def pre_fork(server: Any, worker: Any) -> None:
    """Hold back the signals to stop until the new worker has its own handlers: those of the master would lose them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)


def post_worker_init(worker: Any) -> None:
    """The worker has handlers now. gthread's may wait for ever for a lock of the main thread; Worker's do not."""
    for stop_at_once in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(stop_at_once, partial(Worker.handle_quit, worker))
    hear_stop()


def when_ready(server: Any) -> None:
    """Let the kernel end what waits for a client that stalls: a TCP connection has this from its listener."""
    # One by a unix socket does not; there nginx stands before the service, and sends it whole requests.
    for listener in server.LISTENERS:
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SILENCE, 0))


def post_request(worker: Any, request: Any) -> None:
    """Read the rest of the body: closing a socket with unread bytes would reset it, and the client miss a refusal."""
    left = 0 if request.body.failed else UNREAD  # if reading it has failed before, nothing more will come
    with suppress(OSError, ParseException):
        while left > 0 and (piece := request.body.read(64 * 1024)):
            left -= len(piece)
