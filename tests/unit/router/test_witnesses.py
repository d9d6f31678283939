"""Who witnesses which shard: never where data is, never beside it, spread, and staying where it is."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.layout import Member
from router.moving import moved, witness
from router.placing import host_of
from router.planning import Change, ChangeError, first_layout, limits, plan
from router.witnesses import witnesses

SHARDS = 12


def member(name: str, **places: object) -> Member:
    return Member(**{"name": name, "zone": name} | places)  # type: ignore[arg-type]


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    count = draw(st.integers(1, 8))
    found = [
        member(
            f"n{i}",
            region=draw(st.sampled_from("rs")),
            zone=draw(st.sampled_from("xyz")),
            host=draw(st.sampled_from(["", "h1", "h2"])),
            capacity=draw(st.sampled_from([0, 1, 1, 2])),
        )
        for i in range(count)
    ]
    found[0] = member("n0", region=found[0].region, zone=found[0].zone)
    return found


@settings(deadline=None, max_examples=50)
@given(members(), st.integers(1, 4), st.data())
def test_the_laws(known: list[Member], replication: int, data: st.DataObject) -> None:
    layout = first_layout(known, SHARDS, replication, "0f" * 16)
    by_name = {one.name: one for one in known}

    def place(one: Member) -> tuple[str, str, str]:
        return one.region, one.zone, host_of(one)

    for shard, voters in enumerate(layout.targets):
        chosen = layout.witness(shard)
        assert all(by_name[name].capacity for name in voters)
        hosts = {place(by_name[name]) for name in voters}
        free = [one for one in known if one.name not in voters and place(one) not in hosts]
        assert bool(chosen) is (len(voters) == 2 and bool(free))
        if chosen:
            assert chosen in {one.name for one in free}
            assert not by_name[chosen].capacity or all(one.capacity for one in free), (
                "who holds no data first"
            )
    shuffled = data.draw(st.permutations(known))
    assert first_layout(shuffled, SHARDS, replication, "0f" * 16) == layout
    assert witnesses(known, layout.targets, layout.witnesses) == layout.witnesses, "it stays"


def test_three_members_of_two_replicas_witness_each_other_evenly() -> None:
    layout = first_layout([member(name) for name in "abc"], SHARDS, 2, "0f" * 16)
    assert Counter(layout.witnesses) == {"a": 4, "b": 4, "c": 4}
    assert not [limit for limit in limits(layout) if limit.law == "failover"]


def test_another_region_than_both_is_preferred_and_a_member_without_data_to_all() -> None:
    two = [member("a", region="r1"), member("b", region="r2")]
    third = [
        member("c", region="r3", capacity=1),
        member("d", region="r1"),
        member("e", region="r1", capacity=0),
    ]
    assert set(witnesses([*two, *third[:2]], (("a", "b"),) * 4)) == {"c"}
    assert set(witnesses([*two, *third], (("a", "b"),) * 4)) == {"e"}
    same_host = member("e", zone="a", region="r1", host="a", capacity=0)
    assert witnesses([*two, same_host], (("a", "b"),) * 4) == (), "it would go down with a"


def test_a_plan_says_what_a_witness_gains_and_where_one_is_missing() -> None:
    base = first_layout([member(name) for name in "ab"], SHARDS, 2, "0f" * 16)
    (limit,) = [limit for limit in limits(base) if limit.law == "failover"]
    assert "12 of 12 shards have two replicas and no witness" in limit.message
    join = Change(action="join", node="w", values=(("zone", "w"), ("capacity", 0)))
    made = plan(base, [join], {})
    assert made.layout.witnesses == ("w",) * SHARDS
    assert made.layout.targets == base.targets
    assert not made.moves
    assert made.gains == (
        "w witnesses 12 shards of two replicas: either of their two hosts may fail and writes go on",
    )
    assert not [limit for limit in made.limits if limit.law == "failover"]
    load = next(load for load in made.after if load.node == "w")
    assert (load.replicas, load.share, load.witnesses) == (0, 0.0, SHARDS)
    # A third replica needs none; and it cannot be on who only witnesses.
    three = plan(made.layout, [Change(action="set", values=(("replication", 3),))], {})
    assert {len(voters) for voters in three.layout.targets} == {2}
    grown = plan(made.layout, [Change(action="set", values=(("replication", 3),)),
                               Change(action="set", node="w", values=(("capacity", 1),))], {})  # fmt: skip
    assert grown.layout.witnesses == ()
    assert grown.gains == ("12 shards need no witness any more: three replicas elect by themselves",)
    with pytest.raises(ChangeError, match="holds data"):
        plan(made.layout, [Change(action="leave", node="a"), Change(action="leave", node="b")], {})
    with pytest.raises(ChangeError, match="only witnesses"):
        moved(made.layout, 0, "a", "w")


def test_a_shard_moved_to_its_witness_gets_another() -> None:
    base = first_layout([member(name) for name in "abcd"], SHARDS, 2, "0f" * 16)
    to = base.witness(0)
    made = moved(base, 0, base.targets[0][0], to)
    assert made.witness(0) not in ("", *made.targets[0])
    assert made.witnesses[1:] == base.witnesses[1:]


def test_while_a_witness_is_gone_another_stands_in() -> None:
    base = first_layout([member(name) for name in "abcd"], SHARDS, 2, "0f" * 16)
    gone, voters = base.witness(0), base.targets[0]
    assert witness(base, 0, voters, lambda name: True) == gone
    other = witness(base, 0, voters, lambda name: name != gone)
    assert other not in ("", gone, *voters)
    assert witness(base, 0, voters, lambda name: False) == ""
    assert witness(base, 0, (*voters, other), lambda name: True) == ""
