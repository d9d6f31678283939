"""What a scan of a log segment may conclude: whole, torn, or damaged. Pure: no files, no clock.

The laws (docs/wal.md argues for them; `storage/segment.py` has the bytes):

1. A segment is a header, then batches, then zeros up to its preallocated size. A batch is whole records, then
   a trailer. Sequences have no gaps, epochs never fall.
2. A batch is one durable write, and the next begins only after that. So every byte before the `start`
   that a trailer names was durable when that trailer was written: what is bad there is damage.
3. Only the last batch of the last segment can be torn, and tearing leaves whole 512-byte sectors at zero. A bad
   unit is torn only if such a sector portion explains it. Everything else is damage.
4. Whole records before a torn one are kept, though nobody was told of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from storage.bulk import glide
from storage.records import HEADER_BYTES as RECORD_HEADER_BYTES
from storage.records import Record, RecordError, Version, decode
from storage.segment import HEADER_BYTES as SEGMENT_HEADER_BYTES
from storage.segment import (
    SECTOR_BYTES,
    TRAILER_BYTES,
    TRAILER_MAGICS,
    Buffer,
    SegmentHeader,
    WalError,
    encode_trailer,
    parse_header,
    resembles_trailer,
    trailer_at,
    trailers,
    zero_portions,
)

# A reader walks at most about this far from a sparse index entry to the record it wants.
INDEX_STEP_BYTES = 64 << 10

# length, check, body_check, epoch, sequence, timestamp_ns, class_count, vector, metadata bytes, reserved
_PEEK = struct.Struct("<IIQQQ16xQ26xHIII")
_MAGIC = TRAILER_MAGICS[0]
_ZEROS = bytes(64 << 10)

assert _PEEK.size == RECORD_HEADER_BYTES


class Scan(NamedTuple):
    """What a segment holds. Offsets count bytes from the segment's start."""

    header: SegmentHeader
    torn: bool
    # Of the last whole record here or, when there is none, of the one before the segment.
    last: Version
    last_timestamp_ns: int
    # Where the good bytes end; of what follows, `torn_bytes` are to be zeroed (0: it is zero already).
    end: int
    torn_bytes: int
    # Where the whole records begin that lost their trailer (the shell writes them a new one), or None.
    untrailed_from: int | None
    # Sparse (sequence, offset) pairs, ascending.
    marks: list[tuple[int, int]]


def scan(data: Buffer, *, last_segment: bool) -> Scan:
    """Walk a whole segment, verifying everything. Raises WalError where it is damaged.

    In a segment that is not the last one a torn batch is damage, too.
    """
    header = parse_header(data)
    if len(data) != header.segment_bytes:
        reason = f"the file has {len(data)} bytes, its header says {header.segment_bytes}"
        raise WalError(min(len(data), header.segment_bytes), reason)
    walked = _walk(data, header)
    whole = walked.reason is None and walked.offset == walked.batch_start
    if whole and _content_end(data, walked.offset) == walked.offset:
        return walked.result(torn=False, torn_bytes=0)
    data = bytes(data)  # judging needs to search in it
    if not last_segment:
        raise WalError(
            walked.offset, walked.reason or "a batch without its trailer, or bytes behind the last one"
        )
    return _judge(data, walked)


class _Walk(NamedTuple):
    """Where a walk over good units stopped, and why (`reason` None: at zeros or at the segment's end)."""

    header: SegmentHeader
    offset: int
    reason: str | None
    # How many bytes from `offset` on must overlap a missing sector; 0: nothing missing can explain this unit.
    span: int
    # End of the last good trailer: where the last batch, whole or torn, begins.
    batch_start: int
    last: Version
    last_timestamp_ns: int
    marks: list[tuple[int, int]]

    def result(self, *, torn: bool, torn_bytes: int) -> Scan:
        untrailed = self.batch_start if self.offset > self.batch_start else None
        last, stamp = self.last, self.last_timestamp_ns
        return Scan(self.header, torn, last, stamp, self.offset, torn_bytes, untrailed, self.marks)


def _walk(data: Buffer, header: SegmentHeader) -> _Walk:
    # Whole good batches go by quickly; from the first that is not, each unit is looked at by itself.
    offset, epoch, sequence, stamp, marks, due = glide(data, header, INDEX_STEP_BYTES)
    batch_start = offset
    size = len(data)
    reason: str | None = None
    span = 0
    peek, digest = _PEEK.unpack_from, xxh3_64_intdigest
    while offset + RECORD_HEADER_BYTES <= size:
        (
            length,
            check,
            body_check,
            epoch_next,
            sequence_next,
            stamp_next,
            classes,
            vector,
            metadata,
            reserved,
        ) = peek(data, offset)
        start = offset + RECORD_HEADER_BYTES
        if length == 0:
            break
        if length == _MAGIC:
            batch_start, reason, span = _trailer_step(data, offset, header, batch_start)
            if reason is not None:
                break
            offset = batch_start
            continue
        if digest(data[offset + 8 : start], length) & 0xFFFFFFFF != check or reserved:
            reason, span = "a record header's checksum does not match", RECORD_HEADER_BYTES
            break
        stop = start + vector + 2 * classes + metadata
        following = offset + length
        if stop + (start - stop) % 8 != following or following > size:
            reason = "a record's length does not match its content"
            break
        if sequence_next != sequence + 1 or epoch_next < epoch:
            reason = f"record ({epoch_next}, {sequence_next}) cannot follow ({epoch}, {sequence})"
            break
        if digest(data[start:stop]) != body_check or (stop != following and any(data[stop:following])):
            reason, span = "a record's body checksum does not match", length
            break
        if offset >= due:
            marks.append((sequence_next, offset))
            due = offset + INDEX_STEP_BYTES
        epoch, sequence, stamp, offset = epoch_next, sequence_next, stamp_next, following
    else:
        # No record fits into these last bytes; a trailer may.
        if any(data[offset : offset + 4]):
            batch_start, reason, span = _trailer_step(data, offset, header, batch_start)
            offset = offset if reason is not None else batch_start
    return _Walk(header, offset, reason, span, batch_start, Version(epoch, sequence), stamp, marks)


def _trailer_step(
    data: Buffer, offset: int, header: SegmentHeader, start: int
) -> tuple[int, str | None, int]:
    """(where the next batch begins, what is wrong, span) at what must be the trailer of the batch at `start`."""
    found = trailer_at(data, offset, header)
    if found is None:
        return start, "a batch's trailer is bad", TRAILER_BYTES
    if found.start != start or offset == start:
        return start, f"a trailer speaks of a batch from byte {found.start}, not {start}", 0
    return offset + TRAILER_BYTES, None, 0


def _judge(data: Buffer, walked: _Walk) -> Scan:
    """Torn or damaged: `walked` stopped in the last segment before a clean end."""
    offset, batch_start = walked.offset, walked.batch_start
    content_end = _content_end(data, offset)
    content = bytes(data[offset:content_end])
    if not content:
        # Whole records whose trailer never reached the disk.
        return walked.result(torn=True, torn_bytes=0)
    if len(content) - content.count(0) == 1:
        # No sector of a batch holds just one byte that is not zero; a flipped one in the free space does.
        raise WalError(offset + len(content) - 1, "a byte that is not zero in the preallocated space")
    reason, span = walked.reason or "bytes behind the last batch", walked.span
    # A trailer may end in zeros.
    tail = bytes(data[offset : content_end + TRAILER_BYTES])
    if walked.reason is None:
        span = RECORD_HEADER_BYTES
    elif span == RECORD_HEADER_BYTES and resembles_trailer(tail):
        span = TRAILER_BYTES
    later = list(trailers(tail, offset, walked.header))
    if later:
        at, found = later[0]
        if len(later) > 1 or found.start != batch_start:
            raise WalError(offset, f"{reason}, and a later batch is there")
        if content_end > at + TRAILER_BYTES:
            raise WalError(at + TRAILER_BYTES, "bytes behind the last batch")
        if zero_portions(bytes(data[batch_start:at]), batch_start) <= found.zero_portions:
            raise WalError(offset, f"{reason}, and no sector of its batch is missing")
    if not _touches_zero_portion(data, offset, span):
        raise WalError(offset, f"{reason}, and no missing sector explains it")
    return walked.result(torn=True, torn_bytes=len(content))


def _content_end(data: Buffer, offset: int) -> int:
    """Where the last byte that is not zero ends, `offset` when there is none behind it."""
    end = len(data)
    # Comparing bytes goes by memcmp, a copy included; stripping, and comparing a memoryview, looks at each byte.
    while end - offset >= len(_ZEROS) and bytes(data[end - len(_ZEROS) : end]) == _ZEROS:
        end -= len(_ZEROS)
    start = max(offset, end - len(_ZEROS))
    while (kept := len(bytes(data[start:end]).rstrip(b"\0"))) == 0 and start > offset:
        start, end = max(offset, start - len(_ZEROS)), start
    return start + kept


def _touches_zero_portion(data: Buffer, offset: int, span: int) -> bool:
    """Whether a sector that overlaps [offset, offset + span) is all zero (its part from `offset` on)."""
    position, end = offset, min(offset + span, len(data))
    while position < end:
        border = (position // SECTOR_BYTES + 1) * SECTOR_BYTES
        if not any(data[position:border]):
            return True
        position = border
    return False


def walk(data: Buffer, base: int, offset: int) -> Iterator[tuple[int, int, int]]:
    """(sequence, start, stop) of each verified record from `offset` on; ends where data cuts a unit off.

    `data` is the part of a segment from `base` on, with durable bytes only; all offsets are the segment's.
    Raises WalError for a bad unit.
    """
    at, size = offset - base, len(data)
    while at + 4 <= size:
        length = int.from_bytes(data[at : at + 4], "little")
        if length == _MAGIC:
            at += TRAILER_BYTES
            continue
        if length < RECORD_HEADER_BYTES:
            raise WalError(base + at, "no record where one must be")
        if at + RECORD_HEADER_BYTES > size:
            return
        if at + length > size:
            # A flipped length would look like a record that is cut off for ever; the header's check tells.
            head = data[at + 8 : at + RECORD_HEADER_BYTES]
            check = int.from_bytes(data[at + 4 : at + 8], "little")
            if xxh3_64_intdigest(head, length) & 0xFFFFFFFF != check:
                raise WalError(base + at, "a record header's checksum does not match")
            return
        try:
            record = decode(data, at)
        except RecordError as error:
            raise WalError(base + at, str(error)) from error
        yield record.sequence, base + at, base + at + length
        at += length


class Cut(NamedTuple):
    """The beginning of a segment."""

    # What follows the header: whole batches.
    content: bytes
    last: Version
    last_timestamp_ns: int


def cut(data: bytes, header: SegmentHeader, sequence: int) -> Cut:
    """A verified segment up to record `sequence`, or to its header; a batch that is cut in two gets a new trailer."""
    offset = batch_start = SEGMENT_HEADER_BYTES
    last, stamp = Version(header.previous_epoch, header.first_sequence - 1), header.previous_timestamp_ns
    while offset + RECORD_HEADER_BYTES <= len(data):
        length, _, _, epoch, found, found_stamp, *_ = _PEEK.unpack_from(data, offset)
        if length == _MAGIC:
            offset = batch_start = offset + TRAILER_BYTES
            continue
        if length == 0 or found > sequence:
            break
        last, stamp = Version(epoch, found), found_stamp
        offset += length
    content = data[SEGMENT_HEADER_BYTES:offset]
    if offset > batch_start:
        content += encode_trailer(header, batch_start, data[batch_start:offset])
    return Cut(content, last, stamp)


def replay(data: Buffer, offset: int, end: int) -> Iterator[Record]:
    """Decoded, verified records in [offset, end) of a whole segment. Raises WalError."""
    peek = struct.Struct("<I").unpack_from
    while offset < end:
        (length,) = peek(data, offset)
        if length == _MAGIC:
            offset += TRAILER_BYTES
            continue
        try:
            yield decode(data, offset)
        except RecordError as error:
            raise WalError(offset, str(error)) from error
        offset += length
