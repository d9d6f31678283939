"""The newest records of a log, kept in memory so that followers need no disk. Pure; the owner holds a lock."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class _Kept(NamedTuple):
    """Records from sequence `first` on, one behind the other in `data`; each begins where `starts` says."""

    first: int
    data: bytes
    starts: Sequence[int]


class Tail:
    """What the last appends wrote, in their own pieces: `bytes_max` of it at most, and the last append if that fits."""

    def __init__(self, last: int, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._runs: deque[_Kept] = deque()
        self._last = last
        self.bytes = 0

    @property
    def first(self) -> int:
        """Sequence of the oldest kept record; last + 1 when none is kept."""
        return self._runs[0].first if self._runs else self._last + 1

    def extend(self, data: bytes, starts: Sequence[int]) -> None:
        """Records that follow the last, each beginning at its place in `starts`, in the order of the log."""
        first = self._last + 1
        self._last += len(starts)
        if len(data) > self._bytes_max:
            # Of one that is too long its end: a copy, because a part of it would hold all of it.
            self._runs.clear()
            self.bytes = 0
            place = bisect_right(starts, len(data) - self._bytes_max - 1)
            low = starts[place] if place < len(starts) else len(data)
            first, data, starts = first + place, data[low:], [start - low for start in starts[place:]]
        if starts:
            self._runs.append(_Kept(first, data, starts))
            self.bytes += len(data)
        while self.bytes > self._bytes_max:
            self.bytes -= len(self._runs.popleft().data)

    def cut(self, last: int) -> None:
        """The log ends at `last`."""
        while self._runs and self._runs[-1].first > last:
            self.bytes -= len(self._runs.pop().data)
        if self._runs:
            first, data, starts = self._runs[-1]
            place = last + 1 - first
            if place < len(starts):
                self._runs[-1] = _Kept(first, data[: starts[place]], starts[:place])
                self.bytes -= len(data) - starts[place]
        self._last = last

    def after(self, sequence: int, max_bytes: int) -> bytes | None:
        """Whole records after `sequence` up to `max_bytes`, at least one; b"" when there is none, None: ask the disk."""
        if sequence + 1 < self.first:
            return None
        pieces: list[bytes] = []
        left = max_bytes
        for run in self._newest(sequence + 1):
            place = max(0, sequence + 1 - run.first)
            begin = run.starts[place]
            end = len(run.data)
            if end - begin > left:
                stop = max(bisect_right(run.starts, begin + left) - 1, place + (not pieces))
                end = run.starts[stop] if stop < len(run.starts) else len(run.data)
            pieces.append(run.data[begin:end])
            left -= end - begin
            if end < len(run.data) or left <= 0:
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _newest(self, first: int) -> list[_Kept]:
        """The runs with records from sequence `first` on, in order."""
        found = []
        for run in reversed(self._runs):
            if run.first + len(run.starts) <= first:
                break
            found.append(run)
        return found[::-1]
