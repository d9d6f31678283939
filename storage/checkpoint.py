"""One checkpoint: row files fsynced, then one table transaction, then what is no longer needed goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from storage.crash_points import reached
from storage.errors import DiskFullError, StorageError
from storage.records import Kind
from storage.table import Table, TableState
from storage.vectors import RowFile


class CheckpointJob:
    """Made by `Replica.begin_checkpoint`; `run` in any thread; then `Replica.finish_checkpoint`, always."""

    def __init__(
        self,
        *,
        table: Table,
        files: Sequence[RowFile],
        state: TableState,
        changes: Mapping[Kind, Mapping[int, bytes]],
        write_ids: Mapping[bytes, bytes | None],
        stop: Callable[[StorageError], None],
        afterwards: Callable[[TableState], None],
    ) -> None:
        self.state = state
        self._table, self._files, self._changes, self._write_ids = table, files, changes, write_ids
        self._stop, self._afterwards = stop, afterwards
        # The table holds the changes. False after `run`: `error` says why, and they stay in memory.
        self.done = False
        self.error: DiskFullError | None = None
        self.cleaned = True
        self.seconds = 0.0

    def run(self) -> None:
        """Blocks for the disk. A full disk is noted in `error`; any other failure stops the replica and raises.

        Raises ReplicaStoppedError, DamagedError.
        """
        start = time.monotonic()
        try:
            for file in self._files:
                file.sync()
            reached("checkpoint.before_commit")
            self._table.commit(self.state, self._changes, self._write_ids)
        except DiskFullError as error:
            self.error = error
            return
        except StorageError as error:
            self._stop(error)
            raise
        self.done = True
        try:
            self._afterwards(self.state)
        except (OSError, DiskFullError):
            # Old segments and rowsets that stay cost room and nothing else; the next checkpoint removes them.
            self.cleaned = False
        self.seconds = time.monotonic() - start
