"""Many records at once, their header fields as columns by numpy: for the log's scan, replay and streams. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from storage.records import HEADER_BYTES, ID_MAX, Kind, Operation, Record, RecordError, Version, decode
from storage.segment import HEADER_BYTES as SEGMENT_HEADER_BYTES
from storage.segment import TRAILER_BYTES, TRAILER_MAGICS, Buffer, Run, SegmentHeader, trailer_at

_HEADER = np.dtype(
    [
        ("length", "<u4"),
        ("header_check", "<u4"),
        ("body_check", "<u8"),
        ("epoch", "<u8"),
        ("sequence", "<u8"),
        ("version_epoch", "<u8"),
        ("version_sequence", "<u8"),
        ("timestamp_ns", "<u8"),
        ("write_id", "u1", 16),
        ("id", "<u8"),
        ("operation", "u1"),
        ("kind", "u1"),
        ("class_count", "<u2"),
        ("vector_bytes", "<u4"),
        ("metadata_bytes", "<u4"),
        ("reserved", "<u4"),
    ]
)
_LENGTH = struct.Struct("<I")
_WITHIN = np.arange(HEADER_BYTES // 8)
# Some thousands at a time: enough for numpy to pay, few enough to stay in cache.
_GLIDE_RECORDS = 2_048

assert _HEADER.itemsize == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Columns:
    """Records at `starts` int64 [n] of `data`; `headers` is a structured array [n] of their header fields."""

    data: Buffer
    starts: npt.NDArray[np.int64]
    headers: npt.NDArray[np.void]

    def __len__(self) -> int:
        return len(self.starts)

    def of(self, kind: Kind) -> Columns:
        """Those of one kind."""
        mine = self.headers["kind"] == kind
        return self if mine.all() else self.at(mine)

    def at(self, chosen: npt.NDArray[np.bool_]) -> Columns:
        """Those that bool [n] chooses."""
        return Columns(self.data, self.starts[chosen], self.headers[chosen])

    def between(self, begin: int, end: int) -> Columns:
        """Those from place `begin` to before place `end`."""
        return Columns(self.data, self.starts[begin:end], self.headers[begin:end])

    def versions(self) -> set[tuple[int, int]]:
        head = self.headers
        return set(zip(head["version_epoch"].tolist(), head["version_sequence"].tolist(), strict=True))

    def records(self) -> list[Record]:
        """One value each: for the few that are not worth columns."""
        return [decode(self.data, start) for start in self.starts.tolist()]

    def size_bytes(self) -> int:
        return int(self.headers["length"].sum())

    @property
    def first(self) -> Version:
        """(epoch, sequence) of the first; there must be one."""
        return Version(int(self.headers["epoch"][0]), int(self.headers["sequence"][0]))

    @property
    def last(self) -> Version:
        """(epoch, sequence) of the last; there must be one."""
        return Version(int(self.headers["epoch"][-1]), int(self.headers["sequence"][-1]))

    @property
    def puts(self) -> int:
        return int((self.headers["operation"] == Operation.PUT).sum())

    def run(self) -> Run:
        """For the log, of what `verified` gave."""
        assert isinstance(self.data, bytes)
        stamp = int(self.headers["timestamp_ns"][-1])
        return Run(self.data, self.starts.tolist(), self.first, self.last, stamp)


def columns(data: Buffer, offset: int, end: int, after: int, batch: int) -> Iterator[Columns]:
    """Records with sequence > after in data[offset:end], at most `batch` at a time, in order.

    Only for bytes that have been verified: the log is, whole, when it is opened (`Log.spans`).
    """
    peek, magic = _LENGTH.unpack_from, TRAILER_MAGICS[0]
    words = np.frombuffer(data, "<u8", len(data) // 8)
    while offset < end:
        found: list[int] = []
        while offset < end and len(found) < batch:
            (length,) = peek(data, offset)
            if length == magic:
                offset += TRAILER_BYTES
            else:
                found.append(offset)
                offset += length
        starts = np.array(found, np.int64)
        headers = _headers(words, starts)
        kept = headers["sequence"] > after
        if not kept.all():
            starts, headers = starts[kept], headers[kept]
        if len(starts):
            yield Columns(data, starts, headers)


def _headers(words: npt.NDArray[np.uint64], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    # Records and trailers are multiples of 8 long: gathering words is cheaper than gathering bytes.
    gathered: npt.NDArray[np.void] = words[(starts >> 3)[:, None] + _WITHIN].view(_HEADER).reshape(-1)
    return gathered


class Glided(NamedTuple):
    """How far a segment is whole batches of good records; `marks` are sparse (sequence, offset) pairs."""

    offset: int
    epoch: int
    sequence: int
    timestamp_ns: int
    marks: list[tuple[int, int]]
    mark_due: int


def glide(data: Buffer, header: SegmentHeader, mark_step: int) -> Glided:
    """Passes quickly over what is good from the segment's start, some batches at a time, and stops before what is not.

    What follows is for a slower walk to judge: there may be more good records, the end, or damage.
    """
    first = header.first_sequence - 1
    at = Glided(
        SEGMENT_HEADER_BYTES,
        header.previous_epoch,
        first,
        header.previous_timestamp_ns,
        [],
        SEGMENT_HEADER_BYTES,
    )
    words = np.frombuffer(data, "<u8", len(data) // 8)
    while True:
        starts, end = _batches(data, at.offset, header)
        if not starts:
            return at
        places = np.array(starts, np.int64)
        found = _headers(words, places)
        if not (_ordered(found, at.epoch, at.sequence + 1) and _sound(data, words, places, found)):
            return at
        marks, due = list(at.marks), at.mark_due
        while (place := int(np.searchsorted(places, due))) < len(places):
            marks.append((int(found["sequence"][place]), starts[place]))
            due = starts[place] + mark_step
        last = found[-1]
        stamp = int(last["timestamp_ns"])
        at = Glided(end, int(last["epoch"]), int(last["sequence"]), stamp, marks, due)


def _batches(data: Buffer, offset: int, header: SegmentHeader) -> tuple[list[int], int]:
    """Offsets of the records of some batches with good trailers from `offset` on, and where these end."""
    peek, magic, size = _LENGTH.unpack_from, TRAILER_MAGICS[0], len(data)
    starts: list[int] = []
    begin = end = offset
    whole = 0
    while offset + HEADER_BYTES <= size and whole < _GLIDE_RECORDS:
        (length,) = peek(data, offset)
        if length == magic:
            trailer = trailer_at(data, offset, header)
            if trailer is None or trailer.start != begin or offset == begin:
                break
            offset += TRAILER_BYTES
            begin = end = offset
            whole = len(starts)
        elif length < HEADER_BYTES or length % 8 or offset + length > size:
            break
        else:
            starts.append(offset)
            offset += length
    return starts[:whole], end


def offsets(data: bytes) -> list[int]:
    """Where each of the records begins that stand one behind the other in `data`, by their lengths. Raises RecordError."""
    size, peek = len(data), _LENGTH.unpack_from
    starts: list[int] = []
    offset = 0
    while offset + HEADER_BYTES <= size:
        (length,) = peek(data, offset)
        if length < HEADER_BYTES or length % 8:
            raise RecordError(f"no record has {length} bytes")
        starts.append(offset)
        offset += length
    if offset != size:
        raise RecordError("a record is not whole")
    return starts


def verified(data: bytes, begins: Sequence[int]) -> Columns:
    """The records of one log that `offsets` found, at least one. Raises RecordError.

    Everything is verified that `records.decode` verifies of each, and that they follow each other without gaps.
    """
    words = np.frombuffer(data, "<u8")
    starts = np.array(begins, np.int64)
    headers = _headers(words, starts)
    if not _ordered(headers, 0, int(headers["sequence"][0])):
        raise RecordError("records of a log do not follow each other so")
    if not _sound(data, words, starts, headers):
        raise RecordError("a checksum, a length or a padding does not match")
    if not _known(headers):
        raise RecordError("an unknown operation or kind")
    return Columns(data, starts, headers)


def _known(headers: npt.NDArray[np.void]) -> bool:
    operations = headers["operation"]
    return bool(
        operations.min() >= Operation.PUT
        and operations.max() <= Operation.MARK
        and headers["kind"].max() <= Kind.USER
    )


def _ordered(headers: npt.NDArray[np.void], epoch: int, first: int) -> bool:
    """Whether these follow one of `epoch`, from sequence `first` on."""
    epochs, size = headers["epoch"], len(headers)
    return not (
        (headers["sequence"] - np.uint64(first & ID_MAX) != np.arange(size, dtype=np.uint64)).any()
        or int(epochs[0]) < epoch
        or (epochs[1:] < epochs[:-1]).any()
    )


def _sound(
    data: Buffer,
    words: npt.NDArray[np.uint64],
    starts: npt.NDArray[np.int64],
    headers: npt.NDArray[np.void],
) -> bool:
    """Whether every length, checksum and padding is right."""
    lengths = headers["length"].astype(np.int64)
    body = headers["vector_bytes"].astype(np.int64) + headers["metadata_bytes"]
    body += 2 * headers["class_count"].astype(np.int64)
    padding = -body % 8
    last_words = words[((starts + lengths) >> 3) - 1]
    spare = last_words >> (64 - 8 * padding).astype(np.uint64) % np.uint64(64)
    if (
        headers["reserved"].any()
        or (lengths != HEADER_BYTES + body + padding).any()
        or spare[padding > 0].any()
    ):
        return False
    view, digest = memoryview(data), xxh3_64_intdigest
    begins = starts.tolist()
    checks = [
        digest(view[at + 8 : at + HEADER_BYTES], length) & 0xFFFFFFFF
        for at, length in zip(begins, lengths.tolist(), strict=True)
    ]
    if checks != headers["header_check"].tolist():
        return False
    ends = (starts + HEADER_BYTES + body).tolist()
    bodies = [digest(view[at + HEADER_BYTES : end]) for at, end in zip(begins, ends, strict=True)]
    return bool(bodies == headers["body_check"].tolist())
