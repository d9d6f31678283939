"""Many logged records as columns, for replay: no object per record, a header's fields by numpy. Pure.

Only for bytes that have been verified: the log is, whole, when it is opened (`Log.spans`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.records import HEADER_BYTES, Kind
from storage.segment import TRAILER_BYTES, TRAILER_MAGICS

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

assert _HEADER.itemsize == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Columns:
    """Records at `starts` int64 [n] of `data`; `headers` is a structured array [n] of their header fields."""

    data: bytes
    starts: npt.NDArray[np.int64]
    headers: npt.NDArray[np.void]

    def __len__(self) -> int:
        return len(self.starts)

    def of(self, kind: Kind) -> Columns:
        """Those of one kind."""
        mine = self.headers["kind"] == kind
        return self if mine.all() else Columns(self.data, self.starts[mine], self.headers[mine])

    def size_bytes(self) -> int:
        return int(self.headers["length"].sum())


def columns(data: bytes, offset: int, end: int, after: int, batch: int) -> Iterator[Columns]:
    """Records with sequence > after in data[offset:end], at most `batch` at a time, in order."""
    peek, magic = _LENGTH.unpack_from, TRAILER_MAGICS[0]
    # Records and trailers are multiples of 8 long: gathering words is cheaper than gathering bytes.
    words, within = np.frombuffer(data, "<u8", len(data) // 8), np.arange(HEADER_BYTES // 8)
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
        headers = words[(starts >> 3)[:, None] + within].view(_HEADER).reshape(-1)
        kept = headers["sequence"] > after
        if not kept.all():
            starts, headers = starts[kept], headers[kept]
        if len(starts):
            yield Columns(data, starts, headers)
