"""Group commit: whoever waits while one flush runs goes into the next, so one fdatasync serves all of them.

The laws: an item is flushed at most once, in the order of submission. Every submitter gets a result or an error,
also when the loop crashes or is cancelled, and at once. A cancelled submitter whose item waits takes it back; once
the item is being flushed, the flush goes on and only its result is abandoned.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import outcome
import trio

from node.pending import Pending

T = TypeVar("T")
R = TypeVar("R")


class OverloadedError(Exception):
    """Too many items wait; nothing was done with this one."""

    code = "overloaded"

    def __init__(self, message: str, retry_after_ms: int = 50) -> None:
        self.retry_after_ms = retry_after_ms
        super().__init__(message)


class CommitStoppedError(Exception):
    """The loop does not run (any more). Of an item that was being flushed the outcome is unknown."""

    code = "unavailable"

    def __init__(self, message: str, *, outcome_unknown: bool) -> None:
        self.outcome_unknown = outcome_unknown
        super().__init__(message)


class Ticket(Pending[R], Generic[T, R]):
    """An item that waits or is being flushed; `wait` for its result."""

    __slots__ = ("_commit", "item")

    def __init__(self, commit: GroupCommit[T, R], item: T) -> None:
        super().__init__()
        self._commit, self.item = commit, item

    def abandon(self) -> None:
        """Takes the item back when it waits; otherwise only its result finds nobody."""
        self._commit.take_back(self)


@dataclass(frozen=True, slots=True)
class CommitStatistics:
    waiting: int
    flushing: int
    flushes: int
    items: int
    refused: int
    abandoned: int


class GroupCommit(Generic[T, R]):
    """`flush` gets the waiting items in order and returns as many results; an exception among them is raised to
    that item's submitter, an exception raised by it to all submitters of the batch (the loop goes on).

    waiting_max: items that may wait (those being flushed not counted); batch_max: items in one flush.
    """

    def __init__(
        self,
        flush: Callable[[list[T]], Awaitable[Sequence[R | Exception]]],
        *,
        waiting_max: int = 10_000,
        batch_max: int = 1_000,
    ) -> None:
        assert waiting_max >= 1
        assert batch_max >= 1
        self._flush, self._waiting_max, self._batch_max = flush, waiting_max, batch_max
        self._waiting: deque[Ticket[T, R]] = deque()
        self._flushing: list[Ticket[T, R]] = []
        self._loop: trio.lowlevel.Task | None = None
        self._parked = False
        self._stopped: str | None = None
        self._flushes = self._items = self._refused = self._abandoned = 0

    async def submit(self, item: T) -> R:
        """Wait until `item` is flushed. Raises OverloadedError at once, CommitStoppedError, or what flush said."""
        # Of a task that is cancelled already the wait takes the item back before the loop can see it.
        return await self.begin(item).wait()

    def begin(self, item: T) -> Ticket[T, R]:
        """`item` waits to be flushed from now on. Raises OverloadedError, CommitStoppedError."""
        if self._stopped is not None:
            raise CommitStoppedError(self._stopped, outcome_unknown=False)
        if len(self._waiting) >= self._waiting_max:
            self._refused += 1
            raise OverloadedError(f"{self._waiting_max} requests wait already; try again")
        ticket = Ticket(self, item)
        self._waiting.append(ticket)
        if self._parked:
            self._wake()
        return ticket

    def take_back(self, ticket: Ticket[T, R]) -> None:
        """Nobody wants its result any more."""
        self._abandoned += 1
        # Frees its place now: abandoned items must not fill the bound. Absent: it is being flushed.
        with contextlib.suppress(ValueError):
            self._waiting.remove(ticket)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Flush until cancelled. Ends only by an exception, and tells every waiter."""
        assert self._loop is None, "one loop per GroupCommit"
        self._loop = trio.lowlevel.current_task()
        task_status.started()
        try:
            while True:
                await self._wait_for_items()
                self._flushing = batch = self._take()
                self._flushes += 1
                self._items += len(batch)
                self._settle(batch, await self._results(batch))
                self._flushing = []
        finally:
            self._fail_all()

    def _take(self) -> list[Ticket[T, R]]:
        waiting = self._waiting
        if len(waiting) > self._batch_max:
            return [waiting.popleft() for _ in range(self._batch_max)]
        batch = list(waiting)
        waiting.clear()
        return batch

    async def _results(self, batch: list[Ticket[T, R]]) -> Sequence[R | Exception]:
        try:
            results = await self._flush([ticket.item for ticket in batch])
        except Exception as error:  # whatever it is, the submitters are who must know
            return [error] * len(batch)
        assert len(results) == len(batch), "flush answers every item"
        return results

    def _settle(self, batch: list[Ticket[T, R]], results: Sequence[R | Exception]) -> None:
        for ticket, result in zip(batch, results, strict=True):
            if not ticket.over:
                ticket.settle(
                    outcome.Error(result) if isinstance(result, Exception) else outcome.Value(result)
                )

    async def _wait_for_items(self) -> None:
        if self._waiting:
            # A flush that never blocks must not starve everybody else.
            await trio.lowlevel.checkpoint()

        def abort(_: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            self._parked = False
            return trio.lowlevel.Abort.SUCCEEDED

        # Again, when whoever woke it was cancelled meanwhile.
        while not self._waiting:
            self._parked = True
            await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake(self) -> None:
        assert self._loop is not None
        self._parked = False
        trio.lowlevel.reschedule(self._loop)

    def _fail_all(self) -> None:
        self._stopped = "this shard's writer has stopped; try again, perhaps through another node"
        flushing, waiting = self._flushing, list(self._waiting)
        self._flushing = []
        self._waiting.clear()
        for tickets, unknown in ((flushing, True), (waiting, False)):
            for ticket in tickets:
                if not ticket.over:
                    error = CommitStoppedError(self._stopped, outcome_unknown=unknown)
                    ticket.settle(outcome.Error(error))

    def statistics(self) -> CommitStatistics:
        return CommitStatistics(
            waiting=len(self._waiting),
            flushing=len(self._flushing),
            flushes=self._flushes,
            items=self._items,
            refused=self._refused,
            abandoned=self._abandoned,
        )
