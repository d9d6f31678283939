"""The seal of a table that was closed cleanly: what its file was, so that the next open can tell whether it still is."""

from __future__ import annotations

import json
from pathlib import Path

from xxhash import xxh3_64

from storage.errors import DamagedError
from storage.files import fsync_directory, write_atomically

FORMAT_VERSION = 1
_READ_BYTES = 1 << 20


def write_seal(directory: Path) -> None:
    """The size and checksum of a table that nobody has open, fsynced."""
    size, check = _file_check(directory / "data.mdb")
    text = json.dumps({"format": FORMAT_VERSION, "bytes": size, "xxh3": f"{check:016x}"})
    write_atomically(directory / "seal", text.encode())


def check_seal(directory: Path, *, remove: bool = True) -> bool:
    """Whether a clean close has left a seal. Raises DamagedError when the table is not what was sealed.

    The seal goes, durably, before anything is written: a seal of an older content would cry damage falsely.
    """
    path = directory / "seal"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return False
    try:
        sealed = json.loads(text)
        expected = (sealed["bytes"], int(sealed["xxh3"], 16))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(path, None, "it cannot be read") from error
    if not (directory / "data.mdb").exists() or _file_check(directory / "data.mdb") != expected:
        raise DamagedError(directory / "data.mdb", None, "it is not what was there at the last clean close")
    if remove:
        path.unlink()
        fsync_directory(directory)
    return True


def _file_check(path: Path) -> tuple[int, int]:
    digest, size = xxh3_64(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return size, digest.intdigest()
