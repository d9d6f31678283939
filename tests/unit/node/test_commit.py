"""Group commit: batches form while a flush runs, and nobody who submits is left without an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing

from node.commit import CommitStoppedError, GroupCommit, OverloadedError


class Disk:
    """A flush that waits to be let through, or fails as told."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = trio.Semaphore(0)
        self.fail: Exception | None = None

    async def flush(self, items: list[int]) -> Sequence[int | Exception]:
        self.batches.append(items)
        await self.gate.acquire()
        if self.fail is not None:
            raise self.fail
        return [ValueError(str(item)) if item < 0 else item * 10 for item in items]


def in_trio(test: Callable[[Disk], object]) -> Callable[[], None]:
    def wrapped() -> None:
        async def main() -> None:
            with trio.fail_after(5):
                await test(Disk())  # type: ignore[misc]

        trio.run(main)

    wrapped.__name__ = test.__name__
    return wrapped


async def ask(commit: GroupCommit[int, int], item: int, answers: dict[int, object]) -> None:
    try:
        answers[item] = await commit.submit(item)
    except Exception as error:
        answers[item] = error


@in_trio
async def test_what_waits_during_a_flush_is_one_batch_in_order(disk: Disk) -> None:
    commit = GroupCommit(disk.flush, batch_max=3)
    answers: dict[int, object] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(commit.run)
        for item in range(1, 7):
            nursery.start_soon(ask, commit, item, answers)
            await trio.testing.wait_all_tasks_blocked()
        assert disk.batches == [[1]]
        assert (commit.statistics().waiting, commit.statistics().flushing) == (5, 1)
        for _ in range(3):
            disk.gate.release()
            await trio.testing.wait_all_tasks_blocked()
        assert disk.batches == [[1], [2, 3, 4], [5, 6]]
        assert answers == {i: i * 10 for i in range(1, 7)}
        nursery.cancel_scope.cancel()


@in_trio
async def test_one_items_error_is_its_own_and_a_flushs_error_is_everybodys(disk: Disk) -> None:
    commit = GroupCommit(disk.flush)
    answers: dict[int, object] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(commit.run)
        for item in (0, -1, 2):
            nursery.start_soon(ask, commit, item, answers)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            disk.gate.release()
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(answers[-1], ValueError)
        assert (answers[0], answers[2]) == (0, 20)
        disk.fail = OSError("gone")
        for _ in range(2):
            disk.gate.release()
        await ask(commit, 5, answers)
        assert answers[5] is disk.fail
        disk.fail = None
        disk.gate.release()
        assert await commit.submit(6) == 60
        nursery.cancel_scope.cancel()


@in_trio
async def test_over_the_bound_is_refused_at_once_and_a_cancelled_waiter_frees_its_place(disk: Disk) -> None:
    """`bounded`."""
    commit = GroupCommit(disk.flush, waiting_max=2)
    answers: dict[int, object] = {}
    scopes = {item: trio.CancelScope() for item in range(1, 4)}

    async def cancellable(item: int) -> None:
        with scopes[item]:
            await ask(commit, item, answers)

    async with trio.open_nursery() as nursery:
        await nursery.start(commit.run)
        for item in scopes:
            nursery.start_soon(cancellable, item)
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OverloadedError):
            await commit.submit(4)
        scopes[1].cancel()  # it is being flushed: goes on, its result is abandoned
        scopes[2].cancel()  # it waits: taken back
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ask, commit, 5, answers)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            disk.gate.release()
        await trio.testing.wait_all_tasks_blocked()
        assert disk.batches == [[1], [3, 5]]
        assert answers == {3: 30, 5: 50}
        assert commit.statistics().abandoned == 2
        assert commit.statistics().refused == 1
        nursery.cancel_scope.cancel()


@in_trio
async def test_a_submit_of_a_cancelled_task_leaves_no_trace(disk: Disk) -> None:
    commit = GroupCommit(disk.flush)
    async with trio.open_nursery() as nursery:
        await nursery.start(commit.run)
        with trio.CancelScope() as scope:
            scope.cancel()
            await commit.submit(1)
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert disk.batches == []
        nursery.cancel_scope.cancel()


@in_trio
async def test_a_loop_woken_by_a_submit_that_is_taken_back_at_once_flushes_nothing(disk: Disk) -> None:
    commit = GroupCommit(disk.flush)
    answers: dict[int, object] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(commit.run)
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await commit.submit(1)
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert (disk.batches, commit.statistics().flushes) == ([], 0)
        nursery.start_soon(ask, commit, 2, answers)
        disk.gate.release()
        await trio.testing.wait_all_tasks_blocked()
        assert answers == {2: 20}
        nursery.cancel_scope.cancel()


@in_trio
async def test_when_the_loop_is_cancelled_everybody_is_told_at_once(disk: Disk) -> None:
    commit = GroupCommit(disk.flush)
    answers: dict[int, object] = {}
    async with trio.open_nursery() as askers:
        async with trio.open_nursery() as nursery:
            await nursery.start(commit.run)
            for item in (1, 2, 3):
                askers.start_soon(ask, commit, item, answers)
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    unknown = {i: a.outcome_unknown for i, a in answers.items() if isinstance(a, CommitStoppedError)}
    assert unknown == {1: True, 2: False, 3: False}
    with pytest.raises(CommitStoppedError) as caught:
        await commit.submit(4)
    assert caught.value.outcome_unknown is False


@in_trio
async def test_when_the_loop_crashes_everybody_is_told_at_once(disk: Disk) -> None:
    async def short(items: list[int]) -> list[int]:
        await disk.gate.acquire()
        return []

    commit: GroupCommit[int, int] = GroupCommit(short)
    answers: dict[int, object] = {}
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as askers:
            await askers.start(commit.run)
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as others:
                    for item in (1, 2):
                        others.start_soon(ask, commit, item, answers)
                        await trio.testing.wait_all_tasks_blocked()
                    disk.gate.release()
    assert caught.group_contains(AssertionError)
    assert all(isinstance(a, CommitStoppedError) for a in answers.values())
    assert len(answers) == 2


@in_trio
async def test_waiters_before_the_start_and_flushes_that_never_block(disk: Disk) -> None:
    async def at_once(items: list[int]) -> list[int]:
        return items

    commit: GroupCommit[int, int] = GroupCommit(at_once)
    answers: dict[int, object] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, commit, 1, answers)
        await trio.testing.wait_all_tasks_blocked()
        assert answers == {}
        await nursery.start(commit.run)
        for item in range(2, 200):
            assert await commit.submit(item) == item
        assert answers == {1: 1}
        nursery.cancel_scope.cancel()
