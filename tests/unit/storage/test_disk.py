"""The log's files: what is on the disk when, and what happens when the disk does not do as told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from storage import segment as fmt
from storage.disk import FileOps, Log, write_atomically
from storage.errors import (
    DamagedError,
    DiskFullError,
    ForeignDataError,
    FormatError,
    LogGoneError,
    ReplicaStoppedError,
)
from storage.records import RecordError, Version, decode
from tests.unit.storage.wal_files import record, replayed


def opened(path: Path, *, segment_bytes: int = 4096, **options: object) -> Log:
    return Log.open(path, shard=3, segment_bytes=segment_bytes, **options)  # type: ignore[arg-type]


def sequences(data: bytes) -> list[int]:
    found, offset = [], 0
    while offset < len(data):
        one = decode(data, offset)
        found.append(one.sequence)
        offset += int.from_bytes(data[offset : offset + 4], "little")
    return found


def fill(log: Log, upto: int, *, vector_bytes: int = 200) -> None:
    for sequence in range(log.last.sequence + 1, upto + 1):
        log.append([record(sequence, vector_bytes=vector_bytes)])


class Failing(FileOps):
    """Fails what `when` says, with `code`; before doing anything or, for writes, after a part of it."""

    def __init__(self) -> None:
        self.when: Callable[[str], bool] = lambda _: False
        self.code = errno.EIO
        self.partial_bytes = 0
        self.calls: list[str] = []

    def _maybe(self, what: str) -> None:
        self.calls.append(what)
        if self.when(what):
            raise OSError(self.code, os.strerror(self.code))

    def allocate(self, fd: int, size_bytes: int) -> None:
        self._maybe("allocate")
        super().allocate(fd, size_bytes)

    def write(self, fd: int, buffers: Sequence[bytes], offset: int) -> None:
        if self.when("write") and self.partial_bytes:
            os.pwrite(fd, b"".join(buffers)[: self.partial_bytes], offset)
        self._maybe("write")
        super().write(fd, buffers, offset)

    def write_durably(self, fd: int, buffers: Sequence[bytes], offset: int) -> None:
        # In two, because either half of the one call may be what fails.
        self.calls.append("write_durably")
        self.write(fd, buffers, offset)
        self.sync_data(fd)

    def zero(self, fd: int, offset: int, size_bytes: int) -> None:
        self._maybe("zero")
        super().zero(fd, offset, size_bytes)

    def sync_data(self, fd: int) -> None:
        self._maybe("sync_data")
        super().sync_data(fd)

    def sync(self, fd: int) -> None:
        self._maybe("sync")
        super().sync(fd)

    def sync_directory(self, path: Path) -> None:
        self._maybe("sync_directory")
        super().sync_directory(path)


def test_what_was_appended_is_there_after_a_reopen(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal")
    assert (log.last, log.first_sequence, log.read_after(0, 100)) == (Version(0, 0), 1, b"")
    fill(log, 30)
    log.append([record(31, epoch=2), record(32, epoch=2)])
    assert log.last == Version(2, 32)
    assert log.statistics()["segments"] > 1
    log.close()
    log = opened(tmp_path / "wal", floor=32)
    assert log.last == Version(2, 32)
    assert [r.sequence for r in replayed(log, 0)] == list(range(1, 33))
    assert [r.sequence for r in replayed(log, 29)] == [30, 31, 32]
    assert replayed(log, 32) == []
    assert sequences(log.read_after(0, 1 << 20))[0] == 1
    log.close()


def test_a_log_after_a_snapshot_begins_where_the_snapshot_ends(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal", after=Version(4, 100), floor=100)
    assert (log.last, log.first_sequence) == (Version(4, 100), 101)
    log.close()
    log = opened(tmp_path / "wal", floor=100)
    assert log.last == Version(4, 100)
    log.append([record(101, epoch=4)])
    with pytest.raises(LogGoneError):
        log.read_after(99, 100)
    with pytest.raises(DamagedError):
        replayed(log, 99)
    log.close()


def test_records_that_do_not_follow_are_refused_and_change_nothing(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal")
    fill(log, 2)
    for wrong in ([record(4)], [record(2)], [record(3, epoch=0)], [record(3), record(5)]):
        with pytest.raises(RecordError):
            log.append(wrong)
    fill(log, 3)
    assert sequences(log.read_after(0, 1 << 20)) == [1, 2, 3]
    log.close()


def test_reads_give_whole_records_up_to_the_bound_and_at_least_one(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal", segment_bytes=64 << 10)
    fill(log, 300)
    size = len(record(1, vector_bytes=200))
    log.close()
    log = opened(tmp_path / "wal", segment_bytes=64 << 10)  # the tail in memory is empty: from the disk
    for start in (0, 1, 7, 150, 181, 182, 298, 299):
        assert sequences(log.read_after(start, 1)) == [start + 1]
        got = sequences(log.read_after(start, 5 * size + 3))
        assert got == list(range(start + 1, start + 1 + len(got)))
        assert 1 <= len(got) <= 5
    assert log.read_after(300, 100) == log.read_after(999, 100) == b""
    assert log.statistics()["tail_reads"] == 0
    fill(log, 310)
    assert sequences(log.read_after(305, 3 * size)) == [306, 307, 308]
    assert log.statistics()["tail_reads"] == 1
    log.close()


def test_the_tail_in_memory_is_bounded(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal", segment_bytes=16 << 20)
    for first in range(1, 1001, 50):
        log.append([record(s, vector_bytes=9000) for s in range(first, first + 50)])
    assert log.statistics()["tail_bytes"] <= 4 << 20
    seen, after = [], 0
    while data := log.read_after(after, 100_000):
        seen += sequences(data)
        after = seen[-1]
    assert seen == list(range(1, 1001))
    assert log.statistics()["disk_reads"] > 0
    assert log.statistics()["tail_reads"] > 0
    log.close()


def test_a_record_larger_than_a_segment_gets_one_of_its_own(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal")
    log.append([record(1, vector_bytes=60_000)])
    log.append([record(2)])
    log.close()
    log = opened(tmp_path / "wal")
    assert [len(r.vector) for r in replayed(log, 0)] == [60_000, 40]
    assert sequences(log.read_after(0, 1)) == [1]
    log.close()


def test_another_threads_reads_see_durable_records_only(tmp_path: Path) -> None:
    synced = 0

    class Counting(FileOps):
        def write_durably(self, fd: int, buffers: Sequence[bytes], offset: int) -> None:
            nonlocal synced
            super().write_durably(fd, buffers, offset)
            synced += 1

    log = opened(tmp_path / "wal", segment_bytes=1 << 20, ops=Counting())
    synced = 0
    wrong: list[str] = []
    done = threading.Event()

    def follow() -> None:
        after = 0
        while after < 400 and not done.is_set():
            found = sequences(log.read_after(after, 3000))
            if found and (found[0] != after + 1 or found[-1] > synced):
                wrong.append(f"{found} after {after}, {synced} synced")
            after = found[-1] if found else after

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        fill(log, 400)
    finally:
        reader.join(20)
        done.set()
    assert wrong == []
    log.close()


def test_old_segments_are_dropped_whole_and_only_when_old_and_checkpointed(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal")
    fill(log, 60)
    second = sorted((tmp_path / "wal").glob("*.wal"))[1]
    border = int(second.stem)
    assert log.drop_before(border - 1, 1 << 62) == 0
    assert log.drop_before(border, border - 1) == 0, (
        "its last record is stamped border - 1, which is not older"
    )
    assert log.drop_before(border, border) == 1
    assert log.first_sequence == border
    assert sequences(log.read_after(0, 1)) == [1], "still in memory, so still good to give"
    log.close()
    log = opened(tmp_path / "wal", floor=60)
    with pytest.raises(LogGoneError):
        log.read_after(0, 100)
    assert sequences(log.read_after(border - 1, 1)) == [border]
    log.drop_before(1 << 60, 1 << 62)
    assert log.statistics()["segments"] == 1
    last_first = log.first_sequence
    log.close()
    log = opened(tmp_path / "wal", floor=60)
    assert (log.last, log.first_sequence) == (Version(1, 60), last_first)
    log.close()


def test_the_last_record_stays_even_when_an_empty_segment_follows_it(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal")
    fill(log, 60)
    log._roll(0)  # as a crash between a new segment and its first batch leaves it
    log.close()
    log = opened(tmp_path / "wal", floor=60)
    assert log.drop_before(1 << 60, 1 << 62) > 0
    assert sequences(log.read_after(59, 1)) == [60], "a pull names it"
    assert log.statistics()["segments"] == 2
    log.close()


def test_old_segments_below_the_floor_are_verified_when_read(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal")
    fill(log, 40)
    log.close()
    oldest = min((tmp_path / "wal").glob("*.wal"))
    data = bytearray(oldest.read_bytes())
    data[700] ^= 1
    oldest.write_bytes(data)
    log = opened(tmp_path / "wal", floor=40)
    with pytest.raises(DamagedError):
        log.read_after(0, 1 << 20)
    log.close()
    with pytest.raises(DamagedError):
        opened(tmp_path / "wal")


def test_a_missing_segment_is_damage(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal")
    fill(log, 40)
    log.close()
    files = sorted((tmp_path / "wal").glob("*.wal"))
    for victim in (files[1], files[-1]):
        data = victim.read_bytes()
        victim.unlink()
        with pytest.raises(DamagedError):
            opened(tmp_path / "wal")
        victim.write_bytes(data)
    for file in files:
        file.unlink()
    with pytest.raises(DamagedError):
        opened(tmp_path / "wal")
    (tmp_path / "wal" / "SEAL").unlink()
    with pytest.raises(DamagedError):
        opened(tmp_path / "wal", floor=1)


def test_foreign_and_unknown_logs_are_not_called_damaged(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal")
    log.close()
    with pytest.raises(ForeignDataError):
        Log.open(tmp_path / "wal", shard=4, segment_bytes=4096)
    seal = bytearray(fmt.encode_seal(fmt.Seal(3, Version(0, 0))))
    seal[8] = 2
    seal[-8:] = fmt.xxh3_64_intdigest(bytes(seal[:-8])).to_bytes(8, "little")  # type: ignore[attr-defined]
    (tmp_path / "wal" / "SEAL").write_bytes(seal)
    with pytest.raises(FormatError):
        opened(tmp_path / "wal")


def test_the_seal_goes_before_the_first_append_and_comes_with_the_close(tmp_path: Path) -> None:
    seal = tmp_path / "wal" / "SEAL"
    log = opened(tmp_path / "wal")
    assert not seal.exists()
    log.close()
    assert seal.exists()
    log = opened(tmp_path / "wal")
    assert seal.exists()
    fill(log, 1)
    assert not seal.exists()
    log.close()
    log.close()
    assert seal.exists()
    with pytest.raises(ReplicaStoppedError):
        log.append([record(2)])


def test_a_torn_tail_is_cut_reported_and_written_over(tmp_path: Path) -> None:
    log = opened(tmp_path / "wal", segment_bytes=32 << 10)
    fill(log, 3)
    log.append([record(s, vector_bytes=1500) for s in range(4, 9)])
    log.close()
    (tmp_path / "wal" / "SEAL").unlink()
    (file,) = (tmp_path / "wal").glob("*.wal")
    data = bytearray(file.read_bytes())
    sector = 512 * (len(data.rstrip(b"\0")) // 512 - 4)
    data[sector : sector + 512] = bytes(512)
    file.write_bytes(data)
    log = opened(tmp_path / "wal", segment_bytes=32 << 10, floor=3)
    kept = log.last.sequence
    assert 4 <= kept <= 7
    assert log.statistics()["torn_bytes"] > 512
    del log  # as if killed: no seal
    log = opened(tmp_path / "wal", segment_bytes=32 << 10)
    assert (log.last.sequence, log.statistics()["torn_bytes"]) == (kept, 0)
    fill(log, 20)
    log.close()
    log = opened(tmp_path / "wal", segment_bytes=32 << 10)
    assert [r.sequence for r in replayed(log, 0)] == list(range(1, 21))
    log.close()


@pytest.mark.parametrize("partial_bytes", [0, 100, 700])
def test_a_full_disk_changes_nothing_and_passes(tmp_path: Path, partial_bytes: int) -> None:
    ops = Failing()
    ops.code, ops.partial_bytes = errno.ENOSPC, partial_bytes
    log = opened(tmp_path / "wal", segment_bytes=16 << 10, ops=ops)
    fill(log, 3)
    for what in ("write", "allocate"):
        ops.when = lambda call, what=what: call == what  # type: ignore[misc]
        before = log.last
        with pytest.raises(DiskFullError):
            log.append([record(before.sequence + 1, vector_bytes=900 if what == "write" else 40_000)])
        assert log.last == before
        assert sequences(log.read_after(0, 1 << 20))[-1] == before.sequence
        ops.when = lambda _: False
        fill(log, before.sequence + 1)
    assert not list((tmp_path / "wal").glob("*.tmp"))
    log.close()
    log = opened(tmp_path / "wal", segment_bytes=16 << 10)
    assert [r.sequence for r in replayed(log, 0)] == [1, 2, 3, 4, 5]
    log.close()


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("sync_data", errno.EIO),
        ("sync_data", errno.ENOSPC),
        ("write", errno.EIO),
        ("sync_directory", errno.EIO),
    ],
)
def test_a_failed_write_or_sync_stops_the_log_for_good(tmp_path: Path, what: str, code: int) -> None:
    ops = Failing()
    ops.code = code
    log = opened(tmp_path / "wal", ops=ops)
    fill(log, 3)
    ops.when = lambda call: call == what
    with pytest.raises(ReplicaStoppedError):
        log.append([record(4, vector_bytes=20_000 if what == "sync_directory" else 40)])
    ops.when = lambda _: False
    calls = len(ops.calls)
    with pytest.raises(ReplicaStoppedError):
        log.append([record(4)])
    assert len(ops.calls) == calls, "not one more system call: never into the dark"
    assert log.last == Version(1, 3)
    assert sequences(log.read_after(0, 1 << 20)) == [1, 2, 3], "reads go on, of what is known to be durable"
    log.close()
    assert not (tmp_path / "wal" / "SEAL").exists()
    log = opened(tmp_path / "wal", floor=3)
    assert log.last.sequence in (3, 4)
    log.close()


def test_a_full_disk_that_cannot_even_be_zeroed_stops_the_log(tmp_path: Path) -> None:
    ops = Failing()
    ops.code = errno.ENOSPC
    log = opened(tmp_path / "wal", ops=ops)
    ops.when = lambda call: call in ("write", "zero")
    with pytest.raises(ReplicaStoppedError):
        log.append([record(1)])
    log.close()


def test_each_append_is_one_durable_write(tmp_path: Path) -> None:
    ops = Failing()
    log = opened(tmp_path / "wal", segment_bytes=1 << 20, ops=ops)
    ops.calls.clear()
    log.append([record(s) for s in range(1, 50)])
    log.append([record(50)])
    assert ops.calls == ["write_durably", "write", "sync_data"] * 2
    log.close()


_REALLY_FULL = """
import resource, sys
from storage.disk import Log
from storage.errors import DiskFullError
from tests.unit.storage.wal_files import record, replayed
log = Log.open(sys.argv[1], shard=3, segment_bytes=4096)
log.append([record(1)])
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    log.append([record(2, vector_bytes=20_000)])
except DiskFullError as error:
    print(error)
log.append([record(2)])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
log.append([record(3, vector_bytes=20_000)])
log.close()
log = Log.open(sys.argv[1], shard=3, segment_bytes=4096)
print(*(r.sequence for r in replayed(log, 0)))
"""


def test_the_kernels_own_refusal_is_a_full_disk(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", _REALLY_FULL, str(tmp_path / "wal")],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused, replayed = done.stdout.splitlines()
    assert "no room" in refused
    assert replayed == "1 2 3"


def test_write_atomically_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "folder", b"three")
    assert not (tmp_path / "folder.tmp").exists()
