"""Every flipped byte and every truncation of a log is detected or harmless; every torn write is recovered from."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import segment as fmt
from storage import wal
from storage.disk import Log
from storage.errors import DamagedError
from storage.records import Kind, Operation, Record, encode
from tests.unit.storage.wal_files import Built, batches, record

_SECTOR = fmt.SECTOR_BYTES
# Borders that fall in sectors, at sector borders (a first batch of 488 + 24 bytes), and in a record's padding.
_SHAPES = [
    [[40, 300], [376], [700, 1, 0, 333], [20]],
    [[379], [891], [40, 40]],
    [[40, 1200, 600, 40, 900]],
]


def records_of(data: bytes, scanned: wal.Scan) -> list[Record]:
    return list(wal.replay(data, fmt.HEADER_BYTES, scanned.end))


def with_byte(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes((data[position] ^ mask,)) + data[position + 1 :]


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("last_segment", [True, False])
def test_each_flipped_byte_is_damage(shape: list[list[int]], last_segment: bool) -> None:
    built = Built(list(batches(shape)), segment_bytes=6144)
    masks = random.Random(7)
    for position in range(len(built.data)):
        for mask in {1 << masks.randrange(8), masks.randrange(1, 256), 0xFF}:
            flipped = with_byte(built.data, position, mask)
            with pytest.raises(fmt.WalError):
                wal.scan(flipped, last_segment=last_segment)


def test_each_bit_of_the_last_batch_counts() -> None:
    built = Built(list(batches([[40], [100, 60]])), segment_bytes=2048)
    for position in range(built.spans[-1][0], built.end):
        for bit in range(8):
            with pytest.raises(fmt.WalError):
                wal.scan(with_byte(built.data, position, 1 << bit), last_segment=True)


def test_a_flip_among_sectors_that_were_written_as_zeros_is_damage() -> None:
    one = zero_record(1)
    built = Built([[one], [zero_record(2)]], segment_bytes=8192)
    for position in range(built.spans[1][0], built.end):
        with pytest.raises(fmt.WalError):
            wal.scan(with_byte(built.data, position, 0x10), last_segment=True)


def zero_record(sequence: int) -> bytes:
    return encode(
        epoch=1, sequence=sequence, timestamp_ns=1, operation=Operation.PUT, kind=Kind.USER, id=1,
        vector=bytes(2048), metadata=b"\x80",
    )  # fmt: skip


@pytest.mark.parametrize("shape", _SHAPES)
def test_each_truncation_is_damage(shape: list[list[int]]) -> None:
    built = Built(list(batches(shape)), segment_bytes=6144)
    for size in range(len(built.data)):
        with pytest.raises(fmt.WalError):
            wal.scan(built.data[:size], last_segment=True)
    with pytest.raises(fmt.WalError):
        wal.scan(built.data + b"\0", last_segment=True)


def test_each_cut_that_keeps_the_size_is_damage_or_leaves_whole_records(tmp_path: Path) -> None:
    """A file zeroed from any byte on looks like a torn one at worst; a floor and a seal tell what is missing."""
    path = tmp_path / "wal"
    log = Log.open(path, shard=3, segment_bytes=4096)
    for batch in batches([[40, 300], [376], [20]]):
        log.append(batch)
    log.close()
    (file,) = path.glob("*.wal")
    data, seal = file.read_bytes(), path / "SEAL"
    sealed = seal.read_bytes()
    end = len(data.rstrip(b"\0"))
    for size in (*range(0, end, 7), *range(end - 30, end)):
        file.write_bytes(data[:size].ljust(len(data), b"\0"))
        seal.write_bytes(sealed)
        with pytest.raises(DamagedError):
            Log.open(path, shard=3, segment_bytes=4096)
        seal.unlink()
        with pytest.raises(DamagedError):
            Log.open(path, shard=3, segment_bytes=4096, floor=4 if size < end - 24 else 5)


@settings(max_examples=400, deadline=None)
@given(
    acknowledged=st.lists(st.lists(st.integers(0, 1500), min_size=1, max_size=3), max_size=3),
    last=st.lists(st.integers(0, 2500), min_size=1, max_size=6),
    lost=st.integers(min_value=0),
    suffix=st.booleans(),
)
def test_a_torn_batch_is_cut_to_whole_records(
    acknowledged: list[list[int]], last: list[int], lost: int, suffix: bool
) -> None:
    content = list(batches([*acknowledged, last]))
    built = Built(content, segment_bytes=32 << 10)
    start, end = built.spans[-1]
    sectors = range(start // _SECTOR, -(-end // _SECTOR))
    gone = sectors[lost % len(sectors) :] if suffix else [s for i, s in enumerate(sectors) if lost >> i & 1]
    data = bytearray(built.data)
    for sector in gone:
        for position in range(max(start, sector * _SECTOR), min(end, (sector + 1) * _SECTOR)):
            data[position] = 0
    torn = bytes(data)
    scanned = wal.scan(torn, last_segment=True)
    found = records_of(torn, scanned)
    want = [one for batch in content for one in batch]
    safe = sum(map(len, content[:-1]))
    assert safe <= len(found) <= len(want)
    assert [r.sequence for r in found] == list(range(1, len(found) + 1))
    assert all(
        torn[at : at + size] == one
        for (at, size), one in zip(built.records, want[: len(found)], strict=False)
    )
    assert scanned.last.sequence == len(found)
    if torn == built.data:
        assert not scanned.torn
        assert len(found) == len(want)
    if scanned.torn:
        with pytest.raises(fmt.WalError):
            wal.scan(torn, last_segment=False)


@settings(max_examples=150, deadline=None)
@given(lost=st.integers(0, 2**20), again=st.integers(0, 2**20), step=st.integers(0, 2))
def test_a_crash_in_the_middle_of_recovery_changes_nothing(lost: int, again: int, step: int) -> None:
    """Recovery zeroes, syncs, then writes a trailer. Any subset of those sectors may be what a second crash leaves."""
    built = Built(list(batches([[40, 300], [700, 333, 1100, 40, 250]])), segment_bytes=8192)
    start, end = built.spans[-1]
    torn = bytearray(built.data)
    for i, sector in enumerate(range(start // _SECTOR, -(-end // _SECTOR))):
        if lost >> i & 1:
            span = slice(max(start, sector * _SECTOR), min(end, (sector + 1) * _SECTOR))
            torn[span] = bytes(span.stop - span.start)
    first = wal.scan(bytes(torn), last_segment=True)
    clean = torn[: first.end].ljust(len(torn), b"\0")
    after = bytearray(clean)
    if first.untrailed_from is not None:
        trailer = fmt.encode_trailer(
            built.header, first.untrailed_from, bytes(clean[first.untrailed_from : first.end])
        )
        after[first.end : first.end + len(trailer)] = trailer
    old, new = (torn, clean) if step == 0 else (clean, after)
    mixed = bytearray(old)
    for i, sector in enumerate(range(start // _SECTOR, -(-end // _SECTOR) + 1)):
        if again >> i & 1 or step == 2:
            mixed[sector * _SECTOR : (sector + 1) * _SECTOR] = new[sector * _SECTOR : (sector + 1) * _SECTOR]
    second = wal.scan(bytes(mixed), last_segment=True)
    assert second.last == first.last
    assert second.torn is False or step < 2


def test_a_lost_sector_before_the_last_batch_is_damage() -> None:
    built = Built(list(batches([[900], [900], [900]])), segment_bytes=8192)
    for start, end in built.spans[:-1]:
        for sector in range(-(-start // _SECTOR), end // _SECTOR):
            data = bytearray(built.data)
            data[sector * _SECTOR : (sector + 1) * _SECTOR] = bytes(_SECTOR)
            with pytest.raises(fmt.WalError):
                wal.scan(bytes(data), last_segment=True)


def test_flips_in_files_are_found_at_open_or_do_no_harm(tmp_path: Path) -> None:
    """Over several segments, unsealed, with the position named."""
    path = tmp_path / "wal"
    log = Log.open(path, shard=3, segment_bytes=2048)
    for sequence in range(1, 13):
        log.append([record(sequence, vector_bytes=200)])
    log.close()
    (path / "SEAL").unlink()
    files = sorted(path.glob("*.wal"))
    assert len(files) >= 3
    for file in files:
        data = file.read_bytes()
        for position in range(0, len(data), 5):
            file.write_bytes(with_byte(data, position, 0x40))
            with pytest.raises(DamagedError) as caught:
                Log.open(path, shard=3, segment_bytes=2048)
            assert caught.value.path in files
            assert caught.value.offset is not None
        file.write_bytes(data)
    Log.open(path, shard=3, segment_bytes=2048).close()
