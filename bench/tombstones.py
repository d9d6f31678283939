"""What tombstones cost: memory for each, and how long a purge holds the loop up: `python -m bench.tombstones [--quick]`.

Deletes of ids that were never there are applied in one batch and checkpointed, so that their entries are in the
table only; then one PURGE mark removes them all. The peer of a purge is the delete itself, per record, in the same run.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from pathlib import Path

from bench.harness import arguments, figure
from storage.batch import Batch
from storage.config import StorageConfig
from storage.records import Kind, Mark, Operation
from storage.replica import Replica
from storage.tombstones import Tombstones, encode_floor

CONFIG = StorageConfig(dim=8, engine="exact", wal_segment_bytes=64 << 20)


def bytes_each(count: int) -> float:
    tracemalloc.start()
    index, before = Tombstones(), tracemalloc.get_traced_memory()[0]
    for place in range(count):
        index.add((1 << 40) + place, (7, (1 << 30) + place), place * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / count


def delete_and_purge_us(directory: Path, count: int) -> tuple[float, float]:
    replica = Replica.open(directory, shard=0, node_id="bench", config=CONFIG)
    batch = Batch(1, 0, 1)
    batch.add([(Operation.DELETE, Kind.ITEM, id, b"", (), b"") for id in range(count)], bytes(16))
    deletes = _apply_s(replica, batch)
    replica.checkpoint()
    batch = Batch(1, count, 1)
    batch.add_mark(Mark.PURGE, encode_floor(replica.position))
    purge = _apply_s(replica, batch)
    assert replica.tombstones == 0
    replica.abort()
    return deletes / count * 1e6, purge / count * 1e6


def _apply_s(replica: Replica, batch: Batch) -> float:
    replica.append(batch.blobs, 0)
    start = time.perf_counter()
    replica.apply(batch.records)
    return time.perf_counter() - start


def main() -> None:
    count = 20_000 if arguments(__doc__ or "").quick else 100_000
    figure("tombstones.bytes", bytes_each(count), "B", peer=None, peer_value=None, target="none", n=count)
    with tempfile.TemporaryDirectory() as directory:
        delete, purge = delete_and_purge_us(Path(directory) / "shard-000", count)
    figure(
        "tombstones.purge_us", purge, "µs", peer="the delete's own apply", peer_value=delete,
        target="below the peer", n=count,
    )  # fmt: skip


if __name__ == "__main__":
    main()
