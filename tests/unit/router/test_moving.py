"""One shard's targets by hand, and who stands in for the gone: the spread stays what it was, nobody else moves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.layout import Layout, Member
from router.moving import moved, stand_ins, stayed
from router.planning import ChangeError, first_layout


def layout(*, regions: int = 3, each: int = 3, shards: int = 12, replication: int = 3) -> Layout:
    members = [
        Member(name=f"{region}{i}", region=f"r{region}", zone=f"z{i % 2}", host=f"{region}{i}")
        for region in range(regions)
        for i in range(each)
    ]
    return first_layout(members, shards, replication, "0f" * 16)


def outside(base: Layout, shard: int) -> str:
    return next(one.name for one in base.members if one.name not in base.wished()[shard])


def test_a_move_changes_that_shard_alone_and_keeps_the_place_in_the_order() -> None:
    base = layout()
    first, *others = base.wished()[5]
    new = outside(base, 5)
    made = moved(base, 5, first, new)
    assert (made.version, made.base, made.members) == (base.version + 1, base.hash, base.members)
    assert made.wished()[5] == (new, *others)
    assert [a for i, a in enumerate(made.wished()) if i != 5] == [
        b for i, b in enumerate(base.wished()) if i != 5
    ]
    assert moved(made, 5, first, new) is made, "asked for again it is done already"


def test_a_move_that_cannot_be_is_refused_with_its_field() -> None:
    base = layout()
    one, two, _ = base.wished()[0]
    new = outside(base, 0)
    for shard, source, target, field in (
        (99, one, new, "shard"),
        (0, new, outside(base, 0) if outside(base, 0) != new else "22", "source"),
        (0, one, two, "target"),
        (0, one, "stranger", "target"),
    ):
        with pytest.raises(ChangeError) as caught:
            moved(base, shard, source, target)
        assert caught.value.field == field


def test_a_cancelled_move_wishes_those_who_vote() -> None:
    base = layout()
    voters = base.wished()[3]
    made = moved(base, 3, voters[1], outside(base, 3))
    back = stayed(made, 3, voters)
    assert back.wished() == base.wished()
    assert back.version == base.version + 2
    assert stayed(back, 3, voters) is back
    # The new one votes already: there is nothing to cancel.
    both = (*voters, made.wished()[3][1])
    assert stayed(made, 3, both) is made


def test_one_who_leaves_the_cluster_is_not_wished_back() -> None:
    base = layout()
    voters = base.wished()[3]
    made = moved(base, 3, voters[1], outside(base, 3))
    with pytest.raises(ChangeError, match="nobody else who is a member"):
        stayed(made, 3, (voters[0], "left", voters[2]))


def test_who_stands_in_comes_from_the_region_that_lost_its_replica() -> None:
    base = layout()
    region = {member.name: member.region for member in base.members}
    for shard, wished in enumerate(base.wished()):
        for gone in wished:
            found = stand_ins(base, shard, {gone}, lambda _name: True)
            assert gone not in found
            assert len(set(found)) == 3
            assert sorted(region[name] for name in found) == ["r0", "r1", "r2"]
            assert [name for name in found if name in wished] == [name for name in wished if name != gone]


def test_who_holds_it_already_stays_the_stand_in_and_who_may_not_is_not_asked() -> None:
    base = layout()
    wished = base.wished()[0]
    first = stand_ins(base, 0, {wished[0]}, lambda _name: True)
    others = [one.name for one in base.members if one.region == base.member(wished[0]).region]  # type: ignore[union-attr]
    (other,) = [name for name in others if name not in (wished[0], first[0])]
    assert stand_ins(base, 0, {wished[0]}, lambda _name: True, {other}) == (other, *wished[1:])
    assert stand_ins(base, 0, {wished[0]}, lambda name: name != first[0])[0] == other
    assert stand_ins(base, 0, {wished[0]}, lambda _name: False) == wished, "nobody there: nothing changes"


@given(st.integers(0, 11), st.sets(st.integers(0, 8), max_size=4))
def test_stand_ins_are_as_many_each_once_and_none_of_them_gone(shard: int, gone: set[int]) -> None:
    base = layout()
    absent = {base.members[i].name for i in gone}
    found = stand_ins(base, shard, absent, lambda _name: True)
    assert max(Counter(found).values()) == 1
    assert len(found) == 3
    assert not absent.intersection(found)
    assert [n for n in base.wished()[shard] if n not in absent] == [
        n for n in found if n in base.wished()[shard]
    ]
