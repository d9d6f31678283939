"""`gossip.real_kill`: how soon everybody knows that one of five real nodes was killed while its host is up.

Five daemons on this machine, each of which knows one seed; `kill -9` of one of them; the time until the last of the other
four has the event `down` (by its own long-polled `events`, so the figure includes that answer's way). Then it is
started again, and the next one is killed once all five see each other. The p99 is of all (kill, observer) pairs.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from pathlib import Path

import trio

import gmco
from bench.harness import arguments, figure, say
from tests.processes.cluster import Daemon, cluster

NODES = 5
KILLS = 24
KILLS_QUICK = 4
GIVE_UP_S = 15.0


class Observer:
    """One node's events, read as they come."""

    def __init__(self, daemon: Daemon, victim: str) -> None:
        self.daemon, self.victim = daemon, victim
        self.told_at = 0.0
        self.told = trio.Event()
        self.false_deaths = 0
        self.ready = trio.Event()

    async def follow(self) -> None:
        async with gmco.connect([self.daemon.url], timeout_s=5.0) as client:
            after = (await client.events(0)).next
            self.ready.set()
            while True:
                found = await client.events(after, wait_s=20.0)
                now = time.monotonic()
                after = found.next
                for event in found.events:
                    if event["kind"] == "down" and event["node"] == self.victim:
                        self.told_at = self.told_at or now
                        self.told.set()
                    elif event["kind"] == "down":
                        self.false_deaths += 1


async def kill_one(daemons: list[Daemon], victim: Daemon) -> tuple[list[float], int]:
    """Seconds until each other node had the event, and deaths that were none."""
    observers = [Observer(daemon, victim.name) for daemon in daemons if daemon is not victim]
    async with trio.open_nursery() as nursery:
        for observer in observers:
            nursery.start_soon(observer.follow)
        for observer in observers:
            await observer.ready.wait()
        await trio.sleep(0.5)
        began = time.monotonic()
        victim.kill()
        with trio.fail_after(GIVE_UP_S):
            for observer in observers:
                await observer.told.wait()
        nursery.cancel_scope.cancel()
    return [one.told_at - began for one in observers], sum(one.false_deaths for one in observers)


def percentile(values: list[float], part: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def main() -> None:
    options = arguments(__doc__ or "")
    kills = KILLS_QUICK if options.quick else KILLS
    folder = Path(tempfile.mkdtemp(prefix="gossip-real-"))
    everybody = {f"node-{i + 1}": "alive" for i in range(NODES)}
    taken: list[float] = []
    false_deaths = 0
    try:
        with cluster(folder, NODES, replication=1, shard_count=5) as daemons:
            for number in range(kills):
                for daemon in daemons:
                    daemon.wait_states(everybody, 30)
                    daemon.wait_ready()
                victim = daemons[number % NODES]
                times, wrong = trio.run(kill_one, daemons, victim)
                taken += times
                false_deaths += wrong
                say(
                    f"kill {number + 1} of {kills}: {victim.name} known to all after {max(times) * 1000:.0f} ms"
                )
                victim.start()
    finally:
        shutil.rmtree(folder)
    common = {"peer": None, "peer_value": None, "n": kills}
    figure("gossip.real_kill", percentile(taken, 0.99), "s", target="p99 at most 1", **common)
    figure("gossip.real_kill.p50", percentile(taken, 0.5), "s", target="none: for the picture", **common)
    figure("gossip.real_kill.false_deaths", false_deaths, "deaths", target="0", **common)


if __name__ == "__main__":
    main()
