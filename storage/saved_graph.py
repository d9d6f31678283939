"""Which graph of the served rowset is on disk, and when it is worth writing again."""

from __future__ import annotations

from pathlib import Path

from storage.errors import DiskFullError
from storage.index.base import Engine
from storage.opening import index_directory
from storage.view import ShardView

# Saved again when it has grown by a tenth, and by no fewer rows than this.
_GROWTH_MIN = 2_000


class SavedGraph:
    """A saved graph only spares a rebuild: no failure to write it is an error of the replica."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.rows = 0
        self.saves = 0
        self.failures = 0

    def load(self, engine: Engine, view: ShardView) -> bool:
        """Whether `engine` has taken the saved graph of the view's rowset."""
        loaded = engine.load(index_directory(self._directory, view.rowset), view)
        self.rows = int(engine.statistics()["graph_rows"]) if loaded else 0
        return loaded

    def save(self, engine: Engine, rowset: int, *, closing: bool = False) -> None:
        """Saves when the graph has grown enough; when `closing`, if it has grown at all."""
        rows = int(engine.statistics()["graph_rows"])
        growth = 0 if closing else max(_GROWTH_MIN, self.rows // 10)
        if rows <= self.rows + growth:
            return
        directory = index_directory(self._directory, rowset)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            engine.save(directory)
        except (OSError, DiskFullError):
            self.failures += 1
            return
        self.rows = rows
        self.saves += 1
