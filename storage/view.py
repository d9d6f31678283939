"""What a search sees: an immutable picture of one shard's items. Pure values over shared, append-only arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.records import Version


@dataclass(frozen=True, slots=True)
class ShardView:
    """One shard's items after `position`. Rows [0, rows) never change; later rows are not part of this view.

    vectors: float16 [≥ rows, dim], unit length for `cosine`
    ids:     uint64 [≥ rows]
    masks:   uint64 [≥ rows, class_width / 64]; class c is bit c % 64 of word c // 64
    alive:   uint8 [ceil(rows / 8)], little bit order; a dead row was updated or deleted. Copied when it changes.
    """

    shard: int
    position: Version
    rows: int
    alive_rows: int
    vectors: npt.NDArray[np.float16]
    ids: npt.NDArray[np.uint64]
    masks: npt.NDArray[np.uint64]
    alive: npt.NDArray[np.uint8]
    # The file of rows that this view's row numbers speak of; compaction makes a new one, and a graph
    # belongs to exactly one.
    rowset: int


@dataclass(frozen=True, slots=True)
class ClassConstraint:
    """Which rows a query may bring, by class. Each tuple holds class ids; empty means no constraint of that sort."""

    require_all: tuple[int, ...] = ()
    require_any: tuple[int, ...] = ()
    exclude: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.require_all or self.require_any or self.exclude)


@dataclass(frozen=True, slots=True)
class Hits:
    """Answers to one query, ordered by (score descending, id ascending).

    ids: uint64 [n], scores: float32 [n], rows: int64 [n] (row numbers in the view that was searched)
    """

    ids: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]


Statistics = dict[str, Any]
