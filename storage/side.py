"""Side files: what was cut from a log, until each record is on a quorum (docs/replication.md, "Cutting a tail").

    offset  size  field
         0     8  magic
         8     4  format version
        12     4  shard
        16     8  check           xxh3_64 over bytes 0..16
        24     …  raw records, as in the log, without marks
       end    32  end mark: magic, how many records, xxh3_64 over their bytes, xxh3_64 over the mark's first 24 bytes

A file has its name only once it is whole and fsynced, so under its name what is not whole is damage.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from xxhash import xxh3_64, xxh3_64_intdigest

from storage.errors import DamagedError, ForeignDataError, FormatError
from storage.files import fsync_directory
from storage.records import RECORD_BYTES_MAX, Operation, Record, RecordError, Version, decode
from storage.vectors import disk_error

FORMAT_VERSION = 1
_MAGIC, _END_MAGIC = b"GMCOTAIL", b"GMCO-END"
_HEADER = struct.Struct("<8sIIQ")
_END = struct.Struct("<8sQQQ")
_NAME = re.compile(r"tail-(\d+)-(\d+)(?:-(\d+))?")
_TEMPORARY = "tail.tmp"
_READ_BYTES = 1 << 20


class SideFile:
    """One cut tail's records; whole and verified when it was opened."""

    def __init__(self, owner: SideFiles, path: Path, records: int, size_bytes: int) -> None:
        self._owner, self.path = owner, path
        self.records = records
        # Of the records: where `read` ends.
        self.size_bytes = size_bytes

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, offset: int, max_bytes: int) -> tuple[list[bytes], int]:
        """(raw records from byte `offset` of the records on, where to go on); none at the end, else one at least.

        Each is verified. Raises DamagedError.
        """
        size = min(max(max_bytes, RECORD_BYTES_MAX), self.size_bytes - offset)
        try:
            with self.path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), max(0, size), _HEADER.size + offset)
        except OSError as error:
            raise DamagedError(self.path, None, f"it cannot be read ({error.strerror})") from error
        blobs: list[bytes] = []
        at = 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 4], "little")
            if blobs and at + length > min(max_bytes, len(data)):
                break
            try:
                decode(data, at)
            except RecordError as error:
                raise DamagedError(self.path, _HEADER.size + offset + at, str(error)) from error
            blobs.append(data[at : at + length])
            at += length
        return blobs, offset + at

    def remove(self) -> None:
        """Durably. All of its records must be on a quorum. Raises DiskFullError, ReplicaStoppedError."""
        try:
            self.path.unlink(missing_ok=True)
            fsync_directory(self.path.parent)
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._owner.removed(self)


class SideFiles:
    """Those of one replica, in its directory."""

    def __init__(self, directory: Path, shard: int) -> None:
        """Removes what a crash left half-written. Raises DamagedError, FormatError, ForeignDataError."""
        self._directory, self._shard = directory, shard
        (directory / _TEMPORARY).unlink(missing_ok=True)
        self._files = [self._open(path) for path in side_paths(directory)]
        # Versions of records that were cut and are not in the log again, though their rows may have stayed.
        self.afloat: set[tuple[int, int]] = set()

    def list(self) -> list[SideFile]:
        """Oldest first."""
        return sorted(self._files, key=_age)

    def removed(self, file: SideFile) -> None:
        with suppress(ValueError):
            self._files.remove(file)
        if not self._files:
            self.afloat.clear()

    def load_afloat(self, log: Iterable[tuple[int, int]]) -> None:
        """After a restart; `log` is the versions that the log holds from `first_sequence` on."""
        for file in self._files:
            offset = 0
            while True:
                blobs, offset = file.read(offset, _READ_BYTES)
                if not blobs:
                    break
                self.afloat.update(decode(blob).version for blob in blobs)
        self.afloat.difference_update(log)

    @property
    def first_sequence(self) -> int:
        """Where the earliest cut that still has a file began; 0 when there is no file."""
        return min((_age(file)[1] for file in self._files), default=0)

    def keep(self, tail: Iterable[tuple[bytes, Record]]) -> SideFile | None:
        """A durable file with the tail's puts and deletes, None when it has none. One that has them already is left.

        Raises DiskFullError (nothing has changed), ReplicaStoppedError.
        """
        temporary = self._directory / _TEMPORARY
        try:
            first, records, size = self._write(temporary, tail)
            found = self._name(temporary, first, size) if first is not None else None
            if found is None or found.exists():
                temporary.unlink()
            else:
                temporary.rename(found)
            fsync_directory(self._directory)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise disk_error(error, temporary) from error
        if found is None:
            return None
        file = next((file for file in self._files if file.path == found), None)
        if file is None:
            file = SideFile(self, found, records, size)
            self._files.append(file)
        return file

    def _write(self, path: Path, tail: Iterable[tuple[bytes, Record]]) -> tuple[Version | None, int, int]:
        """(place of the first record, how many, their bytes)."""
        digest, first, records, size = xxh3_64(), None, 0, 0
        with path.open("wb") as file:
            file.write(_header(self._shard))
            for blob, record in tail:
                if record.operation is Operation.MARK:
                    continue
                first = first or Version(record.epoch, record.sequence)
                file.write(blob)
                digest.update(blob)
                records, size = records + 1, size + len(blob)
            file.write(_end_mark(records, digest.intdigest()))
            file.flush()
            os.fsync(file.fileno())
        return first, records, size

    def _name(self, temporary: Path, first: Version, size: int) -> Path:
        """Where the file belongs: an existing one that begins with the same records, or the first free name."""
        for number in count(1):
            suffix = f"-{number}" if number > 1 else ""
            path = self._directory / f"tail-{first.epoch}-{first.sequence}{suffix}"
            if not path.exists() or _same(path, temporary, _HEADER.size + size):
                return path
        raise AssertionError

    def _open(self, path: Path) -> SideFile:
        return SideFile(self, path, *verify(path, self._shard))


def side_paths(directory: Path) -> list[Path]:
    """Of the side files there, whole or not."""
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def verify(path: Path, shard: int) -> tuple[int, int]:
    """A side file's records, and their bytes. Raises DamagedError, FormatError, ForeignDataError, OSError."""
    size = path.stat().st_size - _HEADER.size - _END.size
    if size < 0:
        raise DamagedError(path, None, "it is shorter than a side file")
    digest = xxh3_64()
    with path.open("rb") as file:
        magic, version, found, check = _HEADER.unpack(file.read(_HEADER.size))
        if magic != _MAGIC or _header(found, version)[16:] != check.to_bytes(8, "little"):
            raise DamagedError(path, 0, "its header's checksum does not match")
        if version != FORMAT_VERSION:
            raise FormatError(f"{path} has format version {version}; this build knows {FORMAT_VERSION}")
        if found != shard:
            raise ForeignDataError(f"{path} is of shard {found}, not of shard {shard}")
        for block in _blocks(file.read, size):
            digest.update(block)
        end = file.read(_END.size)
    records = _END.unpack(end)[1]
    if end != _end_mark(records, digest.intdigest()):
        raise DamagedError(path, None, "its checksum does not match")
    return records, size


def carry(paths: Iterable[Path], directory: Path) -> None:
    """Gives side files another name in `directory`, too: a free one, or the one under which its like is there. Raises OSError."""
    for path in paths:
        for number in count(1):
            match = _NAME.fullmatch(path.name)
            assert match is not None
            target = directory / f"tail-{match[1]}-{match[2]}{f'-{number}' if number > 1 else ''}"
            if not target.exists():
                os.link(path, target)
                break
            if target.stat().st_size == path.stat().st_size and _same(target, path, path.stat().st_size):
                break


def _age(file: SideFile) -> tuple[int, ...]:
    match = _NAME.fullmatch(file.name)
    assert match is not None
    return tuple(int(part or 1) for part in match.groups())


def _header(shard: int, version: int = FORMAT_VERSION) -> bytes:
    fields = _HEADER.pack(_MAGIC, version, shard, 0)[:-8]
    return fields + xxh3_64_intdigest(fields).to_bytes(8, "little")


def _end_mark(records: int, digest: int) -> bytes:
    fields = _END.pack(_END_MAGIC, records, digest, 0)[:-8]
    return fields + xxh3_64_intdigest(fields).to_bytes(8, "little")


def _blocks(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (block := read(min(size, _READ_BYTES))):
        yield block
        size -= len(block)


def _same(one: Path, other: Path, size: int) -> bool:
    """Whether both begin with the same `size` bytes."""
    with one.open("rb") as first, other.open("rb") as second:
        return all(first.read(len(block)) == block for block in _blocks(second.read, size))
