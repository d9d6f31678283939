"""Gossip and moves of a simulated host: who is alive, who leads, who holds a replica, what the layout wishes; and the steps of
node/move.py while its replica leads. After node/mover.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from node.move import Bring, BringWitness, HandOver, Place, Sight, next_step
from tests.simulation.replicas import LEVEL_RECORDS, Replica

if TYPE_CHECKING:
    from tests.simulation.shards import Host, Wish

GOSSIP_S = 0.12
ALIVE_S = 0.7
STEP_S = 0.15
HAND_OVER_S = 0.5
WITNESS_SILENT_S = 1.0


class Mover:
    def __init__(self, host: Host) -> None:
        self.host, self.sim = host, host.sim
        # Of the others: when last heard; whether it says that it holds a replica.
        self._heard: dict[str, float] = {}
        self._holding: dict[str, bool] = {}
        self._brought: dict[str, int] = {}
        self._votes: dict[str, int] = {}
        self.wish: Wish = (0, self.sim.founders, self.sim.wish[2] if not self.sim.wish[0] else "")

    def begin(self) -> None:
        self.host.later(GOSSIP_S * self.sim.random.random(), self._gossip)
        self.host.later(STEP_S * self.sim.random.random(), self._step)

    # -- gossip -----------------------------------------------------------------------------------------------------

    def _gossip(self) -> None:
        replica = self.host.replica
        epoch = replica.reign.epoch if replica is not None and replica.reign is not None else 0
        for name in self.sim.names:
            if name != self.host.name:
                self.host.send(name, "gossip", epoch, replica is not None, self.wish)
        self.host.later(GOSSIP_S, self._gossip)

    def on_gossip(self, source: str, epoch: int, holds: bool, wish: Wish) -> None:
        self._heard[source] = self.sim.now
        self._holding[source] = holds
        self.wish = max(self.wish, wish)
        if epoch and self.host.replica is not None:
            self.host.replica.hear(epoch, source)
        if epoch and self.host.witness is not None:
            self.host.witness.hear(epoch, source)

    def _alive(self, name: str) -> bool:
        return name == self.host.name or self.sim.now - self._heard.get(name, -1e9) < ALIVE_S

    def _holds(self, name: str) -> bool:
        return name == self.host.name or self._holding.get(name, True)

    # -- moves ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        replica = self.host.replica
        if replica is None or replica.reign is None:
            self._brought.clear()
            self._votes.clear()
        elif self.sim.now >= self.sim.quiet_until:
            self._move(replica)
            self._dismiss(replica)
            replica.purge()
        self.host.later(STEP_S, self._step)

    def _move(self, replica: Replica) -> None:
        def level(name: str) -> bool:
            reign = replica.reign
            least = replica.store.synced - LEVEL_RECORDS
            return reign is not None and name in reign.heard and reign.heard[name] >= least

        assert replica.reign is not None
        heard = self.sim.now - replica.reign.witness_at < WITNESS_SILENT_S
        if heard:
            self._votes.clear()
        sight = Sight(
            self.host.name,
            self._alive,
            level,
            self._brought,
            self._holds,
            votes=self._votes,
            witness_heard=heard,
        )
        step = next_step(replica.placement, self.wish[1], sight, self.wish[2])
        if isinstance(step, Bring):
            assert replica.reign is not None
            self.host.send(step.name, "bring", replica.reign.epoch)
        elif isinstance(step, Place):
            if replica.change(step.placement):
                self._brought.clear()
        elif isinstance(step, BringWitness):
            self.host.send(step.name, "bring_witness", replica.reign.epoch)
        elif isinstance(step, HandOver):
            self.hand_over(replica, step.to)

    def hand_over(self, replica: Replica, to: str) -> None:
        """Writes stop, the successor gets everything, stands, and leads; or, after a while, writes go on."""
        reign, election = replica.reign, replica.election
        if reign is None or election.resigned or to not in reign.positions:
            return
        election.resign()
        deadline = self.sim.now + HAND_OVER_S

        def look() -> None:
            if replica.reign is not reign:
                return
            if reign.positions.get(to, -1) >= len(replica.store.log):
                replica.point("handing-over")
                replica.act(election.hand_over(to, self.host.clock))
            elif self.sim.now > deadline:
                election.resume()
            else:
                replica.later(0.02, look)

        look()

    def _dismiss(self, replica: Replica) -> None:
        """Who holds this shard and is in no placement any more may remove it, once that placement is on a quorum."""
        reign, bugs = replica.reign, self.sim.bugs
        if reign is None or not (replica.settled or "dismissed-early" in bugs):
            return
        kept: Sequence[str] = (*replica.placement.holders, *self._brought)
        for name, holds in self._holding.items():
            if name not in kept and holds and self._alive(name):
                self.host.send(name, "dismiss", reign.epoch)

    def on_bring(self, source: str, epoch: int) -> None:
        replica = self.host.replica or self.host.open(())
        self.host.disk.left = False
        replica.hear(epoch, source)
        self.host.send(source, "brought", replica.id)

    def on_bring_witness(self, source: str, epoch: int) -> None:
        witness = self.host.bring_witness()
        witness.hear(epoch, source)
        self.host.send(source, "brought_vote", witness.vote.id)

    def on_brought_vote(self, source: str, id_: int) -> None:
        if self.host.replica is not None and self.host.replica.leads:
            self._votes[source] = id_

    def on_brought(self, source: str, id_: int) -> None:
        if self.host.replica is not None and self.host.replica.leads:
            self._brought[source] = id_

    def on_dismiss(self, source: str, epoch: int) -> None:
        replica = self.host.replica
        if replica is None or replica.leads or replica.files.sides:
            return
        position = replica.store.position
        # What our log has that the primary's lacks is put aside, to be offered, once it ends in that primary's epoch.
        follows = position.epoch == epoch or not position.sequence
        if follows or ("dismissed-with-a-tail" in self.sim.bugs and epoch >= position.epoch):
            self.host.wipe(epoch)
