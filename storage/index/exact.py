"""The exact engine: every row is scored. Also the reference that the graph engines are tested against."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.config import StorageConfig
from storage.index import few, scan
from storage.index.constraints import MatchingCache
from storage.index.rescore import rescore
from storage.index.scan import Candidates, Group, Rows
from storage.view import ClassConstraint, Hits, ShardView, Statistics

# A constraint that leaves fewer than one row in this many is scanned by itself: gathering a row costs as much
# as scoring it for some tens of queries.
GATHER_RATIO = 8
CHUNK_ROWS = 8192


class Resident:
    """A float32 copy of one rowset's rows, in chunks, so that growing moves nothing a search is reading."""

    def __init__(self, rowset: int, dim: int) -> None:
        self.rowset = rowset
        self.rows = 0
        self._dim = dim
        self._chunks: list[scan.Float32] = []
        self._lock = threading.Lock()

    def extend(self, vectors: npt.NDArray[np.float16], rows: int) -> None:
        """Copy rows up to `rows` of vectors float16 [≥ rows, dim]."""
        with self._lock:
            while self.rows < rows:
                number, offset = divmod(self.rows, CHUNK_ROWS)
                if number == len(self._chunks):
                    self._chunks.append(np.empty((CHUNK_ROWS, self._dim), np.float32))
                count = min(CHUNK_ROWS - offset, rows - self.rows, 256)
                scan.widen(
                    vectors[self.rows : self.rows + count], self._chunks[number][offset : offset + count]
                )
                self.rows += count  # last: a search that sees it finds the rows whole

    def blocks(self, rows: int) -> scan.Blocks:
        for number, low in enumerate(range(0, rows, CHUNK_ROWS)):
            yield low, self._chunks[number][: min(CHUNK_ROWS, rows - low)]


class ExactEngine:
    """Scans every row; see `Engine` for the protocol."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._matchings = MatchingCache()
        self._lock = threading.Lock()
        self._resident: Resident | None = None
        self._longest = (-1, 0, 0.0)  # rowset, rows, the greatest length among them; `dot` only
        self._searches = 0

    def search(
        self,
        view: ShardView,
        queries: npt.NDArray[np.float16],
        k: int,
        constraints: Sequence[ClassConstraint],
    ) -> list[Hits]:
        assert queries.dtype == np.float16
        assert queries.shape == (len(constraints), view.vectors.shape[1])
        groups = grouped(view, constraints, self._matchings)
        survivors = self.survivors(view, queries, k, groups)
        self._searches += len(queries)
        return rescore(view, queries, survivors, k, self._config.metric, self._config.threads)

    def survivors(
        self,
        view: ShardView,
        queries: npt.NDArray[np.float16],
        k: int,
        groups: Sequence[Group],
        start: int = 0,
    ) -> list[Rows]:
        """For each query every row from `start` on that may be among its best k; no query is in two groups."""
        result: list[Rows] = [np.empty(0, np.int64)] * len(queries)
        if k <= 0 or start >= view.rows:
            return result
        wide = queries.astype(np.float32)
        margins = scan.slack(wide, scan.norm_bound(self._config.metric, lambda: self._longest_row(view)))
        together = []
        for group in groups:
            if group.matching.count * GATHER_RATIO > view.rows:
                together.append(group)
                continue
            rows = group.matching.rows(start, view.rows)
            if len(rows) > k:
                candidates = Candidates(len(group.queries), k, margins[group.queries])
                blocks = scan.gathered(view.vectors, rows)
                scan.scan(blocks, wide[group.queries], None, candidates, rows)
                found = candidates.survivors()
            else:
                found = [rows] * len(group.queries)
            for query, rows in zip(group.queries.tolist(), found, strict=True):
                result[query] = rows
        if together:
            self._scan_all(view, wide, k, margins, together, start, result)
        return result

    def _scan_all(
        self,
        view: ShardView,
        wide: scan.Float32,
        k: int,
        margins: npt.NDArray[np.float64],
        groups: Sequence[Group],
        start: int,
        result: list[Rows],
    ) -> None:
        if k <= few.K_MAX and sum(len(group.queries) for group in groups) <= few.QUERIES_MAX:
            groups = self._scan_few(view, wide, k, margins, groups, start, result)
            if not groups:
                return
        chosen = np.sort(np.concatenate([group.queries for group in groups]))
        local = [Group(np.searchsorted(chosen, g.queries), g.matching) for g in groups]
        candidates = Candidates(len(chosen), k, margins[chosen])
        flags = scan.flags_of(view, local, len(chosen))
        scan.scan(self._blocks(view, start), wide[chosen], flags, candidates)
        for query, rows in zip(chosen.tolist(), candidates.survivors(), strict=True):
            result[query] = rows

    def _scan_few(
        self,
        view: ShardView,
        wide: scan.Float32,
        k: int,
        margins: npt.NDArray[np.float64],
        groups: Sequence[Group],
        start: int,
        result: list[Rows],
    ) -> list[Group]:
        """Fill in `result` what a scan for one query finds; the queries that it could not answer."""
        left = []
        for group in groups:
            for query in group.queries.tolist():
                rows = few.survivors(
                    view, start, wide[query], k, float(margins[query]), group.matching, self._config.threads
                )
                if rows is None:
                    left.append(Group(np.array([query], np.int64), group.matching))
                else:
                    result[query] = rows
        return left

    def _blocks(self, view: ShardView, start: int) -> scan.Blocks:
        resident = self._resident_for(view) if start == 0 else None
        if resident is None:
            return scan.converted(view.vectors, start, view.rows)
        if resident.rows < view.rows:
            resident.extend(view.vectors, view.rows)
        return resident.blocks(view.rows)

    def _resident_for(self, view: ShardView) -> Resident | None:
        dim = view.vectors.shape[1]
        fits = 4 * dim * view.rows <= self._config.float32_budget_bytes
        with self._lock:
            current = self._resident
            if current is not None and current.rowset == view.rowset:
                if not fits:
                    self._resident = None
                return self._resident
            if not fits or (current is not None and view.rowset < current.rowset):
                return None  # a last search of a view from before compaction must not push the new copy out
            self._resident = Resident(view.rowset, dim)
            return self._resident

    def _longest_row(self, view: ShardView) -> float:
        with self._lock:
            rowset, rows, best = self._longest
            if rowset != view.rowset:
                rows, best = 0, 0.0
            if rows < view.rows:
                best = max(best, scan.longest(view.vectors, rows, view.rows))
                self._longest = (view.rowset, view.rows, best)
            return best

    def build(self, view: ShardView, budget_s: float) -> bool:
        """Bring the float32 copy up to `view`, which takes under a second for what fits its budget."""
        resident = self._resident_for(view)
        if resident is not None:
            resident.extend(view.vectors, view.rows)
        return False

    def covered(self, view: ShardView) -> int:
        return view.rows

    def save(self, directory: Path) -> None:
        """Nothing to save: the vectors' file is the index."""

    def load(self, directory: Path, view: ShardView) -> bool:
        return False

    def statistics(self) -> Statistics:
        resident = self._resident
        return {
            "engine": "exact",
            "graph_rows": 0,
            # Beyond the view's own FP16 rows.
            "bytes_per_vector": 0 if resident is None else 4 * self._config.dim,
            "float32_rows": 0 if resident is None else resident.rows,
            "searches": self._searches,
            "matching_cache_hits": self._matchings.hits,
            "matching_cache_misses": self._matchings.misses,
            "matching_cache_evicted": self._matchings.evicted,
        }


def grouped(view: ShardView, constraints: Sequence[ClassConstraint], cache: MatchingCache) -> list[Group]:
    """Queries of equal constraints together, each group with the rows it may find."""
    numbers: dict[ClassConstraint, list[int]] = {}
    for query, constraint in enumerate(constraints):
        numbers.setdefault(constraint, []).append(query)
    return [Group(np.array(queries, np.int64), cache.get(view, c)) for c, queries in numbers.items()]
