"""The log's next segment made ahead: nothing but zeros, never needed, and gone when it was not taken."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from storage import segment as fmt
from storage.disk import Log
from storage.errors import ReplicaStoppedError
from tests.unit.storage.test_disk import Failing, fill, opened
from tests.unit.storage.wal_files import replayed

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
