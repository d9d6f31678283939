"""The laws of `router/targets.py`: for any cluster, after any change, against a naive solver that tries everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product
from math import ceil, floor
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from router.placing import Member, fair_shares, host_of
from router.targets import Targets, targets, wanted
from tests.properties.test_layout import clusters

SHARDS = st.integers(1, 30)
REPLICATION = st.integers(1, 5)


def moved(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))


def regions_of(members: Sequence[Member]) -> dict[str, list[Member]]:
    regions: dict[str, list[Member]] = {}
    for member in members:
        regions.setdefault(member.region, []).append(member)
    return regions


def shares_of(members: Sequence[Member], held: Counter[str], asking: dict[str, int]) -> dict[str, Fraction]:
    """Of what each region really holds."""
    shares: dict[str, Fraction] = {}
    for region, inside in regions_of(members).items():
        total = sum(held[member.name] for member in inside)
        shares |= fair_shares({member.name: member.capacity for member in inside}, total, asking[region])
    return shares


def asking_of(members: Sequence[Member], result: Sequence[Sequence[str]]) -> dict[str, int]:
    return {
        region: sum(1 for names in result if {member.name for member in inside} & set(names))
        for region, inside in regions_of(members).items()
    }


def crowds(members: Sequence[Member], names: Sequence[str]) -> tuple[int, int]:
    """Pairs in one zone, and on one host."""
    by_name = {member.name: member for member in members}
    pairs = [(by_name[a], by_name[b]) for a, b in combinations(sorted(names), 2)]
    zones = [(a, b) for a, b in pairs if (a.region, a.zone) == (b.region, b.zone)]
    return len(zones), sum(host_of(a) == host_of(b) for a, b in zones)


def check_laws(members: Sequence[Member], replication: int, result: Targets) -> None:
    known = {member.name for member in members}
    regions = regions_of(members)
    of = {member.name: member.region for member in members}
    for names in result:
        assert len(names) == len(set(names)) == min(replication, len(members))
        assert known.issuperset(names)
        copies = Counter(of[name] for name in names)
        fewest = min((copies[name] for name in regions if copies[name] < len(regions[name])), default=None)
        assert fewest is None or max(copies.values()) <= fewest + 1
    held = Counter(name for names in result for name in names)
    for name, share in shares_of(members, held, asking_of(members, result)).items():
        assert floor(share) <= held[name] <= ceil(share)


@settings(max_examples=150, deadline=None)
@given(clusters(), clusters(), SHARDS, REPLICATION, REPLICATION)
def test_the_laws_hold_whatever_was_before(
    old: list[Member], new: list[Member], shard_count: int, replication: int, later: int
) -> None:
    """`laws-hold`."""
    before = targets(wanted(old, shard_count, replication))
    check_laws(old, replication, before)
    after = targets(wanted(new, shard_count, later), before)
    check_laws(new, later, after)
    # Planned again from there nothing moves, and no primary changes.
    again = targets(wanted(new, shard_count, later), after)
    assert moved(after, again) == 0
    assert [names[0] for names in again] == [names[0] for names in after]


@settings(max_examples=60, deadline=None)
@given(clusters(), SHARDS, REPLICATION, st.randoms(use_true_random=False))
def test_every_node_computes_the_same(
    members: list[Member], shard_count: int, replication: int, shuffler: Random
) -> None:
    """`order-free`."""
    before = targets(wanted(members, shard_count, replication))
    assert before == targets(wanted(shuffler.sample(members, len(members)), shard_count, replication))
    more = [*members, Member(name="new", region="r1")]
    assert targets(wanted(more, shard_count, replication), before) == targets(
        wanted(shuffler.sample(more, len(more)), shard_count, replication), before
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 20), st.integers(12, 100), st.integers(1, 3), st.integers(1, 4))
def test_a_new_member_takes_its_share_and_nothing_else_moves(
    count: int, shard_count: int, replication: int, zones: int
) -> None:
    """`few-moves`."""
    members = [Member(name=f"n{i}", zone=f"z{i % zones}", host=f"h{i}") for i in range(count)]
    # Where zones are crowded, the new member may allow a better spread, and that wins over few moves.
    before = targets(wanted(members, shard_count, replication))
    crowded = sum(crowds(members, names)[0] for names in before)
    assume(zones == 1 or crowded == 0)
    new = Member(name="new", zone="z0")
    after = targets(wanted([*members, new], shard_count, replication), before)
    held = Counter(name for names in after for name in names)
    # Who must give something away, and has nothing that may lie beside what the new one can take, gives it to another.
    most = ceil(Fraction(shard_count * min(replication, count + 1), count + 1))
    load = Counter(name for names in before for name in names)
    assert held["new"] <= most
    above = sum(max(0, one - most) for one in load.values()) if zones > 1 else 0
    assert held["new"] <= moved(before, after) <= held["new"] + above


@pytest.mark.parametrize(
    ("regions", "zones", "shard_count"),
    [*product((1, 2, 3, 4, 7), (1, 2, 3), (100, 128)), (1, 3, 1_000), (3, 2, 1_000)],
)
def test_adding_one_node_to_a_hundred_moves_hardly_more_than_its_fair_share(
    regions: int, zones: int, shard_count: int
) -> None:
    members = [
        Member(name=f"n{i:03}", region=f"r{i % regions}", zone=f"z{i // regions % zones}") for i in range(100)
    ]
    before = targets(wanted(members, shard_count, 3))
    more = wanted([*members, Member(name="new", region="r0", zone="z0")], shard_count, 3)
    after = targets(more, before)
    held = Counter(member for names in after for member in names)
    share = more.shares({r: sum(held[m.name] for m in inside) for r, inside in more.regions.items()})["new"]
    assert moved(before, after) <= Fraction(12, 10) * share


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 20), st.integers(12, 100), st.integers(1, 3), st.integers(0, 19))
def test_removing_one_moves_what_it_held(count: int, shard_count: int, replication: int, gone: int) -> None:
    """`few-moves`."""
    members = [Member(name=f"n{i}") for i in range(count)]
    before = targets(wanted(members, shard_count, replication))
    left = [member for i, member in enumerate(members) if i != gone % count]
    after = targets(wanted(left, shard_count, replication), before)
    held = Counter(name for names in before for name in names)[f"n{gone % count}"]
    assert moved(before, after) == held


def naive(
    members: Sequence[Member], shard_count: int, replication: int, before: Targets
) -> tuple[int, int, int]:
    """Tries all targets: the least crowding (zones, hosts) that the laws allow, and the fewest moves with it."""
    names = [member.name for member in members]
    of = {member.name: member.region for member in members}
    sizes = Counter(of.values())

    def spread(chosen: tuple[str, ...]) -> bool:
        copies = Counter(of[name] for name in chosen)
        fewest = min((copies[r] for r in sizes if copies[r] < sizes[r]), default=None)
        return fewest is None or max(copies.values()) <= fewest + 1

    lawful = [one for one in combinations(names, min(replication, len(names))) if spread(one)]
    crowd = {one: crowds(members, one) for one in lawful}
    best = (10**9, 10**9, 10**9)
    for result in product(lawful, repeat=shard_count):
        zones = sum(crowd[one][0] for one in result)
        if zones > best[0]:
            continue
        held = Counter(name for one in result for name in one)
        shares = shares_of(members, held, asking_of(members, result))
        if not all(floor(share) <= held[name] <= ceil(share) for name, share in shares.items()):
            continue
        if not _fair_regions(members, shard_count, replication, held):
            continue
        hosts = sum(crowd[one][1] for one in result)
        best = min(best, (zones, hosts, moved(before, result)))
    return best


def _fair_regions(members: Sequence[Member], shard_count: int, replication: int, held: Counter[str]) -> bool:
    """The last round of replicas is shared out among the regions by capacity, rounded up or down."""
    made = wanted(members, shard_count, replication)
    open_ = {region: sum(member.capacity for member in made.regions[region]) for region in made.rounds.open}
    if not made.rounds.left:
        return True
    shares = fair_shares(open_, shard_count * made.rounds.left, shard_count)
    extra = {
        region: sum(held[m.name] for m in made.regions[region]) - shard_count * made.rounds.full[region]
        for region in open_
    }
    return all(floor(shares[region]) <= extra[region] <= ceil(shares[region]) for region in open_)


@st.composite
def small(draw: st.DrawFn) -> tuple[list[Member], list[Member], int, int, int]:
    def some(count: int) -> list[Member]:
        return [
            Member(
                name=f"n{i}",
                region=f"r{draw(st.integers(0, 1))}",
                zone=f"z{draw(st.integers(0, 2))}",
                host=f"h{draw(st.integers(0, 2))}",
                capacity=draw(st.integers(1, 2)),
            )
            for i in range(count)
        ]

    pool = some(5)
    old = draw(st.lists(st.sampled_from(pool), min_size=1, unique_by=lambda m: m.name))
    new = draw(st.lists(st.sampled_from(pool), min_size=1, unique_by=lambda m: m.name))
    return old, new, draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))


@settings(max_examples=100, deadline=None)
@given(small())
def test_it_is_as_good_as_trying_everything(case: tuple[list[Member], list[Member], int, int, int]) -> None:
    old, new, shard_count, replication, later = case
    new = sorted(new, key=lambda member: member.name)
    before = targets(wanted(old, shard_count, replication))
    after = targets(wanted(new, shard_count, later), before)
    check_laws(new, later, after)
    zones, hosts, fewest = naive(new, shard_count, later, before)
    found = [crowds(new, names) for names in after]
    zones_found, hosts_found = sum(z for z, _ in found), sum(h for _, h in found)
    assert (zones_found, hosts_found, moved(before, after)) == (zones, hosts, fewest)
