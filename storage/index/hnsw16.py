"""The `hnsw16` engine: faiss HNSW over short codes, rescored from the view's FP16 rows like every engine.

For `cosine` the graph walks 8-bit codes of the directions that matter (storage/index/codes.py): squared distances of
such bytes are integer arithmetic on an eighth to a quarter of hnswlib's memory traffic, which is what bounds a
walk. For `dot`, where lengths matter, the codes are FP16. Measured in docs/decisions/0001.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss as _typed_faiss
import numpy as np
import numpy.typing as npt

from storage.config import StorageConfig
from storage.index.codes import Codes, fitted, of_product, whole
from storage.index.graph import GraphEngine
from storage.index.workers import in_pieces

# The wheel's stubs are wrong about what we use: no SearchParametersHNSW, and other constructors.
faiss: Any = _typed_faiss

RECODE_ROWS = 4096
# Queries are encoded by more at a time than they are walked: the product first copies its matrix, which 13 queries
# pay for with 27 µs each and 50 with 16.
ENCODE_QUERIES = 50


class FaissGraph:
    """`Graph` by faiss. codes: None for `dot`; owner: what frees `index`, when that is not `index` itself."""

    def __init__(self, config: StorageConfig, codes: Codes | None, index: Any, owner: Any = None) -> None:
        self._config = config
        self._codes = codes
        self._index = index
        self._owner = owner
        self.noise = codes.noise if codes else 0.0

    def _encoded(self, vectors: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
        return self._codes.encoded(vectors) if self._codes else vectors.astype(np.float32)

    @property
    def rows(self) -> int:
        return int(self._index.ntotal)

    @property
    def bytes_per_vector(self) -> float:
        # Code, links of level 0, level and offset; plus the upper levels, 1 / (m - 1) of a row's m links on
        # average.
        code = self._codes.width if self._codes else 2 * self._config.dim
        return code + 4 * 2 * self._config.m + 12 + 4 * self._config.m / (self._config.m - 1)

    def reserve(self, rows: int) -> None:
        """faiss grows by doubling inside add."""

    def add(self, vectors: npt.NDArray[np.float16]) -> None:
        encoded = self._encoded(vectors)
        if self._codes and self._codes.unsuited:
            return  # links of rows by codes that do not suit them would stay poor
        faiss.omp_set_num_threads(self._config.threads)
        self._index.add(encoded)

    def fitting(self, vectors: npt.NDArray[np.float16]) -> FaissGraph:
        """When vectors of another kind came, the same links over codes that drop nothing. Some 20 µs a row."""
        if self._codes is None or not self._codes.unsuited:
            return self
        codes = whole(self._config.dim)
        index = _empty(self._config, codes)
        storage = faiss.downcast_index(index.storage)
        for low in range(0, self.rows, RECODE_ROWS):
            storage.add(codes.encoded(vectors[low : min(low + RECODE_ROWS, self.rows)]))
        index.hnsw = self._index.hnsw
        index.ntotal = self.rows
        return FaissGraph(self._config, codes, index)

    def search(
        self, queries: npt.NDArray[np.float16], count: int, ef: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        count = min(count, self.rows)
        parameters = faiss.SearchParametersHNSW(efSearch=max(ef, count))
        threads = self._config.threads
        encoded = np.concatenate(
            in_pieces(
                len(queries), threads, lambda low, high: self._encoded(queries[low:high]), ENCODE_QUERIES
            )
        )

        def walk(low: int, high: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
            # Pieces on our own threads keep the cores busy while another piece is in Python, and no barrier waits
            # for a core that the host has taken away.
            faiss.omp_set_num_threads(1)
            found: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
            found = self._index.search(encoded[low:high], count, params=parameters)
            return found

        pieces = in_pieces(len(queries), threads, walk)
        scores = np.concatenate([piece[0] for piece in pieces])
        labels = np.concatenate([piece[1] for piece in pieces])
        if self._codes:  # |q - x|² = 2 - 2 q·x for unit vectors
            scores *= np.float32(-0.5 / self._codes.scale**2)
            scores += np.float32(1)
        return labels, scores

    def write(self, path: Path) -> None:
        index = faiss.IndexPreTransform(self._codes.product, self._index) if self._codes else self._index
        faiss.write_index(index, str(path))  # releases the GIL


def _empty(config: StorageConfig, codes: Codes | None) -> Any:
    q = faiss.ScalarQuantizer
    kind = q.QT_8bit_direct if codes else q.QT_fp16
    metric = faiss.METRIC_L2 if codes else faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexHNSWSQ(codes.width if codes else config.dim, kind, config.m, metric)
    index.hnsw.efConstruction = config.ef_construction
    index.is_trained = True
    index.storage.is_trained = True
    return index


def make(config: StorageConfig, vectors: npt.NDArray[np.float16]) -> FaissGraph:
    """An empty graph for rows like vectors float16 [rows, dim]."""
    codes = fitted(vectors) if config.metric == "cosine" else None
    return FaissGraph(config, codes, _empty(config, codes))


def read(config: StorageConfig, path: Path, rows: int) -> FaissGraph | None:
    """A saved graph; None when faiss refuses the file."""
    try:
        index = faiss.read_index(str(path))
    except RuntimeError:
        return None
    if index.ntotal != rows or index.d != config.dim:
        return None
    if config.metric != "cosine":
        return FaissGraph(config, None, index)
    codes = of_product(faiss.downcast_VectorTransform(index.chain.at(0)))
    return FaissGraph(config, codes, faiss.downcast_index(index.index), owner=index)


def hnsw16_engine(config: StorageConfig) -> GraphEngine:
    codes = "int8-principal-1" if config.metric == "cosine" else "fp16"
    return GraphEngine("hnsw16", codes, config, make, read)
