"""A replica against a dict: whatever the order of writes, checkpoints, compactions and crashes, the answers agree."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage.batch import Batch
from storage.checkpoint import CheckpointJob
from storage.compaction import CompactionJob
from storage.records import Kind, Version, decode
from storage.view import ClassConstraint
from tests.unit.storage.replica_writer import DIM, Writer, vector

KINDS = st.sampled_from([Kind.ITEM, Kind.USER])
IDS = st.integers(0, 12) | st.sampled_from([256, (1 << 64) - 1])
CLASSES = st.lists(st.integers(0, 63), max_size=3, unique=True).map(lambda ids: tuple(sorted(ids)))
PUT = st.tuples(KINDS, IDS, st.integers(0, 50).map(vector), CLASSES, st.binary(max_size=5))
CHANGE = PUT | st.tuples(KINDS, IDS)


class ReplicaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        directory = self.stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        self.writer = Writer(Path(directory) / "shard-003")
        self.model: dict[Kind, dict[int, Any]] = {Kind.ITEM: {}, Kind.USER: {}}
        # (version, write_id) of each record in the log
        self.log: list[tuple[Version, bytes]] = []
        self.job: CheckpointJob | None = None
        self.compaction: CompactionJob | None = None
        self.ran = False

    @rule(changes=st.lists(CHANGE, min_size=1, max_size=8), name=st.integers(0, 3))
    def write(self, changes: list[Any], name: int) -> None:
        write_id = bytes([name]) * 16
        self.writer.write(*changes, write_id=write_id)
        self.log += [(record.version, write_id) for record in self.writer.last]
        for kind, id, *body in changes:
            self.model[kind].pop(id, None)
            if body:
                self.model[kind][id] = tuple(body)

    @precondition(lambda self: self.job is None)
    @rule()
    def begin_checkpoint(self) -> None:
        self.job = self.writer.replica.begin_checkpoint()

    @precondition(lambda self: self.job is not None)
    @rule()
    def run_and_finish_checkpoint(self) -> None:
        assert self.job is not None
        if not self.job.done:
            self.job.run()
        self.writer.replica.finish_checkpoint(self.job)
        self.job = None

    @precondition(lambda self: self.job is not None and not self.job.done)
    @rule()
    def run_checkpoint(self) -> None:
        assert self.job is not None
        self.job.run()

    @precondition(lambda self: self.compaction is None)
    @rule(kind=KINDS)
    def begin_compaction(self, kind: Kind) -> None:
        self.compaction = self.writer.replica.begin_compaction(kind)
        self.ran = False

    @precondition(lambda self: self.compaction is not None and not self.ran)
    @rule()
    def run_compaction(self) -> None:
        assert self.compaction is not None
        self.compaction.run()
        self.ran = True

    @precondition(lambda self: self.compaction is not None and self.ran and self.job is None)
    @rule(crash=st.booleans())
    def commit_compaction(self, crash: bool) -> None:
        assert self.compaction is not None
        self.compaction.commit()
        if crash:
            self.writer.crash()
        else:
            self.writer.replica.finish_compaction(self.compaction)
        self.compaction = None

    @precondition(lambda self: self.compaction is not None)
    @rule()
    def abandon_compaction(self) -> None:
        assert self.compaction is not None
        self.compaction.abandon()
        self.compaction = None

    @precondition(lambda self: self.job is None and self.compaction is None and len(self.log) > 0)
    @rule(data=st.data(), epoch=st.integers(1, 2))
    def cut(self, data: st.DataObject, epoch: int) -> None:
        first = self.writer.replica.statistics()["log"]["first_sequence"]
        lowest = 0 if first == 1 else first
        if lowest >= len(self.log):
            return
        sequence = data.draw(st.integers(lowest, len(self.log) - 1))
        digest = self.writer.replica.statistics()["digest"]
        assert self.writer.replica.cut(sequence)
        del self.log[sequence:]
        assert self.writer.replica.statistics()["digest"] == digest
        self.writer.epoch += epoch

    @precondition(lambda self: self.writer.replica.side_files())
    @rule()
    def offer_again(self) -> None:
        """What the log does not have, in a new place, with its version and write_id."""
        replica, (file, *_) = self.writer.replica, self.writer.replica.side_files()
        there = {version for version, _ in self.log}
        batch = Batch(self.writer.epoch, len(self.log), 1)
        for blob in file.read(0, 1 << 20)[0]:
            record = decode(blob)
            if record.version not in there:
                batch.add_again(record)
                there.add(record.version)
                self.log.append((record.version, record.write_id))
        digest = replica.statistics()["digest"]
        if batch.records:
            self.writer.take(batch)
        assert replica.statistics()["digest"] == digest
        file.remove()

    @rule()
    def crash(self) -> None:
        digest = self.writer.replica.statistics()["digest"]
        self.writer.crash()
        self.job = self.compaction = None
        assert self.writer.replica.statistics()["digest"] == digest

    @rule()
    def reopen(self) -> None:
        self.writer.reopen()
        self.job = self.compaction = None
        assert self.writer.replica.recovery.replayed == 0

    @invariant()
    def look_ups_agree(self) -> None:
        replica = self.writer.replica
        for kind, held in self.model.items():
            for id in (*range(13), 256, (1 << 64) - 1):
                row, wanted = replica.get(kind, id), held.get(id)
                got = None if row is None else (row.vector, row.classes, row.metadata)
                assert got == wanted, (kind, id)
        ids = [*range(13), 256]
        items = self.model[Kind.ITEM]
        assert replica.metadata(ids) == [items[id][2] if id in items else b"" for id in ids]
        assert replica.position.sequence == replica.logged == len(self.log)
        for write_id in (bytes([name]) * 16 for name in range(1, 4)):
            count = sum(one == write_id for _, one in self.log)
            found = replica.written(write_id)
            assert (found[1] if found else 0) == count

    @invariant()
    def searches_agree(self) -> None:
        view, engine = self.writer.replica.searchable
        items = self.model[Kind.ITEM]
        assert view.alive_rows == len(items)
        assert int(np.unpackbits(view.alive, count=view.rows, bitorder="little").sum()) == len(items)
        query = np.frombuffer(vector(999), np.float16).reshape(1, DIM)
        exact = query[0].astype(np.float64)
        for constraint in (ClassConstraint(), ClassConstraint(require_any=tuple(range(20)))):
            hits = engine.search(view, query, 40, [constraint])[0]
            any_of = set(constraint.require_any)
            wanted = sorted(
                (-np.float32(np.dot(np.frombuffer(body[0], np.float16).astype(np.float64), exact)), id)
                for id, body in items.items()
                if not any_of or any_of & set(body[1])
            )
            np.testing.assert_allclose(hits.scores, [-score for score, _ in wanted], rtol=1e-6)
            assert sorted(int(id) for id in hits.ids) == sorted(id for _, id in wanted)

    def teardown(self) -> None:
        self.writer.replica.abort()
        self.stack.close()


TestReplica = ReplicaMachine.TestCase
TestReplica.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
