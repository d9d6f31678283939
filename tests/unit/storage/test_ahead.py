"""The log's next segment made ahead: nothing but zeros, never needed, and gone when it was not taken."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from storage import segment as fmt
from storage.disk import Log
from storage.errors import ReplicaStoppedError
from storage.files import FileOps
from tests.unit.storage.test_disk import Failing, fill, opened
from tests.unit.storage.wal_files import record, replayed

SEGMENT_BYTES = 4096


def spares(path: Path) -> list[Path]:
    return list(path.glob("*.tmp"))


def fill_segment(log: Log) -> None:
    """Appends until the log rolls."""
    made = log.statistics()["segments_made"]
    while log.statistics()["segments_made"] == made:
        fill(log, log.last.sequence + 1)


def test_a_roll_takes_what_was_made_ahead_and_allocates_nothing(tmp_path: Path) -> None:
    ops = Failing()
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES, ops=ops)
    assert not log.ahead_due
    fill(log, 1)
    assert log.ahead_due
    log.make_ahead()
    assert not log.ahead_due
    (spare,) = spares(tmp_path)
    assert spare.read_bytes() == bytes(SEGMENT_BYTES)
    # Durable before it can be taken.
    assert ops.calls[-2:] == ["zero", "sync_data"]
    ops.calls.clear()
    fill_segment(log)
    assert "allocate" not in ops.calls
    assert not spares(tmp_path)
    fill_segment(log)
    assert ops.calls.count("allocate") == 1
    last = log.last.sequence
    log.close()
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES, floor=last)
    assert [r.sequence for r in replayed(log, 0)] == list(range(1, last + 1))
    log.close()


def test_a_batch_too_large_for_it_leaves_it_for_the_next_roll(tmp_path: Path) -> None:
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES)
    fill(log, 1)
    log.make_ahead()
    fill(log, 2, vector_bytes=3 * SEGMENT_BYTES)
    assert len(spares(tmp_path)) == 1
    fill_segment(log)
    assert not spares(tmp_path)
    assert [r.sequence for r in replayed(log, 0)] == list(range(1, log.last.sequence + 1))
    log.close()


def test_it_goes_with_the_close_and_after_a_crash(tmp_path: Path) -> None:
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES)
    fill(log, 1)
    log.make_ahead()
    log.close()
    assert not spares(tmp_path)
    (tmp_path / "next-1.tmp").write_bytes(b"half made")
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES)
    assert not spares(tmp_path)
    log.close()


@pytest.mark.parametrize("what", ["allocate", "zero", "sync_data"])
def test_no_room_ahead_is_no_error(tmp_path: Path, what: str) -> None:
    ops = Failing()
    ops.code = errno.ENOSPC
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES, ops=ops)
    fill(log, 1)
    ops.when = lambda call: call == what
    log.make_ahead()
    assert not spares(tmp_path)
    assert log.ahead_due
    ops.when = lambda _: False
    fill_segment(log)
    log.close()


@pytest.mark.parametrize("what", ["allocate", "zero", "sync_data"])
def test_a_disk_that_fails_ahead_stops_the_log(tmp_path: Path, what: str) -> None:
    ops = Failing()
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES, ops=ops)
    fill(log, 1)
    ops.when = lambda call: call == what
    with pytest.raises(ReplicaStoppedError):
        log.make_ahead()
    ops.when = lambda _: False
    assert not spares(tmp_path)
    assert not log.ahead_due
    with pytest.raises(ReplicaStoppedError):
        fill(log, 2)
    log.close()


def test_made_beside_appends(tmp_path: Path) -> None:
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES)
    done = threading.Event()

    def make() -> None:
        while not done.is_set():
            log.make_ahead()

    maker = threading.Thread(target=make)
    maker.start()
    try:
        fill(log, 300)
    finally:
        done.set()
        maker.join()
    assert log.statistics()["segments"] > 10
    log.close()
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES, floor=300)
    assert [r.sequence for r in replayed(log, 0)] == list(range(1, 301))
    assert all(path.stat().st_size == SEGMENT_BYTES for path in tmp_path.glob("*.wal"))
    assert fmt.parse_header(min(tmp_path.glob("*.wal")).read_bytes()).first_sequence == 1
    log.close()


def test_segments_grow_while_they_fill_faster_than_they_are_made(tmp_path: Path) -> None:
    ops = Failing()
    log = Log.open(
        tmp_path, shard=3, segment_bytes=SEGMENT_BYTES, segment_bytes_max=4 * SEGMENT_BYTES, ops=ops
    )

    def newest() -> int:
        return max(tmp_path.glob("*.wal")).stat().st_size

    def fill_to(log: Log, step_ns: int) -> int:
        """Appends until the log rolls; the size of the new segment."""
        made = log.statistics()["segments_made"]
        while log.statistics()["segments_made"] == made:
            sequence = log.last.sequence + 1
            log.append([record(sequence, vector_bytes=300, timestamp_ns=log.last_timestamp_ns + step_ns)])
        return newest()

    log.append([record(1, timestamp_ns=1_000)])
    assert [fill_to(log, 1) // SEGMENT_BYTES for _ in range(4)] == [2, 4, 4, 4]
    # One that is ready is taken as it is; it is not written twice.
    log.make_ahead()
    assert "zero" not in ops.calls
    assert fill_to(log, 1) == 4 * SEGMENT_BYTES
    # A rest of a minute and more in each.
    assert [fill_to(log, 30_000_000_000) // SEGMENT_BYTES for _ in range(4)] == [2, 1, 1, 1]
    last = log.last.sequence
    log.close()
    log = opened(tmp_path, segment_bytes=SEGMENT_BYTES, floor=last)
    assert [r.sequence for r in replayed(log, 0)] == list(range(1, last + 1))
    log.close()


def test_a_segment_that_finds_no_room_grown_is_made_small(tmp_path: Path) -> None:
    class Tight(FileOps):
        def allocate(self, fd: int, size_bytes: int) -> None:
            if size_bytes > SEGMENT_BYTES:
                raise OSError(errno.ENOSPC, "no room")
            super().allocate(fd, size_bytes)

    log = Log.open(
        tmp_path, shard=3, segment_bytes=SEGMENT_BYTES, segment_bytes_max=4 * SEGMENT_BYTES, ops=Tight()
    )
    for _ in range(3):
        fill_segment(log)
    log.make_ahead()
    assert {path.stat().st_size for path in tmp_path.glob("*.wal")} == {SEGMENT_BYTES}
    log.close()
