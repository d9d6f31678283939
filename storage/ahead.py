"""Files for the log's segments; the next one is made ahead, its zeros written and not just allocated.

A write into space that is only allocated makes the file system's journal note, at each fdatasync, that these blocks
now hold data. Where zeros were written before, an fdatasync writes the data and nothing else (docs/wal.md). To a
reader both are the same zeros.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import NamedTuple

from storage import segment as fmt
from storage.files import FileOps

# Made durable in pieces: an append's fdatasync meanwhile waits behind one piece, not behind a segment.
_PIECE_BYTES = 1 << 20


class _Ready(NamedTuple):
    path: Path
    fd: int
    segment_bytes: int


class NextSegment:
    """`make_ahead` and `take` may come from two threads. Names end in `.tmp`: recovery removes what was not taken."""

    def __init__(self, directory: Path, segment_bytes: int, ops: FileOps) -> None:
        self._directory, self._ops = directory, ops
        # Of the next file that is made; above the first value it has grown.
        self.segment_bytes = self._grown_above = segment_bytes
        self._lock = threading.Lock()  # guards _ready and _made
        self._ready: _Ready | None = None
        self._made = 0

    @property
    def ready_bytes(self) -> int:
        """Size of the file that is ready, 0 when none is."""
        ready = self._ready
        return 0 if ready is None else ready.segment_bytes

    def make_ahead(self) -> None:
        """A file of `segment_bytes` durable zeros; only allocated when it has grown: then batches are large, and to write each
        byte twice costs more than the journal's commits. Raises OSError; then nothing is left."""
        if self._ready is not None:
            return
        made = self._create(self.segment_bytes)
        try:
            self._ops.allocate(made.fd, made.segment_bytes)
            written = made.segment_bytes if made.segment_bytes <= self._grown_above else 0
            for offset in range(0, written, _PIECE_BYTES):
                self._ops.zero(made.fd, offset, min(_PIECE_BYTES, made.segment_bytes - offset))
                self._ops.sync_data(made.fd)
        except BaseException:
            discard(made.path, made.fd)
            raise
        with self._lock:
            self._ready = made

    def take(self, header: fmt.SegmentHeader, content: bytes = b"") -> tuple[Path, int]:
        """(path, open fd) of a durable file of `header`, `content` and zeros, for the caller to give its name.

        One that is only allocated when none is ready. Raises OSError; then nothing is left.
        """
        with self._lock:
            ready = self._ready
            if ready is not None and header.segment_bytes == ready.segment_bytes:
                self._ready = None
            else:
                ready = None
        taken = ready or self._create(header.segment_bytes)
        try:
            if ready is None:
                self._ops.allocate(taken.fd, header.segment_bytes)
            self._ops.write(taken.fd, (fmt.encode_header(header), content), 0)
            self._ops.sync(taken.fd)
        except BaseException:
            discard(taken.path, taken.fd)
            raise
        return taken.path, taken.fd

    def _create(self, segment_bytes: int) -> _Ready:
        with self._lock:
            self._made += 1
            path = self._directory / f"next-{self._made}.tmp"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        return _Ready(path, fd, segment_bytes)

    def close(self) -> None:
        with self._lock:
            ready, self._ready = self._ready, None
        if ready is not None:
            discard(ready.path, ready.fd)

    def release(self) -> None:
        """As `close`, when the directory has become another log's: what has its name there is not ours."""
        with self._lock:
            ready, self._ready = self._ready, None
        if ready is not None:
            os.close(ready.fd)


def discard(path: Path, fd: int) -> None:
    """Of a file that is not to be a segment."""
    os.close(fd)
    with contextlib.suppress(OSError):
        path.unlink()
