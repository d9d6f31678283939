"""The HTTP server (docs/http.md): accepts, bounds, watches the times, counts, stops gracefully."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import structlog
import trio

from node.httpconn import Handler, HttpBounds, HttpConnection, Shared
from node.httpwire import HttpError, Response, encode

log = structlog.get_logger(__name__)

BACKLOG = 1_024
SWEEP_S = 0.25
REJECT_S = 1.0
REJECTED = HttpError(503, "overloaded", "too many connections; try another node", ("Retry-After: 1",))


@dataclass(frozen=True, slots=True)
class HttpStatistics:
    """Now: connections, idle, bodies_bytes. Since the start: the rest."""

    connections: int
    idle: int
    bodies_bytes: int
    accepted: int
    rejected: int
    evicted: int
    requests: int
    refused: int
    overloaded: int
    timeouts: int
    slow_dropped: int
    internal: int
    failed: int


class HttpServer:
    """Serves HTTP/1.1 on one TCP port.

    `handler(request)` returns a Response, or an awaitable of one where it has to wait. What it raises becomes a 500.
    """

    def __init__(
        self,
        handler: Handler,
        bounds: HttpBounds | None = None,
        *,
        count: Callable[[str, str, int, float], None] = lambda *_: None,
        host: str = "127.0.0.1",
        port: int = 7401,
    ) -> None:
        """count: told of each answer: route, method, status, seconds."""
        self.host = host
        self.port = port  # once it runs, the port that the system gave for 0
        self._shared = Shared(handler, bounds or HttpBounds(), count)
        self._stop = trio.Event()
        self._gone = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until `stop`. Started with the port. Raises OSError when it cannot listen there."""
        listeners = await trio.open_tcp_listeners(self.port, host=self.host, backlog=BACKLOG)
        self.port = listeners[0].socket.getsockname()[1]
        shared = self._shared
        async with trio.open_nursery() as nursery:
            serving = trio.CancelScope()
            nursery.start_soon(self._accept, listeners, nursery, serving)
            nursery.start_soon(self._sweep)
            task_status.started(self.port)
            await self._stop.wait()
            serving.cancel()
            for connection in list(shared.connections):
                if connection.idle:
                    connection.abort()
            with trio.move_on_after(shared.bounds.stop_grace_s) as grace:
                while shared.connections:
                    self._gone = trio.Event()
                    await self._gone.wait()
            if grace.cancelled_caught:
                log.warning("stopped with HTTP requests under way", connections=len(shared.connections))
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """What is under way is answered, all closes, `run` returns."""
        self._shared.stopping = True
        self._stop.set()

    def statistics(self) -> HttpStatistics:
        shared = self._shared
        idle = sum(one.idle for one in shared.connections)
        return HttpStatistics(len(shared.connections), idle, shared.bodies_bytes, **asdict(shared.counters))

    async def _accept(
        self, listeners: list[trio.SocketListener], nursery: trio.Nursery, serving: trio.CancelScope
    ) -> None:
        with serving:
            await trio.serve_listeners(self._serve, listeners, handler_nursery=nursery)

    async def _serve(self, stream: trio.SocketStream) -> None:
        shared = self._shared
        if len(shared.connections) >= shared.bounds.connections_max and not self._make_room():
            shared.counters.rejected += 1
            await self._reject(stream)
            return
        shared.counters.accepted += 1
        connection = HttpConnection(shared, stream)
        shared.connections.add(connection)
        try:
            await connection.run()
        finally:
            shared.connections.discard(connection)
            self._gone.set()

    def _make_room(self) -> bool:
        """The connection that has waited longest for its client goes: who holds many open must not keep others out."""
        oldest = min(self._shared.connections, key=lambda one: one.waiting_since)
        if oldest.waiting_since == math.inf:
            return False
        self._shared.counters.evicted += 1
        self._shared.connections.discard(oldest)
        oldest.abort()
        return True

    async def _reject(self, stream: trio.SocketStream) -> None:
        refused = Response(REJECTED.status, REJECTED.body(), headers=REJECTED.headers)
        try:
            with trio.move_on_after(REJECT_S):
                await stream.send_all(encode(refused, time.time(), keep_alive=False))
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(stream)

    async def _sweep(self) -> None:
        """One look at all times now and then is cheaper than a timer for each request."""
        while True:
            await trio.sleep(SWEEP_S)
            now = time.monotonic()
            for connection in self._shared.connections:
                connection.sweep(now)
