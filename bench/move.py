"""`move.*`: one shard's replica goes to another node, graph included: how fast, and what queries see of it.

Three daemons; the shard (100,000 vectors of 1,024, HNSW graph built) is on two of them. `move.throughput` is the unthrottled
move from its order to the new replica's vote, as bytes of its snapshot a second. The peer: as many bytes over TCP on loopback
into a file, one fdatasync at the end. `move.query_p99_ratio` is p99 of single searches (one client, paced) during a move at the
default throttle, against the same client's just before.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import gmco
from bench.harness import arguments, figure, say
from tests.processes.cluster import Daemon, cluster

DIM = 1_024
ROWS, ROWS_QUICK = 100_000, 6_000
PER_REQUEST = 200
BEFORE_S = 10.0
# Between two queries: they show what the move does to them, not how fast queries can be.
PACE_S = 0.02
CHUNK = 1 << 20
LOAD_S = 1_800.0
MOVE_S = 600.0


def vectors(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """In clusters, as embeddings are; a graph of pure noise would be no model of anything."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((256, DIM)).astype(np.float32)
    noise = random.standard_normal((count, DIM)).astype(np.float32)
    return (centres[random.integers(0, 256, count)] + 0.7 * noise).astype(np.float16)


def load(client: gmco.BlockingClient, rows: int) -> None:
    for first in range(0, rows, PER_REQUEST):
        made = vectors(PER_REQUEST, first)
        items = [gmco.Item(1 + first + i, made[i].tobytes(), (), {}) for i in range(PER_REQUEST)]
        client.put_items(items, ack="all", timeout_s=LOAD_S)
        if first % 10_000 == 0:
            say(f"{first:,} of {rows:,} written")


def wait_built(daemons: list[Daemon]) -> None:
    """Until every graph holds all rows."""
    deadline = time.monotonic() + LOAD_S
    while any(row["fresh"] for daemon in daemons for row in daemon.status()["shards"]):
        if time.monotonic() > deadline:
            raise RuntimeError("the graphs are not built in time")
        time.sleep(1.0)


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
        time.sleep(0.02)
    wait_still(client)
    return took


def wait_still(client: gmco.BlockingClient) -> None:
    """Until nothing is on its way."""
    deadline = time.monotonic() + MOVE_S
    while (found := client.moves())["moves"] or found["unknown"] or found["silent"]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the moves do not end: {found}")
        time.sleep(0.1)


def fetched(daemons: list[Daemon]) -> int:
    return sum(int(daemon.status()["counters"]["snapshots"]["fetched_bytes"]) for daemon in daemons)


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
    ours: list[float] = []
    peers: list[float] = []
    ratios: list[float] = []
    normal: list[float] = []
    with gmco.connect_blocking(urls, timeout_s=60.0) as client:
        load(client, rows)
        wait_built(daemons)
        # The second replica comes with the first one's graph: to build it twice would only take longer.
        client.cluster("set", {"replication": 2})
        client.cluster("commit", {"hash": client.cluster("plan")["hash"]})
        wait_still(client)

        def ends() -> tuple[str, str]:
            """A holder that does not lead, and the node that holds nothing."""
            found = client.shards()["replicas"]
            source = sorted(row["node"] for row in found if row["role"] != "primary")[0]
            (target,) = names - {row["node"] for row in found}
            return source, target

        for run in range(runs):
            before = fetched(daemons)
            seconds = move(client, *ends(), 0)
            size = fetched(daemons) - before
            peer = plain(folder, size)
            ours.append(size / seconds / 1e6)
            peers.append(size / peer / 1e6)
            say(f"run {run + 1}: {size / 1e6:.0f} MB in {seconds:.2f} s, plain {peer:.2f} s")
        queries = Queries([daemon.url for daemon in daemons])
        queries.start()
        for _ in range(runs):
            time.sleep(BEFORE_S / 2 if rows < ROWS else BEFORE_S)
            began = time.monotonic()
            seconds = move(client, *ends(), None)
            calm = percentile(queries.between(began - BEFORE_S, began), 0.99)
            during = queries.between(began, began + seconds)
            ratios.append(percentile(during, 0.99) / calm)
            normal.append(calm * 1_000)
            say(
                f"p99 {calm * 1000:.1f} → {percentile(during, 0.99) * 1000:.1f} ms in {seconds:.1f} s, {len(during)} queries"
            )
        queries.ended.set()
        queries.join()
    for line in sorted(set(queries.failed))[:5]:
        say(f"failed: {line}")
    figure(
        "move.throughput", statistics.median(ours), "MB/s",
        peer="the same bytes over TCP into a file, fdatasync", peer_value=statistics.median(peers),
        target="at least 0.5 of it", n=runs,
    )  # fmt: skip
    none: dict[str, Any] = {"peer": None, "peer_value": None, "n": runs}
    figure("move.query_p99_ratio", statistics.median(ratios), "× before", target="at most 2", **none)
    figure(
        "move.query_p99_before_ms", statistics.median(normal), "ms", target="none: for the picture", **none
    )
    figure("move.failed_queries", len(queries.failed), "queries", target="0", **none)


def main() -> None:
    options = arguments(__doc__ or "")
    rows, runs = (ROWS_QUICK, 1) if options.quick else (ROWS, 3)
    folder = Path(tempfile.mkdtemp(prefix="move-"))
    storage = f"dim = {DIM}\nfresh_rows_max = 100000000\ngraph_rows_min = {min(rows // 2, 10_000)}"
    try:
        with cluster(folder, 3, storage=storage, shard_count=1, replication=1) as daemons:
            measure(folder, daemons, rows, runs)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
