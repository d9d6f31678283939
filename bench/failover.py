"""`failover.*`: what clients see when the primary of their shards is killed, and when it hands over.

Three daemons, four shards. Clients that know all nodes write to the shards that the victim leads (one client each,
ack=quorum) and read everywhere; then `kill -9`. The write gap is the longest time between two acknowledged writes of one client
around the kill. A planned handover is `gmco failover` of every shard in turn, then SIGTERM and start of each node in turn, under
the same load.

The peers' figures are cited: Redis Cluster waits `cluster-node-timeout` (15 s by default) before a replica stands, so ≥ 16 s; the
published design of this system says 5 to 10 s.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

import gmco
from bench.harness import arguments, figure, say
from router.ring import shard_of
from tests.processes.cluster import Daemon, cluster
from tests.processes.ledger import replicas_differ

SHARDS = 4
DIM = 16
ITEMS = 400
KILLS, KILLS_QUICK = 60, 4
BEFORE_S, AFTER_S = 1.0, 5.0
REDIS_CLUSTER_S = 16.0


class Client:
    """One app: writes or reads as fast as it is answered, and keeps when each was."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = random.sample(urls, len(urls))
        self.answered: list[float] = []
        self.latencies: list[tuple[float, float]] = []  # when begun, seconds
        self.failed: list[str] = []

    async def run(self, ids: list[int], write: bool) -> None:
        async with gmco.connect(self.urls, timeout_s=10.0) as client:
            while True:
                began = time.monotonic()
                try:
                    if write:
                        item = gmco.Item(random.choice(ids), [random.random() for _ in range(DIM)], (), {})
                        await client.put_items([item], ack="quorum")
                    else:
                        answer = await client.search([random.random() for _ in range(DIM)], 10)
                        if answer.coverage.answered < answer.coverage.total:
                            self.failed.append("partial")
                except gmco.GmcoError as error:
                    self.failed.append(f"{error.code}: {error}")
                now = time.monotonic()
                self.answered.append(now)
                self.latencies.append((began, now - began))
                await trio.sleep(0.002)

    def gap(self, around: float) -> float:
        """The longest time between two answers of which the later came after `around`."""
        times = self.answered
        return max((b - a for a, b in pairwise(times) if b > around), default=math.inf)


def ids_of(shards: set[int]) -> list[list[int]]:
    """For each shard, some ids that live there."""
    found: dict[int, list[int]] = {shard: [] for shard in sorted(shards)}
    for id_ in range(1, ITEMS + 1):
        if (shard := shard_of(id_, SHARDS)) in found:
            found[shard].append(id_)
    return list(found.values())


def led_by(client: gmco.BlockingClient) -> dict[str, set[int]]:
    led: dict[str, set[int]] = {}
    for row in client.shards()["replicas"]:
        if row["role"] == "primary":
            led.setdefault(row["node"], set()).add(row["shard"])
    return led


def settle(client: gmco.BlockingClient) -> None:
    deadline = time.monotonic() + 30
    while why := replicas_differ(client):
        if time.monotonic() > deadline:
            raise RuntimeError(why)
        time.sleep(0.1)


async def kill_one(daemons: list[Daemon], victim: Daemon, led: set[int]) -> dict[str, Any]:
    urls = [daemon.url for daemon in daemons]
    writers = [Client(urls) for _ in led]
    readers = [Client(urls) for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for writer, ids in zip(writers, ids_of(led), strict=True):
            nursery.start_soon(writer.run, ids, True)
        for reader in readers:
            nursery.start_soon(reader.run, [], False)
        await trio.sleep(BEFORE_S)
        killed = time.monotonic()
        victim.kill()
        await trio.sleep(AFTER_S)
        nursery.cancel_scope.cancel()
    latencies = [one for reader in readers for one in reader.latencies]
    return {
        "gap": max(writer.gap(killed) for writer in writers),
        "before": [s for at, s in latencies if killed - BEFORE_S / 2 < at < killed - 0.05],
        "during": [s for at, s in latencies if killed - 0.05 <= at < killed + 3.0],
        "failed_reads": [one for reader in readers for one in reader.failed],
        "failed_writes": [one for writer in writers for one in writer.failed],
    }


async def planned(daemons: list[Daemon]) -> tuple[list[str], float, int]:
    """Every shard handed over twice, then every node restarted. (failed requests, longest gap, requests)"""
    urls = [daemon.url for daemon in daemons]
    writers = [Client(urls) for _ in range(SHARDS)]
    readers = [Client(urls) for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for writer, ids in zip(writers, ids_of(set(range(SHARDS))), strict=True):
            nursery.start_soon(writer.run, ids, True)
        for reader in readers:
            nursery.start_soon(reader.run, [], False)
        await trio.sleep(BEFORE_S)
        began = time.monotonic()
        async with gmco.connect(urls, timeout_s=10.0) as client:
            for shard in [*range(SHARDS)] * 2:
                await client.failover(shard)
                await trio.sleep(0.2)
        for daemon in daemons:
            await trio.to_thread.run_sync(daemon.stop)
            await trio.to_thread.run_sync(daemon.start)
            await trio.sleep(1.0)
        nursery.cancel_scope.cancel()
    clients = writers + readers
    return (
        [one for client in clients for one in client.failed],
        max(client.gap(began) for client in writers),
        sum(len(client.answered) for client in clients),
    )


def percentile(values: list[float], part: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def main() -> None:
    options = arguments(__doc__ or "")
    kills = KILLS_QUICK if options.quick else KILLS
    folder = Path(tempfile.mkdtemp(prefix="failover-"))
    gaps: list[float] = []
    ratios: list[float] = []
    failed_reads: list[str] = []
    failed_writes: list[str] = []
    try:
        with cluster(folder, 3, storage=f"dim = {DIM}", shard_count=SHARDS) as daemons:
            by_name = {daemon.name: daemon for daemon in daemons}
            with gmco.connect_blocking([daemon.url for daemon in daemons], timeout_s=10.0) as client:
                items = [
                    gmco.Item(i, [random.random() for _ in range(DIM)], (), {}) for i in range(1, ITEMS + 1)
                ]
                client.put_items(items, ack="all")
                for number in range(kills):
                    settle(client)
                    victim, led = max(led_by(client).items(), key=lambda pair: len(pair[1]))
                    found = trio.run(kill_one, daemons, by_name[victim], led)
                    gaps.append(found["gap"])
                    normal, during = percentile(found["before"], 0.99), percentile(found["during"], 0.99)
                    ratios.append(during / normal)
                    failed_reads += found["failed_reads"]
                    failed_writes += found["failed_writes"]
                    say(
                        f"kill {number + 1} of {kills}: {victim}, {len(led)} shards, gap {gaps[-1]:.2f} s, "
                        f"read p99 {normal * 1000:.0f} → {during * 1000:.0f} ms"
                    )
                    by_name[victim].start()
                settle(client)
            failed, longest, requests = trio.run(planned, daemons)
    finally:
        shutil.rmtree(folder)
    for line in sorted(set(failed_reads + failed_writes + failed))[:10]:
        say(f"failed: {line}")
    peer = {"peer": "Redis Cluster at its defaults (cited)", "peer_value": REDIS_CLUSTER_S, "n": kills}
    none: dict[str, Any] = {"peer": None, "peer_value": None, "n": kills}
    figure("failover.write_gap_p50_s", percentile(gaps, 0.5), "s", target="none: for the picture", **peer)
    figure("failover.write_gap_p95_s", percentile(gaps, 0.95), "s", target="at most 2.5", **peer)
    figure("failover.write_gap_max_s", max(gaps), "s", target="at most 4", **peer)
    figure("failover.failed_reads", len(failed_reads), "reads", target="0", **none)
    figure("failover.failed_writes", len(failed_writes), "writes", target="none: for the picture", **none)
    figure("failover.read_p99_ratio", percentile(ratios, 0.5), "× normal", target="at most 5", **none)
    none["n"] = requests
    figure("failover.planned_failed", len(failed), "requests", target="0", **none)
    figure("failover.planned_gap_max_s", longest, "s", target="none: for the picture", **none)


if __name__ == "__main__":
    main()
