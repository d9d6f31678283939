"""First targets: which members should hold which shards. Pure: members in, placements out, the same on every node.

Laws, in the order in which they win:

1. A shard's replicas are on different members.
2. They are spread over the regions as evenly as the regions' members allow.
3. Within a region no member holds more than its fair share, rounded up. The fair share is by capacity, of
   what that region holds; what a big member cannot take, because it has every shard, goes to the others.
4. Within a region they are in different zones, then on different hosts, where 3 leaves room for it.
5. Primaries are shared out by capacity, as evenly as the replica sets allow.
6. The order of `members` does not matter; a member that comes or goes moves few replicas.

What is here starts from nothing; `router/targets.py` goes on from targets that exist, and makes 3, 4 and 6 exact.

Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016, arXiv:1608.01350): each shard
walks the ring from its point and takes the first bins that still have room. Where greedy walking runs into a
dead end, an augmenting path (as in bipartite matching) makes room, see `_Assignment`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from router.ring import Ring


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One node of the cluster. `capacity` is relative: twice the capacity, twice the shards; 0: it holds none and only witnesses.
    `id`: its node's id, 16 hex digits, by which a new disk is told from the old one."""

    name: str
    region: str = "local"
    zone: str = "local"
    host: str = ""
    capacity: int = 1
    id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Who should hold one shard: voters in the order in which they are preferred as primary. Who leads, elections decide."""

    shard: int
    epoch: int
    voters: tuple[str, ...]

    @property
    def primary(self) -> str:
        return self.voters[0]


def fair_shares(weights: dict[str, int], total: int, most: int) -> dict[str, Fraction]:
    """`total` shared out by weight, none above `most`; what one cannot take goes to the others."""
    shares: dict[str, Fraction] = {}
    rest = dict(weights)
    left = Fraction(total)
    while rest:
        weight = sum(rest.values())
        full = [name for name in rest if left * rest[name] >= most * weight]
        if not full:
            return shares | {name: left * rest[name] / weight for name in rest}
        for name in full:
            shares[name] = Fraction(most)
            left -= most
            del rest[name]
        left = max(left, Fraction(0))
    return shares


def place(members: Iterable[Member], shard_count: int, replication: int) -> list[Placement]:
    """The wished placement of every shard, in shard order, epoch 1.

    With fewer members than `replication` every member holds every shard. Raises ValueError for no members,
    two of one name, or numbers below 1.
    """
    ordered = sorted(members, key=lambda member: member.name)
    names = [member.name for member in ordered]
    if not ordered or len(set(names)) != len(names):
        raise ValueError("a layout needs at least one member, each with its own name")
    if shard_count < 1 or replication < 1 or any(member.capacity < 1 for member in ordered):
        raise ValueError("shard_count, replication and every capacity must be at least 1")
    regions: dict[str, list[Member]] = {}
    for member in ordered:
        regions.setdefault(member.region, []).append(member)
    copies = _copies_per_region(regions, shard_count, min(replication, len(ordered)))
    held: list[list[str]] = [[] for _ in range(shard_count)]
    for region, inside in regions.items():
        for shard, chosen in enumerate(_place_in_region(inside, [each[region] for each in copies])):
            held[shard].extend(chosen)
    ring = Ring({member.name: member.capacity for member in ordered})
    primaries = _primaries(ordered, held)
    placements = []
    for shard, primary in enumerate(primaries):
        mine = set(held[shard]) - {primary}
        voters = (primary, *(name for name in ring.walk(ring_key(shard)) if name in mine))
        placements.append(Placement(shard=shard, epoch=1, voters=voters))
    return placements


def ring_key(shard: int) -> str:
    return f"shard-{shard}"


class _Assignment:
    """Shards to bins: each shard in `demand[shard]` different bins, each bin at most `caps[bin]` shards.

    When every shard asks for as many, the caps add up to the demand and none is above the number of shards
    that ask, an assignment exists (Gale–Ryser) and augmenting paths find it. Unequal demands can have none:
    `add` says whether it succeeded.
    """

    def __init__(self, shard_count: int, caps: dict[str, int]) -> None:
        self.caps = caps
        self.bins_of: list[list[str]] = [[] for _ in range(shard_count)]
        self.shards_in: dict[str, set[int]] = {name: set() for name in caps}

    def has_room(self, name: str) -> bool:
        return len(self.shards_in[name]) < self.caps[name]

    def put(self, shard: int, name: str) -> None:
        self.bins_of[shard].append(name)
        self.shards_in[name].add(shard)

    def move(self, shard: int, source: str, target: str) -> None:
        bins = self.bins_of[shard]
        bins[bins.index(source)] = target
        self.shards_in[source].remove(shard)
        self.shards_in[target].add(shard)

    def add(
        self, shard: int, walk: Sequence[str], key: Callable[[str], tuple[int, ...]] | None = None
    ) -> bool:
        """One more bin: the first of the walk with room (or of least `key`), else by an augmenting path."""
        free = [name for name in walk if name not in self.bins_of[shard] and self.has_room(name)]
        if free:
            self.put(shard, min(free, key=key) if key else free[0])
            return True
        return self._augment(shard, walk)

    def _augment(self, shard: int, walk: Sequence[str]) -> bool:
        # Breadth first over full bins: bin → other is an edge when a shard in bin may go to other.
        came_from: dict[str, tuple[str, int] | None] = {
            name: None for name in walk if name not in self.bins_of[shard]
        }
        queue = deque(came_from)
        while queue:
            source = queue.popleft()
            for moving in sorted(self.shards_in[source]):
                for target in self._allowed(moving):
                    if target in came_from or target in self.bins_of[moving]:
                        continue
                    came_from[target] = (source, moving)
                    if self.has_room(target):
                        self._shift(shard, target, came_from)
                        return True
                    queue.append(target)
        return False

    def _allowed(self, shard: int) -> Iterable[str]:
        return self.caps

    def _shift(self, shard: int, name: str, came_from: dict[str, tuple[str, int] | None]) -> None:
        step = came_from[name]
        while step is not None:
            source, moving = step
            self.move(moving, source, name)
            name, step = source, came_from[source]
        self.put(shard, name)


class _PrimaryAssignment(_Assignment):
    """One bin for each shard, only among the members that hold it."""

    def __init__(self, held: list[list[str]], caps: dict[str, int]) -> None:
        super().__init__(len(held), caps)
        self._held = held

    def _allowed(self, shard: int) -> Iterable[str]:
        return self._held[shard]


def _copies_per_region(
    regions: dict[str, list[Member]], shard_count: int, replication: int
) -> list[dict[str, int]]:
    """For each shard, how many replicas each region gets: one each per round, the last round by capacity."""
    copies = [dict.fromkeys(regions, 0) for _ in range(shard_count)]
    left, level = replication, 0
    while left:
        open_regions = [name for name in regions if len(regions[name]) > level]
        if left >= len(open_regions):
            for each in copies:
                for name in open_regions:
                    each[name] += 1
            left, level = left - len(open_regions), level + 1
            continue
        weights = {name: sum(member.capacity for member in regions[name]) for name in open_regions}
        shares = fair_shares(weights, shard_count * left, shard_count)
        chosen = _Assignment(shard_count, {name: ceil(share) for name, share in shares.items()})
        ring = Ring(weights)
        for shard in range(shard_count):
            walk = ring.walk(ring_key(shard))
            for _ in range(left):
                found = chosen.add(shard, walk)
                assert found, "fair caps always leave a way"
        for shard, each in enumerate(copies):
            for name in chosen.bins_of[shard]:
                each[name] += 1
        left = 0
    return copies


def _place_in_region(members: list[Member], demand: list[int]) -> list[list[str]]:
    """For each shard, the members of this region that hold it."""
    by_name = {member.name: member for member in members}
    weights = {member.name: member.capacity for member in members}
    asking = sum(1 for each in demand if each)
    shares = fair_shares(weights, sum(demand), asking)
    chosen = _Assignment(len(demand), {name: ceil(share) for name, share in shares.items()})
    ring = Ring(weights)
    # The greedy come first by demand, so that a dead end is rarer; within that the shard's number decides.
    for shard in sorted(range(len(demand)), key=lambda shard: -demand[shard]):
        walk = ring.walk(ring_key(shard)) if demand[shard] else []
        rank = {name: i for i, name in enumerate(walk)}
        for _ in range(demand[shard]):
            here = [by_name[name] for name in chosen.bins_of[shard]]

            def crowd(name: str, here: list[Member] = here, rank: dict[str, int] = rank) -> tuple[int, ...]:
                member = by_name[name]
                return (*_crowd(member, here), rank[name])

            while not chosen.add(shard, walk, crowd):
                # Very unequal demands: the lightest burden above the fair share is spread over everybody.
                chosen.caps = {name: min(cap + 1, asking) for name, cap in chosen.caps.items()}
    _spread(chosen, by_name)
    return chosen.bins_of


def host_of(member: Member) -> str:
    return member.host or member.name


def _crowd(member: Member, others: list[Member]) -> tuple[int, int]:
    """With how many of the others it would share a zone, and a host."""
    zone = sum(other.zone == member.zone for other in others)
    host = sum(other.zone == member.zone and host_of(other) == host_of(member) for other in others)
    return zone, host


def _cost(names: Iterable[str], by_name: dict[str, Member]) -> tuple[int, int]:
    members = [by_name[name] for name in names]
    crowds = [_crowd(member, members[:i]) for i, member in enumerate(members)]
    return sum(zone for zone, _ in crowds), sum(host for _, host in crowds)


def _spread(chosen: _Assignment, by_name: dict[str, Member]) -> None:
    """Greedy walks can leave a shard twice in a zone: move or swap replicas while that relieves one."""
    if len({(member.zone, host_of(member)) for member in by_name.values()}) == 1:
        return
    for _ in range(len(by_name)):
        improved = False
        for shard, names in enumerate(chosen.bins_of):
            while len(names) > 1 and _cost(names, by_name) != (0, 0) and _relieve(chosen, by_name, shard):
                improved = True
        if not improved:
            return


def _relieve(chosen: _Assignment, by_name: dict[str, Member], shard: int) -> bool:
    """One move or swap that makes this shard, and the sum with its partner, less crowded."""
    names = chosen.bins_of[shard]
    before = _cost(names, by_name)
    for source in list(names):
        rest = [name for name in names if name != source]
        for target in by_name:
            if target in names:
                continue
            after = _cost([*rest, target], by_name)
            if after >= before:
                continue
            if chosen.has_room(target):
                chosen.move(shard, source, target)
                return True
            for partner in sorted(chosen.shards_in[target] - chosen.shards_in[source]):
                theirs = chosen.bins_of[partner]
                swapped = [source if name == target else name for name in theirs]
                was, now = _cost(theirs, by_name), _cost(swapped, by_name)
                if (after[0] + now[0], after[1] + now[1]) < (before[0] + was[0], before[1] + was[1]):
                    chosen.move(shard, source, target)
                    chosen.move(partner, target, source)
                    return True
    return False


def _primaries(members: list[Member], held: list[list[str]]) -> list[str]:
    """One primary per shard; nobody has more than its fair share of them where the replica sets allow."""
    weights = {member.name: member.capacity for member in members}
    shares = fair_shares(weights, len(held), len(held))
    chosen = _PrimaryAssignment(held, {name: ceil(share) for name, share in shares.items()})
    ring = Ring(weights)
    for shard, names in enumerate(held):
        mine = set(names)
        walk = [name for name in ring.walk(ring_key(shard)) if name in mine]
        while not chosen.add(shard, walk):
            chosen.caps = {name: cap + 1 for name, cap in chosen.caps.items()}
    return [bins[0] for bins in chosen.bins_of]
