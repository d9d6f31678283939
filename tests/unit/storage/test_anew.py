"""A damaged replica moved aside: what can still be read comes along, and only the newest is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.anew import begin_anew, damaged_paths
from storage.attempts import Attempts
from storage.errors import DamagedError
from storage.installing import Installing
from storage.records import Kind, Version
from storage.replica import Replica
from tests.unit.storage.replica_writer import CONFIG, Writer


def closed(directory: Path) -> Path:
    writer = Writer(directory)
    writer.put(*range(10))
    writer.replica.cut(8)
    writer.replica.close()
    return directory


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 8
    path.write_bytes(data)


def begun(directory: Path) -> tuple[Replica, tuple[int, int, int]]:
    done = begin_anew(directory, shard=3, segment_bytes=CONFIG.wal_segment_bytes)
    replica = Replica.open(directory, shard=3, node_id="n1", config=CONFIG)
    return replica, (done.side_files, done.records, len(done.lost))


def test_side_files_and_the_logs_end_come_along(tmp_path: Path) -> None:
    directory = closed(tmp_path / "shard-003")
    flip(directory / "table" / "data.mdb", 5000)
    with pytest.raises(DamagedError):
        Replica.open(directory, shard=3, node_id="n1", config=CONFIG)
    replica, found = begun(directory)
    assert found == (1, 8, 0)
    assert replica.position == Version(0, 0)
    assert replica.get(Kind.ITEM, 1) is None
    assert sorted(file.records for file in replica.side_files()) == [2, 8]
    replica.close()
    assert damaged_paths(directory) == [tmp_path / "shard-003.damaged-1"]


def test_what_is_damaged_itself_stays_behind_and_is_said(tmp_path: Path) -> None:
    directory = closed(tmp_path / "shard-003")
    (tail,) = directory.glob("tail-*")
    flip(tail, 60)
    flip(directory / "wal" / f"{1:016}.wal", 700)
    replica, found = begun(directory)
    assert found == (0, 0, 2)
    assert replica.side_files() == []
    replica.close()


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    directory = tmp_path / "shard-003"
    for number in (1, 2, 3):
        closed(directory)
        begin_anew(directory, shard=3, segment_bytes=CONFIG.wal_segment_bytes)
        assert damaged_paths(directory) == [tmp_path / f"shard-003.damaged-{number}"]
        for path in directory.iterdir():
            path.unlink()


def test_a_crash_between_the_renames_is_finished_at_the_next_start(tmp_path: Path) -> None:
    directory = closed(tmp_path / "shard-003")

    class CrashError(Exception):
        pass

    def swap_aside(self: Installing, aside: Path) -> None:
        self._rename(self.fetch, self.new)
        self._rename(self.directory, aside)
        raise CrashError

    with pytest.MonkeyPatch.context() as patched, pytest.raises(CrashError):
        patched.setattr(Installing, "swap_aside", swap_aside)
        begin_anew(directory, shard=3, segment_bytes=CONFIG.wal_segment_bytes)
    assert not directory.exists()
    Installing(directory).recover()
    replica = Replica.open(directory, shard=3, node_id="n1", config=CONFIG)
    assert sorted(file.records for file in replica.side_files()) == [2, 8]
    replica.close()


def test_attempts_count_ends_that_said_nothing(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "shard-003")
    assert attempts.ended == 0
    attempts.begin()
    attempts.begin()
    assert Attempts(tmp_path / "shard-003").ended == 2
    attempts.end()
    attempts.end()
    assert attempts.ended == 0
