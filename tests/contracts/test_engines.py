"""One suite for every CPU engine, against a brute-force float64 oracle."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from storage.config import StorageConfig
from storage.index import Engine, make_engine
from storage.view import ClassConstraint, ShardView
from tests.contracts.engines import (
    CONSTRAINTS,
    ENGINES,
    GRAPHS,
    NONE,
    ROWS,
    built,
    check,
    oracle,
    recall,
    rows_of,
    settings,
    view_of,
)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return rows_of(ROWS + 100)


@pytest.fixture(scope="module", params=ENGINES)
def ready(request: pytest.FixtureRequest, vectors: np.ndarray) -> tuple[str, Engine, ShardView]:
    """An engine that has taken all of a view with some dead rows."""
    view = view_of(vectors, rows=ROWS, dead=np.arange(0, ROWS, 11))
    return request.param, built(make_engine(settings(request.param)), view), view


@pytest.mark.parametrize("k", [1, 10, 100])
def test_best_k_under_each_constraint(ready: tuple[str, Engine, ShardView], k: int) -> None:
    name, engine, view = ready
    queries = rows_of(5, seed=9)
    for constraint in CONSTRAINTS:
        got = engine.search(view, queries, k, [constraint] * 5)
        check(name, view, got, [oracle(view, q, k, constraint) for q in queries])


def test_each_query_has_its_own_constraint(ready: tuple[str, Engine, ShardView]) -> None:
    name, engine, view = ready
    queries = rows_of(64, seed=10)
    constraints = [CONSTRAINTS[i * 7 % len(CONSTRAINTS)] for i in range(64)]
    got = engine.search(view, queries, 10, constraints)
    want = [oracle(view, q, 10, c) for q, c in zip(queries, constraints, strict=True)]
    check(name, view, got, want)


def test_a_constraint_that_fits_nothing_near_the_query(vectors: np.ndarray) -> None:
    """The half of the rows that is least like the query: what a filter inside a walk loses."""
    query = rows_of(1, seed=12)
    view = view_of(vectors, rows=ROWS)
    scores = vectors[:ROWS].astype(np.float64) @ query[0].astype(np.float64)
    masks = np.zeros((len(vectors), 4), np.uint64)
    masks[np.flatnonzero(scores < np.median(scores)), 0] = 1
    view = view_of(vectors, rows=ROWS, masks=masks)
    constraint = ClassConstraint(require_all=(0,))
    for name in ENGINES:
        engine = built(make_engine(settings(name)), view)
        check(
            name, view, engine.search(view, query, 10, [constraint]), [oracle(view, query[0], 10, constraint)]
        )


def test_answers_do_not_depend_on_the_batch(ready: tuple[str, Engine, ShardView]) -> None:
    _, engine, view = ready
    queries = rows_of(100, seed=11)
    together = engine.search(view, queries, 10, [NONE] * 100)
    alone = [engine.search(view, queries[i : i + 1], 10, [NONE])[0] for i in range(100)]
    threes = [h for i in range(0, 99, 3) for h in engine.search(view, queries[i : i + 3], 10, [NONE] * 3)]
    for other in (alone, threes):
        for a, b in zip(together, other, strict=False):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.scores.view(np.uint32), b.scores.view(np.uint32))


@pytest.mark.parametrize("name", ENGINES)
def test_k_beyond_the_rows_and_an_empty_view(name: str, vectors: np.ndarray) -> None:
    engine = make_engine(settings(name))
    empty = view_of(vectors, rows=0)
    assert not engine.build(empty, 0.1)
    assert [len(h.ids) for h in engine.search(empty, vectors[:2], 5, [NONE] * 2)] == [0, 0]
    view = view_of(vectors, rows=300, dead=[4])
    built(engine, view)
    queries = rows_of(3, seed=5)
    got = engine.search(view, queries, 1000, [NONE] * 3)
    check(name, view, got, [oracle(view, q, 1000) for q in queries], at_least=1.0)
    assert [len(h.ids) for h in got] == [299] * 3
    assert [len(h.ids) for h in engine.search(view, queries, 0, [NONE] * 3)] == [0, 0, 0]
    assert engine.search(view, queries[:0], 10, []) == []


@pytest.mark.parametrize("name", ENGINES)
def test_ties_go_to_the_lower_id(name: str, vectors: np.ndarray) -> None:
    same = vectors[:500].copy()
    same[100:160] = same[7]
    view = view_of(same)
    engine = built(make_engine(settings(name)), view)
    query = same[7:8]
    (hits,) = engine.search(view, query, 5, [NONE])
    if name.startswith("exact"):
        check(name, view, [hits], [oracle(view, query[0], 5)])
    assert len(np.unique(hits.scores)) == 1
    assert (np.diff(hits.ids.astype(np.int64)) > 0).all()


@pytest.mark.parametrize("name", ENGINES)
def test_deletes_and_updates_are_seen_at_once(name: str, vectors: np.ndarray) -> None:
    before = view_of(vectors, rows=ROWS)
    engine = built(make_engine(settings(name)), before)
    query = rows_of(1, seed=21)
    (first,) = engine.search(before, query, 10, [NONE])
    ids = before.ids.copy()
    ids[ROWS] = first.ids[0]  # an update: the same id in a new row, the old one dead
    after = view_of(vectors, rows=ROWS + 1, dead=first.rows[:5], ids=ids)
    (second,) = engine.search(after, query, 10, [NONE])
    check(name, after, [second], [oracle(after, query[0], 10)], at_least=0.9)
    assert not set(first.rows[:5].tolist()) & set(second.rows.tolist())
    # A search still under way over the old view sees what it saw.
    (again,) = engine.search(before, query, 10, [NONE])
    np.testing.assert_array_equal(again.ids, first.ids)


@pytest.mark.parametrize("dead_share", [0.3, 0.7, 0.97])
@pytest.mark.parametrize("name", GRAPHS)
def test_many_dead_rows(name: str, dead_share: float, vectors: np.ndarray) -> None:
    engine = built(make_engine(settings(name)), view_of(vectors, rows=ROWS))
    dead = np.flatnonzero(np.random.default_rng(4).random(ROWS) < dead_share)
    view = view_of(vectors, rows=ROWS, dead=dead)
    queries = rows_of(20, seed=8)
    check(name, view, engine.search(view, queries, 10, [NONE] * 20), [oracle(view, q, 10) for q in queries])


@pytest.mark.parametrize("name", GRAPHS)
def test_fresh_rows_are_found_beside_the_graph(name: str, vectors: np.ndarray) -> None:
    engine = built(make_engine(settings(name)), view_of(vectors, rows=3000))
    view = view_of(vectors, rows=ROWS)
    assert engine.covered(view) == 3000
    queries = vectors[3000:ROWS:50]
    constraints = [CONSTRAINTS[i % 5] for i in range(len(queries))]
    got = engine.search(view, queries, 10, constraints)
    check(name, view, got, [oracle(view, q, 10, c) for q, c in zip(queries, constraints, strict=True)])
    assert (
        sum(h.scores[0] > 0.99 for h, c in zip(got, constraints, strict=True) if c == NONE)
        == len(queries) // 5
    )
    assert engine.statistics()["queries_walked"] > 0


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_of_another_rowset_is_not_used(name: str, vectors: np.ndarray) -> None:
    engine = built(make_engine(settings(name)), view_of(vectors, rows=ROWS))
    other = view_of(vectors[::-1].copy(), rows=2000, rowset=2)
    assert engine.covered(other) == 0
    queries = rows_of(4, seed=6)
    check(
        name,
        other,
        engine.search(other, queries, 10, [NONE] * 4),
        [oracle(other, q, 10) for q in queries],
        1.0,
    )
    built(engine, other)
    assert engine.covered(other) == 2000


@pytest.mark.parametrize("name", GRAPHS)
def test_no_graph_below_the_least_rows(name: str, vectors: np.ndarray) -> None:
    engine = make_engine(settings(name, graph_rows_min=1000))
    view = view_of(vectors, rows=999)
    assert not engine.build(view, 1.0)
    assert engine.statistics()["graph_rows"] == 0
    assert engine.covered(view) == 999
    query = rows_of(1)
    check(name, view, engine.search(view, query, 10, [NONE]), [oracle(view, query[0], 10)], 1.0)


@pytest.mark.parametrize("name", GRAPHS)
def test_build_keeps_to_its_budget(name: str, vectors: np.ndarray) -> None:
    engine = make_engine(settings(name))
    view = view_of(vectors, rows=ROWS)
    begin = time.monotonic()
    assert engine.build(view, 0.05)
    assert time.monotonic() - begin < 2.0
    assert 0 < engine.covered(view) < ROWS


@pytest.mark.parametrize("name", ENGINES)
def test_searches_beside_building(name: str, vectors: np.ndarray) -> None:
    """Views grow, the builder takes them, two threads search: every answer is right for the view it was asked of."""
    engine = make_engine(settings(name))
    views = [view_of(vectors, rows=rows, dead=[1, rows // 2]) for rows in range(500, ROWS + 1, 500)]
    queries = rows_of(8, seed=30)
    wants = [[oracle(v, q, 10) for q in queries] for v in views]
    latest, stop = [0], threading.Event()
    failures: list[BaseException] = []
    recalls: list[float] = []

    def searcher() -> None:
        try:
            while not stop.is_set():
                at = latest[0]
                got = engine.search(views[at], queries, 10, [NONE] * 8)
                recalls.append(recall(got, wants[at]))
                for hits in got:
                    assert hits.rows.max() < views[at].rows
                    assert 1 not in hits.rows
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=searcher) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(len(views)):
            latest[0] = number
            built(engine, views[number])
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures, failures
    assert recalls
    assert np.mean(recalls) >= 0.98
    got = engine.search(views[-1], queries, 10, [NONE] * 8)
    check(name, views[-1], got, wants[-1])


@pytest.mark.parametrize("name", ENGINES)
def test_dot_scores_vectors_of_any_length(name: str) -> None:
    vectors = rows_of(1500, seed=50, unit=False)
    view = view_of(vectors)
    engine = built(make_engine(settings(name, metric="dot")), view)
    queries = rows_of(10, seed=51, unit=False)
    got = engine.search(view, queries, 10, [NONE] * 10)
    check(name, view, got, [oracle(view, q, 10) for q in queries], at_least=0.95)


def test_statistics(ready: tuple[str, Engine, ShardView]) -> None:
    _, engine, view = ready
    statistics = engine.statistics()
    assert {"engine", "graph_rows", "bytes_per_vector"} <= statistics.keys()
    assert statistics["graph_rows"] == (0 if statistics["engine"] == "exact" else view.rows)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="choose exact, hnsw or hnsw16"):
        make_engine(StorageConfig(engine="flat"))  # type: ignore[arg-type]
