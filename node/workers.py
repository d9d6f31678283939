"""Tasks that stay for the next job: waking one costs a third of starting one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import outcome
import trio

J = TypeVar("J")
# Workers kept waiting; the rest end with their job.
IDLE_MAX = 64


class Workers(Generic[J]):
    """`work` must raise nothing but cancellation. How many jobs are under way is for the owner to bound."""

    def __init__(self, nursery: trio.Nursery, work: Callable[[J], Awaitable[None]]) -> None:
        self._nursery, self._do = nursery, work
        self._idle: list[trio.lowlevel.Task] = []

    def begin(self, job: J) -> None:
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop(), outcome.Value(job))
        else:
            self._nursery.start_soon(self._work, job)

    async def _work(self, job: J) -> None:
        while True:
            await self._do(job)
            if len(self._idle) >= IDLE_MAX:
                return
            self._idle.append(trio.lowlevel.current_task())
            job = await trio.lowlevel.wait_task_rescheduled(self._leave)

    def _leave(self, _raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        # Only the end of the nursery cancels workers, and nobody is woken after it.
        self._idle.clear()
        return trio.lowlevel.Abort.SUCCEEDED
