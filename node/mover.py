"""Carries out moves: the shell of node/move.py. An actor that looks after the shards which this node leads, step by step.

It keeps nothing on the disk: where a move stands is in the shard's placement and in what the other nodes hold, so whoever leads
after a crash goes on. Shards that have lost a voter come before those that are only balanced.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import structlog
import trio

from node import move
from node.absences import Absences, Lasting
from node.config import ClusterConfig
from node.duty import Duty
from node.failover import Failover
from node.holdings import Holdings
from node.links import Links
from node.members import Members
from node.move import Bring, BringWitness, Done, HandOver, Place, Sight, Wait
from node.peerlink import PeerError, RemoteError
from node.placement import Placement
from node.shard import ShardActor
from router import moving
from router.layout import Layout
from router.moving import stand_ins
from router.ports import NodeError
from storage.crash_points import reached
from storage.errors import StorageError

log = structlog.get_logger(__name__)

EVERY_S = 0.5
# While a shard that we lead is on its way.
MOVING_EVERY_S = 0.1
# The shards wait for each other here, and what was asked may be asked again.
CALL_S = 10.0
AGAIN_S = 1.0
# A witness that has been silent for so long, and is alive, may have lost its vote with its disk.
WITNESS_SILENT_S = 5.0
# Replicas that may come to a node at the same time, and go from it.
IN_MAX = 2
OUT_MAX = 2


class Mover:
    """layout: the one that this node goes by; None: it knows of none."""

    def __init__(
        self,
        holdings: Holdings,
        failover: Failover,
        members: Members,
        links: Links,
        layout: Callable[[], Layout | None],
        duty: Duty,
        config: ClusterConfig,
    ) -> None:
        self._holdings, self._failover = holdings, failover
        self._members, self._links, self._layout = members, links, layout
        self._duty, self._config = duty, config
        self._absences = Absences(config.rebuild_after_s)
        # By shard: that its preferred primary could lead.
        self._fit = Lasting()
        # By shard: when what failed is tried again.
        self._again_at: dict[int, float] = {}
        # By shard that we lead: its placement when we looked last.
        self._placed: dict[int, Placement] = {}
        # shard → node → replica id: brought by us, and in no placement yet.
        self._brought: dict[int, dict[str, int]] = {}
        # shard → node → id of the vote of a witness that was brought by us.
        self._votes: dict[int, dict[str, int]] = {}
        # shard → what is done or waited for, for people.
        self.stages: dict[int, str] = {}
        self.counters = {"brought": 0, "placed": 0, "handed_over": 0, "dismissed": 0, "failed": 0}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        task_status.started()
        while True:
            await self._look()
            for actor in sorted(self._holdings.actors.values(), key=self._whole):
                if not actor.leads:
                    self._brought.pop(actor.shard, None)
                    self._votes.pop(actor.shard, None)
                    self.stages.pop(actor.shard, None)
                    self._fit.see(actor.shard, False, 0.0)
                    self._placed.pop(actor.shard, None)
                    continue
                self._tell_points(actor)
                if trio.current_time() < self._again_at.get(actor.shard, 0.0):
                    continue
                try:
                    await self._step(actor)
                    await self._dismiss(actor)
                    await actor.purge()
                except (PeerError, NodeError, StorageError, KeyError, OSError) as error:
                    self.counters["failed"] += 1
                    self._again_at[actor.shard] = trio.current_time() + AGAIN_S
                    self._say(actor.shard, f"failed, tried again: {error}")
            await trio.sleep(MOVING_EVERY_S if self.stages else EVERY_S)

    def _say(self, shard: int, stage: str) -> None:
        if self.stages.get(shard, "") != stage:
            log.info("move", shard=shard, stage=stage)
        self.stages[shard] = stage

    def _alive(self, name: str) -> bool:
        known = self._members.get(name)
        return name == self._members.own.name or (known is not None and known.alive)

    async def _look(self) -> None:
        """Who is there; which rates of moves to here, and whether a drain of this node, are over."""
        layout, now = self._layout(), trio.current_time()
        names = [member.name for member in layout.members] if layout is not None else []
        for name in names:
            # Who is in maintenance will be back.
            self._absences.see(name, self._alive(name) or self._duty.maintained(name), now)
        self._absences.forget_but(names)
        member = self._members.own.name in names
        try:
            await self._duty.end_drain(member=member, holds=bool(self._holdings.actors))
        except OSError as error:
            log.warning("duty not written", reason=str(error))
        for shard, actor in self._holdings.actors.items():
            if self._members.own.name in actor.placement.names:
                self._holdings.fetcher.pace(shard, None)

    def _whole(self, actor: ShardActor) -> bool:
        return all(self._alive(name) for name in actor.placement.names)

    def _tell_points(self, actor: ShardActor) -> None:
        """For tests that crash us between two steps."""
        now = actor.placement
        before = self._placed.get(actor.shard, now)
        self._placed[actor.shard] = now
        if set(now.learners) - set(before.learners):
            reached("move.after_learner")
        if set(now.names) - set(before.names):
            reached("move.after_voter")
        if set(before.names) - set(now.names):
            reached("move.after_removed")

    def target(self, actor: ShardActor) -> Sequence[str]:
        """Who shall vote, the preferred primary first: by the layout, with others in the place of those who are gone."""
        layout = self._layout()
        if layout is None or actor.shard >= layout.shard_count:
            return ()
        voters = actor.placement.names
        absent = {name for name in layout.wished()[actor.shard] if self._absences.absent(name, voters)}

        def may(name: str) -> bool:
            return not self._absences.absent(name, ()) and (name in voters or not self._duty.rests(name))

        return stand_ins(layout, actor.shard, absent, may, actor.placement.holders)

    def witness(self, actor: ShardActor) -> str:
        """Who shall vote without data; empty: nobody."""
        layout = self._layout()
        if layout is None or actor.shard >= layout.shard_count:
            return ""

        def may(name: str) -> bool:
            return not self._absences.absent(name, (actor.placement.witness_name,))

        return moving.witness(layout, actor.shard, self.target(actor), may)

    def _witness_heard(self, actor: ShardActor) -> bool:
        reign = actor.reign
        since = max(reign.witness_at, reign.since) if reign is not None else 0.0
        return trio.current_time() - since < WITNESS_SILENT_S

    def _holds(self, shard: int, name: str) -> bool:
        """False only when it says what it holds, and that shard is not in it."""
        known = self._members.get(name)
        return known is None or not known.tells_shards or name in self._members.holders(shard)

    def _others(self, actor: ShardActor) -> int:
        """Replicas of the other shards that we lead on their way: they take what they lack from us."""
        return sum(
            len(one.placement.learners) + len(self._brought.get(one.shard, ()))
            for one in self._holdings.actors.values()
            if one.leads and one is not actor
        )

    def _first_is_fit(self, actor: ShardActor, target: Sequence[str]) -> bool:
        """Whether the preferred primary has been fit to lead for long enough. A stand-in is nobody's preference."""
        layout, first = self._layout(), target[0] if target else ""
        fit = (
            self._config.prefer_first
            and layout is not None
            and first not in ("", self._members.own.name)
            and first == layout.wished()[actor.shard][0]
            and self._alive(first)
            and actor.is_level(first)
            and not self._duty.rests(first)
        )
        return self._fit.see(actor.shard, fit, trio.current_time()) >= self._config.prefer_first_s

    async def _step(self, actor: ShardActor) -> None:
        target = self.target(actor)
        brought = self._brought.get(actor.shard, {})
        for name in set(brought).difference(target).union(set(brought).intersection(actor.placement.holders)):
            # It is not wished any more, so it may be dismissed; or has its place.
            del brought[name]
        sight = Sight(
            self._members.own.name,
            self._alive,
            actor.is_level,
            brought,
            partial(self._holds, actor.shard),
            self._duty.rests,
            self._first_is_fit(actor, target),
            self._votes.get(actor.shard, {}),
            self._witness_heard(actor),
        )
        if sight.witness_heard and actor.placement.witness is not None:
            self._votes.pop(actor.shard, None)
        step = move.next_step(actor.placement, target, sight, self.witness(actor))
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
        elif isinstance(step, BringWitness):
            self._say(actor.shard, f"asks {step.name} to witness")
            vote = await self._ask(actor, step.name, "witness")
            self._votes.setdefault(actor.shard, {})[step.name] = vote
        elif isinstance(step, HandOver):
            self._say(actor.shard, f"hands over to {step.to}")
            await self._failover.hand_over(actor, step.to)
            self.counters["handed_over"] += 1

    async def _ask(self, actor: ShardActor, name: str, op: str) -> int:
        """For a replica, or a vote: its id. Raises PeerError."""
        epoch, primary = actor.hint
        link = await self._links.add(name)
        id_ = await link.call(op, [actor.shard, epoch, primary], CALL_S)
        if type(id_) is not int:
            raise RemoteError("bad_answer", f"{name} sent what is no id: {id_!r:.40}")
        return id_

    async def _bring(self, actor: ShardActor, name: str) -> None:
        replica = await self._ask(actor, name, "bring")
        self.counters["brought"] += 1
        self._brought.setdefault(actor.shard, {})[name] = replica
        reached("move.after_bring")

    async def _dismiss(self, actor: ShardActor) -> None:
        """Who holds this shard and is in no placement any more may remove it, once that placement is on a quorum."""
        reign = actor.reign
        if reign is None or not actor.settled:
            return
        layout = self._layout()
        kept = set(actor.placement.holders) | set(self._brought.get(actor.shard, ()))
        if layout is not None and actor.shard < layout.shard_count:
            # It is to come back, once it has lasted.
            kept |= set(layout.wished()[actor.shard])
        for name in self._members.holders(actor.shard):
            if name != self._members.own.name and name not in kept:
                link = await self._links.add(name)
                # The epoch that was settled, whatever has become of it while we waited.
                if await link.call("dismiss", [actor.shard, reign.epoch], CALL_S):
                    self.counters["dismissed"] += 1
                    self._say(actor.shard, f"{name} has removed its replica")

    # -- what other primaries ask of us ---------------------------------------------------------------------------

    def handlers(self) -> dict[str, Callable[[str, Any], Awaitable[Any]]]:
        """By op."""
        return {"bring": self.on_bring, "dismiss": self.on_dismiss}

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
