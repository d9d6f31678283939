"""Comparing what replicas hold, bucket by bucket: digests at a named place of the log, entries, and putting one right.

A bucket is the entries of one kind whose ids have the same low byte. What is done about a difference: docs/replication.md.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from storage import entries, lookups
from storage.entries import BUCKETS
from storage.errors import DamagedError
from storage.records import ID_MAX, NO_WRITE_ID, Kind, Operation, Record, Version, make
from storage.space import Space
from storage.table import Table

# So many DIGEST marks are remembered: one that is compared, and those that came while it was.
MARKS_KEPT = 4

Digests = Mapping[Kind, tuple[int, ...]]


class Seen(NamedTuple):
    """One entry as a comparison sees it. content: its hash; intact: whether its row has the content that it says."""

    version: Version
    content: int
    alive: bool
    intact: bool


class Digested:
    """What the bucket digests were at the last DIGEST marks."""

    def __init__(self) -> None:
        self._at: dict[Version, Digests] = {}

    def note(self, place: Version, digests: Digests) -> None:
        self._at[place] = digests
        for old in list(self._at)[:-MARKS_KEPT]:
            del self._at[old]

    def at(self, place: Version) -> Digests | None:
        """None when that mark has not been applied here, or long ago."""
        return self._at.get(place)

    def cut(self, last: int) -> None:
        """The log ends at sequence `last`: a mark behind it says nothing any more."""
        for place in [place for place in self._at if place.sequence > last]:
            del self._at[place]


def differing(mine: Digests, theirs: Digests) -> dict[Kind, list[int]]:
    """By kind, the buckets whose digests are not the same; kinds that agree are left out."""
    found = {
        kind: [n for n in range(BUCKETS) if mine[kind][n] != theirs[kind][n]]
        for kind in mine
        if kind in theirs
    }
    return {kind: buckets for kind, buckets in found.items() if buckets}


def listing(
    table: Table, space: Space, buckets: Collection[int], after: int, limit: int
) -> tuple[dict[int, Seen], int]:
    """Entries of those buckets with ids greater than `after`, by id, and up to which id they are all there.

    From any thread, beside writes; what is written meanwhile may be missing or there. Every row is verified. About `limit`.
    Raises DamagedError when an entry itself is damaged: nobody knows what it was of.
    """
    # Before the table: what leaves the layers has reached the table first.
    overlay, frozen = space.layers
    layers = {**frozen, **overlay}
    found: dict[int, bytes] = {}
    end = ID_MAX
    for key, entry in table.scan(space.kind, after=after):
        if key[-1] in buckets:
            if len(found) >= limit:
                end = max(found)
                break
            found[int.from_bytes(key, "big")] = entry
    for id, entry in layers.items():
        if after < id <= end and id & 255 in buckets:
            there = found.get(id)
            if not entry:
                found.pop(id, None)
            elif there is None or _version(entry) >= _version(there):
                found[id] = entry
    return {id: _seen(table, space, id, found[id]) for id in sorted(found)}, end


def _version(entry: bytes) -> tuple[int, int]:
    epoch, sequence = entries.VERSION.unpack_from(entry, entries.VERSION_OFFSET)
    return epoch, sequence


def _seen(table: Table, space: Space, id: int, entry: bytes) -> Seen:
    if not entries.intact(id, entry):
        raise lookups.entry_damaged(table, space.kind, id)
    fields = entries.unpack(entry)
    intact = True
    if fields.alive:
        try:
            # Of a later version, perhaps: then both are newer than what is compared.
            lookups.get(table, space, id)
        except DamagedError:
            intact = False
    return Seen(fields.version, entries.content_hash(id, entry), fields.alive, intact)


def copies(table: Table, space: Space, ids: Iterable[int]) -> list[Record]:
    """Records that would bring the entries of `ids` as they are, tombstones too; without those that are gone or damaged."""
    found = []
    for id in ids:
        try:
            record = _copy(table, space, id)
        except DamagedError:
            continue
        if record is not None:
            found.append(record)
    return found


def _copy(table: Table, space: Space, id: int) -> Record | None:
    entry = space.find(table, id)
    if entry is None:
        return None
    if not entries.intact(id, entry):
        raise lookups.entry_damaged(table, space.kind, id)
    fields = entries.unpack(entry)
    vector = b""
    if fields.alive:
        row = lookups.get(table, space, id)
        if row is None or row.version != fields.version:
            return None  # changed in this very moment
        vector = row.vector
    operation = Operation.PUT if fields.alive else Operation.DELETE
    _, record = make(
        *fields.version, fields.version, time.time_ns(), NO_WRITE_ID, operation, space.kind, id, vector,
        fields.classes, fields.metadata,
    )  # fmt: skip
    return record


def encoded(records: Sequence[Record]) -> bytes:
    """The records' bytes, one behind the other."""
    return b"".join([make(*record[:-1])[0] for record in records])


def mend(table: Table, space: Space, record: Record) -> bool:
    """The entry of that id gets the content of `record`, if it is of the same version. Room for a row is there."""
    if not space.drop(table, record.id, record.version):
        return False
    with table.lookup(space.kind) as lookup:
        space.apply([record], lookup)
    return True
