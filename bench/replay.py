"""How fast a replica takes its log into table and row files: `python -m bench.replay [--quick]`.

The log of `n` puts (1,024 dimensions, 120 bytes of metadata, 4 classes) is made once; each run opens it without any
checkpoint, so that every record is decoded, verified, applied and checkpointed, and ends with a synced checkpoint.
The figure counts all of that. The peer is the rate that the published design asks for; beside it, for the reader,
what the disk takes of the same bytes with a plain sequential write and one fdatasync.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np

from bench.harness import arguments, figure, say
from bench.vectors import CACHE
from node.main import GC_THRESHOLD
from storage.config import StorageConfig
from storage.disk import Log
from storage.records import Kind, Operation, encode
from storage.replica import Replica

DIM = 1024
PUBLISHED = 50_000
CONFIG = StorageConfig(dim=DIM, engine="exact", float32_budget_bytes=0)


def make_log(directory: Path, count: int) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((4096, DIM)).astype(np.float16)
    ids = rng.choice(1 << 40, count, replace=False).tolist()
    log = Log.open(directory / "wal", shard=0, segment_bytes=64 << 20)
    batch = []
    for sequence, id in enumerate(ids, 1):
        batch.append(
            encode(
                epoch=1,
                sequence=sequence,
                timestamp_ns=time.time_ns(),  # young enough to keep its segment
                write_id=sequence.to_bytes(16, "big"),
                operation=Operation.PUT,
                kind=Kind.ITEM,
                id=id,
                vector=vectors[sequence % 4096].tobytes(),
                classes=(1, 7, sequence % 200, 201),
                metadata=b"m" * 120,
            )
        )
        if len(batch) == 1000:
            log.append(batch)
            batch = []
    if batch:
        log.append(batch)
    log.close()


def replayed_per_s(directory: Path, count: int) -> float:
    for path in directory.iterdir():
        if path.name != "wal":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()  # what earlier runs left to write is not this run's
    start = time.perf_counter()
    replica = Replica.open(directory, shard=0, node_id="bench", config=CONFIG)
    opened = time.perf_counter()
    replica.checkpoint()
    elapsed = time.perf_counter() - start
    assert replica.view.alive_rows == count == replica.recovery.replayed
    say(f"{elapsed:.2f} s, of it {elapsed - (opened - start):.2f} s the last checkpoint; {replica.recovery}")
    replica.abort()
    return count / elapsed


def disk_bytes_per_s(path: Path, size: int) -> float:
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(block)
        os.fdatasync(file.fileno())
    elapsed = time.perf_counter() - start
    path.unlink()
    return size / elapsed


def main() -> None:
    options = arguments(__doc__ or "")
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)  # as a node does
    count, runs = (20_000, 3) if options.quick else (100_000, 5)
    directory = CACHE / f"replay-{count}-{os.getpid()}"
    directory.mkdir(parents=True)
    try:
        make_log(directory, count)
        rates, disk = [], []
        for _ in range(runs):
            rates.append(replayed_per_s(directory, count))
            disk.append(disk_bytes_per_s(directory / "plain", count * 2 * DIM))
    finally:
        shutil.rmtree(directory)
    bound = statistics.median(disk) / (2 * DIM)
    figure(
        "replay.records_per_s",
        statistics.median(rates),
        "1/s",
        peer="published design",
        peer_value=PUBLISHED,
        target="at least 100,000",
        n=count,
    )
    figure(
        "replay.of_disk",
        statistics.median(rates) / bound,
        "part",
        peer="plain write of the same rows",
        peer_value=1.0,
        target="none: where near 1, the disk is the bound",
        n=count,
    )


if __name__ == "__main__":
    main()
