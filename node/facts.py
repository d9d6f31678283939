"""What a node says of itself by gossip: the schema of its facts, which gossip carries as opaque bytes. Pure.

Cold facts, one key each:

    node        msgpack map: `NodeFact`
    layout      the canonical bytes of the layout that this node goes by, in pieces (below)
    primaries   u8 schema, then u16 shard and u32 epoch of each shard that this node leads
    shards      u8 schema, then u16 shard and u8 role (0 primary, 1 replica) each; the order of the lag bytes
    degraded    UTF-8: why this node should be avoided; absent when it is well
    duty        `draining` or `maintenance`: what an operator has said of this node; absent when nothing
    waiting     8 bytes: `view_of` the names with which this node, which has no layout yet, would form a cluster

`layout` is cut into pieces under the keys `layout`, `layout.1`, …: 8 bytes of the layout's hash, u8 number of pieces, then
the piece. Pieces of different layouts never mix, and what they make is checked against the hash.

The hot vector, at most 255 bytes:

    u8 schema (1) · u16 fingerprint of the `shards` fact · u8 queue depth · u8 batch time · u8 loop lateness · u8 health
    · u8 lag of each replica in the order of `shards`

The fingerprint ties lag bytes to the shards that they speak of: with another `shards` fact they are not read. Numbers
are on a log scale: byte = round(8·log2(1 + x/unit)), so a step is 9% and 255 is 4·10⁹ units. Units: 1 request waiting
for the search lane, 0.1 ms of a batch, 10 ms of lateness and of lag (0: level; 61: 2 s; 255: over a year).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from enum import IntFlag
from typing import Any, NamedTuple

import msgpack
import msgspec
import xxhash

from router.layout import Layout, LayoutError, Member, layout_from

NODE, LAYOUT, SHARDS, DEGRADED, WAITING = b"node", b"layout", b"shards", b"degraded", b"waiting"
PRIMARIES, DUTY = b"primaries", b"duty"
VALUE_BYTES_MAX = 1_000
HOT_BYTES_MAX = 255
LAYOUT_PIECES_MAX = 15
SCHEMA = 1
# Of lateness and lag so large that what an idle node shows of them is 0.
DEPTH_UNIT, BATCH_UNIT_MS, LATE_UNIT_MS, LAG_UNIT_MS = 1.0, 0.1, 10.0, 10.0
_PIECE = struct.Struct("<8sB")
_ROLE = struct.Struct("<HB")
_LED = struct.Struct("<HI")
_HOT = struct.Struct("<BHBBBB")
REPLICAS_MAX = HOT_BYTES_MAX - _HOT.size
# A reason is for a person's eyes; its end can go.
REASON_BYTES_MAX = 500


class FactError(ValueError):
    """A fact that cannot be read or does not fit."""


class NodeFact(msgspec.Struct, frozen=True, kw_only=True):
    """Who a node is. A newer version may say more: unknown keys are skipped."""

    name: str
    region: str
    zone: str
    host: str
    capacity: int
    # Where apps reach it: ws://host:port.
    app: str
    version: str
    shard_count: int
    replication: int
    dim: int
    metric: str
    class_width: int
    bootstrap: int
    # Where it answers HTTP; empty: nowhere, or an older version.
    http: str = ""

    def member(self) -> Member:
        return Member(
            name=self.name, region=self.region, zone=self.zone, host=self.host, capacity=self.capacity
        )


def pack_node(fact: NodeFact) -> bytes:
    packed: bytes = msgpack.packb(msgspec.to_builtins(fact))
    if len(packed) > VALUE_BYTES_MAX:
        raise FactError(f"what this node says of itself takes {len(packed)} bytes; shorten its app URL")
    return packed


def unpack_node(value: bytes) -> NodeFact:
    """Raises FactError."""
    try:
        return msgspec.convert(msgpack.unpackb(value), NodeFact)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise FactError(f"not a node's fact: {error}") from error


# -- the layout, in pieces ---------------------------------------------------------------------------------------------


def pack_layout(layout: Layout) -> dict[bytes, bytes]:
    """Values by key. Raises FactError for a layout of too many members."""
    size = VALUE_BYTES_MAX - _PIECE.size
    canonical = layout.canonical
    pieces = [canonical[start : start + size] for start in range(0, len(canonical), size)]
    if len(pieces) > LAYOUT_PIECES_MAX:
        raise FactError(
            f"a layout of {len(layout.members)} members takes {len(canonical):,} bytes; "
            f"gossip carries {LAYOUT_PIECES_MAX * size:,}"
        )
    head = _PIECE.pack(bytes.fromhex(layout.hash), len(pieces))
    return {_layout_key(place): head + piece for place, piece in enumerate(pieces)}


def unpack_layout(facts: Mapping[bytes, bytes]) -> Layout | None:
    """The layout in a node's facts; None when there is none, or not all of it yet. Raises FactError."""
    first = facts.get(LAYOUT, b"")
    if not first:
        return None
    if len(first) < _PIECE.size:
        raise FactError("a piece of a layout without its head")
    head = first[: _PIECE.size]
    hash_, count = _PIECE.unpack(head)
    pieces = [facts.get(_layout_key(place), b"") for place in range(count)]
    if any(piece[: _PIECE.size] != head for piece in pieces):
        return None
    try:
        layout = layout_from(b"".join(piece[_PIECE.size :] for piece in pieces))
    except LayoutError as error:
        raise FactError(str(error)) from error
    if bytes.fromhex(layout.hash) != hash_:
        raise FactError("a layout's pieces do not add up to its hash")
    return layout


def _layout_key(place: int) -> bytes:
    return LAYOUT if place == 0 else LAYOUT + f".{place}".encode()


def view_of(names: Sequence[str]) -> bytes:
    """8 bytes that are the same for the same set of names."""
    return bytes(xxhash.xxh64("\n".join(sorted(names)).encode()).digest())


# -- shards and the hot vector -----------------------------------------------------------------------------------------


class Held(NamedTuple):
    """One replica of a node."""

    shard: int
    primary: bool


def pack_shards(held: Sequence[Held]) -> bytes:
    """What does not fit is left out: of a replica that is not listed, no lag is known."""
    listed = held[:REPLICAS_MAX]
    return bytes([SCHEMA]) + b"".join(_ROLE.pack(one.shard, 0 if one.primary else 1) for one in listed)


def unpack_shards(value: bytes) -> list[Held]:
    """Empty for a schema that this build does not know. Raises FactError."""
    if not value or value[0] != SCHEMA:
        return []
    if (len(value) - 1) % _ROLE.size:
        raise FactError("a list of shards that is cut off")
    return [Held(shard, role == 0) for shard, role in _ROLE.iter_unpack(value[1:])]


def pack_primaries(led: Mapping[int, int]) -> bytes:
    """led: shard → epoch. What does not fit is left out: who leads those is asked of their voters."""
    listed = sorted(led.items())[: (VALUE_BYTES_MAX - 1) // _LED.size]
    return bytes([SCHEMA]) + b"".join(_LED.pack(shard, min(epoch, 0xFFFFFFFF)) for shard, epoch in listed)


def unpack_primaries(value: bytes) -> dict[int, int]:
    """Shard → epoch; empty for a schema that this build does not know. Raises FactError."""
    if not value or value[0] != SCHEMA:
        return {}
    if (len(value) - 1) % _LED.size:
        raise FactError("a list of primaries that is cut off")
    return dict(_LED.iter_unpack(value[1:]))


def shards_fingerprint(value: bytes) -> int:
    return int(xxhash.xxh64(value).intdigest()) & 0xFFFF


class Health(IntFlag):
    """Why a node should be avoided while another replica is there."""

    DISK = 1
    DEVICE = 2
    LATE = 4


class Load(NamedTuple):
    """How busy a node is, in the units of the names."""

    queued: float = 0.0
    batch_ms: float = 0.0
    late_ms: float = 0.0


class Hot(NamedTuple):
    """The hot vector of a node. `lags`: bytes of the log scale, in the order of its `shards` fact."""

    fingerprint: int
    load: Load
    health: Health
    lags: bytes


def pack_hot(shards: bytes, load: Load, health: Health, lags_ms: Sequence[float]) -> bytes:
    """`lags_ms`: of each replica, in the order of the `shards` fact."""
    head = _HOT.pack(
        SCHEMA,
        shards_fingerprint(shards),
        log_byte(load.queued, DEPTH_UNIT),
        log_byte(load.batch_ms, BATCH_UNIT_MS),
        log_byte(load.late_ms, LATE_UNIT_MS),
        health,
    )
    return head + bytes(log_byte(lag, LAG_UNIT_MS) for lag in lags_ms[:REPLICAS_MAX])


def unpack_hot(value: bytes) -> Hot | None:
    """None for nothing, and for a schema that this build does not know."""
    if len(value) < _HOT.size or value[0] != SCHEMA:
        return None
    _, fingerprint, queued, batch, late, health = _HOT.unpack_from(value)
    load = Load(log_value(queued, DEPTH_UNIT), log_value(batch, BATCH_UNIT_MS), log_value(late, LATE_UNIT_MS))
    return Hot(fingerprint, load, Health(health), value[_HOT.size :])


def log_byte(value: float, unit: float) -> int:
    """`value` on the log scale; 0 for 0 and below."""
    return min(255, round(8 * math.log2(1 + max(0.0, value) / unit)))


def log_value(byte: int, unit: float) -> float:
    return unit * (2 ** (byte / 8) - 1)


def pack_reason(reasons: Sequence[str]) -> bytes:
    return "; ".join(reasons).encode(errors="replace")[:REASON_BYTES_MAX]


def reason_text(value: bytes) -> str:
    return value.decode(errors="replace")


def settings_that_differ(mine: Any, theirs: Any, keys: Sequence[str]) -> str | None:
    """`dim 16 here and 32 there`: the first of the settings in which two nodes differ."""
    for key in keys:
        here, there = getattr(mine, key), getattr(theirs, key)
        if here != there:
            return f"{key} {here!r} here and {there!r} there"
    return None
