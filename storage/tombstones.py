"""Which ids of one kind are deleted, in the order of their versions, so that a purge costs what it removes. Pure.

What it costs: `python -m bench.tombstones`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from heapq import merge

import msgpack

from storage.errors import FormatError
from storage.records import Version

# id → (epoch, sequence, content hash)
_Noted = tuple[int, int, int]


class Tombstones:
    def __init__(self) -> None:
        # Ascending by version, as nearly all of them come; the others apart.
        self._ordered: OrderedDict[int, _Noted] = OrderedDict()
        self._late: dict[int, _Noted] = {}
        self._newest = (0, 0)

    def __len__(self) -> int:
        return len(self._ordered) + len(self._late)

    def load(self, noted: Iterable[tuple[int, int, int, int]]) -> None:
        """(epoch, sequence, id, content hash) of each, in any order."""
        for epoch, sequence, id, content_hash in sorted(noted):
            self.add(id, (epoch, sequence), content_hash)

    def add(self, id: int, version: tuple[int, int], content_hash: int) -> None:
        """`id`, which is not noted, has become a tombstone that adds `content_hash` to the digest."""
        if version > self._newest:
            self._newest = version
            self._ordered[id] = (*version, content_hash)
        else:
            self._late[id] = (*version, content_hash)

    def discard(self, id: int) -> None:
        if self._ordered.pop(id, None) is None:
            self._late.pop(id, None)

    def purge(self, floor: Version) -> list[tuple[int, int]]:
        """(id, content hash) of those at or below `floor`, which are forgotten."""
        ordered, gone = self._ordered, []
        while ordered:
            id, (*version, content_hash) = next(iter(ordered.items()))
            if tuple(version) > floor:
                break
            ordered.popitem(last=False)
            gone.append((id, content_hash))
        for id in [id for id, noted in self._late.items() if noted[:2] <= floor]:
            gone.append((id, self._late.pop(id)[2]))
        return gone

    def up_to(self, bound: Version) -> Iterator[Version]:
        """The versions at or below `bound`, ascending."""
        for noted in merge(self._ordered.values(), sorted(self._late.values())):
            if noted[:2] > bound:
                return
            yield Version(*noted[:2])


def encode_floor(floor: Version) -> bytes:
    """A PURGE mark's metadata."""
    return bytes(msgpack.packb(list(floor)))


def decode_floor(metadata: bytes) -> Version:
    """Raises FormatError."""
    try:
        epoch, sequence = msgpack.unpackb(metadata)
        if isinstance(epoch, int) and isinstance(sequence, int) and epoch >= 0 and sequence >= 0:
            return Version(epoch, sequence)
    except (ValueError, TypeError, msgpack.UnpackException):
        pass
    raise FormatError(f"a PURGE mark's metadata is not [epoch, sequence]: {metadata[:40].hex()}")
