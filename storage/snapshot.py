"""A replica's checkpointed state as a directory that proves itself, and a replica from it (docs/storage.md)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

from storage.config import StorageConfig
from storage.disk import Log
from storage.errors import DamagedError, ForeignDataError, FormatError, StorageError
from storage.files import fsync_directory, is_full, write_atomically
from storage.opening import index_directory, new_replica_id
from storage.records import Kind, RecordError, Version
from storage.table import NOWHERE, Table, TableState
from storage.vectors import RowFile, disk_error

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# The record at the snapshot's position, as in the log.
LAST_RECORD = "last.record"
_COPY_BYTES = 4 << 20


class Pinned(NamedTuple):
    """A checkpoint's files in a directory. `files`: name → how many of its bytes belong to it; what follows came later."""

    state: TableState
    files: dict[str, int]


def pin(
    directory: Path,
    *,
    table: Table,
    files: Mapping[Kind, RowFile],
    index: Path,
    tails: Sequence[Path],
    record_at: Callable[[int], bytes],
    link: bool,
) -> Pinned:
    """The last checkpoint's files in `directory`, which must not exist; with `link` nothing is copied that only grows.

    tails: side files. record_at: the log's raw record at a sequence. Not beside `finish_compaction`; beside checkpoints only
    when the log keeps the record at the position of the one that is taken.

    Raises DiskFullError, ReplicaStoppedError, LogGoneError, FileExistsError; then `directory` does not exist.
    """
    directory.mkdir(parents=True)
    try:
        return _gather(directory, table, files, index, tails, record_at, _link if link else _copy)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise disk_error(error, directory) from error
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _gather(
    directory: Path,
    table: Table,
    files: Mapping[Kind, RowFile],
    index: Path,
    tails: Sequence[Path],
    record_at: Callable[[int], bytes],
    take: Callable[[Path, Path, int | None], None],
) -> Pinned:
    for source in tails:
        # Before the table, because a tail that is done with may go at any time, and then needs nobody any more.
        with suppress(FileNotFoundError):
            take(source, directory / source.name, None)
    # The table before the rows: rows that it does not know yet may follow in the files, and are not part of it.
    table.copy(directory / "table")
    copied = Table.open(directory / "table")
    try:
        state = copied.state()
    finally:
        copied.close(seal=False)
    (directory / "table" / "lock.mdb").unlink(missing_ok=True)
    assert state is not None, "a replica commits a state before anything else"
    sizes: dict[str, int] = {}
    for kind, file in files.items():
        of = state.of(kind)
        assert file.path.name.endswith(f"{of.rowset:010d}.f16"), "not beside finish_compaction"
        sizes[file.path.name] = file.offset(of.rows)
        take(file.path, directory / file.path.name, file.offset(of.rows))
    target = index_directory(directory, state.items.rowset)
    if index.is_dir():
        target.mkdir(parents=True)
        for source in sorted(index.iterdir()):
            # A graph that is replaced meanwhile does not fit its own checksums and is not loaded: slower, not wrong.
            if source.suffix != ".part":
                with suppress(FileNotFoundError):
                    take(source, target / source.name, None)
    # By it whoever takes the snapshot can say to a primary where its log ends.
    last = state.position.sequence
    (directory / LAST_RECORD).write_bytes(record_at(last) if last else b"")
    return Pinned(state, {n: sizes.get(n) or (directory / n).stat().st_size for n in _names(directory)})


def export(
    directory: Path,
    *,
    table: Table,
    files: Mapping[Kind, RowFile],
    index: Path,
    tails: Sequence[Path],
    record_at: Callable[[int], bytes],
) -> None:
    """What `pin` takes, copied, with the manifest, which comes last. Raises as `pin`."""
    state, sizes = pin(
        directory, table=table, files=files, index=index, tails=tails, record_at=record_at, link=False
    )
    try:
        manifest = {
            "format": FORMAT_VERSION,
            "shard": state.shard,
            "dim": state.dim,
            "metric": state.metric,
            "position": list(state.position),
            "epoch_starts": {str(epoch): start for epoch, start in state.epoch_starts.items()},
            "purge_floor": list(state.purge_floor),
            "rows": {"items": state.items.rows, "users": state.users.rows},
            "files": {
                name: {"bytes": size, "xxh3": checksum(directory / name, size)}
                for name, size in sizes.items()
            },
        }
        text = json.dumps(manifest, sort_keys=True, indent=1)
        check = f"{xxh3_64_intdigest(text.encode()):016x}"
        sync_tree(directory)
        write_atomically(directory / MANIFEST, json.dumps({"check": check, "manifest": text}).encode())
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise disk_error(error, directory) from error
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def read_manifest(directory: Path) -> dict[str, Any]:
    """A snapshot's manifest, verified. Raises DamagedError, FormatError."""
    path = directory / MANIFEST
    try:
        outer = json.loads(path.read_bytes())
        text, check = outer["manifest"], outer["check"]
        if f"{xxh3_64_intdigest(text.encode()):016x}" != check:
            raise DamagedError(path, None, "checksum does not match")
        manifest: dict[str, Any] = json.loads(text)
        if manifest["format"] != FORMAT_VERSION:
            raise FormatError(f"{path} has format {manifest['format']}; this build knows {FORMAT_VERSION}")
    except FileNotFoundError as error:
        raise DamagedError(path, None, "the snapshot has no manifest: it was not finished") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(path, None, "it cannot be read") from error
    return manifest


def import_snapshot(
    source: Path,
    directory: Path,
    *,
    shard: int,
    node_id: str,
    config: StorageConfig,
    replica_id: int | None = None,
) -> None:
    """Copies, verifies, gives to its new owner, renames into place. See `Replica.import_snapshot`."""
    if directory.exists():
        raise StorageError(f"{directory} exists already; move it away before a snapshot takes its place")
    manifest = read_manifest(source)
    for name, wanted in (("shard", shard), ("dim", config.dim), ("metric", config.metric)):
        if manifest[name] != wanted:
            raise ForeignDataError(f"the snapshot {source} is of {name} {manifest[name]!r}, not {wanted!r}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(directory.name + ".import")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for name, described in manifest["files"].items():
            _take_file(source, partial, name, described)
        become_replica(partial, shard=shard, node_id=node_id, config=config, replica_id=replica_id)
        partial.rename(directory)
        fsync_directory(directory.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(error, directory) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _take_file(source: Path, partial: Path, name: str, described: dict[str, Any]) -> None:
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise DamagedError(source / MANIFEST, None, f"it names a file outside the snapshot: {name!r}")
    target = partial / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _copy(source / relative, target, None)
    except FileNotFoundError as error:
        raise DamagedError(source / relative, None, "the file is missing") from error
    # The copy is what is verified: it is what will be served.
    size = target.stat().st_size
    if {"bytes": size, "xxh3": checksum(target, size)} != described:
        raise DamagedError(source / relative, None, "size or checksum is not what the manifest says")


def become_replica(
    directory: Path, *, shard: int, node_id: str, config: StorageConfig, replica_id: int | None
) -> TableState:
    """Verified files of a snapshot become a replica of their new owner, durably; `replica_id` None: a new one.

    Raises DamagedError, ForeignDataError, OSError, DiskFullError.
    """
    table = Table.open(directory / "table")
    try:
        state = table.state()
        if state is None:
            raise DamagedError(directory, None, "it has no state record")
        for name, wanted in (("shard", shard), ("dim", config.dim), ("metric", config.metric)):
            if getattr(state, name) != wanted:
                raise ForeignDataError(f"the snapshot is of {name} {getattr(state, name)!r}, not {wanted!r}")
        state = replace(state, node_id=node_id, replica_id=replica_id or new_replica_id())
        table.commit(state, {})
    finally:
        table.close(seal=False)
    # Made here, so that a log that is missing at open is damage and never a beginning.
    record = (directory / LAST_RECORD).read_bytes()
    after = (
        Version(state.position.epoch, state.position.sequence - 1) if state.position.sequence > 1 else NOWHERE
    )
    log = Log.open(directory / "wal", shard=shard, segment_bytes=config.wal_segment_bytes, after=after)
    try:
        log.append([record] if record else [])
        if log.last != state.position:
            raise DamagedError(directory / LAST_RECORD, None, f"it is not the record at {state.position}")
    except RecordError as error:
        raise DamagedError(directory / LAST_RECORD, None, str(error)) from error
    finally:
        log.close()
    (directory / LAST_RECORD).unlink()
    sync_tree(directory)
    return state


def _link(source: Path, target: Path, size: int | None) -> None:
    """Another name for a file of which the first `size` bytes never change; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        if is_full(error):
            raise
        _copy(source, target, size)


def _copy(source: Path, target: Path, size: int | None) -> None:
    """The first `size` bytes, or all."""
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        left = os.fstat(reader.fileno()).st_size if size is None else size
        while left > 0 and (block := reader.read(min(_COPY_BYTES, left))):
            writer.write(block)
            left -= len(block)


def checksum(path: Path, size: int) -> str:
    """xxh3_64 of the first `size` bytes, in hex; of all when there are fewer."""
    digest = xxh3_64()
    with path.open("rb", buffering=0) as file:
        while size > 0 and (block := file.read(min(_COPY_BYTES, size))):
            digest.update(block)
            size -= len(block)
    return f"{digest.intdigest():016x}"


def _names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    fsync_directory(directory)
