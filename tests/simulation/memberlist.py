"""A model of HashiCorp memberlist with its LAN defaults, for figures side by side. Only what the figures need.

Written from its documented behaviour and parameters (`DefaultLANConfig`): probe 1 s, timeout 500 ms, 3 indirect checks and a TCP
fallback, gossip each 200 ms to 3 members, suspicion 4·max(1, log10 N)·1 s and at most 6 times that, shortened by confirmations as
in Lifeguard, local health up to 8, retransmission 4·⌈log10(N + 1)⌉, push/pull each 30 s, gossip to the dead for 30 s.
Messages are tuples; sizes are not modelled.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from gossip.effects import Event, Send
from gossip.messages import Address
from tests.simulation.cluster import Cluster, Host, Maker

ALIVE, SUSPECT, DEAD = 0, 1, 2
PROBE_S, TIMEOUT_S, INDIRECT, GOSSIP_S, GOSSIP_NODES = 1.0, 0.5, 3, 0.2, 3
PUSH_PULL_S, DEAD_GOSSIP_S, AWARENESS_MAX = 30.0, 30.0, 8
SUSPICION_MULT, SUSPICION_MAX_MULT, RETRANSMIT_MULT = 4, 6, 4
MESSAGES_PER_PACKET = 25


@dataclass(slots=True, eq=False)
class Node:
    id: int
    address: Address
    incarnation: int = 0
    state: int = ALIVE
    since: float = 0.0
    accusers: set[int] = field(default_factory=set)
    suspected_at: float = 0.0
    suspicion: int = 0
    meta: int = 0


@dataclass(slots=True, eq=False)
class Probe:
    node: Node
    acked: bool = False
    expected_nacks: int = 0
    nacks: int = 0


class Memberlist:
    """One node. `AnyMachine` of the simulator."""

    def __init__(self, host: Host, random: Random, now: float) -> None:
        self.id, self.address, self.random = host.id, host.address, random
        self.nodes: dict[int, Node] = {}
        self.incarnation, self.health, self.meta = 0, 0, 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._order: list[int] = []
        self._probes: dict[int, Probe] = {}
        self._relays: dict[int, tuple[Address, int]] = {}
        self._seq = 0
        self._queue: dict[tuple[Any, ...], list[Any]] = {}
        self._out: list[Any] = []

    # -- the simulator's side ---------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def know(self, hosts: Iterable[Host]) -> None:
        """A cluster that has been up for long: everybody is known."""
        self.nodes = {host.id: Node(host.id, host.address) for host in hosts if host.id != self.id}

    def start(self, seeds: Sequence[Address], now: float) -> list[Any]:
        self._at(now + self.random.random() * PROBE_S, self._tick)
        self._at(now + self.random.random() * GOSSIP_S, self._gossip)
        self._at(now + self.random.random() * self._push_pull_s(), self._push_pull)
        return []

    def on_timer(self, now: float) -> list[Any]:
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap))
        for _, _, do, args in due:
            do(*args, now)
        return self._take()

    def on_stream_failed(self, address: Address, refused: bool, now: float) -> list[Any]:
        return []

    def on_packet(self, sender: int, boot: int, source: Address, parts: Any, now: float) -> list[Any]:
        for part in parts:
            getattr(self, f"_on_{part[0]}")(source, now, *part[1:])
        return self._take()

    def _take(self) -> list[Any]:
        out, self._out = self._out, []
        return out

    def _at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, do, args))

    def _send(self, address: Address, *parts: tuple[Any, ...], stream: bool = False) -> None:
        ride = [] if stream else self._broadcasts(MESSAGES_PER_PACKET)
        self._out.append(Send(address, (*parts, *ride), stream))  # type: ignore[arg-type]

    # -- probing ----------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        self._at(now + PROBE_S * (1 + self.health), self._tick)
        for _ in range(len(self.nodes) + 1):
            if not self._order:
                self._order = list(self.nodes)
                self.random.shuffle(self._order)
                if not self._order:
                    return
            node = self.nodes[self._order.pop()]
            if node.state != DEAD:
                self._probe(node, now)
                return

    def _probe(self, node: Node, now: float) -> None:
        self._seq += 1
        probe = self._probes[self._seq] = Probe(node)
        slow = 1 + self.health
        suspect = [("suspect", node.id, node.incarnation, self.id)] if node.state == SUSPECT else []
        self._send(node.address, ("ping", self._seq, node.id), *suspect)
        self._at(now + TIMEOUT_S * slow, self._indirect, self._seq, probe)
        self._at(now + PROBE_S * slow, self._end, self._seq, probe)

    def _indirect(self, seq: int, probe: Probe, now: float) -> None:
        if probe.acked:
            return
        for relay in self._pick(INDIRECT, lambda node: node.state == ALIVE and node is not probe.node):
            probe.expected_nacks += 1
            self._send(relay.address, ("relay", seq, probe.node.id, probe.node.address))
        self._send(probe.node.address, ("ping", seq, probe.node.id), stream=True)

    def _end(self, seq: int, probe: Probe, now: float) -> None:
        del self._probes[seq]
        if probe.acked:
            self.health = max(0, self.health - 1)
            return
        missing = probe.expected_nacks - probe.nacks if probe.expected_nacks else 1
        self.health = min(AWARENESS_MAX - 1, self.health + missing)
        self._on_suspect(self.address, now, probe.node.id, probe.node.incarnation, self.id)

    def _on_ping(self, source: Address, now: float, seq: int, target: int) -> None:
        if target == self.id:
            self._send(source, ("ack", seq))

    def _on_ack(self, source: Address, now: float, seq: int) -> None:
        if seq in self._relays:
            address, theirs = self._relays.pop(seq)
            self._send(address, ("ack", theirs))
        elif seq in self._probes:
            self._probes[seq].acked = True

    def _on_relay(self, source: Address, now: float, seq: int, target: int, address: Address) -> None:
        self._seq += 1
        self._relays[self._seq] = (source, seq)
        self._send(address, ("ping", self._seq, target))
        self._at(now + TIMEOUT_S, self._nack, self._seq)

    def _nack(self, seq: int, now: float) -> None:
        if seq in self._relays:
            address, theirs = self._relays.pop(seq)
            self._send(address, ("nack", theirs))

    def _on_nack(self, source: Address, now: float, seq: int) -> None:
        if seq in self._probes:
            self._probes[seq].nacks += 1

    # -- states -----------------------------------------------------------------------------------------------------

    def _on_alive(self, source: Address, now: float, id: int, incarnation: int, meta: int) -> None:
        node = self.nodes.get(id)
        if id == self.id or node is None or incarnation <= node.incarnation:
            return
        if meta != node.meta:
            self._event("fact", node, now, meta)
        if node.state == DEAD:
            self._event("returned", node, now)
        node.incarnation, node.state, node.since, node.meta = incarnation, ALIVE, now, meta
        node.accusers.clear()
        node.suspicion += 1
        self._broadcast(("alive", id, incarnation, meta))

    def _on_suspect(self, source: Address, now: float, id: int, incarnation: int, by: int) -> None:
        if id == self.id:
            self._refute(incarnation)
            return
        node = self.nodes.get(id)
        if node is None or incarnation < node.incarnation or node.state == DEAD:
            return
        if node.state == SUSPECT:
            if by not in node.accusers and len(node.accusers) <= self._confirmations():
                node.accusers.add(by)
                self._broadcast(("suspect", id, incarnation, by))
                self._at(self._suspicion_ends(node), self._expire, node, node.suspicion)
            return
        node.incarnation, node.state, node.since, node.suspected_at = incarnation, SUSPECT, now, now
        node.accusers = {by}
        node.suspicion += 1
        self._event("suspected", node, now)
        self._broadcast(("suspect", id, incarnation, by))
        self._at(self._suspicion_ends(node), self._expire, node, node.suspicion)

    def _confirmations(self) -> int:
        return max(0, min(SUSPICION_MULT - 2, len(self.nodes) + 1 - 2))

    def _suspicion_ends(self, node: Node) -> float:
        low = SUSPICION_MULT * max(1.0, math.log10(max(1.0, len(self.nodes) + 1))) * PROBE_S
        high, k, c = SUSPICION_MAX_MULT * low, self._confirmations(), len(node.accusers) - 1
        lasts = low if k < 1 else max(low, high - (high - low) * math.log(c + 1) / math.log(k + 1))
        return node.suspected_at + lasts

    def _expire(self, node: Node, suspicion: int, now: float) -> None:
        if node.state == SUSPECT and node.suspicion == suspicion and now >= self._suspicion_ends(node) - 1e-9:
            self._on_dead(self.address, now, node.id, node.incarnation)

    def _on_dead(self, source: Address, now: float, id: int, incarnation: int) -> None:
        if id == self.id:
            self._refute(incarnation)
            return
        node = self.nodes.get(id)
        if node is None or incarnation < node.incarnation or node.state == DEAD:
            return
        node.incarnation, node.state, node.since = incarnation, DEAD, now
        node.suspicion += 1
        self._event("down", node, now)
        self._broadcast(("dead", id, incarnation))

    def _refute(self, incarnation: int) -> None:
        if incarnation >= self.incarnation:
            self.incarnation = incarnation + 1
            self.health = min(AWARENESS_MAX - 1, self.health + 1)
            self._broadcast(("alive", self.id, self.incarnation, self.meta))

    def set_meta(self, now: float) -> list[Any]:
        """A changed fact, as far as memberlist has such a thing: the node's meta data."""
        self.meta += 1
        self.incarnation += 1
        self._broadcast(("alive", self.id, self.incarnation, self.meta))
        return self._take()

    def _event(self, kind: Any, node: Node, now: float, meta: int = 0) -> None:
        self._out.append(
            Event(kind, node.id, now, 1, node.incarnation, key=str(meta).encode() if meta else b"")
        )

    # -- gossip -----------------------------------------------------------------------------------------------------

    def _broadcast(self, message: tuple[Any, ...]) -> None:
        self._queue.pop((message[1],), None)
        self._queue[(message[1],)] = [message, 0]

    def _broadcasts(self, count: int) -> list[tuple[Any, ...]]:
        limit = RETRANSMIT_MULT * math.ceil(math.log10(len(self.nodes) + 2))
        chosen = sorted(self._queue.items(), key=lambda item: item[1][1])[:count]
        for key, entry in chosen:
            entry[1] += 1
            if entry[1] >= limit:
                del self._queue[key]
        return [entry[0] for _, entry in chosen]

    def _gossip(self, now: float) -> None:
        self._at(now + GOSSIP_S, self._gossip)
        if not self._queue:
            return
        for node in self._pick(
            GOSSIP_NODES, lambda one: one.state != DEAD or now - one.since < DEAD_GOSSIP_S
        ):
            if self._queue:
                self._send(node.address)

    def _push_pull_s(self) -> float:
        size = len(self.nodes) + 1
        return PUSH_PULL_S if size <= 32 else PUSH_PULL_S * (math.ceil(math.log2(size) - math.log2(32)) + 1)

    def _push_pull(self, now: float) -> None:
        self._at(now + self._push_pull_s(), self._push_pull)
        for node in self._pick(1, lambda one: one.state == ALIVE):
            self._send(node.address, ("state", self._all(), True), stream=True)

    def _all(self) -> list[tuple[int, int, int, int]]:
        mine = (self.id, self.incarnation, ALIVE, self.meta)
        return [mine, *((n.id, n.incarnation, n.state, n.meta) for n in self.nodes.values())]

    def _on_state(
        self, source: Address, now: float, all_: list[tuple[int, int, int, int]], answer: bool
    ) -> None:
        for id, incarnation, state, meta in all_:
            if state == ALIVE:
                self._on_alive(source, now, id, incarnation, meta)
            else:  # a dead one in a push/pull counts as suspected
                self._on_suspect(source, now, id, incarnation, self.id)
        if answer:
            self._send(source, ("state", self._all(), False), stream=True)

    def _pick(self, count: int, fits: Callable[[Node], bool]) -> list[Node]:
        nodes = list(self.nodes.values())
        chosen: list[Node] = []
        for _ in range(3 * len(nodes)):
            node = nodes[int(self.random.random() * len(nodes))]
            if node not in chosen and fits(node):
                chosen.append(node)
                if len(chosen) == count:
                    break
        return chosen


def warm_memberlist(cluster: Cluster) -> None:
    """All hosts of a cluster made with `make_memberlist`, each knowing all others."""
    for host in cluster.hosts:
        cluster.start(host)
        assert isinstance(host.machine, Memberlist)
        host.machine.know(cluster.hosts)


make_memberlist: Maker = Memberlist
