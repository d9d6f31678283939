"""When Redis is to be left alone. Pure.

Closed: trips are made. After `FAILURES_MAX` failures in a row it opens: none is made for `OPEN_S`. Then one is tried: when that
succeeds it closes, when it fails it opens for twice as long, up to `OPEN_S_MAX`.
"""

from __future__ import annotations

import math

FAILURES_MAX = 3
OPEN_S = 1.0
OPEN_S_MAX = 10.0


class L1Breaker:
    """Times in seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._failures = 0
        self._open_s = OPEN_S
        # inf: a probe is under way.
        self._closed_from = -math.inf
        self.opened = 0

    def allows(self, now: float) -> bool:
        return now >= self._closed_from

    @property
    def state(self) -> str:
        return "closed" if self._failures < FAILURES_MAX else "open"

    def begin(self) -> None:
        """A trip begins. While it is a probe, nobody waits for another."""
        if self._failures >= FAILURES_MAX:
            self._closed_from = math.inf

    def succeeded(self) -> None:
        self._failures = 0
        self._open_s = OPEN_S
        self._closed_from = -math.inf

    def failed(self, now: float) -> bool:
        """Whether that has opened it."""
        self._failures += 1
        if self._failures < FAILURES_MAX:
            return False
        if self._failures > FAILURES_MAX:
            self._open_s = min(2 * self._open_s, OPEN_S_MAX)
        self._closed_from = now + self._open_s
        self.opened += 1
        return True
