"""Records as values and as bytes. Pure: no files, no clock.

Layout (little endian), the same bytes in every replica's log and on every stream:

    offset  size  field
         0     4  length           whole record with padding, a multiple of 8
         4     4  header_check     low half of xxh3_64 over bytes 8..96, seeded with length
         8     8  body_check       xxh3_64 over vector | class ids | metadata (not the padding)
        16     8  epoch            in which this copy was logged
        24     8  sequence         in the shard's log, from 1, without gaps
        32    16  version          (epoch, sequence) of the first writing, kept when re-offered
        48     8  timestamp_ns     wall clock, for people and for the age of write_ids only
        56    16  write_id
        72     8  id
        80     1  operation
        81     1  kind
        82     2  class_count
        84     4  vector_bytes
        88     4  metadata_bytes
        92     4  reserved, zero
        96     …  vector (FP16) | class ids (u16 each, ascending) | metadata (msgpack) | zero padding to 8

`header_check` stands apart from `body_check` so that a reader can trust `length` before it trusts the body: that is what
tells a torn tail from damage (docs/wal.md).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

HEADER = struct.Struct("<IIQQQQQQ16sQBBHIII")
HEADER_BYTES = HEADER.size
# The header in two: what the check covers, and what stands before it.
_LEAD = struct.Struct("<II")
_CHECKED = struct.Struct("<QQQQQQ16sQBBHIII")
_PADDINGS = [bytes(size) for size in range(8)]
RECORD_BYTES_MAX = 1 << 20
METADATA_BYTES_MAX = 64 << 10
CLASSES_MAX = 1_024
NO_WRITE_ID = bytes(16)
ID_MAX = (1 << 64) - 1

assert HEADER_BYTES == _LEAD.size + _CHECKED.size == 96


class Kind(IntEnum):
    NONE = 0  # a record about the shard itself (markers)
    ITEM = 1
    USER = 2


class Operation(IntEnum):
    PUT = 1
    DELETE = 2
    MARK = 3  # says something about the shard, of kind NONE; changes no row


class Mark(IntEnum):
    """What a MARK record is about: its `id`."""

    EPOCH = 1  # the first record of an epoch; its metadata is the placement
    PURGE = 2  # tombstones up to a version go; its metadata is that version, msgpack [epoch, sequence]
    DIGEST = 3  # a point in the log at which replicas compare their digests


class Version(NamedTuple):
    """Greater wins, compared as a tuple."""

    epoch: int
    sequence: int


class Fingerprint(NamedTuple):
    """Which record stands at `sequence` of a log. Equal ones are the same bytes. All 0: the log is empty."""

    epoch: int
    sequence: int
    # xxh3_64 over the record's header, which holds the checksum of its body.
    check: int


EMPTY = Fingerprint(0, 0, 0)


# A tuple, because replay makes a hundred thousand a second and frozen dataclasses cost 4 µs.
class Record(NamedTuple):
    """One logged change. `vector` is raw FP16 bytes (2 · dim), or b"" for a delete or mark."""

    epoch: int
    sequence: int
    version: Version
    timestamp_ns: int
    write_id: bytes
    operation: Operation
    kind: Kind
    id: int
    vector: bytes
    classes: tuple[int, ...]
    metadata: bytes
    body_check: int


class RecordError(ValueError):
    """The bytes are not a whole, unharmed record."""


def encode(
    *,
    epoch: int,
    sequence: int,
    version: Version | None = None,
    timestamp_ns: int,
    write_id: bytes = NO_WRITE_ID,
    operation: Operation,
    kind: Kind,
    id: int,
    vector: bytes = b"",
    classes: Iterable[int] = (),
    metadata: bytes = b"",
) -> bytes:
    """The record's bytes. `version` None: this is its first writing, so (epoch, sequence)."""
    return make(
        epoch,
        sequence,
        version,
        timestamp_ns,
        write_id,
        operation,
        kind,
        id,
        vector,
        tuple(classes),
        metadata,
    )[0]


def make(
    epoch: int,
    sequence: int,
    version: Version | None,
    timestamp_ns: int,
    write_id: bytes,
    operation: Operation,
    kind: Kind,
    id: int,
    vector: bytes,
    classes: tuple[int, ...],
    metadata: bytes,
) -> tuple[bytes, Record]:
    """A record's bytes, and what `decode` would make of them. Positional: the log's hot path calls it."""
    if version is None:
        version = _new(Version, (epoch, sequence))
    if classes:
        classes = tuple(sorted(classes))
        body = b"".join((vector, struct.pack(f"<{len(classes)}H", *classes), metadata))
    else:
        body = vector + metadata
    padding = -len(body) % 8
    length = HEADER_BYTES + len(body) + padding
    assert length <= RECORD_BYTES_MAX, "the server bounds what it lets in"
    body_check = xxh3_64_intdigest(body)
    checked = _CHECKED.pack(
        body_check, epoch, sequence, *version, timestamp_ns, write_id,
        id, operation, kind, len(classes), len(vector), len(metadata), 0,
    )  # fmt: skip
    lead = _LEAD.pack(length, xxh3_64_intdigest(checked, length) & 0xFFFFFFFF)
    return b"".join((lead, checked, body, _PADDINGS[padding])), _new(Record, (
        epoch, sequence, version, timestamp_ns, write_id, operation, kind, id,
        vector, classes, metadata, body_check,
    ))  # fmt: skip


def decode(data: bytes | memoryview, offset: int = 0) -> Record:
    """The record at `offset`, verified. Raises RecordError."""
    end = offset + HEADER_BYTES
    if len(data) < end:
        raise RecordError("shorter than a record header")
    (
        length, check, body_check, epoch, sequence, epoch_v, sequence_v, timestamp_ns, write_id,
        id, operation, kind, class_count, vector_bytes, metadata_bytes, reserved,
    ) = HEADER.unpack_from(data, offset)  # fmt: skip
    if xxh3_64_intdigest(data[offset + 8 : end], length) & 0xFFFFFFFF != check or reserved:
        raise RecordError("header checksum does not match")
    split = end + vector_bytes
    meta = split + 2 * class_count
    stop = meta + metadata_bytes
    if offset + length > len(data) or length != HEADER_BYTES + stop - end + (-(stop - end) % 8):
        raise RecordError("length does not match")
    following = offset + length
    if xxh3_64_intdigest(data[end:stop]) != body_check or (stop != following and any(data[stop:following])):
        raise RecordError("body checksum does not match")
    try:
        operation, kind = _OPERATIONS[operation], _KINDS[kind]
    except KeyError as error:
        raise RecordError(f"unknown operation {operation} or kind {kind}") from error
    classes = struct.unpack_from(f"<{class_count}H", data, split) if class_count else ()
    # tuple.__new__ spares two calls through Python for each record: a fifth of the time.
    return _new(Record, (
        epoch, sequence, _new(Version, (epoch_v, sequence_v)), timestamp_ns, write_id, operation, kind, id,
        bytes(data[end:split]), classes, bytes(data[meta:stop]), body_check,
    ))  # fmt: skip


def split(data: bytes) -> Iterator[tuple[bytes, Record]]:
    """Whole records one behind the other, as bytes and as values, each verified. Raises RecordError."""
    offset = 0
    while offset < len(data):
        record = decode(data, offset)
        end = offset + int.from_bytes(data[offset : offset + 4], "little")
        yield data[offset:end], record
        offset = end


def fingerprint(data: bytes) -> Fingerprint:
    """Of the record that `data`, which is known to be good, begins with."""
    epoch, sequence = _EPOCH_SEQUENCE.unpack_from(data, 16)
    return Fingerprint(epoch, sequence, xxh3_64_intdigest(data[:HEADER_BYTES]))


_EPOCH_SEQUENCE = struct.Struct("<QQ")
_new = tuple.__new__
_OPERATIONS = {int(o): o for o in Operation}
_KINDS = {int(k): k for k in Kind}
