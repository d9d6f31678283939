"""Many at once, and again and again: a thousand connections when a primary dies, one node that is restarted fifty times."""

from __future__ import annotations

import contextlib
import math
import os
import random
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

import gmco
from tests.processes.cluster import Daemon, cluster
from tests.processes.ledger import DIM, TIMEOUT_S, Writer, wait_alike

SETTLE_S = 60.0
# Clients that connect at one moment.
DOORS = 50


@contextlib.contextmanager
def room_for(files: int) -> Iterator[None]:
    """This process may open so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, files) if hard == resource.RLIM_INFINITY else min(max(soft, files), hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass(slots=True)
class Crowd:
    """Each has an item of its own and writes it in order, so that for each there is one truth."""

    urls: list[str]
    count: int
    pause_s: float
    stop: bool = False
    sent: dict[int, int] = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    # When the node was killed; how long after that each was first answered.
    killed_at: float = math.inf
    waits: dict[int, float] = field(default_factory=dict)

    async def sit(self, number: int, doors: trio.CapacityLimiter) -> None:
        turned = self.urls[number % len(self.urls) :] + self.urls[: number % len(self.urls)]
        rng = random.Random(number)
        async with contextlib.AsyncExitStack() as stack:
            async with doors:
                client = await stack.enter_async_context(gmco.connect(turned, timeout_s=SETTLE_S))
                await client.ping()
            while not self.stop:
                value = self.sent[number] = self.sent.get(number, 0) + 1
                item = gmco.Item(number, [rng.uniform(-1, 1) for _ in range(DIM)], (), {"value": value})
                try:
                    await client.put_items([item], ack="quorum")
                    self.acknowledged[number] = value
                    if trio.current_time() > self.killed_at:
                        self.waits.setdefault(number, trio.current_time() - self.killed_at)
                except gmco.GmcoError as error:
                    self.failed.append(error.code)
                await trio.sleep(self.pause_s * rng.uniform(0.5, 1.5))

    async def all_have_written(self) -> None:
        """Each has been answered something that it has sent from now on."""
        before = {number: self.sent.get(number, 0) for number in range(1, self.count + 1)}
        with trio.fail_after(2 * SETTLE_S):
            while any(self.acknowledged.get(number, 0) <= least for number, least in before.items()):
                await trio.sleep(0.05)


async def a_primary_dies(daemons: list[Daemon], crowd: Crowd) -> None:
    doors = trio.CapacityLimiter(DOORS)
    async with trio.open_nursery() as nursery:
        for number in range(1, crowd.count + 1):
            nursery.start_soon(crowd.sit, number, doors)
        await crowd.all_have_written()
        daemons[0].kill()
        crowd.killed_at = trio.current_time()
        await crowd.all_have_written()
        waits = sorted(crowd.waits.values())
        print(
            f"after the kill half of {crowd.count} went on within {waits[len(waits) // 2]:.1f} s, 99 of 100 within "
            f"{waits[len(waits) * 99 // 100]:.1f} s, all within {waits[-1]:.1f} s"
        )
        daemons[0].start(wait=False)
        await crowd.all_have_written()
        crowd.stop = True


def connections(folder: Path, count: int, pause_s: float) -> None:
    with room_for(2 * count + 256), cluster(folder, 3, storage=f"dim = {DIM}") as daemons:
        urls = [daemon.url for daemon in daemons]
        crowd = Crowd(urls, count, pause_s)
        trio.run(a_primary_dies, daemons, crowd)
        daemons[0].wait_ready()
        with gmco.connect_blocking(urls, timeout_s=TIMEOUT_S) as client:
            wait_alike(client)
            ids = list(crowd.acknowledged)
            for first in range(0, count, 200):
                part = ids[first : first + 200]
                for number, found in zip(part, client.get_items(part), strict=True):
                    assert found is not None, (
                        f"{number} is gone, {crowd.acknowledged[number]} was acknowledged"
                    )
                    value = found.metadata["value"]
                    assert crowd.acknowledged[number] <= value <= crowd.sent[number]
        print(f"{sum(crowd.sent.values())} writes, {len(crowd.failed)} failed: {sorted(set(crowd.failed))}")
        assert len(crowd.failed) <= count // 10, "a client asks elsewhere, and a write waits for the election"


def test_a_hundred_connections_outlive_a_primary(tmp_path: Path) -> None:
    connections(tmp_path, 100, 0.5)


@pytest.mark.soak
def test_a_thousand_connections_outlive_a_primary(tmp_path: Path) -> None:
    connections(tmp_path, 1_000, 4.0)


def restarts(folder: Path, count: int, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    with cluster(
        folder, 3, storage=f"dim = {DIM}\nwal_segment_bytes = 65536\ncheckpoint_bytes = 65536"
    ) as daemons:
        stop = threading.Event()
        urls = [daemon.url for daemon in daemons]
        writers = [Writer(urls, number, stop, ["primary", "quorum"]) for number in range(1, 4)]
        for writer in writers:
            writer.start()
        victim = rng.choice(daemons)
        try:
            for _ in range(count):
                time.sleep(rng.uniform(0.0, 0.5))
                if rng.random() < 0.5:
                    victim.kill()
                else:
                    assert victim.stop() == 0, victim.tail()
                victim.start()
        finally:
            stop.set()
            for writer in writers:
                writer.join(2 * TIMEOUT_S)
        with gmco.connect_blocking(urls, timeout_s=TIMEOUT_S) as client:
            wait_alike(client)
            for writer in writers:
                writer.check_end(client)
        problems = [problem for writer in writers for problem in writer.problems]
        assert not problems, "\n".join(problems)
        written = sum(writer.writes for writer in writers)
        print(
            f"{count} restarts, {written} writes, {sum(writer.failed_writes for writer in writers)} failed, "
            f"longest gap {max(max(writer.gaps) for writer in writers):.1f} s"
        )
        assert written > 10 * count, "the writers hardly wrote"


def test_a_node_that_is_restarted_in_a_row_loses_nothing(tmp_path: Path) -> None:
    restarts(tmp_path, 3, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))


@pytest.mark.soak
def test_a_node_that_is_restarted_fifty_times_in_a_row_loses_nothing(tmp_path: Path) -> None:
    restarts(tmp_path, 50, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))
