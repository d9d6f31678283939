"""Index engines behind one protocol (`storage/index/base.py`), chosen by config."""

from __future__ import annotations

from storage.config import StorageConfig
from storage.index.base import Engine

__all__ = ["Engine", "make_engine"]


def make_engine(config: StorageConfig) -> Engine:
    """The engine that `config.engine` names. Raises ValueError for a name that is none."""
    # Imported here: a client or a coordinator that holds no shard need not load faiss and hnswlib.
    if config.engine == "exact":
        from storage.index.exact import ExactEngine

        return ExactEngine(config)
    if config.engine == "hnsw":
        from storage.index.hnsw import hnsw_engine

        return hnsw_engine(config)
    if config.engine == "hnsw16":
        from storage.index.hnsw16 import hnsw16_engine

        return hnsw16_engine(config)
    raise ValueError(f"unknown index engine {config.engine!r}: choose exact, hnsw or hnsw16")
