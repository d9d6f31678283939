"""The `hnsw16` engine: faiss HNSW over short codes, rescored from the view's FP16 rows like every engine.

For `cosine` the graph walks 8-bit codes of rows turned by a fixed random rotation, which makes the components
of any unit vector alike (about normal with deviation dim^-1/2), so one step size fits all and nothing needs
training. Squared distances of such bytes are integer arithmetic on a quarter of hnswlib's memory traffic,
which is what bounds a walk. For `dot`, where lengths matter, the codes are FP16. Measured in
docs/decisions/0001.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import faiss as _typed_faiss
import numpy as np
import numpy.typing as npt

from storage.config import StorageConfig
from storage.index.graph import GraphEngine
from storage.index.workers import in_pieces

# The wheel's stubs are wrong about what we use: no SearchParametersHNSW, and other constructors.
faiss: Any = _typed_faiss

# Components beyond this many deviations are clipped: one in 10^7.
CLIP = 5.5


@cache
def rotation(dim: int) -> npt.NDArray[np.float32]:
    """A fixed orthogonal matrix float32 [block, block] that turns each block of a vector, the same in every
    process.

    Blocks of about 128 spread an outlying component enough, and a whole matrix would cost one query 0.2 ms to
    read.
    """
    block = next((b for b in range(min(dim, 128), 15, -1) if dim % b == 0), dim)
    q: npt.NDArray[np.float64] = np.linalg.qr(np.random.default_rng(16).standard_normal((block, block)))[0]
    return q.astype(np.float32)


class FaissGraph:
    """`Graph` by faiss."""

    def __init__(self, config: StorageConfig, index: Any = None) -> None:
        self._config = config
        self._bytes = config.metric == "cosine"
        self.codes = "int8-rotated-1" if self._bytes else "fp16"
        self._scale = 127.0 / (CLIP * config.dim**-0.5)
        # Rounding moves the difference of two rows' scores by about 0.29 · 1.6 steps; the margin is four such
        # deviations.
        self.noise = 4 * 1.6 * 0.29 / self._scale if self._bytes else 0.0
        self._index = self._new() if index is None else index

    def _new(self) -> Any:
        q = faiss.ScalarQuantizer
        kind = q.QT_8bit_direct if self._bytes else q.QT_fp16
        metric = faiss.METRIC_L2 if self._bytes else faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexHNSWSQ(self._config.dim, kind, self._config.m, metric)
        index.hnsw.efConstruction = self._config.ef_construction
        index.is_trained = True
        index.storage.is_trained = True
        return index

    def _encoded(self, vectors: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
        wide = vectors.astype(np.float32)
        if not self._bytes:
            return wide
        turn = rotation(self._config.dim)
        # One small product per query: OpenBLAS wakes its threads for a large one, and these then spin for
        # milliseconds on the cores that the walk is about to use (measured: a third of the queries per
        # second).
        turned = (wide.reshape(len(wide), -1, len(turn)) @ turn).reshape(wide.shape)
        turned *= self._scale
        np.rint(turned, out=turned)
        turned += 128
        return np.clip(turned, 0, 255, out=turned)

    @property
    def rows(self) -> int:
        return int(self._index.ntotal)

    @property
    def bytes_per_vector(self) -> float:
        # Code, links of level 0, level and offset; plus the upper levels, 1 / (m - 1) of a row's m links on
        # average.
        code = self._config.dim * (1 if self._bytes else 2)
        return code + 4 * 2 * self._config.m + 12 + 4 * self._config.m / (self._config.m - 1)

    def reserve(self, rows: int) -> None:
        """faiss grows by doubling inside add."""

    def add(self, vectors: npt.NDArray[np.float16]) -> None:
        faiss.omp_set_num_threads(self._config.threads)
        self._index.add(self._encoded(vectors))

    def search(
        self, queries: npt.NDArray[np.float16], count: int, ef: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        count = min(count, self.rows)
        parameters = faiss.SearchParametersHNSW(efSearch=max(ef, count))

        def walk(low: int, high: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
            # OpenMP's number is per thread. Pieces on our own threads keep the cores busy while another piece
            # is in Python, and no barrier waits for a core that the host has taken away.
            faiss.omp_set_num_threads(1)
            found: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
            found = self._index.search(self._encoded(queries[low:high]), count, params=parameters)
            return found

        pieces = in_pieces(len(queries), self._config.threads, walk)
        scores = np.concatenate([piece[0] for piece in pieces])
        labels = np.concatenate([piece[1] for piece in pieces])
        if self._bytes:  # |q - x|² = 2 - 2 q·x for unit vectors
            scores *= np.float32(-0.5 / self._scale**2)
            scores += np.float32(1)
        return labels, scores

    def write(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))  # releases the GIL


def read(config: StorageConfig, path: Path, rows: int) -> FaissGraph | None:
    """A saved graph; None when faiss refuses the file."""
    try:
        index = faiss.read_index(str(path))
    except RuntimeError:
        return None
    return FaissGraph(config, index) if index.ntotal == rows and index.d == config.dim else None


def hnsw16_engine(config: StorageConfig) -> GraphEngine:
    return GraphEngine("hnsw16", config, FaissGraph, read)
