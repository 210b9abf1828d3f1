"""A way to PostgreSQL that a test can cut."""

import ctypes
import socket
import struct
import threading
from contextlib import suppress

from sqlalchemy import make_url


class Link:
    """A way to PostgreSQL by TCP. When it is down no packet is answered, as if the cable were pulled."""

    cuts = ""
    """Where to, "to the server" or "to the client", the next word of a commit is lost, and its connection cut."""

    def __init__(self, url: str) -> None:
        self._server = f"{make_url(url).query['host']}/.s.PGSQL.5432"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = [self._listener]
        self._is_up = threading.Event()
        self._is_up.set()
        here = make_url(url).set(host="127.0.0.1", port=self._listener.getsockname()[1], query={})
        self.url = here.render_as_string(hide_password=False)
        threading.Thread(target=self._accept, daemon=True).start()

    def down(self) -> None:
        """Let the kernel drop what comes, unacknowledged, and forward nothing."""
        self._is_up.clear()
        program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0: keep no byte of a packet
        filter = struct.pack("HP", 1, ctypes.addressof(program))
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, 26, filter)  # SO_ATTACH_FILTER

    def up(self) -> None:
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, 27, 0)  # SO_DETACH_FILTER
        self._is_up.set()

    def close(self) -> None:
        self._is_up.set()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, server = self._listener.accept()[0], socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                self._ends.append(client)
                for way in ((client, server, "to the server"), (server, client, "to the client")):
                    threading.Thread(target=self._carry, args=way, daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket, where: str) -> None:
        """Until either side ends. Both what asks for a commit and what confirms it hold this word."""
        with suppress(OSError):
            while data := source.recv(65536):
                self._is_up.wait()
                if where == self.cuts and b"COMMIT\0" in data:
                    self.cuts = ""
                    break
                to.sendall(data)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
