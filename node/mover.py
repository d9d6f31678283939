"""Carries out moves: the shell of node/move.py. An actor that looks after the shards which this node leads, step by step.

It keeps nothing on the disk: where a move stands is in the shard's placement and in what the other nodes hold, so whoever leads
after a crash goes on. Shards that have lost a voter come before those that are only balanced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import structlog
import trio

from gossip.effects import Event
from node import facts, move
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
# While a shard that we lead is on its way. Most of its steps follow from news, which wake us.
MOVING_EVERY_S = 0.1
# However much news there is, of one shard and of all.
REST_S = 0.01
LOOK_REST_S = 0.05
# Replicas are opened one after the other there; and what was asked may be asked again.
CALL_S = 10.0
AGAIN_S = 1.0
# So long after an epoch of ours has begun we look at each change whether it has settled. One whose second disk is dead may be
# unsettled for days, and every commit is a change.
SETTLING_S = 5.0
# A witness that has been silent for so long, and is alive, may have lost its vote with its disk.
WITNESS_SILENT_S = 5.0
# Replicas that may go from a node at the same time; two may come to one (node/arrivals.py).
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
        # Shards for which something is being carried out; whom each of them is asking for a replica.
        self._busy: set[int] = set()
        self._bringing: dict[int, str] = {}
        # By shard: when tombstones are looked at again.
        self._purge_at: dict[int, float] = {}
        self._look_at = self._looked_at = 0.0
        self._changed: set[int] = set()
        # By shard: until when the epoch of its changed placement is expected.
        self._opening: dict[int, float] = {}
        self._woken = trio.Event()
        # shard → what is done or waited for, for people.
        self.stages: dict[int, str] = {}
        self.counters = {"brought": 0, "placed": 0, "handed_over": 0, "dismissed": 0, "failed": 0}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        # After a crash: whoever carried something out is gone.
        self._busy.clear()
        self._bringing.clear()
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                everything = trio.current_time() >= self._look_at
                if everything:
                    self._looked_at = trio.current_time()
                    self._look_at = self._looked_at + (MOVING_EVERY_S if self.stages else EVERY_S)
                    await self._look()
                changed, self._changed = self._changed, set()
                # Decided one after the other, in this order, and without a break: so the bounds hold. Carried out side by side.
                for actor in sorted(self._holdings.actors.values(), key=self._whole):
                    if everything or actor.shard in changed:
                        self._look_after(actor, nursery, strays=everything)
                await self._news()
        raise AssertionError("unreachable")

    def _look_after(self, actor: ShardActor, nursery: trio.Nursery, *, strays: bool) -> None:
        """What is to be done for that shard now, by a task of its own: who does not answer holds up nobody else's.

        strays: also of those who hold it for nothing; one that is not ready to let go is asked again, and not at once."""
        shard, now = actor.shard, trio.current_time()
        if not actor.leads:
            # Not while it only changes from one epoch of ours to the next.
            if now >= self._opening.get(shard, 0.0):
                self._forget(shard)
            return
        if shard in self._busy:
            return
        self._tell_points(actor)
        if now < self._again_at.get(shard, 0.0):
            return
        step = self._decide(actor)
        gone, purge = self._strays(actor) if strays else [], now >= self._purge_at.get(shard, 0.0)
        if step is None and not gone and not purge:
            return
        self._busy.add(shard)
        if isinstance(step, Bring):
            self._bringing[shard] = step.name
        nursery.start_soon(self._carry_out, actor, step, gone, purge)

    async def _carry_out(
        self,
        actor: ShardActor,
        step: Bring | BringWitness | HandOver | None,
        gone: Sequence[str],
        purge: bool,
    ) -> None:
        try:
            if isinstance(step, Bring):
                await self._bring(actor, step.name)
            elif isinstance(step, BringWitness):
                vote = await self._ask(actor, step.name, "witness")
                self._votes.setdefault(actor.shard, {})[step.name] = vote
            elif isinstance(step, HandOver):
                await self._failover.hand_over(actor, step.to)
                self.counters["handed_over"] += 1
            await self._dismiss(actor, gone)
            if purge:
                self._purge_at[actor.shard] = trio.current_time() + EVERY_S
                await actor.purge()
        except (PeerError, NodeError, StorageError, KeyError, OSError) as error:
            self.counters["failed"] += 1
            self._again_at[actor.shard] = trio.current_time() + AGAIN_S
            self._say(actor.shard, f"failed, tried again: {error}")
        finally:
            self._busy.discard(actor.shard)
            self._bringing.pop(actor.shard, None)
            self._wake_for(actor.shard)

    def wake(self) -> None:
        """The layout has changed, or who is there: every shard is looked at."""
        self._look_at = min(self._look_at, self._looked_at + LOOK_REST_S)
        self._woken.set()

    def hear(self, event: Event) -> None:
        """Of gossip."""
        if event.kind != "fact" or event.key in (facts.SHARDS, facts.DUTY):
            self.wake()

    def _wake_for(self, shard: int) -> None:
        self._changed.add(shard)
        self._woken.set()

    async def _news(self) -> None:
        """Returns when there is something to look at: woken, a replica on its way has moved, or it is time anyway."""
        self._woken = trio.Event()
        if trio.current_time() < self._look_at and not self._changed:
            with trio.move_on_at(self._look_at):
                async with trio.open_nursery() as nursery:
                    for actor in self._holdings.actors.values():
                        if self._expects_news(actor):
                            nursery.start_soon(self._wake_when_changed, actor)
                    await self._woken.wait()
                    nursery.cancel_scope.cancel()
        await trio.sleep(REST_S)

    def _expects_news(self, actor: ShardActor) -> bool:
        now = trio.current_time()
        if now < self._opening.get(actor.shard, 0.0):
            return True
        if not actor.leads or actor.placement.learners:
            return actor.leads
        young = actor.reign is not None and now - actor.reign.since < SETTLING_S
        return not actor.settled and (young or actor.shard in self.stages)

    async def _wake_when_changed(self, actor: ShardActor) -> None:
        await actor.changed()
        self._wake_for(actor.shard)

    def _forget(self, shard: int) -> None:
        """Of a shard that we lead no more."""
        self._brought.pop(shard, None)
        self._votes.pop(shard, None)
        self.stages.pop(shard, None)
        self._fit.see(shard, False, 0.0)
        self._placed.pop(shard, None)
        self._purge_at.pop(shard, None)
        self._opening.pop(shard, None)

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
            if not actor.primary and not actor.placement.names:
                # Its log is empty: it knows no voter whom it could ask, and what gossip told once it may have come to doubt.
                epoch, primary = self._members.reign(shard)
                if primary:
                    self._failover.hear(shard, epoch, primary)

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
        """Replicas of the other shards that we lead on their way: they take what they lack from us. Not those whose host is dead
        or rests: they take nothing, and may be so for long."""
        names: list[str] = []
        bringing = 0
        for one in self._holdings.actors.values():
            if one.leads and one is not actor:
                names += [name for name, _ in one.placement.learners]
                names += self._brought.get(one.shard, ())
                bringing += one.shard in self._bringing
        return bringing + sum(self._alive(name) and not self._duty.rests(name) for name in names)

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

    def _decide(self, actor: ShardActor) -> Bring | BringWitness | HandOver | None:
        """The next step, when it is one that takes time; what takes none is done."""
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
        elif isinstance(step, Place):
            if self._failover.change(actor, step.placement):
                self.counters["placed"] += 1
                self._opening[actor.shard] = trio.current_time() + AGAIN_S
                self._say(actor.shard, step.why)
                self._brought.pop(actor.shard, None)
        elif isinstance(step, HandOver):
            self._say(actor.shard, f"hands over to {step.to}")
            return step
        elif isinstance(step, BringWitness):
            self._say(actor.shard, f"asks {step.name} to witness")
            return step
        elif self._others(actor) >= OUT_MAX:
            self._say(actor.shard, "waits for other moves from this node")
        else:
            self._say(actor.shard, f"asks {step.name} for a replica")
            return step
        return None

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

    def _strays(self, actor: ShardActor) -> list[str]:
        """Who holds this shard and is in no placement any more: they may remove it, once that placement is on a quorum."""
        if not actor.settled:
            return []
        layout = self._layout()
        kept = {self._members.own.name, *actor.placement.holders, *self._brought.get(actor.shard, ())}
        if layout is not None and actor.shard < layout.shard_count:
            # It is to come back, once it has lasted.
            kept |= set(layout.wished()[actor.shard])
        return [name for name in self._members.holders(actor.shard) if name not in kept]

    async def _dismiss(self, actor: ShardActor, names: Sequence[str]) -> None:
        for name in names:
            # Looked at again: what was so before the step, and while we waited for another, may be so no more.
            reign = actor.reign
            if reign is None or name not in self._strays(actor):
                continue
            link = await self._links.add(name)
            # The epoch that was settled, whatever has become of it while we waited.
            if await link.call("dismiss", [actor.shard, reign.epoch], CALL_S):
                self.counters["dismissed"] += 1
                self._say(actor.shard, f"{name} has removed its replica")
