"""Many columns of hits become one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Merged(NamedTuple):
    """ids: uint64 [n], scores: float32 [n], origin: int64 [n] (which part), place: int64 [n] (where in that part)."""

    ids: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float32]
    origin: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]


def top(parts: Sequence[tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]], k: int) -> Merged:
    """The best k of all parts, by (score descending, id ascending). Parts share no id: shards are disjoint."""
    ids = np.concatenate([part[0] for part in parts]) if parts else np.empty(0, np.uint64)
    scores = np.concatenate([part[1] for part in parts]) if parts else np.empty(0, np.float32)
    order = np.lexsort((ids, -scores))[:k]
    starts = np.cumsum([0, *(len(part[0]) for part in parts)])
    origin = np.searchsorted(starts, order, side="right") - 1
    return Merged(ids[order], scores[order], origin, order - starts[origin])
