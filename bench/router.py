"""What a coordinator costs and how long it takes: `router.fanout_latency`, `router.cpu_ms_34`, `router.vs_grpc`.

fanout_latency: median time of a search, one at a time, through one of three nodes that hold a third of the shards each,
against one node that holds all of them: the same records, the same engine, one thread. Engine CPU per query is told for both.
cpu_ms_34: CPU of a coordinator's process per `recommend` that no cache answers: the user's record from one node, then a search
of 100 shards on 34 nodes, as with one replica in the region, over real peer links to a process that answers at once; k = 50 with
metadata, 8 at a time.
vs_grpc: searches per second, 32 at a time, one node that holds everything, against a grpcio aio server that echoes a reply of the
same size to a request of the same size, in turns. `vs_grpc_three`: the same through one of the three nodes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import trio

import gmco
from bench.grpc_echo import METHOD
from bench.harness import arguments, figure, interleaved, say
from bench.peers34 import hello
from node.config import Address
from node.main import GC_THRESHOLD
from node.peerlink import PeerLink
from node.remote import RemoteNode
from router import coverage, requests
from router.config import RouterConfig
from router.coordinator import Coordinator
from router.layout import Placement
from storage.view import ClassConstraint
from tests.processes.cluster import Daemon, cluster

DIM = 128
PATIENT = "[router]\ndeadline_ms = 30000\ntry_ms = 10000"
WORKERS = 32
NODES_34, SHARDS_34 = 34, 100


# -- latency and rate of real nodes ------------------------------------------------------------------------------------


def fill(daemons: Sequence[Daemon], items: int) -> None:
    rng = np.random.default_rng(1)
    with gmco.connect_blocking([daemons[0].url], timeout_s=120.0) as client:
        for start in range(0, items, 500):
            client.put_items(
                [
                    gmco.Item(i, rng.normal(size=DIM).astype(np.float32), (), {"title": f"item {i}"})
                    for i in range(start, start + 500)
                ]
            )


def median_ms(url: str, queries: int) -> float:
    rng = np.random.default_rng(2)
    took = []

    async def main() -> None:
        async with gmco.connect([url], timeout_s=60.0) as client:
            for _ in range(queries):
                query = rng.normal(size=DIM).astype(np.float32)
                began = time.perf_counter()
                answer = await client.search(query, 10, require_full=True)
                took.append(1000 * (time.perf_counter() - began))
                assert len(answer.hits) == 10

    trio.run(main)
    return statistics.median(took)


def engine_ms(daemons: Sequence[Daemon], queries: int) -> float:
    return sum(one.status()["counters"]["search"]["engine_cpu_ns"] for one in daemons) / queries / 1e6


def fanout_latency(one: list[Daemon], three: list[Daemon], quick: bool) -> None:
    queries, runs = (60, 3) if quick else (200, 7)
    for daemons in (one, three):
        median_ms(daemons[0].url, 50)
    before = engine_ms(one, 1), engine_ms(three, 1)
    ours, peer = interleaved(
        lambda: median_ms(three[0].url, queries), lambda: median_ms(one[0].url, queries), runs
    )
    engine = [(engine_ms(d, 1) - b) / queries / runs for d, b in zip((one, three), before, strict=True)]
    say(f"engine CPU per query: one node {engine[0]:.2f} ms, three together {engine[1]:.2f} ms")
    figure(
        "router.fanout_latency", ours, "ms, median of one search at a time", peer="one node that holds everything",
        peer_value=peer, target="<= 1.3 x", n=queries * runs,
    )  # fmt: skip


def searches_per_s(url: str, queries: int) -> float:
    left = iter(range(queries))

    async def main() -> float:
        async with gmco.connect([url], timeout_s=60.0) as client:

            async def work(seed: int) -> None:
                rng = np.random.default_rng(seed)
                for _ in left:
                    query = rng.normal(size=DIM).astype(np.float32)
                    assert len((await client.search(query, 10, timeout_s=30)).hits) == 10

            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for seed in range(WORKERS):
                    nursery.start_soon(work, seed)
            return queries / (time.perf_counter() - began)

    return trio.run(main)


def grpc_per_s(port: int, queries: int) -> float:
    import grpc

    request = b"q" * (4 * DIM + 100)
    left = iter(range(queries))

    async def main() -> float:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(METHOD)
            await call(request)

            async def work() -> None:
                for _ in left:
                    await call(request)

            began = time.perf_counter()
            await asyncio.gather(*[work() for _ in range(WORKERS)])
            return queries / (time.perf_counter() - began)

    return asyncio.run(main())


def vs_grpc(name: str, daemon: Daemon, port: int, quick: bool) -> None:
    queries, runs = (1_500, 3) if quick else (6_000, 5)
    searches_per_s(daemon.url, 500)
    ours, peer = interleaved(
        lambda: searches_per_s(daemon.url, queries), lambda: grpc_per_s(port, queries), runs
    )
    figure(
        name,
        ours,
        "searches/s",
        peer="grpcio aio that echoes",
        peer_value=peer,
        target="> 1 x",
        n=queries * runs,
    )


# -- a coordinator of 34 nodes -----------------------------------------------------------------------------------------


class Cluster34:
    """A `router.ports.Cluster` of links to `bench.peers34`; this node itself holds nothing."""

    local = "coordinator"
    shard_count = SHARDS_34

    def __init__(self, links: dict[str, PeerLink]) -> None:
        self._nodes: dict[str, Any] = {name: RemoteNode(name, link) for name, link in links.items()}
        names = list(links)
        self._placements = [
            Placement(
                shard=shard, epoch=1,
                voters=(names[shard % NODES_34],),
            )
            for shard in range(SHARDS_34)
        ]  # fmt: skip

    def node(self, name: str) -> Any:
        return self._nodes[name]

    def placement(self, shard: int) -> Placement:
        return self._placements[shard]

    def primary(self, shard: int) -> str:
        return self._placements[shard].primary

    def alive(self, name: str) -> bool:
        return name != self.local

    def avoid(self, name: str) -> bool:
        return False

    def lags_ms(self, name: str) -> dict[int, int]:
        return {}

    def distance(self, name: str) -> int:
        return coverage.SAME_ZONE

    def load_s(self, name: str) -> float:
        return 0.0

    async def caught_up(self, shards: Sequence[int], session: Any, timeout_s: float) -> dict[int, str]:
        await trio.lowlevel.checkpoint()
        return {}


async def coordinate(ports: list[int], queries: int, runs: int) -> tuple[list[float], dict[str, int]]:
    """ms of CPU per query, of each run."""
    async with trio.open_nursery() as nursery:
        links = {
            f"n{number}": PeerLink(lambda port=port: Address("127.0.0.1", port), hello("coordinator"))  # type: ignore[misc]
            for number, port in enumerate(ports)
        }
        for link in links.values():
            await nursery.start(link.run)
            await link.wait_connected()
        config = RouterConfig(deadline_ms=30_000, try_ms=10_000)
        coordinator = Coordinator(Cluster34(links), config, metric="cosine")
        request = requests.Recommend(
            user_id=7, k=50, constraint=ClassConstraint(), metadata=True, timeout_ms=None, session=()
        )
        spent = []

        async def work(left: Iterator[int]) -> None:
            for _ in left:
                reply = await coordinator.handle(request)
                assert reply["coverage"]["answered"] == SHARDS_34
                assert len(reply["hits"].ids) == 50

        for _ in range(runs + 1):
            before = time.process_time()
            left = iter(range(queries))
            async with trio.open_nursery() as workers:
                for _ in range(8):
                    workers.start_soon(work, left)
            spent.append(1000 * (time.process_time() - before) / queries)
        counters = coordinator.statistics()
        nursery.cancel_scope.cancel()
    return spent[1:], counters


def cpu_ms_34(quick: bool) -> None:
    queries, runs = (200, 3) if quick else (500, 9)
    with subprocess.Popen(
        [sys.executable, "-m", "bench.peers34", str(NODES_34)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as peers:
        assert peers.stdout is not None
        # As the daemon does when it starts.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        spent, counters = trio.run(coordinate, json.loads(peers.stdout.readline()), queries, runs)
        assert peers.stdin is not None
        peers.stdin.close()
    asked = queries * (runs + 1)
    say(f"messages per query {counters['messages'] / asked:.1f}, asked again {counters['more'] / asked:.3f}")
    figure(
        "router.cpu_ms_34", statistics.median(spent), "ms CPU of the coordinator per miss", peer=None, peer_value=None,
        target="<= 3", n=queries * runs,
    )  # fmt: skip


def main() -> None:
    options = arguments(__doc__ or "")
    wanted = options.only or ""
    if wanted in "router.cpu_ms_34":
        cpu_ms_34(options.quick)
    if wanted and wanted not in "router.fanout_latency router.vs_grpc router.vs_grpc_three":
        return
    items = 6_000 if options.quick else 24_000
    folder = Path(".bench/router")
    shutil.rmtree(folder, ignore_errors=True)
    storage = f'dim = {DIM}\nengine = "exact"\nthreads = 1'
    given: dict[str, Any] = {"storage": storage, "replication": 1, "shard_count": 12, "more": PATIENT}
    with ExitStack() as stack:
        one = stack.enter_context(cluster(folder / "one", 1, **given))
        three = stack.enter_context(cluster(folder / "three", 3, **given))
        fill(one, items)
        fill(three, items)
        if wanted in "router.fanout_latency":
            fanout_latency(one, three, options.quick)
        if wanted and wanted not in "router.vs_grpc_three":
            return
        size = 10 * (8 + 4 + 20) + 120
        echo = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "bench.grpc_echo", str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        assert echo.stdout is not None
        assert echo.stdin is not None
        port = int(echo.stdout.readline())
        vs_grpc("router.vs_grpc", one[0], port, options.quick)
        vs_grpc("router.vs_grpc_three", three[0], port, options.quick)
        echo.stdin.close()


if __name__ == "__main__":
    main()
