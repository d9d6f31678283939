"""Whether this node should be sent requests: recovered, joined, warm, and not about to go (docs/http.md)."""

from __future__ import annotations

from collections.abc import Callable

from node.status import READY, Parts

# As for routing: who is further behind is not asked where another can be.
LEVEL_MS = 2_000


class Readiness:
    """`joined` and `warm` are kept once reached: a node whose peers have died is no worse to ask than before."""

    def __init__(self, parts: Callable[[], Parts], stopping: Callable[[], bool]) -> None:
        self._parts, self._stopping = parts, stopping
        self._joined = self._warm = False

    def reasons(self) -> list[str]:
        """Why not, as sentences; empty when it is ready."""
        parts = self._parts()
        found = ["stopping"] if self._stopping() else []
        if parts.state != READY:
            return [*found, f"recovered: {parts.state}"]
        self._joined = self._joined or self._has_company(parts)
        if not self._joined:
            found.append("joined: no other member of the layout is linked")
        if not self._warm:
            behind = self._behind(parts)
            self._warm = not behind
            if behind:
                shown = ", ".join(map(str, behind[:10]))
                found.append(f"warm: {len(behind)} replicas have not been level yet (shards {shown})")
        if parts.duty is not None and parts.duty.order:
            found.append(f"ordered to rest: {parts.duty.order}")
        return found

    @staticmethod
    def _has_company(parts: Parts) -> bool:
        others = [one.name for one in parts.layout.members if one.name != parts.name] if parts.layout else []
        return not others or any(parts.links.connected(name) for name in others)

    @staticmethod
    def _behind(parts: Parts) -> list[int]:
        behind = []
        for shard, actor in sorted(parts.shards.items()):
            follower = parts.replicators.get(shard)
            if actor.harmed or not (actor.leads or (follower is not None and follower.age_ms <= LEVEL_MS)):
                behind.append(shard)
        return behind
