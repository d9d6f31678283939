"""What a primary does next so that its shard's placement becomes what the layout wishes. Pure. docs/ownership.md has the laws.

One step at a time, each an epoch of its own or something that changes no placement; every step can be repeated, and whoever leads
after a crash goes on from the placement that is in the log:

    bring a replica → learner → level → voter → the old voter out

A voter that is dead goes out before the new one comes in: a majority of the voters with both needs one more of the living.
A witness comes when the data is where it is wished, and goes when a third voter has come, or when its host is to hold data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from node.placement import Placement


@dataclass(frozen=True, slots=True)
class Bring:
    """That node shall have a replica, which does not vote."""

    name: str


@dataclass(frozen=True, slots=True)
class BringWitness:
    """That node shall have a vote without data, which counts once a placement names it."""

    name: str


@dataclass(frozen=True, slots=True)
class Place:
    """Open an epoch under this placement. why: for people."""

    placement: Placement
    why: str


@dataclass(frozen=True, slots=True)
class HandOver:
    """We are to go: another leads, and goes on."""

    to: str


@dataclass(frozen=True, slots=True)
class Wait:
    why: str


@dataclass(frozen=True, slots=True)
class Done:
    """The placement is as wished."""


Step = Bring | BringWitness | Place | HandOver | Wait | Done


@dataclass(frozen=True, slots=True)
class Sight:
    """What the primary sees. alive, level, holds: of a node, by name; level: it has pulled nearly all of our log; holds: it has a
    replica, whatever placements say.

    brought: replica ids of nodes that have one and are in no placement. rests: of a node, by name: it shall lead nothing.
    first_is_fit: whether the preferred primary has been alive, level and not resting for long enough. votes: ids of the votes of
    witnesses that were brought; witness_heard: whether that of the placement has been heard lately.
    """

    own: str
    alive: Callable[[str], bool]
    level: Callable[[str], bool]
    brought: Mapping[str, int]
    holds: Callable[[str], bool]
    rests: Callable[[str], bool] = lambda name: False
    first_is_fit: bool = False
    votes: Mapping[str, int] = field(default_factory=dict)
    witness_heard: bool = True

    def place(self, placement: Placement, why: str) -> Place | Wait:
        """Not when it would leave nobody to lead: a majority of the voters must be there, with all of the log."""
        there = [one for one in placement.names if one == self.own or (self.alive(one) and self.level(one))]
        if placement.witness is not None and self.alive(placement.witness_name):
            there.append(placement.witness_name)
        if 2 * len(there) > len(placement.electors):
            return Place(placement, why)
        return Wait(
            f"{', '.join(placement.electors)} would vote, and only {', '.join(there)} is there and level"
        )


def next_step(placement: Placement, target: Sequence[str], sight: Sight, witness: str = "") -> Step:
    """`target`: the wished voters, the preferred primary first; none: no wish is known. `witness`: the wished one, or none."""
    if not target:
        return Wait("no layout names this shard's replicas")
    if sight.rests(sight.own) and (other := _successor(placement, target, sight)):
        return HandOver(other)
    step = _replicas(placement, target, sight)
    if isinstance(step, Wait | Done):
        step = _witness(placement, witness, sight, done=isinstance(step, Done)) or step
    if isinstance(step, Done) and sight.first_is_fit and target[0] != sight.own:
        return HandOver(target[0])
    return step


def _replicas(placement: Placement, target: Sequence[str], sight: Sight) -> Step:
    """Those that hold data."""
    strays = [name for name, _ in placement.learners if name not in target]
    if strays:
        learners = tuple(one for one in placement.learners if one[0] not in strays)
        return Place(replace(placement, learners=learners), f"{', '.join(strays)} is not wanted any more")
    for name in placement.holders:
        # Its disk was replaced, say.
        if name in target and name != sight.own and sight.alive(name) and not sight.holds(name):
            return Bring(name)
    missing = [name for name in target if name not in placement.names]
    extra = [name for name in placement.names if name not in target]
    if missing:
        return _add(placement, missing, extra, sight)
    if extra:
        return _remove(placement, target, extra, sight)
    return Done()


def _witness(placement: Placement, wanted: str, sight: Sight, *, done: bool) -> Step | None:
    """None: nothing to do for it now. done: the data is where it is wished."""
    present, fit = placement.witness_name, sight.alive(wanted) and wanted not in placement.holders
    if present and present != wanted:
        if len(placement.voters) > 2 or (fit if wanted else done):
            return sight.place(placement.witnessed(None), f"{present} witnesses no more")
        return None
    if not wanted or not fit:
        return None
    if present:
        if sight.witness_heard:
            return None
        # It is there and silent: it has lost what it had promised, say.
        if wanted not in sight.votes:
            return BringWitness(wanted)
        if (wanted, sight.votes[wanted]) == placement.witness:
            return None
    elif len(placement.voters) != 2:
        return None
    elif wanted not in sight.votes:
        return BringWitness(wanted)
    return sight.place(placement.witnessed((wanted, sight.votes[wanted])), f"{wanted} witnesses")


def _add(placement: Placement, missing: Sequence[str], extra: Sequence[str], sight: Sight) -> Step:
    learners = dict(placement.learners)
    ready = [name for name in missing if name in learners and sight.level(name)]
    if ready:
        dead = [name for name in extra if not sight.alive(name)]
        if dead and len(placement.voters) > 1:
            return sight.place(
                _without(placement, dead[0]), f"{dead[0]} is dead and {ready[0]} takes its place"
            )
        name = ready[0]
        if name == placement.witness_name:
            return sight.place(placement.witnessed(None), f"{name} is level and votes with data instead")
        rest = tuple(one for one in placement.learners if one[0] != name)
        voters = (*placement.voters, (name, learners[name]))
        return sight.place(replace(placement, voters=voters, learners=rest), f"{name} is level")
    for name in missing:
        if name not in learners and name in sight.brought:
            more = (*placement.learners, (name, sight.brought[name]))
            return Place(replace(placement, learners=more), f"{name} learns")
    wanted = [name for name in missing if name not in learners and sight.alive(name)]
    if wanted:
        return Bring(wanted[0])
    slow = [name for name in missing if name in learners]
    if slow:
        return Wait(f"{', '.join(slow)} is catching up")
    return Wait(f"{', '.join(missing)} is not alive")


def _remove(placement: Placement, target: Sequence[str], extra: Sequence[str], sight: Sight) -> Step:
    others = [name for name in extra if name != sight.own]
    if others:
        return sight.place(_without(placement, others[0]), f"{others[0]} is not wanted any more")
    able = [name for name in target if name in placement.names and sight.alive(name) and sight.level(name)]
    if able:
        # Who rests leads only when nobody else can.
        return HandOver(min(able, key=sight.rests))
    return Wait("nobody of the wished voters is level, to lead after us")


def _successor(placement: Placement, target: Sequence[str], sight: Sight) -> str:
    """A voter that may lead in our place, wished ones first; empty when there is none."""
    others = [name for name in (*target, *placement.names) if name in placement.names and name != sight.own]
    fit = (n for n in others if sight.alive(n) and sight.level(n) and not sight.rests(n))
    return next(fit, "")


def _without(placement: Placement, name: str) -> Placement:
    return replace(placement, voters=tuple(one for one in placement.voters if one[0] != name))
