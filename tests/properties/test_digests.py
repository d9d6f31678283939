"""Replicas of one log have equal digests, whatever each went through on the way (docs/replication.md, `greater-wins`)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from storage.batch import Batch
from storage.bulk import offsets, verified
from storage.records import Kind, Mark, Operation, Record, Version, decode, split
from storage.replica import Replica
from storage.tombstones import encode_floor
from tests.unit.storage.replica_writer import CONFIG, Writer, vector

KINDS = st.sampled_from([Kind.ITEM, Kind.USER])
IDS = st.integers(0, 5) | st.just(256)
PUT = st.tuples(
    st.just(Operation.PUT), KINDS, IDS, st.integers(0, 50).map(vector), st.just((1,)), st.just(b"m")
)
DELETE = st.tuples(st.just(Operation.DELETE), KINDS, IDS, st.just(b""), st.just(()), st.just(b""))
# Of the primary: changes, or a floor as a part of the log's length.
WRITES = st.lists(PUT | DELETE, min_size=1, max_size=5) | st.floats(0, 1)
JOBS = st.sampled_from(["", "", "", "checkpoint", "compact", "crash", "reopen", "snapshot"])


class Peer:
    def __init__(self, directory: Path) -> None:
        self.writer = Writer(directory / "shard-003")
        self.copies = 0

    @property
    def replica(self) -> Replica:
        return self.writer.replica

    def job(self, name: str) -> None:
        if name == "checkpoint":
            self.replica.checkpoint()
        elif name == "compact":
            compaction = self.replica.begin_compaction()
            compaction.run()
            self.replica.finish_compaction(compaction)
        elif name == "snapshot":
            self.copies += 1
            snap = self.writer.directory.with_name(f"snap-{self.copies}")
            target = self.writer.directory.with_name(f"copy-{self.copies}")
            self.replica.export(snap)
            self.replica.close()
            Replica.import_snapshot(snap, target, shard=3, node_id="n1", config=CONFIG)
            self.writer.directory = target
            self.writer.open()
        elif name:
            getattr(self.writer, name)()

    def follow(self, log: list[tuple[bytes, Record]], most: int) -> None:
        """The next records of the primary's log, `most` of them, in columns, however few."""
        data = b"".join([blob for blob, _ in log[self.replica.position.sequence :][:most]])
        if data:
            records = verified(data, offsets(data))
            self.replica.append_run(records.run(), records.puts)
            self.replica.apply(records)


class Primary(Peer):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.log: list[tuple[bytes, Record]] = []

    def write(self, write: Any) -> None:
        batch = Batch(self.writer.epoch, len(self.log), 1)
        if isinstance(write, float):
            passed = round(write * len(self.log))
            epoch = self.log[passed - 1][1].epoch if passed else 0
            batch.add_mark(Mark.PURGE, encode_floor(Version(epoch, passed)))
        else:
            batch.add(write, b"w" * 16)
        self.take(batch)

    def take(self, batch: Batch) -> None:
        self.writer.take(batch)
        self.log += zip(batch.blobs, batch.records, strict=True)

    def offered(self, tail: list[Record]) -> list[Record]:
        """Takes a tail as the node does; which records it puts aside."""
        aside = []
        for record in tail:
            if self.replica.holds(record):
                continue
            if (
                self.replica.version_of(record.kind, record.id) is None
                and record.version <= self.replica.purge_floor
            ):
                aside.append(record)
                continue
            batch = Batch(self.writer.epoch, len(self.log), 1)
            batch.add_again(record)
            self.take(batch)
        return aside


def shown(replica: Replica) -> Any:
    return (
        replica.position,
        [replica.bucket_digests(kind) for kind in (Kind.ITEM, Kind.USER)],
        [replica.version_of(kind, id) for kind in (Kind.ITEM, Kind.USER) for id in (*range(6), 256)],
        replica.tombstones,
        replica.purge_floor,
        # How many of its records the log has; which of them is the last, a cut run may tell differently (docs/storage.md).
        (replica.written(b"w" * 16) or (None, 0))[1],
        replica.statistics()["items"],
    )


@settings(max_examples=40, deadline=None)
@given(
    writes=st.lists(st.tuples(WRITES, JOBS), min_size=1, max_size=12),
    jobs=st.lists(st.tuples(st.integers(1, 8), JOBS), max_size=20),
)
def test_followers_that_batch_and_save_differently(writes: list[Any], jobs: list[tuple[int, str]]) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        primary, follower = Primary(Path(directory) / "a"), Peer(Path(directory) / "b")
        for write, job in writes:
            primary.write(write)
            primary.job(job)
        for count, job in jobs:
            follower.follow(primary.log, count)
            follower.job(job)
        follower.follow(primary.log, len(primary.log))
        assert shown(follower.replica) == shown(primary.replica)
        for peer in (primary, follower):
            peer.replica.abort()


@settings(max_examples=60, deadline=None)
@given(
    shared=st.lists(st.tuples(WRITES, JOBS), min_size=1, max_size=5),
    tail=st.lists(st.lists(PUT | DELETE, min_size=1, max_size=4), min_size=1, max_size=3),
    others=st.lists(WRITES, max_size=4),
    later=st.lists(WRITES, max_size=3),
    jobs=st.lists(JOBS.filter(lambda name: name != "snapshot"), min_size=3, max_size=3),
    itself=st.booleans(),
)
def test_a_tail_that_is_cut_and_offered_again(
    shared: list[Any], tail: list[Any], others: list[Any], later: list[Any], jobs: list[str], itself: bool
) -> None:
    """`itself`: who has the side file leads when it is offered."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        old, new = Primary(Path(directory) / "a"), Primary(Path(directory) / "b")
        for write, job in shared:
            old.write(write)
            new.follow(old.log, 99)
            new.job(job if job != "snapshot" else "")
        point = len(old.log)
        new.log = list(old.log)
        for write in tail:
            old.write(write)
        old.job(jobs[0])
        new.writer.epoch = 2
        batch = Batch(2, point, 1)
        batch.add_mark(Mark.EPOCH, b"two")
        new.take(batch)
        for write in others:
            new.write(write)
        if old.replica.statistics()["log"]["first_sequence"] > point:
            return
        assert old.replica.cut(point)
        old.job(jobs[1])
        old.follow(new.log, 99)
        old.job(jobs[2])
        (file,) = old.replica.side_files()
        blobs, _ = file.read(0, 1 << 20)
        if itself:
            old.log, old.writer.epoch = list(new.log), 3
            old, new = new, old
        aside = new.offered([decode(blob) for blob in blobs])
        for write in later:
            new.write(write)
        for one in aside:
            for peer in (old, new):
                peer.replica.drop_row(one.kind, one.id, one.version)
        file.remove()
        old.follow(new.log, 99)
        assert shown(old.replica) == shown(new.replica)
        assert [blob for blob, _ in split(new.replica.read_log(point, 1 << 30))]
        for peer in (old, new):
            peer.replica.abort()
