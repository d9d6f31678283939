"""What a plan says: moves with reasons and bytes, the time they take, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from router.layout import Layout, Member, layout_from
from router.planning import Change, ChangeError, first_layout, limits, plan

MB = 10**6


def three(**changes: Any) -> Layout:
    members = [Member(name=f"n{i}", zone=f"z{i}", id=f"{i:016x}") for i in range(3)]
    return first_layout(members, 12, 3, "0f" * 16) if not changes else first_layout(members, **changes)


def join(name: str, **values: Any) -> Change:
    given = {"region": "local", "zone": name, "host": "", "capacity": 1, "id": "9" * 16, **values}
    return Change(action="join", node=name, values=tuple(given.items()))


def test_a_join_takes_its_share_and_says_why() -> None:
    base = three()
    made = plan(base, [join("n3")], dict.fromkeys(range(12), 100 * MB))
    assert made.layout.version == 2
    assert made.layout.base == base.hash
    assert layout_from(made.layout.canonical) == made.layout
    assert len(made.moves) == 9
    assert {(move.target, move.reason, move.size_bytes) for move in made.moves} == {
        ("n3", "n3 joins", 100 * MB)
    }
    assert [load.replicas for load in made.before] == [12, 12, 12]
    assert [load.replicas for load in made.after] == [9, 9, 9, 9]
    assert [load.primaries for load in made.after] == [3, 3, 3, 3]
    # 900 MB into one node at 50 MB/s, two at once: one of nine has no partner.
    assert made.eta_s == 20.0
    assert plan(base, [join("n3")], {}).layout.hash == made.layout.hash, "the hash does not depend on sizes"


def test_a_leave_a_set_and_a_replication_say_why() -> None:
    four = plan(three(), [join("n3")], {}).layout
    moves = plan(four, [Change(action="leave", node="n0")], {}).moves
    assert {(move.source, move.reason) for move in moves} == {("n0", "n0 leaves")}
    fewer = plan(four, [Change(action="set", values=(("replication", 2),))], {5: 7})
    assert {(move.target, move.reason) for move in fewer.moves} == {(None, "replication 3 → 2")}
    assert fewer.eta_s == 0
    bigger = plan(four, [Change(action="set", node="n0", values=(("capacity", 3),))], {}).moves
    assert {(move.target, move.reason) for move in bigger} == {("n0", "fair share")}
    # n1 moves into the zone of n0: what both hold is spread over the other two, as far as that goes.
    closer = plan(four, [Change(action="set", node="n1", values=(("zone", "z0"),))], {})
    assert {limit.law for limit in closer.limits} == {"regions", "zones"}


def test_a_new_disk_in_the_place_of_an_old_one_moves_nothing() -> None:
    base = three()
    made = plan(base, [join("n1", zone="z1", id="f" * 16)], {})
    assert not made.moves
    member = made.layout.member("n1")
    assert member is not None
    assert member.id == "f" * 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (join("n1", id=f"{1:016x}"), "n1 is a member already"),
        (Change(action="leave", node="x"), "x is not a member; the members are n0, n1, n2"),
        (Change(action="set", node="x", values=(("capacity", 2),)), "not a member"),
        (Change(action="set", values=(("replication", 0),)), "at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused(change: Change, said: str) -> None:
    with pytest.raises(ChangeError, match=said):
        plan(three(), [change], {})
    with pytest.raises(ChangeError, match="at least one member"):
        plan(three(), [Change(action="leave", node=f"n{i}") for i in range(3)], {})


def said(members: list[Member], replication: int) -> dict[str, str]:
    return {limit.law: limit.message for limit in limits(first_layout(members, 12, replication, ""))}


def test_what_cannot_be_is_said_law_by_law() -> None:
    """`said`."""
    one = said([Member(name="a")], 3)
    assert set(one) == {"replicas", "failover"}
    assert "there is 1: each shard has 1 replica" in one["replicas"]
    two = said([Member(name="a", zone="z1"), Member(name="b", zone="z2")], 2)
    assert "two replicas cannot fail over" in two["failover"]
    same = said([Member(name=name, host="h") for name in "abc"], 3)
    assert "12 of 12 shards have two replicas in one zone" in same["zones"]
    assert "12 of 12 shards have two replicas on one host" in same["hosts"]
    regions = said([Member(name=f"n{i}", region=f"r{i % 2}", zone=f"z{i}") for i in range(4)], 3)
    assert "there are 2 (r0, r1): some share one" in regions["regions"]
    big = said([Member(name="big", zone="z0", capacity=100), *(Member(name=n, zone=n) for n in "abc")], 2)
    assert "big (capacity 100 of 103)" in big["capacity"]
    good = [Member(name=f"n{i}", region=f"r{i}") for i in range(3)]
    assert said(good, 3) == {}
