"""Which items two nodes hold in different versions: hashes of 64 buckets, kept up to date with every change. Pure.

An item is a 64-bit hash of what it is about, a version an integer that grows. A bucket's hash is the XOR of its items' hashes,
so it does not depend on the order of changes and costs one XOR each. Hot facts have buckets of their own: they differ nearly
always, and must not drag the cold ones into every exchange.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

COUNT = 64
HOT_FROM = 48

_PAIR = struct.Struct("<QQ")
_NAME = struct.Struct("<BQ")


class Ref(NamedTuple):
    """What an item stands for. kind: "c" a claim, "f" a fact, "h" a hot vector."""

    kind: str
    origin: int
    key: bytes = b""


def item_of(ref: Ref) -> int:
    return xxh3_64_intdigest(_NAME.pack(ord(ref.kind), ref.origin) + ref.key)


def bucket_of(item: int, kind: str) -> int:
    return HOT_FROM + item % (COUNT - HOT_FROM) if kind == "h" else item % HOT_FROM


def _mixed(item: int, version: int) -> int:
    return xxh3_64_intdigest(_PAIR.pack(item, version & 0xFFFFFFFFFFFFFFFF))


class ItemTable:
    """All items of one node with their versions."""

    def __init__(self) -> None:
        self._hashes = [0] * COUNT
        self._items: list[dict[int, tuple[int, Ref]]] = [{} for _ in range(COUNT)]

    def put(self, item: int, ref: Ref, version: int) -> None:
        bucket = bucket_of(item, ref.kind)
        entries = self._items[bucket]
        old = entries.get(item)
        change = _mixed(item, version)
        if old is not None:
            change ^= _mixed(item, old[0])
        entries[item] = (version, ref)
        self._hashes[bucket] ^= change

    def drop(self, item: int, kind: str) -> None:
        bucket = bucket_of(item, kind)
        old = self._items[bucket].pop(item, None)
        if old is not None:
            self._hashes[bucket] ^= _mixed(item, old[0])

    def root(self) -> int:
        return xxh3_64_intdigest(struct.pack("<64Q", *self._hashes))

    def hashes(self) -> tuple[int, ...]:
        """One u32 for each bucket."""
        return tuple(one & 0xFFFFFFFF for one in self._hashes)

    def differing(self, hashes: Iterable[int]) -> int:
        """Bit mask of the buckets that differ from another node's `hashes`."""
        mask = 0
        for bucket, (mine, theirs) in enumerate(zip(self._hashes, hashes, strict=True)):
            if mine & 0xFFFFFFFF != theirs:
                mask |= 1 << bucket
        return mask

    def digest(self, mask: int) -> list[tuple[int, int]]:
        """(item, version) of all items in the buckets of `mask`."""
        return [
            (item, version)
            for bucket in range(COUNT)
            if mask >> bucket & 1
            for item, (version, _) in self._items[bucket].items()
        ]

    def compare(self, mask: int, theirs: Iterable[tuple[int, int]]) -> tuple[list[Ref], list[int]]:
        """What the other lacks or has older, and which items we lack or have older."""
        known = dict(theirs)
        newer: list[Ref] = []
        wanted: list[int] = []
        for bucket in range(COUNT):
            if mask >> bucket & 1:
                for item, (version, ref) in self._items[bucket].items():
                    other = known.pop(item, -1)
                    if other < version:
                        newer.append(ref)
                    elif other > version:
                        wanted.append(item)
        wanted.extend(known)  # those that we have never heard of
        return newer, wanted

    def refs(self, items: Iterable[int]) -> list[Ref]:
        found = []
        for item in dict.fromkeys(items):
            for bucket in (item % HOT_FROM, HOT_FROM + item % (COUNT - HOT_FROM)):
                entry = self._items[bucket].get(item)
                if entry is not None:
                    found.append(entry[1])
                    break
        return found

    def everything(self) -> list[Ref]:
        return [ref for entries in self._items for _, ref in entries.values()]
