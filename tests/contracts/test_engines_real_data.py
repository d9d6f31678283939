"""Recall over real sentence embeddings of real films, whose clusters and genres no generator would make."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from storage.config import StorageConfig
from storage.index import make_engine
from storage.records import Version
from storage.view import ClassConstraint, ShardView

DATA = Path(__file__).resolve().parents[2] / "../shared/data/films-minilm-384"
ROWS = 11_000
GENRES = ["drama", "comedy", "horror", "western", "animated", "musical"]


@pytest.fixture(scope="module")
def films() -> tuple[ShardView, np.ndarray]:
    """(a view of some films with their genres as classes, other films as queries float16 [200, 384])"""
    if not DATA.is_dir():
        reason = "real film embeddings are missing: ../shared/data/films-minilm-384 beside the repository"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    (path,) = DATA.glob("*.npy")
    lines = (DATA / "wikipedia_rows.tsv").read_text().splitlines()
    vectors = np.load(path)
    lines = lines[len(lines) - len(vectors) :]
    order = np.random.default_rng(1).permutation(len(vectors))
    chosen, others = order[:ROWS], order[ROWS : ROWS + 200]
    masks = np.zeros((ROWS, 4), np.uint64)
    for number, genre in enumerate(GENRES):
        has = np.array([genre in lines[i].rsplit("\t", 1)[-1].lower() for i in chosen])
        masks[:, 0] |= has.astype(np.uint64) << np.uint64(number)
    alive = np.packbits(np.ones(ROWS, np.uint8), bitorder="little")
    x = np.ascontiguousarray(vectors[chosen], np.float16)
    ids = chosen.astype(np.uint64)
    view = ShardView(0, Version(1, ROWS), ROWS, ROWS, x, ids, masks, alive, 1)
    return view, np.ascontiguousarray(vectors[others], np.float16)


@pytest.mark.parametrize("name", ["hnsw", "hnsw16"])
def test_recall_with_and_without_genres(name: str, films: tuple[ShardView, np.ndarray]) -> None:
    view, queries = films
    shape = {"dim": 384, "m": 16, "ef_construction": 200, "ef": 200}
    exact = make_engine(StorageConfig(engine="exact", **shape))  # type: ignore[arg-type]
    engine = make_engine(StorageConfig(engine=name, **shape))  # type: ignore[arg-type]
    while engine.build(view, 1.0):
        pass
    constraints = [ClassConstraint()]
    constraints += [ClassConstraint(require_all=(c,)) for c in range(len(GENRES))]
    constraints += [ClassConstraint(exclude=(0, 1)), ClassConstraint(require_any=(2, 3), exclude=(1,))]
    for constraint in constraints:
        for batch in (1, 50):
            want, got = [], []
            for i in range(0, 50 if batch == 1 else 200, batch):
                part = queries[i : i + batch]
                want += exact.search(view, part, 10, [constraint] * len(part))
                got += engine.search(view, part, 10, [constraint] * len(part))
            found = sum(len(np.intersect1d(a.ids, b.ids)) for a, b in zip(got, want, strict=True))
            total = sum(len(b.ids) for b in want)
            assert total == 10 * len(want)
            assert found / total >= 0.98, (constraint, batch)
    assert engine.statistics()["queries_walked"] > 200
