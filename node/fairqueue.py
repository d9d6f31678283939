"""Whose turn is next: a bounded queue by priority, within a priority by turns of the sources (docs/fan-out.md, `fair`). Pure.

Laws:
- Never more than `bound` items.
- `take` gives the lowest priority number first; of equal priority, each source one item before any gives a second;
  of one source in the order in which they came.
- When it is full, `push` puts out an item of a worse priority; else the newest of a source of the same priority that has
  at least two more waiting than the one that comes; else it refuses. So nobody can fill it against others.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FullError(Exception):
    """There is no room for this item."""


class FairQueue(Generic[T]):
    """Items by (priority, source)."""

    def __init__(self, bound: int) -> None:
        assert bound >= 1
        self._bound = bound
        self._size = 0
        # By priority: sources with something waiting, the one whose turn is next first.
        self._lines: dict[int, dict[Hashable, deque[T]]] = {}

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            for waiting in line.values():
                yield from waiting

    def push(self, item: T, source: Hashable, priority: int) -> T | None:
        """Returns the item that had to go for it, if any. Raises FullError."""
        out: T | None = None
        if self._size >= self._bound:
            out = self._make_room(source, priority)
        line = self._lines.setdefault(priority, {})
        waiting = line.get(source)
        if waiting is None:
            line[source] = deque((item,))
        else:
            waiting.append(item)
        self._size += 1
        return out

    def _make_room(self, source: Hashable, priority: int) -> T:
        worst = max(self._lines)
        line = self._lines[worst]
        most = max(line, key=lambda one: len(line[one]))
        own = len(line.get(source, ()))
        if worst < priority or (worst == priority and len(line[most]) < own + 2):
            raise FullError
        out = line[most].pop()
        self._drop_empty(worst, most)
        self._size -= 1
        return out

    def remove(self, item: T, source: Hashable, priority: int) -> None:
        """It waits no more; harmless when it has been taken."""
        waiting = self._lines.get(priority, {}).get(source)
        if waiting is not None:
            with contextlib.suppress(ValueError):
                waiting.remove(item)
                self._size -= 1
            self._drop_empty(priority, source)

    def take(self, most: int) -> list[T]:
        """Up to `most` items, by turns."""
        taken: list[T] = []
        for priority in sorted(self._lines):
            line = self._lines[priority]
            while line and len(taken) < most:
                source = next(iter(line))
                waiting = line.pop(source)
                taken.append(waiting.popleft())
                if waiting:
                    line[source] = waiting  # to the end: the others' turn
            if not line:
                del self._lines[priority]
        self._size -= len(taken)
        return taken

    def _drop_empty(self, priority: int, source: Hashable) -> None:
        line = self._lines[priority]
        if not line[source]:
            del line[source]
        if not line:
            del self._lines[priority]
