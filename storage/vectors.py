"""A row file: fixed-size FP16 rows behind a header, appended to and never changed (docs/storage.md)."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from storage.errors import DamagedError, DiskFullError, ForeignDataError, FormatError, ReplicaStoppedError
from storage.records import Kind

HEADER_BYTES = 4096
FORMAT_VERSION = 1
_MAGIC = b"GMCOROWS"
_FIELDS = struct.Struct("<8sIIIIQ")  # magic, format version, shard, dim, kind, rowset
_CHECK = struct.Struct("<Q")
# Linux takes at most this many buffers in one pwritev.
_BUFFERS_MAX = 1_024
_GROW_BYTES_MIN = 1 << 20
_GROW_BYTES_MAX = 256 << 20


def row_file_name(kind: Kind, rowset: int) -> str:
    return f"{'items' if kind is Kind.ITEM else 'users'}-{rowset:010d}.f16"


class RowFile:
    """Rows of one kind and rowset.

    Written with pwrite into space that posix_fallocate has already taken, read through a read-only shared
    mapping: a full disk is an error at `ensure`, never a SIGBUS, and no stray write can reach the file.
    """

    def __init__(self, path: Path, fd: int, dim: int) -> None:
        self.path, self.dim = path, dim
        self.row_bytes = 2 * dim
        self._fd = fd
        self.capacity = 0
        self.raw = memoryview(b"")  # the rows as bytes
        self.vectors: npt.NDArray[np.float16] = np.empty((0, dim), np.float16)
        self._map()

    @classmethod
    def create(cls, path: Path, *, shard: int, dim: int, kind: Kind, rowset: int) -> RowFile:
        """A new, empty file; what was there is replaced. Raises DiskFullError."""
        fields = _FIELDS.pack(_MAGIC, FORMAT_VERSION, shard, dim, kind, rowset)
        header = fields + _CHECK.pack(xxh3_64_intdigest(fields))
        # Never truncated in place: somebody may still have the old file mapped.
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            os.posix_fallocate(fd, 0, HEADER_BYTES)
            os.pwrite(fd, header, 0)
            os.fsync(fd)
        except OSError as error:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise disk_error(error, path) from error
        return cls(path, fd, dim)

    @classmethod
    def open(cls, path: Path, *, shard: int, dim: int, kind: Kind, rowset: int, rows: int) -> RowFile:
        """An existing file that must hold `rows` rows. Raises DamagedError, FormatError, ForeignDataError."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DamagedError(path, None, "the row file is missing") from error
        try:
            _verify_header(path, os.pread(fd, HEADER_BYTES, 0), (shard, dim, kind, rowset))
            _verify_size(path, os.fstat(fd).st_size, HEADER_BYTES + rows * 2 * dim)
            return cls(path, fd, dim)
        except BaseException:
            os.close(fd)
            raise

    def ensure(self, rows: int) -> None:
        """Room on disk for `rows` rows in all. Raises DiskFullError; nothing has changed then."""
        if rows <= self.capacity:
            return
        used = self.capacity * self.row_bytes
        extra = min(max(_GROW_BYTES_MIN, used // 2), _GROW_BYTES_MAX)
        size = HEADER_BYTES + max(rows * self.row_bytes, used + extra)
        start = HEADER_BYTES + used
        try:
            os.posix_fallocate(self._fd, start, size - start)
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._map()

    def write(self, first: int, rows: Sequence[bytes | memoryview]) -> None:
        """Rows from row `first` on, each whole; room must have been made. Raises ReplicaStoppedError."""
        assert first + len(rows) <= self.capacity
        assert set(map(len, rows)) <= {self.row_bytes}
        try:
            for low in range(0, len(rows), _BUFFERS_MAX):
                part = rows[low : low + _BUFFERS_MAX]
                offset = self.offset(first + low)
                written = os.pwritev(self._fd, part, offset)
                if written < len(part) * self.row_bytes:
                    rest = memoryview(b"".join(part))[written:]
                    while rest:
                        count = os.pwrite(self._fd, rest, offset + written)
                        written, rest = written + count, rest[count:]
        except OSError as error:
            # The space was ours already, so this is no full disk but a failing one.
            raise ReplicaStoppedError(f"{self.path}: writing rows failed: {error}") from error

    def read(self, row: int) -> bytes:
        """One row's raw FP16 bytes."""
        start = row * self.row_bytes
        return bytes(self.raw[start : start + self.row_bytes])

    def offset(self, row: int) -> int:
        return HEADER_BYTES + row * self.row_bytes

    def sync(self) -> None:
        """Rows written so far are on disk. Raises DiskFullError, ReplicaStoppedError."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise ReplicaStoppedError(f"{self.path}: fdatasync failed: {error}") from error

    def close(self) -> None:
        """Closes the file. Views that still exist keep the mapping alive."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _map(self) -> None:
        size = os.fstat(self._fd).st_size
        capacity = max(0, size - HEADER_BYTES) // self.row_bytes
        if capacity == 0:
            return
        mapping = mmap.mmap(
            self._fd, HEADER_BYTES + capacity * self.row_bytes, mmap.MAP_SHARED, mmap.PROT_READ
        )
        rows = np.frombuffer(mapping, np.float16, capacity * self.dim, HEADER_BYTES)
        # The array keeps its mapping alive; older views keep the older, shorter one.
        self.raw = memoryview(mapping)[HEADER_BYTES:]
        self.vectors, self.capacity = rows.reshape(capacity, self.dim), capacity


def _verify_size(path: Path, size: int, need: int) -> None:
    if size < need:
        raise DamagedError(path, size, f"the file ends before byte {need}")


def _verify_header(path: Path, header: bytes, expected: tuple[int, int, int, int]) -> None:
    used = _FIELDS.size + _CHECK.size
    if len(header) < HEADER_BYTES:
        raise DamagedError(path, len(header), "shorter than its header")
    magic, version, *found = _FIELDS.unpack_from(header)
    if magic != _MAGIC or _CHECK.unpack_from(header, _FIELDS.size)[0] != xxh3_64_intdigest(
        header[: _FIELDS.size]
    ):
        raise DamagedError(path, 0, "header checksum does not match")
    if header[used:].count(0) != HEADER_BYTES - used:
        raise DamagedError(path, used, "header padding is not zero")
    if version != FORMAT_VERSION:
        raise FormatError(f"{path} has format version {version}; this build knows {FORMAT_VERSION}")
    if tuple(found) != expected:
        raise ForeignDataError(f"{path} belongs to (shard, dim, kind, rowset) {tuple(found)}, not {expected}")


def disk_error(error: OSError, path: Path) -> DiskFullError | ReplicaStoppedError:
    """What an OSError of a write means: no room (nothing is harmed), or a disk not to be trusted further."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(f"{path}: no room left on the disk; free some space, reads go on meanwhile")
    return ReplicaStoppedError(f"{path}: {error}")
