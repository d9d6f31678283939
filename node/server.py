"""The WebSocket server for apps (docs/protocol.md): accepts, bounds, counts, stops gracefully."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import structlog
import trio

from node.connection import Connection, Handler, ServerBounds, Shared
from router.requests import Limits

__all__ = ["AppServer", "Connection", "Handler", "ServerBounds", "ServerStatistics"]

log = structlog.get_logger(__name__)

BACKLOG = 1_024
# Connections past the bound that are told so with a 503; those past that are closed without a word.
REJECTED_POLITELY = 64
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Now: connections, in_flight. Since the start: the rest."""

    connections: int
    in_flight: int
    accepted: int
    rejected: int
    frames_in: int
    frames_out: int
    requests: int
    refused: int
    overloaded: int
    internal: int
    slow_dropped: int
    greedy_dropped: int
    dead_dropped: int
    failed: int


class AppServer:
    """Serves apps on one TCP port.

    `handler(request, connection)` is called for every checked request but `ping`. It returns the reply's
    fields (without `id` and `ok`), or an awaitable of them: only the latter costs a task: answer at once what
    needs no waiting. It raises RequestError to refuse; anything else that it raises becomes `internal`.
    """

    def __init__(
        self,
        handler: Handler,
        limits: Limits,
        bounds: ServerBounds | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 7400,
    ) -> None:
        self.host = host
        self.port = port  # once it runs, the port that the system gave for 0
        self._shared = Shared(handler, limits, bounds or ServerBounds())
        self._stop = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until `stop`. Started with the port. Raises OSError when it cannot listen there."""
        listeners = await trio.open_tcp_listeners(self.port, host=self.host, backlog=BACKLOG)
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            accepting = trio.CancelScope()
            nursery.start_soon(self._accept, listeners, nursery, accepting)
            task_status.started(self.port)
            await self._stop.wait()
            accepting.cancel()
            with trio.move_on_after(self._shared.bounds.stop_grace_s) as grace:
                # A poll, because idle is the sum of many things and only a stopping node asks.
                while any(not one.idle for one in self._shared.connections):  # noqa: ASYNC110
                    await trio.sleep(POLL_S)
            if grace.cancelled_caught:
                log.warning("stopped with requests in flight", in_flight=self._shared.in_flight)
            for connection in list(self._shared.connections):
                connection.close(1001)

    def stop(self) -> None:
        """New requests get `shutting_down`, those in flight finish, all closes with 1001, `run` returns."""
        self._shared.stopping = True
        self._stop.set()

    def statistics(self) -> ServerStatistics:
        shared = self._shared
        return ServerStatistics(len(shared.connections), shared.in_flight, **asdict(shared.counters))

    async def _accept(
        self, listeners: list[trio.SocketListener], nursery: trio.Nursery, accepting: trio.CancelScope
    ) -> None:
        with accepting:
            await trio.serve_listeners(self._serve, listeners, handler_nursery=nursery)

    async def _serve(self, stream: trio.SocketStream) -> None:
        shared = self._shared
        if len(shared.connections) >= shared.bounds.connections_max + REJECTED_POLITELY:
            shared.counters.rejected += 1
            await stream.aclose()
            return
        try:
            connection = Connection(shared, stream)
        except OSError:  # it was gone before we asked who it is
            await stream.aclose()
            return
        shared.connections.add(connection)
        try:
            await connection.run()
        finally:
            shared.connections.discard(connection)
