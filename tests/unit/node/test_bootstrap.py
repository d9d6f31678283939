"""How nodes without a layout come to one: single steps, and whole clusters whose news arrive in any order."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import layoutfile
from node.bootstrap import Adopt, Create, Refuse, Seen, Wait, conflict, decide
from node.facts import view_of
from router.layout import Layout, LayoutError, Member, layout_from, place
from storage.errors import DamagedFileError, ForeignDataError, FormatError
from tests.unit.node.test_facts import FACT


def fact(name: str, **changes: Any) -> Any:
    return msgspec.structs.replace(FACT, name=name, **changes)


def seen(
    name: str, view: str = "", *, alive: bool = True, layout: Layout | None = None, **changes: Any
) -> Seen:
    return Seen(
        alive=alive, fact=fact(name, **changes), layout=layout, view=view_of(view.split()) if view else b""
    )


def layout(*names: str, **changes: Any) -> Layout:
    members = tuple(Member(name=name) for name in names)
    plain = {"version": 1, "shard_count": 12, "replication": 3, "members": members} | changes
    if "targets" not in plain:
        placed = place(members, plain["shard_count"], plain["replication"])
        plain["targets"] = tuple(one.voters for one in placed)
    return Layout(**plain)


def test_it_waits_until_as_many_as_asked_are_there() -> None:
    step = decide(fact("a"), [seen("b"), seen("z", alive=False)])
    assert step == Wait(b"", 2, 3)
    assert str(step) == "waiting for 1 of 3 nodes"


def test_the_smallest_name_makes_it_once_all_say_that_they_see_the_same() -> None:
    others = [seen("b", "a b c"), seen("c")]
    assert decide(fact("a"), others) == Wait(view_of(["a", "b", "c"]), 3, 3)
    others = [seen("b", "a b c"), seen("c", "a b c")]
    step = decide(fact("a"), others)
    assert isinstance(step, Create)
    assert [member.name for member in step.layout.members] == ["a", "b", "c"]
    assert (step.layout.version, step.layout.shard_count, step.layout.replication) == (1, 12, 3)
    assert step.layout.members[0] == Member(name="a", region="eu", zone="a", host="h1", capacity=2)
    # Nobody else makes one, whoever agrees.
    assert isinstance(decide(fact("b"), [seen("a", "a b c"), seen("c", "a b c")]), Wait)


def test_founders_that_only_witness_found_nothing() -> None:
    others = [seen("b", "a b c", capacity=0), seen("c", "a b c", capacity=0)]
    step = decide(fact("a", capacity=0), others)
    assert isinstance(step, Refuse)
    assert "only witness" in step.message
    others = [seen(name, "a b c", replication=2, host=name) for name in "bc"]
    step = decide(fact("a", capacity=0, replication=2), others)
    assert isinstance(step, Create)
    assert set(step.layout.witnesses) == {"a"}
    assert all("a" not in voters for voters in step.layout.targets)


def test_alone_it_needs_nobody() -> None:
    assert isinstance(decide(fact("a", bootstrap=1), []), Create)


def test_zero_never_makes_one() -> None:
    step = decide(fact("a", bootstrap=0), [seen("b", bootstrap=0)])
    assert str(step) == "waiting for a node that has a layout"


def test_who_only_joins_has_no_part_in_it() -> None:
    step = decide(fact("b"), [seen("c", "b c d"), seen("d", "b c d"), seen("a", bootstrap=0)])
    assert isinstance(step, Create)
    assert [member.name for member in step.layout.members] == ["b", "c", "d"]


def test_who_is_not_heard_or_only_in_part_is_waited_for() -> None:
    others = [seen("b", "a b c"), seen("c", "a b c")]
    assert isinstance(decide(fact("a"), [*others, Seen(alive=True, fact=None)]), Wait)
    assert isinstance(decide(fact("a"), [*others, Seen(alive=False, fact=None)]), Create)
    assert isinstance(decide(fact("a"), [*others, Seen(alive=False, fact=None, partial=True)]), Wait)


def test_a_layout_is_adopted_from_whoever_has_it() -> None:
    known = layout("a", "b")
    assert decide(fact("x"), [seen("b", layout=known)]) == Adopt(known, "b")
    assert decide(fact("x"), [seen("b", alive=False, layout=known), seen("c")]) == Adopt(known, "b")
    newer = layout("a", "b", "c", version=2)
    assert decide(fact("x"), [seen("b", layout=known), seen("c", layout=newer)]) == Adopt(newer, "c")


def test_two_layouts_of_one_version_are_refused_with_both_hashes() -> None:
    one, two = layout("a", "b"), layout("c", "d")
    step = decide(fact("x"), [seen("a", layout=one), seen("c", layout=two)])
    assert isinstance(step, Refuse)
    assert step.code == "layout_conflict"
    assert one.hash in step.message
    assert two.hash in step.message
    told = conflict(one, [seen("b", layout=one), seen("c", layout=two)])
    assert told is not None
    assert two.hash in told.message
    assert conflict(one, [seen("b", layout=one), seen("c", layout=layout("c", version=2)), seen("d")]) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim": 32}, "dim 16 here and 32 there"),
        ({"metric": "dot"}, "metric 'cosine' here and 'dot' there"),
        ({"class_width": 64}, "class_width"),
        ({"shard_count": 4}, "shard_count 12 here and 4 there"),
        ({"replication": 2}, "replication"),
        ({"bootstrap": 5}, "bootstrap"),
    ],
)
def test_founders_that_disagree_are_told_in_what(changes: dict[str, Any], said: str) -> None:
    step = decide(fact("a"), [seen("b", "a b c", **changes), seen("c", "a b c")])
    assert isinstance(step, Refuse)
    assert step.code == "config_mismatch"
    assert said in step.message
    assert "b and this node" in step.message


def test_a_cluster_of_other_settings_is_not_joined() -> None:
    step = decide(fact("x", dim=32), [seen("b", layout=layout("a", "b"))])
    assert isinstance(step, Refuse)
    assert "dim 32 here and 16 there" in step.message
    step = decide(fact("x", shard_count=7), [Seen(alive=True, fact=None, layout=layout("a", "b"))])
    assert isinstance(step, Refuse)
    assert "shard_count 7 here and 12 there" in step.message


def test_a_taken_name_is_refused() -> None:
    for layouts in (None, layout("a", "b")):
        step = decide(fact("a"), [seen("a", layout=layouts)])
        assert isinstance(step, Refuse)
        assert step.code == "name_conflict"
    # A node that lost its disk comes back under its name once the old one is known to be dead.
    assert isinstance(decide(fact("a"), [seen("a", alive=False, layout=layout("a", "b"))]), Adopt)


class _Node:
    """A node of the model: what it knows of the others is what they told it some time ago."""

    def __init__(self, name: str, wanted: int) -> None:
        self.name, self.wanted = name, wanted
        self.layout: Layout | None = None
        self.view = b""
        self.heard: dict[str, Seen] = {}

    def said(self) -> Seen:
        return Seen(
            alive=True, fact=fact(self.name, bootstrap=self.wanted), layout=self.layout, view=self.view
        )

    def act(self) -> None:
        if self.layout is not None:
            return
        step = decide(fact(self.name, bootstrap=self.wanted), list(self.heard.values()))
        self.view = step.view if isinstance(step, Wait) else b""
        if isinstance(step, Adopt | Create):
            self.layout = step.layout


@given(st.integers(0, 1 << 30), st.integers(2, 4), st.integers(0, 3))
def test_whatever_order_news_come_in_one_layout_is_made(seed: int, wanted: int, late: int) -> None:
    """No partition: what is heard of a node is old, never false. Each hears of each in the end."""
    random = Random(seed)
    nodes = [_Node(name, wanted) for name in random.sample("abcdefgh", wanted + min(late, wanted - 1))]
    for _ in range(400):
        node = random.choice(nodes)
        if random.random() < 0.5:
            node.act()
        else:
            other = random.choice(nodes)
            if other is not node:
                node.heard[other.name] = other.said()
        assert len({one.layout.hash for one in nodes if one.layout is not None}) <= 1
    for _ in range(6):
        for node in nodes:
            node.heard = {one.name: one.said() for one in nodes if one is not node}
            node.act()
    (made,) = {one.layout.hash for one in nodes if one.layout is not None}
    assert all(one.layout is not None and one.layout.hash == made for one in nodes)


def test_canonical_bytes_are_one_spelling() -> None:
    one = layout("a", "b")
    assert layout_from(one.canonical) == one
    assert one.hash == layout("a", "b").hash != layout("a", "b", "c").hash
    with pytest.raises(LayoutError):
        layout("b", "a")
    with pytest.raises(LayoutError):
        layout_from(one.canonical + b"\x00")
    with pytest.raises(LayoutError):
        layout_from(b"\x93\x01")


def test_targets_and_witnesses_travel_with_it() -> None:
    old = layout("a", "b", "c")
    targets = tuple(("b", "a") if shard % 2 else ("a", "c") for shard in range(12))
    new = layout("a", "b", "c", replication=2, targets=targets, base=old.hash, cluster_id="0f" * 16)
    assert layout_from(new.canonical) == new
    assert new.placements()[1].voters == ("b", "a")
    votes = tuple("" if shard == 3 else "c" if shard % 2 else "b" for shard in range(12))
    witnessed = layout("a", "b", "c", replication=2, targets=targets, witnesses=votes)
    assert layout_from(witnessed.canonical) == witnessed
    assert (witnessed.witness(2), witnessed.witness(3)) == ("b", "")
    assert witnessed.hash != layout("a", "b", "c", replication=2, targets=targets).hash
    for wrong_votes in (("a",) * 12, ("z",) * 12, ("b",) * 11):
        with pytest.raises(LayoutError):
            layout("a", "b", "c", replication=2, targets=targets, witnesses=wrong_votes)
    many = layout(*sorted(f"n{i}" for i in range(300)), targets=(("n299", "n0", "n17"),) * 12)
    assert layout_from(many.canonical) == many
    for wrong in ((("a", "a"),) * 12, (("a", "z"),) * 12, (("a", "b"),) * 11, (("a",),) * 12):
        with pytest.raises(LayoutError):
            layout("a", "b", "c", replication=2, targets=wrong)
    with pytest.raises(LayoutError):
        layout_from(new.canonical.replace(b"\x00\x02", b"\x00\x09"))
    only = tuple(Member(name=name, capacity=name != "c") for name in "abc")
    assert layout(
        "a", "b", "c", replication=2, members=only, targets=(("a", "b"),) * 12, witnesses=("c",) * 12
    )
    with pytest.raises(LayoutError):  # who only witnesses holds nothing
        layout("a", "b", "c", replication=2, members=only, targets=(("a", "c"),) * 12)


def test_the_file_holds_it_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layout"
    assert layoutfile.load(path, cluster="c") is None
    layoutfile.save(path, layout("a", "b"), cluster="c")
    assert layoutfile.load(path, cluster="c") == layout("a", "b")
    new = layout("a", "b", targets=(("a", "b"),) * 12, base="00" * 8, cluster_id="0f" * 16)
    layoutfile.save(tmp_path / "new", new, cluster="c")
    assert layoutfile.load(tmp_path / "new", cluster="c") == new
    with pytest.raises(ForeignDataError):
        layoutfile.load(path, cluster="other")
    good = path.read_text()
    for bad, error in (
        (good.replace('"b"', '"x"'), DamagedFileError),
        (good[:40], DamagedFileError),
        (good.replace('"format": 3', '"format": 4'), FormatError),
    ):
        path.write_text(bad)
        with pytest.raises(error):
            layoutfile.load(path, cluster="c")
