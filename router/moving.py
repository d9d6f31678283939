"""The targets of one shard: changed by hand, and who stands in for members that are gone. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache

from router.layout import Layout, Member
from router.placing import host_of, ring_key
from router.planning import ChangeError
from router.ring import Ring
from router.witnesses import choose, witnesses


def moved(base: Layout, shard: int, source: str, target: str) -> Layout:
    """`target` in the place of `source`; `base` itself when it says so already. Raises ChangeError."""
    wished = _wished(base, shard)
    there = base.member(target)
    if there is None:
        raise ChangeError(
            f"{target} is not a member, so nothing can be wished to be there; `gmco cluster join` it first",
            "target",
        )
    if not there.capacity:
        raise ChangeError(
            f"{target} only witnesses: it holds no data; `gmco cluster set` it a capacity first", "target"
        )
    if source not in wished:
        if target in wished:
            return base
        raise ChangeError(
            f"shard {shard} is not on {source}, by the layout: it is on {', '.join(wished)}", "source"
        )
    if target in wished:
        raise ChangeError(f"{target} holds shard {shard} already", "target")
    return _with(base, shard, tuple(target if name == source else name for name in wished))


def stayed(base: Layout, shard: int, voters: Collection[str]) -> Layout:
    """Wished are those who vote now, in place of those who only shall; `base` itself when those are the same.

    Raises ChangeError.
    """
    wished = _wished(base, shard)
    coming = [name for name in wished if name not in voters]
    # Those who leave the cluster cannot be wished.
    going = [name for name in voters if name not in wished and base.member(name) is not None]
    if not coming:
        return base
    if len(going) < len(coming):
        raise ChangeError(
            f"{', '.join(coming)} cannot be left out of shard {shard}: nobody else who is a member has it",
            "shard",
        )
    back = dict(zip(coming, going, strict=False))
    return _with(base, shard, tuple(back.get(name, name) for name in wished))


def _wished(base: Layout, shard: int) -> tuple[str, ...]:
    if shard >= base.shard_count:
        raise ChangeError(
            f"there is no shard {shard}: they are numbered 0 to {base.shard_count - 1}", "shard"
        )
    return base.wished()[shard]


def _with(base: Layout, shard: int, names: tuple[str, ...]) -> Layout:
    wished = base.wished()
    targets = (*wished[:shard], names, *wished[shard + 1 :])
    return replace(
        base,
        version=base.version + 1,
        base=base.hash,
        targets=targets,
        witnesses=witnesses(base.members, targets, base.witnesses),
    )


def stand_ins(
    layout: Layout,
    shard: int,
    absent: Collection[str],
    may: Callable[[str], bool],
    holders: Collection[str] = (),
) -> tuple[str, ...]:
    """The shard's targets with each absent one replaced by the member that crowds the others least: by region, zone, host; of
    equals one that holds the shard, then the next by the ring. An absent one stays where nobody may take its place.

    may: whether a member can hold something for another. holders: who has a replica now.
    """
    wished = _wished(layout, shard)
    if not any(name in absent for name in wished):
        return wished
    members = {member.name: member for member in layout.members}
    walk = _ring(tuple((member.name, member.capacity) for member in layout.members if member.capacity)).walk(
        ring_key(shard)
    )
    names = list(wished)
    for place, name in enumerate(wished):
        if name not in absent:
            continue
        others = [members[one] for one in names if one not in absent]
        free = [one for one in walk if one not in names and one not in absent and may(one)]
        if free:
            names[place] = min(
                free, key=lambda one: (*_crowd(members[one], others), one not in holders, walk.index(one))
            )
    return tuple(names)


@lru_cache(maxsize=4)
def _ring(capacities: tuple[tuple[str, int], ...]) -> Ring:
    """While somebody is gone it is asked for by every shard, again and again; another layout has another one."""
    return Ring(dict(capacities))


def witness(layout: Layout, shard: int, voters: Sequence[str], may: Callable[[str], bool]) -> str:
    """Who should witness the shard while it should be held by `voters`: the wished one, or another in its place; empty: nobody.

    may: whether a member can witness anything now.
    """
    wished = layout.witness(shard)
    if set(voters) == set(_wished(layout, shard)) and (not wished or may(wished)):
        return wished
    members = {member.name: member for member in layout.members}
    return choose(members, shard, voters, _ring(tuple((name, 1) for name in members)), wished, may=may)


def _crowd(member: Member, others: Sequence[Member]) -> tuple[int, int, int]:
    """With how many of the others it shares a region, a zone, a host."""
    region = [one for one in others if one.region == member.region]
    zone = [one for one in region if one.zone == member.zone]
    return len(region), len(zone), sum(host_of(one) == host_of(member) for one in zone)
