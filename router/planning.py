"""From staged changes to a plan: the layout that would follow, every move with its bytes, what cannot be. Pure."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from router.layout import Layout, Member
from router.placing import host_of
from router.targets import Targets, Wanted, targets, wanted
from router.witnesses import witnesses

# What a node may spend on moves (docs/layout.md).
MOVE_BYTES_PER_S = 50e6
MOVES_AT_ONCE = 2
SETTABLE = ("region", "zone", "host", "capacity", "id")


class ChangeError(ValueError):
    """A change that cannot be made. `field`: what of it."""

    def __init__(self, message: str, field: str = "node") -> None:
        self.field = field
        super().__init__(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One staged change. join: node and its places; leave: node; set: node and some of SETTABLE, or only `replication`."""

    action: str
    node: str = ""
    values: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        said = [f"{key}={value}" for key, value in self.values if key != "id"]
        return " ".join([self.action, *([self.node] if self.node else []), *said])


def changed(base: Layout, changes: Sequence[Change]) -> tuple[tuple[Member, ...], int]:
    """Members and replication after the changes, in their order. Raises ChangeError."""
    members = {member.name: member for member in base.members}
    replication = base.replication
    for change in changes:
        values = dict(change.values)
        if change.action == "set" and not change.node:
            replication = int(values["replication"])
            continue
        there = members.get(change.node)
        if change.action == "join":
            # Once more with another id: a new disk in the place of the old one.
            if there is not None and there.id == values.get("id", ""):
                raise ChangeError(f"{change.node} is a member already")
            members[change.node] = Member(name=change.node, **values)
        elif there is None:
            raise ChangeError(f"{change.node} is not a member; the members are {', '.join(sorted(members))}")
        elif change.action == "leave":
            del members[change.node]
        else:
            members[change.node] = replace(there, **values)
    if not _holding(members.values()):
        raise ChangeError("a cluster keeps at least one member that holds data")
    if replication < 1:
        raise ChangeError("replication must be at least 1", "replication")
    return tuple(members[name] for name in sorted(members)), replication


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One replica. source None: one more than before; target None: one fewer. size_bytes: of the shard."""

    shard: int
    source: str | None
    target: str | None
    size_bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one member holds under one layout. share: its fair share of replicas. witnesses: shards that it witnesses."""

    node: str
    replicas: int
    primaries: int
    size_bytes: int
    share: float
    witnesses: int


@dataclass(frozen=True, slots=True)
class Limit:
    """What a layout cannot have, and why. law: `replicas`, `regions`, `zones`, `hosts`, `capacity` or `failover`."""

    law: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """layout: what would follow `base`. handovers: shards whose preferred primary changes. gains: in sentences, what it can that
    `base` cannot, and what it loses. eta_s: of all moves, throttled."""

    base: Layout
    layout: Layout
    moves: tuple[Move, ...]
    handovers: int
    before: tuple[Load, ...]
    after: tuple[Load, ...]
    limits: tuple[Limit, ...]
    gains: tuple[str, ...]
    eta_s: float


def first_layout(members: Iterable[Member], shard_count: int, replication: int, cluster_id: str) -> Layout:
    """Version 1. Raises ChangeError where nobody holds data; ValueError."""
    everybody = tuple(sorted(members, key=lambda member: member.name))
    if not _holding(everybody):
        raise ChangeError("a cluster needs at least one member that holds data", "members")
    held = targets(wanted(_holding(everybody), shard_count, replication))
    return Layout(
        version=1,
        shard_count=shard_count,
        replication=replication,
        members=everybody,
        targets=held,
        witnesses=witnesses(everybody, held),
        cluster_id=cluster_id,
    )


def _holding(members: Iterable[Member]) -> list[Member]:
    """Those that may hold data."""
    return [member for member in members if member.capacity]


def plan(base: Layout, changes: Sequence[Change], sizes: Mapping[int, int]) -> Plan:
    """The layout after the changes, and what it takes. sizes: bytes by shard. Raises ChangeError."""
    members, replication = changed(base, changes)
    before = base.wished()
    held = targets(wanted(_holding(members), base.shard_count, replication), before)
    layout = Layout(
        version=base.version + 1,
        shard_count=base.shard_count,
        replication=replication,
        members=members,
        targets=held,
        witnesses=witnesses(members, held, base.witnesses),
        base=base.hash,
        cluster_id=base.cluster_id,
    )
    moves = tuple(_moves(base, layout, sizes))
    return Plan(
        base=base,
        layout=layout,
        moves=moves,
        handovers=sum(old[0] != new[0] for old, new in zip(before, layout.targets, strict=True)),
        before=loads(base, sizes),
        after=loads(layout, sizes),
        limits=tuple(limits(layout)),
        gains=tuple(_gains(base, layout)),
        eta_s=eta_s(moves, {shard: voters[0] for shard, voters in enumerate(before)}),
    )


def _moves(base: Layout, layout: Layout, sizes: Mapping[int, int]) -> Iterable[Move]:
    places = {member.name: member for member in (*base.members, *layout.members)}
    for shard, (old, new) in enumerate(zip(base.wished(), layout.targets, strict=True)):
        gone = sorted(set(old) - set(new))
        for target in sorted(set(new) - set(old)):
            source = min(gone, key=lambda name: _distance(places[name], places[target]), default=None)
            if source is not None:
                gone.remove(source)
            yield _move(base, layout, shard, source, target, sizes)
        for source in gone:
            yield _move(base, layout, shard, source, None, sizes)


def _distance(a: Member, b: Member) -> tuple[bool, bool, str]:
    return a.region != b.region, a.zone != b.zone, a.name


def _move(
    base: Layout, layout: Layout, shard: int, source: str | None, target: str | None, sizes: Mapping[int, int]
) -> Move:
    if source is not None and layout.member(source) is None:
        reason = f"{source} leaves"
    elif target is not None and base.member(target) is None:
        reason = f"{target} joins"
    elif source is None or target is None:
        reason = f"replication {base.replication} → {layout.replication}"
    elif _crowding(base, base.wished()[shard]) > _crowding(layout, layout.targets[shard]):
        reason = "spread"
    else:
        reason = "fair share"
    size = 0 if target is None else sizes.get(shard, 0)
    return Move(shard=shard, source=source, target=target, size_bytes=size, reason=reason)


def _crowding(layout: Layout, names: Sequence[str]) -> tuple[int, int, int]:
    """Replicas that share a region, a zone, a host with another."""
    members = [member for member in layout.members if member.name in names]
    regions = Counter(member.region for member in members)
    zones = Counter((member.region, member.zone) for member in members)
    hosts = Counter((member.region, member.zone, host_of(member)) for member in members)
    count = len(members)
    return count - len(regions), count - len(zones), count - len(hosts)


def loads(layout: Layout, sizes: Mapping[int, int]) -> tuple[Load, ...]:
    """What each member holds, by name."""
    wished = layout.wished()
    held = Counter(name for voters in wished for name in voters)
    primaries = Counter(voters[0] for voters in wished)
    size = Counter[str]()
    for shard, voters in enumerate(wished):
        for name in voters:
            size[name] += sizes.get(shard, 0)
    shares = _shares(layout, wished)
    return tuple(
        Load(
            node=member.name,
            replicas=held[member.name],
            primaries=primaries[member.name],
            size_bytes=size[member.name],
            share=round(float(shares.get(member.name, 0)), 3),
            witnesses=layout.witnesses.count(member.name),
        )
        for member in layout.members
    )


def _shares(layout: Layout, wished: Targets) -> dict[str, Fraction]:
    made = _wanted(layout)
    held = Counter(name for voters in wished for name in voters)
    return made.shares(
        {region: sum(held[one.name] for one in inside) for region, inside in made.regions.items()}
    )


def _wanted(layout: Layout) -> Wanted:
    return wanted(_holding(layout.members), layout.shard_count, layout.replication)


def eta_s(moves: Sequence[Move], primaries: Mapping[int, str]) -> float:
    """How long the moves take in their order, with MOVES_AT_ONCE in and out of each node, which share MOVE_BYTES_PER_S."""
    free: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * MOVES_AT_ONCE)
    last = 0.0
    for move in moves:
        if move.target is None:
            continue
        into, out = free["in", move.target], free["out", primaries[move.shard]]
        begin = max(heapq.heappop(into), heapq.heappop(out))
        end = begin + move.size_bytes / (MOVE_BYTES_PER_S / MOVES_AT_ONCE)
        heapq.heappush(into, end)
        heapq.heappush(out, end)
        last = max(last, end)
    return round(last, 1)


# -- what cannot be ----------------------------------------------------------------------------------------------------


def limits(layout: Layout) -> Iterable[Limit]:
    """Law by law what this layout does not have, in words."""
    members = len(_holding(layout.members))
    copies = min(layout.replication, members)
    if copies < layout.replication:
        yield Limit(
            "replicas",
            f"replication {layout.replication} needs as many members and there {_are(members)}: "
            f"each shard has {copies} replica{_s(copies)}",
        )
    if copies == 1:
        yield Limit("failover", "each shard is on one disk alone: what that disk loses is lost")
    bare = layout.shard_count - _witnessed(layout)
    if copies == 2 and bare:
        yield Limit(
            "failover",
            f"{bare} of {layout.shard_count} shards have two replicas and no witness: two replicas cannot fail over. When the "
            "host of one is down, they are read-only until it is back; a third host as witness mends that "
            "(`gmco cluster join NODE --witness`)",
        )
    yield from _spread_limits(layout, copies)
    made = _wanted(layout)
    for inside in made.regions.values():
        yield from _capacity_limits(layout, made, inside)


def _spread_limits(layout: Layout, copies: int) -> Iterable[Limit]:
    regions = {member.region for member in _holding(layout.members)}
    if 1 < len(regions) < copies:
        yield Limit(
            "regions",
            f"{copies} replicas cannot be in as many regions, there {_are(len(regions))} "
            f"({', '.join(sorted(regions))}): some share one",
        )
    elif len(regions) == 1 and copies > 1:
        yield Limit("regions", f"all members are in region {min(regions)}: nothing outlives it")
    crowds = [_crowding(layout, names) for names in layout.wished()]
    by_name = {member.name: member for member in layout.members}
    zones = sum(zone > 0 for _, zone, _ in crowds)
    if zones:
        shared = sorted(
            {by_name[name].region for names in layout.wished() for name in _shared(by_name, names)}
        )
        yield Limit(
            "zones",
            f"{zones} of {layout.shard_count} shards have two replicas in one zone (region{_s(len(shared))} "
            f"{', '.join(shared)}): too few zones, or their capacities do not allow more",
        )
    hosts = sum(host > 0 for _, _, host in crowds)
    if hosts:
        yield Limit("hosts", f"{hosts} of {layout.shard_count} shards have two replicas on one host")


def _shared(by_name: Mapping[str, Member], names: Sequence[str]) -> Iterable[str]:
    zones = Counter((by_name[name].region, by_name[name].zone) for name in names)
    return [name for name in names if zones[by_name[name].region, by_name[name].zone] > 1]


def _capacity_limits(layout: Layout, made: Wanted, inside: Sequence[Member]) -> Iterable[Limit]:
    shares = _shares(layout, layout.wished())
    total = sum(shares[member.name] for member in inside)
    capacity = sum(member.capacity for member in inside)
    for member in inside:
        asked = total * member.capacity / capacity
        if asked > shares[member.name] and len(inside) > 1:
            yield Limit(
                "capacity",
                f"{member.name} (capacity {member.capacity} of {capacity}) should hold {float(asked):.1f} replicas and can hold "
                f"each shard once only: {float(shares[member.name]):g}; the others of its region hold the rest",
            )


def _witnessed(layout: Layout) -> int:
    return sum(map(bool, layout.witnesses))


def _gains(base: Layout, layout: Layout) -> Iterable[str]:
    """Of witnesses, in words."""
    pairs = [(base.witness(shard), layout.witness(shard)) for shard in range(layout.shard_count)]
    for name in sorted({new for old, new in pairs if new != old and new}):
        fresh = sum(not old and new == name for old, new in pairs)
        taken = sum(bool(old) and old != new == name for old, new in pairs)
        if fresh:
            yield (
                f"{name} witnesses {fresh} shard{_s(fresh)} of two replicas: either of their two hosts may fail and writes go on"
            )
        if taken:
            yield f"{name} witnesses {taken} shard{_s(taken)} in the place of another"
    needless = sum(bool(old) and not new for old, new in pairs)
    if needless and min(map(len, layout.targets)) > 2:
        yield f"{needless} shard{_s(needless)} need no witness any more: three replicas elect by themselves"


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
