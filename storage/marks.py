"""What MARK records do to rows: a PURGE mark takes effect at its place in the log, whatever batch it came in. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from storage.bulk import Columns
from storage.records import Kind, Mark, Record, Version
from storage.tombstones import decode_floor


def parts(records: Sequence[Record]) -> Iterator[tuple[Sequence[Record], Version | None]]:
    """The records up to each PURGE mark, with its floor; then the rest with None. Raises FormatError."""
    begin = 0
    for place, record in enumerate(records):
        if record[6] is Kind.NONE and record.id == Mark.PURGE:
            yield records[begin : place + 1], decode_floor(record.metadata)
            begin = place + 1
    if begin < len(records):
        yield records[begin:] if begin else records, None


def column_parts(records: Columns) -> Iterator[tuple[Columns, Version | None]]:
    """As `parts`."""
    head = records.headers
    begin = 0
    for place in ((head["kind"] == Kind.NONE) & (head["id"] == Mark.PURGE)).nonzero()[0].tolist():
        (mark,) = records.between(place, place + 1).records()
        yield records.between(begin, place + 1), decode_floor(mark.metadata)
        begin = place + 1
    if begin < len(records):
        yield records.between(begin, len(records)) if begin else records, None
