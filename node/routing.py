"""The cluster as the coordinator sees it: who holds and leads each shard as nodes tell it; until then, the first placements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gossip.messages import State
from node.facts import Health
from node.lane import BATCH_MAX
from node.links import Links
from node.local import LocalNode
from node.members import Members
from node.remote import RemoteNode
from node.replicator import Replicator
from node.shard import ShardActor
from router.coverage import FAR, HERE, SAME_REGION, SAME_ZONE
from router.layout import Placement
from router.ports import Node
from router.requests import Session


class GossipCluster:
    """Implements `router.ports.Cluster`."""

    def __init__(
        self,
        members: Members,
        placements: Mapping[int, Placement],
        node: LocalNode,
        links: Links,
        shards: Mapping[int, ShardActor],
        replicators: Mapping[int, Replicator],
        health: Callable[[], Health],
        rests: Callable[[str], bool],
    ) -> None:
        """rests: whether a node is to be left in peace where another can be asked."""
        self.local = members.own.name
        self.shard_count = len(placements)
        self._members = members
        self._placements = placements
        self._links = links
        self._shards, self._replicators = shards, replicators
        self._health = health
        self._rests = rests
        self._seen: dict[int, Placement] = {}
        self._generation = -1
        self._local_node = node
        self._remote: dict[str, RemoteNode] = {}

    def node(self, name: str) -> Node:
        if name == self.local:
            return self._local_node
        remote = self._remote.get(name)
        if remote is None:
            remote = self._remote[name] = RemoteNode(name, self._links[name])
        return remote

    def placement(self, shard: int) -> Placement:
        """Who holds it, as they say: the wished ones first. While nobody has said so, those who are wished."""
        generation = self._members.generation
        if generation != self._generation:
            self._generation = generation
            self._seen.clear()
        seen = self._seen.get(shard)
        if seen is None:
            wished = self._placements[shard]
            holders = self._members.holders(shard)
            names = [name for name in wished.voters if name in holders]
            names += [name for name in holders if name not in names]
            seen = replace(wished, voters=tuple(names)) if names else wished
            self._seen[shard] = seen
        return seen

    def primary(self, shard: int) -> str:
        actor = self._shards.get(shard)
        known = actor.primary if actor is not None else ""
        # Of our own replica's voters we hear directly; before any of that, by the first placements.
        return known or self._members.primary(shard) or self._placements[shard].primary

    def alive(self, name: str) -> bool:
        """Gossip does not call it dead, and our link to it is up: either alone may be the first to know."""
        if name == self.local:
            return True
        known = self._members.get(name)
        return known is not None and known.alive and self._links.connected(name)

    def avoid(self, name: str) -> bool:
        if self._rests(name):
            return True
        if name == self.local:
            return bool(self._health())
        known = self._members.get(name)
        return known is not None and (known.state is State.SUSPECT or bool(known.health))

    def distance(self, name: str) -> int:
        """By what nodes say of where they are. Of one that has said nothing yet: far."""
        if name == self.local:
            return HERE
        known = self._members.get(name)
        if known is None or known.fact is None or known.fact.region != self._members.own.region:
            return FAR
        return SAME_ZONE if known.fact.zone == self._members.own.zone else SAME_REGION

    def load_s(self, name: str) -> float:
        known = self._members.get(name) if name != self.local else None
        if known is None or known.hot is None:
            return 0.0
        load = known.hot.load
        return load.queued * load.batch_ms / BATCH_MAX / 1000

    async def caught_up(self, shards: Sequence[int], session: Session, timeout_s: float) -> dict[int, str]:
        return await self._local_node.caught_up(shards, session, timeout_s)

    def lags_ms(self, name: str) -> Mapping[int, int]:
        """Of our own replicas exactly, of others' as they gossip it."""
        if name == self.local:
            return {shard: one.lag_ms for shard, one in self._replicators.items()}
        known = self._members.get(name)
        return {} if known is None else known.lags_ms
