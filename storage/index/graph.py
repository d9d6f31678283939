"""What both graph engines share: the plan of a search, the fresh part, building in turns, saving and loading.

A graph holds rows [0, n) of one rowset under their row numbers; later rows are the fresh part and are scanned exactly.
Dead rows stay in the graph until compaction. Neither they nor a constraint are seen by the walk: it fetches
more than it needs and drops what does not match. That gives a certificate which a filter inside the walk
cannot: when k matching rows are among the nearest `fetch` rows, they are the best k; when they are not, the
query is answered by an exact scan. So recall holds even for a constraint that fits nothing near the query.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from storage.config import StorageConfig
from storage.index import saved, scan
from storage.index.constraints import Matching, MatchingCache
from storage.index.exact import ExactEngine, grouped
from storage.index.rescore import rescore
from storage.index.scan import Group, Rows
from storage.index.turns import Turns
from storage.view import ClassConstraint, Hits, ShardView, Statistics

# One step of building; a search that arrives waits for at most about this long.
STEP_S = 0.007
STEP_ROWS_MIN, STEP_ROWS_MAX = 4, 1024
# Costs in µs at 1,024 dimensions, measured on two cores: reading one row of a constraint and converting it,
# scoring it for one query, and walking a graph by one step of ef. Only their proportions matter.
GATHER_US, SCORE_US, WALK_US = 0.9, 0.015, 2.5
# Beyond this a walk is a slow way to read every row.
EF_MAX = 4096


class Graph(Protocol):
    """One library's graph over rows [0, rows). Not safe by itself: `GraphEngine` holds the turns."""

    # How much a score from `search` may be wrong beyond float32 summation, for unit vectors.
    noise: float

    @property
    def rows(self) -> int: ...
    @property
    def bytes_per_vector(self) -> float: ...
    def reserve(self, rows: int) -> None: ...
    def add(self, vectors: npt.NDArray[np.float16]) -> None:
        """All of `vectors`, or none when `fitting` would now give another graph."""

    def fitting(self, vectors: npt.NDArray[np.float16]) -> Graph:
        """Itself, or an equal graph that suits its rows, the first of `vectors`, and what is asked of it better."""

    def search(
        self, queries: npt.NDArray[np.float16], count: int, ef: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Rows int64 [batch, count], -1 where there is none, and scores float32, best first."""

    def write(self, path: Path) -> None: ...


MakeGraph = Callable[[StorageConfig, npt.NDArray[np.float16]], Graph]
ReadGraph = Callable[[StorageConfig, Path, int], "Graph | None"]


class GraphEngine:
    """An `Engine` over any `Graph`. codes: names what the graph walks, so that another kind's file is not taken."""

    def __init__(
        self, name: str, codes: str, config: StorageConfig, make: MakeGraph, read: ReadGraph
    ) -> None:
        self._name, self._codes, self._config, self._make, self._read = name, codes, config, make, read
        self._exact = ExactEngine(replace(config, float32_budget_bytes=0))
        self._matchings = MatchingCache()
        self._turns = Turns()
        self._builder = threading.Lock()
        self._held: tuple[int, Graph] | None = None  # rowset, graph: replaced as one
        self._step_rows = 16
        self._walked = self._scanned = self._rescued = 0

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
        survivors: list[Rows] = [np.empty(0, np.int64)] * len(queries)
        whole, walked, start = groups, [], 0
        held = self._held
        if k > 0 and held is not None and held[0] == view.rowset and held[1].rows:
            # Rows that the builder adds from here on are scanned as fresh by this search.
            start = min(held[1].rows, view.rows)
            plan = {id(g): self._walk_width(g, start, k) for g in groups}
            walked = [g for g in groups if plan[id(g)]]
            whole = [g for g in groups if not plan[id(g)]]
            if walked:
                widths = [plan[id(g)] for g in walked]
                unsure = self._walk(held[1], start, queries, k, walked, widths, survivors)
                walked, whole = _apart(walked, unsure), whole + unsure
        for part, low in ((whole, 0), (walked, start)):
            self._scan(view, queries, k, part, low, survivors)
        return rescore(view, queries, survivors, k, self._config.metric, self._config.threads)

    def _walk_width(self, group: Group, start: int, k: int) -> int:
        """The ef with which the graph answers this group, or 0: an exact scan is cheaper or the only way."""
        matching = _prefix_count(group.matching, start)
        if matching <= k:
            return 0
        share = matching / start
        ef = max(self._config.ef, 2 * k + 16)
        wide = ef if share > 0.95 else int(ef / share) + 1
        if share > 0.5 and wide < start // 4:
            return min(wide, EF_MAX) if 2 * k < EF_MAX else 0
        queries = len(group.queries)
        scanned_us = matching * (GATHER_US + SCORE_US * queries) * self._config.dim / 1024
        walked_us = WALK_US * wide * queries
        return wide if wide <= EF_MAX and walked_us < scanned_us else 0

    def _walk(
        self,
        graph: Graph,
        start: int,
        queries: npt.NDArray[np.float16],
        k: int,
        groups: Sequence[Group],
        widths: Sequence[int],
        survivors: list[Rows],
    ) -> list[Group]:
        """Fill `survivors` of each group; the groups (split if need be) that the graph could not answer for sure."""
        unsure = []
        margins = scan.slack(queries.astype(np.float32), 1.001) + graph.noise
        by_width: dict[tuple[int, int], list[Group]] = {}
        for group, ef in zip(groups, widths, strict=True):
            share = _prefix_count(group.matching, start) / start
            # Enough for k and a margin when the constraint has nothing to do with the query; else everything
            # walked.
            count = ef if share <= 0.5 else min(ef, int((k + max(k // 2, 8)) / share**2) + 2)
            by_width.setdefault((ef, count), []).append(group)
        for (ef, count), same in by_width.items():
            chosen = np.concatenate([g.queries for g in same])
            with self._turns.search():
                labels, scores = graph.search(queries[chosen], count, ef)
            low = 0
            for group in same:
                high = low + len(group.queries)
                lacking = _take(group, start, labels[low:high], scores[low:high], k, margins, survivors)
                low = high
                if len(lacking):
                    unsure.append(Group(lacking, group.matching))
            self._walked += len(chosen)
        self._rescued += sum(len(g.queries) for g in unsure)
        return unsure

    def _scan(
        self,
        view: ShardView,
        queries: npt.NDArray[np.float16],
        k: int,
        groups: Sequence[Group],
        start: int,
        survivors: list[Rows],
    ) -> None:
        """Add to `survivors` what an exact scan of rows from `start` on finds."""
        if not groups or start >= view.rows:
            return
        chosen = np.concatenate([g.queries for g in groups])
        bounds = np.cumsum([0, *(len(g.queries) for g in groups)])
        local = [Group(np.arange(bounds[i], bounds[i + 1]), g.matching) for i, g in enumerate(groups)]
        found = self._exact.survivors(view, queries[chosen], k, local, start)
        for query, rows in zip(chosen.tolist(), found, strict=True):
            survivors[query] = np.concatenate((survivors[query], rows)) if start else rows
        if not start:
            self._scanned += len(chosen)

    def build(self, view: ShardView, budget_s: float) -> bool:
        """Add rows in steps of a few ms, each in its own turn."""
        with self._builder:
            if view.rows < self._config.graph_rows_min:
                return False
            self._graph_for(view)  # a new one takes a second to fit its codes, which is no step's time
            until = time.monotonic() + budget_s
            while (graph := self._graph_for(view)).rows < view.rows:
                now = time.monotonic()
                if now >= until:
                    return True
                low, high = graph.rows, min(graph.rows + self._step_rows, view.rows)
                with self._turns.build():
                    begin = time.monotonic()
                    try:
                        graph.reserve(high)
                        graph.add(view.vectors[low:high])
                    except BaseException:
                        self._held = None  # half-added rows must not be found; the next build starts afresh
                        raise
                    took = time.monotonic() - begin
                rate = (high - low) * STEP_S / max(took, 1e-6)
                step = int(min(rate, 2 * self._step_rows))
                self._step_rows = max(STEP_ROWS_MIN, min(step, STEP_ROWS_MAX))
            return False

    def _graph_for(self, view: ShardView) -> Graph:
        """The graph to add rows of `view` to, from now on the one that is searched."""
        held, vectors = self._held, view.vectors[: view.rows]
        if held is None or held[0] != view.rowset:
            graph = self._make(self._config, vectors)
        else:
            graph = held[1].fitting(vectors) if held[1].rows <= view.rows else held[1]
        self._held = (view.rowset, graph)
        return graph

    def covered(self, view: ShardView) -> int:
        """As the protocol says; below `graph_rows_min` no row waits for a graph, so all count as covered."""
        held = self._held
        if held is not None and held[0] == view.rowset:
            return min(held[1].rows, view.rows)
        return view.rows if view.rows < self._config.graph_rows_min else 0

    def save(self, directory: Path) -> None:
        """Building waits while the graph is written; searches go on."""
        with self._builder:
            held = self._held
            if held is None or not held[1].rows:
                return
            rowset, graph = held
            saved.save(directory, self._parameters(rowset), graph.rows, graph.write)

    def load(self, directory: Path, view: ShardView) -> bool:
        with self._builder:
            found = saved.find(directory, self._parameters(view.rowset), view.rows)
            if found is None:
                return False
            path, rows = found
            graph = self._read(self._config, path, rows)
            if graph is None or graph.rows != rows:
                return False
            self._held = (view.rowset, graph)
            return True

    def _parameters(self, rowset: int) -> saved.Parameters:
        c = self._config
        return saved.Parameters(
            engine=self._name,
            codes=self._codes,
            m=c.m,
            ef_construction=c.ef_construction,
            metric=c.metric,
            dim=c.dim,
            rowset=rowset,
        )

    def statistics(self) -> Statistics:
        held = self._held
        return {
            "engine": self._name,
            "graph_rows": 0 if held is None else held[1].rows,
            # Beyond the view's own FP16 rows.
            "bytes_per_vector": 0.0 if held is None else held[1].bytes_per_vector,
            "codes": None if held is None else self._codes,
            "rowset": None if held is None else held[0],
            "step_rows": self._step_rows,
            "queries_walked": self._walked,
            "queries_scanned": self._scanned,
            # Walked, found too few matching rows nearby, and scanned after all.
            "queries_rescued": self._rescued,
            "matching_cache_hits": self._matchings.hits,
            "matching_cache_misses": self._matchings.misses,
            "matching_cache_evicted": self._matchings.evicted,
        }


def _prefix_count(matching: Matching, rows: int) -> int:
    """How many of rows [0, rows) match, give or take the last seven."""
    if rows >= 8 * len(matching.bits) - 7:
        return matching.count
    return int(np.bitwise_count(matching.bits[: rows // 8]).sum())


def _apart(groups: Sequence[Group], without: Sequence[Group]) -> list[Group]:
    """Groups less the queries of `without`."""
    if not without:
        return list(groups)
    gone = np.concatenate([g.queries for g in without])
    rest = [Group(g.queries[~np.isin(g.queries, gone)], g.matching) for g in groups]
    return [g for g in rest if len(g.queries)]


def _take(
    group: Group,
    start: int,
    labels: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    k: int,
    margins: npt.NDArray[np.float64],
    survivors: list[Rows],
) -> Rows:
    """Keep of each query's labels [n, count] the matching ones that may be among its best k; the queries with too few."""
    # Rows that the builder took since the search began are scanned as fresh.
    within = (labels >= 0) & (labels < start)
    fits = within & group.matching.flags(np.where(within, labels, 0))
    seen = np.cumsum(fits, axis=1)
    enough = seen[:, -1] >= k
    # Scores fall along a row, so the k-th match is where the count first reaches k.
    kth = np.take_along_axis(scores, np.argmax(seen >= k, axis=1)[:, None], axis=1)
    fits &= scores >= kth - margins[group.queries, None]
    kept = labels[fits]
    bounds = np.concatenate(([0], np.cumsum(fits.sum(axis=1)))).tolist()
    for query, sure, low, high in zip(
        group.queries.tolist(), enough.tolist(), bounds[:-1], bounds[1:], strict=True
    ):
        if sure:
            survivors[query] = kept[low:high]
    return group.queries[~enough]
