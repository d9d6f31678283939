"""`replication.*`: one primary and two replicas as real processes, records of 2 KB, acknowledged by all three.

The peer is three plain writers side by side on the same disk: the same bytes in batches of the size that the primary was seen
to write, `write` + `fdatasync` each, nothing else. Lag is what the replicas say of themselves under 5,000 writes a second.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import trio

import gmco
from bench.harness import arguments, figure, say
from tests.processes.cluster import Daemon, cluster

DIM = 1_024
RECORD_BYTES = 96 + 2 * DIM
PER_REQUEST = 100
CLIENTS = 12
LAG_WRITES_S = 5_000
PLAIN = """
import os, sys, time
path, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
block = os.urandom(size)
fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
sys.stdin.readline()
began = time.perf_counter()
for _ in range(count):
    os.write(fd, block)
    os.fdatasync(fd)
print(time.perf_counter() - began)
"""


def items(start: int, count: int, vectors: np.ndarray[Any, np.dtype[np.float16]]) -> list[gmco.Item]:
    return [gmco.Item(start + i, vectors[i].tobytes(), (), {}) for i in range(count)]


def led(daemons: list[Daemon]) -> dict[str, int]:
    """What the logs of all nodes have done together: batches and records."""
    counters = [daemon.status()["counters"]["writes"] for daemon in daemons]
    return {name: sum(one[name] for one in counters) for name in ("batches", "records")}


async def write(urls: list[str], total: int, start: int, per_second: float | None) -> float:
    """Seconds for `total` records, by CLIENTS connections with one request each under way."""
    vectors = np.random.default_rng(1).standard_normal((PER_REQUEST, DIM)).astype(np.float16)
    turns = iter(range(start, start + total, PER_REQUEST))
    began = time.monotonic()

    async def client() -> None:
        async with gmco.connect(urls, timeout_s=30.0) as one:
            for first in turns:
                if per_second is not None:
                    due = began + (first - start) / per_second
                    await trio.sleep(max(0.0, due - time.monotonic()))
                await one.put_items(items(first, PER_REQUEST, vectors), ack="all")

    async with trio.open_nursery() as nursery:
        for _ in range(CLIENTS):
            nursery.start_soon(client)
    return time.monotonic() - began


def plain(folder: Path, batch_bytes: int, batches: int) -> float:
    """Seconds of the slowest of three writers that run at once."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", PLAIN, str(folder / f"plain-{i}"), str(batch_bytes), str(batches)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    time.sleep(0.5)
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    times = [float(writer.communicate()[0]) for writer in writers]
    for i in range(3):
        os.unlink(folder / f"plain-{i}")
    return max(times)


async def lags(daemons: list[Daemon], seconds: float, total: int, start: int) -> list[int]:
    """Lag of each replica in ms, asked of itself 20 times a second while writes go on."""
    found: list[int] = []

    async def watch(daemon: Daemon) -> None:
        async with gmco.connect([daemon.url], timeout_s=10.0) as client:
            while True:
                for row in (await client.status())["shards"]:
                    if row["role"] != "primary":
                        found.append(row["lag_ms"])
                await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for daemon in daemons:
            nursery.start_soon(watch, daemon)
        took = await write([daemon.url for daemon in daemons], total, start, LAG_WRITES_S)
        nursery.cancel_scope.cancel()
    say(f"{total / took:,.0f} writes/s were made of {LAG_WRITES_S:,}")
    return found


def percentile(values: list[int], part: float) -> int:
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def main() -> None:
    options = arguments(__doc__ or "")
    total, runs, lag_s = (6_000, 1, 3) if options.quick else (20_000, 5, 20)
    folder = Path(tempfile.mkdtemp(prefix="replication-"))
    # Nothing is searched: neither a graph nor the exact engine's own copy of the rows is to be kept up.
    storage = f'dim = {DIM}\nengine = "exact"\nfloat32_budget_bytes = 0\nfresh_rows_max = 100000000'
    ours: list[float] = []
    peers: list[float] = []
    try:
        with cluster(folder, 3, storage=storage, shard_count=1, name=f"r{secrets.token_hex(2)}") as daemons:
            urls = [daemon.url for daemon in daemons]
            trio.run(write, urls, 1_000, 1, None)
            for run in range(runs):
                before = led(daemons)
                took = trio.run(write, urls, total, 1, None)
                after = led(daemons)
                batches = (after["batches"] - before["batches"]) / 3
                batch = max(1, round(total / batches))
                count = -(-total // batch)
                plain_s = plain(folder, batch * RECORD_BYTES, count)
                ours.append(total / took)
                peers.append(count * batch / plain_s)
                say(
                    f"run {run + 1}: {ours[-1]:,.0f} records/s in batches of {batch}, plain writers {peers[-1]:,.0f}"
                )
            found = trio.run(lags, daemons, lag_s, lag_s * LAG_WRITES_S, 1)
    finally:
        shutil.rmtree(folder)
    figure(
        "replication.throughput",
        statistics.median(ours),
        "records/s",
        peer="three plain writers with fdatasync, side by side",
        peer_value=statistics.median(peers),
        target="at least 0.6 of it",
        n=runs,
    )
    for name, part in (("replication.lag_p99_ms", 0.99), ("replication.lag_p50_ms", 0.5)):
        figure(
            name,
            percentile(found, part),
            "ms",
            peer=None,
            peer_value=None,
            target="p99 below 200",
            n=len(found),
        )


if __name__ == "__main__":
    main()
