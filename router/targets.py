"""Targets from targets: the laws of `router/placing.py`, with as few moves as they allow. Pure (docs/layout.md, *Targets*).

The result is optimal (with up to 5 regions): no targets that keep the laws as well need fewer moves. The costs of the flow are
lexicographic: fair shares (rounded down or up), then zones that a shard has twice, then hosts, then moves.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations, islice
from math import ceil, floor

from router.flow import Network
from router.placing import Member, fair_shares, host_of, place, ring_key
from router.ring import Ring

Targets = tuple[tuple[str, ...], ...]
# So many ways to round the regions' shares are tried: all of them, up to 5 regions.
TOTALS_MAX = 10
# Sums of costs stay below 2^63.
COST_MAX = 1 << 58


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many replicas of each shard a region holds: `full` for all shards, and one more for some of them where it is `open`."""

    full: dict[str, int]
    open: tuple[str, ...]
    left: int  # replicas of each shard that the open regions share


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a layout is made for. `members`: by name."""

    members: tuple[Member, ...]
    shard_count: int
    replication: int

    @cached_property
    def by_name(self) -> dict[str, Member]:
        return {member.name: member for member in self.members}

    @cached_property
    def regions(self) -> dict[str, list[Member]]:
        regions: dict[str, list[Member]] = {}
        for member in self.members:
            regions.setdefault(member.region, []).append(member)
        return regions

    @property
    def copies(self) -> int:
        return min(self.replication, len(self.members))

    @cached_property
    def rounds(self) -> Rounds:
        full, left = dict.fromkeys(self.regions, 0), self.copies
        while True:
            level = max(full.values())
            open_ = tuple(name for name, inside in self.regions.items() if len(inside) > level)
            if left < len(open_) or not left:
                return Rounds(full=full, open=open_, left=left)
            for name in open_:
                full[name] += 1
            left -= len(open_)

    def totals(self, now: dict[str, int]) -> list[dict[str, int]]:
        """How many replicas each region may hold: the roundings of its share of the last round, those nearest to `now` first."""
        rounds, shards = self.rounds, self.shard_count
        least = {name: full * shards for name, full in rounds.full.items()}
        if not rounds.left:
            return [least]
        weights = {name: sum(member.capacity for member in self.regions[name]) for name in rounds.open}
        shares = fair_shares(weights, shards * rounds.left, shards)
        for name, share in shares.items():
            least[name] += floor(share)
        part = {name: share - floor(share) for name, share in shares.items() if share != floor(share)}
        order = sorted(part, key=lambda name: (least[name] - now.get(name, 0), -part[name], name))
        ups = islice(combinations(order, int(sum(part.values()))), TOTALS_MAX)
        return [{name: total + (name in up) for name, total in least.items()} for up in ups]

    def shares(self, totals: dict[str, int]) -> dict[str, Fraction]:
        """The fair share of each member of what its region holds."""
        shares: dict[str, Fraction] = {}
        for region, inside in self.regions.items():
            weights = {member.name: member.capacity for member in inside}
            asking = self.shard_count if self.rounds.full[region] else totals[region]
            shares |= fair_shares(weights, totals[region], asking)
        return shares


def wanted(members: Iterable[Member], shard_count: int, replication: int) -> Wanted:
    """Raises ValueError for no members, two of one name, numbers below 1, or more than can be counted exactly."""
    ordered = tuple(sorted(members, key=lambda member: member.name))
    if not ordered or len({member.name for member in ordered}) != len(ordered):
        raise ValueError("a layout needs at least one member, each with its own name")
    if shard_count < 1 or replication < 1 or any(member.capacity < 1 for member in ordered):
        raise ValueError("shard_count, replication and every capacity must be at least 1")
    found = Wanted(members=ordered, shard_count=shard_count, replication=replication)
    if _weights(found)[2] * 4 > COST_MAX:
        raise ValueError(f"{shard_count} shards with {replication} replicas are too many to plan for")
    return found


def targets(for_: Wanted, before: Sequence[Sequence[str]] | None = None) -> Targets:
    """For each shard its members, the preferred primary first. `before`: the targets so far; None: there are none."""
    if before is None:
        before = [one.voters for one in place(for_.members, for_.shard_count, for_.replication)]
    held = _best(for_, before)
    primaries = _primaries(for_, held, before)
    ring = Ring({member.name: member.capacity for member in for_.members})
    result = []
    for shard, primary in enumerate(primaries):
        others = [name for name in ring.walk(ring_key(shard)) if name in held[shard] and name != primary]
        result.append((primary, *others))
    return tuple(result)


def _best(for_: Wanted, before: Sequence[Sequence[str]]) -> list[set[str]]:
    kept = [[name for name in voters if name in for_.by_name] for voters in before]
    now = Counter(for_.by_name[name].region for names in kept for name in names)
    solved = [_Replicas(for_, kept, totals) for totals in for_.totals(dict(now))]
    # The first of equals.
    return min(solved, key=lambda one: one.cost).held


def _weights(for_: Wanted) -> tuple[int, int, int]:
    """What one crowded host, one crowded zone, one replica off the fair share cost, where a move costs 1."""
    replicas = for_.shard_count * for_.copies
    crowds = replicas * for_.copies + 1
    host = replicas + 1
    return host, host * crowds, host * crowds * crowds


class _Replicas:
    """The flow of docs/layout.md, from each shard to the end of each region."""

    def __init__(self, for_: Wanted, kept: Sequence[Sequence[str]], totals: dict[str, int]) -> None:
        """kept: the targets so far, of members that remain. totals: how many replicas each region holds."""
        self._for, self._totals = for_, totals
        self._net = Network()
        self._host_cost, self._zone_cost, self._share_cost = _weights(for_)
        self._supply = Counter[int]()
        # By shard and member, the arc that says whether it holds it; by member, its arcs to the end.
        self._holds: list[dict[str, int]] = []
        self._ends: dict[str, list[int]] = {}
        # The way of a (shard, member): lists of parallel arcs, the cheapest first.
        self._ways: list[dict[str, list[list[int]]]] = []
        self._end = self._net.node()
        self._region_ends: dict[str, int] = {}
        nodes = self._members()
        for shard in range(for_.shard_count):
            self._shard(shard, nodes, set(kept[shard]))
        for shard, names in enumerate(kept):
            self._keep(shard, names)
        self._net.ship(self._supply.elements(), self._end)
        self.held = [{name for name, arc in holds.items() if self._net.flow(arc)} for holds in self._holds]
        # Crowding and moves; nobody is off its share.
        self.cost = self._net.cost() + self._share_cost * self._least

    def _members(self) -> dict[str, int]:
        net, nodes = self._net, {}
        shares = self._for.shares(self._totals)
        self._least = sum(floor(share) for share in shares.values())
        for region, inside in self._for.regions.items():
            collected = net.node()
            self._region_ends[region] = net.arc(collected, self._end, self._totals[region])
            for member in inside:
                node = nodes[member.name] = net.node()
                least, most = floor(shares[member.name]), ceil(shares[member.name])
                self._ends[member.name] = [
                    net.arc(node, collected, least, -self._share_cost),
                    net.arc(node, collected, most - least),
                ]
        return nodes

    def _shard(self, shard: int, nodes: dict[str, int], kept: set[str]) -> None:
        net, rounds = self._net, self._for.rounds
        self._holds.append({})
        self._ways.append({})
        source = net.node()
        self._supply[source] = rounds.left
        for region, inside in self._for.regions.items():
            most = rounds.full[region] + (rounds.left > 0 and region in rounds.open)
            if not most:
                continue
            here = net.node()
            self._supply[here] = rounds.full[region]
            extra = [net.arc(source, here, 1)] if most > rounds.full[region] else []
            self._region(shard, here, most, inside, nodes, kept, extra)

    def _region(
        self,
        shard: int,
        here: int,
        most: int,
        inside: list[Member],
        nodes: dict[str, int],
        kept: set[str],
        extra: list[int],
    ) -> None:
        zones: dict[str, dict[str, list[Member]]] = defaultdict(lambda: defaultdict(list))
        for member in inside:
            zones[member.zone][host_of(member)].append(member)
        for hosts in zones.values():
            at_zone, zone_arcs = self._level(here, min(most, sum(map(len, hosts.values()))), self._zone_cost)
            for members in hosts.values():
                at_host, host_arcs = self._level(at_zone, min(most, len(members)), self._host_cost)
                for member in members:
                    arc = self._net.arc(at_host, nodes[member.name], 1, member.name not in kept)
                    self._holds[shard][member.name] = arc
                    self._ways[shard][member.name] = [
                        *([extra] if extra else []),
                        *([zone_arcs] if zone_arcs else []),
                        *([host_arcs] if host_arcs else []),
                        [arc],
                        self._ends[member.name],
                    ]

    def _level(self, at: int, most: int, cost: int) -> tuple[int, list[int]]:
        """A node of its own for a zone or host that could be crowded: the n-th replica there shares it with n - 1 others."""
        if most < 2:
            return at, []
        node = self._net.node()
        return node, [self._net.arc(at, node, 1, n * cost) for n in range(most)]

    def _keep(self, shard: int, names: Iterable[str]) -> None:
        """What is held and may stay flows from the start."""
        net, rounds = self._net, self._for.rounds
        left, used = rounds.left, Counter[str]()
        for name in names:
            region = self._for.by_name[name].region
            way = self._ways[shard].get(name)
            end = self._region_ends[region]
            if way is None or not net.room(end):
                continue
            # The replicas of the full rounds are supplied at the region, that of the open one at the shard.
            own = used[region] < rounds.full[region]
            if not own and not (left and region in rounds.open and used[region] == rounds.full[region]):
                continue
            steps = way[1:] if own and rounds.left and region in rounds.open else way
            arcs = [next((arc for arc in step if net.room(arc)), -1) for step in steps]
            if -1 in arcs:
                continue
            for arc in [*arcs, end]:
                net.push(arc)
            used[region] += 1
            left -= not own
            self._supply[net.tail(arcs[0])] -= 1


def _primaries(for_: Wanted, held: Sequence[set[str]], before: Sequence[Sequence[str]]) -> list[str]:
    """One primary for each shard among those that hold it: shares as even as that allows, then few changes, to newcomers last."""
    net = Network()
    end = net.node()
    off = 3 * len(held) + 1
    shares = fair_shares({m.name: m.capacity for m in for_.members}, len(held), len(held))
    nodes, ends = {}, {}
    for name, share in shares.items():
        node = nodes[name] = net.node()
        least, most = floor(share), ceil(share)
        ends[name] = [net.arc(node, end, least, -off * len(held)), net.arc(node, end, most - least)]
        ends[name] += [net.arc(node, end, 1, (n + 1) * off) for n in range(len(held) - most)]
    supply, arcs = [], []
    for shard, names in enumerate(held):
        source = net.node()
        arcs.append(
            {name: net.arc(source, nodes[name], 1, _change(name, before[shard])) for name in sorted(names)}
        )
        now = before[shard][0] if before[shard] else ""
        if now in names:
            net.push(arcs[shard][now])
            net.push(next(arc for arc in ends[now] if net.room(arc)))
        else:
            supply.append(source)
    net.ship(supply, end)
    return [next(name for name, arc in one.items() if net.flow(arc)) for one in arcs]


def _change(name: str, before: Sequence[str]) -> int:
    if before and before[0] == name:
        return 0
    return 1 if name in before else 2
