"""Parts of a packet → bytes, as laid out in docs/gossip.md, and how many bytes that will be. Pure.

Takes what the machine made: a number out of range here is our own bug (`struct.error`, `AssertionError`). Reading is in
gossip/decoder.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

from gossip.addresses import packed_address
from gossip.config import (
    COUNTER_MAX,
    FACT_KEY_BYTES_MAX,
    FACT_VALUE_BYTES_MAX,
    HOT_BYTES_MAX,
    INCARNATION_MAX,
    PACKET_BYTES_MAX,
)
from gossip.messages import (
    Ack,
    Buckets,
    Claim,
    Digest,
    Fact,
    Hot,
    Join,
    Nack,
    Part,
    Ping,
    PingReq,
    Root,
    Want,
)

GOSSIP_VERSION = 1
BUCKETS = 64
# Envelope and tag (gossip/keyring.py).
SEAL_BYTES = 19 + 16
# Of the cluster's random id so much travels, in every packet: enough to tell two clusters of one name and key apart.
CLUSTER_BYTES = 4
CLUSTER_PART_BYTES = 2 + CLUSTER_BYTES
# Versions, sender, the longest boot, and the part that says which cluster this is.
_HEAD_BYTES_MAX = 2 + 8 + 5 + CLUSTER_PART_BYTES
# What `size_of` of the parts of one UDP packet may sum up to.
PARTS_BYTES_MAX = PACKET_BYTES_MAX - SEAL_BYTES - _HEAD_BYTES_MAX
# The same for one packet on a stream.
STREAM_PACKET_BYTES_MAX = 64 << 10
STREAM_PARTS_BYTES_MAX = STREAM_PACKET_BYTES_MAX - SEAL_BYTES - _HEAD_BYTES_MAX
PARTS_MAX = 2_048
U32 = 1 << 32
U64 = 1 << 64

HEAD = struct.Struct("<BBQ")
ID = struct.Struct("<Q")
RELAYED = struct.Struct("<IQ")
HASHES = struct.Struct(f"<{BUCKETS}I")
_PING = struct.Struct("<BBIQI")
_SEQ = struct.Struct("<BBI")
_ID_PART = struct.Struct("<BBQ")
# A claim with a boot and an incarnation below 128 and an IPv4 address: nearly all of them.
_CLAIM_SHORT = struct.Struct("<BBQBBB7sQ")


class Kind(IntEnum):
    """The first byte of a part. A number is never given a second meaning."""

    PING = 1
    ACK = 2
    PING_REQ = 3
    NACK = 4
    CLAIM = 5
    FACT = 6
    HOT = 7
    ROOT = 8
    BUCKETS = 9
    DIGEST = 10
    WANT = 11
    JOIN = 12
    CLUSTER = 13


def _varint_size(value: int) -> int:
    return (value.bit_length() + 6) // 7 or 1


def _framed(size: int) -> int:
    """A part's bytes, for a size of its fields."""
    return 1 + _varint_size(size) + size


def _claim_size(part: Claim) -> int:
    size = 26 if ":" not in part.address.host else 38
    if part.boot > 127:
        size += _varint_size(part.boot) - 1
    if part.incarnation > 127:
        size += _varint_size(part.incarnation) - 1
    return size + 2


def _fact_size(part: Fact) -> int:
    size = 9 + _varint_size(part.boot) + _varint_size(part.counter) + len(part.key) + len(part.value)
    return size + (2 if size < 128 else 3)


def _hot_size(part: Hot) -> int:
    size = 8 + _varint_size(part.boot) + _varint_size(part.counter) + len(part.value)
    return size + (2 if size < 128 else 3)


def _digest_size(part: Digest) -> int:
    return _framed(8 + 8 * len(part.items) + sum([_varint_size(version) for _, version in part.items]))


_SIZES: dict[type, Callable[[Any], int]] = {
    PingReq: lambda part: 21 if ":" not in part.address.host else 33,
    Claim: _claim_size,
    Fact: _fact_size,
    Hot: _hot_size,
    Digest: _digest_size,
    Want: lambda part: _framed(8 * len(part.items)),
}
_FIXED_SIZES: dict[type, int] = {
    Ping: 18,
    Ack: 6,
    Nack: 6,
    Root: 10,
    Buckets: _framed(4 * BUCKETS),
    Join: 2,
}


def size_of(part: Part) -> int:
    """The bytes that `part` adds to a packet: kind and length included."""
    kind = type(part)
    return _FIXED_SIZES.get(kind) or _SIZES[kind](part)


def _varint(value: int) -> bytes:
    if 0 <= value < 128:
        return bytes((value,))
    assert 0 <= value < U64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _part(kind: int, fields: bytes) -> bytes:
    size = len(fields)
    return (bytes((kind, size)) if size < 128 else bytes((kind,)) + _varint(size)) + fields


def _put_claim(part: Claim) -> bytes:
    id, boot, incarnation, state, address, by = part
    packed = packed_address(address)
    if boot < 128 and incarnation < 128 and len(packed) == 7:
        return _CLAIM_SHORT.pack(Kind.CLAIM, 26, id, boot, incarnation, state, packed, by)
    assert boot < U32
    assert incarnation <= INCARNATION_MAX
    return _part(
        Kind.CLAIM,
        ID.pack(id) + _varint(boot) + _varint(incarnation) + bytes((state,)) + packed + ID.pack(by),
    )


def _put_fact(part: Fact) -> bytes:
    origin, boot, counter, key, value = part
    assert boot < U32
    assert counter <= COUNTER_MAX
    assert len(key) <= FACT_KEY_BYTES_MAX
    assert len(value) <= FACT_VALUE_BYTES_MAX
    return _part(
        Kind.FACT, ID.pack(origin) + _varint(boot) + _varint(counter) + bytes((len(key),)) + key + value
    )


def _put_hot(part: Hot) -> bytes:
    origin, boot, counter, value = part
    assert boot < U32
    assert counter <= COUNTER_MAX
    assert len(value) <= HOT_BYTES_MAX
    return _part(Kind.HOT, ID.pack(origin) + _varint(boot) + _varint(counter) + value)


def _put_ping_req(part: PingReq) -> bytes:
    return _part(Kind.PING_REQ, RELAYED.pack(part.seq, part.target) + packed_address(part.address))


def _put_digest(part: Digest) -> bytes:
    pack = ID.pack
    items = [pack(item) + _varint(version) for item, version in part.items]
    return _part(Kind.DIGEST, pack(part.mask) + b"".join(items))


_WRITERS: dict[type, Callable[[Any], bytes]] = {
    Ping: lambda part: _PING.pack(Kind.PING, 16, *part),
    Ack: lambda part: _SEQ.pack(Kind.ACK, 4, part.seq),
    PingReq: _put_ping_req,
    Nack: lambda part: _SEQ.pack(Kind.NACK, 4, part.seq),
    Claim: _put_claim,
    Fact: _put_fact,
    Hot: _put_hot,
    Root: lambda part: _ID_PART.pack(Kind.ROOT, 8, part.hash),
    Buckets: lambda part: _part(Kind.BUCKETS, HASHES.pack(*part.hashes)),
    Digest: _put_digest,
    Want: lambda part: _part(Kind.WANT, struct.pack(f"<{len(part.items)}Q", *part.items)),
    Join: lambda part: bytes((Kind.JOIN, 0)),
}


def encode(sender: int, boot: int, parts: Sequence[Part], cluster: bytes = b"") -> bytes:
    """What gets sealed: versions, who speaks, of which cluster (CLUSTER_BYTES of its random id; empty: not known), the parts."""
    assert boot < U32
    assert len(parts) <= PARTS_MAX
    out = [HEAD.pack(GOSSIP_VERSION, GOSSIP_VERSION, sender), _varint(boot)]
    if cluster:
        assert len(cluster) == CLUSTER_BYTES
        out.append(_part(Kind.CLUSTER, cluster))
    out += [_WRITERS[type(part)](part) for part in parts]
    return b"".join(out)


def split(parts: Sequence[Part], bytes_max: int) -> Iterator[tuple[Part, ...]]:
    """The parts in their order, in as few packets as they need. One that fits into none comes alone, and too large."""
    batch: list[Part] = []
    room = bytes_max
    for part in parts:
        size = size_of(part)
        if batch and (size > room or len(batch) == PARTS_MAX):
            yield tuple(batch)
            batch, room = [], bytes_max
        batch.append(part)
        room -= size
    if batch:
        yield tuple(batch)
