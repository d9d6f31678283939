"""One row of the table as bytes: what LMDB holds, and memory for changes since the last checkpoint. Pure.

The layout is in docs/storage.md, "Entry". Both hold the same bytes so that one verification serves both.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from storage.records import CLASSES_MAX, Kind, Operation, Version

# Everything behind entry_check: row, epoch, sequence, body_check, class_count, operation, kind.
TAIL = struct.Struct("<IQQQHBB")
TAIL_BYTES = TAIL.size
HEADER_BYTES = 4 + TAIL_BYTES
# In memory's layers: the table's entry is to go.
GONE = b""
NO_ROW = 0xFFFFFFFF
VERSION = struct.Struct("<QQ")
VERSION_OFFSET = 8
OPERATION_OFFSET = 34
# The part that does not depend on row numbers: it makes the digest, equal on all replicas.
CONTENT = slice(8, HEADER_BYTES)
BUCKETS = 256
CLASSES = [struct.Struct(f"<{count}H") for count in range(CLASSES_MAX + 1)]

assert HEADER_BYTES == 36


class Entry(NamedTuple):
    """A decoded entry. `body` is class ids | metadata, as stored."""

    row: int
    version: Version
    body_check: int
    class_count: int
    operation: int
    kind: int
    body: bytes

    @property
    def alive(self) -> bool:
        return self.operation == Operation.PUT

    @property
    def classes(self) -> tuple[int, ...]:
        return CLASSES[self.class_count].unpack_from(self.body)

    @property
    def metadata(self) -> bytes:
        return self.body[2 * self.class_count :]


def seal(id: int, tail: bytes) -> bytes:
    """The entry of `id` from its packed TAIL and body."""
    return (xxh3_64_intdigest(tail, id) & 0xFFFFFFFF).to_bytes(4, "little") + tail


def intact(id: int, entry: bytes) -> bool:
    """Whether the entry is the one that was written for `id`."""
    return (
        len(entry) >= HEADER_BYTES
        and int.from_bytes(entry[:4], "little") == xxh3_64_intdigest(entry[4:], id) & 0xFFFFFFFF
    )


def unpack(entry: bytes) -> Entry:
    """The entry's fields; verify with `intact` first."""
    row, epoch, sequence, body_check, class_count, operation, kind = TAIL.unpack_from(entry, 4)
    return Entry(
        row, Version(epoch, sequence), body_check, class_count, operation, kind, entry[HEADER_BYTES:]
    )


def moved(id: int, entry: bytes, row: int) -> bytes:
    """The same entry at another row."""
    return seal(id, row.to_bytes(4, "little") + entry[8:])


def content_hash(id: int, entry: bytes) -> int:
    """What this entry adds to the digest (XOR)."""
    return int(xxh3_64_intdigest(entry[CONTENT], id))


def packed_metadata(entry: bytes) -> bytes:
    """The metadata bytes without decoding the rest; b"" for a tombstone."""
    return entry[HEADER_BYTES + 2 * int.from_bytes(entry[32:34], "little") :]


def body_intact(vector: bytes | memoryview, entry: bytes) -> bool:
    """Whether vector, class ids and metadata are those that came in the record."""
    body_check = int.from_bytes(entry[24:32], "little")
    return bool(xxh3_64_intdigest(b"".join((vector, entry[HEADER_BYTES:]))) == body_check)


def kind_name(kind: Kind) -> str:
    return "items" if kind is Kind.ITEM else "users"
