"""The newest records of a log, kept in memory so that followers need no disk. Pure; the owner holds a lock."""

from __future__ import annotations

from collections.abc import Sequence


class Tail:
    """Records [first, last] as bytes, at most `bytes_max` of them and never none if any fit."""

    def __init__(self, last: int, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._records: list[bytes] = []
        # Records before this position are evicted; they are deleted in bulk, as a list's front is dear to cut.
        self._head = 0
        self._last = last
        self.bytes = 0

    @property
    def first(self) -> int:
        """Sequence of the oldest kept record; last + 1 when none is kept."""
        return self._last - (len(self._records) - self._head) + 1

    def extend(self, records: Sequence[bytes], total_bytes: int) -> None:
        kept = self._records
        kept.extend(records)
        self._last += len(records)
        size, head = self.bytes + total_bytes, self._head
        while size > self._bytes_max:
            size -= len(kept[head])
            kept[head] = b""
            head += 1
        self.bytes, self._head = size, head
        if head > len(kept) // 2:
            del kept[:head]
            self._head = 0

    def cut(self, last: int) -> None:
        """The log ends at `last`."""
        kept = self._records
        drop = min(self._last - last, len(kept) - self._head)
        self.bytes -= sum(map(len, kept[len(kept) - drop :]))
        del kept[len(kept) - drop :]
        self._last = last

    def after(self, sequence: int, max_bytes: int) -> list[bytes] | None:
        """Records after `sequence` up to `max_bytes`, at least one if there is one; None: ask the disk."""
        first = self.first
        if sequence + 1 < first:
            return None
        position = self._head + sequence + 1 - first
        stop, size = position, 0
        records = self._records
        while stop < len(records):
            size += len(records[stop])
            if size > max_bytes and stop > position:
                break
            stop += 1
        return records[position:stop]
