"""Starts actors, restarts those that crash, and gives up loudly on one that crashes too often.

    async with trio.open_nursery() as nursery:
        supervisor = Supervisor(nursery)
        await supervisor.start(actor, name="shard-3")   # returns when the actor is ready

A crash before an actor was ever ready is raised by `start`: what cannot start does not get better by trying. Giving up raises
`ActorGaveUpError` in the nursery, which ends the process; systemd starts it again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import structlog
import trio

from node.actor import Actor, Mailbox, MailboxStatistics

log = structlog.get_logger(__name__)


class ActorGaveUpError(Exception):
    """An actor crashed too often, or in a way that a restart cannot mend. One line, fit to be the process's last."""


class State(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    STOPPED = "stopped"
    GAVE_UP = "gave_up"


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartPolicy:
    """More than `crashes_max` crashes within `window_s` is too often. Errors in `fatal` are never tried again."""

    crashes_max: int = 5
    window_s: float = 60.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 10.0
    fatal: tuple[type[BaseException], ...] = ()


@dataclass(frozen=True, slots=True)
class ActorStatistics:
    name: str
    state: State
    crashes: int
    last_error: str
    mailbox: MailboxStatistics | None


class _Supervised:
    """What the supervisor remembers of one actor."""

    def __init__(self, name: str, actor: Actor, policy: RestartPolicy) -> None:
        self.name, self.actor, self.policy = name, actor, policy
        mailbox = getattr(actor, "mailbox", None)
        self.mailbox: Mailbox[object] | None = mailbox if isinstance(mailbox, Mailbox) else None
        self.state = State.STARTING
        self.crashes = 0
        self.last_error = ""
        self.recent: deque[float] = deque()
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    def close(self, state: State, reason: str) -> None:
        self.state = state
        if self.mailbox is not None:
            self.mailbox.close(reason)


class Supervisor:
    """Runs actors in the given nursery."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        policy: RestartPolicy | None = None,
        jitter: random.Random | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._nursery = nursery
        self._policy = policy or RestartPolicy()
        self._jitter = jitter or random.Random()
        self._clock = clock
        self._actors: dict[str, _Supervised] = {}

    async def start(self, actor: Actor, *, name: str, policy: RestartPolicy | None = None) -> None:
        """Starts the actor and returns when it is ready. Raises what it raised before it was."""
        assert name not in self._actors, f"two actors are named {name}"
        one = _Supervised(name, actor, policy or self._policy)
        self._actors[name] = one
        await self._nursery.start(self._supervise, one)

    async def stop(self, name: str) -> None:
        """Cancels an actor, waits for its end, and forgets it. Raises KeyError."""
        one = self._actors[name]
        one.scope.cancel()
        await one.ended.wait()
        del self._actors[name]

    async def _supervise(self, one: _Supervised, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            with one.scope:
                await self._run_again(one, task_status=task_status)
        finally:
            one.ended.set()

    async def _run_again(self, one: _Supervised, *, task_status: trio.TaskStatus[None]) -> None:
        ready = False
        while True:
            began = self._clock()
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(one.actor.run)
                    self._open(one)
                    if not ready:
                        ready = True
                        task_status.started()
            except Exception as group:
                error = _sole(group)
            except BaseException:
                one.close(State.STOPPED, "the node is stopping")
                raise
            else:
                one.close(State.STOPPED, "it has finished")
                log.info("actor_finished", actor=one.name)
                return
            pause_s = self._after_crash(one, error, began, ready)
            await trio.sleep(pause_s)
            one.state = State.STARTING

    def _open(self, one: _Supervised) -> None:
        one.state = State.RUNNING
        if one.mailbox is not None:
            one.mailbox.open()

    def _after_crash(self, one: _Supervised, error: Exception, began: float, ready: bool) -> float:
        """Seconds to wait before the next try. Raises the error itself, or ActorGaveUpError."""
        now, policy = self._clock(), one.policy
        one.crashes += 1
        one.last_error = f"{type(error).__name__}: {error}"
        one.close(State.GAVE_UP, f"it crashed: {one.last_error}")
        if not ready:
            raise error
        if isinstance(error, policy.fatal):
            raise ActorGaveUpError(f"{one.name} cannot go on: {one.last_error}") from error
        if now - began >= policy.window_s:
            one.recent.clear()
        one.recent.append(now)
        while now - one.recent[0] > policy.window_s:
            one.recent.popleft()
        if len(one.recent) > policy.crashes_max:
            raise ActorGaveUpError(
                f"{one.name} crashed {len(one.recent)} times within {policy.window_s:g} s; last: {one.last_error}"
            ) from error
        one.state = State.BACKOFF
        # The exponent is bounded by crashes_max, so it cannot overflow.
        pause_s = min(policy.backoff_min_s * 2.0 ** (len(one.recent) - 1), policy.backoff_max_s)
        pause_s *= self._jitter.uniform(0.5, 1.0)
        log.error(
            "actor_crashed",
            actor=one.name,
            crashes=one.crashes,
            restart_in_s=round(pause_s, 3),
            exc_info=error,
        )
        return pause_s

    def state(self, name: str) -> State:
        """Raises KeyError."""
        return self._actors[name].state

    def statistics(self) -> list[ActorStatistics]:
        return [
            ActorStatistics(
                name=one.name,
                state=one.state,
                crashes=one.crashes,
                last_error=one.last_error,
                mailbox=one.mailbox.statistics() if one.mailbox else None,
            )
            for one in self._actors.values()
        ]


def _sole(error: Exception) -> Exception:
    """The one error in a group of one, however deep; the group itself when there are several."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
