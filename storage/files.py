"""The ways in which anything here reaches the disk, as one small object that tests replace to make the disk fail."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

# No room: the device, the quota, or a limit on the file's size.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ZEROS = bytes(1 << 20)
# Linux takes at most this many buffers in one pwritev.
_BUFFERS_MAX = 1_024


# Of the C library of Linux only, and not in Python's os.
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2


def send_to_disk(fd: int, offset: int, size_bytes: int) -> None:
    """A hint: the disk may begin with that part of a file. What goes wrong the sync that must follow tells."""
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(fd, ctypes.c_int64(offset), ctypes.c_int64(size_bytes), _SYNC_FILE_RANGE_WRITE)


def is_full(error: OSError) -> bool:
    return error.errno in _FULL


class FileOps:
    """System calls of the log's writer. All raise OSError."""

    def allocate(self, fd: int, size_bytes: int) -> None:
        os.posix_fallocate(fd, 0, size_bytes)

    def write(self, fd: int, buffers: Sequence[bytes], offset: int) -> None:
        _write_all(fd, buffers, offset, 0)

    def write_durably(self, fd: int, buffers: Sequence[bytes], offset: int) -> None:
        """`write` and `sync_data` of what was written in one call: on return it is on the disk.

        A thread that comes back from a system call waits for the interpreter; with one call it waits once.
        """
        _write_all(fd, buffers, offset, os.RWF_DSYNC)

    def zero(self, fd: int, offset: int, size_bytes: int) -> None:
        while size_bytes > 0:
            piece = memoryview(_ZEROS)[:size_bytes]
            count = os.pwrite(fd, piece, offset)
            offset, size_bytes = offset + count, size_bytes - count

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def sync_directory(self, path: Path) -> None:
        fsync_directory(path)


def take_back(ops: FileOps, fd: int, buffers: Sequence[bytes], offset: int, refused: OSError) -> None:
    """Make durable zeros of a write for which there was no room. Raises OSError, `refused` if it was the flush's."""
    try:
        # Even preallocated space may be refused (copy on write, quotas), and then is again. A flush that failed
        # for want of room (thin provisioning) is no full disk but a failed fsync, and the write alone succeeds.
        ops.write(fd, buffers, offset)
    except OSError as error:
        if not is_full(error):
            raise
    else:
        raise refused
    # A part may have been written.
    ops.zero(fd, offset, sum(map(len, buffers)))
    ops.sync_data(fd)


def _write_all(fd: int, buffers: Sequence[bytes], offset: int, flags: int) -> None:
    """All of it, however often the kernel takes only a part."""
    if len(buffers) > _BUFFERS_MAX:
        buffers = (b"".join(buffers),)
    total = sum(map(len, buffers))
    written = os.pwritev(fd, buffers, offset, flags)
    if written < total:
        rest = memoryview(b"".join(buffers))
        while written < total:
            written += os.pwritev(fd, (rest[written:],), offset + written, flags)


def fsync_directory(path: Path | str) -> None:
    """Make names made, changed or removed in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path | str, data: bytes) -> None:
    """After a crash the file holds either what it held before or all of `data`; on return, durably the latter.

    Raises OSError; then the old content stands.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        try:
            FileOps().write(fd, (data,), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)
