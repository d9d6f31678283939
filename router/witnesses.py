"""Which member should witness which shard: a vote without data where there are two replicas (docs/ownership.md). Pure.

Laws, in the order in which they win:

1. Only a shard of two replicas has one: with one replica nobody else could lead, and three need none.
2. It is on another host than both replicas; where there is no such member, there is none: it would go down with one of them.
3. Members that hold no data come first, then those in another region than both, then in another zone.
4. It stays where it is while nobody is better by these; else the member with the fewest shards to witness, then the ring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from router.placing import Member, host_of, ring_key
from router.ring import Ring

REPLICAS = 2


def witnesses(
    members: Iterable[Member], targets: Sequence[Sequence[str]], before: Sequence[str] = ()
) -> tuple[str, ...]:
    """For each shard its witness, or "". Empty when no shard has one."""
    by_name = {member.name: member for member in members}
    count = Counter[str]()
    ring = Ring(dict.fromkeys(by_name, 1))
    found = []
    for shard, voters in enumerate(targets):
        now = before[shard] if before else ""
        found.append(choose(by_name, shard, voters, ring, now, count))
        count[found[-1]] += 1
    return tuple(found) if any(found) else ()


def choose(
    members: dict[str, Member],
    shard: int,
    voters: Sequence[str],
    ring: Ring,
    now: str = "",
    count: Counter[str] | None = None,
    may: Callable[[str], bool] = lambda name: True,
) -> str:
    """The witness of one shard, or "". members: by name. ring: of all their names. now: who witnesses it. count: how many shards
    each witnesses already."""
    replicas = [members[name] for name in voters if name in members]
    if len(voters) != REPLICAS or len(replicas) != REPLICAS:
        return ""
    hosts = {(one.region, one.zone, host_of(one)) for one in replicas}
    fit = [
        one
        for one in members.values()
        if one.name not in voters and (one.region, one.zone, host_of(one)) not in hosts and may(one.name)
    ]
    if not fit:
        return ""
    rank = {name: place for place, name in enumerate(ring.walk(ring_key(shard)))}

    def order(one: Member) -> tuple[bool, bool, bool, bool, int, int]:
        region = any(one.region == other.region for other in replicas)
        zone = any((one.region, one.zone) == (other.region, other.zone) for other in replicas)
        taken = count[one.name] if count is not None else 0
        return bool(one.capacity), region, zone, one.name != now, taken, rank[one.name]

    return min(fit, key=order).name


def check(witnesses: Sequence[str], targets: Sequence[Collection[str]], names: Collection[str]) -> bool:
    """Whether these can be the witnesses of those targets, by what no law may break."""
    return not witnesses or (
        len(witnesses) == len(targets)
        and all(
            not one or (one in names and one not in voters and len(voters) == REPLICAS)
            for one, voters in zip(witnesses, targets, strict=True)
        )
    )
