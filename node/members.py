"""The cluster as this node knows it: static members, links to them, placements. Implements `router.ports.Cluster`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from node.local import LocalNode
from node.peerlink import PeerLink
from node.remote import RemoteNode
from node.replicator import Replicator
from router.layout import Placement
from router.ports import Node


class StaticCluster:
    """Members and placements from the config; a member is alive while our link to it is up."""

    def __init__(
        self,
        local: str,
        placements: Mapping[int, Placement],
        node: LocalNode,
        links: Mapping[str, PeerLink],
        replicators: Mapping[int, Replicator],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self.local = local
        self.shard_count = len(placements)
        self._placements = placements
        self._links = links
        self._replicators = replicators
        self._status = status
        self._nodes: dict[str, Node] = {local: node}
        self._nodes.update((name, RemoteNode(name, link)) for name, link in links.items())

    def node(self, name: str) -> Node:
        return self._nodes[name]

    def placement(self, shard: int) -> Placement:
        return self._placements[shard]

    def alive(self, name: str) -> bool:
        return name == self.local or self._links[name].connected

    def lag_ms(self, name: str, shard: int) -> int:
        """Known only of our own replicas until lag is gossiped."""
        replicator = self._replicators.get(shard) if name == self.local else None
        return 0 if replicator is None else replicator.age_ms

    def status(self) -> dict[str, Any]:
        return self._status()
