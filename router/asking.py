"""One gathering under way: what the machine wants sent is sent, and it is told what came (docs/fan-out.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import outcome
import trio

from router.coverage import Choice
from router.gathering import Gathering
from router.ports import Asked, Cluster, Done, Node, NodeError, NodeGoneError, Outcome
from router.requests import Session
from router.tries import Cancel, Effect, Send

R = TypeVar("R")
# Asks a node for some shards; what comes of it goes to the callback.
Ask = Callable[[Node, Send, Done[Any]], Asked]


# What an answer is to the machine, and those of the shards for which it has none. TypeError or ValueError: it does not fit them.
Take = Callable[[Sequence[int], Any], tuple[R, dict[int, str]]]


class _Sent(NamedTuple):
    """shards: those that were asked for; behind: those that were not, with why."""

    shards: Sequence[int]
    behind: dict[int, str]
    asked: Asked | None


class Asking(Generic[R]):
    """Sleeps until something came that the machine must know of. When cancelled, nothing is left under way."""

    def __init__(
        self, cluster: Cluster, machine: Gathering[R], ask: Ask, take: Take[R], session: Session
    ) -> None:
        self._cluster, self._machine = cluster, machine
        self._ask, self._take, self._session = ask, take, session
        self._out: dict[int, _Sent] = {}
        # What came since the machine was told last, and when.
        self._came: list[tuple[int, float, tuple[R, dict[int, str]] | Exception]] = []
        # Set while asleep.
        self._task: trio.lowlevel.Task | None = None

    async def run(self, choice: Choice) -> None:
        machine = self._machine
        try:
            await self._do(machine.start(trio.current_time(), choice))
            while machine.open:
                if not self._came:
                    await self._sleep()
                came, self._came = self._came, []
                for id, at, what in came:
                    # A task that is woken by the first may find that the machine wants the second no more.
                    if id in machine.open and (effects := self._tell(id, what, at)):
                        await self._do(effects)
                if not came:
                    await self._do(machine.due(trio.current_time()))
        finally:
            for sent in self._out.values():
                if sent.asked is not None:
                    sent.asked.cancel()
            machine.abandon()

    def _tell(self, id: int, what: tuple[R, dict[int, str]] | Exception, now: float) -> list[Effect]:
        if isinstance(what, tuple):
            return self._machine.answered(id, *what, now)
        if isinstance(what, NodeError):
            return self._machine.failed(id, what.code, now, what.retry_after_ms)
        if isinstance(what, NodeGoneError):
            return self._machine.failed(id, "unavailable", now)
        raise what

    async def _do(self, effects: list[Effect]) -> None:
        waits: list[Send] = []
        for effect in effects:
            if isinstance(effect, Cancel):
                sent = self._out.pop(effect.id, None)
                if sent is not None and sent.asked is not None:
                    sent.asked.cancel()
            elif self._session and effect.node == self._cluster.local:
                waits.append(effect)
            else:
                self._send(effect, {})
        # The others are asked by now: our own replicas may have to wait for the session's writes.
        for send in waits:
            until = trio.current_time() + send.timeout_s
            behind = await self._cluster.caught_up(send.shards, self._session, send.timeout_s)
            shards = [s for s in send.shards if s not in behind]
            self._send(send._replace(shards=shards, timeout_s=max(0.0, until - trio.current_time())), behind)

    def _send(self, send: Send, behind: dict[int, str]) -> None:
        id = send.id
        if not send.shards:
            self._come(id, NodeError("session_behind", "no replica here has what the session saw"))
            return
        self._out[id] = _Sent(send.shards, behind, None)
        try:
            asked = self._ask(self._cluster.node(send.node), send, partial(self._done, id))
        except (NodeGoneError, NodeError) as error:
            del self._out[id]
            self._come(id, error)
        else:
            if id in self._out:
                self._out[id] = _Sent(send.shards, behind, asked)

    def _done(self, id: int, result: Outcome[Any]) -> None:
        sent = self._out.pop(id)
        what: tuple[R, dict[int, str]] | Exception
        if isinstance(result, outcome.Value):
            try:
                reply, failed = self._take(sent.shards, result.value)
            except (TypeError, ValueError) as error:
                what, urgent = (
                    NodeError("internal", f"an answer that does not fit its question: {error}"),
                    True,
                )
            else:
                what = (reply, failed | sent.behind if sent.behind else failed)
                urgent = bool(failed) or self._machine.doubled
        else:
            assert isinstance(result.error, Exception)
            what, urgent = result.error, True
        self._come(id, what)
        # Woken once, when all is in; but what must be asked for elsewhere is at once.
        if self._task is not None and (urgent or len(self._came) >= len(self._machine.open)):
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    def _come(self, id: int, what: tuple[R, dict[int, str]] | Exception) -> None:
        self._came.append((id, trio.current_time(), what))

    async def _sleep(self) -> None:
        due = self._machine.next_due()
        if due is None:
            await self._park()
            return
        with trio.CancelScope(deadline=due):
            await self._park()

    async def _park(self) -> None:
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._leave)

    def _leave(self, _raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
