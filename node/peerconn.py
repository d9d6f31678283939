"""One connection between two nodes: what both ends of `node/peerlink.py` do alike.

Everything that waits goes out in one write: senders append to a list and wake the writer, which joins the
list. A sender never waits, so a message costs no trio checkpoint here; the list is bounded by
`queue_bytes_max`.

Each end sends a heartbeat when it has sent nothing else for `heartbeat_s`, and gives the connection up
after `silence_s` without a byte. Heartbeats are not answered: an answer would wait behind a big frame and
look like death.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
import trio

from gossip.agent import MAGIC as GOSSIP_MAGIC
from node.frames import (
    BULK_MAGIC,
    HEADER,
    HEARTBEAT,
    HELLO_BYTES_MAX,
    MAGIC,
    FrameParser,
    ProtocolError,
    unpack_message,
)

# One listener serves both, and tells them apart by their first bytes.
MAGICS = (MAGIC, GOSSIP_MAGIC, BULK_MAGIC)
assert {len(magic) for magic in MAGICS} == {len(MAGIC)}

RECEIVE_BYTES = 64 << 10
# While a big frame arrives, larger reads save wake-ups.
RECEIVE_BYTES_BIG = 1 << 20
# A large batch is written in pieces, so that its progress is seen.
WRITE_BYTES = 1 << 20
# A timer this late means that this process was stalled: the silence was ours, not the peer's.
LATE_S = 0.1

OnMessage = Callable[[int, int, str, Any], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerLimits:
    """Bounds of a connection. Over `requests_in_flight` or `queue_bytes` the asker is told `overloaded`."""

    frame_bytes: int = 32 << 20
    queue_bytes: int = 64 << 20
    requests_in_flight: int = 1_024
    connections: int = 1_024
    heartbeat_s: float = 1.0
    silence_s: float = 3.0
    hello_s: float = 5.0


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    bytes_in: int
    bytes_out: int
    messages_in: int
    messages_out: int
    writes: int
    queue_bytes: int


class FrameTooLargeError(Exception):
    """A message of ours is larger than the peer would take."""


class Connection:
    """A stream with a writer, a reader and a watch. `run` returns why it ended."""

    def __init__(self, stream: trio.abc.Stream, limits: PeerLimits) -> None:
        self.limits = limits
        self.reason = ""
        self.closed = False
        self.queue_bytes = 0
        # Frames queued and frames handed to the socket: tells a message that may have left from one that
        # has not.
        self.frames_queued = 0
        self.frames_taken = 0
        # Of the message that `on_message` is called with.
        self.message_bytes = 0
        self._stream = stream
        self._packer = msgpack.Packer(autoreset=True)
        self._out: list[bytes] = []
        self._writer: trio.lowlevel.Task | None = None
        self._drained = trio.lowlevel.ParkingLot()
        self._parser = FrameParser(limits.frame_bytes)
        self._scope = trio.CancelScope()
        self._heard = self._sent = trio.current_time()
        self._bytes_in = self._bytes_out = self._messages_in = self._writes = 0

    def send(self, kind: int, request_id: int, op: str, body: Any) -> int:
        """Queues one message without waiting; returns its number.

        Raises FrameTooLargeError, and TypeError, ValueError or OverflowError for a body that msgpack cannot
        pack.
        """
        payload: bytes = self._packer.pack((kind, request_id, op, body))
        if len(payload) > self.limits.frame_bytes:
            raise FrameTooLargeError(f"{len(payload):,} bytes; the bound is {self.limits.frame_bytes:,}")
        self.send_payload(payload)
        return self.frames_queued

    def send_payload(self, payload: bytes) -> None:
        self._out.append(HEADER.pack(len(payload)))
        self._out.append(payload)
        self.queue_bytes += len(payload) + HEADER.size
        self.frames_queued += 1
        if self._writer is not None:
            writer, self._writer = self._writer, None
            trio.lowlevel.reschedule(writer)

    @property
    def full(self) -> bool:
        return self.queue_bytes >= self.limits.queue_bytes

    async def send_magic(self) -> None:
        await self._stream.send_all(MAGIC)

    async def receive_magic(self) -> bytes:
        """One of MAGICS. Raises ProtocolError when the first bytes are none of them."""
        seen = b""
        while len(seen) < len(MAGIC):
            chunk = await self._stream.receive_some(len(MAGIC) - len(seen))
            seen += bytes(chunk)
            if not chunk or not any(magic.startswith(seen) for magic in MAGICS):
                raise ProtocolError(f"not a peer: the connection begins with {seen[:8]!r}")
        return seen

    async def send_hello(self, payload: bytes) -> None:
        await self._stream.send_all(HEADER.pack(len(payload)) + payload)

    async def receive_hello(self) -> bytes:
        """The first frame's payload. Reads no byte past it: frames that follow belong to `run`."""
        head = await self._receive_exactly(HEADER.size)
        (length,) = HEADER.unpack(head)
        if length > HELLO_BYTES_MAX:
            raise ProtocolError(f"a hello of {length:,} bytes; the bound is {HELLO_BYTES_MAX:,}")
        return await self._receive_exactly(length)

    async def _receive_exactly(self, size: int) -> bytes:
        seen = b""
        while len(seen) < size:
            chunk = await self._stream.receive_some(size - len(seen))
            if not chunk:
                raise ProtocolError("the connection ended in the hello")
            seen += bytes(chunk)
        return seen

    async def run(self, on_message: OnMessage) -> str:
        """Until the connection ends; returns why. `on_message` gets each message and must not block."""
        self._heard = self._sent = trio.current_time()
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guard, self._write)
                nursery.start_soon(self._guard, self._watch)
                await self._guard(self._read, on_message)
        self.closed = True
        return self.reason or "closed"

    def close(self, reason: str) -> None:
        """Ends `run` soon; the first reason given is kept."""
        self.reason = self.reason or reason
        self._scope.cancel()

    async def _guard(self, work: Callable[..., Any], *args: Any) -> None:
        try:
            await work(*args)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.close(f"connection lost: {error.__cause__ or error or 'closed'}")
        except ProtocolError as error:
            self.close(str(error))

    async def _write(self) -> None:
        while True:
            if not self._out:
                self._writer = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._stop_writing)
                # Tasks woken together with this one run before the join, and their messages go along.
                continue
            batch, self._out = self._out, []
            self.frames_taken = self.frames_queued
            data = b"".join(batch)
            del batch
            if len(data) <= WRITE_BYTES:
                await self._write_some(data)
                continue
            with memoryview(data) as view:
                for start in range(0, len(data), WRITE_BYTES):
                    await self._write_some(view[start : start + WRITE_BYTES])

    async def _write_some(self, data: bytes | memoryview) -> None:
        await self._stream.send_all(data)
        self._sent = trio.current_time()
        self._writes += 1
        self._bytes_out += len(data)
        self.queue_bytes -= len(data)
        if self._drained and not self.full:
            self._drained.unpark_all()

    def _stop_writing(self, _raise_cancel: Any) -> trio.lowlevel.Abort:
        self._writer = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def _read(self, on_message: OnMessage) -> None:
        parser, stream = self._parser, self._stream
        while True:
            missing = parser.missing
            size = RECEIVE_BYTES if missing <= RECEIVE_BYTES else min(missing, RECEIVE_BYTES_BIG)
            chunk = await stream.receive_some(size)
            if not chunk:
                self.close("the peer closed the connection")
                return
            self._heard = trio.current_time()
            self._bytes_in += len(chunk)
            for payload in parser.feed(chunk):
                kind, request_id, op, body = unpack_message(payload)
                self._messages_in += 1
                self.message_bytes = len(payload) + HEADER.size
                if kind != HEARTBEAT:
                    on_message(kind, request_id, op, body)
            while self.full:
                # The peer does not take our answers: take no more of its questions.
                await self._drained.park()
                self._heard = trio.current_time()

    async def _watch(self) -> None:
        tick = min(self.limits.heartbeat_s, self.limits.silence_s / 3) / 2
        due = trio.current_time()
        while True:
            due += tick
            await trio.sleep_until(due)
            now = trio.current_time()
            if now - due > LATE_S:
                self._heard += now - due
                due = now
            # While reading is held back (`full`), it is the peer's taking of our bytes that shows life.
            silence_s = now - (max(self._heard, self._sent) if self.full else self._heard)
            if silence_s > self.limits.silence_s:
                self.close(f"silent for {silence_s:.1f} s")
                return
            if now - self._sent >= self.limits.heartbeat_s - tick and not self._out:
                self.send(HEARTBEAT, 0, "", None)

    async def aclose(self) -> None:
        self.closed = True
        await trio.aclose_forcefully(self._stream)

    def statistics(self) -> ConnectionStatistics:
        return ConnectionStatistics(
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            messages_in=self._messages_in,
            messages_out=self.frames_queued,
            writes=self._writes,
            queue_bytes=self.queue_bytes,
        )
