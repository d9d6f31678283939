"""What a gossip packet costs on its way through codec and keyring. `python -m bench.gossip_wire [--quick]`

The packet is a usual one: an ack with six claims, two facts and two hot vectors on its back, about 420 bytes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from random import Random
from typing import Any

import msgpack
import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.harness import arguments, figure, interleaved
from gossip.agent import Agent
from gossip.codec import encode, size_of
from gossip.config import GossipConfig
from gossip.decoder import decode
from gossip.keyring import Keyring
from gossip.messages import Ack, Address, Claim, Fact, Hot, Part, Ping, State
from gossip.replays import Replays
from gossip.udp import DRAIN

RUNS = 7


def us(work: Callable[[], Any], count: int) -> Callable[[], float]:
    """Measures microseconds of CPU per call: others may use this machine meanwhile."""

    def measure() -> float:
        began = time.process_time()
        for _ in range(count):
            work()
        return (time.process_time() - began) / count * 1e6

    return measure


def usual_parts() -> tuple[Part, ...]:
    ids = [int.from_bytes(os.urandom(8), "little") | 1 for _ in range(10)]
    claims = [
        Claim(id, 3, n, State(n % 3), Address(f"10.0.0.{n}", 7402), ids[0]) for n, id in enumerate(ids[:6])
    ]
    facts = [Fact(id, 3, 400, b"zone", b"eu-west-1a") for id in ids[6:8]]
    hots = [Hot(id, 3, 90_000, os.urandom(60)) for id in ids[8:]]
    return (Ack(77), *claims, *facts, *hots)


def codec(count: int) -> bytes:
    parts = usual_parts()
    plain = encode(5, 3, parts)
    packed: bytes = msgpack.packb(parts)
    target = "none: the peer is C and checks nothing; see the figure per part"
    for name, ours, peer in (
        ("encode", us(lambda: encode(5, 3, parts), count), us(lambda: msgpack.packb(parts), count)),
        ("decode", us(lambda: decode(plain), count), us(lambda: msgpack.unpackb(packed), count)),
    ):
        value, other = interleaved(ours, peer, RUNS)
        peer_name = f"msgpack, {len(packed)} bytes; ours {len(plain)}"
        figure(f"gossip.{name}_us", value, "us CPU", peer=peer_name, peer_value=other, target=target, n=count)
        figure(
            f"gossip.{name}_part_us",
            value / len(parts),
            "us CPU",
            peer=None,
            peer_value=None,
            target="at most 2",
            n=count,
        )
    sized, _ = interleaved(us(lambda: [size_of(part) for part in parts], count), lambda: 0.0, RUNS)
    figure(
        "gossip.size_of_us",
        sized / len(parts),
        "us CPU",
        peer=None,
        peer_value=None,
        target="at most 0.5",
        n=count,
    )
    return plain


def sealing(plain: bytes, count: int) -> None:
    keyring = Keyring("bench", [os.urandom(32)], random_bytes=os.urandom)
    aead, nonce, header = AESGCM(os.urandom(32)), bytes(12), bytes(19)
    sealed, packet = aead.encrypt(nonce, plain, header), keyring.seal(plain)
    for name, ours, peer in (
        ("seal", lambda: keyring.seal(plain), lambda: aead.encrypt(nonce, plain, header)),
        ("open", lambda: keyring.open(packet), lambda: aead.decrypt(nonce, sealed, header)),
    ):
        value, other = interleaved(us(ours, count), us(peer, count), RUNS)
        figure(
            f"gossip.{name}_us",
            value,
            "us CPU",
            peer="AESGCM alone",
            peer_value=other,
            target="at most 3 us",
            n=count,
        )
    replays, counters = Replays(100), iter(range(1 << 60))
    checked, _ = interleaved(us(lambda: replays.check(1, 1, 1, next(counters)), count), lambda: 0.0, RUNS)
    figure("gossip.replay_us", checked, "us CPU", peer=None, peer_value=None, target="at most 1", n=count)


async def agent(count: int) -> None:
    """A packet's whole way: from the socket through the machine, and what a ping's answer adds to that."""
    random = Random(1)
    secret = random.randbytes(32)

    def ring() -> Keyring:
        return Keyring("bench", [secret], random_bytes=os.urandom)

    here = Agent(GossipConfig(), id=1, boot=1, keyring=ring(), listen=Address("127.0.0.1", 0), random=random)
    address = await here.bind()
    theirs = ring()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(type=socket.SOCK_DGRAM) as bare,
    ):
        sock.bind(("127.0.0.1", 0))
        bare.bind(("127.0.0.1", 0))
        for name, parts in (("usual", usual_parts()), ("ping", (Ping(1, 1, 0),))):
            spent = alone = 0.0
            for _ in range(count // DRAIN):
                # As many as a socket's buffer holds, so that only the receiving is measured.
                for _ in range(DRAIN):
                    packet = theirs.seal(encode(5, 3, parts))
                    sock.sendto(packet, address)
                    sock.sendto(packet, bare.getsockname())
                began = time.process_time()
                here._udp.drain()
                middle = time.process_time()
                for _ in range(DRAIN):
                    bare.recvfrom(1_201)
                spent, alone = spent + middle - began, alone + time.process_time() - middle
            assert here.statistics().udp.packets_in % DRAIN == 0
            done = count // DRAIN * DRAIN
            figure(
                f"gossip.receive_{name}_us",
                spent / done * 1e6,
                "us CPU",
                peer="recvfrom alone",
                peer_value=alone / done * 1e6,
                target="at most 100",
                n=done,
            )
        assert not here.statistics().dropped


if __name__ == "__main__":
    rounds = 2_000 if arguments("Cost of a gossip packet.").quick else 20_000
    sealing(codec(rounds), rounds)
    trio.run(agent, rounds)
