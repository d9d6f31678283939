"""Row files: room before rows, older mappings stay whole, headers that tell whose they are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from storage.errors import DamagedError, DiskFullError, ForeignDataError, FormatError, ReplicaStoppedError
from storage.records import Kind
from storage.vectors import HEADER_BYTES, RowFile, row_file_name

DIM = 16
OWNER = {"shard": 2, "dim": DIM, "kind": Kind.ITEM, "rowset": 5}


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float16)


def create(path: Path) -> RowFile:
    return RowFile.create(path, **OWNER)  # type: ignore[arg-type]


def reopen(path: Path, count: int = 0) -> RowFile:
    return RowFile.open(path, **OWNER, rows=count)  # type: ignore[arg-type]


def test_names_carry_kind_and_rowset() -> None:
    assert row_file_name(Kind.USER, 3) == "users-0000000003.f16"


def test_rows_are_read_as_written_and_after_reopening(tmp_path: Path) -> None:
    file, data = create(tmp_path / "r"), rows(10)
    file.ensure(10)
    file.write(0, [row.tobytes() for row in data])
    assert np.array_equal(file.vectors[:10], data)
    assert file.read(3) == data[3].tobytes()
    file.sync()
    file.close()
    file = reopen(tmp_path / "r", 10)
    assert np.array_equal(file.vectors[:10], data)
    file.close()


def test_growing_leaves_older_views_whole(tmp_path: Path) -> None:
    file = create(tmp_path / "r")
    file.ensure(4)
    file.write(0, [row.tobytes() for row in rows(4)])
    old, capacity = file.vectors, file.capacity
    file.ensure(capacity + 1)
    assert file.capacity > capacity
    file.write(capacity, [rows(1, 9).tobytes()])
    file.close()
    assert np.array_equal(old[:4], rows(4))
    assert np.array_equal(file.vectors[capacity], rows(1, 9)[0])
    with pytest.raises(ValueError, match="read-only"):
        old[0, 0] = 1


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = create(tmp_path / "r")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError):
        file.ensure(1)
    assert file.capacity == 0
    with pytest.raises(DiskFullError):
        create(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    monkeypatch.undo()
    file.ensure(1)
    file.write(0, [row.tobytes() for row in rows(1)])
    file.close()


def test_a_failing_disk_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = create(tmp_path / "r")
    file.ensure(1)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwritev", fail)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(ReplicaStoppedError):
        file.write(0, [row.tobytes() for row in rows(1)])
    with pytest.raises(ReplicaStoppedError):
        file.sync()
    file.close()


def test_missing_short_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with pytest.raises(DamagedError, match="missing"):
        reopen(path)
    create(path).close()
    with pytest.raises(DamagedError, match="ends before"):
        reopen(path, 1)
    with pytest.raises(ForeignDataError):
        RowFile.open(path, shard=3, dim=DIM, kind=Kind.ITEM, rowset=5, rows=0)
    path.write_bytes(b"short")
    with pytest.raises(DamagedError, match="header"):
        reopen(path)


def test_an_unknown_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.vectors.FORMAT_VERSION", 7)
    create(tmp_path / "r").close()
    monkeypatch.undo()
    with pytest.raises(FormatError, match="7"):
        reopen(tmp_path / "r")


@pytest.mark.parametrize("position", [*range(40), 41, 1000, HEADER_BYTES - 1])
def test_any_flip_in_the_header_is_seen(tmp_path: Path, position: int) -> None:
    path = tmp_path / "r"
    create(path).close()
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(DamagedError):
        reopen(path)
