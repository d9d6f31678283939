"""Settings of one replica's storage. Defaults work on a laptop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Metric = Literal["cosine", "dot"]
EngineName = Literal["exact", "hnsw", "hnsw16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """All sizes in bytes, rows or seconds as named."""

    dim: int = 1024
    metric: Metric = "cosine"
    # Width of the class mask held in memory per row, in bits; a multiple of 64, at most 1,024.
    class_width: int = 256
    engine: EngineName = "hnsw16"
    m: int = 32
    ef_construction: int = 200
    ef: int = 200
    # Rows that wait for the graph are scanned exactly; past this bound writes are pushed back.
    fresh_rows_max: int = 50_000
    # Below this many rows no graph is built: an exact scan is as fast and always right.
    graph_rows_min: int = 10_000
    # Part of dead rows from which vectors and graph are rewritten without them.
    compact_dead_ratio: float = 0.3
    compact_rows_min: int = 1_000
    wal_segment_bytes: int = 1 << 20
    # To this a log's segments grow while they fill faster than the next can be made ahead; 0: they do not grow.
    wal_segment_bytes_max: int = 16 << 20
    wal_keep_s: float = 86_400.0
    # What is not known to be on a quorum is kept longer, as long as the log is no greater than this.
    wal_unsettled_bytes: int = 1 << 30
    # How long a delete is remembered at least; longer than the log reaches back it cannot be told.
    tombstones_keep_s: float = 86_400.0
    checkpoint_bytes: int = 32 << 20
    write_ids_keep_s: float = 600.0
    write_ids_max: int = 200_000
    # A resident float32 copy makes `exact` faster; off when it would not fit this budget (per shard).
    float32_budget_bytes: int = 512 << 20
    # Threads that one search batch and one graph-building step may use.
    threads: int = 2
