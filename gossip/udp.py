"""UDP sockets of a node: one per address family, all on one port. Nothing that the network does raises here."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from gossip.config import PACKET_BYTES_MAX
from gossip.messages import Address

# Datagrams per wake-up: after them other tasks get their turn.
DRAIN = 64
# At 20,000 packets of 100 bytes a second this holds what comes in 0.2 s; the kernel grants what its limit allows.
RECEIVE_BUFFER_BYTES = 4 << 20
PORT_TRIES = 16
_WILDCARDS = {"::", "0.0.0.0", ""}  # noqa: S104 - what the operator wrote


@dataclass(frozen=True, slots=True)
class UdpStatistics:
    """send_errors: by errno's name; a packet that could not be sent is as good as lost on the way."""

    packets_in: int
    packets_out: int
    bytes_in: int
    bytes_out: int
    send_errors: dict[str, int]
    receive_buffer_bytes: int


class UdpSockets:
    """on_packet(data, source): data is cut off one byte past the largest packet, which tells a longer one."""

    def __init__(self, on_packet: Callable[[bytes, Address], None]) -> None:
        self._on_packet = on_packet
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}
        self._packets_in = self._packets_out = self._bytes_in = self._bytes_out = 0
        self._send_errors: dict[str, int] = {}
        self._buffer_bytes = 0

    @property
    def bound(self) -> bool:
        return bool(self._sockets)

    async def bind(self, host: str, port: int) -> int:
        """Takes `port` (0: any that is free in all families) on `host`; `::` and "" stand for IPv6 and IPv4. Returns the
        port. Raises OSError."""
        assert not self._sockets
        places = await _places(host)
        for last_try in range(PORT_TRIES - 1, -1, -1):
            try:
                with self._all_or_nothing():
                    return self._bind_all(places, port)
            except OSError as error:
                # A port that IPv6 chose may be taken in IPv4.
                if port or not last_try or error.errno != errno.EADDRINUSE:
                    raise
        raise AssertionError("unreachable")

    def _bind_all(self, places: list[tuple[socket.AddressFamily, str]], port: int) -> int:
        missing: OSError | None = None
        for family, host in places:
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            except OSError as error:
                missing = error
                continue
            try:
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
                sock.bind((host, port))
            except OSError as error:
                sock.close()
                # A host without IPv6 has the family, but no address in it.
                if error.errno != errno.EADDRNOTAVAIL or len(places) == 1:
                    raise
                missing = error
                continue
            self._sockets[family] = sock
            self._buffer_bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            port = sock.getsockname()[1]
        if not self._sockets:
            raise missing or OSError(errno.EADDRNOTAVAIL, "no address to bind to")
        return port

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    async def run(self) -> None:
        """Receives until cancelled."""
        async with trio.open_nursery() as nursery:
            for sock in self._sockets.values():
                nursery.start_soon(self._receive, sock)

    async def _receive(self, sock: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(sock)
            self._drain(sock)

    def drain(self) -> int:
        """Takes what waits in the sockets, at most `DRAIN` packets of each; returns how many those were."""
        return sum([self._drain(sock) for sock in self._sockets.values()])

    def _drain(self, sock: socket.socket) -> int:
        for taken in range(DRAIN):
            try:
                data, source = sock.recvfrom(PACKET_BYTES_MAX + 1)
            except BlockingIOError:
                return taken
            except OSError:
                # What an ICMP message said of a packet of ours; the next call gives the next packet.
                continue
            self._packets_in += 1
            self._bytes_in += len(data)
            self._on_packet(data, Address(source[0], source[1]))
        return DRAIN

    def send(self, packet: bytes, address: Address) -> None:
        """Sends or counts why not; never waits."""
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        sock = self._sockets.get(family)
        if sock is None:
            self._count("no_socket")
            return
        try:
            sock.sendto(packet, address)
        except OSError as error:
            self._count(errno.errorcode.get(error.errno or 0, "unknown"))
            return
        self._packets_out += 1
        self._bytes_out += len(packet)

    def _count(self, name: str) -> None:
        self._send_errors[name] = self._send_errors.get(name, 0) + 1

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()

    def statistics(self) -> UdpStatistics:
        return UdpStatistics(
            packets_in=self._packets_in,
            packets_out=self._packets_out,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            send_errors=dict(self._send_errors),
            receive_buffer_bytes=self._buffer_bytes,
        )


async def _places(host: str) -> list[tuple[socket.AddressFamily, str]]:
    if host in ("::", ""):
        return [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]  # noqa: S104 - what the operator wrote
    found: dict[socket.AddressFamily, str] = {}
    for family, *_, place in await trio.socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
        found.setdefault(family, str(place[0]))
    return list(found.items())


async def own_address(host: str, port: int, towards: Address | None) -> Address:
    """What others can call a node that listens on `host`: for a wildcard the address that leads towards a seed.
    Raises OSError for a host that nobody knows."""
    if host not in _WILDCARDS:
        return Address((await _places(host))[0][1], port)
    target = towards or Address("192.0.2.1", 9)
    family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
    try:
        # Connecting a UDP socket sends nothing: it asks for a route.
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(target)
            return Address(sock.getsockname()[0], port)
    except OSError:
        return Address("127.0.0.1", port)
