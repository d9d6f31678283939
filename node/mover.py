"""Carries out moves: the shell of node/move.py. An actor that looks after the shards which this node leads, step by step.

It keeps nothing on the disk: where a move stands is in the shard's placement and in what the other nodes hold, so whoever leads
after a crash goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import structlog
import trio

from node import move
from node.failover import Failover
from node.holdings import Holdings
from node.links import Links
from node.members import Members
from node.move import Bring, Done, HandOver, Place, Sight, Wait
from node.peerlink import PeerError, RemoteError
from node.shard import ShardActor
from router.ports import NodeError
from storage.errors import StorageError

log = structlog.get_logger(__name__)

EVERY_S = 0.5
CALL_S = 30.0
# Replicas that may come to a node at the same time, and go from it.
IN_MAX = 2
OUT_MAX = 2


class Mover:
    """wish: the voters that the layout wants for a shard, the preferred primary first; empty when it does not say."""

    def __init__(
        self,
        holdings: Holdings,
        failover: Failover,
        members: Members,
        links: Links,
        wish: Callable[[int], Sequence[str]],
    ) -> None:
        self._holdings, self._failover = holdings, failover
        self._members, self._links, self._wish = members, links, wish
        # shard → node → replica id: brought by us, and in no placement yet.
        self._brought: dict[int, dict[str, int]] = {}
        # shard → what is done or waited for, for people.
        self.stages: dict[int, str] = {}
        self.counters = {"brought": 0, "placed": 0, "handed_over": 0, "dismissed": 0, "failed": 0}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        task_status.started()
        while True:
            for actor in list(self._holdings.actors.values()):
                if not actor.leads:
                    self._brought.pop(actor.shard, None)
                    self.stages.pop(actor.shard, None)
                    continue
                try:
                    await self._step(actor)
                    await self._dismiss(actor)
                    await actor.purge()
                except (PeerError, NodeError, StorageError, KeyError, OSError) as error:
                    self.counters["failed"] += 1
                    self._say(actor.shard, f"failed, tried again: {error}")
            await trio.sleep(EVERY_S)

    def _say(self, shard: int, stage: str) -> None:
        if self.stages.get(shard, "") != stage:
            log.info("move", shard=shard, stage=stage)
        self.stages[shard] = stage

    def _alive(self, name: str) -> bool:
        known = self._members.get(name)
        return name == self._members.own.name or (known is not None and known.alive)

    def _holds(self, shard: int, name: str) -> bool:
        """False only when it says what it holds, and that shard is not in it."""
        known = self._members.get(name)
        return known is None or not known.tells_shards or any(one.shard == shard for one in known.held)

    def _others(self, actor: ShardActor) -> int:
        """Learners of the other shards that we lead: they take what they lack from us."""
        return sum(
            len(one.placement.learners)
            for one in self._holdings.actors.values()
            if one.leads and one is not actor
        )

    async def _step(self, actor: ShardActor) -> None:
        sight = Sight(
            self._members.own.name,
            self._alive,
            actor.is_level,
            self._brought.get(actor.shard, {}),
            partial(self._holds, actor.shard),
        )
        step = move.next_step(actor.placement, self._wish(actor.shard), sight)
        if isinstance(step, Done):
            self.stages.pop(actor.shard, None)
        elif isinstance(step, Wait):
            self._say(actor.shard, step.why)
        elif isinstance(step, Bring):
            if self._others(actor) >= OUT_MAX:
                self._say(actor.shard, "waits for other moves from this node")
                return
            self._say(actor.shard, f"asks {step.name} for a replica")
            await self._bring(actor, step.name)
        elif isinstance(step, Place):
            if self._failover.change(actor, step.placement):
                self.counters["placed"] += 1
                self._say(actor.shard, step.why)
                self._brought.pop(actor.shard, None)
        elif isinstance(step, HandOver):
            self._say(actor.shard, f"hands over to {step.to}")
            await self._failover.hand_over(actor, step.to)
            self.counters["handed_over"] += 1

    async def _bring(self, actor: ShardActor, name: str) -> None:
        epoch, primary = actor.hint
        link = await self._links.add(name)
        replica = await link.call("bring", [actor.shard, epoch, primary], CALL_S)
        if type(replica) is not int:
            raise RemoteError("bad_answer", f"{name} sent what is no replica's id: {replica!r:.40}")
        self.counters["brought"] += 1
        self._brought.setdefault(actor.shard, {})[name] = replica

    async def _dismiss(self, actor: ShardActor) -> None:
        """Who holds this shard and is in no placement any more may remove it, once that placement is on a quorum."""
        if not actor.settled:
            return
        kept = set(actor.placement.holders) | set(self._brought.get(actor.shard, ()))
        for known in self._members.others():
            if known.alive and known.name not in kept and any(one.shard == actor.shard for one in known.held):
                link = await self._links.add(known.name)
                assert actor.reign is not None
                if await link.call("dismiss", [actor.shard, actor.reign.epoch], CALL_S):
                    self.counters["dismissed"] += 1
                    self._say(actor.shard, f"{known.name} has removed its replica")

    # -- what other primaries ask of us ---------------------------------------------------------------------------

    async def on_bring(self, peer: str, body: Any) -> int:
        """The peer op `bring`: [shard, epoch, primary] → the id of the replica that is here now. Raises RemoteError."""
        shard, epoch, primary = body
        held = self._holdings
        coming = [actor for number, actor in held.actors.items() if number != shard and self._comes(actor)]
        if shard not in held.actors and len(coming) >= IN_MAX:
            raise RemoteError("busy", f"{len(coming)} other replicas are coming to this node; later")
        try:
            actor = await held.bring(int(shard), self._failover)
        except StorageError as error:
            raise RemoteError(error.code, str(error)) from error
        actor.hear_of(int(epoch), str(primary))
        return actor.replica.replica_id

    def _comes(self, actor: ShardActor) -> bool:
        name = self._members.own.name
        learns = actor.placement.learners and name in dict(actor.placement.learners)
        return bool(learns) or (name not in actor.placement.names)

    async def on_dismiss(self, peer: str, body: Any) -> bool:
        """The peer op `dismiss`: [shard, epoch]: the primary of that epoch does not count on our replica. Whether it is gone; not
        while it may hold what somebody was told is written, and nobody else has (`tail-kept`)."""
        shard, epoch = body
        actor = self._holdings.actors.get(shard)
        if actor is None:
            return True
        replica = actor.replica
        # What our log has that the primary's lacks is known, and put aside to be offered, once it ends in that primary's epoch.
        follows = replica.position.epoch == epoch or not replica.position.sequence
        if actor.leads or not follows or replica.side_files():
            return False
        log.info("dismissed", shard=shard, by=peer, epoch=epoch)
        await self._holdings.drop(shard)
        return True
