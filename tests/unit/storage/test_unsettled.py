"""What is not known to be on a quorum stays in the log however old it is, as long as there is room (docs/replication.md)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tests.unit.storage.replica_writer import CONFIG, Writer

SMALL = dataclasses.replace(CONFIG, wal_segment_bytes=4096, wal_segment_bytes_max=0, wal_keep_s=0.0)


def filled(tmp_path: Path, **settings: Any) -> Writer:
    writer = Writer(tmp_path / "s", dataclasses.replace(SMALL, **settings))
    for id_ in range(200):
        writer.put(id_)
    return writer


def kept(writer: Writer) -> tuple[int, int]:
    """After a checkpoint: the first sequence that the log has, and how many records went that nobody else may have had."""
    writer.replica.checkpoint()
    told = writer.replica.statistics()
    return told["log"]["first_sequence"], told["unsettled_dropped"]


def test_old_records_stay_until_they_are_known_to_be_on_a_quorum(tmp_path: Path) -> None:
    """`unsettled-stays`."""
    writer = filled(tmp_path)
    assert kept(writer) == (1, 0)
    assert writer.replica.statistics()["unsettled"] == 200
    writer.replica.settled = 100
    first, dropped = kept(writer)
    assert 1 < first <= 100, "what is on a quorum goes, and nothing beyond"
    assert dropped == 0
    assert writer.replica.statistics()["unsettled"] == 100
    writer.replica.settled = 200
    assert kept(writer)[0] > 100


def test_after_a_restart_it_is_not_known_and_everything_stays(tmp_path: Path) -> None:
    writer = filled(tmp_path)
    writer.replica.settled = 100
    first, _ = kept(writer)
    writer.reopen()  # which makes a checkpoint, too
    assert kept(writer) == (first, 0)


def test_the_log_is_kept_for_that_up_to_a_bound_and_what_goes_is_counted(tmp_path: Path) -> None:
    writer = filled(tmp_path, wal_unsettled_bytes=12_288)
    writer.replica.settled = 10
    first, dropped = kept(writer)
    assert first > 11
    assert dropped == first - 11
    log = writer.replica.statistics()["log"]
    assert log["bytes"] <= 12_288
    # The newest stay, and only as many went as had to.
    assert log["bytes"] > 12_288 - 4096
    assert writer.replica.read_log(first - 1, 1)
