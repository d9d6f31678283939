"""An answer that is under way: asked for by one call, waited for by another, so that a task can ask many at once."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count
from typing import Any, Generic, NoReturn, TypeVar

import outcome
import trio

T = TypeVar("T")
P = TypeVar("P", bound="Pending[Any]")
_PRUNE_MIN = 1_024


class Pending(Generic[T]):
    """Settled once, by whoever answers. One task may wait for it, or one callback be told; nobody has to."""

    __slots__ = ("_result", "_task", "_then", "over")

    def __init__(self) -> None:
        # Settled, or nobody wants it any more.
        self.over = False
        self._task: trio.lowlevel.Task | None = None
        self._result: outcome.Outcome[T] | None = None
        self._then: Callable[[outcome.Outcome[T]], None] | None = None

    def settle(self, result: outcome.Outcome[T]) -> None:
        assert not self.over, "settled once"
        self.over = True
        if self._task is not None:
            trio.lowlevel.reschedule(self._task, result)
        elif self._then is not None:
            self._then(result)
        else:
            self._result = result

    def tell(self, then: Callable[[outcome.Outcome[T]], None]) -> None:
        """Instead of waiting: `then` is called with what it is settled with, at once when that is there."""
        if self._result is None:
            self._then = then
        else:
            result, self._result = self._result, None
            then(result)

    def cancel(self) -> None:
        """Nobody wants it any more. Harmless when it is over."""
        if not self.over:
            self.over = True
            self.abandon()

    async def wait(self) -> T:
        """What it was settled with, once. A checkpoint only when that is not there yet."""
        if self._result is None:
            self._task = trio.lowlevel.current_task()
            waited: T = await trio.lowlevel.wait_task_rescheduled(self._leave)
            return waited
        result, self._result = self._result, None
        return result.unwrap()

    def _leave(self, _raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self.over = True
        self.abandon()
        return trio.lowlevel.Abort.SUCCEEDED

    def abandon(self) -> None:
        """Called when nobody wants it any more."""


class Deadlines(Generic[P]):
    """`expire` is called with each that is not over when its deadline comes: one heap and one timer for all of them,
    because a cancel scope per call costs more than the call.
    """

    def __init__(self, expire: Callable[[P], None]) -> None:
        self._expire = expire
        self._due: list[tuple[float, int, P]] = []
        self._numbers = count()
        self._prune_at = _PRUNE_MIN
        self._sweep = trio.CancelScope()

    def add(self, pending: P, timeout_s: float) -> None:
        due = self._due
        if len(due) >= self._prune_at:
            # Those that are over stay until they come up; with long timeouts that would be a leak.
            due[:] = [entry for entry in due if not entry[2].over]
            heapq.heapify(due)
            self._prune_at = max(_PRUNE_MIN, 2 * len(due))
        deadline = trio.current_time() + timeout_s
        heapq.heappush(due, (deadline, next(self._numbers), pending))
        if due[0][2] is pending:
            self._sweep.deadline = deadline

    def clear(self) -> None:
        self._due.clear()

    async def run(self) -> NoReturn:
        while True:
            with trio.CancelScope(deadline=self._due[0][0] if self._due else math.inf) as self._sweep:
                await trio.sleep_forever()
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                pending = heapq.heappop(self._due)[2]
                if not pending.over:
                    self._expire(pending)
