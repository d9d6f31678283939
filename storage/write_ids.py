"""Which clients' writes the log already has, so that a retry is answered and not applied again. Pure."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.records import NO_WRITE_ID, Record, Version

_VALUE = struct.Struct("<16sQQQQ")  # write_id, epoch, sequence, records, timestamp_ns
_Known = tuple[int, int, int, int]


class _Chunk(NamedTuple):
    """What one checkpoint wrote: one value, so that a checkpoint does not cost a table look-up per write_id."""

    key: int
    newest_ns: int
    size: int


class WriteIds:
    """write_id → the last version written under it and how many of its records are in the log.

    One write_id covers one contiguous run of records. Kept for `keep_s` of record time (no clock here: the
    newest record is now), and at most `count_max`; `refused` counts those that the bound put out early.

    At rest: each checkpoint adds one chunk with what changed since the one before, and takes away the chunks in
    which everything is too old or beyond the bound; a later chunk outdoes an earlier one.
    """

    def __init__(self, *, keep_s: float, count_max: int) -> None:
        self._keep_ns, self._count_max = int(keep_s * 1e9), count_max
        self._known: dict[bytes, _Known] = {}
        # In order of first record; an id whose run went on is looked at again later.
        self._order: deque[tuple[int, bytes]] = deque()
        self._changed: set[bytes] = set()
        self._frozen: set[bytes] = set()
        self._chunks: list[_Chunk] = []
        self._chunks_before: list[_Chunk] = []
        self._newest_ns = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._known)

    @property
    def chunks(self) -> int:
        """How many values the table has once what `freeze` gave is in it."""
        return len(self._chunks)

    def get(self, write_id: bytes) -> tuple[Version, int] | None:
        known = self._known.get(write_id)
        if known is None or known[3] < self._newest_ns - self._keep_ns:
            return None
        return Version(known[0], known[1]), known[2]

    def apply(self, records: Iterable[Record]) -> None:
        for _, _, version, timestamp_ns, write_id, *_ in records:
            if write_id != NO_WRITE_ID:
                self._take(write_id, version[0], version[1], timestamp_ns)
        self._expire()

    def apply_columns(self, headers: npt.NDArray[np.void]) -> None:
        """As `apply`, of record headers (storage.bulk)."""
        raw, known = headers["write_id"].tobytes(), self._known
        ids = [raw[at : at + 16] for at in range(0, len(raw), 16)]
        epochs, sequences = headers["version_epoch"].tolist(), headers["version_sequence"].tolist()
        stamps = headers["timestamp_ns"].tolist()
        new = set(ids)
        if len(new) == len(ids) and new.isdisjoint(known) and NO_WRITE_ID not in new:
            known.update(zip(ids, zip(epochs, sequences, [1] * len(ids), stamps, strict=True), strict=True))
            self._order.extend(zip(stamps, ids, strict=True))
            self._changed |= new
            self._newest_ns = max(self._newest_ns, *stamps)
        else:
            for write_id, *rest in zip(ids, epochs, sequences, stamps, strict=True):
                if write_id != NO_WRITE_ID:
                    self._take(write_id, *rest)
        self._expire()

    def freeze(self) -> Mapping[bytes, bytes | None]:
        """The chunk of what changed since the last checkpoint, and None for those to remove; then `thaw`."""
        self._frozen, self._changed = self._changed, set()
        self._chunks_before, known = self._chunks, self._known
        rows = [(id, *known[id]) for id in self._frozen if id in known]
        chunks, out = list(self._chunks), dict[bytes, bytes | None]()
        if rows:
            key = chunks[-1].key + 1 if chunks else 1
            chunks.append(_Chunk(key, max(row[4] for row in rows), len(rows)))
            out[key.to_bytes(8, "big")] = b"".join([_VALUE.pack(*row) for row in rows])
        oldest, newer = self._newest_ns - self._keep_ns, 0
        self._chunks = []
        for chunk in reversed(chunks):
            # The last one stays: its key is what the next one counts on from.
            if chunk is chunks[-1] or (chunk.newest_ns >= oldest and newer < self._count_max):
                self._chunks.insert(0, chunk)
            else:
                out[chunk.key.to_bytes(8, "big")] = None
            newer += chunk.size
        return out

    def thaw(self, *, kept: bool) -> None:
        """The table has what `freeze` gave (`kept`), or it is due again."""
        if not kept:
            self._changed |= self._frozen
            self._chunks = self._chunks_before
        self._frozen = set()

    def load(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """What the table has, in the order of its keys."""
        for key, value in pairs:
            newest, count = 0, 0
            for write_id, *rest in _VALUE.iter_unpack(value):
                self._known[write_id] = (rest[0], rest[1], rest[2], rest[3])
                newest, count = max(newest, rest[3]), count + 1
            self._chunks.append(_Chunk(int.from_bytes(key, "big"), newest, count))
        self._order = deque(sorted((known[3], id) for id, known in self._known.items()))
        self._newest_ns = self._order[-1][0] if self._order else 0
        self._expire()

    def _take(self, write_id: bytes, epoch: int, sequence: int, timestamp_ns: int) -> None:
        old = self._known.get(write_id)
        if old is None:
            self._order.append((timestamp_ns, write_id))
            self._known[write_id] = (epoch, sequence, 1, timestamp_ns)
        else:
            last = max(old[:2], (epoch, sequence))
            self._known[write_id] = (*last, old[2] + 1, max(old[3], timestamp_ns))
        self._newest_ns = max(self._newest_ns, timestamp_ns)
        self._changed.add(write_id)

    def _expire(self) -> None:
        order, known, oldest = self._order, self._known, self._newest_ns - self._keep_ns
        while order and (order[0][0] < oldest or len(known) > self._count_max):
            timestamp_ns, write_id = order.popleft()
            last_ns = known[write_id][3]
            if oldest <= last_ns != timestamp_ns and len(known) <= self._count_max:
                order.append((last_ns, write_id))
                continue
            self.refused += last_ns >= oldest
            del known[write_id]
            self._changed.discard(write_id)
