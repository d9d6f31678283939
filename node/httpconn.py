"""One HTTP client's connection: reads, answers in order, and keeps to its times (docs/http.md).

One task: it reads, then answers all that was whole, then reads on. Nothing is read while an answer is made, so TCP holds
back who sends more. The times of all connections are watched by the server's sweep: `expires` is a plain number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
import trio

from node.httpwire import (
    CONTINUE,
    HttpError,
    HttpRequest,
    RequestReader,
    Response,
    WireBounds,
    encode,
    error_body,
)
from router.fanout import take_turns

log = structlog.get_logger(__name__)

RECEIVE_BYTES = 16 << 10
# Answers of pipelined requests go out together up to here; and so often others get their turn.
SEND_BYTES = 64 << 10
SEND_ANSWERS = 32
LINGER_S = 1.0
LINGER_BYTES = 256 << 10
INTERNAL = {"code": "internal", "message": "something went wrong inside this node; its log says what"}

STOPPING = Response(
    503, error_body({"code": "shutting_down", "message": "this node is shutting down; ask another"})
)

Handler = Callable[[HttpRequest], Awaitable[Response] | Response]


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpBounds:
    """What one node and one connection may take. Seconds, bytes and counts as named."""

    wire: WireBounds = field(default_factory=WireBounds)
    connections_max: int = 1_024
    bodies_bytes_max: int = 64 << 20
    head_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 60.0
    send_s: float = 10.0
    stop_grace_s: float = 10.0


@dataclass(slots=True)
class Counters:
    accepted: int = 0
    rejected: int = 0
    evicted: int = 0
    requests: int = 0
    refused: int = 0
    overloaded: int = 0
    timeouts: int = 0
    slow_dropped: int = 0
    internal: int = 0
    failed: int = 0


class Shared:
    """What all connections have in common; touched from the event loop only."""

    def __init__(
        self, handler: Handler, bounds: HttpBounds, count: Callable[[str, str, int, float], None]
    ) -> None:
        """count: told of each answer by route, method, status and seconds."""
        self.handler, self.bounds, self.count = handler, bounds, count
        self.counters = Counters()
        self.bodies_bytes = 0
        self.stopping = False
        self.connections: set[HttpConnection] = set()


class HttpConnection:
    """`waiting_since`: since when it waits for its client (monotonic); infinite while we make an answer."""

    def __init__(self, shared: Shared, stream: trio.SocketStream) -> None:
        self.shared = shared
        self.waiting_since = time.monotonic()
        self.expires = self.waiting_since + shared.bounds.idle_s
        self._stream = stream
        self._reader = RequestReader(shared.bounds.wire)
        self._scope = trio.CancelScope()
        self._busy = self._late = self._sending = False
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._held_bytes = 0

    async def run(self) -> None:
        """Until either side closes. Raises nothing but cancellation."""
        take_turns()
        try:
            with self._scope:
                gently = await self._converse()
            if self._scope.cancelled_caught:
                gently = self._out_of_time()
            if gently:
                self._reader.drop_body()
                self._hold(0)
                # Also to be cut short when its place is wanted.
                with trio.move_on_after(LINGER_S) as self._scope:
                    await self._linger()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away in the middle of something
        except Exception:
            self.shared.counters.failed += 1
            log.exception("HTTP connection failed")
        finally:
            self._hold(0)
            self._reader.close()
            await trio.aclose_forcefully(self._stream)

    @property
    def idle(self) -> bool:
        """Nothing is under way, and nothing has begun to come."""
        return not self._busy and self._reader.between

    def abort(self) -> None:
        self._scope.cancel()

    def sweep(self, now: float) -> None:
        """Ends what has had its time."""
        if now >= self.expires:
            self._late = True
            self._scope.cancel()

    # -- one round after the other -----------------------------------------------------------------------------------

    async def _converse(self) -> bool:
        """Returns whether the client may still be sending, so that our last words must not be overtaken by a reset."""
        reader, shared = self._reader, self.shared
        while True:
            data = await self._stream.receive_some(RECEIVE_BYTES)
            if not data:
                return False
            was_between, was_in_body = reader.between, reader.in_body
            requests, refusal = reader.feed(data)
            self._hold(reader.body_bytes + sum([len(request.body) for request in requests]))
            if requests:
                self._busy = True
                self._ours_to_act()
            for request in requests:
                if not await self._answer(request):
                    await self._flush()
                    return True
            if refusal is None and reader.body_bytes and shared.bodies_bytes > shared.bounds.bodies_bytes_max:
                shared.counters.overloaded += 1
                refusal = HttpError(
                    503,
                    "overloaded",
                    "too many bodies are under way; wait, or ask another node",
                    ("Retry-After: 1",),
                )
            if refusal is not None:
                self._refuse(refusal)
                await self._flush()
                return True
            if reader.wants_continue:
                reader.wants_continue = False
                self._put(CONTINUE)
            await self._flush()
            self._hold(reader.body_bytes)
            self._busy = False
            self._set_time(fresh=bool(requests), was_between=was_between, was_in_body=was_in_body)
            if shared.stopping and reader.between:
                return False

    def _set_time(self, *, fresh: bool, was_between: bool, was_in_body: bool) -> None:
        """For the next read. A head and a body have a time in all: a byte now and then does not prolong it."""
        now, bounds = time.monotonic(), self.shared.bounds
        if fresh:
            self.waiting_since = now
        if self._reader.between:
            if fresh:
                self.expires = now + bounds.idle_s
        elif self._reader.in_body:
            if fresh or not was_in_body:
                self.expires = now + bounds.body_s
        elif fresh or was_between:
            self.expires = now + bounds.head_s

    async def _answer(self, request: HttpRequest) -> bool:
        """Puts the answer out. Returns whether the connection goes on."""
        shared, begun = self.shared, time.perf_counter()
        shared.counters.requests += 1
        try:
            result = STOPPING if shared.stopping else shared.handler(request)
            response = result if isinstance(result, Response) else await result
        except HttpError as refusal:
            response = _refused(refusal)
        except Exception:
            log.exception("HTTP request failed", target=request.target[:200])
            response = Response(500, error_body(INTERNAL))
        keep_alive = request.keep_alive and not shared.stopping
        shared.counters.refused += response.status >= 400
        shared.counters.internal += response.status == 500
        shared.count(response.route, request.method, response.status, time.perf_counter() - begun)
        self._put(
            encode(
                response,
                time.time(),
                keep_alive=keep_alive,
                old=request.old,
                head_only=request.method == "HEAD",
            )
        )
        if self._out_bytes >= SEND_BYTES or len(self._out) >= SEND_ANSWERS:
            await self._flush()
            self._ours_to_act()
        return keep_alive

    def _ours_to_act(self) -> None:
        """Whoever answers has a deadline of its own."""
        self.waiting_since = self.expires = math.inf

    def _refuse(self, refusal: HttpError) -> None:
        """What is no request, or not a whole one."""
        self.shared.counters.refused += 1
        self.shared.count("other", "other", refusal.status, 0.0)
        self._put(encode(_refused(refusal), time.time(), keep_alive=False))

    def _put(self, data: bytes) -> None:
        self._out.append(data)
        self._out_bytes += len(data)

    async def _flush(self) -> None:
        if not self._out:
            return
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        self._out_bytes = 0
        now = time.monotonic()
        self._sending, self.expires = True, now + self.shared.bounds.send_s
        self.waiting_since = min(self.waiting_since, now)
        await self._stream.send_all(data)
        self._sending = False

    def _hold(self, count: int) -> None:
        """Of all bodies under way, so many bytes are ours."""
        self.shared.bodies_bytes += count - self._held_bytes
        self._held_bytes = count

    # -- the end -----------------------------------------------------------------------------------------------------

    def _out_of_time(self) -> bool:
        """Returns whether there is something left to say: a half request gets a 408; a slow reader or an idle client nothing."""
        counters = self.shared.counters
        if not self._late or (self._reader.between and not self._sending):
            return False
        if self._sending:
            counters.slow_dropped += 1
            return False
        counters.timeouts += 1
        self._refuse(HttpError(408, "timeout", "send a whole request in less time"))
        return True

    async def _linger(self) -> None:
        """Closing a socket with unread bytes makes a reset, which would overtake what we said."""
        await self._flush()
        await self._stream.send_eof()
        left = LINGER_BYTES
        while left > 0 and (data := await self._stream.receive_some(RECEIVE_BYTES)):
            left -= len(data)


def _refused(refusal: HttpError) -> Response:
    return Response(refusal.status, refusal.body(), headers=refusal.headers)
