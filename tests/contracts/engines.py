"""What the engine contracts share: views of synthetic rows, and an oracle that sorts everything."""

from __future__ import annotations

import numpy as np

from storage.config import StorageConfig
from storage.index import Engine
from storage.records import Version
from storage.view import ClassConstraint, Hits, ShardView

DIM = 64
ROWS = 4000
NONE = ClassConstraint()
ENGINES = ["exact", "exact-no-copy", "hnsw", "hnsw16"]
GRAPHS = ["hnsw", "hnsw16"]


def settings(name: str, **changes: object) -> StorageConfig:
    values: dict[str, object] = {
        "engine": name.split("-")[0],
        "dim": DIM,
        "graph_rows_min": 100,
        "m": 16,
        "ef_construction": 100,
        "ef": 120,
        "float32_budget_bytes": 0 if name == "exact-no-copy" else 1 << 30,
    }
    return StorageConfig(**{**values, **changes})  # type: ignore[arg-type]


def rows_of(count: int, seed: int = 1, dim: int = DIM, unit: bool = True) -> np.ndarray:
    """float16 [count, dim] from one mixture of 40 clusters, whatever the seed: queries are like rows."""
    centres = np.random.default_rng(0).standard_normal((40, dim))
    rng = np.random.default_rng(seed)
    x = centres[rng.integers(0, 40, count)] + 0.7 * rng.standard_normal((count, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True) if unit else 3 * x).astype(np.float16)


def masks_of(count: int) -> np.ndarray:
    """Class 3: half the rows; 70: one in a hundred; 100: one in five; 130: the first tenth; 9: two rows."""
    rng = np.random.default_rng(2)
    masks = np.zeros((count, 4), np.uint64)
    chosen = {3: rng.random(count) < 0.5, 70: rng.random(count) < 0.01, 100: rng.random(count) < 0.2}
    chosen[130] = np.arange(count) < count // 10
    chosen[9] = np.isin(np.arange(count), (5, count - 1))
    for c, rows in chosen.items():
        masks[:, c // 64] |= rows.astype(np.uint64) << np.uint64(c % 64)
    return masks


def view_of(
    vectors: np.ndarray, *, rows: int | None = None, dead: object = (), **changes: object
) -> ShardView:
    rows = len(vectors) if rows is None else rows
    flags = np.ones(rows, np.uint8)
    flags[np.array(dead, np.int64)] = 0
    values: dict[str, object] = {
        "shard": 0,
        "position": Version(1, rows + 1000 * int(rows - flags.sum())),
        "rows": rows,
        "alive_rows": int(flags.sum()),
        "vectors": vectors,
        "ids": np.random.default_rng(3).permutation(len(vectors)).astype(np.uint64) + np.uint64(1 << 40),
        "masks": masks_of(len(vectors)),
        "alive": np.packbits(flags, bitorder="little"),
        "rowset": 1,
    }
    return ShardView(**{**values, **changes})  # type: ignore[arg-type]


def allowed(view: ShardView, constraint: ClassConstraint) -> np.ndarray:
    def has(c: int) -> np.ndarray:
        return view.masks[: view.rows, c // 64] >> np.uint64(c % 64) & np.uint64(1) != 0

    ok = np.unpackbits(view.alive, bitorder="little")[: view.rows] != 0
    for c in constraint.require_all:
        ok &= has(c)
    if constraint.require_any:
        ok &= np.any([has(c) for c in constraint.require_any], axis=0)
    for c in constraint.exclude:
        ok &= ~has(c)
    return np.flatnonzero(ok)


def oracle(view: ShardView, query: np.ndarray, k: int, constraint: ClassConstraint = NONE) -> Hits:
    rows = allowed(view, constraint)
    products = view.vectors[rows].astype(np.float64) * query.astype(np.float64)
    scores = products.sum(axis=1).astype(np.float32)
    best = np.lexsort((view.ids[rows], -scores))[:k]
    return Hits(view.ids[rows][best], scores[best], rows[best])


def built(engine: Engine, view: ShardView) -> Engine:
    while engine.build(view, 1.0):
        pass
    return engine


def recall(got: list[Hits], want: list[Hits]) -> float:
    for a, b in zip(got, want, strict=True):
        assert len(a.ids) == len(b.ids)
        assert len(np.unique(a.ids)) == len(a.ids)
    found = sum(len(np.intersect1d(a.ids, b.ids)) for a, b in zip(got, want, strict=True))
    total = sum(len(b.ids) for b in want)
    return found / total if total else 1.0


def check(name: str, view: ShardView, got: list[Hits], want: list[Hits], at_least: float = 0.98) -> None:
    """Exact engines answer exactly; graphs find nearly all, and every hit's score, order and id is exact."""
    if name.startswith("exact"):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.scores.view(np.uint32), b.scores.view(np.uint32))
            np.testing.assert_array_equal(a.rows, b.rows)
    assert recall(got, want) >= at_least
    for hits in got:
        assert (hits.ids.dtype, hits.scores.dtype, hits.rows.dtype) == (np.uint64, np.float32, np.int64)
        np.testing.assert_array_equal(view.ids[hits.rows], hits.ids)
        assert (np.lexsort((hits.ids, -hits.scores)) == np.arange(len(hits.ids))).all()


CONSTRAINTS = [
    NONE,
    ClassConstraint(require_all=(3,)),
    ClassConstraint(require_any=(70, 9)),
    ClassConstraint(exclude=(3,), require_any=(100, 70)),
    ClassConstraint(exclude=(100,)),
    ClassConstraint(require_all=(200,)),
    ClassConstraint(require_all=(130, 3), exclude=(100,)),
    ClassConstraint(require_all=(9,)),
]
