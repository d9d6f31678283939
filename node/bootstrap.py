"""How a node without a layout gets one: it adopts what another goes by, or helps to make the first. Pure.

Laws:
* `no-overwriting`: what is here is about nodes without a layout; a node that has one keeps it.
* `adopt-first`: as long as any member, alive or not, is known to go by a layout, none is made.
* `agreed-view`: version 1 is made by the alive founder (`bootstrap` above 0) of the smallest name, and only when every alive
  founder has said that it sees the same alive founders, at least `bootstrap` of them. A node says so of one set at a time,
  and nothing once it has a layout. Two sets of more than half of the founders have a node in common, so with `bootstrap`
  above half of the nodes that start at first, two layouts are made only when a node takes another for dead that takes it
  for alive: in a one-sided partition. Then all are told `layout_conflict` as soon as they hear of it.
* `same-settings`: nodes that disagree about what must be equal make nothing together, and say in what they disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from node.facts import NodeFact, settings_that_differ, view_of
from router.layout import Layout
from router.planning import first_layout

# What all nodes of one cluster must have in common.
COMMON = ("shard_count", "dim", "metric", "class_width")
# What, besides, those that found it must agree on.
FOUNDING = (*COMMON, "replication", "bootstrap")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Another member, as its facts tell. fact None: not heard yet. partial: pieces of a layout are missing."""

    alive: bool
    fact: NodeFact | None
    # Of its data directory, 16 hex digits.
    id: str = ""
    layout: Layout | None = None
    partial: bool = False
    view: bytes = b""


@dataclass(frozen=True, slots=True)
class Adopt:
    """Write it to the disk, then go by it."""

    layout: Layout
    source: str


@dataclass(frozen=True, slots=True)
class Create:
    """Write it to the disk, and only then tell anybody."""

    layout: Layout


@dataclass(frozen=True, slots=True)
class Wait:
    """Say `view` (empty: nothing), and look again when something changes."""

    view: bytes
    known: int
    wanted: int

    def __str__(self) -> str:
        if not self.wanted:
            return "waiting for a node that has a layout"
        return f"waiting for {max(0, self.wanted - self.known)} of {self.wanted} nodes"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nothing can be done until a person has; wait, say so, and look again."""

    code: Literal["layout_conflict", "config_mismatch", "name_conflict"]
    message: str


Step = Adopt | Create | Wait | Refuse


def decide(own: NodeFact, others: Sequence[Seen], *, id: str = "", cluster_id: str = "") -> Step:
    """What a node without a layout does next. id: its own; cluster_id: 32 random hex digits for a layout that it makes."""
    alive = [one for one in others if one.alive]
    if any(one.fact is not None and one.fact.name == own.name for one in alive):
        # Before anything else: both would open the same shards in one name.
        return Refuse(
            "name_conflict", f'another node is named "{own.name}"; each node needs its own node.name'
        )
    layouts = {one.layout.hash: one for one in others if one.layout is not None}
    if layouts:
        return _adopt(own, list(layouts.values()))
    if not own.bootstrap:
        return Wait(b"", 1, 0)
    # Those who only join have no part in it.
    founders = [one for one in alive if one.fact is not None and one.fact.bootstrap]
    facts = [one.fact for one in founders if one.fact is not None]
    refused = _mismatch(own, facts)
    if refused is not None:
        return refused
    names = sorted([own.name, *(fact.name for fact in facts)])
    known = len(names)
    if known < own.bootstrap:
        return Wait(b"", known, own.bootstrap)
    view = view_of(names)
    # Somebody who is alive and not heard yet may be the one that has a layout.
    heard = all(one.fact is not None for one in alive) and not any(one.partial for one in others)
    agreed = heard and all(one.view == view for one in founders)
    if not own.capacity and not any(fact.capacity for fact in facts):
        return Refuse(
            "config_mismatch",
            f"all founders ({', '.join(names)}) only witness: set node.witness = false where data is to be",
        )
    if names[0] == own.name and agreed:
        members = [replace(own.member(), id=id)]
        members += [replace(one.fact.member(), id=one.id) for one in founders if one.fact is not None]
        return Create(first_layout(members, own.shard_count, own.replication, cluster_id))
    return Wait(view, known, own.bootstrap)


def conflict(mine: Layout, others: Sequence[Seen]) -> Refuse | None:
    """Whether another member goes by another layout of the same version as ours."""
    for one in others:
        theirs = one.layout
        if theirs is not None and theirs.version == mine.version and theirs.hash != mine.hash:
            return _conflict(mine, theirs, one)
    return None


def _adopt(own: NodeFact, sources: list[Seen]) -> Step:
    """`sources`: one for each layout that is known, of different hashes."""
    first, *rest = sorted(
        ((one.layout, one) for one in sources if one.layout is not None),
        key=lambda pair: (-pair[0].version, pair[0].hash),
    )
    layout, source = first
    for other, seen in rest:
        if other.version == layout.version:
            return _conflict(layout, other, seen)
    differs = settings_that_differ(own, layout, ("shard_count",))
    if differs is None and source.fact is not None:
        differs = settings_that_differ(own, source.fact, COMMON)
    if differs is not None:
        return Refuse(
            "config_mismatch",
            f"the cluster of {_name(source)} and this node differ: {differs}; make this node's equal",
        )
    return Adopt(layout, _name(source))


def _mismatch(own: NodeFact, facts: Sequence[NodeFact]) -> Refuse | None:
    for fact in facts:
        differs = settings_that_differ(own, fact, FOUNDING)
        if differs is not None:
            return Refuse("config_mismatch", f"{fact.name} and this node differ: {differs}; make them equal")
    return None


def _conflict(mine: Layout, theirs: Layout, seen: Seen) -> Refuse:
    return Refuse(
        "layout_conflict",
        f"two layouts of version {mine.version}: {mine.hash} ({_members(mine)}) and {theirs.hash} ({_members(theirs)}) "
        f"of {_name(seen)}; they are two clusters with one cluster.id. Nothing was overwritten: give one of them "
        "another id, or stop its nodes and move their data away",
    )


def _members(layout: Layout) -> str:
    names = [member.name for member in layout.members]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _name(seen: Seen) -> str:
    return seen.fact.name if seen.fact is not None else "a node"
