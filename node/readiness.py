"""Whether this node should be sent requests: recovered, joined, warm, and not about to go (docs/http.md)."""

from __future__ import annotations

from collections.abc import Callable

import trio

from node.shard import ShardActor
from node.status import READY, Parts

# As for routing: who is further behind is not asked where another can be.
LEVEL_MS = 2_000
# After a start nobody has told us yet who leads, and an election takes about two seconds: so long it is waited for.
LEADERLESS_S = 10.0


class Readiness:
    """`joined` and `warm` are kept once reached: a node whose peers have died is no worse to ask than before. A replica that
    has no primary to be level with does not count against `warm`, but it is looked at again when there is one.
    """

    def __init__(self, parts: Callable[[], Parts], stopping: Callable[[], bool]) -> None:
        self._parts, self._stopping = parts, stopping
        self._joined = self._warm = False
        # Shards here that nobody leads, and since when that was seen.
        self._leaderless: dict[int, float] = {}

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
            behind = self._without_leaderless(parts, behind)
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

    def _without_leaderless(self, parts: Parts, behind: list[int]) -> list[int]:
        """behind, but for replicas that nobody leads: after a power cut with too few disks back to elect anybody, all would
        else be unready for good, although reads go on.
        """
        now = trio.current_time()
        leaderless = {shard for shard in behind if self._is_leaderless(parts, parts.shards[shard])}
        self._leaderless = {shard: self._leaderless.get(shard, now) for shard in leaderless}
        return [shard for shard in behind if now - self._leaderless.get(shard, now) < LEADERLESS_S]

    @staticmethod
    def _is_leaderless(parts: Parts, actor: ShardActor) -> bool:
        """And it has data to answer with."""
        if actor.harmed or actor.blank:
            return False
        told = {actor.primary, parts.members.primary(actor.shard)} - {"", parts.name}
        return not any(parts.cluster is None or parts.cluster.alive(name) for name in told)
