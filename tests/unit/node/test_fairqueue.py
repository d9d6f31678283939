"""`fair` (docs/fan-out.md): the laws of the queue, under any sequence of what may happen to it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.fairqueue import FairQueue, FullError

Item = tuple[int, int, int]  # priority, source, number


def test_sources_take_turns_and_priorities_come_first() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for number in range(4):
        queue.push(f"a{number}", "a", 0)
    queue.push("p0", "a", 2)
    queue.push("b0", "b", 0)
    queue.push("m0", "c", 1)
    queue.push("b1", "b", 0)
    assert list(queue) != []
    assert queue.take(3) == ["a0", "b0", "a1"]
    assert queue.take(10) == ["b1", "a2", "a3", "m0", "p0"]
    assert queue.take(10) == []
    assert len(queue) == 0


def test_when_it_is_full_the_least_important_goes_then_whoever_has_most() -> None:
    queue: FairQueue[str] = FairQueue(4)
    for number in range(3):
        assert queue.push(f"a{number}", "a", 1) is None
    queue.push("p0", "a", 2)
    with pytest.raises(FullError):
        queue.push("p1", "b", 2)
    assert queue.push("b0", "b", 1) == "p0"
    assert queue.push("c0", "c", 1) == "a2", "a has three, c none"
    with pytest.raises(FullError):
        queue.push("a3", "a", 1)
    with pytest.raises(FullError):
        queue.push("b1", "b", 1)
    assert queue.push("d0", "d", 0) is not None
    assert len(queue) == 4


@settings(deadline=None)
@given(st.data())
def test_its_laws(data: st.DataObject) -> None:
    bound = data.draw(st.integers(1, 12))
    queue: FairQueue[Item] = FairQueue(bound)
    waiting: list[Item] = []
    for number in range(data.draw(st.integers(0, 80))):
        what = data.draw(st.sampled_from(["push", "push", "push", "take", "remove"]))
        if what == "push":
            item = (data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3)), number)
            try:
                out = queue.push(item, item[1], item[0])
            except FullError:
                assert len(waiting) == bound
                assert max(one[0] for one in waiting) <= item[0]
                continue
            waiting.append(item)
            if out is not None:
                assert out[0] >= item[0]
                waiting.remove(out)
        elif what == "take":
            most = data.draw(st.integers(1, 6))
            before = list(waiting)
            taken = queue.take(most)
            assert len(taken) == min(most, len(before))
            assert [one[0] for one in taken] == sorted(one[0] for one in before)[: len(taken)]
            for one in taken:
                earlier = [b for b in before if b[:2] == one[:2] and b[2] < one[2]]
                assert all(taken.index(b) < taken.index(one) for b in earlier)
                # Nobody of the same priority gives a third before each has given a first.
                others = {b[1] for b in before if b[0] == one[0]}
                nth = [b for b in taken[: taken.index(one) + 1] if b[:2] == one[:2]]
                if len(nth) > 1:
                    assert all(any(t[0] == one[0] and t[1] == other for t in taken) for other in others)
                waiting.remove(one)
        elif waiting:
            item = data.draw(st.sampled_from(waiting))
            queue.remove(item, item[1], item[0])
            queue.remove(item, item[1], item[0])
            waiting.remove(item)
        assert len(queue) == len(waiting) <= bound
        assert sorted(queue) == sorted(waiting)
