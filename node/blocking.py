"""Where an actor's blocking calls run. An actor is given a runner, so that a simulation can run them inline.

A hop through `DedicatedThread` costs about two thirds of one through `trio.to_thread` (`python -m bench.hops`), and
both are dear: batch before hopping. A call that has begun cannot be cancelled; the caller waits for it, so time
limits belong inside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar, TypeVarTuple

import outcome
import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Runner(Protocol):
    """Runs a blocking function and returns what it returns, or raises what it raises."""

    async def __call__(self, fn: Callable[[*Ts], T], *args: *Ts) -> T: ...


@dataclass(frozen=True, slots=True)
class RunnerStatistics:
    name: str
    calls: int
    # Calls that have not returned yet, those that wait for a thread included.
    waiting: int
    # Seconds spent in the functions themselves.
    busy_s: float


class _Counted:
    """The counters that every runner keeps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls = self._waiting = 0
        self._busy_s = 0.0

    def statistics(self) -> RunnerStatistics:
        return RunnerStatistics(name=self.name, calls=self._calls, waiting=self._waiting, busy_s=self._busy_s)


class ThreadRunner(_Counted):
    """Trio's thread pool, at most `limit` of this runner's calls at a time, in the order in which they came."""

    def __init__(self, name: str = "blocking", limit: int = 1) -> None:
        super().__init__(name)
        self._limiter = trio.CapacityLimiter(limit)

    async def __call__(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        self._calls += 1
        self._waiting += 1
        try:
            return await trio.to_thread.run_sync(
                self._timed, fn, *args, limiter=self._limiter, thread_name=self.name
            )
        finally:
            self._waiting -= 1

    def _timed(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        began = time.perf_counter()
        try:
            return fn(*args)
        finally:
            self._busy_s += time.perf_counter() - began


class InlineRunner(_Counted):
    """On the loop itself, for simulations and tests: nothing else runs meanwhile, and virtual time stands still."""

    def __init__(self, name: str = "inline") -> None:
        super().__init__(name)

    async def __call__(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        await trio.lowlevel.checkpoint()
        self._calls += 1
        return fn(*args)


_Job = tuple[Callable[[], Any], trio.lowlevel.Task]


class DedicatedThread(_Counted):
    """A thread of its own, one call at a time, in order; cheaper than the pool, for a log or a search lane.

    Close it with `aclose`, or use it in `async with`. Calls that wait when it is closed are still carried
    out.
    """

    def __init__(self, name: str = "dedicated") -> None:
        super().__init__(name)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._token: trio.lowlevel.TrioToken | None = None
        self._ended = trio.Event()
        self._closed = False

    async def __call__(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise trio.ClosedResourceError(f"the thread {self.name} has been closed")
        if self._token is None:
            # Lazily: a runner is built before the loop runs.
            self._token = trio.lowlevel.current_trio_token()
            # A daemon, so that a process that dies of an error is not held up by a call that hangs.
            Thread(target=self._work, name=self.name, daemon=True).start()
        self._calls += 1
        self._waiting += 1
        try:
            self._jobs.put((lambda: fn(*args), trio.lowlevel.current_task()))
            result: T = await trio.lowlevel.wait_task_rescheduled(_wait_anyway)
            return result
        finally:
            self._waiting -= 1

    def _work(self) -> None:
        assert self._token is not None
        while (job := self._jobs.get()) is not None:
            began = time.perf_counter()
            result = outcome.capture(job[0])
            self._busy_s += time.perf_counter() - began
            try:
                self._token.run_sync_soon(trio.lowlevel.reschedule, job[1], result)
            except trio.RunFinishedError:
                return
            # Nothing of the last call may live on while this thread waits for the next one.
            del job, result
        try:
            self._token.run_sync_soon(self._ended.set)
        except trio.RunFinishedError:
            return

    async def aclose(self) -> None:
        """Takes no more calls, and waits for those it has."""
        self._closed = True
        self._jobs.put(None)
        if self._token is not None:
            with trio.CancelScope(shield=True):
                await self._ended.wait()

    async def __aenter__(self) -> DedicatedThread:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _wait_anyway(_raise_cancel: Any) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
