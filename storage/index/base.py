"""The one protocol that every index engine speaks, so that the rest of the house does not know which one it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from storage.view import ClassConstraint, Hits, ShardView, Statistics


class Engine(Protocol):
    """The index of one shard replica.

    `search` runs on the search lane's thread, `build` on one builder thread; both may run at the same time, and an
    engine makes that safe. All calls block and do not touch the event loop.
    """

    def search(
        self,
        view: ShardView,
        queries: npt.NDArray[np.float16],
        k: int,
        constraints: Sequence[ClassConstraint],
    ) -> list[Hits]:
        """Best k alive rows of `view` for each of queries float16 [batch, dim], each under its own constraint.

        Fewer than k only when fewer match. Scores are exact whatever the engine: survivors are rescored from the
        view's FP16 in float64 and rounded to float32 (storage/index/rescore.py).
        """

    def build(self, view: ShardView, budget_s: float) -> bool:
        """Take rows of `view` into the graph for about `budget_s` seconds. True when more remain to be taken."""

    def covered(self, view: ShardView) -> int:
        """Rows of `view` that the graph holds; the others are its fresh part. An engine without a graph says `rows`."""

    def save(self, directory: Path) -> None:
        """Write graph, manifest and checksums into `directory`, fsynced, replacing what was there atomically."""

    def load(self, directory: Path, view: ShardView) -> bool:
        """Take a saved graph that fits `view`. False, and nothing taken, when absent, damaged or of other parameters."""

    def statistics(self) -> Statistics:
        """Counters and sizes; always has `engine`, `graph_rows`, `bytes_per_vector`."""
