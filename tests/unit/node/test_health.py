"""Health and what is told of it: a hang is seen within its limit, a stall of ours is not held against the disk."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import trio
import trio.testing

from node import facts
from node.blocking import DedicatedThread, RunnerStatistics
from node.facts import Health, unpack_hot
from node.health import HealthWatch, Watched
from node.publishing import Publisher
from tests.unit.node.gossips import Hub
from tests.unit.node.peers import on_trio


class Disk:
    """A runner whose calls a test begins and ends."""

    def __init__(self) -> None:
        self.calls = self.waiting = 0

    def begin(self) -> None:
        self.calls += 1
        self.waiting += 1

    def end(self) -> None:
        self.waiting -= 1

    def statistics(self) -> RunnerStatistics:
        return RunnerStatistics(name="disk", calls=self.calls, waiting=self.waiting, busy_s=0.0)


class Told:
    def __init__(self) -> None:
        self.changes: list[tuple[Health, list[str]]] = []

    def __call__(self, flags: Health, reasons: Sequence[str]) -> None:
        self.changes.append((flags, list(reasons)))


def ticks(watch: HealthWatch, start: float, end: float) -> None:
    for tick in range(round(start * 10), round(end * 10)):
        watch.look(tick / 10, 0.0)


def test_a_call_that_hangs_is_told_and_so_is_its_return() -> None:
    disk, told = Disk(), Told()
    watch = HealthWatch(lambda: [Watched(Health.DISK, "the log of shard 3", disk.statistics)], told)
    ticks(watch, 0, 5)
    disk.begin()
    ticks(watch, 5, 7)
    assert not told.changes
    ticks(watch, 7, 7.3)
    assert told.changes == [(Health.DISK, ["the log of shard 3 has not answered for 2 s"])]
    ticks(watch, 7.3, 20)
    assert len(told.changes) == 1
    disk.end()
    ticks(watch, 20, 20.2)
    assert told.changes[1:] == [(Health(0), [])]


def test_a_busy_disk_that_gets_on_is_well() -> None:
    disk, told = Disk(), Told()
    watch = HealthWatch(lambda: [Watched(Health.DISK, "a disk", disk.statistics)], told)
    disk.begin()
    for tick in range(200):
        disk.begin()
        disk.end()  # always one waiting, always one done
        watch.look(tick / 10, 0.0)
    assert not told.changes


def test_a_stall_of_ours_is_not_the_disks_but_several_are_ours() -> None:
    disk, told = Disk(), Told()
    watch = HealthWatch(lambda: [Watched(Health.DISK, "a disk", disk.statistics)], told)
    disk.begin()
    ticks(watch, 0, 1)
    watch.look(6.0, 5.0)  # the process was stopped for five seconds
    assert not told.changes
    disk.end()
    watch.look(6.1, 0.0)
    watch.look(7.0, 0.9)
    (change,) = told.changes
    assert change[0] == Health.LATE
    ticks(watch, 7.1, 18)
    assert told.changes[-1] == (Health(0), [])
    assert watch.take_lateness_s() == 5.0
    assert watch.take_lateness_s() == 0.0


class IdleLane:
    waiting = 7


def test_illness_is_gossiped_at_once_and_health_only_when_it_changes() -> None:
    async def test() -> None:
        hub = Hub()
        gossip = hub.join(1)
        disk = Disk()
        publisher = Publisher(gossip, {}, {}, IdleLane(), disk.statistics)  # type: ignore[arg-type]
        watch = HealthWatch(lambda: [Watched(Health.DISK, "a disk", disk.statistics)], publisher.on_health)
        publisher.health = watch
        publisher.tell_shards()
        async with trio.open_nursery() as nursery:
            await nursery.start(publisher.run)
            await nursery.start(watch.run)
            await trio.sleep(3.0)
            sets = gossip.hot_sets
            assert unpack_hot(gossip.hot(1)).load.queued > 6  # type: ignore[union-attr]
            await trio.sleep(10)
            assert gossip.hot_sets == sets, "nothing has changed"
            disk.begin()
            await trio.sleep(2.35)
            assert unpack_hot(gossip.hot(1)).health == Health.DISK  # type: ignore[union-attr]
            assert b"a disk has not answered" in gossip.facts(1)[facts.DEGRADED]
            disk.end()
            await trio.sleep(0.15)
            assert unpack_hot(gossip.hot(1)).health == Health(0)  # type: ignore[union-attr]
            assert facts.DEGRADED not in gossip.facts(1)
            nursery.cancel_scope.cancel()

    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


@on_trio
async def test_a_real_thread_that_is_blocked_is_seen() -> None:
    told, gate = Told(), threading.Event()
    async with DedicatedThread("wal") as thread, trio.open_nursery() as nursery:
        watch = HealthWatch(lambda: [Watched(Health.DISK, "the log", thread.statistics)], told)
        await nursery.start(watch.run)
        nursery.start_soon(thread, gate.wait)
        with trio.fail_after(5):
            while not told.changes:
                await trio.sleep(0.02)
            gate.set()
            while told.changes[-1][0]:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert [flags for flags, _ in told.changes] == [Health.DISK, Health(0)]
