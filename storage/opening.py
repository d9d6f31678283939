"""Opening a replica: whose directory it is, what is whole, and what is left over."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from storage.config import StorageConfig
from storage.disk import Log
from storage.epochs import Epochs
from storage.errors import DamagedError, ForeignDataError, StorageError
from storage.files import fsync_directory
from storage.quarantine import Quarantine
from storage.records import Kind, Version
from storage.side import SideFiles
from storage.space import Space
from storage.table import NOWHERE, Table, TableState
from storage.vectors import RowFile, row_file_name
from storage.write_ids import WriteIds

KINDS = (Kind.ITEM, Kind.USER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What `Replica.open` found and did. Times in seconds."""

    position: Version = NOWHERE
    rows: int = 0
    replayed: int = 0
    checkpoints: int = 0
    # False when there was no saved graph that fits: all rows are scanned until the graph is built again.
    graph_loaded: bool = False
    fresh: int = 0
    verify_s: float = 0.0
    replay_s: float = 0.0
    graph_s: float = 0.0
    total_s: float = 0.0
    log: Mapping[str, Any] = field(default_factory=dict)


class Owner:
    """A lock on the directory, so that two processes cannot both write it."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise StorageError(f"{directory} is in use by another process; stop that one first") from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(slots=True, kw_only=True)
class Parts:
    """What a replica is made of."""

    directory: Path
    owner: Owner
    table: Table
    log: Log
    state: TableState
    spaces: dict[Kind, Space]
    write_ids: WriteIds
    sides: SideFiles
    quarantine: Quarantine

    def close(self) -> None:
        """All of them, whatever fails: a table that stays open could not be opened again in this process."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.owner.close)
            stack.callback(self.table.close, seal=False)
            for space in self.spaces.values():
                stack.callback(space.file.close)
            stack.callback(self.log.close)


def open_parts(directory: Path, *, shard: int, node_id: str, config: StorageConfig) -> Parts:
    """Everything verified and loaded, nothing replayed. Raises the errors of `Replica.open`."""
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        owner = Owner(directory)
        stack.callback(owner.close)
        table = Table.open(directory / "table")
        stack.callback(lambda: table.close(seal=False))
        expected = TableState(
            node_id=node_id, shard=shard, dim=config.dim, metric=config.metric, replica_id=new_replica_id()
        )
        state = table.state()
        if state is None:
            state = _begin(directory, table, expected)
        _check_owner(directory, state, expected)
        _remove_leftovers(directory, state)
        spaces = {}
        for kind in KINDS:
            of = state.of(kind)
            path = directory / row_file_name(kind, of.rowset)
            file = RowFile.open(path, shard=shard, dim=config.dim, kind=kind, rowset=of.rowset, rows=of.rows)
            stack.callback(file.close)
            spaces[kind] = Space(kind, file, of.rowset, config.class_width)
            spaces[kind].load(table, of)
        write_ids = WriteIds(keep_s=config.write_ids_keep_s, count_max=config.write_ids_max)
        pairs = table.write_ids()
        if len(pairs) != state.write_ids:
            raise DamagedError(table.path, None, "write_ids are not those of the last checkpoint")
        write_ids.load(pairs)
        sides = SideFiles(directory, shard)
        log = Log.open(
            directory / "wal",
            shard=shard,
            segment_bytes=config.wal_segment_bytes,
            segment_bytes_max=config.wal_segment_bytes_max,
            floor=state.position.sequence,
        )
        stack.pop_all()
    return Parts(
        directory=directory,
        owner=owner,
        table=table,
        log=log,
        state=state,
        spaces=spaces,
        write_ids=write_ids,
        sides=sides,
        quarantine=Quarantine(directory, shard),
    )


def with_state(
    state: TableState,
    spaces: Mapping[Kind, Space],
    *,
    position: Version,
    epochs: Epochs,
    purge_floor: Version,
    write_ids: int,
) -> TableState:
    """What a checkpoint made now would say of itself."""
    return replace(
        state,
        position=position,
        items=spaces[Kind.ITEM].state(),
        users=spaces[Kind.USER].state(),
        epoch_starts=dict(epochs.starts),
        placements=dict(epochs.placements),
        purge_floor=purge_floor,
        write_ids=write_ids,
    )


def new_replica_id() -> int:
    """Random, 63 bits, never 0."""
    return 1 + secrets.randbelow((1 << 63) - 1)


def index_directory(directory: Path, rowset: int) -> Path:
    return directory / "index" / f"{rowset:010d}"


def _begin(directory: Path, table: Table, state: TableState) -> TableState:
    # Row files first: the state that names them is what makes them part of the replica.
    for kind in KINDS:
        rowset = state.of(kind).rowset
        path = directory / row_file_name(kind, rowset)
        RowFile.create(path, shard=state.shard, dim=state.dim, kind=kind, rowset=rowset).close()
    fsync_directory(directory)
    fsync_directory(directory.parent)
    table.commit(state, {})
    return state


def _check_owner(directory: Path, state: TableState, expected: TableState) -> None:
    for name in ("node_id", "shard", "dim", "metric"):
        found, wanted = getattr(state, name), getattr(expected, name)
        if found != wanted:
            raise ForeignDataError(
                f"{directory} belongs to {name} {found!r}, not {wanted!r}; name its own directory in the config"
            )


def _remove_leftovers(directory: Path, state: TableState) -> None:
    """What a crash left of a compaction: row files and graphs of rowsets that are not current."""
    keep = {row_file_name(kind, state.of(kind).rowset) for kind in KINDS}
    for path in directory.glob("*.f16"):
        if path.name not in keep:
            path.unlink()
    index = index_directory(directory, state.items.rowset)
    for path in index.parent.glob("*"):
        if path != index:
            shutil.rmtree(path, ignore_errors=True)
