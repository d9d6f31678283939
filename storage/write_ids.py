"""Which clients' writes the log already has, so that a retry is answered and not applied again. Pure."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from storage.records import NO_WRITE_ID, Record, Version

_VALUE = struct.Struct("<QQQQ")  # epoch, sequence, records, timestamp_ns


class WriteIds:
    """write_id → the last version written under it and how many of its records are in the log.

    One write_id covers one contiguous run of records. Kept for `keep_s` of record time (no clock here: the
    newest record is now), and at most `count_max`; `refused` counts those that the bound put out early.
    """

    def __init__(self, *, keep_s: float, count_max: int) -> None:
        self._keep_ns, self._count_max = int(keep_s * 1e9), count_max
        self._known: dict[bytes, tuple[int, int, int, int]] = {}
        # In order of first record; an id whose run went on is looked at again later.
        self._order: deque[tuple[int, bytes]] = deque()
        self._changed: set[bytes] = set()
        self._frozen: set[bytes] = set()
        self._newest_ns = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._known)

    def get(self, write_id: bytes) -> tuple[Version, int] | None:
        known = self._known.get(write_id)
        if known is None or known[3] < self._newest_ns - self._keep_ns:
            return None
        return Version(known[0], known[1]), known[2]

    def apply(self, records: Iterable[Record]) -> None:
        known, newest, order, changed = self._known, self._newest_ns, self._order, self._changed
        for _, _, version, timestamp_ns, write_id, *_ in records:
            if write_id == NO_WRITE_ID:
                continue
            if timestamp_ns > newest:
                newest = timestamp_ns
            old = known.get(write_id)
            if old is None:
                order.append((timestamp_ns, write_id))
                known[write_id] = (*version, 1, timestamp_ns)
            else:
                last = max(old[:2], version)
                known[write_id] = (*last, old[2] + 1, max(old[3], timestamp_ns))
            changed.add(write_id)
        self._newest_ns = newest
        self._expire()

    def freeze(self) -> Mapping[bytes, bytes | None]:
        """What changed since the last checkpoint; None for those that are gone. Set aside until `thaw`."""
        self._frozen, self._changed = self._changed, set()
        known = self._known
        return {id: _VALUE.pack(*known[id]) if id in known else None for id in self._frozen}

    def thaw(self, *, kept: bool) -> None:
        """The table has the frozen changes (`kept`), or they are due again."""
        if not kept:
            self._changed |= self._frozen
        self._frozen = set()

    def load(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        self._known = {id: _VALUE.unpack(value) for id, value in pairs}
        self._order = deque(sorted((known[3], id) for id, known in self._known.items()))
        self._newest_ns = self._order[-1][0] if self._order else 0
        self._expire()

    def _expire(self) -> None:
        order, known, oldest = self._order, self._known, self._newest_ns - self._keep_ns
        while order and (order[0][0] < oldest or len(known) > self._count_max):
            timestamp_ns, write_id = order.popleft()
            last_ns = known[write_id][3]
            if oldest <= last_ns != timestamp_ns and len(known) <= self._count_max:
                order.append((last_ns, write_id))
                continue
            self.refused += timestamp_ns >= oldest
            del known[write_id]
            self._changed.add(write_id)
