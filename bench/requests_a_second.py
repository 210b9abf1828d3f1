"""A load generator, as a process of its own: `requests_a_second.py HOST PORT SECONDS BODY` prints requests a second.

Eight clients, each of which keeps its connection and sends the next request when it has its answer. It does as little
as it can in Python, since it takes its time from the same cores as the service.
"""

import json
import selectors
import socket
import sys
import time

CLIENTS = 8


def rate(host: str, port: int, seconds: float, body: bytes) -> float:
    """How many requests a second are answered. Each answer must be 200 with `{}`."""
    head = f"POST /api/admin/rebind/v1 HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    waiting = selectors.DefaultSelector()
    for _ in range(CLIENTS):
        client = socket.create_connection((host, port))
        waiting.register(client, selectors.EVENT_READ, bytearray())
        client.sendall(request)
    answered, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        for key, _ in waiting.select(1):
            assert isinstance(key.fileobj, socket.socket)
            key.data.extend(key.fileobj.recv(65536))
            if key.data.endswith(b"\r\n\r\n{}\n"):
                assert key.data.startswith(b"HTTP/1.1 200 "), bytes(key.data)
                answered += 1
                key.data.clear()
                key.fileobj.sendall(request)
    return answered / (now - start)


if __name__ == "__main__":
    print(json.dumps(rate(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4].encode())))
