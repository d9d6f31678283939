"""The placement as a record's metadata: what goes in comes out, and other bytes are told."""

from __future__ import annotations

from itertools import combinations

import msgpack
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from node.placement import Placement, PlacementError, unpack

IDS = st.integers(0, (1 << 64) - 1)
NAMES = st.text(min_size=1, max_size=8)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    names = draw(st.lists(NAMES, min_size=1, max_size=7, unique=True))
    pairs = [(name, draw(IDS)) for name in names]
    voters = draw(st.integers(1, len(pairs)))
    witness = draw(st.none() | st.tuples(NAMES.filter(lambda name: name not in names), IDS))
    former = draw(st.none() | st.just((tuple(pairs[:voters]), witness)))
    return Placement(tuple(pairs[:voters]), tuple(pairs[voters:]), witness, *(former or ()))


@given(placements())
def test_it_comes_back_in_its_order(placement: Placement) -> None:
    assert unpack(placement.pack()) == placement


@given(placements())
def test_a_newer_build_may_say_more(placement: Placement) -> None:
    assert unpack(msgpack.packb([*msgpack.unpackb(placement.pack()), {"more": 1}])) == placement


@given(placements(), st.data())
def test_a_replaced_voter_keeps_its_place_and_nobody_else_changes(
    placement: Placement, data: st.DataObject
) -> None:
    name, before = data.draw(st.sampled_from(placement.voters))
    new = placement.replaced(name, before ^ 1)
    assert new.names == placement.names
    assert new.learners == placement.learners
    assert new.is_voter(name, before ^ 1)
    assert not new.is_voter(name, before)
    assert [pair for pair in new.voters if pair[0] != name] == [p for p in placement.voters if p[0] != name]


def test_a_learner_is_replaced_and_named_likewise() -> None:
    placement = Placement((("a", 1),), (("b", 2), ("c", 3)))
    new = placement.replaced("b", 4)
    assert new == Placement((("a", 1),), (("b", 4), ("c", 3)))
    assert new.names_replica("b", 4)
    assert not new.names_replica("b", 2)


def test_a_name_alone_is_no_voter() -> None:
    placement = Placement((("a", 1), ("b", 2)), (("c", 3),))
    assert placement.is_voter("a", 1)
    assert not placement.is_voter("a", 2)
    assert not placement.is_voter("c", 3)
    assert placement.names == ("a", "b")
    assert placement.holders == ("a", "b", "c")


@given(st.binary(max_size=60))
def test_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(PlacementError):
        unpack(data)


@given(placements(), st.data())
def test_a_flipped_byte_is_refused_or_a_placement_all_the_same(
    placement: Placement, data: st.DataObject
) -> None:
    """The record's own checksum finds it; here it must only never be anything else than an error or a placement."""
    packed = bytearray(placement.pack())
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read = unpack(bytes(packed))
    except PlacementError:
        return
    assert read.names
    assert len(set(read.holders)) == len(read.holders)


@pytest.mark.parametrize(
    "value",
    [
        [2, [["a", 1]], []],
        [1, [], []],
        [1, [], [["a", 1]]],
        [1, [["a", 1], ["a", 2]], []],
        [1, [["a", 1]], [["a", 2]]],
        [1, [["a", "x"]], []],
        [1, [["a"]], []],
        [1, [["a", None]], []],
        [1, [["a", float("inf")]], []],
        [1, [["a", 1]]],
        {"1": 2},
    ],
)
def test_what_names_no_voters_or_one_twice_is_refused(value: object) -> None:
    with pytest.raises(PlacementError):
        unpack(msgpack.packb(value))


def voting(names: str, witness: str = "") -> Placement:
    return Placement(tuple((n, ord(n)) for n in names), witness=(witness, ord(witness)) if witness else None)


def test_former_votes_are_kept_only_where_a_witness_could_help_one_who_was_left_behind() -> None:
    before = voting("ab", "w")
    assert voting("abc").after(voting("ab")).former == ()
    assert before.after(before).former == ()
    changed = voting("a", "w").after(before)
    assert (changed.former, changed.former_witness) == (before.voters, before.witness)
    assert changed.after(changed).former == (), "what is settled needs none any more"


def test_a_change_is_sealed_once_the_ignorant_can_elect_nobody() -> None:
    """`sealed`."""
    a, b, w = (("a", 97), ("b", 98), ("w", 119))
    without_b = voting("a", "w").after(voting("ab", "w"))
    assert not without_b.sealed([a])
    assert without_b.sealed([a, w]), "the witness remembers it"
    third = voting("abd", "w").after(voting("ab", "w"))
    assert not third.sealed([a, ("d", 100)]), "b and the witness could still elect b"
    assert third.sealed([a, b])
    alone = voting("ab").after(voting("ab", "w"))
    assert alone.sealed([a, b]), "a witness by itself elects nobody"
    new_disk = voting("ab", "w").replaced("b", 5).after(voting("ab", "w"))
    assert new_disk.sealed([a]), "the former disk has no vote any more"


@given(st.data())
def test_sealed_is_that_no_majority_of_the_ignorant_has_a_candidate(data: st.DataObject) -> None:
    """Against the definition: every set of the former votes that could elect one of its own has somebody who knows."""
    names = data.draw(st.sampled_from(["ab", "abc", "abcd"]))
    before = voting(names, "w")
    change = data.draw(st.sampled_from(["in", "out", "witness"]))
    after = (
        voting(names + "e", "w")
        if change == "in"
        else voting(names[:-1], "w")
        if change == "out"
        else voting(names)
    )
    assume(after.voters)
    knows = data.draw(st.sets(st.sampled_from(before.votes)))
    ignorant = [one for one in before.votes if one not in knows]
    could = [
        set(some)
        for count in range(len(before.votes) // 2 + 1, len(ignorant) + 1)
        for some in combinations(ignorant, count)
        if any(one in before.voters for one in some)
    ]
    assert after.after(before).sealed(knows) is not bool(could)


@pytest.mark.parametrize("count", range(1, 8))
def test_any_majority_of_votes_meets_any_quorum_of_the_disks(count: int) -> None:
    """`witness-no-disk`: with one witness at most, whoever is elected holds every quorum write."""
    for witness in ("", "w"):
        placement = voting("abcdefg"[:count], witness)
        for elected in combinations(placement.votes, len(placement.votes) // 2 + 1):
            if not any(one in placement.voters for one in elected):
                continue
            for quorum in combinations(placement.voters, count // 2 + 1):
                assert set(elected) & set(quorum), (elected, quorum)
