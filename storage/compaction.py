"""Compaction of one kind: the next rowset without dead rows, made beside the current one (docs/storage.md)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from storage import entries
from storage.errors import DamagedError, StorageError
from storage.files import fsync_directory
from storage.index import make_engine
from storage.index.base import Engine
from storage.opening import index_directory
from storage.records import Kind
from storage.space import Rows, Space, kind_id
from storage.table import Table, TableState
from storage.vectors import RowFile, row_file_name
from storage.view import ShardView

if TYPE_CHECKING:
    from storage.replica import Replica

# Entries read under one hold of the table's lock: about a millisecond, because the event loop may wait for it.
_STEP = 512
# Entries per synced transaction.
_TRANSACTION = 8_192
_BUILD_STEP_S = 0.5


class CompactionJob:
    """`run` in any thread, `commit` in any thread while nothing is written, then `Replica.finish_compaction`.

    Whichever raises has given the compaction up and removed its files; nothing else has changed.
    """

    def __init__(self, replica: Replica, space: Space, table: Table) -> None:
        self._replica, self._space, self._table = replica, space, table
        self._config = replica.config
        self.rowset = space.rowset + 1
        path = replica.directory / row_file_name(space.kind, self.rowset)
        self._file = RowFile.create(
            path, shard=replica.shard, dim=self._config.dim, kind=space.kind, rowset=self.rowset
        )
        self._arrays = Rows(self._config.class_width) if space.kind is Kind.ITEM else None
        self._rows = self._alive = 0
        # id → its row in the next rowset, of those that were copied and may have changed since.
        self._placed: dict[int, int] = {}
        overlay, frozen = space.layers
        # What the table does not have yet is left to `commit`, and so is what changes from now on.
        space.changed = {*overlay, *frozen}
        self._old_file, self._old_rowset = space.file, space.rowset
        self.engine: Engine | None = None
        self.saved_graph_rows = 0
        self.committed = False
        self._given_up = False
        self.state: TableState

    def run(self) -> None:
        """Copies and verifies live rows, builds the graph, saves it. Long. Raises StorageError."""
        try:
            self._copy()
            if self._arrays is not None:
                self._build()
        except StorageError:
            self.abandon()
            raise

    def commit(self) -> None:
        """Carries over what changed since `begin`, then one transaction makes the next rowset the current one.

        Nothing is appended or applied and no checkpoint runs from here until `finish_compaction` is done.
        """
        try:
            self._carry_over()
        except StorageError:
            self.abandon()
            raise
        self.committed = True

    def abandon(self) -> None:
        """Gives up: the current rowset stays."""
        if self.committed or self._given_up:
            return
        self._given_up = True
        self._space.changed = None
        self.close()
        self._file.path.unlink(missing_ok=True)
        shutil.rmtree(index_directory(self._replica.directory, self.rowset), ignore_errors=True)
        self._replica.compaction_ended()

    def close(self) -> None:
        """Lets go of the next rowset's file."""
        self._file.close()

    def switch(self) -> None:
        """The space in memory becomes the next rowset's; microseconds."""
        space = self._space
        self._table.switch(space.kind, self.rowset)
        space.changed = None
        space.file, space.rowset, space.rows, space.alive = self._file, self.rowset, self._rows, self._alive
        if self._arrays is not None:
            space.arrays = self._arrays

    def remove_old(self) -> None:
        """The old rowset's files; views that are still searched keep their mapping."""
        self._old_file.close()
        self._old_file.path.unlink(missing_ok=True)
        if self._arrays is not None:
            shutil.rmtree(index_directory(self._replica.directory, self._old_rowset), ignore_errors=True)

    def _copy(self) -> None:
        self._table.drop_ahead(self._space.kind, self.rowset)
        after, ready = -1, dict[int, bytes]()
        while pairs := list(self._table.scan(self._space.kind, after=after, limit=_STEP)):
            after = int.from_bytes(pairs[-1][0], "big")
            ready.update(self._place([(int.from_bytes(key, "big"), entry) for key, entry in pairs]))
            if len(ready) >= _TRANSACTION:
                self._table.put_ahead(self._space.kind, self.rowset, ready)
                ready = {}
        if ready:
            self._table.put_ahead(self._space.kind, self.rowset, ready)
        self._file.sync()

    def _place(self, found: Sequence[tuple[int, bytes]]) -> dict[int, bytes]:
        """Verified entries with rows in the next rowset, their vectors written there."""
        kind, out = self._space.kind, {}
        ids, vectors, blobs, counts = [], [], [], []
        first = row = self._rows
        for id, entry in found:
            if not entries.intact(id, entry):
                raise DamagedError(
                    self._table.path, None, f"checksum of the entry of {kind_id(kind, id)} does not match"
                )
            fields = entries.unpack(entry)
            if not fields.alive:
                out[id] = entry
                continue
            vector = self._old_file.read(fields.row)
            if not entries.body_intact(vector, entry):
                reason = f"the row of {kind_id(kind, id)} does not match its checksum"
                raise DamagedError(self._old_file.path, self._old_file.offset(fields.row), reason)
            out[id] = entries.moved(id, entry, row)
            ids.append(id)
            vectors.append(vector)
            blobs.append(fields.body[: 2 * fields.class_count])
            counts.append(fields.class_count)
            self._placed[id] = row
            row += 1
        self._file.ensure(row)
        self._file.write(first, vectors)
        if self._arrays is not None:
            self._arrays.place(np.arange(first, row, dtype=np.int64), ids, b"".join(blobs), counts)
        self._rows, self._alive = row, self._alive + len(ids)
        return out

    def _build(self) -> None:
        """The next rowset's graph, from the rows copied so far; what is carried over later is fresh."""
        self.engine = make_engine(self._config)
        view = self._view()
        while not self._given_up and self.engine.build(view, _BUILD_STEP_S):
            pass
        rows = int(self.engine.statistics()["graph_rows"])
        if rows and not self._given_up:
            directory = index_directory(self._replica.directory, self.rowset)
            directory.mkdir(parents=True, exist_ok=True)
            self.engine.save(directory)
            self.saved_graph_rows = rows

    def _view(self) -> ShardView:
        assert self._arrays is not None
        self._arrays.room(1)
        return ShardView(
            shard=self._replica.shard,
            position=self._replica.position,
            rows=self._rows,
            alive_rows=self._alive,
            vectors=self._file.vectors,
            ids=self._arrays.ids,
            masks=self._arrays.masks,
            alive=self._arrays.alive(self._rows),
            rowset=self.rowset,
        )

    def _carry_over(self) -> None:
        changed = sorted(self._space.changed or ())
        dead = [self._placed[id] for id in changed if id in self._placed]
        self._alive -= len(dead)
        if self._arrays is not None:
            self._arrays.kill(dead)
        ids = iter(changed)
        moved: dict[int, bytes] = {}
        while step := list(islice(ids, _STEP)):
            found = [(id, self._space.find(self._table, id)) for id in step]
            moved |= self._place([(id, entry) for id, entry in found if entry is not None])
            # What was purged or dropped since it was copied.
            moved |= {id: entries.GONE for id, entry in found if entry is None}
        self._file.sync()
        fsync_directory(self._replica.directory)
        self.state = self._replica.commit_compaction(self._space.kind, self.rowset, self._rows, moved)
