"""One app's WebSocket conversation: requests in, replies out, and what if it is slow, broken or rude.

Three tasks per connection: the reader (it answers cheap requests on the spot, with a worker only for a handler
that waits), the writer (it sends everything ready in one frame) and the keepalive. What goes wrong ends this
connection only.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream
from wsproto.utilities import LocalProtocolError

from node.appstream import AppStream
from node.workers import Workers
from router.errors import RequestError
from router.fanout import take_turns
from router.requests import Limits, Request, parse
from router.wire import Kept, Refused, Reply, RequestId, decode_frame, encode_reply, error_reply, join

log = structlog.get_logger(__name__)

SUBPROTOCOLS = ("gmco.msgpack", "gmco.json")
RECEIVE_BYTES = 64 << 10  # one read for a full pipeline of requests; the library's 4 KiB costs a wake-up each
MESSAGES_WAITING = 4  # frames read ahead; each may be as large as the frame bound
FRAME_REPLIES_MAX = 1_024
FRAME_REPLY_BYTES = 256 << 10  # past this a reply frame takes no further reply
REPLIES_WAITING_MAX = 1_024  # past this the reader waits for the writer, so that TCP holds the client back
RETRY_AFTER_MS = 50
CLOSE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerBounds:
    """What one node and one connection may take. Seconds, bytes and counts as named."""

    connections_max: int = 1_024
    in_flight_max: int = 4_096
    connection_in_flight_max: int = 256
    backlog_bytes_max: int = 64 << 20
    # Of all connections together: bytes of requests that are not complete yet, or that their readers have not taken.
    unread_bytes_max: int = 256 << 20
    handshake_s: float = 5.0
    send_s: float = 10.0
    idle_ping_s: float = 20.0
    pong_s: float = 20.0
    stop_grace_s: float = 10.0
    # Origins that browsers may come from; None lets every page in. Only browsers send one.
    origins: frozenset[str] | None = None


@dataclass(slots=True)
class Counters:
    accepted: int = 0
    rejected: int = 0
    frames_in: int = 0
    frames_out: int = 0
    requests: int = 0
    refused: int = 0
    overloaded: int = 0
    internal: int = 0
    slow_dropped: int = 0
    greedy_dropped: int = 0
    dead_dropped: int = 0
    failed: int = 0


Handler = Callable[[Request, "Connection"], Awaitable[Reply] | Reply]


class Shared:
    """What all connections of a node have in common; touched from the event loop only."""

    def __init__(self, handler: Handler, limits: Limits, bounds: ServerBounds) -> None:
        self.handler = handler
        self.limits = limits
        self.bounds = bounds
        self.counters = Counters()
        self.in_flight = 0
        self.unread_bytes = 0
        self.stopping = False
        self.connections: set[Connection] = set()


class Connection:
    """A client, as handlers see it: `peer`, `subprotocol`, `opened` (monotonic), `in_flight`."""

    def __init__(self, shared: Shared, stream: trio.SocketStream) -> None:
        self.shared = shared
        self.opened = time.monotonic()
        self.peer = str(stream.socket.getpeername())
        self.subprotocol: str | None = None
        self.in_flight = 0
        self._stream = AppStream(stream, self._received)
        self._unread_bytes = 0
        self._ws: WebSocketConnection
        self._nursery: trio.Nursery
        self._workers: Workers[tuple[RequestId, bool, Awaitable[Reply]]]
        self._reading = trio.CancelScope()
        self._close_code = 1000
        # Encoded replies that wait for the writer: msgpack ones, and JSON ones.
        self._parts: tuple[list[bytes], list[bytes]] = ([], [])
        self._backlog_bytes = 0
        self._sending = False
        self._wake = trio.Event()
        self._sent = trio.Event()

    async def run(self) -> None:
        """Until either side closes. Raises nothing but cancellation."""
        # The tasks that work for this connection inherit it.
        take_turns()
        try:
            async with trio.open_nursery() as self._nursery:
                self._workers = Workers(self._nursery, self._answer)
                if await self._shake_hands():
                    await self._converse()
                self._nursery.cancel_scope.cancel()
        except* (ConnectionClosed, LocalProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away in the middle of something
        except* Exception as group:
            self.shared.counters.failed += 1
            log.exception("connection failed", peer=self.peer, exc_info=group)
        finally:
            with trio.move_on_after(CLOSE_S, shield=True):
                await self._stream.aclose()
            self._forget_unread()

    def close(self, code: int) -> None:
        """Reads no more, sends what waits, then closes with `code`."""
        self._close_code = code
        self._reading.cancel()

    @property
    def idle(self) -> bool:
        return not (self.in_flight or self._sending or any(self._parts))

    async def _shake_hands(self) -> bool:
        bounds, counters = self.shared.bounds, self.shared.counters
        with trio.move_on_after(bounds.handshake_s) as self._stream.handshake:
            request = await wrap_server_stream(
                self._nursery,
                self._stream,
                message_queue_size=MESSAGES_WAITING,
                max_message_size=self.shared.limits.frame_bytes_max,
                receive_buffer_size=RECEIVE_BYTES,
            )
            origin = dict(request.headers).get(b"origin")
            if len(self.shared.connections) > bounds.connections_max:
                await request.reject(503, body=b"too many connections; try another node\n")
            elif self.shared.stopping:
                await request.reject(503, body=b"this node is shutting down; try another\n")
            elif origin and bounds.origins is not None and origin.decode("latin-1") not in bounds.origins:
                await request.reject(403, body=b"pages of this origin may not connect\n")
            else:
                proposed = request.proposed_subprotocols
                self.subprotocol = next((one for one in proposed if one in SUBPROTOCOLS), None)
                self._ws = self._stream.websocket = await request.accept(subprotocol=self.subprotocol)
                counters.accepted += 1
                return True
        counters.rejected += 1
        return False

    async def _converse(self) -> None:
        self._nursery.start_soon(self._write)
        self._nursery.start_soon(self._keep_alive)
        with self._reading:
            await self._read()
            return  # the client closed, or broke the protocol: nobody waits for replies
        with trio.move_on_after(self.shared.bounds.send_s):
            while self._sending or any(self._parts):
                await self._sent.wait()
        with trio.move_on_after(CLOSE_S):
            await self._ws.aclose(self._close_code)

    async def _read(self) -> None:
        while True:
            try:
                message = await self._ws.get_message()
            except ConnectionClosed:
                return
            self._forget_unread()
            json = isinstance(message, str)
            if self.subprotocol is not None and json != (self.subprotocol == "gmco.json"):
                self.close(1003)
                await trio.lowlevel.checkpoint()
            self.shared.counters.frames_in += 1
            for one in decode_frame(message, self.shared.limits):
                if type(one) is Refused:
                    self._refuse(one.id, one.error, json)
                else:
                    assert isinstance(one, dict)
                    self._ask(one, json)
            while len(self._parts[0]) + len(self._parts[1]) > REPLIES_WAITING_MAX:
                await self._sent.wait()

    def _ask(self, fields: dict[str, Any], json: bool) -> None:
        shared = self.shared
        shared.counters.requests += 1
        id, op = fields.pop("id"), fields.pop("op")
        if shared.stopping:
            self._refuse(id, RequestError("shutting_down", "this node is shutting down; ask another"), json)
            return
        if op == "ping" and not fields:
            self._reply({"id": id, "ok": True}, json)
            return
        bounds = shared.bounds
        if self.in_flight >= bounds.connection_in_flight_max or shared.in_flight >= bounds.in_flight_max:
            shared.counters.overloaded += 1
            message = "too many requests in flight; wait, or ask another node"
            self._refuse(id, RequestError("overloaded", message, retry_after_ms=RETRY_AFTER_MS), json)
            return
        try:
            result = shared.handler(parse(op, fields, shared.limits), self)
        except Exception as error:
            self._failed(id, error, json)
            return
        if isinstance(result, dict):
            self._succeed(id, result, json)
            return
        self.in_flight += 1
        shared.in_flight += 1
        self._workers.begin((id, json, result))

    async def _answer(self, job: tuple[RequestId, bool, Awaitable[Reply]]) -> None:
        id, json, result = job
        try:
            reply = await result
        except Exception as error:
            self._failed(id, error, json)
        else:
            self._succeed(id, reply, json)
        finally:
            self.in_flight -= 1
            self.shared.in_flight -= 1

    def _failed(self, id: RequestId, error: Exception, json: bool) -> None:
        if isinstance(error, RequestError):
            self._refuse(id, error, json)
            return
        self.shared.counters.internal += 1
        log.error("request failed", peer=self.peer, exc_info=error)
        message = "something went wrong inside this node; its log says what"
        self._refuse(id, RequestError("internal", message), json)

    def _refuse(self, id: RequestId, error: RequestError, json: bool) -> None:
        self.shared.counters.refused += 1
        self._reply(error_reply(id, error), json)

    def _succeed(self, id: RequestId, fields: Reply, json: bool) -> None:
        if type(fields) is not Kept:
            self._reply({"id": id, "ok": True, **fields}, json)
            return
        try:
            part = fields.part(id, json)
        except Exception as error:
            self._failed(id, error, json)
        else:
            self._queue(part, json)

    def _reply(self, reply: Reply, json: bool) -> None:
        try:
            part = encode_reply(reply, json)
        except Exception as error:
            self._failed(reply["id"], error, json)
        else:
            self._queue(part, json)

    def _queue(self, part: bytes, json: bool) -> None:
        self._parts[json].append(part)
        self._backlog_bytes += len(part)
        self._wake.set()
        if self._backlog_bytes > self.shared.bounds.backlog_bytes_max:
            self._drop_slow()

    def _drop_slow(self) -> None:
        if not self._nursery.cancel_scope.cancel_called:
            self.shared.counters.slow_dropped += 1
            log.warning("client does not read; dropped", peer=self.peer, backlog_bytes=self._backlog_bytes)
            self._nursery.cancel_scope.cancel()

    def _received(self, count: int) -> None:
        """Many frames that never end would take all memory: over the bound the connection that holds most has to go."""
        shared = self.shared
        self._unread_bytes += count
        shared.unread_bytes += count
        if shared.unread_bytes > shared.bounds.unread_bytes_max:
            max(shared.connections, key=lambda one: one._unread_bytes)._drop_greedy()

    def _forget_unread(self) -> None:
        self.shared.unread_bytes -= self._unread_bytes
        self._unread_bytes = 0

    def _drop_greedy(self) -> None:
        self.shared.counters.greedy_dropped += 1
        log.warning(
            "client sends more than this node can hold; dropped",
            peer=self.peer,
            unread_bytes=self._unread_bytes,
        )
        self._forget_unread()
        self._nursery.cancel_scope.cancel()

    async def _write(self) -> None:
        parts = self._parts
        while True:
            await self._wake.wait()
            # Further replies are often a tick away (the reader has more requests at hand): a tick costs a
            # tenth of a send. When a tick brings none, what there is goes out.
            ready = 0
            while ready < len(parts[0]) + len(parts[1]) <= FRAME_REPLIES_MAX:
                ready = len(parts[0]) + len(parts[1])
                await trio.lowlevel.checkpoint()
            self._sending = True
            for json in (False, True):
                while parts[json]:
                    if not await self._send(self._take(parts[json]), json):
                        self._nursery.cancel_scope.cancel()
                        return
            self._sending = False
            self._wake = trio.Event()
            self._sent.set()
            self._sent = trio.Event()

    def _take(self, parts: list[bytes]) -> list[bytes]:
        """The next frame's replies, at least one."""
        size = count = 0
        for part in parts:
            size += len(part)
            count += 1
            if size >= FRAME_REPLY_BYTES or count >= FRAME_REPLIES_MAX:
                break
        taken = parts[:count]
        del parts[:count]
        return taken

    async def _send(self, parts: list[bytes], json: bool) -> bool:
        with trio.move_on_after(self.shared.bounds.send_s) as scope:
            try:
                await self._ws.send_message(join(parts, json))
            except (ConnectionClosed, LocalProtocolError):
                return False
        if scope.cancelled_caught:
            self._drop_slow()
            return False
        self.shared.counters.frames_out += 1
        self._backlog_bytes -= sum(map(len, parts))
        return True

    async def _keep_alive(self) -> None:
        bounds = self.shared.bounds
        while True:
            self._stream.heard = False
            await trio.sleep(bounds.idle_ping_s)
            if self._stream.heard:
                continue
            with trio.move_on_after(bounds.pong_s) as scope:
                await self._ws.ping()
            if scope.cancelled_caught and not self._stream.heard:
                self.shared.counters.dead_dropped += 1
                self._nursery.cancel_scope.cancel()
                return
