"""Exact scans for a few queries, by faiss's FP16 products over the view's own rows.

Converting a row to float32 costs as much as scoring it for some five queries, so a large batch shares the conversion
(storage/index/scan.py), and a few queries are better off with products that convert within registers.
"""

from __future__ import annotations

from typing import Any

import faiss as _typed_faiss
import numpy as np
import numpy.typing as npt

from storage.index.constraints import Matching
from storage.index.workers import in_pieces
from storage.view import ShardView

# The wheel's stubs lack what we use.
faiss: Any = _typed_faiss

QUERIES_MAX = 4
K_MAX = 256
# Looked at beyond k in each piece: rows within the margin of the k-th, and ties.
EXTRA = 32
PIECE_ROWS = 16_384


def survivors(
    view: ShardView,
    start: int,
    query: npt.NDArray[np.float32],
    k: int,
    margin: float,
    matching: Matching,
    threads: int,
) -> npt.NDArray[np.int64] | None:
    """Every matching row from `start` on that may be among the best k of query float32 [dim].

    margin: 2ε as in `scan.slack`. None when more rows than it looked at are that near to the k-th.
    """
    assert 0 < k <= K_MAX
    count = k + EXTRA
    everything = matching.count == view.rows

    def piece(low: int, high: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        low, high = start + low, start + high
        parameters = None
        if not everything:
            flags = np.unpackbits(matching.bits[low // 8 : (high + 7) // 8], bitorder="little")
            bits = np.packbits(flags[low % 8 : low % 8 + high - low], bitorder="little")
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        faiss.omp_set_num_threads(1)  # of this thread
        scores, rows = _over(view.vectors[low:high]).search(query[None], count, params=parameters)
        real = rows[0] >= 0
        return scores[0][real], rows[0][real] + low

    found = in_pieces(view.rows - start, threads, piece, PIECE_ROWS)
    scores, rows = (np.concatenate(column) for column in zip(*found, strict=True))
    if len(rows) <= k:
        return rows
    threshold = float(np.partition(scores, len(scores) - k)[len(scores) - k]) - margin
    if any(len(seen) == count and seen[-1] >= threshold for seen, _ in found):
        return None
    return rows[scores >= threshold]


def _over(vectors: npt.NDArray[np.float16]) -> Any:
    """A faiss index that reads vectors float16 [n, dim] where they are; they must outlive it."""
    vectors = np.ascontiguousarray(vectors)  # as they are already, in a view
    rows, dim = vectors.shape
    index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    kind = faiss.MaybeOwnedVectorUInt8
    nobody = kind().owner  # a null pointer, which cannot be made otherwise
    index.codes = kind.create_view(faiss.swig_ptr(vectors.view(np.uint8).reshape(-1)), vectors.nbytes, nobody)
    index.ntotal = rows
    index.referenced_objects = [vectors]
    return index
