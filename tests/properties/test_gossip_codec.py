"""What is written is read again, and no bytes at all make the decoder do anything but return or raise CodecError."""

from __future__ import annotations

import contextlib
import os
import random
import socket

from hypothesis import given
from hypothesis import strategies as st

from gossip.addresses import address_of, packed_address
from gossip.codec import CLUSTER_BYTES, PARTS_MAX, Kind, encode, size_of, split
from gossip.decoder import decode
from gossip.errors import CodecError
from gossip.messages import (
    Ack,
    Address,
    Buckets,
    Claim,
    Digest,
    Fact,
    Hot,
    Join,
    Part,
    Ping,
    PingReq,
    State,
    Want,
)
from tests.unit.gossip.parts import ADDRESSES, IDS, PARTS, U32

FUZZED = 1_000_000


CLUSTERS = st.just(b"") | st.binary(min_size=CLUSTER_BYTES, max_size=CLUSTER_BYTES)


@given(IDS, U32, st.lists(PARTS, max_size=8), CLUSTERS)
def test_parts_come_back_as_they_were(sender: int, boot: int, parts: list[Part], cluster: bytes) -> None:
    plain = encode(sender, boot, parts, cluster)
    read = decode(plain)
    assert read == (1, 1, sender, boot, tuple(parts), cluster)
    assert [type(part) for part in read.parts] == [type(part) for part in parts]
    assert len(plain) == len(encode(sender, boot, [], cluster)) + sum(size_of(part) for part in parts)


@given(IDS, st.lists(PARTS, min_size=1, max_size=6), st.integers(max(Kind) + 1, 255), st.binary(max_size=300))
def test_unknown_parts_are_skipped(sender: int, parts: list[Part], kind: int, junk: bytes) -> None:
    head = encode(sender, 1, [])
    size = len(junk)
    unknown = bytes((kind, size)) if size < 128 else bytes((kind, size & 127 | 128, size >> 7))
    plain = head + unknown + junk + encode(sender, 1, parts)[len(head) :] + unknown + junk
    assert decode(plain).parts == tuple(parts)


@given(PARTS, st.binary(min_size=1, max_size=40))
def test_bytes_behind_the_known_fields_are_skipped(part: Part, more: bytes) -> None:
    if type(part) in (Fact, Hot, Digest, Want):
        return  # their last field takes the rest
    head = encode(7, 1, [])
    wire = encode(7, 1, [part])[len(head) :]
    start = 2 if wire[1] < 128 else 3
    size = len(wire) - start + len(more)
    length = bytes((size,)) if size < 128 else bytes((size & 127 | 128, size >> 7))
    assert decode(head + wire[:1] + length + wire[start:] + more).parts == (part,)


@given(st.lists(PARTS, max_size=30), st.integers(300, 3_000))
def test_split_keeps_order_and_fits(parts: list[Part], bytes_max: int) -> None:
    packets = list(split(parts, bytes_max))
    assert [part for packet in packets for part in packet] == parts
    for packet in packets:
        assert len(packet) == 1 or sum(map(size_of, packet)) <= bytes_max
        assert len(packet) <= PARTS_MAX


@given(ADDRESSES)
def test_addresses_are_written_as_the_system_writes_them(address: Address) -> None:
    packed = packed_address(address)
    family = socket.AF_INET if packed[0] == 4 else socket.AF_INET6
    assert socket.inet_pton(family, address.host) == packed[1:-2]
    assert address_of(packed) == address


@given(st.binary(max_size=80))
def test_any_bytes(junk: bytes) -> None:
    for plain in (junk, encode(7, 1, []) + junk):
        with contextlib.suppress(CodecError):
            decode(plain)


def _samples(rng: random.Random) -> list[bytes]:
    v4, v6 = Address("10.1.2.3", 7402), Address("2001:db8::1", 7402)

    def id() -> int:
        return rng.getrandbits(64) | 1

    made: list[list[Part]] = [
        [Ping(9, id(), 3), Claim(id(), 3, 1, State.SUSPECT, v4, id())],
        [Ack(9), Claim(id(), 300, 70_000, State.ALIVE, v6, id()), Hot(id(), 3, 1_000, rng.randbytes(20))],
        [PingReq(1, id(), v4), PingReq(2, id(), v6)],
        [Fact(id(), 1, 1 << 31, b"name", b"node-1"), Fact(id(), 1, 2, b"zone", rng.randbytes(200))],
        [Digest(3, tuple((id(), rng.getrandbits(50)) for _ in range(6)))],
        [Want(tuple(id() for _ in range(5))), Join()],
        [Buckets(tuple(rng.getrandbits(32) for _ in range(64)))],
    ]
    clusters = b"", rng.randbytes(CLUSTER_BYTES)
    return [encode(id(), rng.choice((1, 1_000_000)), parts, rng.choice(clusters)) for parts in made]


def test_fuzz() -> None:
    """Random and mutated packets. What is taken can be passed on: it is written and read again, unchanged."""
    seed = int(os.environ.get("SEED", random.SystemRandom().getrandbits(32)))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    samples = _samples(rng)
    taken = dropped = 0
    draw, bits = rng.random, rng.getrandbits
    kinds = len(Kind) + 3
    for turn in range(FUZZED):
        packet = bytearray(samples[turn % len(samples)])
        what = turn % 5
        at = int(draw() * len(packet))
        if what == 0:
            packet[at] = bits(8)
        elif what == 1:
            del packet[at:]
        elif what == 2:
            packet[at:at] = rng.randbytes(1 + bits(2))
        elif what == 3:
            packet[11:] = bytes((int(draw() * kinds), bits(5))) + rng.randbytes(bits(6))
        else:
            packet[at] ^= 1 << bits(2)
            packet[int(draw() * len(packet))] = 255
        try:
            read = decode(bytes(packet))
        except CodecError:
            dropped += 1
            continue
        taken += 1
        if turn % 16 == 0:
            again = decode(encode(read.sender, read.boot, read.parts, read.cluster))
            assert again[2:] == read[2:], f"SEED={seed} turn={turn}"
    # Both ways were gone, often.
    assert min(taken, dropped) > FUZZED // 10
