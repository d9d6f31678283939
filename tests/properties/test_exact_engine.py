"""Whatever the rows, deaths, classes and queries: `exact` says what a float64 sort of everything says, bit by bit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.config import StorageConfig
from storage.index import make_engine
from storage.index.rescore import rescore
from storage.index.scan import widen
from storage.records import Version
from storage.view import ClassConstraint, ShardView

DIM = 16


@st.composite
def shards(draw: st.DrawFn) -> ShardView:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.integers(0, 700))
    # Few distinct vectors make ties, which is where selections go wrong.
    pool = rng.standard_normal((draw(st.sampled_from([1, 3, 50, 1000])), DIM))
    if draw(st.booleans()):
        pool = np.round(pool)
        pool[:, 0] += 0.5
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    vectors = pool[rng.integers(0, len(pool), rows)].astype(np.float16)
    if draw(st.booleans()) and rows:  # sorted by likeness to something: the worst order for a threshold
        vectors = vectors[np.argsort(vectors @ vectors[0])]
    flags = (rng.random(rows) < draw(st.sampled_from([0.1, 0.9, 1.0]))).astype(np.uint8)
    masks = (rng.integers(0, 256, (rows, 1)) & rng.integers(0, 256, (rows, 1))).astype(np.uint64)
    ids = rng.permutation(rows).astype(np.uint64)
    alive = np.packbits(flags, bitorder="little")
    return ShardView(0, Version(1, 1), rows, int(flags.sum()), vectors, ids, masks, alive, 1)


classes = st.lists(st.integers(0, 7), max_size=2).map(tuple)
constraints = st.builds(ClassConstraint, require_all=classes, require_any=classes, exclude=classes)


@settings(max_examples=150, deadline=None)
@given(
    view=shards(),
    wanted=st.lists(constraints, min_size=1, max_size=12),
    k=st.integers(1, 40),
    budget=st.sampled_from([0, 1 << 30]),
    seed=st.integers(0, 2**32),
)
def test_exact_is_exact(
    view: ShardView, wanted: list[ClassConstraint], k: int, budget: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((len(wanted), DIM))
    if view.rows:
        queries[0] = view.vectors[0]
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float16)
    config = StorageConfig(engine="exact", dim=DIM, class_width=64, float32_budget_bytes=budget)
    hits = make_engine(config).search(view, queries, k, wanted)
    bits = view.masks[:, 0].tolist()
    alive = np.unpackbits(view.alive, bitorder="little")[: view.rows].tolist()
    for query, constraint, got in zip(queries, wanted, hits, strict=True):
        rows = [
            r
            for r in range(view.rows)
            if alive[r]
            and all(bits[r] >> c & 1 for c in constraint.require_all)
            and (not constraint.require_any or any(bits[r] >> c & 1 for c in constraint.require_any))
            and not any(bits[r] >> c & 1 for c in constraint.exclude)
        ]
        scores = (view.vectors[rows].astype(np.float64) * query.astype(np.float64)).sum(axis=1)
        rounded = scores.astype(np.float32) + np.float32(0)
        best = np.lexsort((view.ids[rows], -rounded))[:k]
        assert got.rows.tolist() == [rows[i] for i in best]
        assert got.scores.tobytes() == rounded[best].tobytes()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), dim=st.sampled_from([3, 16, 100, 1024]))
def test_a_cosine_score_is_the_true_sum_rounded_once(seed: int, dim: int) -> None:
    """Against rational arithmetic: the float64 sum has no error at all, so no order of summation can matter."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, dim))
    x, q = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    view = ShardView(
        0,
        Version(1, 1),
        1,
        1,
        x[None],
        np.array([7], np.uint64),
        np.zeros((1, 1), np.uint64),
        np.array([1], np.uint8),
        1,
    )
    (hits,) = rescore(view, q[None], [np.array([0])], 1, "cosine", 1)
    true = sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, q, strict=True))
    assert hits.scores[0] == np.float32(float(true))
    assert Fraction(float(true)) == true


def test_widening_is_exact_for_every_finite_value() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    out = np.empty(len(finite), np.float32)
    widen(finite, out)
    np.testing.assert_array_equal(out.view(np.uint32), finite.astype(np.float32).view(np.uint32))
