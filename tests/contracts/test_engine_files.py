"""Saved graphs: they answer as before, and what is damaged or does not fit is not taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from storage.config import StorageConfig
from storage.index import make_engine
from tests.contracts.engines import GRAPHS, NONE, ROWS, built, rows_of, settings, view_of


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return rows_of(ROWS + 100)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_saved_graph_answers_the_same(name: str, metric: str, vectors: np.ndarray, tmp_path: Path) -> None:
    config = settings(name, metric=metric)
    view = view_of(vectors, rows=2000)
    engine = built(make_engine(config), view)
    engine.save(tmp_path / "index")
    engine.save(tmp_path / "index")  # replacing what was there
    assert len(list((tmp_path / "index").iterdir())) == 2
    grown = view_of(vectors, rows=2500)
    loaded = make_engine(config)
    assert loaded.load(tmp_path / "index", grown)
    assert loaded.covered(grown) == 2000
    queries = rows_of(20, seed=40)
    for a, b in zip(
        engine.search(grown, queries, 10, [NONE] * 20),
        loaded.search(grown, queries, 10, [NONE] * 20),
        strict=True,
    ):
        np.testing.assert_array_equal(a.ids, b.ids)
    built(loaded, grown)
    assert loaded.covered(grown) == 2500


@pytest.mark.parametrize("name", GRAPHS)
def test_what_does_not_fit_is_not_loaded(name: str, vectors: np.ndarray, tmp_path: Path) -> None:
    view = view_of(vectors, rows=1000)
    directory = tmp_path / "index"
    built(make_engine(settings(name)), view).save(directory)

    def loads(config: StorageConfig | None = None, **changes: object) -> bool:
        engine = make_engine(config or settings(name))
        taken = engine.load(directory, view_of(vectors, rows=1000, **changes))  # type: ignore[arg-type]
        assert taken == (engine.statistics()["graph_rows"] > 0)
        return taken

    assert loads()
    assert not loads(rowset=2)
    assert not loads(settings(name, m=8))
    assert not loads(settings(name, metric="dot"))
    assert not loads(settings("hnsw16" if name == "hnsw" else "hnsw"))
    assert not make_engine(settings(name)).load(directory, view_of(vectors, rows=999))
    assert not make_engine(settings(name)).load(tmp_path / "absent", view)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "manifest", "format", "not json", "lies"])
def test_a_damaged_graph_is_not_loaded(name: str, harm: str, vectors: np.ndarray, tmp_path: Path) -> None:
    view = view_of(vectors, rows=500)
    engine = built(make_engine(settings(name)), view)
    engine.save(tmp_path)
    (graph,) = tmp_path.glob("graph-*.bin")
    manifest = tmp_path / "manifest.json"
    data = bytearray(graph.read_bytes())
    said = json.loads(manifest.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        graph.write_bytes(data)
    elif harm == "cut":
        graph.write_bytes(data[:-100])
    elif harm == "gone":
        graph.unlink()
    elif harm == "manifest":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    elif harm == "format":
        manifest.write_text(json.dumps({**said, "format": 99}))
    elif harm == "not json":
        manifest.write_bytes(b"\xff\x00[]")
    else:
        manifest.write_text(json.dumps({**said, "rows": 499}))
    loaded = make_engine(settings(name))
    assert not loaded.load(tmp_path, view)
    assert loaded.covered(view) == 0
