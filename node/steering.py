"""What operators ask about ownership: who holds and leads which shard, and that another one shall lead it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from random import SystemRandom
from typing import Any

import structlog
import trio

from node.asking import ask_all
from node.election import forced_above
from node.failover import Failover
from node.links import Links
from node.members import Members
from node.peerlink import PeerError, RemoteError
from node.repairer import Repairer
from node.shard import ShardActor
from node.witness import Vote
from router.errors import RequestError, known
from router.operating import FailOver, Repair
from router.ports import NodeError
from storage.records import Version

log = structlog.get_logger(__name__)

TIMEOUT_S = 10.0
Handler = Callable[[str, Any], Awaitable[dict[str, Any]]]
CALL_S = 2.0


class Steering:
    """Answers `shards`, `failover` and `repair` for the whole cluster; peers ask each other by the op of the same name."""

    def __init__(
        self,
        members: Members,
        links: Links,
        shards: Mapping[int, ShardActor],
        failover: Failover,
        repairer: Repairer,
        votes: Mapping[int, Vote] = {},  # read only
    ) -> None:
        """votes: of the shards of which this node is a witness."""
        self._members, self._links, self._repairer = members, links, repairer
        self._shards, self._failover, self._votes = shards, failover, votes

    async def apply(self, request: FailOver) -> dict[str, Any]:
        """Raises RequestError."""
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else TIMEOUT_S
        node = request.to if request.force else await self._leader(request.shard)
        body = [request.shard, request.to, request.force, request.confirmed, int(timeout_s * 1000)]
        return await self._ask(node, "failover", self.handle_peer, body, timeout_s)

    async def repair(self, request: Repair) -> dict[str, Any]:
        """By whoever leads the shard. Raises RequestError."""
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else TIMEOUT_S
        body = [request.shard, int(timeout_s * 1000)]
        node = await self._leader(request.shard)
        return await self._ask(node, "repair", self._repairer.on_repair, body, timeout_s)

    async def _ask(
        self, node: str, op: str, here: Handler, body: list[Any], timeout_s: float
    ) -> dict[str, Any]:
        try:
            if node == self._members.own.name:
                return await here(node, body)
            link = await self._links.add(node)
            found: dict[str, Any] = await link.call(op, body, timeout_s + CALL_S)
        except (RemoteError, NodeError) as error:
            raise RequestError(known(error.code), error.message) from error
        except PeerError as error:
            raise RequestError("unavailable", f"{node} cannot be reached: {error}") from error
        return found

    async def _leader(self, shard: int) -> str:
        """Who leads it now."""
        likely = self._members.primary(shard)
        for name in sorted(self._members.alive_names, key=lambda one: one != likely):
            ends = await self._end_of(name, shard)
            if ends is not None and ends["leads"]:
                return name
        raise RequestError(
            "no_primary",
            f"nobody leads shard {shard} now: an election needs a majority of its voters; `gmco shards` shows who is there, and "
            "--force with --to does without a majority and may lose writes",
            "shard",
        )

    async def _end_of(self, name: str, shard: int) -> dict[str, Any] | None:
        """Where that node's log of the shard ends; None when it cannot be asked, or has none."""
        try:
            if name == self._members.own.name:
                return self.tell_end(name, [shard, 0])
            found: dict[str, Any] | None = await self._links[name].call("shard_end", [shard, 0], CALL_S)
            return found
        except (PeerError, KeyError):
            return None

    def tell_end(self, _peer: str, body: Any) -> dict[str, Any] | None:
        """The peer op `shard_end`: [shard, …] → {epoch, sequence, promised, leads} or nil. A witness has no log, so it ends at
        (0, 0); but its vote has seen epochs."""
        shard, *_ = body
        actor, vote = self._shards.get(shard), self._votes.get(shard)
        elections = [one.election for one in (actor, vote) if one is not None]
        if not elections:
            return None
        position = Version(0, 0) if actor is None else actor.replica.position
        return {
            "epoch": position.epoch,
            "sequence": position.sequence,
            "promised": max(max(one.seen, one.bound) for one in elections),
            "leads": actor is not None and actor.leads,
        }

    async def handle_peer(self, _peer: str, body: Any) -> dict[str, Any]:
        """The peer op `failover`: [shard, to, force, confirmed, time left ms]. Raises NodeError."""
        shard, to, force, confirmed, left_ms = body
        actor = self._shards.get(shard)
        if actor is None:
            raise NodeError("bad_request", f"shard {shard} has no replica on {self._members.own.name}")
        if force:
            return await self._force(actor, confirmed, left_ms / 1000)
        before = actor.primary
        if to == before:
            return {"shard": shard, "from": before, "to": to, "epoch": actor.election.epoch}
        await self._failover.hand_over(actor, to or self._failover.successor(actor), left_ms / 1000)
        epoch, primary = actor.hint
        return {"shard": shard, "from": before, "to": primary, "epoch": epoch}

    async def _force(self, actor: ShardActor, confirmed: bool, left_s: float) -> dict[str, Any]:
        """Says what may be lost; does it only when that was confirmed."""
        own = self._members.own.name
        # Everybody, not only whom our placement names: a replica that was left behind does not know who came after it.
        placement = actor.placement
        asked = {own, *placement.holders, *placement.electors, *self._members.alive_names}
        ends = await ask_all(asked, lambda name: self._end_of(name, actor.shard))
        mine = ends[own]
        assert mine is not None
        silent = sorted(name for name in placement.holders if ends[name] is None)
        ahead = sorted(
            name
            for name, end in ends.items()
            if end is not None and (end["epoch"], end["sequence"]) > (mine["epoch"], mine["sequence"])
        )
        found: dict[str, Any] = {
            "shard": actor.shard,
            "to": own,
            "end": [mine["epoch"], mine["sequence"]],
            "silent": silent,
            "ahead": {name: [end["epoch"], end["sequence"]] for name in ahead if (end := ends[name])},
            "forced": False,
        }
        if any(end is not None and end["leads"] for end in ends.values()):
            raise NodeError(
                "refused", f"shard {actor.shard} has a primary; --force is for a shard that can get none"
            )
        if not confirmed:
            return found
        if ahead:
            raise NodeError(
                "refused",
                f"{', '.join(ahead)} has more of shard {actor.shard} than {own}: force it --to there",
            )
        epoch = forced_above(max(end["promised"] for end in ends.values() if end is not None), SystemRandom())
        log.error("forced", shard=actor.shard, epoch=epoch, silent=silent)
        self._failover.force(actor, epoch)
        with trio.move_on_after(left_s):
            while not actor.leads:
                await actor.changed()
        return found | {"forced": actor.leads, "epoch": epoch}

    async def shards(self) -> dict[str, Any]:
        """Every replica of every alive node, as that node tells it; `silent`: nodes that did not answer."""

        async def ask(name: str) -> list[dict[str, Any]] | None:
            try:
                told = await self._links[name].call("status", [0], CALL_S)
                return [{**row, "node": name} for row in told["shards"]]
            except (PeerError, KeyError, TypeError):
                return None

        told = await ask_all(
            (name for name in self._members.alive_names if name != self._members.own.name), ask
        )
        rows = [row for rows in told.values() for row in rows or ()]
        return {"replicas": rows, "silent": [name for name, rows in told.items() if rows is None]}
