"""Epochs and placements are told by the log, and survive whatever the log and the table survive."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from storage import epochs as epochs_module
from storage.batch import Batch
from storage.epochs import Epochs
from storage.records import Kind, Mark, Operation, decode
from storage.replica import Replica
from tests.unit.storage.replica_writer import CONFIG, Writer


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "shard-003")


def test_a_mark_is_a_record_of_no_kind() -> None:
    batch = Batch(7, 41, 10**18)
    assert batch.add_mark(Mark.EPOCH, b"placement") == (7, 42)
    (record,) = batch.records
    assert decode(batch.blobs[0]) == record
    assert (record.operation, record.kind, record.id) == (Operation.MARK, Kind.NONE, Mark.EPOCH)
    assert record.metadata == b"placement"


@pytest.mark.parametrize("how", ["crash", "reopen", "checkpoint"])
def test_the_placement_is_that_of_the_last_epoch_mark(writer: Writer, how: str) -> None:
    assert writer.replica.placement == b""
    writer.put(1)
    writer.mark(Mark.EPOCH, b"one")
    assert writer.replica.placement == b"one"
    writer.epoch = 5
    writer.mark(Mark.EPOCH, b"five")
    writer.mark(Mark.DIGEST, b"not a placement")
    writer.put(2)
    if how == "checkpoint":
        writer.replica.checkpoint()
        how = "crash"
    replica = getattr(writer, how)()
    assert replica.placement == b"five"
    assert replica.epoch_starts == {1: 1, 5: 3}
    assert replica.position == (5, 5)
    assert replica.statistics()["items"] == 2


def test_epochs_that_the_log_left_behind_are_forgotten_but_for_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs_module, "STARTS_KEPT", 1)
    writer = Writer(
        tmp_path / "s", dataclasses.replace(CONFIG, wal_segment_bytes=4096, wal_segment_bytes_max=0)
    )
    for epoch in range(1, 6):
        writer.epoch = epoch
        writer.mark(Mark.EPOCH, b"p%d" % epoch)
        writer.put(*range(30))
    writer.replica.settled = writer.replica.position.sequence
    writer.replica.checkpoint()  # drops segments
    writer.epoch = 6
    writer.mark(Mark.EPOCH, b"p6")
    writer.replica.checkpoint()  # knows that they are gone
    first = writer.replica.statistics()["log"]["first_sequence"]
    starts = dict(writer.replica.epoch_starts)
    assert first > 4 * 31
    assert starts == {4: 94, 5: 125, 6: 156}
    replica = writer.crash()
    assert (dict(replica.epoch_starts), replica.placement) == (starts, b"p6")


def test_epochs_are_pruned_to_those_kept_before_the_log_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs_module, "STARTS_KEPT", 1)

    def epochs() -> Epochs:
        return Epochs({1: 1, 3: 5, 4: 9}, {1: b"a", 5: b"b", 9: b"c"})

    for first, starts, placements in (
        (1, {1: 1, 3: 5, 4: 9}, {1: b"a", 5: b"b", 9: b"c"}),
        (5, {1: 1, 3: 5, 4: 9}, {1: b"a", 5: b"b", 9: b"c"}),
        (8, {1: 1, 3: 5, 4: 9}, {5: b"b", 9: b"c"}),
        (9, {3: 5, 4: 9}, {5: b"b", 9: b"c"}),
        (20, {3: 5, 4: 9}, {9: b"c"}),
    ):
        pruned = epochs()
        pruned.prune(first)
        assert (pruned.starts, pruned.placements) == (starts, placements), first


def test_a_thousand_epochs_that_the_log_left_behind_are_known() -> None:
    epochs = Epochs({epoch: 10 * epoch for epoch in range(1, 2_001)}, {})
    epochs.prune(20_000)
    assert list(epochs.starts) == list(range(1_000, 2_001))


def test_a_replica_has_an_id_of_its_own_that_a_copy_does_not_take_over(
    writer: Writer, tmp_path: Path
) -> None:
    first = writer.replica.replica_id
    assert 0 < first < 1 << 63
    writer.mark(Mark.EPOCH, b"one")
    assert writer.reopen().replica_id == first
    renewed = writer.replica.renew_replica_id()
    assert renewed != first
    writer.put(1)
    assert writer.crash().replica_id == renewed
    writer.replica.checkpoint()
    assert writer.crash().replica_id == renewed
    writer.replica.export(tmp_path / "snapshot")
    target = tmp_path / "copy" / "shard-003"
    Replica.import_snapshot(tmp_path / "snapshot", target, shard=3, node_id="n2", config=CONFIG)
    copy = Replica.open(target, shard=3, node_id="n2", config=CONFIG)
    assert copy.replica_id not in (first, renewed)
    assert (copy.placement, copy.epoch_starts) == (b"one", {1: 1})
    copy.close()
    writer.replica.close()
