"""Answering other nodes: accepts peer links, runs handlers, sends what they return.

A handler is called as `handler(peer_name, body)`. A plain function is answered on the spot, without a task; so is one
that returns Later, when its answer comes; a coroutine is run by one of the connection's workers. When a connection ends, what
runs for it is cancelled; so is a read that the peer takes back.

An exception with a `code` (and perhaps `retry_after_ms`) becomes that error at the caller; any other is
logged and becomes `internal`, without its text.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Container, Coroutine, Mapping
from dataclasses import dataclass
from types import CoroutineType
from typing import Any, NoReturn, Protocol

import outcome
import structlog
import trio

from gossip.agent import MAGIC as GOSSIP_MAGIC
from node.config import Address
from node.frames import (
    BULK_MAGIC,
    CANCEL,
    ERROR,
    MAGIC,
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
from node.workers import Workers

Handler = Callable[[str, Any], Awaitable[Any] | Any]
_Job = tuple[int, str, Coroutine[Any, Any, Any], trio.CancelScope | None]
POLL_S = 0.02
COMPLAIN_S = 1.0

# An error sentence that a handler built from its input must not fill frames.
MESSAGE_CHARS_MAX = 1_000

log = structlog.get_logger(__name__)


class Running(Protocol):
    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Later:
    """An answer that comes by a callback: `begin` is given one and returns what can be cancelled; `pack` makes the body."""

    begin: Callable[[Callable[[outcome.Value[Any] | outcome.Error], None]], Running]
    pack: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class PeerListenerStatistics:
    """`peers`: name → requests now under way, of the connected peers."""

    connections: int
    accepted: int
    refused_hellos: int
    refused_connections: int
    refused_requests: int
    requests: int
    cancelled: int
    errors: int
    protocol_errors: int
    peers: dict[str, int]


class PeerListener:
    """The peer port of a node. `handlers` is read at each request, so it may be filled later."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        hello: Hello,
        *,
        listen: Address,
        limits: PeerLimits | None = None,
        known: Container[str] | None = None,
        gossip: Callable[[trio.abc.Stream], Awaitable[None]] | None = None,
        bulk: Callable[[trio.abc.Stream], Awaitable[None]] | None = None,
    ) -> None:
        """`known`: names of peers that may connect; None lets in every node of the cluster. `gossip`, `bulk`: take connections
        that begin with their magic, which has been read."""
        self.handlers = handlers
        # Why no peer is let in yet; gossip is served from the start.
        self.closed = ""
        self._gossip, self._bulk = gossip, bulk
        self._hello, self._listen, self._known = hello, listen, known
        self._limits = limits or PeerLimits()
        self._listeners: list[trio.SocketListener] = []
        self._peers: dict[str, _Session] = {}
        self.stopping = False
        self._open = self._accepted = self._refused_hellos = self._refused_connections = 0
        self._protocol_errors = 0
        self._complain_at = -math.inf
        self.refused_requests = self.requests = self.errors = self.cancelled = 0

    async def bind(self) -> Address:
        """Takes the port and returns where it is. Raises OSError. Peers then wait for `run` to answer."""
        self._listeners = await trio.open_tcp_listeners(self._listen.port, host=self._listen.host)
        name = self._listeners[0].socket.getsockname()
        return Address(name[0], name[1])

    async def run(self, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Serves until cancelled; started with the bound address."""
        if not self._listeners:
            await self.bind()
        name = self._listeners[0].socket.getsockname()
        task_status.started(Address(name[0], name[1]))
        await trio.serve_listeners(self.serve_stream, self._listeners)
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """New requests get `shutting_down`; those under way go on."""
        self.stopping = True

    async def drained(self, grace_s: float) -> None:
        """Returns when nothing of a peer's is under way, or after `grace_s`."""
        with trio.move_on_after(grace_s):
            while any(session.in_flight for session in self._peers.values()):  # noqa: ASYNC110 - only at the end
                await trio.sleep(POLL_S)

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """One connection, from its magic to its end. Raises nothing for the remote's sake."""
        conn = Connection(stream, self._limits)
        if self._open >= self._limits.connections:
            self._refused_connections += 1
            await conn.aclose()
            return
        self._open += 1
        try:
            peer: Hello | None = None
            magic = b""
            with trio.move_on_after(self._limits.hello_s):
                magic = await conn.receive_magic()
                if magic == MAGIC:
                    peer = await self._shake_hands(conn)
            if peer is not None:
                await self._serve_peer(conn, peer)
            elif magic == GOSSIP_MAGIC and self._gossip is not None:
                await self._gossip(stream)
            elif magic == BULK_MAGIC and self._bulk is not None:
                await self._bulk(stream)
        except ProtocolError as error:
            self._protocol_errors += 1
            # Whoever sends rubbish must not fill the disk with our complaints: the counter has them all.
            if trio.current_time() >= self._complain_at:
                self._complain_at = trio.current_time() + COMPLAIN_S
                log.warning(
                    "peer_garbage",
                    remote=_remote(stream),
                    reason=str(error),
                    protocol_errors=self._protocol_errors,
                )
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # gone before its hello was answered
        finally:
            self._open -= 1
            await conn.aclose()

    async def _shake_hands(self, conn: Connection) -> Hello | None:
        theirs, _ = unpack_hello(await conn.receive_hello())
        refused = self._why_refused(theirs)
        await conn.send_hello(pack_hello(self._hello, refused))
        if refused is None:
            return theirs
        self._refused_hellos += 1
        if not self.closed:
            log.warning("peer_refused", peer=theirs.node, code=refused.code, reason=str(refused))
        return None

    def _why_refused(self, theirs: Hello) -> HelloRefusedError | None:
        try:
            check_hello(self._hello, theirs)
        except HelloRefusedError as error:
            return error
        if self.closed:
            return HelloRefusedError(self.closed, "unavailable")
        if self._known is not None and theirs.node not in self._known:
            return HelloRefusedError(
                f'{self._hello.node} has not heard of "{theirs.node}" by gossip yet', "unknown_node"
            )
        here = self._peers.get(theirs.node)
        if here is not None and here.peer.boot > theirs.boot:
            return HelloRefusedError(
                f'a newer process named "{theirs.node}" is connected; two nodes share one name or directory'
            )
        return None

    async def _serve_peer(self, conn: Connection, peer: Hello) -> None:
        old = self._peers.get(peer.node)
        if old is not None:
            # The peer has started again or lost the old connection before we noticed.
            old.conn.close("replaced by a newer connection")
        self._accepted += 1
        session = _Session(self, conn, peer)
        self._peers[peer.node] = session
        try:
            reason = await session.run()
        finally:
            if self._peers.get(peer.node) is session:
                del self._peers[peer.node]
        log.info("peer_left", peer=peer.node, reason=reason)

    def statistics(self) -> PeerListenerStatistics:
        return PeerListenerStatistics(
            connections=self._open,
            accepted=self._accepted,
            refused_hellos=self._refused_hellos,
            refused_connections=self._refused_connections,
            refused_requests=self.refused_requests,
            requests=self.requests,
            cancelled=self.cancelled,
            errors=self.errors,
            protocol_errors=self._protocol_errors,
            peers={name: session.in_flight for name, session in self._peers.items()},
        )


class _Session:
    """One connected peer: its requests on their way through the handlers."""

    def __init__(self, listener: PeerListener, conn: Connection, peer: Hello) -> None:
        self.conn, self.peer = conn, peer
        self.in_flight = 0
        self._listener = listener
        self._limit = listener._limits.requests_in_flight
        self._workers: Workers[_Job]
        # Reads under way, by request id.
        self._reads: dict[int, Running] = {}

    async def run(self) -> str:
        try:
            async with trio.open_nursery() as nursery:
                self._workers = Workers(nursery, self._work)
                reason = await self.conn.run(self._on_message)
                nursery.cancel_scope.cancel()
        finally:
            for running in self._reads.values():
                running.cancel()
            self._reads.clear()
        return reason

    def _on_message(self, kind: int, request_id: int, op: str, body: Any) -> None:
        if kind == CANCEL:
            self._cancel(request_id)
            return
        if kind != REQUEST:
            raise ProtocolError(f"a message of type {kind} from a peer that asks")
        self._listener.requests += 1
        handler = self._listener.handlers.get(op)
        if handler is None:
            self._fail(
                request_id, "unknown_op", f'{self._listener._hello.node} does not know the operation "{op}"'
            )
            return
        if self._listener.stopping:
            self._fail(
                request_id, "shutting_down", f"{self._listener._hello.node} is stopping; ask another node"
            )
            return
        if self.in_flight >= self._limit:
            self._listener.refused_requests += 1
            self._fail(request_id, "overloaded", f"{self._limit} requests of this peer are under way", 10)
            return
        try:
            result = handler(self.peer.node, body)
        except Exception as error:
            self._fail_with(request_id, op, error)
            return
        if type(result) is Later:
            self._answer_later(request_id, op, result)
            return
        if type(result) is not CoroutineType:
            self._answer(request_id, op, result)
            return
        self.in_flight += 1
        scope = None
        if op in READS:
            scope = self._reads[request_id] = trio.CancelScope()
        self._workers.begin((request_id, op, result, scope))

    async def _work(self, job: _Job) -> None:
        request_id, op, running, scope = job
        try:
            if scope is None:
                result = await running
            else:
                with scope:
                    result = await running
                if scope.cancelled_caught:
                    return
        except Exception as error:
            self._fail_with(request_id, op, error)
        else:
            self._answer(request_id, op, result)
        finally:
            self.in_flight -= 1
            if scope is not None and self._reads.get(request_id) is scope:
                del self._reads[request_id]

    def _answer_later(self, request_id: int, op: str, later: Later) -> None:
        over = False

        def done(result: outcome.Value[Any] | outcome.Error) -> None:
            nonlocal over
            over = True
            self._reads.pop(request_id, None)
            self.in_flight -= 1
            if isinstance(result, outcome.Value):
                self._answer(request_id, op, later.pack(result.value))
            else:
                assert isinstance(result.error, Exception)
                self._fail_with(request_id, op, result.error)

        self.in_flight += 1
        try:
            running = later.begin(done)
        except Exception as error:
            self.in_flight -= 1
            self._fail_with(request_id, op, error)
            return
        if not over:
            self._reads[request_id] = running

    def _cancel(self, request_id: int) -> None:
        """The peer wants no answer any more; it may be on its way already."""
        running = self._reads.pop(request_id, None)
        if running is None:
            return
        self._listener.cancelled += 1
        running.cancel()
        if not isinstance(running, trio.CancelScope):
            self.in_flight -= 1  # of the others their workers see to that

    def _answer(self, request_id: int, op: str, result: Any) -> None:
        try:
            self.conn.send(REPLY, request_id, "", result)
        except FrameTooLargeError as error:
            self._fail(request_id, "too_large", f"the answer to {op} is too large: {error}")
        except (TypeError, ValueError, OverflowError) as error:
            self._fail_with(request_id, op, error)

    def _fail(self, request_id: int, code: str, message: str, retry_after_ms: int | None = None) -> None:
        self._listener.errors += 1
        # A sentence about a file can hold what UTF-8 cannot; an error must always get through.
        said = message[:MESSAGE_CHARS_MAX].encode(errors="replace").decode()
        self.conn.send(ERROR, request_id, code, (said, retry_after_ms))

    def _fail_with(self, request_id: int, op: str, error: Exception) -> None:
        code = getattr(error, "code", None)
        if isinstance(code, str):
            retry_after_ms = getattr(error, "retry_after_ms", None)
            message = str(getattr(error, "message", None) or error)
            self._fail(request_id, code, message, retry_after_ms if isinstance(retry_after_ms, int) else None)
            return
        log.error("handler_failed", op=op, peer=self.peer.node, exc_info=error)
        self._fail(request_id, "internal", f"{self._listener._hello.node} failed at {op}; its log says why")


def _remote(stream: trio.abc.Stream) -> str:
    try:
        return str(stream.socket.getpeername()) if isinstance(stream, trio.SocketStream) else "?"
    except OSError:
        return "?"
