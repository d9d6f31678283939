"""Elections of all shards of this node: the shell of node/election.py. An actor.

Messages to one node that come up together travel together, and so do promises on their way to the disk: the shards of a dead
host cost their voters one message and one write, not one each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import structlog
import trio

from node.commit import CommitStoppedError, OverloadedError
from node.election import (
    EPOCH_MAX,
    Ask,
    Effect,
    Lead,
    Message,
    Persist,
    Promise,
    Refuse,
    Stand,
    StepDown,
    Succeed,
    Tell,
    Would,
)
from node.links import Links
from node.peerlink import PeerError
from node.placement import Placement
from node.promises import Promises
from node.shard import ShardActor
from router.ports import NodeError
from storage.crash_points import reached
from storage.records import Version

log = structlog.get_logger(__name__)

TICK_S = 0.025
CALL_S = 1.0
MESSAGES_MAX = 4_096
# A handed-over shard should have its new primary after two round trips and two fsyncs.
HAND_OVER_S = 3.0
POLL_S = 0.02


class _Leads(NamedTuple):
    """Told to everybody when an epoch is open, by the one who opened it; not a message of the machine."""

    epoch: int


_KINDS: dict[str, type[Any]] = {
    "leads": _Leads,
    "ask": Ask,
    "would": Would,
    "stand": Stand,
    "promise": Promise,
    "refuse": Refuse,
    "succeed": Succeed,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class Voting(Protocol):
    """The shards of which this node is a witness, as far as messages of elections concern them."""

    def on_message(self, peer: str, shard: int, message: Message) -> bool:
        """Whether it was for a witness."""

    def hear(self, shard: int, epoch: int, primary: str) -> None: ...


class Failover:
    """Drives the election of each shard in `shards`, which may be filled later."""

    def __init__(
        self,
        name: str,
        shards: Mapping[int, ShardActor],
        promises: Promises,
        links: Links,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """on_change: called when this node leads a shard more, or one less."""
        self._name, self._shards, self._promises, self._links = name, shards, promises, links
        self._on_change = on_change
        # Who shall lead nothing while another can.
        self.rests: Callable[[str], bool] = lambda _name: False
        self.witnessed: Voting | None = None
        self._reluctant = False
        self._outbox: dict[str, list[list[Any]]] = {}
        self._sending: set[str] = set()
        # (shard, voter) → replica id: whom the first epoch of a shard will name.
        self._founders: dict[tuple[int, str], int] = {}
        # Under which placement a shard's next epoch is to be opened, if it is won in a way that may change it.
        self._next: dict[int, Placement] = {}
        self._nursery: trio.Nursery | None = None
        self.counters = {"elections": 0, "led": 0, "stepped_down": 0, "dropped": 0}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        # After a crash: whoever was sending is gone.
        self._sending.clear()
        self._outbox.clear()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for actor in self._shards.values():
                self.adopt(actor)
            task_status.started()
            while True:
                now = trio.current_time()
                for actor in list(self._shards.values()):
                    # One whose bytes were changed at rest may vote by where its log ends, and not lead with what it holds.
                    if now >= actor.election.next_deadline and (actor.leads or not actor.diverged):
                        self.act(actor, actor.election.on_timer(now))
                await trio.sleep(TICK_S)
        raise AssertionError("unreachable")

    def adopt(self, actor: ShardActor) -> None:
        actor.act, actor.readmit = self.act, self.readmit
        actor.election.reluctant = self._reluctant

    def be_reluctant(self, reluctant: bool) -> None:
        """This node stands only where nobody else does."""
        self._reluctant = reluctant
        for actor in self._shards.values():
            actor.election.reluctant = reluctant

    # -- effects --------------------------------------------------------------------------------------------------

    def act(self, actor: ShardActor, effects: Sequence[Effect]) -> None:
        """Carries them out, in order; what takes time goes on by itself."""
        if not effects:
            return
        assert self._nursery is not None
        for effect in effects:
            if isinstance(effect, Persist):
                self._nursery.start_soon(self._persist, actor, effect.epoch)
            elif isinstance(effect, Tell):
                message = effect.message
                if isinstance(message, Ask | Stand) and not actor.founding:
                    message = message._replace(to=dict(actor.placement.votes).get(effect.to, 0))
                self.tell(actor.shard, actor.replica.replica_id, effect.to, message)
            elif isinstance(effect, Lead):
                self.counters["elections"] += 1
                self._nursery.start_soon(self._lead, actor, effect)
            elif isinstance(effect, StepDown):
                self.counters["stepped_down"] += 1
                actor.step_down(effect.reason)
                self._on_change()

    async def _persist(self, actor: ShardActor, epoch: int) -> None:
        try:
            await self._promises.keep(actor.shard, actor.replica.replica_id, epoch)
        except (OSError, CommitStoppedError, OverloadedError) as error:
            log.warning("promise not written", shard=actor.shard, epoch=epoch, reason=str(error))
            actor.election.on_persist_failed(epoch, trio.current_time())
            return
        reached("failover.after_promise")
        self.act(actor, actor.election.on_persisted(epoch, trio.current_time()))

    async def _lead(self, actor: ShardActor, won: Lead) -> None:
        epoch, wanted = won.epoch, self._next.pop(actor.shard, None)
        placement = wanted if won.changes and wanted is not None else self._present(actor)
        if await actor.open_epoch(epoch, placement):
            reached("failover.after_open")
            self.counters["led"] += 1
            self._on_change()
            for name in self._links:
                self.tell(actor.shard, actor.replica.replica_id, name, _Leads(epoch))

    def _present(self, actor: ShardActor) -> Placement:
        if not actor.founding:
            # Under another id than it is named by it leads only when it was forced to.
            return actor.placement.replaced(self._name, actor.replica.replica_id)
        shard = actor.shard
        ids = {name: self._founders.get((shard, name), 0) for name in actor.placement.names}
        ids[self._name] = actor.replica.replica_id
        return Placement(tuple(ids.items()))

    # -- messages -------------------------------------------------------------------------------------------------

    def tell(self, shard: int, id_: int, to: str, message: Message | _Leads) -> None:
        """id_: of the replica, or of the vote, that speaks."""
        waiting = self._outbox.setdefault(to, [])
        if len(waiting) >= MESSAGES_MAX:
            # As if the network had lost it: elections are made for that.
            self.counters["dropped"] += 1
            return
        waiting.append([shard, id_, _NAMES[type(message)], *message])
        if to not in self._sending:
            self._sending.add(to)
            assert self._nursery is not None
            self._nursery.start_soon(self._send, to)

    async def _send(self, to: str) -> None:
        # What else this pass of the loop has for that node goes along.
        await trio.lowlevel.checkpoint()
        self._sending.discard(to)
        batch = self._outbox.pop(to, [])
        try:
            link = self._links[to]
            await link.call("elect", batch, CALL_S)
        except (KeyError, PeerError):
            self.counters["dropped"] += len(batch)

    def on_peer(self, peer: str, body: Any) -> None:
        """Handler of `elect`: [[shard, the sender's replica id, kind, fields…]…]. Answers nothing."""
        now = trio.current_time()
        for told in body:
            try:
                shard, replica, kind, *fields = told
                actor = self._shards.get(shard)
                message = _message(kind, fields)
            except (TypeError, ValueError):  # of a newer version, or broken: the others still count
                self.counters["dropped"] += 1
                continue
            if isinstance(message, _Leads):
                self.hear(shard, message.epoch, peer)
            elif self.witnessed is not None and self.witnessed.on_message(peer, shard, message):
                continue
            elif actor is not None:
                self._on_message(actor, peer, replica, message, now)

    def hear(self, shard: int, epoch: int, primary: str) -> None:
        """That node says, to us or by gossip, that it leads in that epoch."""
        if self.witnessed is not None:
            self.witnessed.hear(shard, epoch, primary)
        actor = self._shards.get(shard)
        if actor is not None:
            self.act(actor, actor.election.on_leader(epoch, trio.current_time()))
            actor.hear_of(epoch, primary)

    def _on_message(self, actor: ShardActor, peer: str, replica: int, message: Message, now: float) -> None:
        named = isinstance(message, Ask | Stand) and message.to == actor.replica.replica_id
        if actor.founding:
            self._founders[actor.shard, peer] = replica
        elif not named and not actor.placement.may_elect(peer, replica):
            # A learner, or a replica on a new disk: nothing that it says counts before an epoch names it.
            if isinstance(message, Ask | Stand):
                refusal = Refuse(message.epoch, actor.election.promised, "learner")
                self.act(actor, [Tell(peer, refusal)])
            return
        self.act(actor, actor.election.on_message(peer, message, now, named=named))

    # -- handing over ---------------------------------------------------------------------------------------------

    def successor(self, actor: ShardActor) -> str:
        """The voter that is nearest to having everything, one that rests only when no other follows; empty when none does."""
        reign = actor.reign
        if reign is None:
            return ""
        positions = reign.progress.positions
        others = [name for name in reign.progress.voters if name != self._name and name in positions]
        return max(others, key=lambda name: (not self.rests(name), positions[name]), default="")

    async def hand_over(self, actor: ShardActor, to: str, timeout_s: float = HAND_OVER_S) -> None:
        """Writes wait, `to` gets everything, stands, and leads. Raises NodeError `no_successor`; then this node leads on."""
        reign = actor.reign
        if reign is None:
            raise actor.not_primary()
        progress = reign.progress
        election = actor.election
        if to not in progress.positions or to == self._name:
            raise NodeError(
                "no_successor", f"{to or 'no other voter'} does not follow shard {actor.shard} now"
            )
        if election.resigned:
            raise NodeError("no_successor", f"shard {actor.shard} is being handed over already")

        def behind() -> bool:
            # It has no position any more when its log has parted from ours.
            return progress.positions.get(to, -1) < actor.end

        deadline = trio.current_time() + timeout_s
        election.resign()
        try:
            with trio.move_on_at(deadline - timeout_s / 2):
                while not reign.ended and behind():
                    await actor.changed()
            if reign.ended:
                return
            if behind():
                raise NodeError("no_successor", f"{to} has not caught up with shard {actor.shard} in time")
            self.act(actor, election.hand_over(to, trio.current_time()))
        finally:
            if not reign.ended:
                actor.resume()
        with trio.move_on_at(deadline):
            while actor.hint[0] <= reign.epoch:
                await actor.changed()

    async def hand_over_all(self) -> None:
        """Before this node stops or rests: each shard that it leads goes to whoever has the most of it."""

        async def one(actor: ShardActor) -> None:
            to = self.successor(actor)
            if to:
                try:
                    await self.hand_over(actor, to)
                except NodeError as error:
                    log.warning("not handed over", shard=actor.shard, reason=error.message)

        async with trio.open_nursery() as nursery:
            for actor in self._shards.values():
                if actor.leads:
                    nursery.start_soon(one, actor)

    def change(self, actor: ShardActor, new: Placement) -> bool:
        """As primary: open an epoch under `new`. False when the present epoch is not established yet, or the lease is not held:
        one change at a time (`overlap`)."""
        reign = actor.reign
        if reign is None or not actor.election.may_acknowledge(trio.current_time()):
            return False
        if not reign.progress.established:
            reign.insists = reign.progress.stuck(trio.current_time() - reign.since, actor.election.lease_s)
            return False
        log.info(
            "placement changes",
            shard=actor.shard,
            voters=new.names,
            learners=[name for name, _ in new.learners],
            witness=new.witness_name,
        )
        self._next[actor.shard] = new.after(actor.placement)
        self.act(actor, actor.election.renew(trio.current_time(), new.electors))
        return True

    def force(self, actor: ShardActor, epoch: int) -> None:
        """Open `epoch` with this replica as the only voter; who else is wished comes back as a learner first."""
        alone = Placement(((self._name, actor.replica.replica_id),))
        self._next[actor.shard] = alone
        self.act(actor, actor.election.force(epoch, trio.current_time()))

    def readmit(self, actor: ShardActor, name: str, replica: int) -> None:
        """A voter on a new disk is level, or a learner on one is there: open an epoch that names its new replica."""
        if self.change(actor, actor.placement.replaced(name, replica)):
            log.warning("readmitted", shard=actor.shard, replica_of=name)


def _message(kind: Any, fields: Sequence[Any]) -> Message | _Leads:
    """Raises TypeError, ValueError."""
    if kind not in _KINDS:
        raise ValueError(f"{kind!r:.40} is no message of an election")
    made: Message | _Leads = _KINDS[kind](*fields)
    if isinstance(made, Ask | Stand):
        at, sequence = made.last
        made = made._replace(last=Version(at, sequence))
        _check(at, sequence, made.epoch, made.released)
        _check_id(made.to)
    elif isinstance(made, Refuse):
        _check(made.epoch, made.promised)
    else:
        _check(*made)
    return made


def _check_id(replica: Any) -> None:
    if type(replica) is not int:
        raise TypeError(f"{replica!r:.40} is not a replica id")


def _check(*numbers: Any) -> None:
    if not all(type(number) is int and 0 <= number < EPOCH_MAX for number in numbers):
        raise ValueError(f"{numbers!r:.80} are not epochs and sequences")
