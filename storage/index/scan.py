"""Exact scans: float32 matrix products block by block, keeping every row that may be among the best k.

A float32 sum of n exact products is off by at most n · 2^-24 · |q| · |x| in any order (Higham, Accuracy and Stability of
Numerical Algorithms, §3.1). So with ε that bound, each row of the true top k scores at least the k-th approximate score
less 2ε; all such rows survive and are rescored exactly. Blocks are small, so a block's scores stay in cache,
and a row is compared with a threshold before anything is sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from storage.config import Metric
from storage.index.constraints import Matching
from storage.view import ShardView

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
# (first position, float32 [n, dim]) of consecutive blocks; an array is good until the next is asked for.
Blocks = Iterator[tuple[int, Float32]]

# Of float32 converted from FP16 at a time: half of a common L2 cache, measured best of 0.5–8 MiB.
WIDEN_BYTES = 1 << 20
# Of float32 in one matrix product, and of its scores. Each product ends in a barrier of the BLAS's threads, which
# on a busy host costs more than scores that leave the L2 cache do on a quiet one.
BLOCK_BYTES = 8 << 20
SCORES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Group:
    """Queries (by their number in the batch, ascending) that search the same rows."""

    queries: npt.NDArray[np.int64]
    matching: Matching


def widen(source: npt.NDArray[np.float16], out: Float32) -> None:
    """out = source as float32, exactly; finite values only.

    Moves the exponent and mantissa bits in place and mends the exponent's bias by a product with 2^112: three
    SIMD passes, 0.5 ns a value against 1.4 of numpy's own conversion and 1.0 of faiss's.
    """
    step = max(1, WIDEN_BYTES // max(1, 4 * source[:1].size))
    for low in range(0, len(out), step):
        part = out[low : low + step]
        bits = part.view(np.int32)
        np.copyto(bits, source[low : low + step].view(np.int16))
        bits <<= 13
        bits &= np.int32(-0x70002000)  # 0x8FFFE000: the sign came along in every bit above the exponent
        part *= np.float32(2.0**112)


def converted(vectors: npt.NDArray[np.float16], start: int, stop: int) -> Blocks:
    """Rows [start, stop) of vectors float16 [≥ stop, dim], converted."""
    dim = vectors.shape[1]
    step = max(16, BLOCK_BYTES // (4 * dim))
    buffer = np.empty((min(step, stop - start), dim), np.float32)
    for low in range(start, stop, step):
        block = buffer[: min(step, stop - low)]
        widen(vectors[low : low + len(block)], block)
        yield low, block


def gathered(vectors: npt.NDArray[np.float16], rows: Rows) -> Blocks:
    """The rows int64 [n] of vectors float16 [_, dim], converted."""
    dim = vectors.shape[1]
    step = max(16, BLOCK_BYTES // (4 * dim))
    buffer = np.empty((min(step, len(rows)), dim), np.float32)
    for low in range(0, len(rows), step):
        part = rows[low : low + step]
        block = buffer[: len(part)]
        widen(vectors[part], block)
        yield low, block


def slack(queries: Float32, norm_max: float) -> npt.NDArray[np.float64]:
    """2ε for each of queries float32 [batch, dim], rows up to norm_max long, the last rounding included."""
    dim = queries.shape[1]
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
    margins: npt.NDArray[np.float64] = 2.02 * (dim + 2) * 2.0**-24 * lengths * norm_max
    return margins


def norm_bound(metric: Metric, measured: Callable[[], float]) -> float:
    """The greatest length of a row. Unit vectors rounded to FP16 are at most 1 + 2^-10 long."""
    return 1.001 if metric == "cosine" else measured()


def longest(vectors: npt.NDArray[np.float16], low: int, high: int) -> float:
    """The greatest length among rows [low, high)."""
    best = 0.0
    for _, block in converted(vectors, low, high):
        best = max(best, float(np.einsum("ij,ij->i", block, block, dtype=np.float64).max()))
    return float(best**0.5)


class Candidates:
    """Rows that may be among the best k of each query, with their approximate scores."""

    def __init__(self, batch: int, k: int, margins: npt.NDArray[np.float64]) -> None:
        self.k = k
        self.threshold = np.full(batch, -np.inf, np.float32)
        self._margins = margins
        self._parts: list[tuple[Rows, Rows, Float32]] = []
        self._waiting = 0
        self._compact_at = batch * (2 * k + 64) + 4096

    def add(self, queries: Rows, rows: Rows, scores: Float32) -> None:
        self._parts.append((queries, rows, scores))
        self._waiting += len(rows)
        if self._waiting > self._compact_at:
            self._compact()
            self._compact_at = max(self._compact_at, 2 * self._waiting)  # ties or a large k: stay linear

    def raise_to(self, kth: Float32) -> None:
        """A lower bound for each query's k-th approximate score has been found: float32 [batch]."""
        lowered = (kth.astype(np.float64) - self._margins).astype(np.float32)
        np.maximum(self.threshold, np.nextafter(lowered, np.float32(-np.inf)), out=self.threshold)

    def survivors(self) -> list[Rows]:
        """For each query its rows, unordered."""
        if not self._parts:
            return [np.empty(0, np.int64) for _ in self.threshold]
        queries, rows = self._compact()
        bounds = np.searchsorted(queries, np.arange(len(self.threshold) + 1)).tolist()
        return [rows[low:high] for low, high in pairwise(bounds)]

    def _compact(self) -> tuple[Rows, Rows]:
        queries, rows, scores = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((-scores, queries))
        queries, rows, scores = queries[order], rows[order], scores[order]
        starts = np.searchsorted(queries, np.arange(len(self.threshold) + 1))
        kth_at = starts[:-1] + self.k - 1
        kth = np.full(len(self.threshold), -np.inf, np.float32)
        full = kth_at < starts[1:]
        kth[full] = scores[kth_at[full]]
        self.raise_to(kth)
        keep = scores >= self.threshold[queries]
        queries, rows, scores = queries[keep], rows[keep], scores[keep]
        self._parts = [(queries, rows, scores)]
        self._waiting = len(rows)
        return queries, rows


def scan(
    blocks: Blocks, queries: Float32, flags: _Flags | None, candidates: Candidates, names: Rows | None = None
) -> None:
    """Every row of `blocks` that beats its query's threshold goes to `candidates`.

    queries: float32 [batch, dim]. flags: which rows a query may have; None: all. names: the row number of each
    position; None: positions are row numbers.
    """
    turned = np.ascontiguousarray(queries.T)
    batch = len(queries)
    step = max(256, SCORES_MAX // batch)
    for first, block in blocks:
        for low in range(0, len(block), step):
            part = block[low : low + step]
            scores = part @ turned
            _collect(scores, first + low, flags, candidates, names)


def _collect(scores: Float32, first: int, flags: _Flags | None, into: Candidates, names: Rows | None) -> None:
    count, batch = scores.shape
    passed = scores >= into.threshold
    found = np.count_nonzero(passed)
    if found > 4 * batch * max(into.k, 8) and count > into.k:
        # The first block, or rows in a lucky order: a partition is cheaper than sorting so many.
        allowed = (
            scores if flags is None else np.where(flags.block(first, count), scores, np.float32(-np.inf))
        )
        into.raise_to(np.partition(allowed.T, count - into.k, axis=1)[:, count - into.k])
        passed = scores >= into.threshold
    elif not found:
        return
    at = np.flatnonzero(passed)
    rows, owners = np.divmod(at, batch)
    values = scores.ravel()[at]
    rows += first
    if flags is not None:
        allowed_rows = flags.of(owners, rows)
        rows, owners, values = rows[allowed_rows], owners[allowed_rows], values[allowed_rows]
    into.add(owners, rows if names is None else names[rows], values)


class _Flags:
    """Which rows each query of a batch may have, by the group it belongs to."""

    def __init__(self, groups: Sequence[Group], batch: int) -> None:
        self._bits = np.stack([group.matching.bits for group in groups])
        self._group_of = np.empty(batch, np.int64)
        for number, group in enumerate(groups):
            self._group_of[group.queries] = number

    def of(self, queries: Rows, rows: Rows) -> npt.NDArray[np.bool_]:
        bytes_ = self._bits[self._group_of[queries], rows >> 3]
        return (bytes_ >> (rows & 7).astype(np.uint8)) & 1 != 0  # type: ignore[no-any-return]

    def block(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """bool [count, batch]"""
        low = first // 8
        flags = np.unpackbits(self._bits[:, low : (first + count + 7) // 8], axis=1, bitorder="little")
        flags = flags[:, first - 8 * low : first - 8 * low + count]
        return flags[self._group_of].T != 0  # type: ignore[no-any-return]


def flags_of(view: ShardView, groups: Sequence[Group], batch: int) -> _Flags | None:
    """None when every query may have every row, which spares the look-ups."""
    return None if all(g.matching.count == view.rows for g in groups) else _Flags(groups, batch)
