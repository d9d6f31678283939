"""Index engines behind one protocol (`storage/index/base.py`), chosen by config."""

from __future__ import annotations

from storage.config import StorageConfig
from storage.index.base import Engine

__all__ = ["Engine", "make_engine"]


def make_engine(config: StorageConfig) -> Engine:
    """The engine that `config.engine` names. Raises ValueError for a name that is none."""
    # Imported here: faiss alone takes 0.2 s and 60 MB, which a process with another engine need not pay.
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
