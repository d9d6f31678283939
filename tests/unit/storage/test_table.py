"""The table: one transaction or nothing, a map that grows, a seal that finds any changed byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from storage import entries
from storage.errors import DamagedError, FormatError
from storage.records import Kind, Operation, Version
from storage.table import KindState, Table, TableState
from storage.table_seal import check_seal

STATE = TableState(node_id="n", shard=1, dim=8, metric="cosine")


def entry(id: int, row: int = 0, metadata: bytes = b"m") -> bytes:
    tail = entries.TAIL.pack(row, 1, 2, 3, 1, int(Operation.PUT), int(Kind.ITEM))
    return entries.seal(id, tail + b"\x05\x00" + metadata)


def test_an_entry_keeps_its_fields_and_knows_its_id() -> None:
    packed = entry(9, 4, b"meta")
    assert entries.unpack(packed) == (4, Version(1, 2), 3, 1, Operation.PUT, Kind.ITEM, b"\x05\x00meta")
    assert entries.unpack(packed).classes == (5,)
    assert entries.packed_metadata(packed) == b"meta"
    assert entries.intact(9, packed)
    assert not entries.intact(8, packed)
    moved = entries.moved(9, packed, 7)
    assert entries.unpack(moved).row == 7
    assert entries.intact(9, moved)
    assert entries.content_hash(9, moved) == entries.content_hash(9, packed)


@pytest.mark.parametrize("position", range(38))
def test_any_flip_in_an_entry_is_seen(position: int) -> None:
    packed = bytearray(entry(9))
    packed[position] ^= 1
    assert not entries.intact(9, bytes(packed))


def test_commit_and_reopen(tmp_path: Path) -> None:
    table = Table.open(tmp_path / "t")
    assert table.state() is None
    state = replace(STATE, position=Version(2, 5), epoch_starts={2: 4}, items=KindState(rows=3, entries=2))
    table.commit(state, {Kind.ITEM: {7: entry(7), 1: entry(1)}}, {b"w": b"value"})
    table.close(seal=True)
    table = Table.open(tmp_path / "t")
    assert table.state() == state
    assert table.get(Kind.ITEM, 7) == entry(7)
    assert table.get(Kind.USER, 7) is None
    assert [int.from_bytes(key, "big") for key, _ in table.scan(Kind.ITEM)] == [1, 7]
    assert [key[-1] for key, _ in table.scan(Kind.ITEM, after=1, limit=5)] == [7]
    assert table.write_ids() == [(b"w", b"value")]
    table.commit(state, {}, {b"w": None})
    assert table.write_ids() == []
    table.close(seal=False)


def test_the_map_grows_when_it_is_full(tmp_path: Path) -> None:
    table = Table.open(tmp_path / "t", map_bytes=1 << 16)
    for base in range(0, 2000, 500):
        table.commit(STATE, {Kind.ITEM: {id: entry(id, id, bytes(300)) for id in range(base, base + 500)}})
    assert sum(1 for _ in table.scan(Kind.ITEM)) == 2000
    table.close(seal=False)
    table = Table.open(tmp_path / "t", map_bytes=1 << 16)
    assert sum(1 for _ in table.scan(Kind.ITEM)) == 2000
    table.close(seal=False)


def test_a_rowset_ahead_is_invisible_until_it_is_current_and_dropped_when_stale(tmp_path: Path) -> None:
    table = Table.open(tmp_path / "t")
    table.commit(STATE, {Kind.ITEM: {1: entry(1)}})
    table.put_ahead(Kind.ITEM, 2, {1: entry(1, 50)})
    assert table.get(Kind.ITEM, 1) == entry(1)
    table.close(seal=False)
    table = Table.open(tmp_path / "t")  # what a crash left is gone
    state = replace(STATE, items=KindState(rowset=2))
    table.put_ahead(Kind.ITEM, 2, {2: entry(2, 60)})
    table.commit(state, {Kind.ITEM: {3: entry(3, 61)}})
    table.switch(Kind.ITEM, 2)
    table.drop_behind()
    assert [table.get(Kind.ITEM, id) for id in (1, 2, 3)] == [None, entry(2, 60), entry(3, 61)]
    table.close(seal=False)
    table = Table.open(tmp_path / "t")
    assert table.get(Kind.ITEM, 2) == entry(2, 60)
    table.close(seal=False)


def test_the_seal_sees_a_changed_byte_and_goes_at_open(tmp_path: Path) -> None:
    table = Table.open(tmp_path / "t")
    table.commit(STATE, {Kind.ITEM: {1: entry(1)}})
    table.close(seal=True)
    assert check_seal(tmp_path / "t", remove=False)
    path = tmp_path / "t" / "data.mdb"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"data\.mdb"):
        Table.open(tmp_path / "t")
    data[-1] ^= 1
    path.write_bytes(data)
    Table.open(tmp_path / "t").close(seal=False)
    assert not check_seal(tmp_path / "t")


def test_an_unknown_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table.open(tmp_path / "t")
    monkeypatch.setattr("storage.table.FORMAT_VERSION", 99)
    table.commit(STATE, {})
    monkeypatch.undo()
    table.close(seal=False)
    with pytest.raises(FormatError, match="99"):
        Table.open(tmp_path / "t")


def test_entries_without_a_state_are_damage(tmp_path: Path) -> None:
    table = Table.open(tmp_path / "t")
    table.put_ahead(Kind.ITEM, 1, {1: entry(1)})
    table.close(seal=False)
    with pytest.raises(DamagedError, match="state"):
        Table.open(tmp_path / "t")
