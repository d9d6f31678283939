"""What replicas ask each other when they compare themselves, as bodies of peer messages. Pure.

digests  [shard, [epoch, sequence] of a DIGEST mark] → [256 digests of items, 256 of users, side files] | nil
listing  [shard, kind, [bucket…], after id] → [entries, up to which id they are all there]
copies   [shard, kind, [id…]] → raw records of those that are there and intact
mend     [shard, epoch of the primary that asks, raw records, [[kind, id, [epoch, sequence]]…] to drop] → how many were changed
repair   [shard, time left ms] → what was compared and repaired, by the shard's primary
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from storage.buckets import Digests, Seen
from storage.entries import BUCKETS
from storage.records import Kind, Version

_ENTRY = struct.Struct("<QQQQB")
_ALIVE, _INTACT = 1, 2


def pack_digests(digests: Digests, side_files: int) -> list[Any]:
    return [list(digests[Kind.ITEM]), list(digests[Kind.USER]), side_files]


def read_digests(body: Any) -> tuple[Digests, int]:
    """Raises TypeError, ValueError."""
    items, users, side_files = body
    for digests in (items, users):
        if len(digests) != BUCKETS or not all(type(one) is int for one in digests):
            raise ValueError(f"not {BUCKETS} digests")
    return {Kind.ITEM: tuple(items), Kind.USER: tuple(users)}, int(side_files)


def pack_listing(seen: Mapping[int, Seen]) -> bytes:
    return b"".join(
        [
            _ENTRY.pack(id_, *one.version, one.content, one.alive * _ALIVE | one.intact * _INTACT)
            for id_, one in seen.items()
        ]
    )


def read_listing(data: Any) -> dict[int, Seen]:
    """Raises TypeError, ValueError."""
    if type(data) is not bytes or len(data) % _ENTRY.size:
        raise ValueError("not a list of entries")
    return {
        id_: Seen(Version(epoch, sequence), content, bool(flags & _ALIVE), bool(flags & _INTACT))
        for id_, epoch, sequence, content, flags in _ENTRY.iter_unpack(data)
    }
