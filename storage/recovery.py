"""Reading a log's files: which segments there are, that they follow each other, where the log ends. Blocking."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from storage import segment as fmt
from storage import wal
from storage.errors import DamagedError, ForeignDataError, FormatError
from storage.files import FileOps, fsync_directory
from storage.records import RECORD_BYTES_MAX

SEAL_NAME = "SEAL"
_READ_BYTES = 64 << 10


@dataclass(slots=True)
class Segment:
    """One segment file. `end`: offset behind its last durable byte; None until somebody has scanned it."""

    path: Path
    header: fmt.SegmentHeader
    end: int | None = None
    # Sparse (sequence, offset) pairs, ascending.
    marks: list[tuple[int, int]] = field(default_factory=list)


class Recovered(NamedTuple):
    segments: list[Segment]
    # Of the last segment; None when there is no segment.
    tail: wal.Scan | None
    sealed: bool
    # Memory that holds any one of them; for whoever reads them next.
    scratch: memoryview


def damaged(path: Path, error: fmt.WalError) -> DamagedError | FormatError:
    if isinstance(error, fmt.UnknownFormatError):
        return FormatError(f"{path}: {error.reason}; start the build that wrote it, or rebuild this replica")
    return DamagedError(path, error.offset, error.reason)


def recover(directory: Path, shard: int, floor: int) -> Recovered:
    """Find and verify the log in `directory`. Every segment with records after `floor` is scanned, and the last one.

    Raises DamagedError (also for a log that ends before `floor` or before its seal), FormatError, ForeignDataError.
    """
    for leftover in directory.glob("*.tmp"):
        leftover.unlink()
    seal = _read_seal(directory / SEAL_NAME)
    segments = [_read_header(path) for path in sorted(directory.glob("*.wal"))]
    for owner in (*(s.header.shard for s in segments), *((seal.shard,) if seal else ())):
        if owner != shard:
            raise ForeignDataError(f"{directory} is the log of shard {owner}, not of shard {shard}")
    tail: wal.Scan | None = None
    # Headers and sizes of files have been found to agree.
    scratch = memory(segments)
    for position, segment in enumerate(segments):
        following = segments[position + 1] if position + 1 < len(segments) else None
        if following is None or following.header.first_sequence > floor + 1:
            tail = scan_segment(segment, last_segment=following is None, scratch=scratch)
            if following is not None:
                _check_border(tail, segment, following)
        elif following.header.first_sequence <= segment.header.first_sequence:
            raise DamagedError(following.path, 0, "it does not follow the segment before it")
    last = tail.last if tail else None
    if last is not None and last.sequence < floor:
        reason = f"the log ends at sequence {last.sequence}, but {floor} was applied"
        raise DamagedError(segments[-1].path, tail.end if tail else None, reason)
    if seal is not None:
        _check_seal(seal, directory, tail)
    return Recovered(segments, tail, seal is not None, scratch)


def read_segment(segment: Segment) -> bytes:
    """The whole file. Raises DamagedError, also when the disk cannot read it."""
    try:
        return segment.path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(segment.path, None, f"it cannot be read ({error.strerror})") from error


def memory(segments: Sequence[Segment]) -> memoryview:
    """Room for the bytes of any one of them, not touched yet: to fill a large one with zeros costs as much as reading it. Of the
    kernel, and not by numpy, which asks for huge pages: those are dear to find in a machine that has run for a while."""
    size = max((segment.header.segment_bytes for segment in segments), default=1)
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def read_into(segment: Segment, scratch: memoryview) -> memoryview:
    """The whole file, in `scratch`, which is long enough: fresh memory for each costs more than the copy."""
    try:
        with segment.path.open("rb", buffering=0) as file:
            size = 0
            while count := file.readinto(scratch[size:]):
                size += count
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(segment.path, None, f"it cannot be read ({error.strerror})") from error
    return scratch[:size]


def scan_segment(segment: Segment, *, last_segment: bool, scratch: memoryview | None = None) -> wal.Scan:
    data = read_segment(segment) if scratch is None else read_into(segment, scratch)
    try:
        scanned = wal.scan(data, last_segment=last_segment)
    except fmt.WalError as error:
        raise damaged(segment.path, error) from error
    segment.end, segment.marks = scanned.end, scanned.marks
    return scanned


def mend(segment: Segment, fd: int, tail: wal.Scan, ops: FileOps) -> None:
    """Make the last segment end cleanly at its last whole record. Raises OSError, DamagedError."""
    if tail.torn_bytes:
        # Durable before the trailer: else a crash could leave a new trailer before old bytes.
        ops.zero(fd, tail.end, tail.header.segment_bytes - tail.end)
        ops.sync_data(fd)
    if tail.untrailed_from is not None:
        start = tail.untrailed_from
        batch = os.pread(fd, tail.end - start, start)
        trailer = fmt.encode_trailer(tail.header, start, batch)
        if tail.end + len(trailer) > tail.header.segment_bytes:
            raise DamagedError(segment.path, tail.end, "no room for the last batch's trailer")
        ops.write(fd, (trailer,), tail.end)
        segment.end = tail.end + len(trailer)
    # Whole records of a process that was killed before its fdatasync count as durable only from here on.
    ops.sync_data(fd)


def shorten(segment: Segment, sequence: int, *, last_segment: bool) -> wal.Cut:
    """Its beginning up to `sequence`; all of it is verified first. Raises DamagedError."""
    data = read_segment(segment)
    try:
        if wal.scan(data, last_segment=last_segment).torn:
            raise DamagedError(segment.path, None, "what was durable at its end is gone")
    except fmt.WalError as error:
        raise damaged(segment.path, error) from error
    return wal.cut(data, segment.header, sequence)


def _read_header(path: Path) -> Segment:
    try:
        with path.open("rb") as file:
            header = fmt.parse_header(file.read(fmt.HEADER_BYTES))
            size = os.fstat(file.fileno()).st_size
    except fmt.WalError as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise DamagedError(path, 0, f"it cannot be read ({error.strerror})") from error
    if path.name != fmt.segment_name(header.first_sequence):
        raise DamagedError(path, 0, f"its header says that it begins at sequence {header.first_sequence}")
    if size != header.segment_bytes:
        raise DamagedError(path, size, f"the file has {size} bytes, its header says {header.segment_bytes}")
    return Segment(path, header)


def _check_border(scanned: wal.Scan, segment: Segment, following: Segment) -> None:
    header = following.header
    found = (scanned.last.sequence + 1, scanned.last.epoch, scanned.last_timestamp_ns)
    if found != (header.first_sequence, header.previous_epoch, header.previous_timestamp_ns):
        reason = (
            f"it ends at sequence {scanned.last.sequence}, the next segment begins at {header.first_sequence}"
        )
        raise DamagedError(segment.path, scanned.end, reason)


def _read_seal(path: Path) -> fmt.Seal | None:
    try:
        return fmt.parse_seal(path.read_bytes())
    except FileNotFoundError:
        return None
    except fmt.WalError as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise DamagedError(path, None, f"it cannot be read ({error.strerror})") from error


def _check_seal(seal: fmt.Seal, directory: Path, tail: wal.Scan | None) -> None:
    if tail is None:
        raise DamagedError(
            directory, None, f"it was closed at sequence {seal.last.sequence} and has no segment now"
        )
    path = directory / fmt.segment_name(tail.header.first_sequence)
    if tail.torn:
        raise DamagedError(path, tail.end, "it was closed cleanly, so its last batch cannot be torn")
    if tail.last != seal.last:
        reason = f"it was closed at {tuple(seal.last)} and ends at {tuple(tail.last)} now"
        raise DamagedError(path, tail.end, reason)


def remove_seal(directory: Path) -> None:
    """Durably, before the first write after an open. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        (directory / SEAL_NAME).unlink()
    fsync_directory(directory)


def records_after(fd: int, offset: int, end: int, sequence: int, max_bytes: int) -> bytes:
    """Records after `sequence` from a segment's durable part [offset, end). Raises WalError, OSError."""
    pieces: list[bytes] = []
    size, want = 0, _READ_BYTES + min(max_bytes, RECORD_BYTES_MAX)
    while offset < end:
        data = os.pread(fd, min(want, end - offset), offset)
        at = offset
        for found, start, stop in wal.walk(data, offset, offset):
            at = stop
            if found <= sequence:
                continue
            size += stop - start
            if pieces and size > max_bytes:
                return b"".join(pieces)
            pieces.append(data[start - offset : stop - offset])
        if at == offset:
            if offset + len(data) >= end:
                break
            want = 2 * RECORD_BYTES_MAX
        offset = at
    if not pieces:
        raise fmt.WalError(offset, f"the record after sequence {sequence} is not where it was written")
    return b"".join(pieces)
