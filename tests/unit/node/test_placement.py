"""The placement as a record's metadata: what goes in comes out, and other bytes are told."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.placement import Placement, PlacementError, unpack

IDS = st.integers(0, (1 << 64) - 1)
NAMES = st.text(min_size=1, max_size=8)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    names = draw(st.lists(NAMES, min_size=1, max_size=7, unique=True))
    pairs = [(name, draw(IDS)) for name in names]
    voters = draw(st.integers(1, len(pairs)))
    return Placement(tuple(pairs[:voters]), tuple(pairs[voters:]))


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
