"""What a stream brings: the same verdicts in columns as record by record."""

from __future__ import annotations

import pytest

from storage.arrival import COLUMNS_MIN, arrival
from storage.bulk import Columns, offsets, verified
from storage.records import Kind, Mark, Operation, RecordError, Version, decode, encode
from tests.unit.storage.wal_files import record


def test_few_are_records_and_many_are_columns() -> None:
    assert arrival(b"") is None
    for count in (1, COLUMNS_MIN - 1, COLUMNS_MIN, 3 * COLUMNS_MIN):
        blobs = [record(7 + n, vector_bytes=40 + 2 * (n % 5)) for n in range(count)]
        mark = encode(
            epoch=2,
            sequence=7 + count,
            timestamp_ns=5,
            operation=Operation.MARK,
            kind=Kind.NONE,
            id=Mark.EPOCH,
        )
        came = arrival(b"".join([*blobs, mark]))
        assert came is not None
        assert (len(came), came.rows) == (count + 1, count)
        assert came.run.first == Version(1, 7)
        assert (came.run.last, came.run.timestamp_ns) == (Version(2, 7 + count), 5)
        assert isinstance(came.records, Columns) == (count + 1 >= COLUMNS_MIN)
        records = came.records.records() if isinstance(came.records, Columns) else came.records
        assert records == [decode(blob) for blob in (*blobs, mark)]


@pytest.mark.parametrize("count", [3, COLUMNS_MIN])
def test_each_flipped_byte_is_found(count: int) -> None:
    blobs = [record(1 + n, vector_bytes=41) for n in range(count)]
    for place in range(len(blobs[1])):
        flipped = bytearray(b"".join(blobs))
        flipped[len(blobs[0]) + place] ^= 0x10
        with pytest.raises(RecordError):
            arrival(bytes(flipped))


def test_sequences_at_the_end_of_what_fits_are_refused_not_raised() -> None:
    blobs = [record(7 + n) for n in range(COLUMNS_MIN)]
    blobs[0] = record((1 << 64) - 1)
    with pytest.raises(RecordError):
        arrival(b"".join(blobs))


@pytest.mark.parametrize("count", [2, COLUMNS_MIN])
def test_what_is_not_whole_or_not_in_order_is_refused(count: int) -> None:
    blobs = [record(1 + n) for n in range(count)]
    wrong = [
        b"".join(blobs)[:-8],
        b"".join(blobs) + bytes(8),
        b"".join(blobs) + bytes(96),
        b"".join([*blobs, record(count)]),
        b"".join([*blobs, record(count + 2)]),
        b"".join([*blobs[:-1], record(count, epoch=2), record(count + 1)]),
    ]
    for data in wrong:
        with pytest.raises(RecordError):
            arrival(data)


@pytest.mark.parametrize(("operation", "kind"), [(0, 1), (4, 1), (1, 3)])
def test_an_operation_or_kind_of_a_later_build_is_refused(operation: int, kind: int) -> None:
    odd = encode(epoch=1, sequence=1, timestamp_ns=1, operation=operation, kind=kind, id=1)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="unknown"):
        arrival(odd)
    with pytest.raises(RecordError, match="unknown"):
        verified(odd, offsets(odd))
