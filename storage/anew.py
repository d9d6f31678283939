"""A damaged replica is moved aside, and a new, empty one is begun in its place (docs/storage.md, "A damaged replica"). Blocking.

    shard-017.damaged-1  what was there; the next is -2, and only the newest is kept
    shard-017.new        the new one, until it takes the place

The new one begins with what can still be read of what others may lack: side files, the quarantine, and the end of the log, as a
side file. All that is offered to the primary again.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from storage.disk import Log
from storage.errors import StorageError
from storage.files import fsync_directory
from storage.installing import Installing
from storage.quarantine import Quarantine
from storage.side import SideFiles, carry, side_paths, verify

# Of the log's end: what may have been acknowledged by this disk alone is among its last records.
RECORDS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Anew:
    """aside: where the damaged replica lies. side_files: whole ones that came along; records: of its log's end. lost: what
    could not be read any more."""

    aside: Path
    side_files: int
    records: int
    lost: tuple[str, ...]


def damaged_paths(directory: Path) -> list[Path]:
    """Where damaged replicas of that name lie, oldest first."""
    numbered = [
        (int(path.name.rpartition("-")[2]), path)
        for path in directory.parent.glob(f"{directory.name}.damaged-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    return [path for _, path in sorted(numbered)]


def begin_anew(directory: Path, *, shard: int, segment_bytes: int) -> Anew:
    """The replica there, which nobody has open, is moved aside; what is in its place is to be opened as a new one.

    Repeatable after a crash. Raises OSError.
    """
    installing = Installing(directory)
    installing.clear()
    installing.fetch.mkdir()
    lost: list[str] = []
    paths = _whole(directory, shard, lost)
    carry(paths, installing.fetch)
    try:
        if Quarantine(directory, shard).records():
            os.link(directory / "quarantine", installing.fetch / "quarantine")
    except StorageError as error:
        lost.append(str(error))
    records = _save_tail(directory, installing.fetch, shard, segment_bytes, lost)
    fsync_directory(installing.fetch)
    before = damaged_paths(directory)
    number = int(before[-1].name.rpartition("-")[2]) + 1 if before else 1
    aside = directory.with_name(f"{directory.name}.damaged-{number}")
    installing.swap_aside(aside)
    for path in before:
        shutil.rmtree(path, ignore_errors=True)
    return Anew(aside, len(paths), records, tuple(lost))


def _whole(directory: Path, shard: int, lost: list[str]) -> list[Path]:
    """Its side files, without those that are damaged themselves."""
    found = []
    for path in side_paths(directory):
        try:
            verify(path, shard)
        except (StorageError, OSError) as error:
            lost.append(str(error))
        else:
            found.append(path)
    return found


def _save_tail(directory: Path, target: Path, shard: int, segment_bytes: int, lost: list[str]) -> int:
    """The end of the log as a side file; how many records. None when the log itself is damaged."""
    try:
        kept = Log.open(directory / "wal", shard=shard, segment_bytes=segment_bytes)
    except (StorageError, OSError) as error:
        lost.append(str(error))
        return 0
    try:
        after = max(kept.first_sequence - 1, kept.last.sequence - RECORDS_MAX)
        file = SideFiles(target, shard).keep(kept.tail(after))
        return file.records if file is not None else 0
    except (StorageError, OSError) as error:
        lost.append(str(error))
        return 0
    finally:
        kept.release()
