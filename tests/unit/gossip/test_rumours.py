"""What is told next, how often, and within which budget."""

from __future__ import annotations

from gossip.codec import size_of
from gossip.messages import Fact, Part
from gossip.rumours import Budget, Rumours


def fact(key: bytes, value: bytes = b"x") -> Fact:
    return Fact(1, 1, 1, key, value)


def taken(rumours: Rumours, room: int, sends: int = 3) -> list[Part]:
    parts: list[Part] = []
    used = rumours.take(parts, room, sends)
    assert used == sum(map(size_of, parts)) <= room
    return parts


def test_a_rumour_is_told_so_often_and_no_more() -> None:
    rumours = Rumours()
    rumours.put("a", fact(b"a"))
    assert [len(taken(rumours, 1_000)) for _ in range(5)] == [1, 1, 1, 0, 0]
    assert not rumours


def test_newer_news_take_the_place_of_older_and_begin_anew() -> None:
    rumours = Rumours()
    rumours.put("a", fact(b"a", b"old"))
    taken(rumours, 1_000)
    taken(rumours, 1_000)
    rumours.put("a", fact(b"a", b"new"))
    assert len(rumours) == 1
    assert [taken(rumours, 1_000) for _ in range(4)] == [[fact(b"a", b"new")]] * 3 + [[]]


def test_those_told_least_often_come_first() -> None:
    rumours = Rumours()
    rumours.put("a", fact(b"a"))
    taken(rumours, 1_000)
    rumours.put("b", fact(b"b"))
    assert taken(rumours, size_of(fact(b"b"))) == [fact(b"b")]


def test_a_large_rumour_does_not_hold_up_those_that_fit() -> None:
    rumours = Rumours()
    rumours.put("large", fact(b"l", bytes(900)))
    rumours.put("small", fact(b"s"))
    assert taken(rumours, 100) == [fact(b"s")]
    assert fact(b"l", bytes(900)) in taken(rumours, 1_000)


def test_a_discarded_rumour_is_not_told() -> None:
    rumours = Rumours()
    rumours.put("a", fact(b"a"))
    assert rumours.discard("a")
    assert not rumours.discard("a")
    assert taken(rumours, 1_000) == []


def test_a_budget_refills_with_time_and_saves_up_one_second_at_most() -> None:
    budget = Budget(1_000, 0.0)
    budget.spend(1_000)
    assert budget.left(0.0) == 0
    assert budget.left(0.5) == 500
    assert budget.left(100.0) == 1_000
