"""The TCP exchanges of a node: those it opens, few at a time, and those that others open.

A packet that came on a stream is answered on that stream. The machine knows streams by addresses: one that we opened by
the address that we called; one that another node opened by an address made up for it, in 100::/64, where no host ever is
(RFC 6666), so that an answer that comes late finds its stream or nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address

import trio

from gossip.exchange import MAGIC, Exchange, StreamLimits
from gossip.messages import Address, Part

_NOWHERE = "100:"
_NOWHERE_FIRST = int(IPv6Address("100::")) + 1
_NOWHERE_COUNT = 1 << 63


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """refused: sends that found no room, or an end. gone: answers to a stream that had ended. pushed_out: streams closed
    to make room for others."""

    opened: int
    failed: int
    accepted: int
    turned_away: int
    pushed_out: int
    refused: int
    gone: int
    open_out: int
    open_in: int
    packets_in: int
    packets_out: int
    bytes_in: int
    bytes_out: int


class Streams:
    """on_failed(address, refused): a stream could not be had, or its peer closed it without a word."""

    def __init__(
        self,
        limits: StreamLimits,
        *,
        seal: Callable[[Sequence[Part]], bytes],
        on_packet: Callable[[bytes, Exchange], bool],
        on_failed: Callable[[Address, bool], None],
    ) -> None:
        self._limits, self._on_failed = limits, on_failed
        self._exchange = partial(Exchange, limits=limits, seal=seal, on_packet=on_packet)
        self._out: dict[Address, Exchange] = {}
        self._kept: set[Address] = set()
        self._in: dict[Address, Exchange] = {}
        self._failing: set[Address] = set()
        self._nursery: trio.Nursery | None = None
        self._serial = 0
        self._opened = self._failed = self._accepted = self._turned_away = self._pushed_out = 0
        self._refused = self._gone = self._packets_in = self._packets_out = self._bytes_in = (
            self._bytes_out
        ) = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carries exchanges until cancelled; without it, nothing is sent and nobody served."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    @property
    def pending(self) -> bool:
        """Whether anything waits to be written."""
        return any(exchange.queue_bytes for exchange in (*self._out.values(), *self._in.values()))

    def answer(self, address: Address, parts: tuple[Part, ...]) -> bool:
        """Whether `address` is a stream that another node opened. If it is there yet, the parts go out on it."""
        if not address.host.startswith(_NOWHERE):
            return False
        exchange = self._in.get(address)
        if exchange is None:
            self._gone += 1
        else:
            exchange.send(parts)
        return True

    def send(self, address: Address, parts: tuple[Part, ...], *, keep: bool) -> None:
        """Over the stream to `address`, or a new one. keep: more will follow, so the stream stays."""
        exchange = self._out.get(address)
        if exchange is not None and exchange.spent and not exchange.queue_bytes:
            self._end(exchange)
            exchange = None
        if exchange is None or exchange.end:
            exchange = self._open(address, keep)
        elif keep and address not in self._kept:
            self._kept.add(address)
            exchange.bound(idle_s=self._limits.idle_kept_s)
        if exchange is not None:
            exchange.send(parts)

    def _open(self, address: Address, keep: bool) -> Exchange | None:
        if self._nursery is None or not self._room(keep):
            self._refused += 1
            self._fail_later(address)
            return None
        if keep:
            self._kept.add(address)
        else:
            self._kept.discard(address)
        exchange = self._out[address] = self._exchange(address)
        self._nursery.start_soon(self._call, exchange)
        return exchange

    def _room(self, keep: bool) -> bool:
        """Makes room among the kept streams by closing the one that has been still for longest."""
        if not keep:
            return len(self._out) - len(self._kept) < self._limits.exchanges_out
        if len(self._kept) < self._limits.kept_out:
            return True
        still = [one for address in self._kept if (one := self._out.get(address)) and not one.queue_bytes]
        if not still:
            return False
        victim = min(still, key=lambda one: one.moved_at)
        self._pushed_out += 1
        self._end(victim)
        return True

    def _end(self, exchange: Exchange) -> None:
        exchange.stop("idle")
        exchange.scope.cancel()
        if self._out.get(exchange.address) is exchange:
            del self._out[exchange.address]
            self._kept.discard(exchange.address)

    def _fail_later(self, address: Address) -> None:
        """The machine is told on another turn of the loop: it may be in the middle of its effects now."""
        if self._nursery is not None and address not in self._failing:
            self._failing.add(address)
            self._nursery.start_soon(self._fail, address)

    async def _fail(self, address: Address) -> None:
        await trio.lowlevel.checkpoint()
        self._failing.discard(address)
        self._on_failed(address, False)

    async def _call(self, exchange: Exchange) -> None:
        """One exchange that we open, from the connection to its end."""
        refused = connected = False
        exchange.scope.deadline = trio.current_time() + self._limits.connect_s
        try:
            with exchange.scope:
                stream = await _connect(exchange.address)
                self._opened += 1
                connected = True
                try:
                    await self._talk(exchange, stream)
                finally:
                    await trio.aclose_forcefully(stream)
        except ConnectionRefusedError:
            refused = True
        except OSError:
            pass  # no route, or no answer in time: `connected` says it
        finally:
            self._end(exchange)
            self._count(exchange)
        # Whoever takes our packets and goes away without a word is none of us, or too busy to be asked.
        if not connected or (exchange.end in ("closed", "broken") and not exchange.proven):
            self._failed += 1
            self._on_failed(exchange.address, refused)

    async def _talk(self, exchange: Exchange, stream: trio.abc.Stream) -> None:
        if exchange.address in self._kept:
            exchange.bound(idle_s=self._limits.idle_kept_s)
        else:
            exchange.bound(idle_s=self._limits.idle_out_s, total_s=self._limits.exchange_s)
        try:
            await stream.send_all(MAGIC)
        except trio.BrokenResourceError:
            exchange.stop("broken")
        else:
            await exchange.run(stream)

    async def serve(self, stream: trio.abc.Stream) -> None:
        """An exchange that another node opened, behind its magic. Raises nothing for the remote's sake."""
        if self._nursery is None or not self._make_room_in():
            self._turned_away += 1
            await trio.aclose_forcefully(stream)
            return
        self._serial += 1
        host = str(IPv6Address(_NOWHERE_FIRST + self._serial % _NOWHERE_COUNT))
        exchange = self._exchange(Address(host, 1))
        exchange.remote = _remote(stream)
        done = trio.Event()
        self._in[exchange.address] = exchange
        self._accepted += 1
        # In our own nursery: an error in the machine ends this actor, not the node's listener.
        self._nursery.start_soon(self._serve, exchange, stream, done)
        try:
            await done.wait()
        finally:
            exchange.scope.cancel()

    async def _serve(self, exchange: Exchange, stream: trio.abc.Stream, done: trio.Event) -> None:
        try:
            with exchange.scope:
                await exchange.run(stream)
        finally:
            exchange.stop("idle")
            self._in.pop(exchange.address, None)
            self._count(exchange)
            done.set()
            await trio.aclose_forcefully(stream)

    def _make_room_in(self) -> bool:
        """Who has not sent a packet of ours yet goes first, so that strangers cannot keep members out."""
        if len(self._in) < self._limits.exchanges_in:
            return True
        for exchange in self._in.values():
            if not exchange.proven and not exchange.end:
                exchange.stop("idle")
                exchange.scope.cancel()
                del self._in[exchange.address]
                self._pushed_out += 1
                return True
        return False

    def _count(self, exchange: Exchange) -> None:
        self._packets_in += exchange.packets_in
        self._packets_out += exchange.packets_out
        self._bytes_in += exchange.bytes_in
        self._bytes_out += exchange.bytes_out
        self._refused += exchange.refused + exchange.waiting

    def statistics(self) -> StreamStatistics:
        running = [*self._out.values(), *self._in.values()]
        return StreamStatistics(
            opened=self._opened,
            failed=self._failed,
            accepted=self._accepted,
            turned_away=self._turned_away,
            pushed_out=self._pushed_out,
            refused=self._refused + sum(one.refused for one in running),
            gone=self._gone,
            open_out=len(self._out),
            open_in=len(self._in),
            packets_in=self._packets_in + sum(one.packets_in for one in running),
            packets_out=self._packets_out + sum(one.packets_out for one in running),
            bytes_in=self._bytes_in + sum(one.bytes_in for one in running),
            bytes_out=self._bytes_out + sum(one.bytes_out for one in running),
        )


async def _connect(address: Address) -> trio.SocketStream:
    """Raises OSError; ConnectionRefusedError when nobody listens."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect(address)
        _refuse_self(sock, address)
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


def _refuse_self(sock: trio.socket.SocketType, address: Address) -> None:
    """On one host, a port that nobody listens on can be given to the caller itself."""
    if sock.getsockname()[:2] == sock.getpeername()[:2]:
        raise ConnectionRefusedError(f"nobody listens at {address}")


def _remote(stream: trio.abc.Stream) -> str:
    try:
        return str(stream.socket.getpeername()[:2]) if isinstance(stream, trio.SocketStream) else "?"
    except OSError:
        return "?"
