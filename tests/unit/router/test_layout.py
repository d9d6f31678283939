"""Layouts of the clusters that people start with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from router.layout import Member, Placement, place


def loads(placements: Sequence[Placement]) -> tuple[Counter[str], Counter[str]]:
    """Replicas and primaries per member."""
    held = Counter(name for placement in placements for name in placement.voters)
    return held, Counter(placement.primary for placement in placements)


def test_one_node_holds_everything() -> None:
    placements = place([Member(name="a")], 12, 3)
    assert [placement.shard for placement in placements] == list(range(12))
    assert all(placement.voters == ("a",) and placement.epoch == 1 for placement in placements)


def test_three_nodes_hold_everything_and_share_the_primaries() -> None:
    held, primaries = loads(place([Member(name=name) for name in "abc"], 12, 3))
    assert held == {"a": 12, "b": 12, "c": 12}
    assert primaries == {"a": 4, "b": 4, "c": 4}


def test_the_order_of_members_does_not_matter() -> None:
    members = [Member(name=f"n{i}", zone=f"z{i % 2}", capacity=1 + i % 2) for i in range(7)]
    assert place(members, 24, 3) == place(members[::-1], 24, 3)


def test_capacity_counts() -> None:
    members = [Member(name="big", capacity=2), *(Member(name=f"n{i}") for i in range(4))]
    held, primaries = loads(place(members, 60, 1))
    assert held == {"big": 20, "n0": 10, "n1": 10, "n2": 10, "n3": 10}
    assert primaries == held


def test_a_big_member_cannot_hold_a_shard_twice() -> None:
    members = [Member(name="big", capacity=100), Member(name="a"), Member(name="b")]
    held, _ = loads(place(members, 12, 2))
    assert held == {"big": 12, "a": 6, "b": 6}


def test_replicas_are_in_different_regions() -> None:
    members = [Member(name=f"n{i}", region=f"r{i % 3}") for i in range(9)]
    regions = {member.name: member.region for member in members}
    placements = place(members, 100, 3)
    assert all(len({regions[name] for name in placement.voters}) == 3 for placement in placements)
    held, primaries = loads(placements)
    assert set(held.values()) <= {32, 33, 34}
    assert max(primaries.values()) <= 12


def test_fair_share_is_counted_within_the_region() -> None:
    # One node alone in its region holds all of it: the other region could burn down.
    members = [Member(name="alone", region="b"), *(Member(name=f"n{i}", region="a") for i in range(4))]
    held, _ = loads(place(members, 12, 2))
    assert held == {"alone": 12, "n0": 3, "n1": 3, "n2": 3, "n3": 3}


def test_two_regions_and_three_replicas() -> None:
    members = [Member(name=f"n{i}", region=f"r{i % 2}", zone=f"z{i // 2 % 2}") for i in range(8)]
    by_name = {member.name: member for member in members}
    for placement in place(members, 48, 3):
        places = [(by_name[name].region, by_name[name].zone) for name in placement.voters]
        assert {region for region, _ in places} == {"r0", "r1"}
        assert len(set(places)) == 3


def test_hosts_differ_where_zones_cannot() -> None:
    # Two processes on each of three machines, one zone.
    members = [Member(name=f"n{i}", host=f"h{i // 2}") for i in range(6)]
    hosts = {member.name: member.host for member in members}
    for placement in place(members, 30, 3):
        assert len({hosts[name] for name in placement.voters}) == 3


@pytest.mark.parametrize(
    ("members", "shard_count", "replication"),
    [
        ([], 12, 3),
        ([Member(name="a"), Member(name="a")], 12, 3),
        ([Member(name="a")], 0, 3),
        ([Member(name="a")], 12, 0),
        ([Member(name="a", capacity=0)], 12, 3),
    ],
)
def test_nonsense_is_refused(members: list[Member], shard_count: int, replication: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        place(members, shard_count, replication)
