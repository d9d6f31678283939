"""Asking another node: one framed TCP connection that is kept up, many calls at once.

    link = PeerLink(lambda: address, hello, expect="node-2")
    nursery.start_soon(link.run)
    reply = await link.call("search", body, timeout_s=0.03)

A call costs one trio wait: its message joins what is queued, one write carries everything waiting, and the
reader wakes the caller directly. `begin` asks without waiting, so that one task can ask many peers. The other end is
`node/peerlistener.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, NoReturn

import outcome
import structlog
import trio

from node.config import Address
from node.frames import (
    CANCEL,
    ERROR,
    READS,
    REPLY,
    REQUEST,
    Hello,
    HelloRefusedError,
    ProtocolError,
    check_hello,
    pack_hello,
    unpack_hello,
)
from node.peerconn import Connection, FrameTooLargeError, PeerLimits
from node.peerlistener import Handler, PeerListener
from node.pending import Deadlines, Pending

__all__ = [
    "Handler",
    "Hello",
    "HelloRefusedError",
    "PeerError",
    "PeerGoneError",
    "PeerLimits",
    "PeerLink",
    "PeerListener",
    "PeerOverloadedError",
    "PeerTimeoutError",
    "PeerTooLargeError",
    "RemoteError",
]

BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 2.0
CONNECT_S = 3.0

log = structlog.get_logger(__name__)


class PeerError(Exception):
    """Root of what `PeerLink.call` raises for the peer's or the network's sake."""


class PeerGoneError(PeerError):
    """Not connected, or the connection broke. `sent`: the request may have arrived and been carried out."""

    def __init__(self, peer: str, reason: str, *, sent: bool) -> None:
        self.peer, self.reason, self.sent = peer, reason, sent
        super().__init__(f"{peer} cannot be reached: {reason}")


class PeerTimeoutError(PeerError):
    """No answer in time; the request may still be carried out."""

    def __init__(self, peer: str, timeout_s: float) -> None:
        self.peer, self.timeout_s = peer, timeout_s
        super().__init__(f"{peer} did not answer within {timeout_s:g} s")


class PeerOverloadedError(PeerError):
    """This link's bound on calls or queued bytes is reached; nothing was sent."""

    code = "overloaded"


class PeerTooLargeError(PeerError):
    """The request is larger than a frame may be; nothing was sent."""

    code = "too_large"


class RemoteError(PeerError):
    """The peer's handler answered with an error."""

    def __init__(self, code: str, message: str, retry_after_ms: int | None = None) -> None:
        self.code, self.message, self.retry_after_ms = code, message, retry_after_ms
        super().__init__(f"{code}: {message}")


class Call(Pending[Any]):
    """A question that is under way; `wait` for its answer. One that nobody waits for ends by its deadline."""

    __slots__ = ("_link", "frame", "id", "op", "timeout_s")

    def __init__(self, link: PeerLink, id: int, op: str, frame: int, timeout_s: float) -> None:
        super().__init__()
        self._link, self.id, self.op = link, id, op
        self.frame, self.timeout_s = frame, timeout_s

    def abandon(self) -> None:
        self._link.take_back(self)


@dataclass(frozen=True, slots=True)
class PeerLinkStatistics:
    """`connection`: ConnectionStatistics of the current connection as a dict, or None."""

    peer: str
    connected: bool
    boot: int
    in_flight: int
    calls: int
    connects: int
    failed_connects: int
    refused: int
    timeouts: int
    # Of reads that this node asked for; bytes of the questions and of their answers.
    cancelled: int
    read_bytes_out: int
    read_bytes_in: int
    last_error: str
    connection: dict[str, int] | None


class PeerLink:
    """A lasting link to one peer. `run` it in a nursery; `call` from any task of the same loop."""

    def __init__(
        self,
        where: Callable[[], Address | None],
        hello: Hello,
        *,
        expect: str | None = None,
        limits: PeerLimits | None = None,
        jitter: random.Random | None = None,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        """`where`: asked before each try; None: not known yet. `expect`: the peer's name; a node of another name there is
        refused. `lost`: called when a connection that was up has ended and it was not we who ended it."""
        self.name = expect or str(where())
        self.peer: Hello | None = None
        self.address: Address | None = None
        self._where, self._lost = where, lost
        self._moved = False
        self._pause = trio.CancelScope()
        self._hello, self._expect = hello, expect
        self._limits = limits or PeerLimits()
        self._jitter = jitter or random.Random()
        self._conn: Connection | None = None
        self._up = trio.Event()
        self._calls: dict[int, Call] = {}
        self._ids = count(1)
        self._deadlines: Deadlines[Call] = Deadlines(self._expire)
        self._backoff_s = BACKOFF_MIN_S
        self._last_error = "not connected yet"
        self._called = self._connects = self._failed = self._overloaded = self._timeouts = 0
        self._cancelled = self.read_bytes_out = self.read_bytes_in = 0

    @property
    def connected(self) -> bool:
        return self._conn is not None

    def look_again(self) -> None:
        """The peer may have moved or started again: ends a connection to where it is no more, and tries at once."""
        self._backoff_s = BACKOFF_MIN_S
        self._pause.cancel()
        if self._conn is not None and self.address != self._where():
            self._moved = True
            self._conn.close("it has moved to another address")

    async def wait_connected(self) -> None:
        """Returns once the hello has been agreed on; at once when it already is."""
        await self._up.wait()

    async def call(self, op: str, body: Any, timeout_s: float) -> Any:
        """The peer's answer.

        Raises PeerGoneError, PeerTimeoutError, PeerOverloadedError, PeerTooLargeError, or RemoteError with
        the handler's code; TypeError when `body` cannot be packed.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        return await self.begin(op, body, timeout_s).wait()

    def begin(self, op: str, body: Any, timeout_s: float) -> Call:
        """Sends the question now, for somebody to wait for its answer. Raises what `call` raises before it waits."""
        conn = self._conn
        if conn is None or conn.closed:
            raise PeerGoneError(self.name, self._last_error, sent=False)
        calls = self._calls
        if len(calls) >= self._limits.requests_in_flight or conn.full:
            self._overloaded += 1
            raise PeerOverloadedError(f"too much is already waiting for {self.name}; try again later")
        request_id = next(self._ids)
        queued = conn.queue_bytes
        try:
            frame = conn.send(REQUEST, request_id, op, body)
        except FrameTooLargeError as error:
            raise PeerTooLargeError(f"the request {op} to {self.name} is too large: {error}") from error
        if op in READS:
            self.read_bytes_out += conn.queue_bytes - queued
        call = calls[request_id] = Call(self, request_id, op, frame, timeout_s)
        self._called += 1
        self._deadlines.add(call, timeout_s)
        return call

    def take_back(self, call: Call) -> None:
        """Nobody waits for it any more. Of a read the peer is told, so that it stops working on it."""
        del self._calls[call.id]
        if call.op in READS and self._conn is not None and not self._conn.closed:
            self._cancelled += 1
            self._conn.send(CANCEL, call.id, "", None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Connects, and connects again forever. Started at once: a peer that is down holds nobody up."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deadlines.run)
            task_status.started()
            await self._connect_forever()
        raise AssertionError("unreachable")

    async def _connect_forever(self) -> NoReturn:
        self._backoff_s = BACKOFF_MIN_S
        while True:
            self._pause = trio.CancelScope()
            began = trio.current_time()
            self.address = self._where()
            error = await self._connect_once(self.address) if self.address else "its address is not known yet"
            if error != self._last_error:
                log.warning("peer_down", peer=self.name, address=str(self.address), reason=error)
            self._last_error = error
            if trio.current_time() - began > BACKOFF_MAX_S:
                self._backoff_s = BACKOFF_MIN_S
            with self._pause:
                # Jitter, so that a peer that comes back is not met by everybody at once.
                await trio.sleep(self._backoff_s * self._jitter.uniform(0.5, 1.0))
            self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)

    async def _connect_once(self, address: Address) -> str:
        """One connection, from its first byte to its end; returns why it ended."""
        try:
            with trio.fail_after(CONNECT_S):
                stream = await trio.open_tcp_stream(address.host, address.port)
        except (OSError, trio.TooSlowError) as error:
            self._failed += 1
            return f"connecting to {address} failed: {error or 'timed out'}"
        conn = Connection(stream, self._limits)
        try:
            with trio.fail_after(self._limits.hello_s):
                await self._shake_hands(conn)
        except (ProtocolError, HelloRefusedError, trio.TooSlowError, trio.BrokenResourceError) as error:
            self._failed += 1
            await conn.aclose()
            said = str(error) or (
                "no hello in time" if isinstance(error, trio.TooSlowError) else "lost in the hello"
            )
            code = f"{error.code}: " if isinstance(error, HelloRefusedError) else ""
            return f"{code}{address}: {said}"
        except BaseException:
            await conn.aclose()
            raise
        self._connects += 1
        self._conn = conn
        self._up.set()
        log.info("peer_up", peer=self.name, address=str(address), boot=self.peer and self.peer.boot)
        reason = "this node is stopping"
        self._moved = False
        try:
            reason = await conn.run(self._on_message)
            if not self._moved:
                self._lost()
            return reason
        finally:
            self._conn = None
            self._up = trio.Event()
            self._drop(reason, conn.frames_taken)
            await conn.aclose()

    async def _shake_hands(self, conn: Connection) -> None:
        await conn.send_magic()
        await conn.send_hello(pack_hello(self._hello))
        theirs, refused = unpack_hello(await conn.receive_hello())
        if refused is not None:
            raise HelloRefusedError(f"refused by {theirs.node}: {refused}", refused.code)
        check_hello(self._hello, theirs)
        if self._expect is not None and theirs.node != self._expect:
            raise HelloRefusedError(
                f'expected "{self._expect}", found "{theirs.node}"; gossip will tell where it is'
            )
        self.peer = theirs
        self.name = theirs.node

    def _on_message(self, kind: int, request_id: int, op: str, body: Any) -> None:
        call = self._calls.pop(request_id, None)
        if call is None:
            return  # its caller has given up
        if call.op in READS and self._conn is not None:
            self.read_bytes_in += self._conn.message_bytes
        if kind == REPLY:
            call.settle(outcome.Value(body))
            return
        if kind == ERROR and type(body) is list and len(body) == 2:
            message, retry_after_ms = str(body[0]), body[1]
            if type(retry_after_ms) is not int:
                retry_after_ms = None
            call.settle(outcome.Error(RemoteError(op, message, retry_after_ms)))
            return
        self._calls[request_id] = call
        raise ProtocolError(f"a message of unknown type {kind}")

    def _drop(self, reason: str, taken: int) -> None:
        """Tells every waiter at once that the connection is gone."""
        calls = list(self._calls.values())
        self._calls.clear()
        self._deadlines.clear()
        for call in calls:
            call.settle(outcome.Error(PeerGoneError(self.name, reason, sent=call.frame <= taken)))

    def _expire(self, call: Call) -> None:
        # The peer knows how much time there was.
        del self._calls[call.id]
        self._timeouts += 1
        call.settle(outcome.Error(PeerTimeoutError(self.name, call.timeout_s)))

    def statistics(self) -> PeerLinkStatistics:
        conn = self._conn
        return PeerLinkStatistics(
            peer=self.name,
            connected=conn is not None,
            boot=self.peer.boot if self.peer else 0,
            in_flight=len(self._calls),
            calls=self._called,
            connects=self._connects,
            failed_connects=self._failed,
            refused=self._overloaded,
            timeouts=self._timeouts,
            cancelled=self._cancelled,
            read_bytes_out=self.read_bytes_out,
            read_bytes_in=self.read_bytes_in,
            last_error="" if conn else self._last_error,
            connection=asdict(conn.statistics()) if conn else None,
        )
