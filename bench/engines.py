"""Index engines against what a user would take instead: `python -m bench.engines [--quick] [--only NAME]`.

100,000 × 1,024 rows in clusters (`--quick`: 20,000), k = 10, batches of 100; 1,000 queries are timed, recall is over 5,000.
The first full run builds three graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from bench.graphs import DIM, EF_CONSTRUCTION, ROWS, ROWS_QUICK, THREADS, M, dataset, hnswlib_graph
from bench.harness import arguments, figure, interleaved, say
from bench.vectors import CACHE
from storage.config import StorageConfig
from storage.index import Engine, make_engine
from storage.records import Version
from storage.view import ClassConstraint, ShardView

K, BATCH, EF, RUNS, TIMED = 10, 100, 200, 7, 1000
Search = Callable[[npt.NDArray[np.float16]], Any]


def view_of(vectors: npt.NDArray[np.float16]) -> ShardView:
    rows = len(vectors)
    alive = np.packbits(np.ones(rows, np.uint8), bitorder="little")
    ids, masks = np.arange(rows, dtype=np.uint64), np.zeros((rows, 4), np.uint64)
    return ShardView(0, Version(1, rows), rows, rows, vectors, ids, masks, alive, 1)


def queries_per_s(search: Search, queries: npt.NDArray[np.float16]) -> float:
    begin = time.perf_counter()
    for low in range(0, len(queries), BATCH):
        search(queries[low : low + BATCH])
    return len(queries) / (time.perf_counter() - begin)


def recall(found: npt.NDArray[Any], truth: npt.NDArray[np.int64]) -> float:
    return sum(len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)) / truth.size


def rows_by(engine: Engine, view: ShardView, queries: npt.NDArray[np.float16]) -> npt.NDArray[np.int64]:
    return np.stack([h.rows for h in engine.search(view, queries, K, [ClassConstraint()] * len(queries))])


def true_rows(view: ShardView, queries: npt.NDArray[np.float16]) -> npt.NDArray[np.int64]:
    path = CACHE / f"true-{view.rows}x{DIM}-{len(queries)}-{K}.npy"
    if not path.exists():
        exact = make_engine(StorageConfig(engine="exact", float32_budget_bytes=0))
        np.save(path, rows_by(exact, view, queries))
    found: npt.NDArray[np.int64] = np.load(path)
    return found


def searcher(engine: Engine, view: ShardView) -> Search:
    return lambda part: engine.search(view, part, K, [ClassConstraint()] * len(part))


def graph_engine(name: str, view: ShardView, ef: int = EF) -> Engine:
    """An engine with its graph of all rows, from the cache when it was built before."""
    config = StorageConfig(engine=name, m=M, ef_construction=EF_CONSTRUCTION, ef=ef, threads=THREADS)  # type: ignore[arg-type]
    engine = make_engine(config)
    directory = CACHE / f"engine-{name}-{view.rows}"
    if not engine.load(directory, view):
        say(f"building {name} over {view.rows} rows")
        begin = time.perf_counter()
        while engine.build(view, 10.0):
            say(f"  {engine.covered(view)} rows, {time.perf_counter() - begin:.0f} s")
        engine.save(directory)
    return engine


class Bench:
    def __init__(self, rows: int, only: str | None) -> None:
        self.only = only
        self.vectors, self.queries = dataset(rows)
        self.view = view_of(self.vectors)
        self.wide = self.queries.astype(np.float32)
        faiss.omp_set_num_threads(THREADS)
        self.truth = true_rows(self.view, self.queries)

    def wants(self, *names: str) -> bool:
        return self.only is None or any(self.only in name for name in names)

    def hnswlib(self) -> tuple[Any, Search]:
        index = hnswlib_graph(self.view.rows)
        return index, lambda part: index.knn_query(part.astype(np.float32), K)

    def hnsw(self) -> None:
        index, bare = self.hnswlib()
        index.set_ef(EF)
        engine = graph_engine("hnsw", self.view)
        theirs = recall(index.knn_query(self.wide, K)[0], self.truth)
        ours = recall(rows_by(engine, self.view, self.queries), self.truth)
        say(f"hnsw: recall ours {ours:.4f}, bare hnswlib {theirs:.4f} at ef={EF}")
        assert ours >= theirs - 0.002, "a comparison of speed is only fair at equal recall"
        a, b = self._race(searcher(engine, self.view), bare)
        figure("engines.hnsw", a, "queries/s", peer=f"hnswlib at recall {theirs:.4f}", peer_value=b,
               target="ratio >= 0.9", n=self.view.rows)  # fmt: skip

    def hnsw16(self) -> None:
        index, bare = self.hnswlib()
        engine = graph_engine("hnsw16", self.view)
        for ef in (EF, EF // 4):
            index.set_ef(ef)
            theirs = recall(index.knn_query(self.wide, K)[0], self.truth)
            engine = graph_engine("hnsw16", self.view, ef)
            ours = recall(rows_by(engine, self.view, self.queries), self.truth)
            say(f"hnsw16: recall ours {ours:.4f}, bare hnswlib {theirs:.4f} at ef={ef}")
            assert ours >= theirs - 0.001, "a comparison of speed is only fair at equal recall"
            a, b = self._race(searcher(engine, self.view), bare)
            name = "engines.hnsw16" if ef == EF else f"engines.hnsw16_ef{ef}"
            figure(name, a, "queries/s", peer=f"hnswlib at recall {theirs:.4f}", peer_value=b,
                   target="ratio >= 1.5", n=self.view.rows)  # fmt: skip

    def hnsw16_bytes(self) -> None:
        """Sizes of the saved graphs, which hold what memory holds."""
        hnswlib_graph(self.view.rows)
        graph_engine("hnsw16", self.view)
        (peer,) = CACHE.glob(f"hnswlib-{self.view.rows}x{DIM}-*.bin")
        (own,) = (CACHE / f"engine-hnsw16-{self.view.rows}").glob("graph-*.bin")
        rows = self.view.rows
        figure("engines.hnsw16_bytes", own.stat().st_size / rows, "bytes/vector", peer="hnswlib",
               peer_value=peer.stat().st_size / rows, target="ratio <= 0.7", n=rows)  # fmt: skip

    def exact(self) -> None:
        wide_rows = self.vectors.astype(np.float32)
        flat = self._faiss_fp16(wide_rows)

        def by_numpy(part: npt.NDArray[np.float16]) -> Any:
            scores = part.astype(np.float32) @ wide_rows.T
            best = np.argpartition(scores, -K, axis=1)[:, -K:]
            return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, axis=1)), axis=1)

        def by_faiss(part: npt.NDArray[np.float16]) -> Any:
            return flat.search(part.astype(np.float32), K)

        few = self.queries[:300]
        peers = {"numpy float32 + argpartition": by_numpy, "faiss FP16 flat": by_faiss}
        name, best = max(peers.items(), key=lambda item: queries_per_s(item[1], few))
        budgets = {"exact": 1 << 30, "exact_equal_memory": 0}
        for figure_name, budget in budgets.items():
            if not self.wants(f"engines.{figure_name}") or (budget == 0 and self.only == "engines.exact"):
                continue
            engine = make_engine(StorageConfig(engine="exact", float32_budget_bytes=budget, threads=THREADS))
            against, peer = (name, best) if budget else ("faiss FP16 flat", by_faiss)
            a, b = self._race(searcher(engine, self.view), peer, few)
            figure(f"engines.{figure_name}", a, "queries/s", peer=against, peer_value=b,
                   target="ratio >= 1.0" if budget else "ratio >= 0.9", n=self.view.rows)  # fmt: skip
            one = searcher(engine, self.view)
            a, b = interleaved(lambda: _one_by_one(one, few), lambda: _one_by_one(by_faiss, few), RUNS)  # noqa: B023
            figure(f"engines.{figure_name}_single", a, "queries/s", peer="faiss FP16 flat", peer_value=b,
                   target="ratio >= 0.9", n=self.view.rows)  # fmt: skip

    def _faiss_fp16(self, rows: npt.NDArray[np.float32]) -> Any:
        kind: Any = faiss.ScalarQuantizer
        make: Any = faiss.IndexScalarQuantizer
        index = make(DIM, kind.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
        index.add(rows)
        return index

    def _race(
        self, ours: Search, peer: Search, queries: npt.NDArray[np.float16] | None = None
    ) -> tuple[float, float]:
        queries = self.queries[:TIMED] if queries is None else queries
        ours(queries[:BATCH])
        peer(queries[:BATCH])
        return interleaved(lambda: queries_per_s(ours, queries), lambda: queries_per_s(peer, queries), RUNS)


def _one_by_one(search: Search, queries: npt.NDArray[np.float16]) -> float:
    begin = time.perf_counter()
    for i in range(10):
        search(queries[i : i + 1])
    return 10 / (time.perf_counter() - begin)


def main() -> None:
    options = arguments(__doc__ or "")
    bench = Bench(ROWS_QUICK if options.quick else ROWS, options.only)
    if bench.wants("engines.hnsw"):
        bench.hnsw()
    if bench.wants("engines.hnsw16", "engines.hnsw16_ef50"):
        bench.hnsw16()
    if bench.wants("engines.hnsw16_bytes"):
        bench.hnsw16_bytes()
    if bench.wants("engines.exact", "engines.exact_equal_memory"):
        bench.exact()


if __name__ == "__main__":
    main()
