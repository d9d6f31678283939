"""8-bit codes: they keep what matters, do not depend on the batch, and notice vectors of another kind."""

from __future__ import annotations

import numpy as np
import pytest

from storage.config import StorageConfig
from storage.index import hnsw16, make_engine
from storage.index.codes import FAR, KEEP, WINDOW, fitted, whole
from tests.contracts.engines import NONE, built, oracle, recall, view_of

DIM = 128


def rows_in(directions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """float16 [count, DIM], unit length: mixtures of directions float64 [n, DIM], and a little of everything."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, len(directions))) @ directions
    x += 0.01 * rng.standard_normal((count, DIM))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def axes() -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(5).standard_normal((DIM, DIM)))[0]


def test_codes_keep_the_directions_that_rows_use(axes: np.ndarray) -> None:
    rows = rows_in(axes[:30], 2000, seed=1)
    codes = fitted(rows)
    assert codes.width == 32
    turned = (codes.encoded(rows).astype(np.float64) - 128) / codes.scale
    near = turned[:200] @ turned.T
    true = rows[:200].astype(np.float64) @ rows.T.astype(np.float64)
    assert np.abs(near - true).max() < 0.05
    assert np.square(turned).sum(axis=1).mean() >= KEEP


def test_rows_that_use_every_direction_or_are_few_are_kept_whole(axes: np.ndarray) -> None:
    assert fitted(rows_in(axes, 2000, seed=1)).width == DIM
    assert fitted(rows_in(axes[:30], 4 * DIM - 1, seed=1)).width == DIM


@pytest.mark.parametrize("narrow", [True, False])
def test_a_code_does_not_depend_on_the_batch(axes: np.ndarray, narrow: bool) -> None:
    rows = rows_in(axes[:30], 1000, seed=2)
    codes = fitted(rows) if narrow else whole(DIM)
    together = codes.encoded(rows)
    for size in (1, 3, 16, 50):
        for low in range(0, 200, size):
            np.testing.assert_array_equal(codes.encoded(rows[low : low + size]), together[low : low + size])


def test_a_vector_along_one_component_is_clipped() -> None:
    codes = whole(DIM)
    turn = (codes.encoded(np.eye(DIM, dtype=np.float16)) - 128).T
    along = (turn[0] / np.linalg.norm(turn[0])).astype(np.float16)
    assert codes.encoded(along[None])[0, 0] == 255


def test_rows_of_another_kind_get_whole_codes_over_the_same_links(axes: np.ndarray) -> None:
    first = rows_in(axes[:30], 2000, seed=1)
    other = rows_in(axes[30:], WINDOW + 500, seed=3)
    vectors = np.concatenate((first, other))
    config = StorageConfig(engine="hnsw16", dim=DIM, m=16, ef_construction=100, graph_rows_min=100)
    engine = built(make_engine(config), view_of(first))
    narrow = engine.statistics()["bytes_per_vector"]
    view = view_of(vectors)
    built(engine, view)
    assert engine.covered(view) == len(vectors)
    built(engine, view)  # with nothing to add
    assert engine.statistics()["bytes_per_vector"] == narrow + DIM - 32
    queries = np.concatenate((rows_in(axes[:30], 20, seed=8), rows_in(axes[30:], 20, seed=9)))
    got = engine.search(view, queries, 10, [NONE] * 40)
    assert recall(got, [oracle(view, q, 10) for q in queries]) >= 0.95


def test_queries_of_another_kind_are_noticed_and_a_few_are_not(axes: np.ndarray) -> None:
    rows = rows_in(axes[:30], 2000, seed=1)
    graph = hnsw16.make(StorageConfig(engine="hnsw16", dim=DIM, m=16), rows)
    graph.add(rows)
    strange = rows_in(axes[30:], WINDOW // 10, seed=4)
    assert np.square(strange.astype(np.float32) @ axes[:30].T).sum(axis=1).max() < 1 - FAR
    for low in range(0, WINDOW, 100):
        graph.search(rows[low % 1900 :][:100], 10, 20)
    assert graph.fitting(rows) is graph
    for _ in range(12):
        graph.search(strange, 10, 20)
    wider = graph.fitting(rows)
    assert wider is not graph
    assert wider.rows == graph.rows
    assert wider.fitting(rows) is wider
