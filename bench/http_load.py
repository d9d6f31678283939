"""A load generator for one prebuilt HTTP/1.1 request on kept connections: raw sockets and epoll, about 15 µs of CPU a request.

Used where there is no wrk. All answers must be of one length, which the first one tells.
"""

from __future__ import annotations

import select
import socket
import time
from typing import NamedTuple

RECEIVE_BYTES = 64 << 10


class Load(NamedTuple):
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    # Of a second's wall clock, how much CPU the generator itself took: near 1 it is the bottleneck.
    busy: float


def request(port: int, target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\n\r\n".encode()


def run(port: int, targets: list[str], *, connections: int, seconds: float) -> Load:
    """Each connection has one request under way. Raises RuntimeError for an answer that is not a 200."""
    requests = [request(port, target) for target in targets]
    length = _first(port, requests[0])
    sockets = {}
    poll = select.epoll()
    sent_at: dict[int, float] = {}
    missing: dict[int, int] = {}
    for i in range(connections):
        one = socket.create_connection(("127.0.0.1", port))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.setblocking(False)
        sockets[one.fileno()] = one
        poll.register(one, select.EPOLLIN)
        sent_at[one.fileno()], missing[one.fileno()] = time.perf_counter(), length
        one.send(requests[i % len(requests)])
    took: list[float] = []
    begun, cpu = time.perf_counter(), time.process_time()
    end = begun + seconds
    turn = connections
    while (now := time.perf_counter()) < end:
        for fd, _ in poll.poll(1.0):
            data = sockets[fd].recv(RECEIVE_BYTES)
            if missing[fd] == length and not data.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"not answered as it should be: {data[:200]!r}")
            missing[fd] -= len(data)
            if missing[fd] <= 0:
                if missing[fd] < 0:
                    raise RuntimeError("answers differ in length: ask for things that are equally long")
                now = time.perf_counter()
                took.append(now - sent_at[fd])
                sent_at[fd], missing[fd] = now, length
                sockets[fd].send(requests[turn % len(requests)])
                turn += 1
    elapsed = time.perf_counter() - begun
    busy = (time.process_time() - cpu) / elapsed
    for one in sockets.values():
        one.close()
    poll.close()
    took.sort()
    return Load(len(took) / elapsed, 1_000 * took[len(took) // 2], 1_000 * took[int(len(took) * 0.99)], busy)


def _first(port: int, raw: bytes) -> int:
    """How long an answer is, with its head."""
    with socket.create_connection(("127.0.0.1", port)) as one:
        one.settimeout(10)
        one.send(raw)
        heard = b""
        while b"\r\n\r\n" not in heard:
            some = one.recv(RECEIVE_BYTES)
            if not some:
                raise RuntimeError("the server closed without an answer")
            heard += some
        head, _, _ = heard.partition(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                return len(head) + 4 + int(value)
    raise RuntimeError("an answer without Content-Length")
