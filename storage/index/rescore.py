"""Exact scores for what an approximate search let through, so that every engine and replica says the same.

A score is the float64 sum of FP16 × FP16 products, rounded once to float32; hits are ordered by (score descending, id
ascending). An FP16 value is a multiple of 2^-24, so a product is a multiple of 2^-48 and exact. For `cosine` both
vectors have unit length, so no partial sum passes |q|·|x| ≈ 1 < 2^5 and each fits float64's 53 bits: **every
order of summation gives the same bits**, and a BLAS may choose its own. For `dot` lengths are free, so the
sum is taken by halves in an order that is written here and that no library chooses (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from storage.config import Metric
from storage.index.scan import widen
from storage.index.workers import in_pieces
from storage.view import Hits, ShardView

Rows = npt.NDArray[np.int64]
# Rows converted to float64 at a time: 1 MiB at 1,024 dimensions.
_CHUNK = 128


def rescore(
    view: ShardView,
    queries: npt.NDArray[np.float16],
    survivors: Sequence[Rows],
    k: int,
    metric: Metric,
    threads: int,
) -> list[Hits]:
    """Best k of each query's survivors, by exact score.

    queries: float16 [batch, dim]; survivors: one int64 [n] of row numbers of `view` per query, no row twice.
    """

    def piece(low: int, high: int) -> list[Hits]:
        return _rescored(view, queries[low:high], survivors[low:high], k, metric)

    return [hits for hits_of in in_pieces(len(queries), threads, piece) for hits in hits_of]


def _rescored(
    view: ShardView, queries: npt.NDArray[np.float16], survivors: Sequence[Rows], k: int, metric: Metric
) -> list[Hits]:
    counts = np.array([len(rows) for rows in survivors], np.int64)
    starts = np.concatenate(([0], np.cumsum(counts)))
    total = int(starts[-1])
    if total == 0:
        return [nothing() for _ in survivors]
    rows = np.concatenate(survivors)
    scores = np.empty(total, np.float32)
    wide = queries.astype(np.float64)
    buffer = np.empty((min(_CHUNK, total), queries.shape[1]), np.float32)
    query = 0
    for low in range(0, total, _CHUNK):
        high = min(low + _CHUNK, total)
        widen(view.vectors[rows[low:high]], buffer[: high - low])
        gathered = buffer[: high - low].astype(np.float64)  # by float32: half the time of numpy's own way
        at = low
        while at < high:
            while starts[query + 1] <= at:
                query += 1
            stop = min(int(starts[query + 1]), high)
            scores[at:stop] = _dots(gathered[at - low : stop - low], wide[query], metric)
            at = stop
    scores += np.float32(0)  # -0.0, which some orders of summation leave and others do not, becomes 0.0
    return _ordered(view, rows, scores, starts, k)


def nothing() -> Hits:
    return Hits(np.empty(0, np.uint64), np.empty(0, np.float32), np.empty(0, np.int64))


def _dots(
    rows: npt.NDArray[np.float64], query: npt.NDArray[np.float64], metric: Metric
) -> npt.NDArray[np.float64]:
    if metric == "cosine":
        # Not `rows @ query`: OpenBLAS would wake its threads for it, which then spin on the cores that a graph walk
        # in the same batch needs.
        dots: npt.NDArray[np.float64] = np.vecdot(rows, query)
        return dots
    products = rows * query
    width = products.shape[1]
    while width > 1:
        half = width // 2
        folded = products[:, :half] + products[:, half : 2 * half]
        if width % 2:
            folded[:, 0] += products[:, width - 1]
        products, width = folded, half
    return products[:, 0]


def _ordered(
    view: ShardView, rows: Rows, scores: npt.NDArray[np.float32], starts: Rows, k: int
) -> list[Hits]:
    """All queries in one sort: Python time per query is what a fast graph search is measured against."""
    ids = view.ids[rows]
    owner = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.lexsort((ids, -scores, owner))
    ids, scores, rows = ids[order], scores[order], rows[order]
    bounds = starts.tolist()
    return [
        Hits(ids[low : min(low + k, high)], scores[low : min(low + k, high)], rows[low : min(low + k, high)])
        for low, high in pairwise(bounds)
    ]
