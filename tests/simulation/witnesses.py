"""A simulated host's vote without data: the real machine, its disk, its heartbeat. After node/witnessing.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from node.election import Message, Persist, Promise, Tell
from node.pulls import Beaten
from node.witness import Kept, Remember, Vote
from storage.records import Version
from tests.simulation.planted import CONFIG

if TYPE_CHECKING:
    from tests.simulation.shards import Host

TICK_S = 0.02


class Witness:
    def __init__(self, host: Host, kept: Kept, *, owes: bool) -> None:
        self.host, self.sim = host, host.sim
        bugs = host.sim.bugs
        if "witness-forgets-promise" in bugs:
            kept = replace(kept, promised=0)
        self.vote = Vote(
            CONFIG,
            host.name,
            kept,
            random=Random(self.sim.random.getrandbits(32)),
            now=host.clock,
            owes=owes,
        )
        if "witness-forgets-placement" in bugs:
            self.vote.election._last = lambda: Version(0, 0)
        host.later(TICK_S * self.sim.random.random(), self._tick)

    @property
    def who(self) -> tuple[str, int]:
        return self.host.name, self.vote.id

    def _tick(self) -> None:
        vote = self.vote
        if vote.hint[1] and self.host.clock >= vote.beat_at:
            self.host.send(vote.hint[1], "echo", vote.beat(self.host.clock))
        self.host.later(TICK_S, self._tick)

    def hear(self, epoch: int, primary: str) -> None:
        self.vote.hear(epoch, primary, self.host.clock)

    def on_election(self, source: str, message: Message) -> None:
        self._act(self.vote.on_message(source, message, self.host.clock))

    def on_echoed(self, source: str, answer: Beaten) -> None:
        if not self.vote.election.takes(answer.epoch):
            return
        self._act(self.vote.on_beaten(source, answer, self.host.clock))

    def _act(self, effects: Sequence[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Tell):
                if isinstance(effect.message, Promise):
                    self.sim.laws.on_promise(self.who, effect.message.epoch, self.vote.remembered)
                    self.point("promised")
                self.host.send(effect.to, "election", self.vote.id, effect.message)
            else:
                self.host.later(self.host.fsync_s(), lambda effect=effect: self._written(effect))  # type: ignore[misc]

    def _written(self, effect: Persist | Remember) -> None:
        host, vote, epoch = self.host, self.vote, effect.epoch
        kept = host.disk.witnessed
        assert kept is not None
        if isinstance(effect, Persist):
            if host.full:
                vote.election.on_persist_failed(epoch, host.clock)
                return
            host.disk.witnessed = replace(kept, promised=max(epoch, kept.promised))
            self._act(vote.election.on_persisted(epoch, host.clock))
        elif host.full:
            vote.on_remember_failed()
        else:
            host.disk.witnessed = replace(kept, remembered=max(epoch, kept.remembered))
            self.sim.laws.on_disk(self.who, epoch)
            vote.on_remembered(epoch, host.clock)
            self.point("remembered")

    def point(self, name: str) -> None:
        sim = self.sim
        sim.points[name] = sim.points.get(name, 0) + 1
        sim.at(sim.now, lambda: sim.danger(self.host, name))
