"""One replica of one shard: the only owner of its directory (docs/storage.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from heapq import merge
from itertools import islice
from pathlib import Path
from typing import Any

from storage import buckets, lookups, opening, snapshot
from storage.buckets import Digested, Digests, Seen
from storage.bulk import Columns, columns
from storage.checkpoint import CheckpointJob
from storage.compaction import CompactionJob
from storage.config import StorageConfig
from storage.crash_points import reached
from storage.disk import Log
from storage.epochs import Epochs
from storage.errors import (
    DamagedError,
    DiskFullError,
    IndexingError,
    LogGoneError,
    ReplicaStoppedError,
    StorageError,
)
from storage.index import make_engine
from storage.index.base import Engine
from storage.lookups import Row
from storage.marks import column_parts, parts
from storage.quarantine import Quarantine
from storage.records import EMPTY, Fingerprint, Kind, Mark, Operation, Record, Version, fingerprint
from storage.replaying import Replay
from storage.saved_graph import SavedGraph
from storage.segment import Run, joined
from storage.side import SideFile, SideFiles
from storage.space import Space, WriteRows, space_figures
from storage.table import Table, TableState
from storage.tombstones import decode_floor
from storage.vectors import RowFile
from storage.view import ShardView, Statistics
from storage.write_ids import WriteIds

__all__ = ["Replica", "Row"]

_RETRY_S = 5.0
# Tombstones that one PURGE mark removes at most, when the primary asks `purge_point`.
_PURGE_MAX = 5_000


class Replica:
    """Made by `open`. One writer calls `append`, `apply`, begins and finishes jobs; everything else is for any thread.

    No call here may come between the begin of a compaction's `commit` and the end of `finish_compaction`, except reads.
    """

    def __init__(self, parts: opening.Parts, config: StorageConfig) -> None:
        self.directory, self.config = parts.directory, config
        self.shard = parts.state.shard
        self.recovery: opening.Recovery = opening.Recovery()
        self._owner = parts.owner
        self._table: Table = parts.table
        self._log: Log = parts.log
        self._spaces: dict[Kind, Space] = parts.spaces
        self._write_ids: WriteIds = parts.write_ids
        self._sides: SideFiles = parts.sides
        self._quarantine: Quarantine = parts.quarantine
        self._state: TableState = parts.state  # of the last checkpoint
        self.position: Version = parts.state.position
        self._epochs = Epochs(parts.state.epoch_starts, parts.state.placements)
        self.purge_floor = parts.state.purge_floor
        self._stopped: StorageError | None = None
        self._checkpoint: CheckpointJob | None = None
        self._compaction: CompactionJob | None = None
        self.unsaved_bytes = 0  # logged since the last checkpoint
        self._pending_rows = 0  # appended, not yet applied
        self._retry_at = 0.0
        self._compact_retry_at = 0.0
        self._checkpointed_at = time.monotonic()
        self._frozen_bytes = 0
        # Who → the first sequence that the log is to keep for it, however old. Changed by the writer.
        self.log_holds: dict[str, int] = {}
        # Up to here the log is known to be on a quorum. Told by the writer, at any time; it may be less after a restart.
        self.settled = 0
        self._counters = {
            "checkpoints": 0, "checkpoint_failures": 0, "compactions": 0, "cuts": 0, "unsettled_dropped": 0,
        }  # fmt: skip
        # The bucket digests at the log's last DIGEST marks.
        self.digested = Digested()
        self._graph = SavedGraph(parts.directory)
        self.engine: Engine = make_engine(config)
        self.view: ShardView
        # View and engine that belong together, read as one: a compaction replaces both at once.
        self.searchable: tuple[ShardView, Engine]
        self._publish()

    @classmethod
    def open(cls, directory: Path, *, shard: int, node_id: str, config: StorageConfig) -> Replica:
        """Recovers what is there, or begins a new replica.

        Raises DamagedError, FormatError, ForeignDataError, DiskFullError, ReplicaStoppedError.
        """
        start = time.monotonic()
        parts = opening.open_parts(Path(directory), shard=shard, node_id=node_id, config=config)
        try:
            replica = cls(parts, config)
            replica._recover(start)
        except BaseException:
            parts.close()
            raise
        return replica

    def append(self, records: Sequence[bytes], rows: int) -> None:
        """Room for `rows` new rows, then `records` (encoded, in order) to the log with one durable write. Blocks.

        Raises DiskFullError (nothing changed; not logged), ReplicaStoppedError (outcome unknown, no more writes).
        """
        if records:
            self.append_run(joined(records, self._log.last), rows)

    def append_run(self, run: Run, rows: int) -> None:
        """As `append`, of verified records that are in one piece already. Raises RecordError when they do not follow the log."""
        self._check_running()
        try:
            for space in self._spaces.values():
                space.file.ensure(space.rows + self._pending_rows + rows)
            self._log.append_run(run)
        except ReplicaStoppedError as error:
            self._stop(error)
            raise
        self._pending_rows += rows
        self.unsaved_bytes += len(run.data)

    def apply(self, records: Sequence[Record] | Columns) -> None:
        """What was made durable, in order; publishes a new view. On the loop: no fsync, about 6 µs a record, 4 of columns."""
        self._check_running()
        try:
            if isinstance(records, Columns):
                self.take_logged(records, RowFile.write)
                puts, afloat = records.puts, self._sides.afloat and records.versions()
            else:
                self._take(records)
                puts = sum(record[5] is Operation.PUT for record in records)
                afloat = self._sides.afloat and {record.version for record in records}
        except StorageError as error:
            self._stop(error)
            raise
        self._sides.afloat.difference_update(afloat)
        self._pending_rows = max(0, self._pending_rows - puts)
        self._publish()

    @property
    def log_ahead_due(self) -> bool:
        return self._log.ahead_due

    def make_log_ahead(self) -> None:
        """The log's next segment, beside `append`, which is slower without. Raises ReplicaStoppedError."""
        self._log.make_ahead()

    def get(self, kind: Kind, id: int) -> Row | None:
        """The item or user, its checksums verified. Raises DamagedError."""
        return lookups.get(self._table, self._spaces[kind], id)

    def version_of(self, kind: Kind, id: int) -> Version | None:
        """Of the newest entry, a tombstone's too; None when there is none. Raises DamagedError."""
        return lookups.version_of(self._table, self._spaces[kind], id)

    def metadata(self, ids: Sequence[int]) -> list[bytes | None]:
        """Packed metadata of items in the order of `ids`; b"" for one that is gone, None for one whose entry is damaged.

        Raises DamagedError when the table itself cannot be read.
        """
        return lookups.metadata(self._table, self._spaces[Kind.ITEM], ids)

    def written(self, write_id: bytes) -> tuple[Version, int] | None:
        """The last version written under a client's write_id, and how many of its records the log has."""
        return self._write_ids.get(write_id)

    @property
    def epoch_starts(self) -> Mapping[int, int]:
        """Epoch → the first sequence logged in it, of the epochs that the log reaches back to and the one before."""
        return self._epochs.starts

    @property
    def placement(self) -> bytes:
        """Metadata of the last EPOCH mark in the log, b"" when there is none."""
        return self._epochs.placement

    @property
    def replica_id(self) -> int:
        """Random, made with the directory: another one in a rebuilt replica and in a copy from a snapshot."""
        return self._state.replica_id

    @property
    def node_id(self) -> str:
        """Whose directory it is."""
        return self._state.node_id

    def renew_replica_id(self) -> int:
        """A new one, durable on return. Blocks; no checkpoint or compaction may be under way.

        Raises DiskFullError (nothing has changed), ReplicaStoppedError.
        """
        self._check_running()
        assert self._checkpoint is None, "no checkpoint beside a new replica id"
        state = dataclasses.replace(self._state, replica_id=opening.new_replica_id())
        try:
            self._table.commit(state, {})
        except ReplicaStoppedError as error:
            self._stop(error)
            raise
        self._state = state
        return state.replica_id

    @property
    def newest_ns(self) -> int:
        """The newest timestamp among records with a remembered write_id: the clock of a shard never goes back before it."""
        return self._write_ids.newest_ns

    @property
    def logged_ns(self) -> int:
        """The last record's timestamp; 0 when it is not known."""
        return self._log.last_timestamp_ns

    @property
    def logged(self) -> int:
        """The last durable sequence: `position` follows it as soon as the loop has applied it."""
        return self._log.last.sequence

    @property
    def logged_at(self) -> Version:
        """(epoch, sequence) of the last durable record."""
        return self._log.last

    def read_log(self, after: int, max_bytes: int) -> bytes:
        """Whole durable records with sequence > after, at least one if there is one. Raises LogGoneError."""
        return self._log.read_after(after, max_bytes)

    def fingerprint(self, sequence: int) -> Fingerprint:
        """Of the log's record at `sequence`, at most its last; EMPTY for 0. Raises LogGoneError, DamagedError."""
        return fingerprint(self._log.read_after(sequence - 1, 1)) if sequence else EMPTY

    def fresh_rows(self) -> int:
        """Rows that the graph does not have yet; they are scanned."""
        view, engine = self.searchable
        return view.rows - engine.covered(view)

    def check_room(self, count: int) -> None:
        """Raises IndexingError when `count` more rows would pass `fresh_rows_max`."""
        fresh = self.fresh_rows()
        if fresh + count > self.config.fresh_rows_max and fresh:
            raise IndexingError(
                f"shard {self.shard} has {fresh} rows waiting for its graph, the most is {self.config.fresh_rows_max}; "
                "write again later"
            )

    # -- checkpoint -----------------------------------------------------------------------------------------------

    def checkpoint_due(self) -> bool:
        return (
            self.unsaved_bytes >= self.config.checkpoint_bytes
            and self._checkpoint is None
            and self._stopped is None
            and time.monotonic() >= self._retry_at
        )

    def begin_checkpoint(self) -> CheckpointJob:
        self._check_running()
        assert self._checkpoint is None, "one checkpoint at a time"
        write_ids = self._write_ids.freeze()
        state = self._current_state()
        self._checkpoint = CheckpointJob(
            table=self._table,
            files=[space.file for space in self._spaces.values()],
            state=state,
            changes={kind: space.freeze() for kind, space in self._spaces.items()},
            write_ids=write_ids,
            stop=self._stop,
            afterwards=self._after_checkpoint,
        )
        self._frozen_bytes, self.unsaved_bytes = self.unsaved_bytes, 0
        return self._checkpoint

    def finish_checkpoint(self, job: CheckpointJob) -> None:
        """Forgets what the table has now; or, when the job failed, keeps it in memory for the next one."""
        assert job is self._checkpoint
        self._checkpoint = None
        for space in self._spaces.values():
            space.thaw(kept=job.done)
        self._write_ids.thaw(kept=job.done)
        if job.done:
            self._note_checkpoint(job.state)
        else:
            self.unsaved_bytes += self._frozen_bytes
            self._retry_at = time.monotonic() + _RETRY_S
            self._counters["checkpoint_failures"] += 1

    def checkpoint(self) -> None:
        """All three steps, blocking. Raises DiskFullError, ReplicaStoppedError."""
        job = self.begin_checkpoint()
        try:
            job.run()
        finally:
            self.finish_checkpoint(job)
        if job.error is not None:
            raise job.error

    # -- compaction -----------------------------------------------------------------------------------------------

    def compaction_due(self) -> bool:
        return self._compactable() is not None

    def begin_compaction(self, kind: Kind | None = None) -> CompactionJob:
        """Of `kind`, or of the kind that is due; items when none is. Raises DiskFullError."""
        self._check_running()
        assert self._compaction is None, "one compaction at a time"
        due = self._compactable() or self._spaces[Kind.ITEM]
        space = due if kind is None else self._spaces[kind]
        self._compaction = CompactionJob(self, space, self._table)
        return self._compaction

    def finish_compaction(self, job: CompactionJob) -> None:
        """The next rowset becomes the one that is served. Commits first when that was not done."""
        assert job is self._compaction
        if not job.committed:
            job.commit()
        job.switch()
        self._compaction = None
        self._counters["compactions"] += 1
        if job.engine is not None:
            self.engine = job.engine
            self._graph.rows = job.saved_graph_rows
        for space in self._spaces.values():
            space.layers = ({}, {})
        self._publish()
        self._note_checkpoint(job.state)
        self.unsaved_bytes = 0
        job.remove_old()

    def commit_compaction(self, kind: Kind, rowset: int, rows: int, moved: Mapping[int, bytes]) -> TableState:
        """A job's transaction: all that memory holds, with `kind` in its next rowset. Raises StorageError."""
        self._check_running()
        assert self._checkpoint is None, "no checkpoint beside a compaction's commit"
        write_ids = self._write_ids.freeze()
        state = self._current_state().with_rowset(kind, rowset, rows)
        changes = {kind_: space.layers[0] for kind_, space in self._spaces.items()} | {kind: moved}
        self._commit(state, changes, write_ids)
        return state

    def _commit(
        self,
        state: TableState,
        changes: Mapping[Kind, Mapping[int, bytes]],
        write_ids: Mapping[bytes, bytes | None],
    ) -> None:
        """Rows, then one transaction with what `WriteIds.freeze` gave. Raises StorageError."""
        kept = False
        try:
            for space in self._spaces.values():
                space.file.sync()
            self._table.commit(state, changes, write_ids)
            kept = True
        except ReplicaStoppedError as error:
            self._stop(error)
            raise
        finally:
            self._write_ids.thaw(kept=kept)

    def compaction_ended(self) -> None:
        """Called by a job that gave up."""
        self._compaction = None
        self._compact_retry_at = time.monotonic() + _RETRY_S

    def _compactable(self) -> Space | None:
        if self._compaction or self._checkpoint or self._stopped or time.monotonic() < self._compact_retry_at:
            return None
        return next((space for space in self._spaces.values() if space.wasteful(self.config)), None)

    # -- cutting a tail -------------------------------------------------------------------------------------------

    def cut(self, sequence: int) -> bool:
        """The log ends at `sequence`, 0 ≤ sequence < last. Whether what it lost is in a side file: not if it was only marks.

        Blocks; in append's thread, with everything applied and no checkpoint or compaction under way. A crash at any
        point leaves a whole replica, cut or not, on which it can be called again. Rows stay: versions say which win.
        Raises LogGoneError, DiskFullError (neither log nor table has changed), DamagedError, ReplicaStoppedError.
        """
        self._check_running()
        assert self._checkpoint is None, "no checkpoint beside a cut"
        assert self._compaction is None, "no compaction beside a cut"
        assert 0 <= sequence < self.position.sequence == self._log.last.sequence
        first = self._log.first_sequence
        if sequence < first and (sequence, first) != (0, 1):
            raise LogGoneError(f"the log begins at sequence {first}; it cannot be cut to end at {sequence}")
        try:
            side = self._sides.keep(self._log.tail(sequence))
            reached("cut.after_side_file")
            self._log.cut(sequence, self._go_back)
            reached("cut.after_log")
        except (DamagedError, ReplicaStoppedError) as error:
            self._stop(error)
            raise
        self._counters["cuts"] += 1
        self._publish()
        return side is not None

    def _go_back(self, last: Version) -> None:
        """One transaction makes the checkpoint what it was at `last`, but for the rows: they are those of memory."""
        self._write_ids.cut(record for _, record in self._log.tail(last.sequence))
        versions = {
            record.version
            for _, record in self._log.tail(last.sequence)
            if record.operation is not Operation.MARK
        }
        epochs = self._epochs.up_to(last.sequence)
        write_ids = self._write_ids.freeze()
        state = opening.with_state(
            self._state, self._spaces, position=last, epochs=epochs,
            purge_floor=self.purge_floor, write_ids=self._write_ids.chunks,
        )  # fmt: skip
        try:
            self._commit(state, {kind: space.layers[0] for kind, space in self._spaces.items()}, write_ids)
        except StorageError:
            self._write_ids.apply(record for _, record in self._log.tail(last.sequence))
            raise
        reached("cut.after_checkpoint")
        for space in self._spaces.values():
            space.layers = ({}, {})
        self._sides.afloat |= versions
        self.position, self._epochs = last, epochs
        self.digested.cut(last.sequence)
        self.unsaved_bytes = self._pending_rows = 0
        self._note_checkpoint(state)

    def keep_tail(self, sequence: int) -> SideFile | None:
        """What the log has after `sequence`, as far as it reaches back, in a side file; None: nothing but marks.

        Before another replica takes the place of this one, while nothing is appended. Raises as `cut`.
        """
        return self._sides.keep(self._log.tail(max(sequence, self._log.first_sequence - 1)))

    @property
    def quarantine_path(self) -> Path:
        """Where records are put aside."""
        return self._quarantine.path

    def side_files(self) -> list[SideFile]:
        """What was cut and not yet removed, oldest first."""
        return self._sides.list()

    def holds(self, record: Record) -> bool:
        """Whether a record that is offered again came too late: its id has a newer one, or the log has it already.

        Not when all that is here of it is the row that stayed when it was cut. Raises DamagedError.
        """
        there = self.version_of(record.kind, record.id)
        if there is None or there < record.version:
            return False
        return there > record.version or record.version not in self._sides.afloat

    def drop_row(self, kind: Kind, id: int, version: Version) -> bool:
        """Forgets the row or tombstone if its version is exactly that: of a record that was put aside elsewhere.

        On the loop. Durable with the next checkpoint: only then may its side file go. Raises ReplicaStoppedError.
        """
        self._check_running()
        dropped = self._spaces[kind].drop(self._table, id, version)
        if dropped:
            self._publish()
        return dropped

    def quarantine(self, records: Sequence[Record]) -> None:
        """Puts records aside, durably on return; those that are there already are left out. Blocks.

        Raises QuarantineFullError, DiskFullError (nothing has changed), DamagedError, ReplicaStoppedError.
        """
        self._quarantine.add(records)

    def quarantined(self) -> list[Record]:
        """What was put aside, read from the disk. Raises DamagedError."""
        return self._quarantine.records()

    @property
    def tombstones(self) -> int:
        return sum(len(space.tombstones) for space in self._spaces.values())

    def purgeable(self, up_to: int) -> bool:
        """Whether a PURGE mark has something to do, when every replica has passed the log's sequence `up_to`."""
        return self.purge_point(up_to) is not None

    def purge_point(self, up_to: int) -> Version | None:
        """The floor for that mark: at or below `up_to`, older than `tombstones_keep_s`, and of so many tombstones
        that applying it holds the loop up for some milliseconds only. None when there is none."""
        older_than_ns = time.time_ns() - int(self.config.tombstones_keep_s * 1e9)
        bound = min(self._log.aged(older_than_ns), self._epochs.place(up_to))
        found = merge(*(space.tombstones.up_to(bound) for space in self._spaces.values()))
        return max(islice(found, _PURGE_MAX), default=None)

    # -- the rest -------------------------------------------------------------------------------------------------

    def export(self, directory: Path, *, checkpoint: bool = True) -> None:
        """A snapshot into `directory`, which must not exist. Blocks for as long as copying takes.

        With `checkpoint` no other call may run meanwhile. Without it the last checkpoint's state is exported, from any
        thread, beside writes and checkpoints, but not beside `finish_compaction`. Raises DiskFullError.
        """
        if checkpoint:
            self.checkpoint()
        snapshot.export(Path(directory), **self._checkpointed())

    def pin(self, directory: Path) -> snapshot.Pinned:
        """The last checkpoint's files in `directory`, on the same file system: linked where they only grow. From any thread,
        beside writes, not beside a job. Raises as `snapshot.pin`."""
        return snapshot.pin(directory, **self._checkpointed(), link=True)

    def _checkpointed(self) -> dict[str, Any]:
        return {
            "table": self._table,
            "files": {kind: space.file for kind, space in self._spaces.items()},
            "index": opening.index_directory(self.directory, self.view.rowset),
            # Of what was cut, rows may still be in the table; whoever has those must offer it, too.
            "tails": [file.path for file in self.side_files()],
            "record_at": lambda sequence: self.read_log(sequence - 1, 1),
        }

    @staticmethod
    def import_snapshot(
        source: Path,
        directory: Path,
        *,
        shard: int,
        node_id: str,
        config: StorageConfig,
        replica_id: int | None = None,
    ) -> None:
        """A replica directory from a snapshot; `directory` must not exist. Open it afterwards.

        replica_id: of the replica whose place it takes, None for a new one.

        Raises DamagedError, FormatError, ForeignDataError, DiskFullError; then nothing is left.
        """
        snapshot.import_snapshot(
            Path(source),
            Path(directory),
            shard=shard,
            node_id=node_id,
            config=config,
            replica_id=replica_id,
        )

    def statistics(self) -> Statistics:
        """Counters and sizes; `digest` is equal on replicas that hold the same."""
        return (
            space_figures(self._spaces)
            | {
                "shard": self.shard,
                "position": tuple(self.position),
                "checkpoint_position": tuple(self._state.position),
                "fresh": self.fresh_rows(),
                "checkpoint_age_s": time.monotonic() - self._checkpointed_at,
                "unsaved_bytes": self.unsaved_bytes,
                "unsettled": max(0, self.position.sequence - self.settled),
                "table_bytes": self._table.size_bytes(),
                "write_ids": len(self._write_ids),
                "write_ids_refused": self._write_ids.refused,
                "graph_saves": self._graph.saves,
                "stopped": self._stopped is not None,
                "log": self._log.statistics(),
                "engine": self.engine.statistics(),
            }
            | self._counters
        )

    def digest(self, kind: Kind) -> int:
        """Equal on replicas that hold the same records of `kind`."""
        return self._spaces[kind].digest()

    def bucket_digests(self, kind: Kind) -> tuple[int, ...]:
        """256 XOR digests of entries, by the low byte of the id; equal on replicas that hold the same."""
        return tuple(self._spaces[kind].buckets)

    def _digests(self) -> Digests:
        return {kind: self.bucket_digests(kind) for kind in self._spaces}

    def listing(
        self, kind: Kind, wanted: Collection[int], after: int, limit: int
    ) -> tuple[dict[int, Seen], int]:
        """As `buckets.listing`."""
        return buckets.listing(self._table, self._spaces[kind], wanted, after, limit)

    def copies(self, kind: Kind, ids: Sequence[int]) -> list[Record]:
        """As `buckets.copies`; from any thread."""
        return buckets.copies(self._table, self._spaces[kind], ids)

    def mend(self, record: Record) -> bool:
        """The entry of that very version gets the record's content; False: there is none. On the loop, nothing is appended
        meanwhile; durable with the next checkpoint. Raises DiskFullError, ReplicaStoppedError, DamagedError."""
        self._check_running()
        space = self._spaces[record.kind]
        space.file.ensure(space.rows + self._pending_rows + 1)
        mended = buckets.mend(self._table, space, record)
        if mended:
            self._publish()
        return mended

    def close(self) -> None:
        """Checkpoint, graph, seal, files. When the disk refuses, what the log has is replayed at the next open."""
        self._abandon_jobs()
        sealed = False
        if self._stopped is None:
            try:
                self.checkpoint()
                self._graph.save(self.engine, self.view.rowset, closing=True)
                sealed = True
            except (DiskFullError, ReplicaStoppedError):
                # The log has it all: closing must not fail for want of room.
                sealed = False
        with contextlib.suppress(OSError):  # likewise: a seal that cannot be written is left out
            self._close_files(seal=sealed)

    def abort(self) -> None:
        """Closes files and writes nothing, as a crash would; what jobs have left is cleared at the next open."""
        if self._compaction is not None:
            self._compaction.close()
        self._close_files(seal=False)

    def retire(self) -> None:
        """Closes files and touches no name: another replica has taken the directory's place. No job may be under way."""
        self._stop(ReplicaStoppedError(f"another replica of shard {self.shard} has taken its place"))
        with contextlib.ExitStack() as stack:
            stack.callback(self._owner.close)
            stack.callback(self._table.close, seal=False)
            for space in self._spaces.values():
                stack.callback(space.file.close)
            stack.callback(self._log.release)

    def _abandon_jobs(self) -> None:
        if self._checkpoint is not None:
            self.finish_checkpoint(self._checkpoint)
        if self._compaction is not None and self._compaction.committed:
            self.finish_compaction(self._compaction)
        elif self._compaction is not None:
            self._compaction.abandon()

    def _close_files(self, *, seal: bool) -> None:
        with contextlib.ExitStack() as stack:  # each of them, whatever fails
            stack.callback(self._owner.close)
            stack.callback(self._table.close, seal=seal)
            for space in self._spaces.values():
                stack.callback(space.file.close)
            stack.callback(self._log.close)

    def _recover(self, start: float) -> None:
        verified = time.monotonic()
        replay = Replay(self, self._log, [space.file for space in self._spaces.values()])
        replay.run(self.position.sequence)
        if self._sides.list():
            self._sides.load_afloat(self._versions_after(self._sides.first_sequence - 1))
        self._publish()
        replayed_at = time.monotonic()
        loaded = self._graph.load(self.engine, self.view)
        end = time.monotonic()
        self.recovery = opening.Recovery(
            position=self.position, rows=self.view.rows, fresh=self.fresh_rows(),
            replayed=replay.records, checkpoints=replay.checkpoints, graph_loaded=loaded,
            verify_s=verified - start, replay_s=replayed_at - verified, graph_s=end - replayed_at,
            total_s=end - start, log=self._log.statistics(),
        )  # fmt: skip

    def _versions_after(self, sequence: int) -> set[tuple[int, int]]:
        """Of all records that the log has after `sequence`."""
        after = min(max(sequence, self._log.first_sequence - 1), self.logged)
        found: set[tuple[int, int]] = set()
        for data, offset, end in self._log.spans(after):
            for part in columns(data, offset, end, after, 2_048):
                found |= part.versions()
        return found

    def take_logged(self, records: Columns, write: WriteRows) -> None:
        """Replay's part of `apply`: the log has these already, and no view is published. Raises DiskFullError."""
        kinds = set(records.headers["kind"].tolist())
        for part, mark in column_parts(records):
            for kind, space in self._spaces.items():
                if kind in kinds and len(mine := part.of(kind)):
                    space.file.ensure(space.rows + len(mine))
                    space.apply_columns(mine, self._table, write)
            self._take_mark(mark)
        if Kind.NONE in kinds:
            for record in records.of(Kind.NONE).records():
                self._epochs.mark(record)
        head, last = records.headers, records.last
        self._write_ids.apply_columns(head)
        if last.epoch != self.position.epoch:
            self._epochs.advance(self.position.epoch, head["epoch"].tolist(), head["sequence"].tolist())
        self.position = last

    def _take(self, records: Sequence[Record]) -> None:
        if not records:
            return
        for part, mark in parts(records):
            for kind, space in self._spaces.items():
                mine = [record for record in part if record[6] is kind]
                if mine:
                    with self._table.lookup(kind) as lookup:
                        space.apply(mine, lookup)
            self._take_mark(mark)
        for record in records:
            if record[6] is Kind.NONE:
                self._epochs.mark(record)
        self._write_ids.apply(records)
        last = Version(records[-1].epoch, records[-1].sequence)
        if last.epoch != self.position.epoch:
            self._epochs.advance(
                self.position.epoch,
                [record.epoch for record in records],
                [record.sequence for record in records],
            )
        self.position = last

    def _take_mark(self, mark: Record | None) -> None:
        """What a PURGE or DIGEST mark does at its place."""
        if mark is None:
            return
        if mark.id == Mark.DIGEST:
            self.digested.note(Version(mark.epoch, mark.sequence), self._digests())
            return
        self.purge_floor = max(self.purge_floor, decode_floor(mark.metadata))
        for space in self._spaces.values():
            space.purge(self.purge_floor)

    def _publish(self) -> None:
        space = self._spaces[Kind.ITEM]
        arrays = space.arrays
        assert arrays is not None
        arrays.room(1)
        self.view = ShardView(
            shard=self.shard, position=self.position, rows=space.rows, alive_rows=space.alive,
            vectors=space.file.vectors, ids=arrays.ids, masks=arrays.masks,
            alive=arrays.alive(space.rows), rowset=space.rowset,
        )  # fmt: skip
        self.searchable = (self.view, self.engine)

    def _current_state(self) -> TableState:
        self._epochs.prune(self._log.first_sequence)
        return opening.with_state(
            self._state, self._spaces, position=self.position, epochs=self._epochs,
            purge_floor=self.purge_floor, write_ids=self._write_ids.chunks,
        )  # fmt: skip

    def _after_checkpoint(self, state: TableState) -> None:
        older_than_ns = time.time_ns() - int(self.config.wal_keep_s * 1e9)
        # The record at the checkpoint's position stays: whoever takes a snapshot of it must name that record.
        # What nobody else may have stays however old, as long as there is room for it.
        settled, first = self.settled, self._log.first_sequence
        unsettled = max(settled, self._log.newest(self.config.wal_unsettled_bytes))
        kept_from = min([state.position.sequence, unsettled, *self.log_holds.values()])
        self._log.drop_before(kept_from, older_than_ns)
        gone = self._log.first_sequence - max(first, settled + 1)
        self._counters["unsettled_dropped"] += max(0, gone)
        self._table.drop_behind()
        self._graph.save(self.engine, state.items.rowset)

    def _note_checkpoint(self, state: TableState) -> None:
        self._state = state
        self._checkpointed_at = time.monotonic()
        self._counters["checkpoints"] += 1

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise ReplicaStoppedError(
                f"shard {self.shard} takes no more writes until it is reopened: {self._stopped}"
            )

    def _stop(self, error: StorageError) -> None:
        self._stopped = self._stopped or error
