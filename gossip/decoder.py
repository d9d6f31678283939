"""Bytes of an opened packet → its parts; the layout is in docs/gossip.md. Pure.

Raises nothing but `CodecError`, whatever the bytes. Every length is checked before it is believed; every number is in the
range that gossip/codec.py can write, so what was read can always be passed on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from gossip.addresses import address_of
from gossip.codec import (
    BUCKETS,
    CLUSTER_BYTES,
    GOSSIP_VERSION,
    HASHES,
    HEAD,
    ID,
    PARTS_MAX,
    RELAYED,
    STREAM_PACKET_BYTES_MAX,
    U32,
    U64,
    Kind,
)
from gossip.config import (
    COUNTER_MAX,
    FACT_KEY_BYTES_MAX,
    FACT_VALUE_BYTES_MAX,
    HOT_BYTES_MAX,
    INCARNATION_MAX,
)
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
    Nack,
    Part,
    Ping,
    PingReq,
    Root,
    State,
    Want,
)

_PING = struct.Struct("<IQI")
_SEQ = struct.Struct("<I")
# A claim with a boot and an incarnation below 128 and an IPv4 address: nearly all of them.
_CLAIM_SHORT = struct.Struct("<QBBBB4sHQ")
_STATES = tuple(State)
# Half the price of calling the class, for fields that are known to be right.
_new = tuple.__new__


class Decoded(NamedTuple):
    """cluster: CLUSTER_BYTES of its random id; empty when the sender knows of none, or says nothing of it."""

    version_min: int
    version_max: int
    sender: int
    boot: int
    parts: tuple[Part, ...]
    cluster: bytes = b""


# Each reader gets the packet, and where the part's fields begin and end in it.


def _varint(data: bytes, at: int, end: int, bound: int) -> tuple[int, int]:
    """(value, where the next field begins)."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        if byte < 128:
            value |= byte << shift
            if value < bound:
                return value, at
            break
        value |= (byte & 127) << shift
        shift += 7
        if shift == 70:
            break  # ten bytes hold 64 bits; a longer one is made to waste our time
    raise CodecError("malformed")


def _address(data: bytes, at: int, end: int) -> tuple[Address, int]:
    family = data[at] if at < end else 0
    if family == 4:
        stop = at + 7
    elif family == 6:
        stop = at + 19
    else:
        raise CodecError("malformed")
    if stop > end or (address := address_of(data[at:stop])) is None:
        raise CodecError("malformed")
    return address, stop


def _get_ping(data: bytes, at: int, end: int) -> Ping:
    if end - at < 16:
        raise CodecError("malformed")
    return _new(Ping, _PING.unpack_from(data, at))


def _get_ack(data: bytes, at: int, end: int) -> Ack:
    if end - at < 4:
        raise CodecError("malformed")
    return _new(Ack, _SEQ.unpack_from(data, at))


def _get_nack(data: bytes, at: int, end: int) -> Nack:
    if end - at < 4:
        raise CodecError("malformed")
    return _new(Nack, _SEQ.unpack_from(data, at))


def _get_ping_req(data: bytes, at: int, end: int) -> PingReq:
    if end - at < 12:
        raise CodecError("malformed")
    seq, target = RELAYED.unpack_from(data, at)
    return PingReq(seq, target, _address(data, at + 12, end)[0])


def _get_claim(data: bytes, at: int, end: int) -> Claim:
    if end - at >= 26 and data[at + 8] < 128 and data[at + 9] < 128 and data[at + 11] == 4:
        id, boot, incarnation, state, _, _, _, by = _CLAIM_SHORT.unpack_from(data, at)
        address = address_of(data[at + 11 : at + 18])
    else:
        if end - at < 26:
            raise CodecError("malformed")
        (id,) = ID.unpack_from(data, at)
        boot, at = _varint(data, at + 8, end, U32)
        incarnation, at = _varint(data, at, end, INCARNATION_MAX + 1)
        state = data[at] if at < end else 255
        address, at = _address(data, at + 1, end)
        if end - at < 8:
            raise CodecError("malformed")
        (by,) = ID.unpack_from(data, at)
    if address is None or state >= len(_STATES) or not id:
        raise CodecError("malformed")
    return _new(Claim, (id, boot, incarnation, _STATES[state], address, by))


def _version(data: bytes, at: int, end: int) -> tuple[int, int, int, int]:
    """(origin, boot, counter, where the next field begins): how facts of both kinds begin."""
    if end - at < 10:
        raise CodecError("malformed")
    (origin,) = ID.unpack_from(data, at)
    if not origin:
        raise CodecError("malformed")
    boot, counter = data[at + 8], data[at + 9]
    if boot < 128 and counter < 128:
        return origin, boot, counter, at + 10
    boot, at = _varint(data, at + 8, end, U32)
    counter, at = _varint(data, at, end, COUNTER_MAX + 1)
    return origin, boot, counter, at


def _get_fact(data: bytes, at: int, end: int) -> Fact:
    origin, boot, counter, at = _version(data, at, end)
    middle = at + 1 + data[at] if at < end else end + 1
    if middle > end or middle - at - 1 > FACT_KEY_BYTES_MAX or end - middle > FACT_VALUE_BYTES_MAX:
        raise CodecError("malformed")
    return _new(Fact, (origin, boot, counter, data[at + 1 : middle], data[middle:end]))


def _get_hot(data: bytes, at: int, end: int) -> Hot:
    origin, boot, counter, at = _version(data, at, end)
    if end - at > HOT_BYTES_MAX:
        raise CodecError("malformed")
    return _new(Hot, (origin, boot, counter, data[at:end]))


def _get_root(data: bytes, at: int, end: int) -> Root:
    if end - at < 8:
        raise CodecError("malformed")
    return _new(Root, ID.unpack_from(data, at))


def _get_buckets(data: bytes, at: int, end: int) -> Buckets:
    if end - at < 4 * BUCKETS:
        raise CodecError("malformed")
    return Buckets(HASHES.unpack_from(data, at))


def _get_digest(data: bytes, at: int, end: int) -> Digest:
    if end - at < 8:
        raise CodecError("malformed")
    (mask,) = ID.unpack_from(data, at)
    at += 8
    items = []
    while at < end:
        if end - at < 9:
            raise CodecError("malformed")
        (item,) = ID.unpack_from(data, at)
        version, at = _varint(data, at + 8, end, U64)
        items.append((item, version))
    return Digest(mask, tuple(items))


def _get_want(data: bytes, at: int, end: int) -> Want:
    count, rest = divmod(end - at, 8)
    if rest:
        raise CodecError("malformed")
    return Want(struct.unpack_from(f"<{count}Q", data, at))


_JOIN_PART = Join()
_READERS: dict[int, Callable[[bytes, int, int], Part]] = {
    Kind.PING: _get_ping,
    Kind.ACK: _get_ack,
    Kind.PING_REQ: _get_ping_req,
    Kind.NACK: _get_nack,
    Kind.CLAIM: _get_claim,
    Kind.FACT: _get_fact,
    Kind.HOT: _get_hot,
    Kind.ROOT: _get_root,
    Kind.BUCKETS: _get_buckets,
    Kind.DIGEST: _get_digest,
    Kind.WANT: _get_want,
    Kind.JOIN: lambda data, at, end: _JOIN_PART,
}


def decode(plain: bytes) -> Decoded:
    """An opened packet. Unknown kinds of parts, and bytes behind a part's known fields, are skipped. Raises CodecError."""
    size = len(plain)
    if size > STREAM_PACKET_BYTES_MAX:
        raise CodecError("too_large")
    if size < 11:
        raise CodecError("malformed")
    lowest, highest, sender = HEAD.unpack_from(plain)
    if not lowest <= GOSSIP_VERSION <= highest:
        raise CodecError("malformed" if lowest > highest else "newer_version")
    boot, at = _varint(plain, 10, size, U32)
    if not sender:
        raise CodecError("malformed")
    parts: list[Part] = []
    cluster = b""
    while at < size:
        if at + 1 == size:
            raise CodecError("malformed")
        kind, length = plain[at], plain[at + 1]
        at += 2
        if length > 127:
            length, at = _varint(plain, at - 1, size, U32)
        end = at + length
        if end > size:
            raise CodecError("malformed")
        reader = _READERS.get(kind)
        if reader is not None:
            parts.append(reader(plain, at, end))
        elif kind == Kind.CLUSTER:
            if length < CLUSTER_BYTES:
                raise CodecError("malformed")
            cluster = plain[at : at + CLUSTER_BYTES]
        at = end
    if len(parts) > PARTS_MAX:
        raise CodecError("too_large")
    return Decoded(lowest, highest, sender, boot, tuple(parts), cluster)
