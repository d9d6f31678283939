"""The `hnsw` engine: hnswlib over a float32 copy of the rows."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import numpy.typing as npt

from storage.config import StorageConfig
from storage.index.graph import GraphEngine


class HnswlibGraph:
    """`Graph` by hnswlib (inner product; unit rows make it the cosine)."""

    noise = 0.0

    def __init__(self, config: StorageConfig, path: Path | None = None, rows: int = 0) -> None:
        self._config = config
        self._lock = threading.Lock()  # ef is a field of the index, so one search at a time
        self._index: Any = hnswlib.Index("ip", config.dim)
        self._index.set_num_threads(config.threads)
        if path is None:
            self._index.init_index(1024, M=config.m, ef_construction=config.ef_construction)
        else:
            # Holds the GIL, up to 0.9 s for 100,000 rows of 1,024 dimensions: at start, before serving.
            self._index.load_index(str(path), max_elements=max(rows, 1024))

    @property
    def rows(self) -> int:
        return int(self._index.element_count)

    @property
    def bytes_per_vector(self) -> float:
        # Row, links of level 0 and their count, label; plus the upper levels, 1 / (m - 1) of a row's m links
        # on average.
        upper = 4 * (self._config.m + 1) / (self._config.m - 1)
        return 4 * self._config.dim + 4 * (2 * self._config.m + 1) + 8 + upper

    def reserve(self, rows: int) -> None:
        if rows > self._index.max_elements:
            self._index.resize_index(rows + rows // 4 + 1024)

    def add(self, vectors: npt.NDArray[np.float16]) -> None:
        rows = self.rows
        self._index.add_items(vectors.astype(np.float32), np.arange(rows, rows + len(vectors)))

    def fitting(self, vectors: npt.NDArray[np.float16]) -> HnswlibGraph:
        """Whole float32 rows suit everything."""
        return self

    def search(
        self, queries: npt.NDArray[np.float16], count: int, ef: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        count = min(count, self.rows)
        with self._lock:
            self._index.set_ef(max(ef, count))
            labels, distances = self._index.knn_query(queries.astype(np.float32), count)
        return labels.astype(np.int64), np.float32(1) - distances

    def write(self, path: Path) -> None:
        """Written by a forked child, because save_index holds the GIL for its whole length.

        At 100,000 rows of 1,024 dimensions on a busy host save_index stopped other threads for 2.0 s, the fork for
        0.28 s (page tables are copied).

        The child calls nothing but save_index and _exit, so locks that other threads held at the fork do not
        matter.
        """
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self._index.save_index(str(path))
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            raise OSError(f"writing the graph to {path} failed in the child process (wait status {status})")


def make(config: StorageConfig, vectors: npt.NDArray[np.float16]) -> HnswlibGraph:
    return HnswlibGraph(config)


def read(config: StorageConfig, path: Path, rows: int) -> HnswlibGraph | None:
    """A saved graph; None when hnswlib refuses the file."""
    try:
        return HnswlibGraph(config, path, rows)
    except RuntimeError:
        return None


def hnsw_engine(config: StorageConfig) -> GraphEngine:
    return GraphEngine("hnsw", "float32", config, make, read)
