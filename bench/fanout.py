"""`fanout.cpu_us`: what a fan-out costs beside the search itself.

Three real nodes, one replica of each shard, so that every uncached `search` goes to all three. CPU time of the three
processes over the queries, less the CPU time that their search lanes spent inside the engine (one BLAS thread, so
that the lane's thread holds all of it), divided by queries and nodes. The peer is the same client load answered by
`ping`s alone at one node, spread over the three: the floor that the WebSocket itself sets.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
from pathlib import Path

import numpy as np
import trio

import gmco
from bench.harness import arguments, figure, say
from tests.processes.cluster import Daemon, cluster

DIM = 64
ITEMS = 3_000
WORKERS = 32
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(daemons: list[Daemon]) -> float:
    total = 0.0
    for daemon in daemons:
        assert daemon.process is not None
        fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) * TICK_S
    return total


async def engine_s(daemons: list[Daemon]) -> float:
    total = 0
    for daemon in daemons:
        async with gmco.connect([daemon.url]) as client:
            total += (await client.status())["counters"]["search"]["engine_cpu_ns"]
    return total / 1e9


async def load(url: str, queries: int, *, ping: bool) -> None:
    """`queries` in all, WORKERS at a time over one connection."""
    left = iter(range(queries))

    async with gmco.connect([url], timeout_s=10.0) as client:

        async def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in left:
                if ping:
                    await client.ping()
                    continue
                answer = await client.search(rng.normal(size=DIM).astype(np.float32).tolist(), 10)
                assert answer.coverage.answered == answer.coverage.total, answer.coverage
                assert len(answer.hits) == 10

        async with trio.open_nursery() as nursery:
            for seed in range(WORKERS):
                nursery.start_soon(work, seed)


async def run(daemons: list[Daemon], queries: int, runs: int) -> tuple[list[float], list[float]]:
    async with gmco.connect([daemons[0].url], timeout_s=30.0) as client:
        rng = random.Random(1)
        for start in range(0, ITEMS, 500):
            await client.put_items(
                [
                    gmco.Item(i, [rng.gauss(0, 1) for _ in range(DIM)], (), {"title": f"item {i}"})
                    for i in range(start, start + 500)
                ]
            )
    await load(daemons[0].url, queries // 4, ping=False)
    ours, floor = [], []
    for number in range(runs):
        before_cpu, before_engine = cpu_s(daemons), await engine_s(daemons)
        await load(daemons[0].url, queries, ping=False)
        spent = cpu_s(daemons) - before_cpu - (await engine_s(daemons) - before_engine)
        ours.append(spent / queries / len(daemons) * 1e6)
        before_cpu = cpu_s(daemons)
        await load(daemons[0].url, queries, ping=True)
        floor.append((cpu_s(daemons) - before_cpu) / queries / len(daemons) * 1e6)
        say(f"run {number + 1}: {ours[-1]:.0f} µs per query and node; pings alone {floor[-1]:.0f}")
    return ours, floor


def main() -> None:
    options = arguments(__doc__ or "")
    queries, runs = (2_000, 3) if options.quick else (6_000, 5)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    folder = Path(".bench/fanout")
    shutil.rmtree(folder, ignore_errors=True)
    storage = f'dim = {DIM}\nengine = "exact"\nthreads = 1'
    with cluster(folder, 3, storage=storage, replication=1, shard_count=12) as daemons:
        ours, floor = trio.run(run, daemons, queries, runs)
    figure(
        "fanout.cpu_us",
        statistics.median(ours),
        "µs CPU per query and node",
        peer="the same load of pings at one node, over three",
        peer_value=statistics.median(floor),
        target="<= 300",
        n=queries * runs,
    )


if __name__ == "__main__":
    main()
