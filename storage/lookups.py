"""Point look-ups in one replica, every byte of an answer verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from storage import entries
from storage.errors import DamagedError
from storage.records import Kind, Version
from storage.space import Space, kind_id
from storage.table import SCAN_STEP, Table


class Row(NamedTuple):
    """One item or user. `vector` is raw FP16 bytes (2 · dim), `metadata` packed as it came."""

    id: int
    version: Version
    vector: bytes
    classes: tuple[int, ...]
    metadata: bytes


def get(table: Table, space: Space, id: int) -> Row | None:
    """The item or user; None when it is absent or deleted. Raises DamagedError."""
    while True:
        file = space.file
        entry = space.find(table, id)
        if entry is None:
            return None
        if not entries.intact(id, entry):
            raise entry_damaged(table, space.kind, id)
        fields = entries.unpack(entry)
        if not fields.alive:
            return None
        vector = file.read(fields.row) if fields.row < file.capacity else b""
        if entries.body_intact(vector, entry):
            return Row(id, fields.version, vector, fields.classes, fields.metadata)
        if file is space.file:  # else a compaction came between entry and row
            reason = f"the row of {kind_id(space.kind, id)} does not match its checksum"
            raise DamagedError(file.path, file.offset(fields.row), reason)


def version_of(table: Table, space: Space, id: int) -> Version | None:
    """Of the newest entry, a tombstone's too; None when there is none. Raises DamagedError."""
    entry = space.find(table, id)
    if entry is None:
        return None
    if not entries.intact(id, entry):
        raise entry_damaged(table, space.kind, id)
    return Version(*entries.VERSION.unpack_from(entry, entries.VERSION_OFFSET))


def metadata(table: Table, space: Space, ids: Sequence[int]) -> list[bytes | None]:
    """Packed metadata in the order of `ids`; b"" for one that is gone, None for one whose entry is damaged."""
    out: list[bytes | None] = []
    intact, packed = entries.intact, entries.packed_metadata
    for low in range(0, len(ids), SCAN_STEP):
        # The layers before the table: what leaves them has reached the table first.
        overlay, frozen = space.layers
        with table.lookup(space.kind) as lookup:
            for id in ids[low : low + SCAN_STEP]:
                entry = overlay.get(id)
                if entry is None:
                    entry = frozen.get(id)
                if entry is None:
                    entry = lookup(id.to_bytes(8, "big"))
                if not entry:
                    out.append(b"")
                else:
                    out.append(packed(entry) if intact(id, entry) else None)
    return out


def entry_damaged(table: Table, kind: Kind, id: int) -> DamagedError:
    """The error that says so."""
    return DamagedError(table.path, None, f"checksum of the entry of {kind_id(kind, id)} does not match")
