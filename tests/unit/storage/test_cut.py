"""Cutting a tail: the log goes back, rows stay, and what was cut is in a side file, wherever a crash comes between."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from storage.batch import Batch
from storage.errors import DamagedError, DiskFullError, ForeignDataError, LogGoneError, ReplicaStoppedError
from storage.records import Kind, Mark, Operation, Record, Version, split
from storage.replica import Replica
from storage.side import SideFile
from storage.table import Table
from tests.unit.storage.crashing import Crash, Crashing
from tests.unit.storage.replica_writer import CONFIG, Writer, vector

SMALL = dataclasses.replace(CONFIG, wal_segment_bytes=4096, wal_segment_bytes_max=0, wal_keep_s=1e12)


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "shard-003", SMALL)


def put(*ids: int) -> list[tuple[Any, ...]]:
    return [(Kind.ITEM, id, vector(id), (id % 64,), b"m%d" % id) for id in ids]


def fill(writer: Writer) -> None:
    """Some segments, three epochs, runs of write_ids across batches; 119 records."""
    writer.mark(Mark.EPOCH, b"one")
    writer.write(*put(*range(20)), write_id=b"a" * 16)
    writer.replica.checkpoint()
    writer.epoch = 3
    writer.mark(Mark.EPOCH, b"three")
    writer.write(*put(*range(20, 35)), write_id=b"b" * 16)
    writer.write(*put(*range(35, 40)), write_id=b"b" * 16)
    writer.replica.checkpoint()
    writer.epoch = 4
    writer.mark(Mark.EPOCH, b"four")
    for id in range(40, 60):
        writer.write(*put(id), write_id=bytes([id]) * 16)
    writer.write((Kind.ITEM, 3), (Kind.USER, 7, vector(7), (), b"u"), *put(4), write_id=b"c" * 16)
    writer.write(*put(*range(10)))


def read(file: SideFile, max_bytes: int = 1 << 20) -> list[bytes]:
    out, offset = list[bytes](), 0
    while True:
        blobs, offset = file.read(offset, max_bytes)
        if not blobs:
            return out
        out += blobs


def logged(replica: Replica, after: int = 0) -> list[tuple[bytes, Record]]:
    out: list[tuple[bytes, Record]] = []
    while data := replica.read_log(out[-1][1].sequence if out else after, 1 << 20):
        out += split(data)
    return out


def picture(replica: Replica) -> dict[str, Any]:
    """Everything that a cut changes, and everything that it must not."""
    ids = [*(bytes([b]) * 16 for b in range(40, 60)), b"a" * 16, b"b" * 16, b"c" * 16]
    return {
        "position": replica.position,
        "starts": dict(replica.epoch_starts),
        "placement": replica.placement,
        "written": [replica.written(id) for id in ids],
        "log": [blob for blob, _ in logged(replica)],
        "logged": (replica.logged, replica.logged_ns),
        "digests": (replica.bucket_digests(Kind.ITEM), replica.bucket_digests(Kind.USER)),
        "rows": [replica.get(Kind.ITEM, id) for id in range(60)],
        "sides": [(file.name, read(file)) for file in replica.side_files()],
    }


@pytest.mark.parametrize("sequence", [0, 1, 5, 21, 22, 30, 41, 43, 50, 63, 65, 75])
@pytest.mark.parametrize("how", ["crash", "reopen"])
def test_the_log_ends_there_and_goes_on(writer: Writer, sequence: int, how: str) -> None:
    fill(writer)
    before = picture(writer.replica)
    tail = logged(writer.replica, sequence)
    assert writer.replica.cut(sequence)
    after = picture(writer.replica)
    assert after["log"] == before["log"][:sequence]
    assert writer.replica.position == (
        (after_epoch(after["starts"], sequence), sequence) if sequence else (0, 0)
    )
    assert writer.replica.view.position == writer.replica.position
    assert after["starts"] == {e: at for e, at in before["starts"].items() if at <= sequence}
    assert (
        after["placement"]
        == {0: b"", 1: b"one", 22: b"three", 43: b"four"}[max(at for at in (0, 1, 22, 43) if at <= sequence)]
    )
    assert (after["digests"], after["rows"]) == (before["digests"], before["rows"])
    (side,) = writer.replica.side_files()
    assert read(side) == read(side, 1) == [b for b, one in tail if one.operation is not Operation.MARK]
    assert side.records == len(read(side))
    assert picture(getattr(writer, how)()) == after
    # What is cut can be written anew, by another primary.
    writer.epoch = 9
    writer.mark(Mark.EPOCH, b"nine")
    writer.write(*put(70, 71), write_id=b"b" * 16)
    grown = picture(writer.replica)
    assert grown["placement"] == b"nine"
    assert len(grown["log"]) == sequence + 3
    assert picture(writer.crash()) == grown


def after_epoch(starts: dict[int, int], sequence: int) -> int:
    return max(epoch for epoch, at in starts.items() if at <= sequence)


def test_write_ids_go_back_to_what_is_left_of_their_run(writer: Writer) -> None:
    fill(writer)
    a, b = b"a" * 16, b"b" * 16
    assert writer.replica.written(b) == (Version(3, 42), 20)
    writer.replica.cut(40)
    assert writer.replica.written(b) == (Version(3, 40), 18)
    assert writer.replica.written(bytes([41]) * 16) is None
    assert writer.replica.written(a) == (Version(1, 21), 20)
    writer.replica.cut(22)
    assert writer.replica.written(b) is None
    assert writer.crash().written(b) is None
    assert writer.reopen().written(b) is None
    assert writer.replica.written(a) == (Version(1, 21), 20)
    writer.epoch = 5
    writer.write(*put(1), write_id=b, at_ns=2)
    assert writer.reopen().written(b) == (Version(5, 23), 1)


def again(replica: Replica, epoch: int, records: list[Record]) -> None:
    """What a primary does with a tail: takes what is newer than what it has."""
    batch = Batch(epoch, replica.position.sequence, 10**9)
    for record in records:
        there = replica.version_of(record.kind, record.id)
        if there is None or there < record.version:
            batch.add_again(record)
    if batch.blobs:
        replica.append(batch.blobs, sum(one.operation is Operation.PUT for one in batch.records))
        replica.apply(batch.records)


def follow(replica: Replica, primary: Replica) -> None:
    for blob, record in logged(primary, replica.position.sequence):
        replica.append([blob], 1)
        replica.apply([record])


def test_a_tail_that_is_offered_again_makes_replicas_equal(tmp_path: Path) -> None:
    cut, other = Writer(tmp_path / "a", SMALL), Writer(tmp_path / "b", SMALL)
    for writer in (cut, other):
        writer.write(*put(1, 2, 3), write_id=b"a" * 16)
    cut.write(*put(4), (Kind.ITEM, 1), *put(2), (Kind.USER, 9), write_id=b"b" * 16)
    cut.write(*put(7), (Kind.ITEM, 7))
    other.epoch = 2
    other.mark(Mark.EPOCH, b"two")
    other.put(2, seed=100)
    cut.replica.cut(3)
    follow(cut.replica, other.replica)
    (side,) = cut.replica.side_files()
    tail = [record for _, record in split(b"".join(read(side)))]
    again(other.replica, 2, tail)
    assert other.replica.version_of(Kind.ITEM, 4) == (1, 4)
    assert other.replica.version_of(Kind.ITEM, 1) == (1, 5)
    assert other.replica.version_of(Kind.ITEM, 2) == (2, 5)
    assert other.replica.version_of(Kind.ITEM, 99) is None
    assert other.replica.written(b"b" * 16) == (Version(1, 7), 3)  # one of them came too late
    follow(cut.replica, other.replica)
    for kind in (Kind.ITEM, Kind.USER):
        assert cut.replica.bucket_digests(kind) == other.replica.bucket_digests(kind)
    assert cut.replica.written(b"b" * 16) == other.replica.written(b"b" * 16)
    side.remove()
    assert cut.replica.side_files() == []
    assert cut.crash().side_files() == []
    again(other.replica, 2, tail)  # all of it is there
    assert other.replica.position == cut.replica.position


def test_a_tail_of_marks_leaves_no_side_file(writer: Writer) -> None:
    writer.put(1)
    writer.epoch = 2
    writer.mark(Mark.EPOCH, b"two")
    assert not writer.replica.cut(1)
    assert writer.replica.side_files() == []
    assert (writer.replica.placement, writer.replica.position) == (b"", (1, 1))
    assert writer.crash().position == (1, 1)


def test_what_the_log_no_longer_holds_cannot_be_cut(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "s", dataclasses.replace(SMALL, wal_keep_s=0.0))
    fill(writer)
    writer.replica.settled = writer.replica.position.sequence
    writer.replica.checkpoint()
    first = writer.replica.statistics()["log"]["first_sequence"]
    assert first > 1
    for sequence in (0, first - 1):
        with pytest.raises(LogGoneError):
            writer.replica.cut(sequence)
    assert writer.replica.side_files() == []
    assert writer.replica.cut(first)
    assert writer.crash().position.sequence == first


def test_a_crash_at_any_step_leaves_a_whole_replica_that_can_be_cut_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tmp_path / "origin" / "shard-003"
    writer = Writer(origin, SMALL)
    fill(writer)
    writer.replica.close()
    # A log that is sealed, and one that was being written.
    for name, sequence in (("sealed", 30), ("sealed", 0), ("open", 61), ("open", 22)):
        clean = start(origin, tmp_path / f"clean-{name}-{sequence}", name)
        uncut = picture(clean.replica)
        clean.replica.cut(sequence)
        wanted = picture(clean.replica)
        clean.replica.abort()
        for steps in range(1000):
            writer = start(origin, tmp_path / f"{name}-{sequence}-{steps}", name)
            with monkeypatch.context() as patch:
                crashing = Crashing(patch, steps)
                with contextlib.suppress(Crash):
                    writer.replica.cut(sequence)
                    break
            replica = writer.crash()
            found = picture(replica)
            assert found["log"] == uncut["log"][: len(found["log"])], crashing.done
            assert sequence <= len(found["log"]) <= len(uncut["log"])
            assert (found["rows"], found["digests"]) == (uncut["rows"], uncut["digests"])
            if len(found["log"]) < len(uncut["log"]):
                assert found["sides"] == wanted["sides"], crashing.done
            if len(found["log"]) > sequence:
                if len(found["log"]) == len(uncut["log"]):
                    assert {**found, "sides": []} == uncut, crashing.done
                replica.cut(sequence)
            assert picture(replica) == wanted, crashing.done
            assert picture(writer.crash()) == wanted, crashing.done
            replica = writer.replica
            replica.abort()
        assert steps > 12, "the cut's steps were not met"
        assert {"commit", "unlink", "replace", "fsync"} <= set(crashing.done)
        writer.replica.abort()


def start(origin: Path, target: Path, name: str) -> Writer:
    shutil.copytree(origin, target / "shard-003")
    writer = Writer(target / "shard-003", SMALL)
    if name == "open":
        writer.epoch = 4
        writer.put(90)
    return writer


def test_a_full_disk_changes_nothing(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(writer)
    before = picture(writer.replica)

    def full(*_: object) -> None:
        raise DiskFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Table, "commit", full)
        with pytest.raises(DiskFullError):
            writer.replica.cut(30)
    after = picture(writer.replica)
    assert len(after.pop("sides")) == 1
    before.pop("sides")
    assert after == before
    assert not list(writer.directory.glob("wal/*.tmp"))
    writer.put(80)
    writer.replica.checkpoint()
    assert writer.replica.cut(30)
    names = [file.name for file in writer.replica.side_files()]
    assert names == ["tail-3-31", "tail-3-31-2"]  # the first one has not what was written since
    writer.crash()
    assert [file.name for file in writer.replica.side_files()] == names


@pytest.mark.parametrize("call", ["fsync", "posix_fallocate"])
def test_no_room_for_a_side_file_or_a_segment_changes_nothing(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    fill(writer)
    before = picture(writer.replica)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(DiskFullError):
            writer.replica.cut(30)
    after = picture(writer.replica)
    assert len(after.pop("sides")) == (call == "posix_fallocate")
    assert after == {name: value for name, value in before.items() if name != "sides"}
    assert not list(writer.directory.glob("**/*.tmp"))
    assert writer.replica.cut(30)
    assert [file.name for file in writer.replica.side_files()] == ["tail-3-31"]


def test_a_harmed_segment_is_never_copied(writer: Writer) -> None:
    fill(writer)
    path = sorted((writer.directory / "wal").glob("*.wal"))[1]
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    sequence = int(path.stem) + 2
    with pytest.raises(DamagedError):
        writer.replica.cut(sequence)
    assert len(writer.replica.side_files()) <= 1
    with pytest.raises(ReplicaStoppedError):
        writer.put(1)


def test_a_failed_flush_stops_the_replica(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(writer)

    def fail(*_: object) -> None:
        raise OSError(5, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(ReplicaStoppedError):
            writer.replica.cut(30)
    with pytest.raises(ReplicaStoppedError):
        writer.put(1)
    assert writer.crash().position.sequence >= 30
    if writer.replica.position.sequence > 30:
        writer.replica.cut(30)
    assert writer.replica.position == (3, 30)


def test_a_harmed_side_file_is_damage_and_never_just_gone(writer: Writer) -> None:
    fill(writer)
    writer.replica.cut(60)
    (side,) = writer.replica.side_files()
    writer.replica.abort()
    data = side.path.read_bytes()
    for position in range(0, len(data), 13):
        side.path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(DamagedError):
            writer.open()
    for size in (0, 10, 24, 56, 100, len(data) - 1):
        side.path.write_bytes(data[:size])
        with pytest.raises(DamagedError):
            writer.open()
    side.path.write_bytes(data)
    (writer.directory / "tail.tmp").write_bytes(data[:100])
    assert [file.name for file in writer.open().side_files()] == [side.name]
    assert not (writer.directory / "tail.tmp").exists()
    (side,) = writer.replica.side_files()
    side.path.write_bytes(data[:200] + b"\xff" + data[201:])
    with pytest.raises(DamagedError):
        read(side)


def test_a_side_file_of_another_shard_is_refused(writer: Writer, tmp_path: Path) -> None:
    fill(writer)
    writer.replica.cut(60)
    (side,) = writer.replica.side_files()
    other = Replica.open(tmp_path / "other", shard=4, node_id="n1", config=SMALL)
    other.close()
    shutil.copy(side.path, tmp_path / "other" / side.name)
    with pytest.raises(ForeignDataError):
        Replica.open(tmp_path / "other", shard=4, node_id="n1", config=SMALL)


def test_side_files_come_oldest_first(writer: Writer) -> None:
    fill(writer)
    for sequence in (60, 50, 30, 9):
        writer.replica.cut(sequence)
    assert [file.name for file in writer.replica.side_files()] == [
        "tail-1-10", "tail-3-31", "tail-4-51", "tail-4-61",
    ]  # fmt: skip


def test_followers_read_on_from_the_cut_log(writer: Writer) -> None:
    fill(writer)
    writer.replica.cut(30)
    assert writer.replica.read_log(30, 100) == b""
    assert [one.sequence for _, one in split(writer.replica.read_log(27, 1 << 20))] == [28, 29, 30]
    assert writer.replica.fingerprint(30).sequence == 30
    writer.epoch = 5
    writer.put(1)
    assert [one.epoch for _, one in split(writer.replica.read_log(29, 1 << 20))] == [3, 5]
