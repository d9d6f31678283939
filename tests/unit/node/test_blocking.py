"""The runners: results, errors, order, cancellation and closing. Real time: threads run away from a MockClock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio

from node.blocking import DedicatedThread, InlineRunner, Runner, ThreadRunner


@asynccontextmanager
async def pool() -> Any:
    yield ThreadRunner("test")


@asynccontextmanager
async def inline() -> Any:
    yield InlineRunner()


RUNNERS = [pool, inline, DedicatedThread]
Make = Callable[[], AbstractAsyncContextManager[Any]]


def refuse(message: str) -> None:
    raise LookupError(message)


@pytest.mark.parametrize("make", RUNNERS)
def test_results_and_errors_come_back(make: Make) -> None:
    async def main() -> None:
        async with make() as runner:
            ask: Runner = runner
            assert await ask(divmod, 7, 3) == (2, 1)
            with pytest.raises(LookupError, match="gone"):
                await ask(refuse, "gone")
            assert await ask(divmod, 7, 3) == (2, 1)
            assert runner.statistics().calls == 3
            assert runner.statistics().waiting == 0

    trio.run(main)


@pytest.mark.parametrize("make", RUNNERS[:1] + RUNNERS[2:])
def test_one_at_a_time_in_order_off_the_loop(make: Make) -> None:
    async def main() -> None:
        running = 0
        order: list[int] = []

        def work(number: int) -> None:
            nonlocal running
            running += 1
            assert running == 1
            assert threading.current_thread() is not threading.main_thread()
            time.sleep(0.005)
            order.append(number)
            running -= 1

        async with make() as runner:
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    await wait_queued(runner, number)
                    nursery.start_soon(runner, work, number)
            assert order == list(range(10))
            assert runner.statistics().busy_s >= 0.05

    async def wait_queued(runner: Any, count: int) -> None:
        while runner.statistics().calls < count:
            await trio.lowlevel.checkpoint()

    trio.run(main)


@pytest.mark.parametrize("make", RUNNERS[:1] + RUNNERS[2:])
def test_cancellation_waits_for_what_has_begun(make: Make) -> None:
    async def main() -> None:
        done = threading.Event()

        def work() -> None:
            time.sleep(0.05)
            done.set()

        async with make() as runner:
            with trio.move_on_after(0.01):
                await runner(work)
            assert done.is_set()
            with trio.move_on_after(0) as scope:
                await runner(pytest.fail, "a cancelled caller begins nothing")
            assert scope.cancelled_caught

    trio.run(main)


def test_a_closed_thread_is_gone_and_takes_nothing() -> None:
    async def main() -> None:
        done: list[int] = []
        before = threading.active_count()
        thread = DedicatedThread("mine")
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(thread, done.append, number)
            await trio.testing.wait_all_tasks_blocked()
            await thread.aclose()
            assert sorted(done) == [0, 1, 2]
        with pytest.raises(trio.ClosedResourceError):
            await thread(done.append, 4)
        with trio.fail_after(2):
            while threading.active_count() > before:
                await trio.sleep(0.001)

    trio.run(main)


def test_a_thread_that_was_never_used_closes() -> None:
    async def main() -> None:
        async with DedicatedThread():
            pass

    trio.run(main)
