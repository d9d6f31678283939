"""An actor: one object, one task, one bounded mailbox, and state that nobody else touches.

Laws of a mailbox: * it never holds more than `capacity` letters; one more is refused at once
(`MailboxFullError`); * who asks gets exactly one answer: what the actor replied, what it failed with, or
`ActorGoneError` at once when the
  actor is not running, stops, or crashes, even for a letter that it had already taken;
* letters are taken in the order in which they came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import outcome
import trio

M = TypeVar("M")


class ActorError(Exception):
    """Root of what asking an actor raises for the actor's sake."""


class ActorGoneError(ActorError):
    """The actor is not running; the request may have been begun."""

    code = "unavailable"


class MailboxFullError(ActorError):
    """The actor has as much waiting as it may; nothing was queued."""

    code = "overloaded"
    retry_after_ms = 50


class Actor(Protocol):
    """What a supervisor runs. When it also has a `mailbox: Mailbox`, the supervisor opens and closes that."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Recovers, calls `task_status.started()` when ready, works until cancelled. Called again after a crash."""


@dataclass(frozen=True, slots=True)
class MailboxStatistics:
    name: str
    open: bool
    capacity: int
    waiting: int
    in_work: int
    taken: int
    refused: int


class Letter(Generic[M]):
    """A message, and the way to answer it. To answer twice, or somebody who has given up, does nothing."""

    __slots__ = ("_mailbox", "_task", "message")

    def __init__(self, message: M, task: trio.lowlevel.Task | None, mailbox: Mailbox[M]) -> None:
        self.message = message
        self._task = task
        self._mailbox = mailbox

    @property
    def awaited(self) -> bool:
        """Whether somebody still waits for the answer."""
        return self._task is not None

    def reply(self, value: Any = None) -> None:
        self._settle(outcome.Value(value))

    def fail(self, error: Exception) -> None:
        self._settle(outcome.Error(error))

    def _settle(self, result: outcome.Outcome[Any]) -> None:
        task, self._task = self._task, None
        self._mailbox._in_work.pop(id(self), None)
        if task is not None:
            trio.lowlevel.reschedule(task, result)


class Mailbox(Generic[M]):
    """Bounded; closed until its actor is ready. An ask costs two task switches."""

    def __init__(self, name: str, capacity: int = 1_024) -> None:
        assert capacity >= 1
        self.name, self.capacity = name, capacity
        self._waiting: deque[Letter[M]] = deque()
        self._in_work: dict[int, Letter[M]] = {}
        self._receiver: trio.lowlevel.Task | None = None
        self._open = False
        self._taken = self._refused = 0

    def tell(self, message: M) -> None:
        """Leaves a message that nobody answers. Raises ActorGoneError, MailboxFullError."""
        self._post(Letter(message, None, self))

    async def ask(self, message: M) -> Any:
        """The actor's answer. Raises ActorGoneError, MailboxFullError, or what the actor failed with."""
        await trio.lowlevel.checkpoint_if_cancelled()
        letter = Letter(message, trio.lowlevel.current_task(), self)
        self._post(letter)

        def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
            letter._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)

    def _post(self, letter: Letter[M]) -> None:
        if not self._open:
            self._refused += 1
            raise ActorGoneError(f"{self.name} is not running")
        if len(self._waiting) >= self.capacity:
            self._refused += 1
            raise MailboxFullError(f"{self.name} has {self.capacity} requests waiting; try again later")
        self._waiting.append(letter)
        if self._receiver is not None:
            receiver, self._receiver = self._receiver, None
            trio.lowlevel.reschedule(receiver)

    async def receive(self) -> Letter[M]:
        """The next letter; only the actor calls this."""
        return (await self.receive_many(1))[0]

    async def receive_many(self, most: int) -> Sequence[Letter[M]]:
        """At least one letter, and as many as wait, up to `most`: batch before a thread hop. Only the actor calls this."""
        assert self._receiver is None, "a mailbox has one reader"
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._waiting:
            self._receiver = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._stop_receiving)
        letters = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        for letter in letters:
            if letter.awaited:
                self._in_work[id(letter)] = letter
        self._taken += len(letters)
        return letters

    def _stop_receiving(self, _raise_cancel: Any) -> trio.lowlevel.Abort:
        self._receiver = None
        return trio.lowlevel.Abort.SUCCEEDED

    def open(self) -> None:
        self._open = True

    def close(self, reason: str = "it stopped") -> None:
        """Takes nothing more, and tells everybody who waits, in the box or in work, at once."""
        self._open = False
        letters = [*self._in_work.values(), *self._waiting]
        self._in_work.clear()
        self._waiting.clear()
        for letter in letters:
            self._refused += 1
            letter.fail(ActorGoneError(f"{self.name} cannot answer: {reason}"))

    def statistics(self) -> MailboxStatistics:
        return MailboxStatistics(
            name=self.name,
            open=self._open,
            capacity=self.capacity,
            waiting=len(self._waiting),
            in_work=len(self._in_work),
            taken=self._taken,
            refused=self._refused,
        )
