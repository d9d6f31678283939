"""Which clients' writes the log already has, so that a retry is answered and not applied again. Pure."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.records import NO_WRITE_ID, Record, Version

_VALUE = struct.Struct("<QQQQ")  # epoch, sequence, records, timestamp_ns
_ROW_BYTES = 16 + _VALUE.size
_STAMP = struct.Struct("<24xQ")
_NONE = bytes(8)  # records, of a write_id that was cut altogether


class _Chunk(NamedTuple):
    """What one checkpoint wrote: one value, so that a checkpoint does not cost a table look-up per write_id."""

    key: int
    newest_ns: int
    size: int


# Of a Record.
_VERSION, _STAMPED, _WRITE_ID = itemgetter(2), itemgetter(3), itemgetter(4)
# write_id, greatest version, greatest timestamp_ns, count: of records that follow each other.
_Run = tuple[bytes, tuple[int, int], int, int]


class WriteIds:
    """write_id → the last version written under it and how many of its records are in the log.

    One write_id covers one contiguous run of records. Kept for `keep_s` of record time (no clock here: the
    newest record is now), and at most `count_max`; `refused` counts those that the bound put out early.

    At rest: each checkpoint adds one chunk with what changed since the one before, and takes away the chunks in
    which everything is too old or beyond the bound; a later chunk outdoes an earlier one.
    """

    def __init__(self, *, keep_s: float, count_max: int) -> None:
        self._keep_ns, self._count_max = int(keep_s * 1e9), count_max
        # Packed values: a hundred thousand tuples would keep the garbage collector busy.
        self._known: dict[bytes, bytes] = {}
        # (newest timestamp_ns, ids) per batch, in order of their first record.
        self._order: deque[tuple[int, list[bytes]]] = deque()
        # Lists of ids, some twice, some gone meanwhile: sorted out when a checkpoint asks.
        self._changed: list[Sequence[bytes]] = []
        self._frozen: list[Sequence[bytes]] = []
        # Cut since the last checkpoint: each outdoes, with no records, what an earlier chunk says.
        self._forgotten: dict[bytes, bytes] = {}
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

    @property
    def newest_ns(self) -> int:
        """The greatest timestamp among the remembered, 0 for none."""
        return self._newest_ns

    def get(self, write_id: bytes) -> tuple[Version, int] | None:
        known = self._known.get(write_id)
        if known is None:
            return None
        epoch, sequence, count, timestamp_ns = _VALUE.unpack(known)
        if timestamp_ns < self._newest_ns - self._keep_ns:
            return None
        return Version(epoch, sequence), count

    def apply(self, records: Iterable[Record]) -> None:
        runs = ((id, list(run)) for id, run in groupby(records, _WRITE_ID) if id != NO_WRITE_ID)
        self._take([(id, max(map(_VERSION, run)), max(map(_STAMPED, run)), len(run)) for id, run in runs])

    def apply_columns(self, headers: npt.NDArray[np.void]) -> None:
        """As `apply`, of record headers (storage.bulk)."""
        raw, known = headers["write_id"].tobytes(), self._known
        words = np.frombuffer(raw, "<u8").reshape(-1, 2)
        # A client's batch is one run of records, and costs what one of them does.
        begins = np.flatnonzero(np.append(True, (words[1:] != words[:-1]).any(axis=1)))
        ids = [raw[at : at + 16] for at in (16 * begins).tolist()]
        if ids == [NO_WRITE_ID]:
            return
        values = _values(headers, begins)
        packed, size = values.tobytes(), _VALUE.size
        new = dict(zip(ids, [packed[at : at + size] for at in range(0, len(packed), size)], strict=True))
        if len(new) < len(ids) or NO_WRITE_ID in new or not known.keys().isdisjoint(new):
            runs = zip(ids, values.tolist(), strict=True)
            self._take([(id, (e, n), stamp, count) for id, (e, n, count, stamp) in runs if id != NO_WRITE_ID])
            return
        known.update(new)
        self._changed.append(ids)
        self._note(int(values[:, 3].max()), ids)

    def cut(self, records: Iterable[Record]) -> None:
        """Takes back what the records of a tail that the log loses have added.

        What is left of a run ends right before the least of its versions that go.
        """
        removed: dict[bytes, list[Version]] = {}
        for record in records:
            if record.write_id != NO_WRITE_ID:
                removed.setdefault(record.write_id, []).append(record.version)
        for write_id, versions in removed.items():
            known = self._known.get(write_id)
            if known is None:
                continue
            epoch, sequence, count, stamp = _VALUE.unpack(known)
            if count <= len(versions):
                del self._known[write_id]
                self._forgotten[write_id] = _VALUE.pack(0, 0, 0, stamp)
                continue
            if (epoch, sequence) in versions:
                epoch, sequence = min(versions)
                sequence -= 1
            self._known[write_id] = _VALUE.pack(epoch, sequence, count - len(versions), stamp)
        self._changed.append(list(removed))

    def freeze(self) -> Mapping[bytes, bytes | None]:
        """The chunk of what changed since the last checkpoint, and None for those to remove; then `thaw`."""
        self._frozen, self._changed = self._changed, []
        self._chunks_before, known = self._chunks, self._known
        ids = list(dict.fromkeys(chain.from_iterable(self._frozen)))
        values = [value for value in map(known.get, ids) if value is not None]
        if len(values) < len(ids):
            either = {id: known.get(id) or self._forgotten.get(id) for id in ids}
            left = {id: value for id, value in either.items() if value is not None}
            ids, values = list(left), list(left.values())
        chunks, out = list(self._chunks), dict[bytes, bytes | None]()
        if ids:
            key = chunks[-1].key + 1 if chunks else 1
            chunks.append(_Chunk(key, self._newest_ns, len(ids)))
            out[key.to_bytes(8, "big")] = b"".join(chain.from_iterable(zip(ids, values, strict=True)))
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
            self._changed = self._frozen + self._changed
            self._chunks = self._chunks_before
        else:
            self._forgotten.clear()  # nothing is cut between `freeze` and here
        self._frozen = []

    def load(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """What the table has, in the order of its keys."""
        for key, value in pairs:
            rows = range(0, len(value), _ROW_BYTES)
            written = [value[at : at + 16] for at in rows]
            first = [id for id in written if id not in self._known]
            values = [value[at + 16 : at + _ROW_BYTES] for at in rows]
            self._known.update(zip(written, values, strict=True))
            for id, stamped in zip(written, values, strict=True):
                if stamped[16:24] == _NONE:
                    del self._known[id]
            newest = max((_STAMP.unpack(stamped)[0] for stamped in values), default=0)
            self._chunks.append(_Chunk(int.from_bytes(key, "big"), newest, len(written)))
            self._note(newest, first)

    def _take(self, rows: Sequence[_Run]) -> None:
        """What records add, in the order of the log."""
        first, newest, known = [], 0, self._known
        for write_id, version, timestamp_ns, more in rows:
            old, last, count, stamp = known.get(write_id), version, more, timestamp_ns
            if old is None:
                first.append(write_id)
            else:
                epoch, sequence, before, before_ns = _VALUE.unpack(old)
                last, count, stamp = max((epoch, sequence), last), before + count, max(before_ns, stamp)
            known[write_id] = _VALUE.pack(*last, count, stamp)
            newest = max(newest, stamp)
        if rows:
            self._changed.append([row[0] for row in rows])
            self._note(newest, first)

    def _note(self, newest_ns: int, first: list[bytes]) -> None:
        self._newest_ns = max(self._newest_ns, newest_ns)
        if first:
            self._order.append((newest_ns, first))
        self._expire()

    def _expire(self) -> None:
        order, known, oldest = self._order, self._known, self._newest_ns - self._keep_ns
        while order and (order[0][0] < oldest or len(known) > self._count_max):
            stamp, ids = order.popleft()
            gone = ids if stamp < oldest else ids[: len(known) - self._count_max]
            later = []
            for id in gone:
                if id not in known:
                    continue  # it was cut
                last_ns = _STAMP.unpack(known[id])[0]
                if stamp < oldest <= last_ns:
                    later.append(id)  # its run went on after this batch
                    continue
                self.refused += last_ns >= oldest
                del known[id]
            if later:
                order.append((self._newest_ns, later))
            if len(gone) < len(ids):
                order.appendleft((stamp, ids[len(gone) :]))


def _values(headers: npt.NDArray[np.void], begins: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """uint64 [runs, 4]: what is remembered of each run of records, as in _VALUE."""
    epochs, sequences = headers["version_epoch"], headers["version_sequence"]
    values = np.empty((len(begins), 4), "<u8")
    if (epochs == epochs[0]).all():
        values[:, 0] = epochs[0]
        values[:, 1] = np.maximum.reduceat(sequences, begins)
    else:
        versions = list(zip(epochs.tolist(), sequences.tolist(), strict=True))
        ends = [*begins.tolist()[1:], len(versions)]
        values[:, :2] = [max(versions[low:high]) for low, high in zip(begins.tolist(), ends, strict=True)]
    values[:, 2] = np.diff(begins, append=len(headers))
    values[:, 3] = np.maximum.reduceat(headers["timestamp_ns"], begins)
    return values
