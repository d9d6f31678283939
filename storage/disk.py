"""The write-ahead log's files. Blocking; the format and what a scan may conclude are in `storage/wal.py`.

One thread at a time appends; `make_ahead`, `read_after`, `drop_before` and `statistics` may be called from others
meanwhile.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from storage import segment as fmt
from storage import wal
from storage.ahead import NextSegment, discard
from storage.errors import DamagedError, DiskFullError, LogGoneError, ReplicaStoppedError, StorageError
from storage.files import FileOps, fsync_directory, is_full, take_back, write_atomically
from storage.records import Record, RecordError, Version, split
from storage.recovery import (
    SEAL_NAME,
    Segment,
    damaged,
    memory,
    mend,
    read_into,
    read_segment,
    records_after,
    recover,
    remove_seal,
    scan_segment,
    shorten,
)
from storage.tail import Tail

__all__ = ["FileOps", "Log", "fsync_directory", "write_atomically"]

_NOTHING = Version(0, 0)
_TAIL_BYTES = 4 << 20
_READ_BYTES = 1 << 20
# A segment that took longer to fill may be followed by a smaller one.
_LONG_NS = 60_000_000_000


class Log:
    """One replica's log. What `append` returned for is on the disk, whole and in order."""

    def __init__(
        self, directory: Path, shard: int, segment_bytes: int, segment_bytes_max: int, ops: FileOps
    ) -> None:
        """Use `Log.open`."""
        self._directory, self._shard, self._ops = directory, shard, ops
        self._segment_bytes = segment_bytes, max(segment_bytes, segment_bytes_max)
        self._lock = threading.Lock()  # guards _segments, their ends and marks, _tail, last
        self._segments: list[Segment] = []
        self._next = NextSegment(directory, segment_bytes, ops)
        self._fd = -1
        self._sealed = False
        # Of recovery, until replay has used it.
        self._scratch: memoryview | None = None
        self._stopped: str | None = None
        self._last_timestamp_ns = 0
        self._torn_bytes = 0
        self._appends = self._appended_bytes = self._rolls = self._refused_full = 0
        self._tail_reads = self._disk_reads = 0
        # (epoch, sequence) of the last durable record.
        self.last = _NOTHING
        self._tail = Tail(0, _TAIL_BYTES)

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        shard: int,
        segment_bytes: int,
        segment_bytes_max: int = 0,
        floor: int = 0,
        after: Version = _NOTHING,
        ops: FileOps | None = None,
    ) -> Log:
        """Recover the log in `directory` (made if missing): a torn tail is zeroed, durably, and reported.

        segment_bytes, segment_bytes_max: segments grow between these with the rate of writing (docs/wal.md).
        floor: a sequence known to have been durable (the checkpoint's); a log that ends before it is damage, and
        segments wholly at or below it are verified only when they are read. after: where a log begins that has no
        segments yet (an imported snapshot's position). Raises DamagedError, FormatError, ForeignDataError,
        DiskFullError, ReplicaStoppedError.
        """
        directory = Path(directory)
        size, most = (fmt.segment_bytes_for(0, one) for one in (segment_bytes, segment_bytes_max))
        log = cls(directory, shard, size, most, ops or FileOps())
        if not directory.is_dir():
            directory.mkdir(parents=True)
            fsync_directory(directory.parent)
        found = recover(directory, shard, floor)
        log._segments, log._sealed, log._scratch = found.segments, found.sealed, found.scratch
        if found.tail is None and after.sequence < floor:
            raise DamagedError(directory, None, f"there is no log, but sequence {floor} was applied")
        try:
            if found.tail is None:
                log.last = after
                log._roll(0)
            else:
                log._adopt(found.tail)
        except BaseException:
            log._close_fd()
            raise
        log._tail = Tail(log.last.sequence, _TAIL_BYTES)
        return log

    def _adopt(self, tail: wal.Scan) -> None:
        """Make the last segment end cleanly at its last whole record, and be ready to write behind it."""
        segment = self._segments[-1]
        self._fd = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
        self.last, self._last_timestamp_ns, self._torn_bytes = (
            tail.last,
            tail.last_timestamp_ns,
            tail.torn_bytes,
        )
        try:
            mend(segment, self._fd, tail, self._ops)
        except OSError as error:
            raise self._stop("repairing the log's end", error) from error

    @property
    def first_sequence(self) -> int:
        """Sequence of the oldest record that is kept (last + 1 when there is none)."""
        with self._lock:
            return self._segments[0].header.first_sequence

    @property
    def last_timestamp_ns(self) -> int:
        """Of the last record; 0 when there is none, or it came with a snapshot."""
        return self._last_timestamp_ns

    def append(self, records: Sequence[bytes]) -> None:
        """Write encoded records durably, with one call for all of them.

        Raises DiskFullError (nothing changed; works again when there is room), ReplicaStoppedError (outcome unknown;
        every later append is refused, too), records.RecordError (they do not follow `last`; nothing changed).
        """
        self._check_running()
        if records:
            self.append_run(fmt.joined(records, self.last))

    def append_run(self, run: fmt.Run) -> None:
        """As `append`, of verified records that are in one piece already."""
        self._check_running()
        if run.first.sequence != self.last.sequence + 1 or run.first.epoch < self.last.epoch:
            raise RecordError(f"{tuple(run.first)} cannot follow {tuple(self.last)}")
        size = len(run.data)
        if self._sealed:
            self._unseal()
        segment = self._segments[-1]
        assert segment.end is not None
        if segment.end + size + fmt.TRAILER_BYTES > segment.header.segment_bytes:
            self._roll(size)
            segment = self._segments[-1]
        start = segment.end
        assert start is not None
        self._write(segment, start, run.data)
        with self._lock:
            if not segment.marks or start - segment.marks[-1][1] >= wal.INDEX_STEP_BYTES:
                segment.marks.append((self.last.sequence + 1, start))
            segment.end = start + size + fmt.TRAILER_BYTES
            self._tail.extend(run.data, run.starts)
            self.last, self._last_timestamp_ns = run.last, run.timestamp_ns
            self._appends += 1
            self._appended_bytes += size

    def _write(self, segment: Segment, start: int, batch: bytes) -> None:
        trailer = fmt.encode_trailer(segment.header, start, batch)
        try:
            try:
                self._ops.write_durably(self._fd, (batch, trailer), start)
            except OSError as error:
                if not is_full(error):
                    raise
                take_back(self._ops, self._fd, (batch, trailer), start, error)
                raise self._full(error) from error
        except OSError as error:
            raise self._stop("writing the log", error) from error

    def cut(self, sequence: int, reset: Callable[[Version], None]) -> None:
        """The log ends at `sequence`, which is before its last and not before its first record. In append's thread.

        At each moment what is on disk is a whole log. `reset` is called with (epoch, sequence) of the new end when
        there is room for it, and makes durable that nothing behind it counts as applied. Raises what it raises,
        DamagedError, DiskFullError (nothing has changed), ReplicaStoppedError.
        """
        self._check_running()
        if self._sealed:
            self._unseal()
        firsts = [segment.header.first_sequence for segment in self._segments]
        position = max(0, bisect_right(firsts, sequence) - 1)
        kept = self._segments[position]
        begun = shorten(kept, sequence, last_segment=position + 1 == len(firsts))
        try:
            temporary, fd = self._next.take(kept.header, begun.content)
        except OSError as error:
            raise (self._full(error) if is_full(error) else self._stop("cutting the log", error)) from error
        try:
            reset(begun.last)
        except BaseException:
            discard(temporary, fd)
            raise
        marks = [mark for mark in kept.marks if mark[0] <= sequence]
        # Until it is done the files say something else: whatever comes between must leave no seal and no append.
        self._stopped = f"cutting the log in {self._directory} was not finished; restart this node"
        with self._lock:
            # Before the files: a reader that still has the old segment is told that the log was cut.
            gone = self._segments[position + 1 :]
            end = fmt.HEADER_BYTES + len(begun.content)
            self._segments[position:] = [Segment(kept.path, kept.header, end, marks)]
            self.last, self._last_timestamp_ns = begun.last, begun.last_timestamp_ns
            self._tail.cut(sequence)
            self._close_fd()
            self._fd = fd
        try:
            for segment in reversed(gone):
                segment.path.unlink()
                self._ops.sync_directory(self._directory)
            os.replace(temporary, kept.path)
            self._ops.sync_directory(self._directory)
        except OSError as error:
            raise self._stop("cutting the log", error) from error
        self._stopped = None

    def _roll(self, batch_bytes: int) -> None:
        """A new last segment with room for `batch_bytes`. Every earlier byte is durable, so only it can be torn."""
        self._fit_size()
        try:
            try:
                header, (temporary, fd) = self._take_next(batch_bytes)
            except OSError as error:
                if not is_full(error) or self._next.segment_bytes == self._segment_bytes[0]:
                    raise
                # There may be room for one that has not grown.
                self._next.segment_bytes = self._segment_bytes[0]
                header, (temporary, fd) = self._take_next(batch_bytes)
        except OSError as error:
            # The new file is not part of the log yet, so nothing is in doubt: it can be tried again if it was room.
            raise (self._full(error) if is_full(error) else self._stop("making a segment", error)) from error
        first = header.first_sequence
        path = self._directory / fmt.segment_name(first)
        try:
            # An empty last segment may be replaced by a greater one of the same name.
            os.replace(temporary, path)
            self._ops.sync_directory(self._directory)
        except OSError as error:
            os.close(fd)
            raise self._stop("naming a segment", error) from error
        self._close_fd()
        with self._lock:
            if self._segments and self._segments[-1].header.first_sequence == first:
                self._segments.pop()
            self._fd = fd
            self._segments.append(Segment(path, header, fmt.HEADER_BYTES))
            self._rolls += 1

    def _take_next(self, batch_bytes: int) -> tuple[fmt.SegmentHeader, tuple[Path, int]]:
        """Header and file of the next segment, with room for `batch_bytes`. Raises OSError; then nothing is left."""
        size = fmt.segment_bytes_for(batch_bytes, self._next.ready_bytes or self._next.segment_bytes)
        salt = int.from_bytes(os.urandom(8), "little")
        first, epoch = self.last.sequence + 1, self.last.epoch
        header = fmt.SegmentHeader(self._shard, first, size, salt, epoch, self._last_timestamp_ns)
        return header, self._next.take(header)

    def _fit_size(self) -> None:
        """Twice as large a segment when the last one was full before the next was ready; half, when it lasted long."""
        if not self._segments or (self._segments[-1].end or 0) <= fmt.HEADER_BYTES:
            return
        least, most = self._segment_bytes
        lasted_ns = self._last_timestamp_ns - self._segments[-1].header.previous_timestamp_ns
        if lasted_ns > _LONG_NS:
            self._next.segment_bytes = max(least, self._next.segment_bytes // 2)
        elif not self._next.ready_bytes:
            self._next.segment_bytes = min(most, 2 * self._next.segment_bytes)

    @property
    def ahead_due(self) -> bool:
        """Whether `make_ahead` has something to do: once a segment is written to, the next one will be wanted."""
        end = self._segments[-1].end
        return (
            not self._next.ready_bytes
            and self._stopped is None
            and end is not None
            and end > fmt.HEADER_BYTES
        )

    def make_ahead(self) -> None:
        """The next segment's file, so that `append` need not make it. Blocks long; for another thread than append's.

        Does nothing when there is no room: whether that matters, `append` will know. Raises ReplicaStoppedError.
        """
        try:
            self._next.make_ahead()
        except OSError as error:
            if not is_full(error):
                raise self._stop("making a segment", error) from error

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise ReplicaStoppedError(self._stopped)

    def _unseal(self) -> None:
        try:
            remove_seal(self._directory)
        except OSError as error:
            raise self._stop("removing the seal", error) from error
        self._sealed = False

    def _full(self, error: OSError) -> StorageError:
        self._refused_full += 1
        return DiskFullError(
            f"no room for the log in {self._directory} ({error.strerror}); free some, then write again"
        )

    def _stop(self, what: str, error: OSError) -> StorageError:
        self._stopped = (
            f"{what} failed in {self._directory} ({error.strerror}); check the disk, then restart this node"
        )
        return ReplicaStoppedError(self._stopped)

    def read_after(self, sequence: int, max_bytes: int) -> bytes:
        """Whole raw records after `sequence`, durable ones only: up to max_bytes, but one at least if there is one.

        b"" when there is none. Raises LogGoneError when the log no longer reaches back, DamagedError.
        """
        with self._lock:
            if sequence >= self.last.sequence:
                return b""
            kept = self._tail.after(sequence, max_bytes)
            if kept is not None:
                self._tail_reads += 1
            else:
                self._disk_reads += 1
                firsts = [segment.header.first_sequence for segment in self._segments]
                position = bisect_right(firsts, sequence + 1) - 1
                if position < 0:
                    raise LogGoneError(
                        f"the log begins at sequence {firsts[0]}, after {sequence} was asked for"
                    )
                segment = self._segments[position]
        return self._read(segment, sequence, max_bytes) if kept is None else kept

    def _read(self, segment: Segment, sequence: int, max_bytes: int) -> bytes:
        try:
            if segment.end is None:
                scan_segment(segment, last_segment=False)
            with self._lock:
                end, marks = segment.end, segment.marks
                position = bisect_right(marks, (sequence + 1, fmt.SEGMENT_BYTES_MAX)) - 1
                offset = marks[position][1] if position >= 0 else fmt.HEADER_BYTES
            assert end is not None
            with segment.path.open("rb", buffering=0) as file:
                return records_after(file.fileno(), offset, end, sequence, max_bytes)
        except fmt.WalError as error:
            with self._lock:
                cut = segment not in self._segments
            if cut:
                raise LogGoneError(f"the log was cut before sequence {sequence + 1} just now") from error
            raise damaged(segment.path, error) from error
        except FileNotFoundError as error:
            raise LogGoneError(f"the log was dropped up to sequence {sequence + 1} just now") from error
        except OSError as error:
            raise DamagedError(segment.path, None, f"it cannot be read ({error.strerror})") from error

    def tail(self, after: int) -> Iterator[tuple[bytes, Record]]:
        """Records after `after` to the last, as bytes and as values. In append's thread. Raises as `read_after`."""
        while data := self.read_after(after, _READ_BYTES):
            for blob, record in split(data):
                yield blob, record
                after = record.sequence

    def spans(self, after: int, *, reused: bool = False) -> Iterator[tuple[fmt.Buffer, int, int]]:
        """(segment's bytes, offset, end): where records after `after` lie, with a few before them in front.

        reused: the bytes of one are good until the next but one is asked for; fresh memory for each costs as much as reading.
        Each segment was verified whole since the log was opened. Raises DamagedError.
        """
        with self._lock:
            segments, last = list(self._segments), self.last.sequence
        if after + 1 < segments[0].header.first_sequence or after > last:
            reason = f"it holds {segments[0].header.first_sequence} to {last}, not what follows {after}"
            raise DamagedError(segments[0].path, None, reason)
        firsts = [segment.header.first_sequence for segment in segments]
        segments = segments[max(0, bisect_right(firsts, after + 1) - 1) :]
        scratch = [memory(segments) for _ in segments[:2]] if reused else []
        if scratch and self._scratch is not None and len(self._scratch) >= len(scratch[0]):
            scratch[0] = self._scratch
        self._scratch = None
        for position, segment in enumerate(segments):
            if segment.end is None:
                scan_segment(segment, last_segment=False)
            assert segment.end is not None
            found = bisect_right(segment.marks, (after + 1, fmt.SEGMENT_BYTES_MAX)) - 1
            offset = segment.marks[found][1] if found >= 0 else fmt.HEADER_BYTES
            data = read_into(segment, scratch[position % 2]) if reused else read_segment(segment)
            yield data, offset, segment.end

    def drop_before(self, sequence: int, older_than_ns: int) -> int:
        """Remove whole segments whose records are all below `sequence` and stamped before older_than_ns; how many.

        The last segment stays, and the one with the last record: a pull names that record. Raises OSError; then
        some may be gone, oldest first.
        """
        dropped = 0
        while True:
            with self._lock:
                if len(self._segments) < 2:
                    break
                following = self._segments[1].header
                if (
                    following.first_sequence > min(sequence, self.last.sequence)
                    or following.previous_timestamp_ns >= older_than_ns
                ):
                    break
                oldest = self._segments.pop(0)
            oldest.path.unlink(missing_ok=True)
            dropped += 1
        if dropped:
            self._ops.sync_directory(self._directory)
        return dropped

    def newest(self, size: int) -> int:
        """The first sequence of the oldest of those newest segments that are `size` bytes together, the last one at least."""
        with self._lock:
            headers = [segment.header for segment in self._segments]
        first = headers[-1].first_sequence
        for header in reversed(headers):
            size -= header.segment_bytes
            if size < 0:
                break
            first = header.first_sequence
        return first

    def aged(self, older_than_ns: int) -> Version:
        """A place in the log up to which everything is stamped before that, or older than the log itself."""
        with self._lock:
            if 0 < self._last_timestamp_ns < older_than_ns:
                return self.last
            headers = [segment.header for segment in self._segments]
        old = [header for header in headers[1:] if header.previous_timestamp_ns < older_than_ns]
        newest = (headers[:1] + old)[-1]
        return Version(newest.previous_epoch, newest.first_sequence - 1)

    def statistics(self) -> dict[str, Any]:
        with self._lock:
            return {
                "first_sequence": self._segments[0].header.first_sequence,
                "last_sequence": self.last.sequence,
                "segments": len(self._segments),
                "bytes": sum(segment.header.segment_bytes for segment in self._segments),
                "appends": self._appends,
                "appended_bytes": self._appended_bytes,
                "segments_made": self._rolls,
                "refused_disk_full": self._refused_full,
                "tail_reads": self._tail_reads,
                "disk_reads": self._disk_reads,
                "tail_bytes": self._tail.bytes,
                "torn_bytes": self._torn_bytes,
                "stopped": self._stopped is not None,
            }

    def close(self) -> None:
        """Close the files and write the seal: from then on any shortfall is damage. Raises OSError."""
        if self._fd < 0:
            return
        self._close_fd()
        self._next.close()
        if self._stopped is None and not self._sealed:
            seal = fmt.encode_seal(fmt.Seal(self._shard, self.last))
            write_atomically(self._directory / SEAL_NAME, seal)
        self._stopped = self._stopped or "the log is closed"

    def release(self) -> None:
        """Close the files and touch no name: the directory has become another log's."""
        self._close_fd()
        self._next.release()
        self._stopped = self._stopped or "the log is closed"

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
