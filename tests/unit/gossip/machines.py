"""One machine by itself: what it is told, and what it wants done."""

from __future__ import annotations

from random import Random
from typing import TypeVar

from gossip.config import GossipConfig
from gossip.effects import Effect, Event, Send
from gossip.machine import Machine
from gossip.messages import Address, Claim, Part, State

P = TypeVar("P")
ME = 10
HOME = Address("10.0.0.10", 7402)


def home(id: int) -> Address:
    return Address(f"10.0.{id >> 8}.{id & 255}", 7402)


def alive(id: int, incarnation: int = 0, *, boot: int = 1) -> Claim:
    return Claim(id, boot, incarnation, State.ALIVE, home(id), id)


def said(state: State, id: int, by: int, incarnation: int = 0, *, boot: int = 1) -> Claim:
    return Claim(id, boot, incarnation, state, home(id), by)


class One:
    """A machine, its clock, and what came out of it."""

    def __init__(self, *others: int, boot: int = 1, config: GossipConfig | None = None) -> None:
        self.now = 100.0
        self.machine = Machine(
            config or GossipConfig(), id=ME, boot=boot, address=HOME, random=Random(1), now=self.now
        )
        self.out: list[Effect] = []
        self.machine.start([], self.now)
        self.tell(*[alive(id) for id in others])
        for key in list(self.machine._claims._level_of):  # nothing old rides on what comes out
            self.machine._claims.discard(key)
        self.out.clear()

    def tell(
        self, *parts: Part, sender: int = 20, boot: int = 1, source: Address | None = None
    ) -> list[Effect]:
        """Parts of one packet; what came of it, also kept in `out`."""
        effects = self.machine.on_packet(sender, boot, source or home(sender), parts, self.now)
        self.out += effects
        return effects

    def run(self, seconds: float) -> list[Effect]:
        """Lets time go on, each timer on time; what came of it, also kept in `out`."""
        until, effects = self.now + seconds, []
        while self.machine.next_deadline <= until:
            self.now = max(self.now, self.machine.next_deadline)
            effects += self.machine.on_timer(self.now)
        self.now = until
        self.out += effects
        return effects

    def stall(self, seconds: float) -> list[Effect]:
        """Time goes on, and no timer is on time."""
        self.now += seconds
        effects = self.machine.on_timer(self.now)
        self.out += effects
        return effects

    def state(self, id: int) -> State | None:
        return self.machine.member_state(id)

    @property
    def incarnation(self) -> int:
        return next(view.incarnation for view in self.machine.members() if view.id == ME)


def kinds(effects: list[Effect], id: int | None = None) -> list[str]:
    return [one.kind for one in effects if isinstance(one, Event) and id in (None, one.id)]


def sent(effects: list[Effect], kind: type[P], to: Address | None = None) -> list[P]:
    """Parts of that kind, in order, to that address or to any."""
    return [
        part
        for one in effects
        if isinstance(one, Send) and to in (None, one.address)
        for part in one.parts
        if isinstance(part, kind)
    ]
