"""What this node says of itself by gossip, kept up to date: cold facts when they change, the hot vector once a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import trio

from node import facts
from node.blocking import RunnerStatistics
from node.facts import Health, Held, Load
from node.health import HealthWatch
from node.lane import SearchLane
from node.members import Gossip
from node.replicator import Replicator
from node.shard import ShardActor

EVERY_S = 1.0


class Publisher:
    """An actor. `on_health` is for a HealthWatch: illness is told at once."""

    # Whose lateness is told; set once both are there.
    health: HealthWatch | None = None

    def __init__(
        self,
        gossip: Gossip,
        shards: Mapping[int, ShardActor],
        replicators: Mapping[int, Replicator],
        lane: SearchLane,
        lane_thread: Callable[[], RunnerStatistics],
    ) -> None:
        self._gossip = gossip
        self._shards, self._replicators = shards, replicators
        self._lane, self._lane_thread = lane, lane_thread
        self._flags = Health(0)
        self._load = Load()
        self._lane_before = lane_thread()
        self._told = b""
        self._listed: list[int] = []
        self._shards_fact = b""

    def tell_shards(self) -> None:
        """Which replicas this node has, and which of them lead, from now on."""
        self._listed = sorted(self._shards)
        self._shards_fact = facts.pack_shards([Held(s, self._shards[s].leads) for s in self._listed])
        self._gossip.set_fact(facts.SHARDS, self._shards_fact)
        led = {s: reign.epoch for s in self._listed if (reign := self._shards[s].reign) is not None}
        self._gossip.set_fact(facts.PRIMARIES, facts.pack_primaries(led))
        self._tell_hot()

    def on_health(self, flags: Health, reasons: Sequence[str]) -> None:
        self._flags = flags
        self._tell_hot()
        self._gossip.set_fact(facts.DEGRADED, facts.pack_reason(reasons))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        task_status.started()
        while True:
            await trio.sleep(EVERY_S)
            self._measure()
            self._tell_hot()

    def _measure(self) -> None:
        before, after = self._lane_before, self._lane_thread()
        self._lane_before = after
        batches = after.calls - before.calls
        batch_ms = 1000 * (after.busy_s - before.busy_s) / batches if batches else 0.0
        late_s = self.health.take_lateness_s() if self.health is not None else 0.0
        self._load = Load(self._lane.waiting, batch_ms, 1000 * late_s)

    def _tell_hot(self) -> None:
        lags = [self._replicators[s].lag_ms if s in self._replicators else 0 for s in self._listed]
        value = facts.pack_hot(self._shards_fact, self._load, self._flags, lags)
        if value != self._told:
            self._told = value
            self._gossip.set_hot(value)
