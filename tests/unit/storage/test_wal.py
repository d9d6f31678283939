"""The log's format: what a scan concludes, and what each part of a segment refuses."""

from __future__ import annotations

import pytest

from storage import segment as fmt
from storage import wal
from storage.records import RecordError, Version, decode
from tests.unit.storage.wal_files import Built, batches, record

HEADER = fmt.SegmentHeader(3, 7, 1 << 20, 99, 2, 1234)


def test_a_header_survives_the_way_to_bytes_and_back() -> None:
    data = fmt.encode_header(HEADER)
    assert len(data) == fmt.HEADER_BYTES
    assert fmt.parse_header(data) == HEADER


def test_a_seal_survives_and_each_flip_of_it_is_found() -> None:
    data = fmt.encode_seal(fmt.Seal(3, Version(2, 9)))
    assert fmt.parse_seal(data) == fmt.Seal(3, Version(2, 9))
    for position in range(len(data)):
        with pytest.raises(fmt.WalError):
            fmt.parse_seal(data[:position] + bytes((data[position] ^ 4,)) + data[position + 1 :])
    for size in range(len(data)):
        with pytest.raises(fmt.WalError):
            fmt.parse_seal(data[:size])


def test_an_unknown_version_is_not_called_damage() -> None:
    body = bytearray(fmt.encode_header(HEADER))
    body[8] = 9
    check = fmt.xxh3_64_intdigest(bytes(body[:56]))  # type: ignore[attr-defined]
    body[56:64] = check.to_bytes(8, "little")
    with pytest.raises(fmt.UnknownFormatError):
        fmt.parse_header(bytes(body))


def test_a_clean_segment_gives_every_record() -> None:
    content = list(batches([[40, 300], [376], [20]]))
    built = Built(content)
    scanned = wal.scan(built.data, last_segment=True)
    assert not scanned.torn
    assert scanned.end == built.end
    assert scanned.last == Version(1, 4)
    assert scanned.last_timestamp_ns == 4
    assert list(wal.replay(built.data, fmt.HEADER_BYTES, scanned.end)) == [
        decode(r) for b in content for r in b
    ]
    assert [s for s, _, _ in wal.walk(built.data[: built.end], 0, fmt.HEADER_BYTES)] == [1, 2, 3, 4]


def test_an_empty_segment_ends_where_its_header_says() -> None:
    data = fmt.encode_header(HEADER).ljust(HEADER.segment_bytes, b"\0")
    scanned = wal.scan(memoryview(data), last_segment=True)
    assert scanned.last == Version(2, 6)
    assert scanned.last_timestamp_ns == 1234
    assert scanned.end == fmt.HEADER_BYTES


def test_a_segment_may_be_full_to_the_last_byte() -> None:
    one = record(1, vector_bytes=383)
    size = fmt.HEADER_BYTES + len(one) + fmt.TRAILER_BYTES
    built = Built([[one]], segment_bytes=size)
    assert wal.scan(built.data, last_segment=True).end == size
    assert wal.scan(built.data, last_segment=False).end == size


def test_records_in_the_wrong_order_are_damage() -> None:
    for wrong in (
        [record(1), record(3)],
        [record(1), record(1)],
        [record(1, epoch=2), record(2)],
        [record(2)],
    ):
        with pytest.raises(fmt.WalError, match="cannot follow"):
            wal.scan(Built([wrong]).data, last_segment=True)


def test_a_batch_is_checked_before_it_is_written() -> None:
    last = Version(1, 4)
    two = [record(5), record(6, epoch=2)]
    size = len(two[0])
    assert fmt.joined(two, last) == fmt.Run(b"".join(two), [0, size], Version(1, 5), Version(2, 6), 6)
    for wrong in ([record(6)], [record(5, epoch=0)], [record(5)[:-8]], [record(5) + bytes(8)], [b""]):
        with pytest.raises(RecordError):
            fmt.joined(wrong, last)


def test_a_trailer_of_another_segment_or_place_does_not_count() -> None:
    batch = record(7)
    data = fmt.encode_trailer(HEADER, 512, batch)
    at = 512 + len(batch)
    assert fmt.trailer_at(data, at, HEADER, at) == fmt.Trailer(512, 0)
    assert fmt.trailer_at(data, at + 8, HEADER, at + 8) is None
    assert fmt.trailer_at(data, at, HEADER._replace(salt=98), at) is None


def test_zero_portions_are_counted_at_the_segments_sector_borders() -> None:
    assert fmt.zero_portions(bytes(1024), 512) == 2
    assert fmt.zero_portions(bytes(1024), 520) == 3
    assert fmt.zero_portions(b"x" + bytes(1023), 520) == 2
    assert fmt.zero_portions(b"x" * 1024, 520) == 0
    assert fmt.zero_portions(b"x" * 504 + bytes(512) + b"x" * 8, 520) == 1
    assert fmt.zero_portions(b"x" * 505 + bytes(512) + b"x" * 7, 520) == 0
    assert fmt.zero_portions(b"", 512) == 0


def test_walk_stops_at_a_cut_and_names_a_bad_record() -> None:
    built = Built(list(batches([[40, 300], [376]])))
    (second, length) = built.records[1]
    assert [s for s, _, _ in wal.walk(built.data[: second + length - 1], 0, 512)] == [1]
    flipped = built.data[:second] + bytes((built.data[second] ^ 0xF8,)) + built.data[second + 1 :]
    with pytest.raises(fmt.WalError) as caught:
        list(wal.walk(flipped[: second + length], 0, 512))
    assert caught.value.offset == second
