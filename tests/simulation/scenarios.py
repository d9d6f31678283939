"""Questions asked of a simulated cluster, by tests and by `bench.gossip` alike: each returns numbers, and judges nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from gossip.effects import Event
from gossip.machine import Machine
from tests.simulation.cluster import Cluster, Host, Network
from tests.simulation.memberlist import Memberlist, make_memberlist, warm_memberlist

OURS, MEMBERLIST = "ours", "memberlist"


def warm_cluster(kind: str, count: int, seed: int, network: Network | None = None) -> Cluster:
    """A cluster in which everybody knows everybody, of our machines or of the model of memberlist."""
    if kind == OURS:
        cluster = Cluster(count, seed, network=network)
        cluster.warm()
    else:
        cluster = Cluster(count, seed, network=network, make=make_memberlist, measure_bytes=False)
        warm_memberlist(cluster)
    return cluster


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1e6) * len(ordered) // 1_000_000) - 1))]


@dataclass(frozen=True, slots=True)
class Detection:
    """delays_s: for each crash, until the last node knew of it. false_deaths: of nodes that lived."""

    delays_s: list[float]
    false_deaths: int
    unknown: int


def detection(
    kind: str, count: int, crashes: int, seed: int, *, loss: float = 0.0, gap_s: float = 1.0
) -> Detection:
    """Nodes vanish with their hosts, one in each `gap_s`; when does the last of the others know?"""
    cluster = warm_cluster(kind, count, seed, Network(loss=loss))
    cluster.run(3)
    died: dict[int, float] = {}
    known: dict[int, dict[int, float]] = {}
    false: set[tuple[int, int]] = set()

    def on_event(host: Host, event: Event, now: float) -> None:
        if event.kind == "down":
            if event.id in died:
                known.setdefault(event.id, {}).setdefault(host.index, now)
            else:
                false.add((event.id, event.incarnation))

    def kill(host: Host) -> None:
        died[host.id] = cluster.now
        cluster.crash(host)

    cluster.on_event = on_event
    random = Random(seed)
    victims = random.sample(cluster.hosts, crashes)
    for place, host in enumerate(victims):
        cluster.at(cluster.now + (place + random.random()) * gap_s, lambda host=host: kill(host))  # type: ignore[misc]
    cluster.run(cluster.now + crashes * gap_s + (12 if kind == OURS else 40))
    alive = {host.index for host in cluster.running}
    delays, unknown = [], 0
    for host in victims:
        at = {index: when for index, when in known.get(host.id, {}).items() if index in alive}
        unknown += len(alive) - len(at)
        if at:
            delays.append(max(at.values()) - died[host.id])
    return Detection(delays, len(false), unknown)


def fact_delay(kind: str, count: int, changes: int, seed: int, *, gap_s: float = 0.5) -> float:
    """Seconds until 99.99% of all (change, node) pairs are known; infinity when fewer ever are."""
    cluster = warm_cluster(kind, count, seed)
    cluster.run(3)
    changed: dict[tuple[int, bytes], float] = {}
    delays: list[float] = []

    def on_event(host: Host, event: Event, now: float) -> None:
        if event.kind == "fact":
            delays.append(now - changed[event.id, event.key])

    def change(host: Host, number: int) -> None:
        if isinstance(host.machine, Memberlist):
            changed[host.id, str(host.machine.meta + 1).encode()] = cluster.now
            cluster.call(host, lambda machine, now: machine.set_meta(now))  # type: ignore[no-any-return]
            return
        key = b"key-%d" % number
        changed[host.id, key] = cluster.now
        cluster.call(host, lambda machine, now: machine.set_fact(key, bytes(40), now))  # type: ignore[no-any-return]

    cluster.on_event = on_event
    random = Random(seed)
    for number, host in enumerate(random.sample(cluster.hosts, changes)):
        when = cluster.now + (number + random.random()) * gap_s
        cluster.at(when, lambda host=host, number=number: change(host, number))  # type: ignore[misc]
    cluster.run(cluster.now + changes * gap_s + 10)
    pairs = changes * (count - 1)
    needed = -(-9_999 * pairs // 10_000)
    return sorted(delays)[needed - 1] if len(delays) >= needed else float("inf")


def false_deaths(kind: str, count: int, node_hours: float, seed: int, *, loss: float) -> int:
    """How many (member, incarnation) were declared dead although all nodes lived."""
    cluster = warm_cluster(kind, count, seed, Network(loss=loss))
    dead: set[tuple[int, int]] = set()

    def on_event(host: Host, event: Event, now: float) -> None:
        if event.kind == "down":
            dead.add((event.id, event.incarnation))

    cluster.on_event = on_event
    cluster.run(node_hours * 3_600 / count)
    return len(dead)


def stall_deaths(kind: str, count: int, seconds: float, seed: int) -> int:
    """10% of the nodes stand still for 2 s of every 3 s: how many of the healthy ones are accused to death."""
    cluster = warm_cluster(kind, count, seed)
    cluster.run(2)
    stalling = {host.id for host in Random(seed).sample(cluster.hosts, count // 10)}
    dead: set[tuple[int, int]] = set()

    def on_event(host: Host, event: Event, now: float) -> None:
        if event.kind == "down" and event.id not in stalling:
            dead.add((event.id, event.incarnation))

    def stall(host: Host) -> None:
        cluster.stall(host, 2.0)
        cluster.at(cluster.now + 3.0, lambda: stall(host))

    cluster.on_event = on_event
    for host in cluster.hosts:
        if host.id in stalling:
            cluster.at(cluster.now + cluster.random.random() * 3, lambda host=host: stall(host))  # type: ignore[misc]
    cluster.run(cluster.now + seconds)
    return len(dead)


def traffic(count: int, seconds: float, seed: int, *, replicas: int = 0) -> float:
    """UDP payload bytes sent per node and second; with `replicas`, each node's hot vector changes once a second."""
    cluster = warm_cluster(OURS, count, seed)
    random = Random(seed)
    for host in cluster.hosts:
        for key, size in ((b"node", 120), (b"shards", 60)):
            _set(
                cluster,
                host,
                lambda machine, now, key=key, size=size: machine.set_fact(key, bytes(size), now),
            )
    cluster.run(20)  # until everybody has everything

    def refresh(host: Host) -> None:
        vector = random.randbytes(7 + replicas)
        _set(cluster, host, lambda machine, now: machine.set_hot(vector, now))
        cluster.at(cluster.now + 1.0, lambda: refresh(host))

    if replicas:
        for host in cluster.hosts:
            cluster.at(cluster.now + random.random(), lambda host=host: refresh(host))  # type: ignore[misc]
        cluster.run(cluster.now + 3)
    before, since = sum(host.bytes_out for host in cluster.hosts), cluster.now
    cluster.run(cluster.now + seconds)
    return (sum(host.bytes_out for host in cluster.hosts) - before) / count / (cluster.now - since)


def _set(cluster: Cluster, host: Host, what: Callable[[Machine, float], Any]) -> None:
    cluster.call(host, what)


@dataclass(frozen=True, slots=True)
class Heal:
    seconds: float
    false_deaths: int


def heal(count: int, split_s: float, seed: int, *, share: float = 0.5, limit_s: float = 120.0) -> Heal:
    """How long after a split's end everybody sees everybody alive, and how many deaths are declared meanwhile."""
    cluster = warm_cluster(OURS, count, seed)
    cluster.run(2)
    side = {host.id for host in cluster.hosts[: max(1, int(count * share))]}
    cluster.network.cut = lambda a, b: (a.id in side) != (b.id in side)
    cluster.run(cluster.now + split_s)
    dead: set[tuple[int, int]] = set()

    def on_event(host: Host, event: Event, now: float) -> None:
        if event.kind == "down":
            dead.add((event.id, event.incarnation))

    cluster.on_event = on_event
    cluster.network.cut = None
    since = cluster.now
    cluster.run_until(cluster.converged, since + limit_s)
    return Heal(cluster.now - since, len(dead))
