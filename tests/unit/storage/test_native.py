"""No order of opening, reading, growing and closing ends the process: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from errno import ENOSPC
from pathlib import Path

import pytest

import storage.disk
import storage.table
from storage.records import Kind
from tests.unit.storage.replica_writer import Writer

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "what",
    [
        "close_beside_readers",
        "close_and_growth_beside_a_copy",
        "scans_that_are_left_lying",
        "searches_beside_swaps_and_a_close",
        "opens_that_fail",
    ],
)
def test_the_process_lives(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.storage.native", what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "name"), [(storage.table, "write_seal"), (storage.disk, "write_atomically")]
)
def test_a_seal_that_finds_no_room_leaves_nothing_open(
    module: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(ENOSPC, "No space left on device")

    writer = Writer(tmp_path / "shard-003")
    writer.put(1, 2, 3)
    with monkeypatch.context() as patched:
        patched.setattr(module, name, full)
        writer.replica.close()
    writer.open()
    assert writer.replica.get(Kind.ITEM, 2) is not None
    writer.replica.close()
