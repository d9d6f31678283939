"""One replica that answers late, never, with errors, or is stopped: nobody who asks notices (docs/fan-out.md)."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio

import gmco
from tests.processes.cluster import Daemon, free_ports, member, put_down
from tests.processes.faults import ReadFaults

DIM, ITEMS, K = 16, 300, 10
QUERIES, WORKERS = 400, 4
# The tries and hedges are as they are by default; only the deadline lets a stalled test machine finish.
ROUTER = "[router]\ndeadline_ms = 3000"
P99_S = 0.1
QUIET_S = 0.02


@contextlib.contextmanager
def three(folder: Path) -> Iterator[tuple[list[Daemon], ReadFaults]]:
    """Two replicas of each shard. What the first node lacks, the second and the third have; the third can be spoiled."""
    ports = free_ports(7)
    proxy = ReadFaults(ports[6], ports[4])
    daemons = [
        member(
            folder, f"node-{i + 1}", ports[2 * i : 2 * i + 2], ports[:1], bootstrap=3, replication=2, shard_count=6,
            storage=f'dim = {DIM}\nengine = "exact"',
            more=f'[gossip]\nudp = "off"\nadvertise = "127.0.0.1:{ports[6] if i == 2 else ports[2 * i]}"\n{ROUTER}',
        )
        for i in range(3)
    ]  # fmt: skip
    try:
        for daemon in daemons:
            daemon.start(wait=False)
        for daemon in daemons:
            daemon.wait_ready()
        yield daemons, proxy
    finally:
        put_down(daemons)
        proxy.close()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Daemon], ReadFaults]]:
    with three(tmp_path_factory.mktemp("slow")) as (daemons, proxy):
        rng = np.random.default_rng(2)
        with gmco.connect_blocking([daemons[0].url], timeout_s=30.0) as client:
            client.put_items([gmco.Item(i, rng.normal(size=DIM)) for i in range(ITEMS)], ack="all")
        yield daemons, proxy


def _p99_s(url: str, seed: int) -> float:
    """Of QUERIES, each of which must have a whole answer."""
    took: list[float] = []
    left = iter(range(QUERIES))

    async def work(client: gmco.Client, rng: np.random.Generator) -> None:
        for _ in left:
            began = time.perf_counter()
            answer = await client.search(rng.normal(size=DIM), K, require_full=True)
            took.append(time.perf_counter() - began)
            assert len(answer.hits) == K

    async def main() -> None:
        async with gmco.connect([url], timeout_s=30.0) as client, trio.open_nursery() as nursery:
            for worker in range(WORKERS):
                nursery.start_soon(work, client, np.random.default_rng([seed, worker]))

    trio.run(main)
    assert len(took) == QUERIES
    return sorted(took)[int(0.99 * QUERIES)]


@pytest.mark.parametrize("fault", ["slow", "hang", "error", "stopped"])
def test_a_bad_replica_costs_no_request_and_hardly_any_time(
    nodes: tuple[list[Daemon], ReadFaults], fault: str
) -> None:
    daemons, proxy = nodes
    well_s = _p99_s(daemons[0].url, 1)
    try:
        if fault == "stopped":
            daemons[2].signal(signal.SIGSTOP)
        else:
            proxy.fault = fault
        before = _troubles(daemons[0])
        said_before = len(daemons[0].log.read_text())
        try:
            bad_s = _p99_s(daemons[0].url, 2)
        except* gmco.GmcoError as group:
            if not _lost_the_good_one(daemons[0], said_before):
                raise
            pytest.skip(f"so busy is this machine that the good replica was taken for dead, too: {group}")
        assert _troubles(daemons[0]) > before, "the replica was asked, and it was bad"
    finally:
        proxy.fault = ""
        daemons[2].signal(signal.SIGCONT)
    _wait_until_asked_again(daemons[0])
    well_s = max(well_s, _p99_s(daemons[0].url, 3))
    said = f"{fault}: p99 {1000 * bad_s:.1f} ms, without it {1000 * well_s:.1f} ms"
    print(said)
    # A machine that is itself late gives its nodes' tries more time, for they take their peers' p95 as a measure; and there the
    # 99th of 100 is a matter of chance. The bound is for one that is not; on the other no request failed, which was shown above.
    assert bad_s < P99_S or well_s >= QUIET_S, said


def _lost_the_good_one(daemon: Daemon, said_before: int) -> bool:
    """Whether it has lost its link to the second node, or heard that it is dead."""
    lines = daemon.log.read_text()[said_before:].splitlines()
    return any(
        ("peer_down" in line and '"peer": "node-2"' in line)
        or ('"kind": "down"' in line and '"node": "node-2"' in line)
        for line in lines
    )


def _troubles(daemon: Daemon) -> int:
    """Tries that the third node failed, or that others took over."""
    counters = daemon.status()["counters"]
    bad = counters["peers"].get("node-3", {"errors": 0, "timeouts": 0})
    return int(bad["errors"] + bad["timeouts"] + counters["router"]["needless"])


def _wait_until_asked_again(daemon: Daemon) -> None:
    """The breaker tries the replica now and then, and closes."""
    deadline = time.monotonic() + 40
    with gmco.connect_blocking([daemon.url], timeout_s=30.0) as client:
        while True:
            for _ in range(20):
                client.search([1.0] * DIM, K)
            counters = client.status()["counters"]
            alive = all(one["state"] == "alive" and one["connected"] for one in client.status()["members"])
            if alive and not counters["peers"]["node-3"]["open"]:
                return
            assert time.monotonic() < deadline, counters["peers"]
            time.sleep(0.2)
