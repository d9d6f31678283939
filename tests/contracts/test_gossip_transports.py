"""What an agent promises of packets, over each way that they can go: UDP and TCP, IPv4 and IPv6."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import structlog
import trio

from gossip.codec import encode
from gossip.exchange import LENGTH, MAGIC
from gossip.keyring import Keyring
from gossip.messages import Ack, Address, Claim, Fact, Join, Ping, Root, State
from tests.unit.gossip.agents import KEY, Host, host, on_trio, until


@dataclass(frozen=True)
class Way:
    listen: str
    udp: str

    def host(self, id: int, **more: Any) -> Any:
        return host(id, listen=self.listen, udp=self.udp, **more)

    @asynccontextmanager
    async def pair(self, **more: Any) -> AsyncIterator[tuple[Host, Host]]:
        async with self.host(1, **more) as a, self.host(2, **more) as b:
            yield a, b

    async def throw(self, to: Address, packet: bytes) -> None:
        """Bytes of anybody's, as one packet."""
        if self.udp == "on":
            family = socket.AF_INET6 if ":" in to.host else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.sendto(packet, to)
            return
        async with await trio.open_tcp_stream(to.host, to.port) as stream:
            await stream.send_all(MAGIC + LENGTH.pack(len(packet)) + packet)
            # Closing at once would take the bytes along.
            with trio.move_on_after(0.3):
                await stream.receive_some(1)


WAYS = [
    pytest.param(Way("127.0.0.1", "on"), id="udp4"),
    pytest.param(Way("::1", "on"), id="udp6"),
    pytest.param(Way("127.0.0.1", "off"), id="tcp4"),
    pytest.param(Way("::1", "off"), id="tcp6"),
]
every_way = pytest.mark.parametrize("way", WAYS)


def keyring(cluster: str = "films", key: bytes = KEY, seed: int = 99) -> Keyring:
    return Keyring(cluster, [key], random_bytes=random.Random(seed).randbytes)


@every_way
@on_trio
async def test_a_ping_is_answered_where_it_came_from(way: Way) -> None:
    async with way.pair() as (a, b):
        for seq in range(20):
            a.send(b.address, Ping(seq, 2, 7), Claim(1, 1, 0, State.ALIVE, a.address, 1))
        await until(lambda: len(a.machine.parts) == 20)
        assert {part.seq for part in a.machine.parts} == set(range(20))
        assert {packet.sender for packet in b.machine.packets} == {1}
        assert {packet.sender for packet in a.machine.packets} == {2}
        # The answer comes from the address that was called, or the machine would not know whose it is.
        assert {packet.source for packet in a.machine.packets} == {b.address}
        assert not a.agent.statistics().dropped | b.agent.statistics().dropped


@every_way
@on_trio
async def test_both_speak_at_once(way: Way) -> None:
    async with way.pair() as (a, b):
        for seq in range(50):
            a.send(b.address, Ping(seq, 2, 7))
            b.send(a.address, Ping(seq + 100, 1, 7))
        for one, mine in ((a, range(50)), (b, range(100, 150))):
            await until(lambda one=one: sum(type(part) is Ack for part in one.machine.parts) == 50)
            assert {part.seq for part in one.machine.parts if type(part) is Ack} == set(mine)


@every_way
@on_trio
async def test_a_large_answer_comes_whole_and_in_order(way: Way) -> None:
    async with way.pair() as (a, b):
        a.send(b.address, Join(), stream=True)
        await until(lambda: len(a.machine.parts) == 100)
        assert [part.counter for part in a.machine.parts] == list(range(100))
        assert len(a.machine.packets) == 2, "90 KB are two packets of 64 KiB"
        assert {packet.source for packet in a.machine.packets} == {b.address}


Break = Callable[[Keyring, bytes], bytes]


def _old_boot(keyring: Keyring, packet: bytes) -> bytes:
    return keyring.seal(encode(9, 1, [Ack(1)]))


BROKEN: list[Any] = [
    pytest.param("forged", lambda ring, packet: packet[:-1] + bytes((packet[-1] ^ 1,)), id="forged"),
    pytest.param("forged", lambda ring, packet: packet[:-3], id="truncated"),
    pytest.param("not_gossip", lambda ring, packet: packet[:20], id="cut short"),
    pytest.param("not_gossip", lambda ring, packet: b"GET / HTTP/1.1\r\n\r\n", id="not gossip"),
    pytest.param("replayed", lambda ring, packet: packet, id="replayed"),
    pytest.param("old_boot", _old_boot, id="old boot"),
    pytest.param("newer_version", lambda ring, packet: b"g\x02" + packet[2:], id="major version"),
    pytest.param(
        "newer_version", lambda ring, packet: ring.seal(b"\x02\x03" + encode(9, 2, [])[2:]), id="range"
    ),
    pytest.param(
        "other_cluster",
        lambda ring, packet: keyring("other").seal(encode(9, 2, [Ack(1)])),
        id="other cluster",
    ),
    pytest.param(
        "unknown_key",
        lambda ring, packet: keyring(key=b"x" * 32).seal(encode(9, 2, [Ack(1)])),
        id="other key",
    ),
    pytest.param(
        "malformed", lambda ring, packet: ring.seal(encode(9, 2, []) + b"\x02\x01x"), id="malformed"
    ),
]


@every_way
@pytest.mark.parametrize(("reason", "broken"), BROKEN)
@on_trio
async def test_what_is_not_for_us_is_dropped_counted_and_logged_once(
    way: Way, reason: str, broken: Break
) -> None:
    ring = keyring()
    with structlog.testing.capture_logs() as logs:
        async with way.pair() as (a, b):
            good = ring.seal(encode(9, 2, [Ack(1)]))
            await way.throw(b.address, good)
            await until(lambda: b.machine.packets)
            bad = broken(ring, good)
            for _ in range(3):
                await way.throw(b.address, bad)
            await until(lambda: b.agent.statistics().dropped)
            await until(lambda: sum(b.agent.statistics().dropped.values()) == 3)
            seen = b.agent.statistics().dropped
            assert seen == {reason: 3}
            assert len(b.machine.packets) == 1
            # Nobody else is disturbed.
            a.send(b.address, Ping(5, 2, 0))
            await until(lambda: a.machine.parts == [Ack(5)])
    assert [line["reason"] for line in logs if line["event"] == "gossip_dropped"] == [reason]


@every_way
@on_trio
async def test_two_clusters_on_one_network_never_mix(way: Way) -> None:
    """By key, and by the cluster's id alone."""
    async with way.host(1) as a, way.host(2, keys=[b"x" * 32]) as b, way.host(3, cluster="books") as c:
        for one in (b, c):
            for other in (a, b, c):
                if one is not other:
                    one.send(other.address, Ping(1, 0, 0))
                    other.send(one.address, Ping(1, 0, 0))
        await until(lambda: all(sum(one.agent.statistics().dropped.values()) >= 2 for one in (a, b, c)))
        assert not any(one.machine.packets for one in (a, b, c))


@every_way
@on_trio
async def test_a_rotation_under_load_loses_nothing(way: Way) -> None:
    async with way.pair() as (a, b):
        sent = 0

        async def some() -> None:
            nonlocal sent
            for _ in range(20):
                a.send(b.address, Root(sent))
                sent += 1
                await trio.sleep(0.001)

        await some()
        old = a.agent.list_keys()[0].fingerprint
        for one in (a, b):
            new = await one.agent.install_key(b"n" * 32)
            await some()
        for one in (a, b):
            await one.agent.use_key(new)
            await some()
        # What is on its way is sealed with the old key.
        await until(lambda: len(b.machine.parts) == sent)
        for one in (a, b):
            await one.agent.remove_key(old)
            await some()
        await until(lambda: len(b.machine.parts) == sent)
        assert sorted(part.hash for part in b.machine.parts) == list(range(sent))
        assert not b.agent.statistics().dropped


@every_way
@on_trio
async def test_facts_of_any_size_pass(way: Way) -> None:
    async with way.pair() as (a, b):
        facts = [Fact(1, 1, n, bytes(64), bytes(n)) for n in (0, 1, 100, 1_000)]
        for fact in facts:
            a.send(b.address, fact)
        await until(lambda: len(b.machine.parts) == len(facts))
        assert set(b.machine.parts) == set(facts)
        assert a.agent.statistics().oversized == 0


@every_way
@on_trio
async def test_a_host_that_refuses_is_told_from_one_that_is_silent(way: Way) -> None:
    async with way.host(1) as a:
        with socket.socket(socket.AF_INET6 if ":" in way.listen else socket.AF_INET) as free:
            free.bind((way.listen, 0))
            nobody = Address(way.listen, free.getsockname()[1])
            a.send(nobody, Ping(1, 0, 0), stream=True)
            await until(lambda: a.machine.failures)
            assert a.machine.failures == [(nobody, True)]
