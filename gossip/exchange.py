"""One gossip exchange over TCP, either side of it: sealed packets, each behind its length, both ways at once.

Laws:
* nobody waits for an exchange: what is to be sent is queued, up to a bound, and sealed when its turn comes, so that a slow
  peer does not make our packets look old;
* an exchange ends when nothing moved for `idle_s`, when its bytes are used up, when the peer closes it, when a write
  takes too long, or when a packet comes that no node sends. Its end is the end of nothing else.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import trio

from gossip.codec import STREAM_PACKET_BYTES_MAX, STREAM_PARTS_BYTES_MAX, size_of, split
from gossip.messages import Address, Part

MAGIC = b"GMCOgoss"
LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 64 << 10
_WRITE_BYTES = 64 << 10

End = Literal["", "idle", "closed", "broken", "garbage", "too_large", "slow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamLimits:
    """Bounds of what goes over TCP. The connecting side is less patient than the listening one, so that it ends an
    exchange and no packet is on its way to a closed stream."""

    connect_s: float = 3.0
    exchange_s: float = 5.0
    exchange_bytes: int = 8 << 20
    write_s: float = 5.0
    idle_out_s: float = 1.0
    idle_kept_s: float = 8.0
    idle_in_s: float = 10.0
    exchanges_out: int = 16
    kept_out: int = 64
    exchanges_in: int = 64


class Exchange:
    """`address`: where the machine believes that its packets come from and go to."""

    def __init__(
        self,
        address: Address,
        limits: StreamLimits,
        *,
        seal: Callable[[Sequence[Part]], bytes],
        on_packet: Callable[[bytes, Exchange], bool],
    ) -> None:
        """on_packet returns whether the peer may go on, and sets `proven` when it is one of us."""
        self.address = address
        self.scope = trio.CancelScope()
        self.remote = str(address)
        self.packets_in = self.packets_out = self.bytes_in = self.bytes_out = 0
        self.refused = 0
        self.proven = False
        self.end: End = ""
        self.moved_at = trio.current_time()
        self._limits, self._seal, self._on_packet = limits, seal, on_packet
        self._idle_s, self._until = limits.idle_in_s, float("inf")
        self._queue: deque[tuple[Part, ...]] = deque()
        # Of the parts that wait and of those being written.
        self.queue_bytes = 0
        self._wake = trio.Event()

    def send(self, parts: tuple[Part, ...]) -> bool:
        """Queues parts without waiting; False: there is too much already, or it has ended."""
        size = sum([size_of(part) for part in parts])
        if self.end or self.queue_bytes + size > self._limits.exchange_bytes:
            self.refused += 1
            return False
        self._queue.append(parts)
        self.queue_bytes += size
        self._wake.set()
        return True

    def bound(self, *, idle_s: float, total_s: float = float("inf")) -> None:
        """How long it may do nothing, and how long it may last, from now on."""
        self._idle_s, self._until = idle_s, trio.current_time() + total_s
        self._moved()

    def _moved(self) -> None:
        self.moved_at = trio.current_time()
        self.scope.deadline = min(self.moved_at + self._idle_s, self._until)

    async def run(self, stream: trio.abc.Stream) -> None:
        """Until it ends; `end` says why. The stream is the caller's to close."""
        self._moved()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, stream, nursery.cancel_scope)
            await self._read(stream)
            nursery.cancel_scope.cancel()

    def stop(self, end: End) -> None:
        """The first reason is kept. Who stops it from outside cancels `scope`, too."""
        self.end = self.end or end

    @property
    def spent(self) -> bool:
        """Whether so much went over it that it is time for the next one."""
        return 2 * max(self.bytes_in, self.bytes_out) > self._limits.exchange_bytes

    @property
    def waiting(self) -> int:
        """Sends that have not been written."""
        return len(self._queue)

    async def _read(self, stream: trio.abc.Stream) -> None:
        received = bytearray()
        while not self.end:
            try:
                chunk = await stream.receive_some(_RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.stop("broken")
                return
            if not chunk:
                self.stop("closed")
                return
            self.bytes_in += len(chunk)
            received += chunk
            self._parse(received)

    def _parse(self, received: bytearray) -> None:
        """Takes whole packets off the front of `received`."""
        if self.bytes_in > self._limits.exchange_bytes:
            self.stop("too_large")
        start = 0
        while not self.end and len(received) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received, start)
            if length > STREAM_PACKET_BYTES_MAX:
                self.stop("garbage")
                # Told as one packet, so that it is counted under its reason.
                self._on_packet(bytes(received[start : start + 64]), self)
                return
            stop = start + LENGTH.size + length
            if stop > len(received):
                break
            # Whole packets show life; single bytes would let a stream be held open for nothing.
            self._moved()
            if not self._on_packet(bytes(received[start + LENGTH.size : stop]), self):
                self.stop("garbage")
            self.packets_in += 1
            start = stop
        del received[:start]

    async def _write(self, stream: trio.abc.Stream, whole: trio.CancelScope) -> None:
        while not self.end:
            if not self._queue:
                self._wake = trio.Event()
                await self._wake.wait()
            data, size = self._take()
            if self.bytes_out + len(data) > self._limits.exchange_bytes:
                self.stop("too_large")
                break
            try:
                with trio.move_on_after(self._limits.write_s) as in_time:
                    await stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.stop("broken")
                break
            if in_time.cancelled_caught:
                self.stop("slow")
                break
            self.bytes_out += len(data)
            self.queue_bytes -= size
            self._moved()
        whole.cancel()

    def _take(self) -> tuple[bytearray, int]:
        """(what waits, sealed, as far as one write goes; the bytes of its parts)."""
        data, size = bytearray(), 0
        while self._queue and len(data) < _WRITE_BYTES:
            parts = self._queue.popleft()
            size += sum([size_of(part) for part in parts])
            for some in split(parts, STREAM_PARTS_BYTES_MAX):
                packet = self._seal(some)
                if len(packet) > STREAM_PACKET_BYTES_MAX:
                    self.refused += 1
                    continue
                data += LENGTH.pack(len(packet)) + packet
                self.packets_out += 1
        return data, size
