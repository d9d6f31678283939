"""Snapshots: what is imported is what was exported, and a harmed or half one leaves nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from storage import snapshot
from storage.errors import DamagedError, ForeignDataError, FormatError, StorageError
from storage.records import Kind, Version
from storage.replica import Replica
from tests.unit.storage.replica_writer import CONFIG, Writer, answer


@pytest.fixture
def source(tmp_path: Path) -> Writer:
    writer = Writer(tmp_path / "source")
    writer.put(*range(30))
    writer.put(*range(5), seed=40)
    writer.put(4, kind=Kind.USER)
    writer.epoch = 2
    writer.write((Kind.ITEM, 9), write_id=b"w" * 16)
    return writer


def take(snap: Path, target: Path, **changed: object) -> Replica:
    wanted = {"shard": 3, "node_id": "n2", "config": CONFIG} | changed
    Replica.import_snapshot(snap, target, **wanted)  # type: ignore[arg-type]
    return Replica.open(target, **wanted)  # type: ignore[arg-type]


def test_an_import_answers_like_its_source_and_goes_on(source: Writer, tmp_path: Path) -> None:
    source.replica.export(tmp_path / "snap")
    source.put(77)  # after the snapshot: follows by the log
    replica = take(tmp_path / "snap", tmp_path / "target")
    assert replica.position == Version(2, 37)
    assert replica.epoch_starts == {1: 1, 2: 37}
    assert replica.written(b"w" * 16) == (Version(2, 37), 1)
    assert replica.recovery.replayed == 0
    assert replica.get(Kind.USER, 4) == source.replica.get(Kind.USER, 4)
    assert replica.metadata([1, 9, 20]) == source.replica.metadata([1, 9, 20])
    assert answer(replica, 41) == answer(source.replica, 41)
    raw = source.replica.read_log(37, 1 << 20)
    replica.append([raw], 1)
    replica.apply(source.last)
    assert replica.statistics()["digest"] == source.replica.statistics()["digest"]
    replica.abort()
    replica = Replica.open(tmp_path / "target", shard=3, node_id="n2", config=CONFIG)
    assert replica.statistics()["digest"] == source.replica.statistics()["digest"]
    replica.close()


def test_export_beside_writes_and_checkpoints_is_the_last_checkpoint(source: Writer, tmp_path: Path) -> None:
    source.replica.checkpoint()
    digest = source.replica.statistics()["digest"]
    source.put(100, 101)
    source.replica.export(tmp_path / "snap", checkpoint=False)
    replica = take(tmp_path / "snap", tmp_path / "target")
    assert replica.statistics()["digest"] == digest
    replica.close()


def test_the_graph_travels(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, engine="hnsw16", graph_rows_min=10, m=8, ef_construction=20)
    writer = Writer(tmp_path / "source", config)
    writer.put(*range(200))
    while writer.replica.engine.build(writer.replica.view, 1.0):
        pass
    writer.reopen()
    assert writer.replica.recovery.graph_loaded
    writer.replica.export(tmp_path / "snap")
    replica = take(tmp_path / "snap", tmp_path / "target", config=config)
    assert replica.recovery.graph_loaded
    assert replica.fresh_rows() == 0
    assert answer(replica, 41)[0] == 41
    replica.close()


@pytest.mark.parametrize("victim", ["items-0000000001.f16", "table/data.mdb", "manifest.json"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.99])
def test_a_changed_byte_is_refused_and_leaves_nothing(
    source: Writer, tmp_path: Path, victim: str, where: float
) -> None:
    source.replica.export(tmp_path / "snap")
    path = tmp_path / "snap" / victim
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 0x04
    path.write_bytes(data)
    with pytest.raises(DamagedError):
        take(tmp_path / "snap", tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "snap"}


def test_unfinished_foreign_and_unknown_snapshots_are_refused(
    source: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.replica.export(tmp_path / "snap")
    with pytest.raises(ForeignDataError, match="shard"):
        take(tmp_path / "snap", tmp_path / "target", shard=4)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "FORMAT_VERSION", 9)
        with pytest.raises(FormatError):
            take(tmp_path / "snap", tmp_path / "target")
    (tmp_path / "snap" / "manifest.json").unlink()
    with pytest.raises(DamagedError, match="not finished"):
        take(tmp_path / "snap", tmp_path / "target")
    (tmp_path / "target").mkdir()
    with pytest.raises(StorageError, match="exists"):
        take(tmp_path / "snap", tmp_path / "target")


def test_a_half_import_is_cleared_by_the_next(source: Writer, tmp_path: Path) -> None:
    source.replica.export(tmp_path / "snap")
    (tmp_path / "target.import").mkdir()
    (tmp_path / "target.import" / "junk").write_bytes(b"x")
    replica = take(tmp_path / "snap", tmp_path / "target")
    assert not (tmp_path / "target.import").exists()
    assert np.array_equal(replica.view.vectors[:30], source.replica.view.vectors[:30])
    replica.close()
