"""Tombstones stay until a PURGE mark, go at its place in the log, and what was put aside stays put aside."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import quarantine
from storage.batch import Batch
from storage.errors import DamagedError, ForeignDataError, FormatError, QuarantineFullError
from storage.quarantine import Quarantine
from storage.records import Kind, Mark, Operation, Record, Version
from storage.replica import Replica
from storage.tombstones import Tombstones, decode_floor, encode_floor
from tests.unit.storage.replica_writer import CONFIG, Writer, vector


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "shard-003")


def purge(writer: Writer, epoch: int, sequence: int) -> None:
    writer.mark(Mark.PURGE, encode_floor(Version(epoch, sequence)))


def shown(replica: Replica) -> object:
    entries = replica.statistics()["items"]
    versions = [replica.version_of(Kind.ITEM, id) for id in range(12)]
    digests = [replica.bucket_digests(kind) for kind in (Kind.ITEM, Kind.USER)]
    return entries, replica.tombstones, replica.purge_floor, versions, digests


@pytest.mark.parametrize("how", ["crash", "reopen", "checkpoint", "begun", "compact"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_purge_removes_tombstones_up_to_its_floor(writer: Writer, how: str, saved: bool) -> None:
    """`tombstones-stay`."""
    writer.put(*range(8))
    empty = Writer(writer.directory.with_name("without"))
    empty.put(*range(8))
    writer.write((Kind.ITEM, 1), (Kind.ITEM, 2), (Kind.USER, 3), (Kind.ITEM, 4))
    if saved:
        writer.replica.checkpoint()
    writer.put(4)
    assert writer.replica.tombstones == 3
    if how == "begun":
        job = writer.replica.begin_checkpoint()
    elif how == "compact":
        compaction = writer.replica.begin_compaction(Kind.ITEM)
        compaction.run()
    purge(writer, 1, 10)
    assert writer.replica.purge_floor == (1, 10)
    assert writer.replica.tombstones == 1
    assert writer.replica.version_of(Kind.ITEM, 1) is None
    assert writer.replica.version_of(Kind.ITEM, 2) is None
    assert writer.replica.version_of(Kind.ITEM, 4) == (1, 13)
    assert writer.replica.version_of(Kind.USER, 3) == (1, 11)
    assert writer.replica.statistics()["items"] == 6
    assert writer.replica.metadata([1, 2, 4]) == [b"", b"", b"m4"]
    before = shown(writer.replica)
    if how == "checkpoint":
        writer.replica.checkpoint()
        assert shown(writer.replica) == before
    elif how == "begun":
        job.run()
        writer.replica.finish_checkpoint(job)
    elif how == "compact":
        writer.replica.finish_compaction(compaction)
        assert shown(writer.replica) == before
    assert shown(writer.crash()) == before
    assert shown(writer.reopen()) == before
    writer.put(1)  # as if it had never been there
    assert writer.replica.get(Kind.ITEM, 1) is not None
    assert writer.crash().statistics()["items"] == 7
    empty.replica.close()


def test_what_comes_behind_a_purge_in_one_batch_is_not_purged_by_it(writer: Writer) -> None:
    writer.put(1, 2)
    batch = Batch(2, 2, 1)
    batch.add([(Operation.DELETE, Kind.ITEM, 1, b"", (), b"")], bytes(16))
    batch.add_mark(Mark.PURGE, encode_floor(Version(2, 99)))
    batch.add([(Operation.DELETE, Kind.ITEM, 2, b"", (), b"")], bytes(16))
    writer.take(batch)
    before = shown(writer.replica)
    assert writer.replica.version_of(Kind.ITEM, 1) is None
    assert writer.replica.version_of(Kind.ITEM, 2) == (2, 5)
    assert shown(writer.crash()) == before  # by columns


def test_a_mark_that_cannot_be_read_is_refused() -> None:
    assert decode_floor(encode_floor(Version(3, 1 << 60))) == (3, 1 << 60)
    for bad in (b"", b"\xc1", b"\x93\x01\x02\x03", b"\x92\xa1x\x01", b"\x92\xff\x01", b"\x01", b"\x92\x01"):
        with pytest.raises(FormatError):
            decode_floor(bad)


def test_tombstones_are_purgeable_when_old_and_passed(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "s", dataclasses.replace(CONFIG, tombstones_keep_s=100, wal_keep_s=1e9))
    now = time.time_ns()
    writer.put(1, 2, 3)
    writer.write((Kind.ITEM, 1), at_ns=now - 200 * 10**9)
    assert [writer.replica.purgeable(up_to) for up_to in (0, 3, 4, 9)] == [False, False, True, True]
    writer.write((Kind.USER, 7), (Kind.ITEM, 2), at_ns=now)
    assert not writer.replica.purgeable(9)  # the log does not tell yet which of its last segment are old
    for id in range(20, 220):
        writer.write((Kind.ITEM, id, vector(id), (), bytes(500)), at_ns=now)
    assert writer.replica.statistics()["log"]["segments"] > 1
    assert not writer.replica.purgeable(1000)
    young = Writer(tmp_path / "y", dataclasses.replace(CONFIG, tombstones_keep_s=0.0, wal_keep_s=1e9))
    young.put(1, 2)
    young.write((Kind.ITEM, 1), (Kind.USER, 9), (Kind.ITEM, 2))
    assert young.replica.purge_point(4) == (1, 4)
    assert young.replica.purge_point(9) == (1, 5)
    purge(young, 1, 5)
    assert not young.replica.purgeable(9)
    assert young.replica.tombstones == 0


def test_a_tombstone_older_than_the_log_is_old(writer: Writer) -> None:
    writer.write((Kind.ITEM, 1))
    for base in range(0, 1000, 100):
        writer.write(*((Kind.ITEM, id, vector(id), (), b"") for id in range(base + 2, base + 102)), at_ns=1)
    writer.replica.settled = writer.replica.position.sequence
    writer.replica.checkpoint()
    assert writer.replica.statistics()["log"]["first_sequence"] > 2
    assert writer.replica.purge_point(1001) == (1, 1)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.tuples(st.integers(0, 3), st.integers(0, 9))) | st.integers(0, 9)
        | st.tuples(st.none(), st.tuples(st.integers(0, 3), st.integers(0, 9)))
    )
)  # fmt: skip
def test_the_index_is_a_dict_in_the_order_of_versions(steps: list[object]) -> None:
    index, model = Tombstones(), dict[int, tuple[int, int]]()
    for step in steps:
        if isinstance(step, int):
            index.discard(step)
            model.pop(step, None)
            continue
        id, version = step  # type: ignore[misc]
        if id is None:
            assert list(index.up_to(Version(*version))) == sorted(v for v in model.values() if v <= version)
            gone = {id for id, v in model.items() if v <= version}
            assert dict(index.purge(Version(*version))) == {id: id + 100 for id in gone}
            model = {id: v for id, v in model.items() if id not in gone}
        else:
            index.discard(id)
            index.add(id, version, id + 100)
            model[id] = version
        assert len(index) == len(model)


def test_a_row_is_dropped_only_if_its_version_is_exactly_that(writer: Writer) -> None:
    writer.put(1, 2, 3)
    writer.write((Kind.ITEM, 3))
    before = shown(writer.replica)
    assert not writer.replica.drop_row(Kind.ITEM, 1, Version(1, 2))
    assert not writer.replica.drop_row(Kind.ITEM, 9, Version(1, 1))
    assert shown(writer.replica) == before
    view = writer.replica.view
    assert writer.replica.drop_row(Kind.ITEM, 1, Version(1, 1))
    assert writer.replica.drop_row(Kind.ITEM, 3, Version(1, 4))
    assert (view.alive_rows, writer.replica.view.alive_rows) == (2, 1)
    assert writer.replica.get(Kind.ITEM, 1) is None
    assert (writer.replica.statistics()["items"], writer.replica.tombstones) == (1, 0)
    assert not writer.replica.drop_row(Kind.ITEM, 1, Version(1, 1))
    writer.replica.checkpoint()
    after = shown(writer.replica)
    assert shown(writer.crash()) == after
    job = writer.replica.begin_compaction(Kind.ITEM)
    job.run()
    assert writer.replica.drop_row(Kind.ITEM, 2, Version(1, 2))
    writer.replica.finish_compaction(job)
    assert (writer.replica.view.alive_rows, writer.replica.statistics()["items"]) == (0, 0)
    assert writer.crash().statistics()["items"] == 0


def test_a_row_that_stayed_when_its_record_was_cut_is_not_held(writer: Writer) -> None:
    writer.put(1, 2)
    writer.put(3, 4)
    tail = writer.last
    writer.replica.cut(2)
    assert [writer.replica.holds(one) for one in tail] == [False, False]
    assert [writer.crash().holds(one) for one in tail] == [False, False]
    writer.epoch = 2
    writer.put(4, seed=100)
    assert [writer.replica.holds(one) for one in tail] == [False, True]
    batch = Batch(2, writer.replica.position.sequence, 1)
    batch.add_again(tail[0])
    writer.take(batch)
    assert [writer.replica.holds(one) for one in tail] == [True, True]
    assert [writer.crash().holds(one) for one in tail] == [True, True]
    writer.replica.checkpoint()
    assert [writer.crash().holds(one) for one in tail] == [True, True]
    for file in writer.replica.side_files():
        file.remove()
    assert [writer.crash().holds(one) for one in tail] == [True, True]


def aside(writer: Writer) -> list[Record]:
    writer.put(1, 2)
    writer.write((Kind.USER, 5), write_id=b"w" * 16)
    return [*writer.last, *writer.last]


def test_quarantined_records_are_kept_once_and_bounded(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert writer.replica.quarantined() == []
    records = aside(writer)
    writer.replica.quarantine(records)
    assert writer.replica.quarantined() == records[:1]
    writer.put(7)
    writer.replica.quarantine([*records, *writer.last])
    wanted = [records[0], *writer.last]
    assert writer.crash().quarantined() == wanted
    monkeypatch.setattr(quarantine, "BYTES_MAX", 300)
    writer.put(8)
    with pytest.raises(QuarantineFullError, match="move the file away"):
        writer.replica.quarantine(writer.last)
    assert writer.replica.quarantined() == wanted


def test_a_harmed_quarantine_is_damage(writer: Writer) -> None:
    writer.replica.quarantine(aside(writer))
    path = writer.directory / "quarantine"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(DamagedError):
            writer.replica.quarantined()
    path.write_bytes(data[:20])
    with pytest.raises(DamagedError):
        writer.replica.quarantined()
    path.write_bytes(data)
    with pytest.raises(ForeignDataError):
        Quarantine(writer.directory, 4).records()
