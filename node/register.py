"""Who decides on the next layout: one register, changed by compare-and-set on members' disks. Pure (docs/layout.md).

Laws (as named there): one-value, chain, on-disk-first, promise-binds, read-first, both-majorities, same-disk, never-guess,
forward-only. Paxos for each version, its acceptors the members of the version before, with the ballots and the
read-before-write of CASPaxos (Rystsov 2018, arXiv:1802.07000).

`answer` is the acceptor, a function of its state and a message; `Proposer` is one try to make one layout follow another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, NamedTuple

from router.layout import Layout

ROUND_S = 1.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.05, 0.3


class Ballot(NamedTuple):
    """Greater counters win, then names: no two nodes have one ballot."""

    counter: int
    node: str


NEVER = Ballot(0, "")


# -- messages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepare:
    """May this ballot decide what follows `base`?"""

    base: Layout
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Accept:
    base: Layout
    ballot: Ballot
    value: Layout


@dataclass(frozen=True, slots=True)
class Learn:
    """This layout is decided."""

    layout: Layout


@dataclass(frozen=True, slots=True)
class Promise:
    """Not sent before it is on disk. accepted: what this acceptor has accepted for that version so far."""

    ballot: Ballot
    accepted: tuple[Ballot, Layout] | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """Not sent before it is on disk."""

    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Learned:
    """Not sent before it is on disk."""

    hash: str


@dataclass(frozen=True, slots=True)
class Refuse:
    ballot: Ballot
    promised: Ballot
    reason: Literal["promised", "not_a_member", "new_disk", "other_layout"]


@dataclass(frozen=True, slots=True)
class Stale:
    """A later layout is decided: this one."""

    layout: Layout


Ask = Prepare | Accept | Learn
Reply = Promise | Accepted | Learned | Refuse | Stale


# -- the acceptor ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """What an acceptor has on disk: the decided layout that it goes by, and its part in deciding on the next."""

    layout: Layout | None = None
    promised: Ballot = NEVER
    accepted: tuple[Ballot, Layout] | None = None


def answer(slot: Slot, name: str, id_: str, ask: Ask) -> tuple[Slot, Reply]:
    """The state afterwards, which must be on disk before the reply is sent. `name`, `id_`: the acceptor's own."""
    if isinstance(ask, Learn):
        slot = learn(slot, ask.layout)
        assert slot.layout is not None
        if slot.layout.version == ask.layout.version and slot.layout.hash != ask.layout.hash:
            return slot, Refuse(NEVER, NEVER, "other_layout")
        refused = _why_not(ask.layout, name, id_)
        if refused is not None:
            return slot, Refuse(NEVER, NEVER, refused)
        # Who goes by a later one has it behind itself.
        return slot, Learned(ask.layout.hash)
    slot = learn(slot, ask.base)
    assert slot.layout is not None
    if slot.layout.version > ask.base.version:
        return slot, Stale(slot.layout)
    if slot.layout.hash != ask.base.hash:
        return slot, Refuse(ask.ballot, slot.promised, "other_layout")
    refused = _why_not(slot.layout, name, id_)
    if refused is not None:
        return slot, Refuse(ask.ballot, slot.promised, refused)
    if isinstance(ask, Prepare):
        # The promised ballot itself is promised again: the first answer may have been lost.
        if ask.ballot < slot.promised:
            return slot, Refuse(ask.ballot, slot.promised, "promised")
        return replace(slot, promised=ask.ballot), Promise(ask.ballot, slot.accepted)
    if ask.ballot < slot.promised:
        return slot, Refuse(ask.ballot, slot.promised, "promised")
    slot = replace(slot, promised=ask.ballot, accepted=(ask.ballot, ask.value))
    return slot, Accepted(ask.ballot)


def learn(slot: Slot, layout: Layout) -> Slot:
    """Goes by a decided layout if it is a later one; what was promised about the version after the earlier one is over."""
    if slot.layout is not None and layout.version <= slot.layout.version:
        return slot
    return Slot(layout)


def _why_not(layout: Layout, name: str, id_: str) -> Literal["not_a_member", "new_disk"] | None:
    member = layout.member(name)
    if member is None:
        return "not_a_member"
    # Of a member without an id only the name is known.
    return "new_disk" if member.id not in ("", id_) else None


# -- the proposer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserve:
    """Put this counter on disk, then call `on_reserved`."""

    counter: int


@dataclass(frozen=True, slots=True)
class Tell:
    to: str
    message: Ask


Outcome = Literal["committed", "conflict", "unavailable", "unknown"]


@dataclass(frozen=True, slots=True)
class Done:
    """The last effect. layout: the one that follows the base, where that is known."""

    outcome: Outcome
    layout: Layout | None = None


Effect = Reserve | Tell | Done


class Proposer:
    """One try to make `value` follow `base`; ends with `Done`, at `deadline` at the latest. Times are seconds of any clock."""

    def __init__(
        self, name: str, base: Layout, value: Layout, *, counter: int, random: Random, deadline: float
    ) -> None:
        """name: of the ballots, no other node's. counter: the greatest that this node has ever reserved."""
        assert value.version == base.version + 1, "a layout follows the one before"
        assert value.base == base.hash, "a layout follows the one before"
        self.name, self.base, self.own = name, base, value
        self.done: Done | None = None
        self.next_deadline = deadline
        self._deadline, self._random = deadline, random
        self._seen = counter
        self._ballot = NEVER
        self._phase: Literal["reserving", "preparing", "accepting", "teaching"] = "reserving"
        self._value = value
        self._found: tuple[Ballot, Layout] | None = None
        self._yes: set[str] = set()
        self._asked = False

    def start(self, now: float) -> list[Effect]:
        self._seen += 1
        self._phase, self._ballot = "reserving", Ballot(self._seen, self.name)
        self._retry_at(now + ROUND_S)
        return [Reserve(self._seen)]

    def on_reserved(self, now: float) -> list[Effect]:
        """The counter is on disk."""
        if self.done is not None or self._phase != "reserving":
            return []
        self._phase, self._yes, self._found = "preparing", set(), None
        self._retry_at(now + ROUND_S)
        return self._tell(_names(self.base), Prepare(self.base, self._ballot))

    def on_timer(self, now: float) -> list[Effect]:
        if self.done is not None or now < self.next_deadline:
            return []
        if now >= self._deadline:
            return self._end("unknown" if self._asked else "unavailable")
        if self._phase == "teaching":
            self._retry_at(now + ROUND_S)
            return self._tell(_names(self._value), Learn(self._value))
        return self.start(now)

    def on_reply(self, sender: str, reply: Reply, now: float) -> list[Effect]:
        if self.done is not None:
            return []
        if isinstance(reply, Stale):
            return self._on_stale(reply.layout, now)
        if isinstance(reply, Learned):
            taught = self._phase == "teaching" and reply.hash == self._value.hash
            return self._count(sender, self._value, now) if taught else []
        if isinstance(reply, Refuse):
            if reply.reason == "promised" and reply.ballot == self._ballot and self._phase != "teaching":
                self._seen = max(self._seen, reply.promised.counter)
                # Others may still make a majority meanwhile.
                wait = self._random.uniform(BACKOFF_MIN_S, BACKOFF_MAX_S)
                self._retry_at(min(self.next_deadline, now + wait))
            return []
        if reply.ballot != self._ballot:
            return []
        if isinstance(reply, Promise) and self._phase == "preparing":
            if reply.accepted is not None and (self._found is None or reply.accepted[0] > self._found[0]):
                self._found = reply.accepted
            return self._count(sender, self.base, now)
        if isinstance(reply, Accepted) and self._phase == "accepting":
            return self._count(sender, self.base, now)
        return []

    def _count(self, sender: str, among: Layout, now: float) -> list[Effect]:
        self._yes.add(sender)
        if len(self._yes & set(_names(among))) <= len(among.members) // 2:
            return []
        if self._phase == "preparing":
            return self._accept(now)
        if self._phase == "accepting":
            return self._decided(now)
        return self._end("committed", self._value)

    def _accept(self, now: float) -> list[Effect]:
        self._phase, self._yes = "accepting", set()
        self._value = self.own if self._found is None else self._found[1]
        self._asked = self._asked or self._value.hash == self.own.hash
        self._retry_at(now + ROUND_S)
        return self._tell(_names(self.base), Accept(self.base, self._ballot, self._value))

    def _decided(self, now: float) -> list[Effect]:
        if self._value.hash == self.own.hash:
            return self._teach(now)
        known = [*_names(self.base), *_names(self._value)]
        return self._tell(known, Learn(self._value)) + self._end("conflict", self._value)

    def _teach(self, now: float) -> list[Effect]:
        self._phase, self._yes, self._value = "teaching", set(), self.own
        self._retry_at(now + ROUND_S)
        return self._tell([*_names(self.base), *_names(self.own)], Learn(self.own))

    def _on_stale(self, later: Layout, now: float) -> list[Effect]:
        if later.version <= self.base.version or self._phase == "teaching":
            return []
        if later.version == self.base.version + 1:
            # Somebody has completed ours; whether a majority of its members goes by it is not known yet.
            return self._teach(now) if later.hash == self.own.hash else self._end("conflict", later)
        if later.version == self.base.version + 2 and later.base == self.own.hash:
            return self._end("committed", self.own)
        if later.version == self.base.version + 2 or not self._asked:
            return self._end("conflict")
        return self._end("unknown")

    def _end(self, outcome: Outcome, layout: Layout | None = None) -> list[Effect]:
        self.done = Done(outcome, layout)
        return [self.done]

    def _retry_at(self, when: float) -> None:
        self.next_deadline = min(when, self._deadline)

    def _tell(self, names: Iterable[str], message: Ask) -> list[Effect]:
        return [Tell(name, message) for name in dict.fromkeys(names)]


def _names(layout: Layout) -> list[str]:
    return [member.name for member in layout.members]
