"""What MARK records do at their place in the log, whatever batch they came in: PURGE to rows, DIGEST remembers digests. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from storage.bulk import Columns
from storage.records import Kind, Mark, Record

# Those to which it matters what stands before them in the log and what behind.
_PLACED = (int(Mark.PURGE), int(Mark.DIGEST))


def parts(records: Sequence[Record]) -> Iterator[tuple[Sequence[Record], Record | None]]:
    """The records up to each PURGE or DIGEST mark, with that mark; then the rest with None."""
    begin = 0
    for place, record in enumerate(records):
        if record[6] is Kind.NONE and record.id in _PLACED:
            yield records[begin : place + 1], record
            begin = place + 1
    if begin < len(records):
        yield records[begin:] if begin else records, None


def column_parts(records: Columns) -> Iterator[tuple[Columns, Record | None]]:
    """As `parts`."""
    head = records.headers
    begin = 0
    placed = (head["kind"] == Kind.NONE) & ((head["id"] == Mark.PURGE) | (head["id"] == Mark.DIGEST))
    for place in placed.nonzero()[0].tolist():
        (mark,) = records.between(place, place + 1).records()
        yield records.between(begin, place + 1), mark
        begin = place + 1
    if begin < len(records):
        yield records.between(begin, len(records)) if begin else records, None
