"""Seeds by name, which members go over TCP, and how often a drop is logged."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import structlog
import trio

from gossip import paths
from gossip.drops import LOG_EVERY_S, Drops
from gossip.messages import Address
from gossip.paths import Paths
from gossip.seeds import Seed, Seeds
from tests.unit.gossip.agents import on_trio

A, B, C = (Address("10.0.0.1", n) for n in (1, 2, 3))


@pytest.mark.parametrize(
    "text",
    ["", "node", ":7402", "node:", "node:0", "node:65536", "node:x", "::1:7402", "[::1:7402", "node:٣"],
)
def test_what_is_no_seed(text: str) -> None:
    with pytest.raises(ValueError, match="seed"):
        Seed.parse(text)


def test_addresses_need_no_looking_up() -> None:
    seeds = Seeds(["10.0.0.1:7402", "[2001:DB8:0::1]:7402", "10.0.0.1:7402", "[::ffff:10.0.0.2]:1"])
    assert not seeds.has_names
    assert seeds.addresses == [
        Address("10.0.0.1", 7402),
        Address("2001:db8::1", 7402),
        Address("10.0.0.2", 1),
    ]


class Resolver(trio.abc.HostnameResolver):
    def __init__(self) -> None:
        self.known: dict[str, list[str]] = {}

    async def getaddrinfo(self, host: Any, port: Any, *_: Any) -> Any:
        name = host.decode()
        if name == "hangs":
            await trio.sleep_forever()
        if name not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (ip, port)) for ip in self.known[name]]

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


@on_trio
async def test_names_are_looked_up_again_and_what_was_found_stays(monkeypatch: Any) -> None:
    monkeypatch.setattr("gossip.seeds.RESOLVE_S", 0.05)
    resolver = Resolver()
    trio.socket.set_custom_hostname_resolver(resolver)
    seeds = Seeds(["a:1", "hangs:1", "10.0.0.9:1"])
    assert seeds.has_names
    assert await seeds.resolve() == [Address("10.0.0.9", 1)]
    resolver.known["a"] = ["10.0.0.1", "10.0.0.2"]
    assert await seeds.resolve() == [Address("10.0.0.1", 1), Address("10.0.0.2", 1), Address("10.0.0.9", 1)]
    del resolver.known["a"]
    assert len(await seeds.resolve()) == 3
    resolver.known["a"] = ["10.0.0.3"]
    assert await seeds.resolve() == [Address("10.0.0.3", 1), Address("10.0.0.9", 1)]


def test_three_stream_acks_over_three_seconds_and_it_is_tcp_for_a_minute() -> None:
    ways = Paths("auto", 8)
    assert not ways.on_stream_ack(A, 0.0)
    assert not ways.on_stream_ack(A, 1.0)
    assert not ways.on_stream_ack(A, 2.0), "not for long enough"
    assert not ways.by_stream(A, 2.0)
    assert ways.on_stream_ack(A, 3.0)
    assert ways.by_stream(A, 3.0)
    assert not ways.by_stream(B, 3.0)
    assert ways.blocked(3.0) == [A]
    assert ways.by_stream(A, 62.9)
    assert not ways.by_stream(A, 63.0)
    assert not ways, "a new chance, with a clean slate"


def test_one_udp_ack_ends_the_doubt() -> None:
    ways = Paths("auto", 8)
    for now in (0.0, 1.0):
        ways.on_stream_ack(A, now)
    ways.on_udp_ack(A)
    assert not ways
    assert not ways.on_stream_ack(A, 9.0)
    for now in (10.0, 11.0, 12.0):
        ways.on_stream_ack(A, now)
    assert ways.by_stream(A, 12.0)
    ways.on_udp_ack(A)
    assert not ways.by_stream(A, 12.0)


def test_fixed_ways_and_a_bounded_table() -> None:
    assert Paths("off", 8).by_stream(A, 0.0)
    fixed = Paths("on", 8)
    for now in range(10):
        fixed.on_stream_ack(A, float(now))
    assert not fixed.by_stream(A, 10.0)
    ways = Paths("auto", 2)
    for address in (A, B, C):
        for now in range(paths.ACKS + 1):
            ways.on_stream_ack(address, float(now))
    assert ways.blocked(4.0) == [B, C]


def test_a_reason_is_logged_once_a_minute_with_what_was_held_back() -> None:
    drops = Drops()
    with structlog.testing.capture_logs() as logs:
        for n in range(10):
            drops.count("forged", A, n * 0.1)
        drops.count("malformed", A, 0.5)
        drops.count("forged", B, LOG_EVERY_S + 1)
    assert drops.counts == {"forged": 11, "malformed": 1}
    assert [(line["reason"], line["since_last"]) for line in logs] == [
        ("forged", 1),
        ("malformed", 1),
        ("forged", 10),
    ]
