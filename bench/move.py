"""`move.*`: one shard's replica goes to another node, graph included: how fast, and what queries see of it.

Three daemons; the shard (100,000 vectors of 1,024, HNSW graph built) is on two of them. `move.throughput` is the unthrottled
move from its order to the new replica's vote, as bytes of its snapshot a second. The peer: as many bytes over TCP on loopback
into a file, one fdatasync at the end. Of the same moves `move.fetch_throughput` counts only the time in which bytes come, and
`move.fixed_s` is all other time: order, snapshot made, replica installed and opened, epochs. `move.query_p99_ratio` is p99 of
single searches (one client, paced) during a move at the default throttle, against the same client's just before.

`--build` only builds the cluster, in some minutes, and keeps it under `.bench/`, where the other runs find it. Its graph is built
with `ef_construction` 40: as many bytes as any, at a lower recall, which nobody asks for here.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import gmco
from bench.harness import figure, say
from bench.vectors import CACHE
from tests.processes.cluster import Daemon, cluster

DIM = 1_024
ROWS, ROWS_QUICK = 100_000, 6_000
EF_CONSTRUCTION = 40
PER_REQUEST = 200
BEFORE_S = 10.0
# Between two queries: they show what the move does to them, not how fast queries can be.
PACE_S = 0.02
CHUNK = 1 << 20
# Each look asks all three daemons, on the cores on which they move.
LOOK_S = 0.05
LOAD_S = 600.0
# A machine that others use as well is not kept for longer at a time.
BUILD_S = 220.0
MOVE_S = 600.0

Ends = Callable[[], tuple[str, str]]


def vectors(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """In clusters, as embeddings are; a graph of pure noise would be no model of anything."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((256, DIM)).astype(np.float32)
    noise = random.standard_normal((count, DIM)).astype(np.float32)
    return (centres[random.integers(0, 256, count)] + 0.7 * noise).astype(np.float16)


def load(client: gmco.BlockingClient, rows: int) -> None:
    """What is not there yet of an earlier try."""
    there = max(row["items"] for row in client.shards()["replicas"])
    for first in range(there - there % PER_REQUEST, rows, PER_REQUEST):
        made = vectors(PER_REQUEST, first)
        items = [gmco.Item(1 + first + i, made[i].tobytes(), (), {}) for i in range(PER_REQUEST)]
        client.put_items(items, timeout_s=LOAD_S)
        if first % 10_000 == 0:
            say(f"{first:,} of {rows:,} written")


def wait_built(daemons: list[Daemon], until: float) -> None:
    """Until every graph holds all rows."""
    while fresh := sum(row["fresh"] for daemon in daemons for row in daemon.status()["shards"]):
        if time.monotonic() > until:
            raise SystemExit(f"{fresh:,} rows are still to be built: the same command goes on with them")
        say(f"{fresh:,} rows to build")
        time.sleep(2.0)


@contextmanager
def running(folder: Path, rows: int) -> Iterator[list[Daemon]]:
    """The three daemons over what is in `folder`, stopped in order, so that all of it can be used again."""
    storage = (
        f"dim = {DIM}\nfresh_rows_max = 100000000\ngraph_rows_min = {min(rows // 2, 10_000)}\n"
        f"ef_construction = {EF_CONSTRUCTION}"
    )
    with cluster(folder, 3, storage=storage, shard_count=1, replication=1) as daemons:
        try:
            yield daemons
        finally:
            for daemon in daemons:
                daemon.signal(signal.SIGTERM)
            for daemon in daemons:
                daemon.wait(60)


def built(rows: int) -> Path:
    """The cluster's folder, with the shard and its graph on two nodes; built when it is not there, in several runs if need be."""
    folder = CACHE / f"move-{rows}"
    if folder.exists():
        return folder
    making = folder.with_suffix(".making")
    with (
        running(making, rows) as daemons,
        gmco.connect_blocking([daemon.url for daemon in daemons], timeout_s=60.0) as client,
    ):
        load(client, rows)
        wait_built(daemons, time.monotonic() + BUILD_S)
        # The second replica comes with the first one's graph: to build it twice would only take longer.
        if len(client.shards()["replicas"]) < 2:
            client.cluster("set", {"replication": 2})
            client.cluster("commit", {"hash": client.cluster("plan")["hash"]})
        wait_still(client)
    making.rename(folder)
    return folder


def move(client: gmco.BlockingClient, source: str, target: str, bytes_per_s: int | None) -> float:
    """Seconds until the new replica votes."""
    began = time.monotonic()
    client.moves("move", {"shard": 0, "source": source, "target": target, "bytes_per_s": bytes_per_s})
    while True:
        took = time.monotonic() - began
        found = client.moves()
        coming = [one for one in found["moves"] if one["target"]]
        if not coming and not found["unknown"]:
            break
        if took > MOVE_S:
            raise RuntimeError(f"the move does not end: {found}")
        time.sleep(LOOK_S)
    wait_still(client)
    return took


def wait_still(client: gmco.BlockingClient) -> None:
    """Until nothing is on its way."""
    deadline = time.monotonic() + MOVE_S
    while (found := client.moves())["moves"] or found["unknown"] or found["silent"]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the moves do not end: {found}")
        time.sleep(0.1)


def counted(daemons: list[Daemon], name: str) -> int:
    """A counter of snapshots, over all nodes."""
    return sum(int(daemon.status()["counters"]["snapshots"][name]) for daemon in daemons)


def plain(folder: Path, size: int) -> float:
    """Seconds for so many bytes over TCP into a file that is on the disk then."""
    server = socket.create_server(("127.0.0.1", 0))
    block = os.urandom(CHUNK)

    def send() -> None:
        with socket.create_connection(server.getsockname()) as sender:
            left = size
            while left:
                sent = block[: min(CHUNK, left)]
                sender.sendall(sent)
                left -= len(sent)

    sender = threading.Thread(target=send)
    began = time.perf_counter()
    sender.start()
    receiver, _ = server.accept()
    path = folder / "plain"
    buffer = memoryview(bytearray(CHUNK))
    with receiver, server, path.open("wb", buffering=0) as file:
        while count := receiver.recv_into(buffer):
            file.write(buffer[:count])
        os.fdatasync(file.fileno())
    took = time.perf_counter() - began
    sender.join()
    path.unlink()
    return took


class Queries(threading.Thread):
    """One app that searches, again and again; keeps when each was answered and how long it took."""

    def __init__(self, urls: list[str]) -> None:
        super().__init__(daemon=True)
        self.urls, self.ended = urls, threading.Event()
        self.taken: list[tuple[float, float]] = []
        self.failed: list[str] = []

    def run(self) -> None:
        wanted = vectors(500, 99).astype(np.float32).tolist()
        with gmco.connect_blocking(self.urls, timeout_s=10.0) as client:
            while not self.ended.is_set():
                began = time.monotonic()
                try:
                    client.search(wanted[len(self.taken) % len(wanted)], 10)
                except gmco.GmcoError as error:
                    self.failed.append(f"{error.code}: {error}")
                self.taken.append((began, time.monotonic() - began))
                time.sleep(PACE_S)

    def between(self, begin: float, end: float) -> list[float]:
        return [seconds for at, seconds in self.taken if begin <= at < end]


def percentile(values: list[float], part: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def measure(folder: Path, daemons: list[Daemon], rows: int, runs: int) -> None:
    names = {daemon.name for daemon in daemons}
    urls = [daemon.url for daemon in daemons]
    with gmco.connect_blocking(urls, timeout_s=60.0) as client:
        wait_still(client)

        def ends() -> tuple[str, str]:
            """A holder that does not lead, and the node that holds nothing."""
            found = client.shards()["replicas"]
            source = sorted(row["node"] for row in found if row["role"] != "primary")[0]
            (target,) = names - {row["node"] for row in found}
            return source, target

        throughput(folder, daemons, client, ends, runs)
        latency(urls, client, ends, BEFORE_S / 2 if rows < ROWS else BEFORE_S, runs)


def throughput(
    folder: Path, daemons: list[Daemon], client: gmco.BlockingClient, ends: Ends, runs: int
) -> None:
    ours: list[float] = []
    fetches: list[float] = []
    fixed: list[float] = []
    peers: list[float] = []
    for run in range(runs):
        bytes_before, ms_before = counted(daemons, "fetched_bytes"), counted(daemons, "fetch_ms")
        seconds = move(client, *ends(), 0)
        size = counted(daemons, "fetched_bytes") - bytes_before
        fetch = (counted(daemons, "fetch_ms") - ms_before) / 1_000
        peer = plain(folder, size)
        ours.append(size / seconds / 1e6)
        fetches.append(size / fetch / 1e6)
        fixed.append(seconds - fetch)
        peers.append(size / peer / 1e6)
        say(
            f"run {run + 1}: {size / 1e6:.0f} MB in {seconds:.2f} s, {fetch:.2f} of them fetching; plain {peer:.2f} s"
        )
    over_tcp = "the same bytes over TCP into a file, fdatasync"
    figure(
        "move.throughput", statistics.median(ours), "MB/s",
        peer=over_tcp, peer_value=statistics.median(peers), target="at least 0.5 of it", n=runs,
    )  # fmt: skip
    figure(
        "move.fetch_throughput", statistics.median(fetches), "MB/s",
        peer=over_tcp, peer_value=statistics.median(peers), target="none: for the picture", n=runs,
    )  # fmt: skip
    figure(
        "move.fixed_s", statistics.median(fixed), "s",
        peer=None, peer_value=None, target="none: for the picture", n=runs,
    )  # fmt: skip


def latency(urls: list[str], client: gmco.BlockingClient, ends: Ends, calm_s: float, runs: int) -> None:
    ratios: list[float] = []
    normal: list[float] = []
    queries = Queries(urls)
    queries.start()
    for _ in range(runs):
        time.sleep(calm_s)
        began = time.monotonic()
        seconds = move(client, *ends(), None)
        calm = percentile(queries.between(began - calm_s, began), 0.99)
        during = queries.between(began, began + seconds)
        ratios.append(percentile(during, 0.99) / calm)
        normal.append(calm * 1_000)
        worst = percentile(during, 0.99) * 1_000
        say(f"p99 {calm * 1_000:.1f} → {worst:.1f} ms in {seconds:.1f} s, {len(during)} queries")
    queries.ended.set()
    queries.join()
    for line in sorted(set(queries.failed))[:5]:
        say(f"failed: {line}")
    none: dict[str, Any] = {"peer": None, "peer_value": None, "n": runs}
    figure("move.query_p99_ratio", statistics.median(ratios), "× before", target="at most 2", **none)
    figure(
        "move.query_p99_before_ms", statistics.median(normal), "ms", target="none: for the picture", **none
    )
    figure("move.failed_queries", len(queries.failed), "queries", target="0", **none)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{ROWS_QUICK:,} vectors, one run")
    parser.add_argument("--build", action="store_true", help="only build the cluster, if it is not there")
    options = parser.parse_args()
    rows, runs = (ROWS_QUICK, 1) if options.quick else (ROWS, 3)
    folder = built(rows)
    if not options.build:
        with running(folder, rows) as daemons:
            measure(folder, daemons, rows, runs)


if __name__ == "__main__":
    main()
