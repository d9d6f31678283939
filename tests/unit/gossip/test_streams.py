"""Bounds of what goes over TCP, and that strangers, garbage and slow peers disturb nobody else."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from random import Random

import trio

from gossip.codec import encode
from gossip.exchange import LENGTH, MAGIC, StreamLimits
from gossip.keyring import Keyring
from gossip.messages import Ack, Address, Fact, Join, Part, Ping, Root
from tests.unit.gossip.agents import KEY, host, on_trio, until

QUICK = StreamLimits(
    connect_s=0.5, exchange_s=1.0, write_s=0.3, idle_out_s=0.2, idle_kept_s=0.5, idle_in_s=0.4, exchanges_in=8
)


def frame(packet: bytes) -> bytes:
    return LENGTH.pack(len(packet)) + packet


def sealed(*parts: Part, sender: int = 9, ring: Keyring | None = None) -> bytes:
    ring = ring or Keyring("films", [KEY], random_bytes=Random(sender).randbytes)
    return ring.seal(encode(sender, 1, parts))


@asynccontextmanager
async def tcp(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[Address]:
    """A peer port that does what a test wants."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                await handler(stream)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="0.0.0.0")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield Address("127.0.0.1", listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def ended(sock: socket.socket) -> bool:
    """Whether the other side has closed the connection; waits for it."""
    with trio.move_on_after(3):
        await trio.lowlevel.wait_readable(sock)
        try:
            return not sock.recv(1 << 16)
        except ConnectionResetError:
            return True
    return False


@on_trio
async def test_strangers_cannot_keep_members_out() -> None:
    async with host(1, udp="off") as a, host(2, udp="off", limits=QUICK) as b:
        with ExitStack() as strangers:
            socks = [strangers.enter_context(socket.create_connection(b.address)) for _ in range(30)]
            for sock in socks:
                sock.sendall(MAGIC + b"\x10")
            await until(lambda: b.agent.statistics().streams.accepted == 30)
            assert b.agent.statistics().streams.open_in <= QUICK.exchanges_in
            a.send(b.address, Ping(1, 2, 0))
            await until(lambda: a.machine.parts == [Ack(1)])
            # One byte now and then does not keep a stream open.
            for sock in socks[-8:]:
                assert await ended(sock)
        await until(lambda: b.agent.statistics().streams.open_in <= 1)


@on_trio
async def test_members_beyond_the_bound_are_turned_away() -> None:
    async with host(2, limits=QUICK) as b:
        with ExitStack() as members:
            for n in range(12):
                sock = members.enter_context(socket.create_connection(b.address))
                sock.sendall(MAGIC + frame(sealed(Root(n), sender=n + 10)))
                await trio.sleep(0.01)
            await until(lambda: b.agent.statistics().streams.turned_away == 4)
            assert len(b.machine.packets) == 8


@on_trio
async def test_garbage_ends_its_own_stream_only() -> None:
    async with host(1, udp="off") as a, host(2, udp="off") as b:
        a.send(b.address, Ping(1, 2, 0))
        await until(lambda: a.machine.parts == [Ack(1)])
        for bad in (
            LENGTH.pack(65_537) + b"x" * 100,
            frame(b""),
            frame(b"GET / HTTP/1.1"),
            frame(sealed(Ack(1))[:-1]),
        ):
            with socket.create_connection(b.address) as sock:
                sock.sendall(MAGIC + bad)
                assert await ended(sock)
        assert sum(b.agent.statistics().dropped.values()) == 4
        a.send(b.address, Ping(2, 2, 0))
        await until(lambda: a.machine.parts == [Ack(1), Ack(2)])
        assert a.agent.statistics().streams.opened == 1


@on_trio
async def test_packets_may_come_byte_by_byte() -> None:
    ring = Keyring("films", [KEY], random_bytes=Random(4).randbytes)
    async with host(2) as b:
        with socket.create_connection(b.address) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in MAGIC + frame(sealed(Root(1), ring=ring)) + frame(sealed(Root(2), ring=ring)):
                sock.sendall(bytes((byte,)))
                await trio.lowlevel.checkpoint()
            await until(lambda: b.machine.parts == [Root(1), Root(2)])


@on_trio
async def test_an_exchange_has_so_many_bytes_and_no_more() -> None:
    ring = Keyring("films", [KEY], random_bytes=Random(4).randbytes)
    async with host(2, limits=replace(QUICK, exchange_bytes=200_000)) as b:
        with socket.create_connection(b.address) as sock:
            sock.sendall(MAGIC)
            fact = Fact(9, 1, 1, b"n", bytes(1_000))
            packet = [frame(sealed(*[fact] * 50, ring=ring)) for _ in range(8)]
            try:
                for one in packet:
                    sock.sendall(one)
                    await trio.sleep(0.02)
            except (BrokenPipeError, ConnectionResetError):
                pass
            else:
                assert await ended(sock)
        assert 2 <= len(b.machine.packets) <= 4


@on_trio
async def test_who_does_not_read_is_dropped_and_others_are_served() -> None:
    ring = Keyring("films", [KEY], random_bytes=Random(4).randbytes)
    async with host(1, udp="off") as a, host(2, udp="off", limits=replace(QUICK, idle_in_s=5.0)) as b:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            deaf.connect(b.address)
            deaf.sendall(MAGIC)
            # Each asks for 90 KB.
            deaf.sendall(b"".join(frame(sealed(*[Join()] * 20, ring=ring)) for _ in range(4)))
            await until(lambda: b.machine.packets)
            a.send(b.address, Ping(1, 2, 0))
            await until(lambda: a.machine.parts == [Ack(1)], 0.5)
            await until(lambda: b.agent.statistics().streams.open_in == 1, 3)
        assert b.agent.statistics().streams.refused > 0


@on_trio
async def test_few_exchanges_at_once_and_the_machine_hears_of_the_rest() -> None:
    async def hang(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with host(1, limits=replace(QUICK, exchanges_out=4)) as a, tcp(hang) as busy:
        # One host under many names.
        for n in range(1, 9):
            a.send(Address(f"127.0.0.{n}", busy.port), Ping(1, 0, 0), stream=True)
        stream = a.agent.statistics().streams
        assert (stream.open_out, stream.refused) == (4, 4)
        # Those who took ours and say nothing have not failed: that is for the machine to judge.
        await until(lambda: a.agent.statistics().streams.open_out == 0)
        assert set(a.machine.failures) == {(Address(f"127.0.0.{n}", busy.port), False) for n in range(5, 9)}
        assert a.agent.statistics().streams.opened == 4


@on_trio
async def test_kept_streams_make_room_for_each_other() -> None:
    async with host(1, udp="off", limits=StreamLimits(kept_out=3)) as a:
        async with (
            host(2, udp="off") as b,
            host(3, udp="off") as c,
            host(4, udp="off") as d,
            host(5, udp="off") as e,
        ):
            for turn in range(3):
                for one in (b, c, d, e):
                    a.send(one.address, Ping(turn, 0, 0))
                    await until(lambda one=one, turn=turn: len(one.machine.packets) == turn + 1)
                    await until(lambda: not a.agent._streams.pending)
            stream = a.agent.statistics().streams
            assert stream.open_out == 3
            assert stream.pushed_out == 9
            assert not a.machine.failures


@on_trio
async def test_a_kept_stream_is_used_again_and_replaced_when_it_is_spent() -> None:
    limits = StreamLimits(exchange_bytes=100_000)
    async with host(1, udp="off", limits=limits) as a, host(2, udp="off", limits=limits) as b:
        fact = Fact(1, 1, 1, b"n", bytes(1_000))
        for n in range(150):
            a.send(b.address, fact)
            await until(lambda n=n: len(b.machine.packets) == n + 1)
        assert len(b.machine.parts) == 150
        assert 3 <= a.agent.statistics().streams.opened <= 5


@on_trio
async def test_the_connecting_side_ends_an_exchange() -> None:
    async with host(1, limits=QUICK) as a, host(2) as b:
        a.send(b.address, Ping(1, 0, 0), stream=True)
        await until(lambda: a.machine.parts == [Ack(1)])
        await until(
            lambda: a.agent.statistics().streams.open_out == b.agent.statistics().streams.open_in == 0, 4
        )
        assert a.machine.failures == []


@on_trio
async def test_who_hangs_up_without_a_word_has_failed() -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.receive_some(8)

    async def echo(stream: trio.SocketStream) -> None:
        async for chunk in stream:
            await stream.send_all(chunk)

    async with host(1) as a, tcp(hang_up) as mute, tcp(echo) as parrot:
        a.send(mute, Ping(1, 0, 0), stream=True)
        await until(lambda: a.machine.failures == [(mute, False)])
        a.send(parrot, Ping(1, 0, 0), stream=True)
        await until(lambda: a.agent.statistics().dropped)
        assert a.agent.statistics().dropped == {"not_gossip": 1}


@on_trio
async def test_a_host_that_does_not_answer_fails_in_time() -> None:
    with socket.socket() as full, ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = Address("127.0.0.1", full.getsockname()[1])
        for _ in range(4):  # its backlog is full now: a SYN gets no answer
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(address)
        async with host(1, limits=QUICK) as a:
            began = trio.current_time()
            a.send(address, Ping(1, 0, 0), stream=True)
            await until(lambda: a.machine.failures == [(address, False)])
            assert 0.4 < trio.current_time() - began < 1.5


@on_trio
async def test_an_answer_that_comes_too_late_finds_no_stream() -> None:
    async with host(1, udp="off") as a, host(2, udp="off") as b:
        b.machine.answers = False
        a.send(b.address, Ping(1, 0, 0))
        await until(lambda: b.machine.packets)
        source = b.machine.packets[0].source
        b.send(source, Ack(1))
        await until(lambda: a.machine.parts == [Ack(1)])
        assert [packet.source for packet in a.machine.packets] == [b.address]
    async with host(2) as b:
        b.send(source, Ack(1))
        assert b.agent.statistics().streams.gone == 1


@on_trio
async def test_an_agent_that_does_not_run_serves_nobody() -> None:
    async with host(1) as a:
        agent = a.agent
    ours, theirs = socket.socketpair()
    with ours:
        await agent.serve_stream(trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
        assert ours.recv(1) == b""
