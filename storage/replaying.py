"""Replay: the log after the last checkpoint, into memory, row files and table, before anything is served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from storage.bulk import Columns, columns
from storage.checkpoint import CheckpointJob
from storage.disk import Log
from storage.vectors import RowFile

if TYPE_CHECKING:
    from storage.replica import Replica

_BATCH = 2_048
# Vectors go to their files at once, so what waits in memory is an eighth of this or less.
_CHECKPOINT_BYTES = 128 << 20
_SYNC_BYTES = 48 << 20
_WRITES_MAX = 8


class Replay:
    """Threads of its own for what the disk does (reading ahead, writing rows, checkpoints), gone when it is over.

    Memory is bounded: two segments, `_WRITES_MAX` batches, two checkpoints' worth of changes.
    """

    def __init__(self, replica: Replica, log: Log, files: Sequence[RowFile]) -> None:
        self._replica, self._log, self._files = replica, log, files
        self._pool = ThreadPoolExecutor(4)
        self._writes: list[Future[None]] = []
        self._syncs: list[Future[None]] = []
        self._running: tuple[CheckpointJob, Future[None]] | None = None
        self._synced_bytes = 0
        self.records = 0
        self.checkpoints = 0

    def run(self, after: int) -> None:
        """Takes everything after sequence `after`. Raises DamagedError, DiskFullError, ReplicaStoppedError."""
        with self._pool:
            for batch in self._batches(after):
                self._replica.take_logged(batch, self._write)
                self._replica.unsaved_bytes += batch.size_bytes()
                self.records += len(batch)
                self._checkpoint()
            self._settle(0)
            self._finish()
        for sync in self._syncs:
            sync.result()  # a failed one must stop the replica

    def _batches(self, after: int) -> Iterator[Columns]:
        spans = self._log.spans(after, reused=True)
        ahead = self._pool.submit(next, spans, None)
        while (span := ahead.result()) is not None:
            # Rows that wait to be written lie in the memory that the next one is read into.
            self._settle(0)
            ahead = self._pool.submit(next, spans, None)
            data, offset, end = span
            yield from columns(data, offset, end, after, _BATCH)

    def _write(self, file: RowFile, first: int, rows: Sequence[memoryview]) -> None:
        # Each call's rows are its own, so their order does not matter; a checkpoint waits for them all.
        self._settle(_WRITES_MAX)
        self._writes.append(self._pool.submit(file.write, first, rows))

    def _settle(self, most: int) -> None:
        while len(self._writes) > most:
            self._writes.pop(0).result()

    def _checkpoint(self) -> None:
        if self._replica.unsaved_bytes >= self._synced_bytes + _SYNC_BYTES:
            # Early, so that the disk has work from the start and the checkpoint's own sync little to wait for.
            self._synced_bytes = self._replica.unsaved_bytes
            for file in self._files:
                self._syncs.append(self._pool.submit(file.sync))
        due = self._replica.unsaved_bytes >= _CHECKPOINT_BYTES
        if self._running is not None and (due or self._running[1].done()):
            self._finish()
        if due and self._replica.checkpoint_due():
            self._settle(0)
            job = self._replica.begin_checkpoint()
            self._running = (job, self._pool.submit(job.run))
            self.checkpoints += 1
            self._synced_bytes = 0

    def _finish(self) -> None:
        if self._running is not None:
            job, future = self._running
            future.result()
            self._replica.finish_checkpoint(job)
            self._running = None
