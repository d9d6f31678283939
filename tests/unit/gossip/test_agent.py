"""The agent's own promises: order of packets and timers, loss, life, keys, events."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import structlog
import trio

from gossip.agent import Agent
from gossip.codec import encode
from gossip.config import GossipConfig
from gossip.effects import Event, Send, Superseded
from gossip.errors import KeyringError
from gossip.exchange import LENGTH, MAGIC
from gossip.keyring import Keyring
from gossip.messages import Ack, Address, Ping, Root
from tests.unit.gossip.agents import KEY, Listener, host, on_trio, until


def packets(count: int, sender: int = 9) -> list[bytes]:
    ring = Keyring("films", [KEY], random_bytes=Random(sender).randbytes)
    return [ring.seal(encode(sender, 1, [Root(n)])) for n in range(count)]


def throw(data: list[bytes], to: Address) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for packet in data:
            sock.sendto(packet, to)


def stall(seconds: float) -> None:
    """What a busy host does to a process, its event loop included."""
    time.sleep(seconds)


@on_trio
async def test_packets_that_wait_come_before_a_timer_that_is_late() -> None:
    async with host(1) as a:
        for _ in range(5):
            a.machine.order.clear()
            a.machine.next_deadline = trio.current_time() + 0.01
            a.agent._apply([])
            # This process stalls: meanwhile answers come, and the deadline passes.
            throw(packets(200, sender=Random().getrandbits(60) | 1), a.address)
            stall(0.15)
            await until(lambda: "timer" in a.machine.order)
            assert a.machine.order == ["packet"] * 200 + ["timer"]


@on_trio
async def test_stream_packets_that_wait_come_before_a_timer_that_is_late() -> None:
    async with host(1, udp="off") as a:
        with socket.create_connection(a.address) as sock:
            sock.sendall(MAGIC)
            await until(lambda: a.agent.statistics().streams.open_in == 1)
            for packet in packets(20):
                a.machine.order.clear()
                a.machine.next_deadline = trio.current_time() + 0.001
                a.agent._apply([])
                sock.sendall(LENGTH.pack(len(packet)) + packet)
                stall(0.12)
                await until(lambda: "timer" in a.machine.order)
                assert a.machine.order == ["packet", "timer"]


@on_trio
async def test_a_timer_that_moves_earlier_is_kept() -> None:
    async with host(1) as a:
        began = trio.current_time()
        a.machine.next_deadline = began + 60
        a.agent._apply([])
        a.machine.next_deadline = began + 0.05
        a.agent._apply([])
        await until(lambda: a.machine.timers)
        assert 0.05 <= a.machine.timers[0] - began < 1


@on_trio
async def test_20_000_packets_a_second_are_all_taken() -> None:
    per_burst, bursts = 200, 100
    async with host(1) as a:
        a.machine.answers = False
        data = packets(per_burst * bursts)

        def blast() -> None:
            began = time.perf_counter()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                for n in range(bursts):
                    for packet in data[n * per_burst : (n + 1) * per_burst]:
                        sock.sendto(packet, a.address)
                    time.sleep(max(0.0, began + (n + 1) * per_burst / 20_000 - time.perf_counter()))

        await trio.to_thread.run_sync(blast)
        await until(lambda: len(a.machine.packets) == len(data))
        assert [part.hash for part in a.machine.parts] == list(range(len(data)))


@on_trio
async def test_a_flood_of_garbage_holds_nobody_up() -> None:
    async with host(1) as a, host(2) as b:
        garbage = [b"g\x01" + bytes(60)] * 3_000
        await trio.to_thread.run_sync(throw, garbage, b.address)
        began = trio.current_time()
        a.send(b.address, Ping(1, 2, 0))
        await until(lambda: a.machine.parts)
        assert trio.current_time() - began < 1
        assert b.agent.statistics().dropped["other_cluster"] == 3_000


@on_trio
async def test_an_oversized_packet_is_told_from_the_largest() -> None:
    async with host(1) as a:
        throw([bytes(1_201), bytes(9_000), b"g" + bytes(1_199)], a.address)
        await until(lambda: sum(a.agent.statistics().dropped.values()) == 3)
        assert a.agent.statistics().dropped == {"too_large": 2, "newer_version": 1}


@on_trio
async def test_what_cannot_be_sent_is_counted_and_raises_nothing() -> None:
    async with host(1) as a:
        a.send(Address("::1", 7402), Ack(1))
        a.send(Address("255.255.255.255", 7402), Ack(1))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            nobody = Address("127.0.0.1", free.getsockname()[1])
        for _ in range(5):
            a.send(nobody, Ack(1))
            await trio.sleep(0.01)
        assert a.agent.statistics().udp.send_errors == {"no_socket": 1, "EACCES": 1}
        throw(packets(1), a.address)
        await until(lambda: a.machine.packets)


@on_trio
async def test_two_families_on_one_port() -> None:
    agent = _agent(listen=Address("::", 0))
    address = await agent.bind()
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        throw(packets(1), Address("127.0.0.1", address.port))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.sendto(packets(1, sender=8)[0], ("::1", address.port))
        machine: Any = agent._machine
        await until(lambda: len(machine.packets) == 2)
        assert {packet.source.host for packet in machine.packets} == {"127.0.0.1", "::1"}
        nursery.cancel_scope.cancel()


def _agent(**more: Any) -> Agent:
    random = Random(1)
    keyring = Keyring("films", [KEY], random_bytes=random.randbytes)
    options: dict[str, Any] = {"listen": Address("127.0.0.1", 0), "machine_factory": Listener} | more
    return Agent(GossipConfig(), id=1, boot=1, keyring=keyring, random=random, **options)


class Fragile(Listener):
    """Fails on what it is told to fail on."""

    def on_packet(self, sender: int, boot: int, source: Address, parts: Any, now: float) -> Any:
        if parts[0] == Root(13):
            raise ZeroDivisionError("a bug")
        return super().on_packet(sender, boot, source, parts, now)


@on_trio
async def test_an_error_in_the_machine_ends_the_run_and_the_next_one_goes_on() -> None:
    agent = _agent(machine_factory=Fragile)
    address = await agent.bind()
    machine: Any = agent._machine
    data = packets(30)
    with pytest.raises(BaseExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(agent.run)
            throw(data[:14], address)
            await trio.sleep(5)
    assert caught.group_contains(ZeroDivisionError)
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        throw(data[14:], address)
        await until(lambda: len(machine.packets) == 29)
        assert agent._machine is machine
        assert len(machine.seeds) == 1, "started once"
        nursery.cancel_scope.cancel()


@on_trio
async def test_events_reach_every_watcher_whatever_one_does() -> None:
    async with host(1) as a:
        seen: list[Event] = []

        def broken(event: Event) -> None:
            raise RuntimeError("a watcher's bug")

        a.agent.watch += [broken, seen.append]
        with structlog.testing.capture_logs() as logs:
            a.agent.set_fact(b"zone", b"z1")
        assert [event.key for event in seen] == [b"zone"]
        assert a.agent.statistics().watch_errors == 1
        assert [line["event"] for line in logs] == ["gossip_watcher_failed"]


@on_trio
async def test_superseded() -> None:
    async with host(1) as a:
        assert not a.agent.superseded.is_set()
        a.agent._apply([Superseded(7)])
        await a.agent.superseded.wait()
        assert a.agent.superseded_by == 7


class Leaver(Listener):
    def leave(self, now: float) -> Any:
        return [Send(self.whom, (Root(4),), stream=True)]

    whom: Address


@on_trio
async def test_leaving_waits_until_it_is_said() -> None:
    async with host(2) as b:
        async with host(1, machine=Leaver) as a:
            a.machine.whom = b.address
            await a.agent.leave()
        await until(lambda: b.machine.parts == [Root(4)])
        # To somebody who does not listen it takes a second at most.
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(1)
            async with host(3, machine=Leaver) as c:
                c.machine.whom = Address("127.0.0.1", deaf.getsockname()[1])
                began = trio.current_time()
                await c.agent.leave()
                assert trio.current_time() - began < 1.2


@on_trio
async def test_a_change_of_keys_is_kept_or_does_not_happen(tmp_path: Path) -> None:
    path = tmp_path / "keyring"
    async with host(1, keys_path=path) as a:
        old = a.agent.list_keys()[0].fingerprint
        new = await a.agent.install_key(b"n" * 32)
        await a.agent.use_key(new)
        assert json.loads(path.read_text())["keys"] == [(b"n" * 32).hex(), KEY.hex()]
        with pytest.raises(KeyringError):
            await a.agent.remove_key(new)
        path.with_name("keyring.new").mkdir()
        with pytest.raises(OSError):
            await a.agent.remove_key(old)
        assert [key.fingerprint for key in a.agent.list_keys()] == [new, old]
        path.with_name("keyring.new").rmdir()
        await a.agent.remove_key(old)
        assert json.loads(path.read_text())["keys"] == [(b"n" * 32).hex()]


@on_trio
async def test_udp_off_opens_no_udp_socket() -> None:
    async with host(1, udp="off") as a:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(a.address)
        assert not a.agent._udp.bound


@on_trio
async def test_where_udp_is_blocked_tcp_takes_over_and_udp_is_tried_again(monkeypatch: Any) -> None:
    monkeypatch.setattr("gossip.paths.SILENT_S", 0.1)
    monkeypatch.setattr("gossip.paths.RETRY_S", 0.4)
    async with host(1) as a, host(2, udp="off") as b:

        async def probe(seq: int) -> None:
            """What the machine does: UDP first, then TCP."""
            a.send(b.address, Ping(seq, 2, 0))
            await trio.sleep(0.03)
            if Ack(seq) not in a.machine.parts:
                a.send(b.address, Ping(seq, 2, 0), stream=True)
                await until(lambda: Ack(seq) in a.machine.parts)

        seq = 0
        while not a.agent.statistics().by_stream:
            seq += 1
            await probe(seq)
            await trio.sleep(0.03)
        assert 3 <= seq <= 6
        udp_before = a.agent.statistics().udp.packets_out
        await probe(100)
        assert a.agent.statistics().udp.packets_out == udp_before
        await trio.sleep(0.5)
        a.send(b.address, Ping(101, 2, 0))
        assert a.agent.statistics().udp.packets_out == udp_before + 1, "UDP has a new chance"


@on_trio
async def test_packets_of_another_cluster_of_our_name_and_key_are_not_taken_and_both_ends_say_so() -> None:
    async with host(1) as a, host(2) as b:
        b.agent.cluster.be_of("1e" * 16)
        b.send(a.address, Ping(1, 1, 0))
        await until(lambda: a.machine.parts)  # who knows of no cluster yet takes whom it hears
        a.agent.cluster.be_of("0f" * 16)
        before = len(a.machine.packets), len(b.machine.packets)
        for _ in range(3):
            b.send(a.address, Ping(1, 1, 0))
        b.send(a.address, Ping(1, 1, 0), stream=True)
        await until(lambda: a.agent.statistics().dropped.get("other_cluster_id") == 4)
        await until(lambda: b.agent.statistics().dropped.get("other_cluster_id"))
        assert (len(a.machine.packets), len(b.machine.packets)) == before
        assert str(b.address) in a.agent.cluster.strangers(trio.current_time())
        assert str(a.address) in b.agent.cluster.strangers(trio.current_time())
        # An answer is not answered.
        await trio.sleep(0.1)
        assert b.agent.statistics().dropped["other_cluster_id"] <= 4
        assert a.agent.statistics().dropped["other_cluster_id"] == 4
        b.agent.cluster.be_of("0f" * 16)
        b.send(a.address, Ping(1, 1, 0))
        await until(lambda: len(a.machine.packets) > before[0])
