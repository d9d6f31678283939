"""8-bit codes of unit vectors, for walking a graph: the directions that matter, turned and rounded.

Embeddings use few of their dimensions. The codes keep the principal directions that hold KEEP of the rows' energy
(measured on rows that the fit did not see) and drop the rest, so a walk reads that much less memory, which is
what bounds it. A random rotation within the kept directions makes the components alike (about normal with
deviation width^-1/2), so one step size fits all. Rows that are too few, or whose energy is spread evenly, keep
every direction.

Rows and directions are rounded to grids, so that each product is a multiple of 2^-23 and no partial sum passes about 1
(Cauchy–Schwarz): float32 holds all of them, and a code is the same in any batch, BLAS and order.
"""

from __future__ import annotations

from typing import Any

import faiss as _typed_faiss
import numpy as np
import numpy.typing as npt

faiss: Any = _typed_faiss  # the wheel's stubs are wrong about constructors

Float32 = npt.NDArray[np.float32]

# Of 11,000 real film embeddings, 0.96 lost no recall and 0.93 lost 0.006.
KEEP = 0.96
# Components beyond this many deviations are clipped: one in 10^7.
CLIP = 5.5
# faiss adds up whole SIMD registers of bytes only.
WIDTH_STEP = 32
SAMPLE_ROWS = 16_384
# A vector that loses this much of its energy is far from the rows that the codes were fitted to: beyond their
# 99.9th percentile on real and synthetic embeddings.
FAR = 4 * (1 - KEEP)
FAR_SHARE_MAX = 0.02
# Vectors of which so many may be far.
WINDOW = 2048
# The deviation of a score's error among the rows near one query, over the energy that was dropped (measured:
# 0.12 on synthetic, 0.16 on film embeddings).
DROPPED_NOISE = 0.16

_VECTOR_GRID, _TURN_GRID = np.float32(2.0**12), np.float32(2.0**11)


class Codes:
    """turn: float32 [dim, width], orthonormal columns."""

    def __init__(self, turn: Float32) -> None:
        self.dim, self.width = turn.shape
        # faiss's product, not numpy's, which wakes OpenBLAS's threads; these then spin for milliseconds on the cores
        # that the walk is about to use.
        self.product = faiss.LinearTransform(self.dim, self.width, False)
        grid = np.rint(turn.T * _TURN_GRID) / _TURN_GRID
        faiss.copy_array_to_vector(np.ascontiguousarray(grid).ravel(), self.product.A)
        self.product.is_trained = True
        self.scale = 127.0 / (CLIP * self.width**-0.5)
        # Rounding moves the difference of two rows' scores by about 0.29 · 1.6 steps; the margin is four
        # deviations.
        dropped = DROPPED_NOISE * (1 - KEEP) if self.width < self.dim else 0.0
        self.noise = 4 * float(np.hypot(1.6 * 0.29 / self.scale, dropped))
        self.unsuited = False
        self._seen = self._far = 0

    def encoded(self, vectors: npt.NDArray[np.float16]) -> Float32:
        """Codes of vectors float16 [n, dim]: whole numbers in 0…255, float32 [n, width]."""
        wide = vectors.astype(np.float32)
        wide *= _VECTOR_GRID
        np.rint(wide, out=wide)
        wide /= _VECTOR_GRID
        faiss.omp_set_num_threads(1)  # of the calling thread
        turned: Float32 = self.product.apply(wide)
        if self.width < self.dim:
            self._note(turned)
        turned *= self.scale
        np.rint(turned, out=turned)
        turned += 128
        return np.clip(turned, 0, 255, out=turned)

    def _note(self, turned: Float32) -> None:
        """Whether vectors of another kind come in numbers. Threads may lose a count to each other; no matter."""
        self._seen += len(turned)
        self._far += int(np.count_nonzero(np.vecdot(turned, turned) < 1 - FAR))
        if self._far > FAR_SHARE_MAX * WINDOW:
            self.unsuited = True
        if self._seen >= WINDOW:
            self._seen = self._far = 0


def orthogonal(size: int) -> npt.NDArray[np.float64]:
    """A random orthogonal matrix float64 [size, size], the same in every process."""
    q: npt.NDArray[np.float64] = np.linalg.qr(np.random.default_rng(16).standard_normal((size, size)))[0]
    return q


def whole(dim: int) -> Codes:
    """Codes that drop nothing."""
    return Codes(orthogonal(dim).astype(np.float32))


def fitted(vectors: npt.NDArray[np.float16]) -> Codes:
    """Codes for rows like vectors float16 [rows, dim]. About a second at 1,024 dimensions."""
    rows, dim = vectors.shape
    if rows < 4 * dim:
        return whole(dim)  # too few to tell the rows' directions from chance
    chosen = np.linspace(0, rows - 1, min(rows, SAMPLE_ROWS)).astype(np.int64)
    sample = vectors[chosen].astype(np.float32)
    fit, held = sample[::2], sample[1::2]
    axes = np.linalg.eigh(fit.T @ fit)[1][:, ::-1]  # eigenvalues ascend
    kept = np.square(held @ axes).cumsum(axis=1)
    enough = (kept.mean(axis=0) >= KEEP) & ((kept < 1 - FAR).mean(axis=0) <= FAR_SHARE_MAX / 2)
    width = int(np.argmax(enough)) + 1 if enough.any() else dim
    width = -(-width // WIDTH_STEP) * WIDTH_STEP
    if width >= dim:
        return whole(dim)
    return Codes((axes[:, :width] @ orthogonal(width)).astype(np.float32))


def of_product(product: Any) -> Codes:
    """Codes by the product of a saved graph."""
    turn = faiss.vector_to_array(product.A).reshape(product.d_out, product.d_in).T
    return Codes(turn)
