"""What a log segment's bytes are: header, batch trailer, and the seal of a clean close. Pure.

`storage/wal.py` says what a scan of them may conclude; docs/wal.md argues for both.

Header (512 bytes, little endian): magic, format version, shard, first sequence, segment bytes, salt, epoch
and timestamp of the record before the first, checksum over all that, zeros. Then batches; a batch is whole
records (`storage/records.py`) and a trailer of 24 bytes:

    offset  size  field
         0     4  magic 0; no record length can equal it
         4     4  check          low half of xxh3_64 over (salt, end of records, start, zero portions)
         8     4  magic 1
        12     4  start          offset of the batch's first byte in the segment
        16     4  magic 2
        20     4  zero_portions  how many sector portions of the records were all zero when written

A magic stands in each 8 bytes, so no single flipped byte can make any part of a trailer look unwritten.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from storage.records import HEADER_BYTES as RECORD_HEADER_BYTES
from storage.records import RecordError, Version

FORMAT_VERSION = 1
SECTOR_BYTES = 512
HEADER_BYTES = 512
TRAILER_BYTES = 24
SEGMENT_BYTES_MAX = 1 << 31
TRAILER_MAGICS = (0x9DC3A7B5, 0x8BE1D3C7, 0xA9F5C1E3)  # odd, so not a length; no byte is zero

_MAGIC = b"GMCO-WAL"
_HEADER = struct.Struct("<8sIIQQQQQQ")
_SEAL_MAGIC = b"GMCOSEAL"
_SEAL = struct.Struct("<8sIIQQQ")
SEAL_BYTES = _SEAL.size
_TRAILER = struct.Struct("<IIIIII")
_TRAILER_SUM = struct.Struct("<QQII")
_LENGTH = struct.Struct("<I12xQQ")  # length, epoch, sequence of a record
_ZERO_SECTOR = bytes(SECTOR_BYTES)

Buffer = bytes | memoryview

assert _TRAILER.size == TRAILER_BYTES


class WalError(ValueError):
    """A segment's or seal's bytes are damaged; `offset` is where."""

    def __init__(self, offset: int, reason: str) -> None:
        self.offset, self.reason = offset, reason
        super().__init__(f"{reason} at byte {offset}")


class UnknownFormatError(WalError):
    """The checksum holds, but the format version is one that this build does not know."""


class SegmentHeader(NamedTuple):
    shard: int
    first_sequence: int
    segment_bytes: int
    # Random per segment: seeds trailer checks, so that no record's content can pass for a trailer.
    salt: int
    # Of the record before first_sequence, 0 when there is none: a log knows its end even in an empty segment.
    previous_epoch: int
    previous_timestamp_ns: int


class Seal(NamedTuple):
    """Written on a clean close: the log ended exactly here, with nothing behind it."""

    shard: int
    last: Version


class Trailer(NamedTuple):
    start: int
    zero_portions: int


def encode_header(header: SegmentHeader) -> bytes:
    assert HEADER_BYTES < header.segment_bytes <= SEGMENT_BYTES_MAX
    body = _HEADER.pack(_MAGIC, FORMAT_VERSION, *header, 0)[:-8]
    return b"".join((body, xxh3_64_intdigest(body).to_bytes(8, "little"), bytes(HEADER_BYTES - _HEADER.size)))


def parse_header(data: Buffer) -> SegmentHeader:
    """Raises WalError (UnknownFormatError for a version that is not ours)."""
    if len(data) < HEADER_BYTES:
        raise WalError(0, "the file is shorter than a segment header")
    magic, version, *fields, check = _HEADER.unpack_from(data)
    if magic != _MAGIC or xxh3_64_intdigest(data[: _HEADER.size - 8]) != check:
        raise WalError(0, "the segment header's checksum does not match")
    if any(data[_HEADER.size : HEADER_BYTES]):
        raise WalError(_HEADER.size, "the segment header's padding is not zero")
    if version != FORMAT_VERSION:
        raise UnknownFormatError(8, f"segment format version {version} is unknown")
    return SegmentHeader(*fields)


def encode_seal(seal: Seal) -> bytes:
    body = _SEAL.pack(_SEAL_MAGIC, FORMAT_VERSION, seal.shard, *seal.last, 0)[:-8]
    return body + xxh3_64_intdigest(body).to_bytes(8, "little")


def parse_seal(data: bytes) -> Seal:
    """Raises WalError (UnknownFormatError for a version that is not ours)."""
    if len(data) != SEAL_BYTES:
        raise WalError(0, f"a seal has {SEAL_BYTES} bytes, not {len(data)}")
    magic, version, shard, epoch, sequence, check = _SEAL.unpack(data)
    if magic != _SEAL_MAGIC or xxh3_64_intdigest(data[:-8]) != check:
        raise WalError(0, "the seal's checksum does not match")
    if version != FORMAT_VERSION:
        raise UnknownFormatError(8, f"seal format version {version} is unknown")
    return Seal(shard, Version(epoch, sequence))


def segment_name(first_sequence: int) -> str:
    return f"{first_sequence:016d}.wal"


def segment_bytes_for(batch_bytes: int, segment_bytes: int) -> int:
    """Bytes of a new segment that is to hold `batch_bytes`: whole sectors, at least `segment_bytes`."""
    need = max(segment_bytes, HEADER_BYTES + batch_bytes + TRAILER_BYTES)
    return -(-need // SECTOR_BYTES) * SECTOR_BYTES


class Run(NamedTuple):
    """Records of one log, one behind the other without gaps: what one append takes. There is at least one."""

    data: bytes
    # Where each begins in `data`, ascending.
    starts: Sequence[int]
    # (epoch, sequence) of the first and the last, and the last one's timestamp.
    first: Version
    last: Version
    timestamp_ns: int


def joined(records: Sequence[bytes], last: Version) -> Run:
    """Encoded records that are to follow `last`; there must be one. Raises RecordError.

    Checks what would break the log (lengths, order), not checksums: the caller made the bytes.
    """
    starts, at, (epoch, sequence) = [], 0, last
    peek = _LENGTH.unpack_from
    for data in records:
        size = len(data)
        length, epoch_next, sequence_next = peek(data) if size >= RECORD_HEADER_BYTES else (0, 0, 0)
        if length != size:
            raise RecordError("not exactly one whole record")
        if sequence_next != sequence + 1 or epoch_next < epoch:
            raise RecordError(f"({epoch_next}, {sequence_next}) cannot follow ({epoch}, {sequence})")
        starts.append(at)
        at, epoch, sequence = at + size, epoch_next, sequence_next
    batch = records[0] if len(records) == 1 else b"".join(records)
    first = Version(peek(records[0])[1], last.sequence + 1)
    return Run(batch, starts, first, Version(epoch, sequence), int.from_bytes(records[-1][48:56], "little"))


def encode_trailer(header: SegmentHeader, start: int, batch: bytes) -> bytes:
    """The trailer of a batch of records, `batch`, that begins at offset `start`."""
    zeros = zero_portions(batch, start)
    check = _trailer_check(header.salt, start + len(batch), start, zeros)
    return _TRAILER.pack(TRAILER_MAGICS[0], check, TRAILER_MAGICS[1], start, TRAILER_MAGICS[2], zeros)


def trailer_at(data: Buffer, offset: int, header: SegmentHeader, base: int = 0) -> Trailer | None:
    """The valid trailer at `offset` of the segment of which `data` is the part from `base` on, or None."""
    if offset - base + TRAILER_BYTES > len(data):
        return None
    m0, check, m1, start, m2, zeros = _TRAILER.unpack_from(data, offset - base)
    if (m0, m1, m2) != TRAILER_MAGICS or check != _trailer_check(header.salt, offset, start, zeros):
        return None
    return Trailer(start, zeros)


def trailers(tail: bytes, offset: int, header: SegmentHeader) -> Iterator[tuple[int, Trailer]]:
    """All valid trailers, with their offsets, in `tail`, which begins at `offset` of its segment."""
    magic = TRAILER_MAGICS[0].to_bytes(4, "little")
    position = tail.find(magic)
    while position >= 0:
        if (offset + position) % 8 == 0 and (found := trailer_at(tail, offset + position, header, offset)):
            yield offset + position, found
        position = tail.find(magic, position + 1)


def resembles_trailer(data: bytes) -> bool:
    """Whether `data` begins with a trailer of which a part may be flipped or missing."""
    if len(data) < TRAILER_BYTES:
        return True
    words = _TRAILER.unpack_from(data)[::2]
    return any(word == magic for word, magic in zip(words, TRAILER_MAGICS, strict=True))


def _trailer_check(salt: int, end: int, start: int, zeros: int) -> int:
    return xxh3_64_intdigest(_TRAILER_SUM.pack(salt, end, start, zeros)) & 0xFFFFFFFF


def zero_portions(batch: bytes, start: int) -> int:
    """How many portions of `batch`, cut at the sector borders of its segment, are all zero; it begins at `start`."""
    first = min(-start % SECTOR_BYTES, len(batch))
    last = first + (len(batch) - first) // SECTOR_BYTES * SECTOR_BYTES
    count = int(first > 0 and not any(batch[:first])) + int(last < len(batch) and not any(batch[last:]))
    # The search skips through the bytes; nearly always there is no such run, and no sector is looked at.
    if batch.find(_ZERO_SECTOR, first, last) >= 0:
        for offset in range(first, last, SECTOR_BYTES):
            count += batch[offset : offset + SECTOR_BYTES] == _ZERO_SECTOR
    return count
