"""Records that a stream brings, verified, as the log takes them and as `Replica.apply` does. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from storage.bulk import Columns, offsets, verified
from storage.records import Operation, Record, RecordError, Version, decode
from storage.segment import Run

# From so many on columns are cheaper: numpy costs some 200 µs for a batch, whatever its size, and a `Record` 6 µs.
COLUMNS_MIN = 64


class Arrival(NamedTuple):
    """Records of one log without gaps; there is at least one."""

    run: Run
    records: Sequence[Record] | Columns
    # How many rows they add at most.
    rows: int

    def __len__(self) -> int:
        return len(self.run.starts)


def arrival(data: bytes) -> Arrival | None:
    """`data`: whole records, one behind the other; None for b"". Raises RecordError."""
    starts = offsets(data)
    if not starts:
        return None
    if len(starts) >= COLUMNS_MIN:
        columns = verified(data, starts)
        return Arrival(columns.run(), columns, columns.puts)
    records = [decode(data, start) for start in starts]
    before = records[0]
    for record in records[1:]:
        if record.sequence != before.sequence + 1 or record.epoch < before.epoch:
            raise RecordError("records of a log do not follow each other so")
        before = record
    first, last = (Version(one.epoch, one.sequence) for one in (records[0], records[-1]))
    rows = sum(record.operation is Operation.PUT for record in records)
    return Arrival(Run(data, starts, first, last, records[-1].timestamp_ns), records, rows)
