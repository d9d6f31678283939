"""Who is gone: after ten minutes another stands in, and a host that comes and goes is not fought over. Virtual time."""

from __future__ import annotations

from node.absences import Absences, Lasting
from node.move import Bring, Done, Place, Sight, Wait, next_step
from node.placement import Placement
from router.layout import Layout, Member
from router.moving import stand_ins
from router.planning import first_layout

AFTER_S = 600.0
EVERY_S = 5.0


def test_a_break_begins_the_count_anew() -> None:
    lasting = Lasting()
    assert lasting.see("a", True, 10.0) == 0.0
    assert lasting.see("a", True, 15.0) == 5.0
    assert lasting.see("a", False, 16.0) < 0
    assert lasting.see("a", True, 20.0) == 0.0


def test_gone_after_ten_minutes_and_back_for_good_after_ten_more() -> None:
    absences = Absences(AFTER_S)
    absences.see("a", False, 0.0)
    absences.see("a", False, 599.0)
    assert not absences.absent("a", ())
    absences.see("a", False, 600.0)
    assert absences.absent("a", ("a",)), "another stands in, though it still has its vote"
    absences.see("a", True, 650.0)
    assert not absences.absent("a", ("a",)), "its place was not taken: it keeps it"
    assert absences.absent("a", ("b",)), "its place was taken: first it must last"
    absences.see("a", True, 1_250.0)
    assert not absences.absent("a", ("b",))
    absences.forget_but(())
    absences.see("a", False, 1_300.0)
    assert not absences.absent("a", ())


class Shard:
    """One shard of a layout with five members, its primary in the middle of it, one step every EVERY_S; a copy takes a minute."""

    def __init__(self) -> None:
        members = [Member(name=name, zone=name) for name in "abcde"]
        self.layout: Layout = first_layout(members, 1, 3, "0f" * 16)
        self.wished = self.layout.wished()[0]
        self.own, self.victim = self.wished[0], self.wished[2]
        self.placement = Placement(tuple((name, 1) for name in self.wished))
        self.absences = Absences(AFTER_S)
        self.dead: set[str] = set()
        self.brought: dict[str, int] = {}
        self.level_at: dict[str, float] = {}
        self.now = 0.0
        self.copies: list[str] = []

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += EVERY_S
            for member in self.layout.members:
                self.absences.see(member.name, member.name not in self.dead, self.now)
            self.step()

    def step(self) -> None:
        names = self.placement.names
        absent = {name for name in self.wished if self.absences.absent(name, names)}
        may = lambda name: not self.absences.absent(name, ())  # noqa: E731
        target = stand_ins(self.layout, 0, absent, may, self.placement.holders)
        sight = Sight(
            self.own,
            lambda name: name not in self.dead,
            lambda name: name not in self.dead and self.now >= self.level_at.get(name, 0.0),
            self.brought,
            lambda _name: True,
        )
        step = next_step(self.placement, target, sight)
        if isinstance(step, Bring):
            self.copies.append(step.name)
            self.brought[step.name] = 2
            self.level_at[step.name] = self.now + 60.0
        elif isinstance(step, Place):
            self.placement = step.placement
            self.brought = {}
        else:
            assert isinstance(step, Done | Wait), step


def test_a_host_that_is_back_in_time_keeps_its_place_and_the_learner_goes() -> None:
    """`place-kept`."""
    shard = Shard()
    shard.dead = {shard.victim}
    shard.run(AFTER_S + 30)
    assert len(shard.copies) == 1, "begun, not level"
    assert shard.placement.learners
    assert shard.victim in shard.placement.names
    shard.dead = set()
    shard.run(120)
    assert shard.placement.names == shard.wished
    assert not shard.placement.learners
    assert len(shard.copies) == 1


def test_a_host_that_stays_away_is_replaced_and_takes_its_place_once_it_has_lasted() -> None:
    """`stand-in`."""
    shard = Shard()
    shard.dead = {shard.victim}
    shard.run(AFTER_S - EVERY_S)
    assert not shard.copies
    shard.run(200)
    (other,) = shard.copies
    assert set(shard.placement.names) == {*shard.wished, other} - {shard.victim}
    shard.dead = set()
    shard.run(AFTER_S - EVERY_S)
    assert shard.copies == [other]
    shard.run(200)
    assert set(shard.placement.names) == set(shard.wished)
    assert shard.copies == [other, shard.victim]


def test_a_flapping_host_is_not_fought_over() -> None:
    """`no-ping-pong`: away for eleven minutes, there for one, all day: one copy is made, and one was given up in time."""
    shard = Shard()
    for _ in range(40):
        shard.dead = {shard.victim}
        shard.run(660)
        shard.dead = set()
        shard.run(60)
    assert len(shard.copies) == 2
    assert shard.victim not in shard.copies
    assert shard.victim not in shard.placement.names
    # And one that is gone for shorter times costs nothing.
    shard = Shard()
    for _ in range(40):
        shard.dead = {shard.victim}
        shard.run(590)
        shard.dead = set()
        shard.run(10)
    assert shard.copies == []
    assert shard.placement.names == shard.wished


def test_when_the_stand_in_is_lost_too_another_one_comes() -> None:
    shard = Shard()
    shard.dead = {shard.victim}
    shard.run(AFTER_S + 200)
    (first,) = shard.copies
    shard.dead = {shard.victim, first}
    shard.run(AFTER_S + 200)
    assert len(shard.copies) == 2
    assert not set(shard.placement.names) & shard.dead
    assert len(shard.placement.names) == 3
