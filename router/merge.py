"""Many columns of hits become one. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Part = tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]
# Hits in one sort, so that a batch of queries for very many hits takes no memory beside what it holds already.
_HITS = 1 << 16


class Merged(NamedTuple):
    """ids: uint64 [n], scores: float32 [n], places: int64 [n] (in the parts of the query, laid end to end)."""

    ids: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float32]
    places: npt.NDArray[np.int64]


def top(parts: Sequence[Part], k: int) -> Merged:
    """The best k of all parts, by (score descending, id ascending). Parts share no id: shards are disjoint."""
    if not parts:
        return Merged(np.empty(0, np.uint64), np.empty(0, np.float32), np.empty(0, np.int64))
    ids = np.concatenate([part[0] for part in parts])
    scores = np.concatenate([part[1] for part in parts])
    places = np.lexsort((ids, -scores))[:k]
    return Merged(ids[places], scores[places], places)


def tops(queries: Sequence[tuple[Sequence[Part], int]]) -> list[Merged]:
    """`top` of each query's parts and k, in one sort for many queries: a numpy call costs more than a query's share of it."""
    merged: list[Merged] = []
    for some in _portions(queries):
        ids = np.concatenate([part[0] for parts, _ in some for part in parts] or [np.empty(0, np.uint64)])
        scores = np.concatenate([part[1] for parts, _ in some for part in parts] or [np.empty(0, np.float32)])
        sizes = [sum([len(part[0]) for part in parts]) for parts, _ in some]
        owners = np.repeat(np.arange(len(some)), sizes)
        order = np.lexsort((ids, -scores, owners))
        ids, scores = ids[order], scores[order]
        low = 0
        for (_, k), size in zip(some, sizes, strict=True):
            high = low + min(k, size)
            merged.append(Merged(ids[low:high], scores[low:high], order[low:high] - low))
            low += size
    return merged


def _portions(
    queries: Sequence[tuple[Sequence[Part], int]],
) -> Iterator[list[tuple[Sequence[Part], int]]]:
    some: list[tuple[Sequence[Part], int]] = []
    hits = 0
    for query in queries:
        some.append(query)
        hits += sum([len(part[0]) for part in query[0]])
        if hits >= _HITS:
            yield some
            some, hits = [], 0
    if some:
        yield some
