"""Whether this node is well enough to be asked: its event loop keeps time, its disks and its search device answer.

A node that cannot serve as it should says so itself and at once; that is cheaper and surer than others finding out by
timeouts. Who is degraded stays a member and a voter: it is avoided where another replica is there (`docs/gossip.md`
tells death, this is illness). A process that is stopped cannot speak; that is what failure detection is for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import structlog
import trio

from node.blocking import RunnerStatistics
from node.facts import Health

log = structlog.get_logger(__name__)

TICK_S = 0.1
# A call of a disk or device that takes longer hangs, as far as anybody who waits for it is concerned.
HANG_S = 2.0
# One stall may be anything (the process was stopped, a virtual machine moved); several are an overloaded host.
LATE_S, LATE_TIMES, LATE_WINDOW_S = 0.5, 2, 10.0
# A tick this late means that we were not running: what did not return meanwhile had no chance to.
UNFAIR_S = 0.1


class Watched(NamedTuple):
    """A runner whose calls should return soon. `what`: as in "the log of shard 3"."""

    flag: Health
    what: str
    statistics: Callable[[], RunnerStatistics]


class _Pending:
    """Since when a runner has had something to do and finished nothing."""

    def __init__(self) -> None:
        self.done = -1
        self.since: float | None = None

    def look(self, numbers: RunnerStatistics, now: float) -> float:
        """Seconds that the oldest call has taken, at least, as far as we have looked."""
        done = numbers.calls - numbers.waiting
        if not numbers.waiting:
            self.since = None
        elif self.since is None or done != self.done:
            self.since = now
        self.done = done
        return 0.0 if self.since is None else now - self.since


class HealthWatch:
    """An actor: looks each TICK_S; calls `changed(flags, reasons)` when the flags change. `watched` may change, too."""

    def __init__(
        self, watched: Callable[[], Sequence[Watched]], changed: Callable[[Health, Sequence[str]], None]
    ) -> None:
        self.flags = Health(0)
        self.reasons: list[str] = []
        self._watched = watched
        self._pending: dict[str, _Pending] = {}
        self._changed = changed
        self._late: deque[float] = deque(maxlen=64)
        self._worst_s = 0.0

    def take_lateness_s(self) -> float:
        """The most that the loop was late since this was asked last."""
        worst, self._worst_s = self._worst_s, 0.0
        return worst

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        task_status.started()
        due = trio.current_time()
        while True:
            due += TICK_S
            await trio.sleep_until(due)
            now = trio.current_time()
            self.look(now, now - due)
            due = max(due, now - TICK_S)

    def look(self, now: float, late_s: float) -> None:
        self._worst_s = max(self._worst_s, late_s)
        if late_s >= LATE_S:
            self._late.append(now)
        while self._late and now - self._late[0] > LATE_WINDOW_S:
            self._late.popleft()
        flags, reasons = Health(0), []
        watched = self._watched()
        self._pending = {one.what: self._pending.get(one.what) or _Pending() for one in watched}
        for one in watched:
            pending = self._pending[one.what]
            if late_s > UNFAIR_S and pending.since is not None:
                pending.since += late_s
            taken_s = pending.look(one.statistics(), now)
            if taken_s > HANG_S:
                flags |= one.flag
                reasons.append(f"{one.what} has not answered for {HANG_S:g} s")
        if len(self._late) >= LATE_TIMES:
            flags |= Health.LATE
            reasons.append("the event loop is late again and again: the host is overloaded")
        self._tell(flags, reasons)

    def _tell(self, flags: Health, reasons: list[str]) -> None:
        if flags == self.flags and len(reasons) == len(self.reasons):
            return
        self.flags, self.reasons = flags, reasons
        if flags:
            log.error("degraded", reasons=reasons)
        else:
            log.info("well again")
        self._changed(flags, reasons)
