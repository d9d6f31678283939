"""Clients' changes and offered tails as one group commit's records: retries, refusals, room, versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from node.batching import Item, Made, OfferItem, WriteItem, Written, make, unfit_reason
from router.ports import Change, NodeError
from storage.batch import Batch
from storage.config import StorageConfig
from storage.records import NO_WRITE_ID, Kind, Operation, Record, Version
from storage.replica import Replica
from tests.unit.node.voters import CONFIG, DIM, change

EPOCH = 3
NOW = 10**18
ONE, TWO = b"1" * 16, b"2" * 16


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    opened = Replica.open(tmp_path / "shard-000", shard=0, node_id="n", config=CONFIG)
    yield opened
    opened.abort()


def commit(replica: Replica, *items: Item, epoch: int = EPOCH) -> Made:
    made = make(replica, items, epoch, NOW)
    take(replica, made.batch, made.rows)
    return made


def take(replica: Replica, batch: Batch, rows: int) -> None:
    if batch.blobs:
        replica.append(batch.blobs, rows)
        replica.apply(batch.records)


def written(made: Made) -> list[Written]:
    assert all(isinstance(result, Written) for result in made.results), made.results
    return made.results  # type: ignore[return-value]


def codes(made: Made) -> list[str]:
    return [result.code if isinstance(result, NodeError) else "" for result in made.results]


def test_items_follow_each_other_and_what_is_applied(replica: Replica) -> None:
    first = commit(replica, WriteItem([change(1), change(2)], ONE), WriteItem([change(3)], TWO))
    assert [(one.at, one.new) for one in written(first)] == [(Version(EPOCH, 2), 2), (Version(EPOCH, 3), 1)]
    second = commit(replica, WriteItem([change(4)], NO_WRITE_ID), epoch=5)
    assert [(one.at, one.new) for one in written(second)] == [(Version(5, 4), 1)]
    assert [record.sequence for record in first.batch.records + second.batch.records] == [1, 2, 3, 4]


def test_a_retry_is_answered_with_the_logs_end(replica: Replica) -> None:
    commit(replica, WriteItem([change(1)], ONE))
    commit(replica, WriteItem([change(2), change(3)], TWO), epoch=5)
    again = commit(replica, WriteItem([change(1)], ONE), epoch=6)
    assert [(one.at, one.new) for one in written(again)] == [(Version(5, 3), 0)]
    assert not again.batch.blobs
    assert again.deduplicated == 1


def test_a_retry_behind_other_items_is_answered_with_where_they_end(replica: Replica) -> None:
    commit(replica, WriteItem([change(1)], ONE))
    made = commit(replica, WriteItem([change(2)], TWO), WriteItem([change(1)], ONE))
    assert [(one.at, one.new) for one in written(made)] == [(Version(EPOCH, 2), 1), (Version(EPOCH, 2), 0)]


def test_a_retry_in_the_same_batch_is_applied_once(replica: Replica) -> None:
    made = commit(replica, WriteItem([change(1), change(2)], ONE), WriteItem([change(1), change(2)], ONE))
    assert [(one.at, one.new) for one in written(made)] == [(Version(EPOCH, 2), 2), (Version(EPOCH, 2), 0)]
    assert (len(made.batch.records), made.rows, made.deduplicated) == (2, 2, 2)


def test_of_a_retry_only_what_is_missing_is_written(replica: Replica) -> None:
    """A tail of a write was cut, say: the log has its first two changes only."""
    changes = [change(i) for i in range(1, 6)]
    commit(replica, WriteItem(changes[:2], ONE))
    made = commit(replica, WriteItem(changes, ONE))
    assert [(one.at, one.new) for one in written(made)] == [(Version(EPOCH, 5), 3)]
    assert [record.id for record in made.batch.records] == [3, 4, 5]
    assert made.deduplicated == 2
    done = commit(replica, WriteItem(changes, ONE))
    assert [(one.at, one.new) for one in written(done)] == [(Version(EPOCH, 5), 0)]
    assert replica.view.alive_rows == 5


def test_a_shorter_retry_writes_nothing(replica: Replica) -> None:
    commit(replica, WriteItem([change(1), change(2)], ONE))
    made = commit(replica, WriteItem([change(1)], ONE))
    assert [(one.at, one.new) for one in written(made)] == [(Version(EPOCH, 2), 0)]


def test_without_a_write_id_nothing_is_a_retry(replica: Replica) -> None:
    made = commit(replica, *[WriteItem([change(1)], NO_WRITE_ID)] * 2)
    commit(replica, WriteItem([change(1)], NO_WRITE_ID))
    assert len(made.batch.records) == 2
    assert replica.position.sequence == 3


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (change(1, classes=(64,)), "class_width"),
        (change(1)._replace(vector=bytes(2 * DIM - 1)), "FP16"),
        (change(1)._replace(vector=b""), "FP16"),
    ],
)
def test_what_does_not_fit_is_refused_as_a_whole_and_alone(replica: Replica, bad: Change, word: str) -> None:
    assert word in (unfit_reason([change(1), bad], replica.config) or "")
    made = commit(
        replica,
        WriteItem([change(7)], ONE),
        WriteItem([change(8), bad], TWO),
        WriteItem([change(9)], NO_WRITE_ID),
    )
    assert codes(made) == ["", "bad_request", ""]
    assert [record.id for record in made.batch.records] == [7, 9]
    # Nothing of it is remembered as done.
    mended = commit(replica, WriteItem([change(8), change(1)], TWO))
    assert written(mended)[0].new == 2


def test_a_delete_needs_no_vector(replica: Replica) -> None:
    delete = Change(Operation.DELETE, Kind.ITEM, 1, b"", (), b"")
    commit(replica, WriteItem([change(1)], ONE))
    made = commit(replica, WriteItem([delete], TWO))
    assert (made.rows, written(made)[0].new) == (0, 1)
    assert replica.get(Kind.ITEM, 1) is None


def test_what_finds_no_room_is_refused_and_what_needs_none_is_not(tmp_path: Path) -> None:
    small = StorageConfig(
        dim=DIM, class_width=64, engine="hnsw", wal_segment_bytes=1 << 16, fresh_rows_max=4, graph_rows_min=2
    )
    replica = Replica.open(tmp_path / "shard-000", shard=0, node_id="n", config=small)
    commit(replica, WriteItem([change(i) for i in range(3)], ONE))
    delete = Change(Operation.DELETE, Kind.ITEM, 1, b"", (), b"")
    made = commit(
        replica,
        WriteItem([change(10)], TWO),  # the fourth
        WriteItem([change(11)], b"3" * 16),
        WriteItem([delete], b"4" * 16),
        WriteItem([change(i) for i in range(3)], ONE),  # a retry
    )
    assert codes(made) == ["", "indexing", "", ""]
    refusal = made.results[1]
    assert isinstance(refusal, NodeError)
    assert refusal.retry_after_ms
    assert [record.id for record in made.batch.records] == [10, 1]
    assert written(Made([r for r in made.results if isinstance(r, Written)], made.batch, 0, 0))[-1].new == 0
    replica.abort()


# -- tails that are offered again ---------------------------------------------------------------------------------------


def tail(epoch: int, after: int, *changes: Change, write_id: bytes = ONE) -> list[Record]:
    batch = Batch(epoch, after, NOW - 5)
    batch.add(changes, write_id)
    return batch.records


def test_an_offered_record_keeps_its_version_its_write_id_and_its_time(replica: Replica) -> None:
    """`version-kept`."""
    commit(replica, WriteItem([change(50)], TWO), epoch=1)
    offered = tail(2, 1, change(1), change(2))
    made = commit(replica, OfferItem(offered))
    assert [(one.at, one.new) for one in written(made)] == [(Version(EPOCH, 3), 2)]
    for record, before in zip(made.batch.records, offered, strict=True):
        assert record.version == before.version
        assert (record.write_id, record.timestamp_ns) == (before.write_id, before.timestamp_ns)
        assert (record.epoch, record.id, record.vector) == (EPOCH, before.id, before.vector)
    row = replica.get(Kind.ITEM, 1)
    assert row is not None
    assert row.version == Version(2, 2)


def test_what_is_as_new_already_is_not_taken_again(replica: Replica) -> None:
    commit(replica, WriteItem([change(1, 7.0)], TWO), epoch=5)
    made = commit(replica, OfferItem(tail(2, 1, change(1, 1.0), change(2))), epoch=5)
    assert written(made)[0].new == 1
    assert [record.id for record in made.batch.records] == [2]
    again = commit(replica, OfferItem(tail(2, 1, change(1, 1.0), change(2))), epoch=5)
    assert (written(again)[0].new, written(again)[0].at) == (0, replica.position)
    row = replica.get(Kind.ITEM, 1)
    assert row is not None
    assert row.version == Version(5, 1)


def test_what_was_purged_is_put_aside(replica: Replica) -> None:
    """`quarantine`."""
    commit(replica, WriteItem([change(50)], TWO), epoch=4)
    replica.purge_floor = Version(3, 0)
    offered = tail(2, 1, change(1)) + tail(3, 5, change(2))
    made = commit(replica, OfferItem(offered), epoch=4)
    (one,) = written(made)
    assert [record.id for record in one.aside] == [1]
    assert [record.id for record in made.batch.records] == [2]


def test_two_records_of_one_id_in_a_tail_end_as_the_newer(replica: Replica) -> None:
    commit(replica, WriteItem([change(50)], TWO), epoch=1)
    commit(replica, OfferItem(tail(2, 1, change(1, 1.0), change(1, 2.0))))
    row = replica.get(Kind.ITEM, 1)
    assert row is not None
    assert row.version == Version(2, 3)
    assert row.vector == change(1, 2.0).vector


def test_a_client_whose_write_was_offered_again_is_answered_and_not_written_twice(replica: Replica) -> None:
    commit(replica, WriteItem([change(50)], TWO), epoch=1)
    changes = (change(1), change(2))
    commit(replica, OfferItem(tail(2, 1, *changes, write_id=ONE)))
    again = commit(replica, WriteItem(list(changes), ONE))
    assert written(again)[0].new == 0


def test_an_offered_tail_that_does_not_fit_is_refused(replica: Replica) -> None:
    """It comes from a peer, whose settings are those of the cluster; a damaged or foreign one must not stop our log."""
    commit(replica, WriteItem([change(50)], TWO), epoch=1)
    made = make(replica, [OfferItem(tail(2, 1, change(1)._replace(vector=b"\0\0")))], EPOCH, NOW)
    assert codes(made) == ["bad_request"]
    assert not made.batch.blobs
