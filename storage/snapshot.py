"""A replica's checkpointed state as a directory that proves itself, and a replica from it (docs/storage.md)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_64, xxh3_64_intdigest

from storage.config import StorageConfig
from storage.disk import Log
from storage.errors import DamagedError, ForeignDataError, FormatError, StorageError
from storage.files import fsync_directory, write_atomically
from storage.opening import index_directory, new_replica_id
from storage.records import Kind, Version
from storage.table import Table
from storage.vectors import RowFile, disk_error

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_COPY_BYTES = 4 << 20


def export(directory: Path, *, table: Table, files: Mapping[Kind, RowFile], index: Path) -> None:
    """The last checkpoint's state into `directory`, which must not exist; the manifest comes last.

    Raises DiskFullError, ReplicaStoppedError, FileExistsError; then `directory` does not exist.
    """
    directory.mkdir(parents=True)
    try:
        # The table first: rows that it does not know yet may follow in the files, and are cut off below.
        table.copy(directory / "table")
        copied = Table.open(directory / "table")
        try:
            state = copied.state()
        finally:
            copied.close(seal=False)
        (directory / "table" / "lock.mdb").unlink(missing_ok=True)
        assert state is not None, "a replica commits a state before anything else"
        for kind, file in files.items():
            of = state.of(kind)
            assert file.path.name.endswith(f"{of.rowset:010d}.f16"), "not beside finish_compaction"
            _copy(file.path, directory / file.path.name, file.offset(of.rows))
        target = index_directory(directory, state.items.rowset)
        if index.is_dir():
            target.mkdir(parents=True)
            for source in sorted(index.iterdir()):
                # A graph that is replaced meanwhile does not fit its own checksums and is not loaded: slower, not wrong.
                with suppress(FileNotFoundError):
                    _copy(source, target / source.name, None)
        manifest = {
            "format": FORMAT_VERSION,
            "shard": state.shard,
            "dim": state.dim,
            "metric": state.metric,
            "position": list(state.position),
            "epoch_starts": {str(epoch): start for epoch, start in state.epoch_starts.items()},
            "purge_floor": list(state.purge_floor),
            "rows": {"items": state.items.rows, "users": state.users.rows},
            "files": {name: _describe(directory / name) for name in _names(directory)},
        }
        text = json.dumps(manifest, sort_keys=True, indent=1)
        check = f"{xxh3_64_intdigest(text.encode()):016x}"
        _sync_tree(directory)
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
    source: Path, directory: Path, *, shard: int, node_id: str, config: StorageConfig
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
        position = _give_to(partial / "table", node_id)
        # Made here, so that a log that is missing at open is damage and never a beginning.
        segment_bytes = config.wal_segment_bytes
        Log.open(partial / "wal", shard=shard, segment_bytes=segment_bytes, after=position).close()
        _sync_tree(partial)
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
    if _describe(target) != described:
        raise DamagedError(source / relative, None, "size or checksum is not what the manifest says")


def _give_to(directory: Path, node_id: str) -> Version:
    table = Table.open(directory)
    try:
        state = table.state()
        if state is None:
            raise DamagedError(directory, None, "it has no state record")
        table.commit(replace(state, node_id=node_id, replica_id=new_replica_id()), {})
        return state.position
    finally:
        table.close(seal=False)


def _copy(source: Path, target: Path, size: int | None) -> None:
    """The first `size` bytes, or all."""
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        left = os.fstat(reader.fileno()).st_size if size is None else size
        while left > 0 and (block := reader.read(min(_COPY_BYTES, left))):
            writer.write(block)
            left -= len(block)


def _describe(path: Path) -> dict[str, int | str]:
    digest, size = xxh3_64(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_COPY_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3": f"{digest.intdigest():016x}"}


def _names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    fsync_directory(directory)
