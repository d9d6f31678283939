"""One replica: what was applied is answered, now, after a checkpoint, after a crash and after compaction."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from storage.compaction import CompactionJob
from storage.errors import (
    DamagedError,
    DiskFullError,
    ForeignDataError,
    IndexingError,
    ReplicaStoppedError,
    StorageError,
)
from storage.records import Kind, Operation, Version, decode, encode
from storage.replica import Replica
from storage.table import Table
from storage.vectors import RowFile
from tests.unit.storage.replica_writer import CONFIG, Writer, answer, vector


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "shard-003")


def test_a_put_is_read_back_by_get_metadata_and_search(writer: Writer) -> None:
    writer.put(1, 2, 3)
    row = writer.replica.get(Kind.ITEM, 2)
    assert row is not None
    assert (row.vector, row.classes, row.metadata, row.version) == (vector(2), (2,), b"m2", Version(1, 2))
    assert writer.replica.metadata([3, 9, 1]) == [b"m3", b"", b"m1"]
    assert answer(writer.replica, 2)[0] == 2
    assert writer.replica.view.masks[1, 0] == 1 << 2
    assert writer.replica.get(Kind.USER, 2) is None


def test_update_and_delete_leave_dead_rows_and_old_views_alone(writer: Writer) -> None:
    """`one-writer`."""
    writer.put(1, 2)
    before = writer.replica.view
    writer.put(1, seed=100)
    writer.write((Kind.ITEM, 2))
    view = writer.replica.view
    assert (before.rows, before.alive_rows, before.alive.tolist()) == (2, 2, [0b11])
    assert (view.rows, view.alive_rows, view.alive.tolist()) == (3, 1, [0b100])
    assert writer.replica.get(Kind.ITEM, 2) is None
    assert writer.replica.metadata([1, 2]) == [b"m101", b""]
    assert writer.replica.statistics()["items"] == 2  # one alive, one tombstone


@pytest.mark.parametrize("how", ["crash", "reopen", "checkpoint", "compact"])
def test_everything_survives(writer: Writer, how: str) -> None:
    writer.put(*range(100), (1 << 64) - 1)
    writer.put(7, seed=500)
    writer.put(5, 6, kind=Kind.USER)
    writer.write((Kind.ITEM, 8), (Kind.USER, 6), write_id=b"w" * 16)
    before = writer.replica.statistics()
    replica = writer.replica
    if how == "checkpoint":
        replica.checkpoint()
        writer.put(200)
        replica = writer.crash()
        assert replica.recovery.replayed == 1
    elif how == "compact":
        replica.checkpoint()
        job = replica.begin_compaction()
        writer.put(201, seed=1)
        writer.put(9, seed=300)
        job.run()
        writer.put(202, seed=1)
        job.commit()
        replica.finish_compaction(job)
        assert replica.get(Kind.ITEM, 9).metadata == b"m309"  # type: ignore[union-attr]
        assert (replica.view.rows, replica.view.alive_rows, replica.view.rowset) == (103, 102, 2)
        replica = writer.crash()
        assert replica.recovery.replayed == 0
        assert sorted(path.name for path in writer.directory.glob("items*")) == ["items-0000000002.f16"]
    else:
        replica = getattr(writer, how)()
        assert replica.statistics()["digest"] == before["digest"]
        assert (replica.view.rows, replica.view.alive_rows) == (102, 100)
    assert replica.get(Kind.ITEM, 7).metadata == b"m507"  # type: ignore[union-attr]
    assert replica.get(Kind.ITEM, 8) is None
    assert replica.get(Kind.ITEM, (1 << 64) - 1) is not None
    assert replica.get(Kind.USER, 5).vector == vector(5)  # type: ignore[union-attr]
    assert replica.get(Kind.USER, 6) is None
    assert answer(replica, 507)[0] == 7
    assert replica.written(b"w" * 16) == (Version(1, 106), 2)


def test_the_greater_version_wins_whatever_the_order(writer: Writer) -> None:
    writer.put(1, seed=10)
    blob = encode(
        epoch=1, sequence=2, version=Version(0, 9), timestamp_ns=1, operation=Operation.PUT, kind=Kind.ITEM, id=1,
        vector=vector(0),
    )  # fmt: skip
    writer.replica.append([blob], 1)
    writer.replica.apply([decode(blob)])
    assert writer.replica.position == (1, 2)
    assert writer.replica.metadata([1]) == [b"m11"]
    assert writer.replica.view.rows == 1
    assert writer.crash().view.rows == 1


def test_written_counts_records_of_one_run_and_forgets_after_ten_minutes(writer: Writer) -> None:
    first, second = b"a" * 16, b"b" * 16
    put = [(Kind.ITEM, id, vector(id), (), b"") for id in range(4)]
    writer.write(*put[:2], write_id=first, at_ns=10**9)
    assert writer.replica.written(first) == (Version(1, 2), 2)
    writer.write(*put[2:], write_id=first, at_ns=10**9)
    assert writer.replica.written(first) == (Version(1, 4), 4)
    assert writer.replica.written(second) is None
    assert writer.replica.written(bytes(16)) is None
    assert writer.crash().written(first) == (Version(1, 4), 4)
    assert writer.reopen().written(first) == (Version(1, 4), 4)
    writer.write(put[0], write_id=second, at_ns=602 * 10**9)
    assert writer.replica.written(first) is None
    assert writer.reopen().statistics()["write_ids"] == 1


def test_write_ids_are_bounded(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "s", dataclasses.replace(CONFIG, write_ids_max=3))
    for id in range(6):
        writer.write((Kind.ITEM, id), write_id=id.to_bytes(16, "big"), at_ns=5)
    assert writer.replica.statistics()["write_ids"] == 3
    assert writer.replica.statistics()["write_ids_refused"] == 2  # id 0 is "no write_id"


def test_epoch_starts_are_kept(writer: Writer) -> None:
    writer.put(1)
    writer.epoch = 4
    writer.put(2, 3)
    assert writer.replica.epoch_starts == {1: 1, 4: 2}
    assert writer.crash().epoch_starts == {1: 1, 4: 2}
    assert writer.reopen().epoch_starts == {1: 1, 4: 2}


def test_read_log_gives_whole_records_after_a_sequence(writer: Writer) -> None:
    writer.put(1, 2, 3)
    assert decode(writer.replica.read_log(1, 1)).sequence == 2
    assert writer.replica.read_log(3, 1 << 20) == b""


def test_a_full_disk_changes_nothing(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.put(1)

    def full(*_: object) -> None:
        raise DiskFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "ensure", full)
        with pytest.raises(DiskFullError):
            writer.put(2)
        assert writer.replica.position == (1, 1)
        patch.undo()
        patch.setattr(Table, "commit", full)
        job = writer.replica.begin_checkpoint()
        writer.put(1, seed=9)
        job.run()
        writer.replica.finish_checkpoint(job)
        assert isinstance(job.error, DiskFullError)
        assert writer.replica.metadata([1]) == [b"m10"]
        compaction = writer.replica.begin_compaction()
        compaction.run()
        with pytest.raises(DiskFullError):
            compaction.commit()
        assert writer.replica.view.rowset == 1
    assert writer.replica.metadata([1]) == [b"m10"]
    writer.replica.checkpoint()
    assert writer.crash().metadata([1]) == [b"m10"]


def test_a_failed_fsync_stops_writes_but_not_reads(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.put(1)

    def fail(*_: object) -> None:
        raise ReplicaStoppedError("fdatasync failed")

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "sync", fail)
        with pytest.raises(ReplicaStoppedError):
            writer.replica.checkpoint()
    with pytest.raises(ReplicaStoppedError):
        writer.put(2)
    assert writer.replica.metadata([1]) == [b"m1"]
    assert writer.reopen().metadata([1]) == [b"m1"]


def test_foreign_data_is_refused(writer: Writer) -> None:
    writer.put(1)
    writer.replica.close()
    for shard, node_id, config in (
        (4, "n1", CONFIG),
        (3, "n2", CONFIG),
        (3, "n1", dataclasses.replace(CONFIG, dim=16)),
        (3, "n1", dataclasses.replace(CONFIG, metric="dot")),
    ):
        with pytest.raises(ForeignDataError):
            Replica.open(writer.directory, shard=shard, node_id=node_id, config=config)
    assert writer.open().metadata([1]) == [b"m1"]


def test_two_owners_are_refused(writer: Writer) -> None:
    """`one-writer`."""
    with pytest.raises(StorageError, match="in use"):
        Replica.open(writer.directory, shard=3, node_id="n1", config=CONFIG)


def test_a_lost_log_is_damage(writer: Writer) -> None:
    writer.put(*range(50))
    writer.replica.close()
    (writer.directory / "wal").rename(writer.directory / "away")
    with pytest.raises(DamagedError):
        writer.open()


def test_a_lost_table_is_rebuilt_while_the_log_reaches_back(writer: Writer) -> None:
    writer.put(*range(50))
    digest = writer.replica.statistics()["digest"]
    writer.replica.close()
    shutil.rmtree(writer.directory / "table")
    assert writer.open().statistics()["digest"] == digest


def test_rows_that_a_crash_left_are_written_again_in_their_places(writer: Writer) -> None:
    writer.put(*range(10))
    writer.replica.checkpoint()
    writer.put(*range(5, 15), seed=50)
    before = writer.replica.view
    replica = writer.crash()
    assert replica.view.rows == before.rows
    assert np.array_equal(replica.view.ids[10:20], before.ids[10:20])
    assert np.array_equal(replica.view.vectors[:20], before.vectors[:20])
    assert replica.view.alive.tolist() == before.alive.tolist()


def test_crash_anywhere_in_a_compaction_leaves_the_old_or_the_new_rowset(
    writer: Writer,
) -> None:
    writer.put(*range(20))
    writer.put(*range(10), seed=30)
    assert writer.replica.compaction_due()
    job = writer.replica.begin_compaction()
    job.run()
    replica = writer.crash()
    assert (replica.view.rowset, replica.view.rows) == (1, 30)
    replica.checkpoint()
    job = replica.begin_compaction()
    job.run()
    writer.put(3, seed=90)
    job.commit()
    replica = writer.crash()
    assert (replica.view.rowset, replica.view.rows, replica.view.alive_rows) == (2, 21, 20)
    assert replica.metadata([3, 4, 15]) == [b"m93", b"m34", b"m15"]
    names = {path.name for path in writer.directory.glob("*.f16")}
    assert names == {"items-0000000002.f16", "users-0000000001.f16"}


def test_a_checkpoint_beside_a_compaction_and_one_given_up_before_leave_it_whole(writer: Writer) -> None:
    writer.put(*range(20))
    writer.replica.checkpoint()
    job = writer.replica.begin_compaction()
    job.run()
    job.abandon()
    writer.write((Kind.ITEM, 3), (Kind.ITEM, 4))
    writer.replica.checkpoint()
    job = writer.replica.begin_compaction()
    job.run()
    writer.put(30)
    writer.replica.checkpoint()
    writer.replica.finish_compaction(job)
    wanted = [b"m2", b"", b"", b"m5", b"m30"]
    assert writer.replica.metadata([2, 3, 4, 5, 30]) == wanted
    assert writer.crash().metadata([2, 3, 4, 5, 30]) == wanted


def test_users_are_compacted_too(writer: Writer) -> None:
    writer.put(*range(10), kind=Kind.USER)
    writer.put(*range(10), seed=5, kind=Kind.USER)
    assert writer.replica.compaction_due()
    job = writer.replica.begin_compaction()
    job.run()
    writer.replica.finish_compaction(job)
    assert writer.replica.statistics()["user_rows"] == 10
    assert writer.replica.get(Kind.USER, 3).vector == vector(8)  # type: ignore[union-attr]
    assert not writer.replica.compaction_due()
    assert writer.reopen().get(Kind.USER, 3).vector == vector(8)  # type: ignore[union-attr]


def test_close_in_the_middle_of_jobs_loses_nothing(writer: Writer) -> None:
    writer.put(*range(10))
    writer.replica.begin_checkpoint().run()
    writer.put(1, seed=7)
    replica = writer.reopen()
    job: CompactionJob = replica.begin_compaction()
    job.run()
    job.commit()
    replica = writer.reopen()
    assert replica.view.rowset == 2
    assert replica.metadata([1, 2]) == [b"m8", b"m2"]


def test_old_segments_go_after_a_checkpoint(writer: Writer) -> None:
    for base in range(0, 1000, 100):
        writer.put(*range(base, base + 100))
    segments = writer.replica.statistics()["log"]["segments"]
    writer.replica.settled = writer.replica.position.sequence
    writer.replica.checkpoint()
    assert segments > 1
    assert writer.replica.statistics()["log"]["segments"] == 1
    assert writer.crash().view.rows == 1000


def test_fresh_rows_are_bounded(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "s", dataclasses.replace(CONFIG, engine="hnsw16", fresh_rows_max=5))
    writer.put(1, 2, 3, 4, 5)
    assert writer.replica.fresh_rows() in (0, 5)
    if writer.replica.fresh_rows():
        with pytest.raises(IndexingError):
            writer.replica.check_room(1)


def test_a_flip_in_a_live_row_is_found_by_get_and_at_open(writer: Writer) -> None:
    writer.put(1, 2)
    writer.replica.checkpoint()
    path = writer.directory / "items-0000000001.f16"
    with path.open("r+b") as file:
        file.seek(4096 + 3)
        file.write(b"\xff")
    with pytest.raises(DamagedError, match="item 1") as caught:
        writer.replica.get(Kind.ITEM, 1)
    assert (caught.value.path, caught.value.offset) == (path, 4096)
    assert writer.replica.get(Kind.ITEM, 2) is not None
    writer.replica.abort()
    with pytest.raises(DamagedError, match="item 1"):
        writer.open()


def test_digests_do_not_depend_on_rows(tmp_path: Path) -> None:
    a, b = Writer(tmp_path / "a"), Writer(tmp_path / "b")
    for writer in (a, b):
        writer.put(*range(30))
        writer.put(*range(10), seed=40)
    job = a.replica.begin_compaction()
    job.run()
    a.replica.finish_compaction(job)
    assert a.replica.bucket_digests(Kind.ITEM) == b.replica.bucket_digests(Kind.ITEM)
