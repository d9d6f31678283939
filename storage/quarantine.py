"""Records that were put aside: offered again when their id had long been deleted and its tombstone purged.

One small file, written anew as a whole each time: magic, format version, shard, how many records, xxh3_64 over all
the rest; then raw records. Reported, never applied; a person looks at them and moves the file away.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from xxhash import xxh3_64_intdigest

from storage.errors import DamagedError, ForeignDataError, FormatError, QuarantineFullError
from storage.files import fsync_directory, write_atomically
from storage.records import Record, make, split
from storage.vectors import disk_error

FORMAT_VERSION = 1
BYTES_MAX = 16 << 20
_MAGIC = b"GMCO-QUA"
_HEADER = struct.Struct("<8sIIQQ")


class Quarantine:
    def __init__(self, directory: Path, shard: int) -> None:
        self.path, self._shard = directory / "quarantine", shard

    def records(self) -> list[Record]:
        """In the order in which they came. Raises DamagedError, FormatError, ForeignDataError."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DamagedError(self.path, None, f"it cannot be read ({error.strerror})") from error
        if len(data) < _HEADER.size:
            raise DamagedError(self.path, len(data), "it is shorter than its header")
        magic, version, shard, count, check = _HEADER.unpack_from(data)
        if magic != _MAGIC or check != _check(data):
            raise DamagedError(self.path, 0, "its checksum does not match")
        if version != FORMAT_VERSION:
            raise FormatError(f"{self.path} has format version {version}; this build knows {FORMAT_VERSION}")
        if shard != self._shard:
            raise ForeignDataError(f"{self.path} is of shard {shard}, not of shard {self._shard}")
        found = [record for _, record in split(data[_HEADER.size :])]
        assert len(found) == count
        return found

    def add(self, records: Sequence[Record]) -> None:
        """Durably; those that are there already are left out.

        Raises QuarantineFullError, DiskFullError (nothing has changed), ReplicaStoppedError, and as `records`.
        """
        kept = {(one.kind, one.id, one.version): one for one in self.records()}
        before = len(kept)
        for record in records:
            kept.setdefault((record.kind, record.id, record.version), record)
        if len(kept) == before:
            return
        body = b"".join([_encode(record) for record in kept.values()])
        if _HEADER.size + len(body) > BYTES_MAX:
            raise QuarantineFullError(
                f"{self.path} would pass {BYTES_MAX >> 20} MiB with {len(kept)} records; look at them, move the file away"
            )
        header = _HEADER.pack(_MAGIC, FORMAT_VERSION, self._shard, len(kept), 0)
        check = _check(header + body).to_bytes(8, "little")
        try:
            write_atomically(self.path, header[:-8] + check + body)
        except OSError as error:
            raise disk_error(error, self.path) from error


def keep(directory: Path, folder: Path, shard: int) -> Path | None:
    """The quarantine of a replica that is about to be removed goes into `folder`, durably, under a name of its own; None when
    there is none. A crash may leave it in both. Raises OSError."""
    source = Quarantine(directory, shard).path
    if not source.exists():
        return None
    folder.mkdir(exist_ok=True)
    fsync_directory(folder.parent)
    for number in count(1):
        target = folder / f"shard-{shard:03}-{number}"
        if not target.exists():
            os.link(source, target)
        elif target.stat().st_ino != source.stat().st_ino:
            continue
        fsync_directory(folder)
        return target
    raise AssertionError("unreachable")


def _check(data: bytes) -> int:
    return int(xxh3_64_intdigest(data[: _HEADER.size - 8] + data[_HEADER.size :]))


def _encode(record: Record) -> bytes:
    """The bytes that it was decoded from."""
    return make(*record[:-1])[0]
