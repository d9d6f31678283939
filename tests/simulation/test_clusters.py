"""Whole clusters in virtual time: what happens to a cluster may take the wrong turn only in ways that heal by themselves.

A failing test prints its seed; the same seed repeats the run exactly.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from random import Random

import pytest

from gossip.effects import Event
from gossip.machine import Machine
from gossip.messages import Address, State
from tests.simulation import scenarios
from tests.simulation.cluster import Cluster, Host, Network
from tests.simulation.scenarios import OURS


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """A simulated cluster is many objects that all live on: looking for garbage among them takes half of the time."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def machine(host: Host) -> Machine:
    assert isinstance(host.machine, Machine)
    return host.machine


def started(count: int, seed: int, **options: object) -> Cluster:
    cluster = Cluster(count, seed, **options)  # type: ignore[arg-type]
    cluster.start_all(within_s=1.0)
    cluster.run(1.0)
    cluster.run_until(cluster.converged, 30)
    return cluster


@pytest.mark.parametrize("seed", range(5))
def test_all_find_each_other_through_one_seed(seed: int) -> None:
    cluster = Cluster(30, seed, network=Network(loss=0.1))
    cluster.start_all(seeds=1, within_s=0.5)
    cluster.run(0.5)
    assert cluster.run_until(cluster.converged, 20) < 10


def test_islands_that_began_with_other_seeds_grow_together() -> None:
    cluster = Cluster(6, 1)
    for place, host in enumerate(cluster.hosts):
        cluster.start(host, [cluster.hosts[place // 3 * 3].address])
    cluster.run(20)
    assert not cluster.converged()  # nobody knows a seed of the other island
    machine(cluster.hosts[0]).set_seeds([cluster.hosts[5].address])
    cluster.run_until(cluster.converged, 40)


def test_a_seed_that_starts_last_is_found() -> None:
    cluster = Cluster(4, 2)
    seed = cluster.hosts[0]
    for host in cluster.hosts[1:]:
        cluster.start(host, [seed.address])
    cluster.run(60)
    cluster.start(seed, [])
    cluster.run_until(cluster.converged, 75)


def test_a_leave_is_known_at_once_and_is_no_death() -> None:
    events: list[Event] = []
    cluster = started(20, 3)
    cluster.on_event = lambda host, event, now: events.append(event)
    leaver = cluster.hosts[7]
    since = cluster.now
    cluster.call(leaver, lambda one, now: one.leave(now))  # type: ignore[no-any-return]
    cluster.at(cluster.now + 0.2, lambda: cluster.crash(leaver))
    gone = cluster.run_until(lambda: cluster.all_see(leaver, State.LEFT), since + 2)
    assert gone - since <= 0.5
    cluster.run(cluster.now + 20)
    assert {event.kind for event in events if event.id == leaver.id} == {"left"}
    cluster.restart(leaver, [cluster.hosts[0].address])
    cluster.run_until(cluster.converged, cluster.now + 5)


def test_a_restart_supersedes_the_old_process_also_on_another_address() -> None:
    events: list[Event] = []
    cluster = started(10, 4)
    cluster.on_event = lambda host, event, now: events.append(event)
    host = cluster.hosts[4]
    cluster.call(host, lambda one, now: one.set_fact(b"name", b"old", now))  # type: ignore[no-any-return]
    cluster.run(cluster.now + 2)
    cluster.crash(host, dark=False)
    cluster.restart(host, [cluster.hosts[0].address], address=Address("10.9.9.9", 7500))
    cluster.run_until(cluster.converged, cluster.now + 5)
    assert all(b"name" not in machine(other).facts(host.id) for other in cluster.running)
    assert "down" not in {event.kind for event in events}


def test_two_processes_with_one_id_the_lower_boot_is_told_to_stop() -> None:
    cluster = started(5, 5)
    old = cluster.hosts[2]
    double = Host(len(cluster.hosts), old.id, Address("10.7.7.7", 7402), boot=old.boot + 1)
    cluster.hosts.append(double)
    cluster._by_address[double.address] = double
    cluster.start(double, [cluster.hosts[0].address])
    cluster.run(cluster.now + 10)
    assert old.superseded
    assert not double.superseded


def test_a_changed_address_is_followed_while_the_process_lives() -> None:
    cluster = started(8, 6)
    host = cluster.hosts[3]
    del cluster._by_address[host.address]
    host.address = Address("10.8.8.8", 7402)
    cluster._by_address[host.address] = host
    cluster.call(host, lambda one, now: one.set_address(host.address, now))  # type: ignore[no-any-return]
    cluster.run_until(cluster.converged, cluster.now + 5)


@pytest.mark.parametrize("seed", range(3))
def test_a_link_cut_in_one_direction_kills_nobody(seed: int) -> None:
    dead: list[Event] = []
    cluster = scenarios.warm_cluster(OURS, 20, seed)
    a, b = cluster.hosts[2], cluster.hosts[9]
    cluster.network.cut = lambda source, target: source is a and target is b
    cluster.on_event = lambda host, event, now: dead.append(event) if event.kind == "down" else None
    cluster.run(120)
    assert dead == []


@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_hears_but_cannot_speak_is_dead_to_all(seed: int) -> None:
    cluster = scenarios.warm_cluster(OURS, 20, seed)
    mute = cluster.hosts[2]
    cluster.network.cut = lambda source, target: source is mute
    cluster.run_until(
        lambda: all(cluster.state(h, mute) == State.DOWN for h in cluster.running if h is not mute), 10
    )
    cluster.network.cut = None
    cluster.run_until(cluster.converged, cluster.now + 10)


@pytest.mark.parametrize(("count", "share"), [(2, 0.5), (3, 0.34), (25, 0.2), (40, 0.5)])
def test_a_split_of_any_length_heals_by_itself_without_false_deaths(count: int, share: float) -> None:
    for split_s in (5.0, 90.0, 600.0 if count < 10 else 120.0):
        healed = scenarios.heal(count, split_s, seed=int(split_s), share=share)
        assert healed.seconds <= 10, f"split of {split_s} s"
        assert healed.false_deaths == 0


def test_stalled_nodes_accuse_no_healthy_one() -> None:
    assert scenarios.stall_deaths(OURS, 30, 60, seed=3) == 0


def test_a_clock_that_leaps_makes_its_node_doubt_itself_not_others() -> None:
    dead: list[Event] = []
    cluster = scenarios.warm_cluster(OURS, 20, 8)
    cluster.on_event = lambda host, event, now: dead.append(event) if event.kind == "down" else None
    for place in range(10):
        cluster.run(cluster.now + 2)
        cluster.jump_clock(cluster.hosts[place], 3_600.0)
    cluster.run(cluster.now + 10)
    assert dead == []
    assert machine(cluster.hosts[0]).statistics()["stalls"] >= 1


def test_hot_vectors_keep_their_budget_and_cold_facts_get_through_beside_them() -> None:
    """64 shards on each of 60 nodes, all changing each second: more than the budget."""
    cluster = scenarios.warm_cluster(OURS, 60, 9)
    random = Random(9)
    delays: list[float] = []
    asked: dict[bytes, float] = {}

    def refresh(host: Host) -> None:
        vector = random.randbytes(71)
        cluster.call(host, lambda one, now: one.set_hot(vector, now))  # type: ignore[no-any-return]
        cluster.at(cluster.now + 1.0, lambda: refresh(host))

    for host in cluster.hosts:
        cluster.at(cluster.now + random.random(), lambda host=host: refresh(host))  # type: ignore[misc]
    cluster.run(5)
    before = sum(host.bytes_out for host in cluster.hosts)
    cluster.on_event = lambda host, event, now: (
        delays.append(now - asked[event.key]) if event.kind == "fact" else None
    )
    for number in range(5):
        key = b"k%d" % number
        asked[key] = cluster.now
        host = cluster.hosts[number]
        cluster.call(host, lambda one, now, key=key: one.set_fact(key, bytes(200), now))  # type: ignore[misc,no-any-return]
        cluster.run(cluster.now + 2)
    assert (sum(host.bytes_out for host in cluster.hosts) - before) / 60 / 10 <= 15_500
    assert len(delays) == 5 * 59
    assert max(delays) <= 1.2


@pytest.mark.parametrize("seed", range(8))
def test_after_any_trouble_the_cluster_agrees_again(seed: int) -> None:
    """Loss, repetition, crashes, restarts, moves, stalls, splits, all at once; then quiet."""
    random = Random(seed)
    cluster = Cluster(15, seed, network=Network(loss=0.1, duplicate=0.05), through_codec=True)
    cluster.start_all(seeds=2, within_s=2.0)
    cluster.run(5)
    seeds = [host.address for host in cluster.hosts[:2]]
    for _ in range(40):
        host = random.choice(cluster.hosts)
        trouble = random.randrange(6)
        if trouble == 0 and host.running:
            cluster.crash(host, dark=random.random() < 0.5)
        elif trouble == 1 and not host.running:
            moved = Address(f"10.5.{random.randrange(250)}.{random.randrange(250)}", 7402)
            keep = host.address in seeds or moved in cluster._by_address or random.random() < 0.5
            cluster.restart(host, seeds, address=None if keep else moved)
        elif trouble == 2 and host.running:
            cluster.stall(host, random.uniform(0.2, 6.0))
        elif trouble == 3:
            side = {one.id for one in random.sample(cluster.hosts, random.randrange(1, 14))}
            cluster.network.cut = lambda a, b, side=side: (a.id in side) != (b.id in side)  # type: ignore[misc]
        elif trouble == 4:
            cluster.network.cut = None
        else:
            cluster.network.loss = random.choice([0.0, 0.1, 0.4])
        cluster.run(cluster.now + random.uniform(0.1, 4.0))
    cluster.network.cut, cluster.network.loss = None, 0.0
    for host in cluster.hosts:
        if not host.running:
            cluster.restart(host, seeds)
    quiet = cluster.now
    cluster.run_until(cluster.converged, quiet + 20)
    roots = {machine(host)._items.hashes() for host in cluster.hosts}
    if len(roots) > 1:
        cluster.run_until(
            lambda: len({machine(host)._items.hashes() for host in cluster.hosts}) == 1, quiet + 40
        )


def test_a_seed_repeats_a_run_exactly() -> None:
    def story(seed: int) -> list[tuple[int, str, int, float]]:
        told: list[tuple[int, str, int, float]] = []
        cluster = Cluster(12, seed, network=Network(loss=0.2, duplicate=0.1))
        cluster.on_event = lambda host, event, now: told.append((host.index, event.kind, event.id, now))
        cluster.start_all(within_s=1.0)
        cluster.run(5)
        cluster.crash(cluster.hosts[3])
        cluster.run(12)
        return told

    assert story(42) == story(42) != story(43)


def test_a_thousand_nodes_see_a_crash_in_time_and_the_core_is_cheap() -> None:
    """One crash among 1,000, and what an event costs. The bound has room for a busy machine; bench.gossip has the figures."""
    cluster = scenarios.warm_cluster(OURS, 1_000, 1)
    cluster.run(1)
    victim = cluster.hosts[500]
    handled, since = cluster.handled, cluster.now
    began = time.process_time()
    cluster.crash(victim)
    cluster.run_until(lambda: cluster.all_see(victim, State.DOWN), 10)
    spent_us = (time.process_time() - began) / (cluster.handled - handled) * 1e6
    assert cluster.now - since <= 4.5
    print(f"{spent_us:.1f} us per event, the simulated network included")
    assert spent_us < 100


@pytest.mark.soak
@pytest.mark.parametrize(("loss", "allowed"), [(0.2, 0), (0.3, 10)])
def test_hardly_anybody_is_taken_for_dead_in_a_thousand_node_hours(loss: float, allowed: int) -> None:
    assert sum(scenarios.false_deaths(OURS, 100, 100, seed, loss=loss) for seed in range(10)) <= allowed
