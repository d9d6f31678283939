"""Graphs that benches share, built once under `.bench/`: `python -m bench.graphs [--quick]` (minutes)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.harness import arguments, say
from bench.vectors import CACHE, clustered

# Fewer queries would leave a recall of 0.998 to a handful of them.
M, EF_CONSTRUCTION, DIM, QUERIES = 32, 200, 1024, 5000
ROWS, ROWS_QUICK = 100_000, 20_000
THREADS = 2


def dataset(rows: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """(vectors float16 [rows, DIM], queries float16 [QUERIES, DIM]), from the cache when it is there."""
    path = CACHE / f"clustered-{rows}x{DIM}-{QUERIES}.npz"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        vectors, queries = clustered(rows, DIM, QUERIES)
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, vectors=vectors, queries=queries)
        part.replace(path)
    with np.load(path) as data:
        return data["vectors"], data["queries"]


def hnswlib_graph(rows: int) -> Any:
    """A bare hnswlib index over dataset(rows), inner product."""
    import hnswlib

    path = CACHE / f"hnswlib-{rows}x{DIM}-m{M}-efc{EF_CONSTRUCTION}.bin"
    index = hnswlib.Index("ip", DIM)
    index.set_num_threads(THREADS)
    if path.exists():
        index.load_index(str(path), max_elements=rows)
        return index
    index.init_index(rows, M=M, ef_construction=EF_CONSTRUCTION)
    _timed(path, rows, lambda part: index.add_items(part.astype(np.float32)))
    return _kept(path, index, lambda part: index.save_index(str(part)))


def faiss_graph(rows: int) -> Any:
    """A bare faiss IndexHNSWSQ (FP16) over dataset(rows), inner product."""
    import faiss

    path = CACHE / f"faiss-{rows}x{DIM}-m{M}-efc{EF_CONSTRUCTION}.faiss"
    faiss.omp_set_num_threads(THREADS)
    if path.exists():
        return faiss.read_index(str(path))
    index = faiss.IndexHNSWSQ(DIM, faiss.ScalarQuantizer.QT_fp16, M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    index.is_trained = True
    _timed(path, rows, lambda part: index.add(part.astype(np.float32)))
    return _kept(path, index, lambda part: faiss.write_index(index, str(part)))


def _timed(path: Path, rows: int, add: Any) -> None:
    vectors, _ = dataset(rows)
    begin = time.perf_counter()
    for low in range(0, rows, 1000):
        add(vectors[low : low + 1000])
        if low % 10_000 == 0:
            say(f"{path.name}: {low} of {rows} rows, {time.perf_counter() - begin:.0f} s")


def _kept(path: Path, index: Any, write: Any) -> Any:
    part = path.with_suffix(f".{os.getpid()}")
    write(part)
    part.replace(path)
    return index


def main() -> None:
    options = arguments(__doc__ or "")
    rows = ROWS_QUICK if options.quick else ROWS
    hnswlib_graph(rows)
    faiss_graph(rows)


if __name__ == "__main__":
    main()
