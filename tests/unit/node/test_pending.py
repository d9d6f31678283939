"""Answers under way: whoever comes first, the asker or the answer; and deadlines that leave nothing behind."""

from __future__ import annotations

from typing import Any

import outcome
import pytest
import trio
import trio.testing

from node.pending import Deadlines, Pending


def run(test: Any) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def test_an_answer_may_come_before_or_after_its_waiter() -> None:
    async def main() -> None:
        early: Pending[int] = Pending()
        early.settle(outcome.Value(1))
        assert await early.wait() == 1
        late: Pending[int] = Pending()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(ValueError, match="told"):
                    await late.wait()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            late.settle(outcome.Error(ValueError("told")))

    run(main)


def test_a_callback_is_told_once_whoever_comes_first_and_not_after_it_was_cancelled() -> None:
    told: list[Any] = []
    early: Pending[int] = Pending()
    early.settle(outcome.Value(1))
    early.tell(told.append)
    late: Pending[int] = Pending()
    late.tell(told.append)
    late.settle(outcome.Value(2))
    late.cancel()
    assert [one.unwrap() for one in told] == [1, 2]

    class Work(Pending[int]):
        abandoned = 0

        def abandon(self) -> None:
            self.abandoned += 1

    work = Work()
    work.tell(told.append)
    work.cancel()
    work.cancel()
    assert work.over
    assert work.abandoned == 1
    assert len(told) == 2


def test_a_cancelled_waiter_abandons_it() -> None:
    async def main() -> None:
        pending: Pending[int] = Pending()
        with trio.move_on_after(1) as scope:
            await pending.wait()
        assert scope.cancelled_caught
        assert pending.over

    run(main)


def test_deadlines_come_in_order_for_those_that_are_not_over() -> None:
    async def main() -> None:
        expired: list[tuple[int, float]] = []
        many: list[Pending[int]] = [Pending() for _ in range(4)]
        deadlines: Deadlines[Pending[int]] = Deadlines(
            lambda one: expired.append((many.index(one), trio.current_time() - began))
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deadlines.run)
            await trio.testing.wait_all_tasks_blocked()
            began = trio.current_time()
            for one, timeout_s in zip(many, (5.0, 2.0, 1.0, 3.0), strict=True):
                deadlines.add(one, timeout_s)
            many[1].settle(outcome.Value(0))
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        assert expired == [(2, pytest.approx(1.0)), (3, pytest.approx(3.0)), (0, pytest.approx(5.0))]

    run(main)


def test_what_is_over_does_not_pile_up_behind_long_deadlines() -> None:
    async def main() -> None:
        deadlines: Deadlines[Pending[int]] = Deadlines(lambda one: None)
        for _ in range(10_000):
            one: Pending[int] = Pending()
            deadlines.add(one, 60.0)
            one.settle(outcome.Value(0))
        assert len(deadlines._due) <= 1_024

    run(main)
