"""Synthetic embeddings with clusters, for benches: seeds fixed, so that cached graphs stay valid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

CACHE = Path(__file__).resolve().parents[1] / ".bench"
# The spread within a cluster against that between them. At 0.8 a graph with M=32, efC=200 reaches a recall of
# about 0.99 at ef=200, as the real film embeddings do; isotropic noise in 1,024 dimensions is far harder than
# any real data.
SPREAD = 0.8
DECAY = 0.6


def clustered(
    rows: int, dim: int, queries: int, clusters: int = 1000, seed: int = 7
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """(vectors float16 [rows, dim], queries float16 [queries, dim]), unit length, drawn from one mixture.

    Each cluster is Gaussian with a spectrum that falls as i^-DECAY (embeddings use few of their dimensions), turned
    by one random rotation so that no coordinate is special.
    """
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, dim + 1) ** -DECAY).astype(np.float32)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    centres = rng.standard_normal((clusters, dim), dtype=np.float32) * spectrum
    out = np.empty((rows + queries, dim), np.float16)
    for low in range(0, len(out), 10_000):
        high = min(low + 10_000, len(out))
        x = centres[rng.integers(0, clusters, high - low)]
        x += SPREAD * spectrum * rng.standard_normal((high - low, dim), dtype=np.float32)
        x = x @ rotation
        out[low:high] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return out[:rows], out[rows:]
