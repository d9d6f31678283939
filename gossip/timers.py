"""What a machine wants to be reminded of: a heap of (when, what). Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any


class Timers:
    """Reminders in order of time; those of one moment in order of setting. What no longer matters when it comes up, the reminded
    one ignores: nothing is taken out of the heap."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        """`do(*args, now)` at `when` or as soon as possible after it."""
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, do, args))

    @property
    def next_deadline(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def run(self, now: float) -> None:
        """All that is due. What these set for `now` waits for the next run, so this ends."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap))
        for _, _, do, args in due:
            do(*args, now)

    def __len__(self) -> int:
        return len(self._heap)
