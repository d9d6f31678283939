"""What memory holds of one kind (items, users): recent entries, rows, class masks, alive bits, the digest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import xor
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from storage import entries
from storage.bulk import Columns
from storage.config import StorageConfig
from storage.entries import (
    BUCKETS,
    CLASSES,
    CONTENT,
    GONE,
    NO_ROW,
    OPERATION_OFFSET,
    TAIL,
    TAIL_BYTES,
    VERSION,
    VERSION_OFFSET,
)
from storage.errors import DamagedError, ForeignDataError
from storage.records import HEADER_BYTES as RECORD_BYTES
from storage.records import Kind, Operation, Record, Version
from storage.segment import Buffer
from storage.table import KindState, Lookup, Table
from storage.tombstones import Tombstones
from storage.vectors import RowFile

WriteRows = Callable[[RowFile, int, Sequence[memoryview]], None]
_PUT = int(Operation.PUT)
_DELETE = int(Operation.DELETE)
# entries.TAIL as numpy sees it, and which fields come straight from a record's header.
_TAIL = np.dtype(
    [
        ("row", "<u4"),
        ("epoch", "<u8"),
        ("sequence", "<u8"),
        ("body_check", "<u8"),
        ("class_count", "<u2"),
        ("operation", "u1"),
        ("kind", "u1"),
    ]
)
_SHARED = {
    "epoch": "version_epoch",
    "sequence": "version_sequence",
    "body_check": "body_check",
    "class_count": "class_count",
    "operation": "operation",
    "kind": "kind",
}

assert _TAIL.itemsize == TAIL_BYTES


class Rows:
    """Per row of the items' file: id, class mask, alive bit. Grows by doubling; old views keep old arrays."""

    def __init__(self, class_width: int) -> None:
        self.words = class_width // 64
        self.ids: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self.masks: npt.NDArray[np.uint64] = np.zeros((0, self.words), np.uint64)
        self.bits = bytearray()

    def room(self, rows: int) -> None:
        if rows <= len(self.ids):
            return
        capacity = max(1024, rows, 2 * len(self.ids))
        ids, masks = np.zeros(capacity, np.uint64), np.zeros((capacity, self.words), np.uint64)
        ids[: len(self.ids)], masks[: len(self.masks)] = self.ids, self.masks
        self.ids, self.masks = ids, masks
        self.bits.extend(bytes((capacity + 7) // 8 - len(self.bits)))

    def place(
        self, rows: npt.NDArray[np.int64], ids: npt.ArrayLike, class_bytes: bytes, counts: npt.ArrayLike
    ) -> None:
        """Ids, classes (u16 each, joined) and alive bits of rows int64 [n], which must be new."""
        if not len(rows):
            return
        self.room(int(rows.max()) + 1)
        self.ids[rows] = np.array(ids, np.uint64)
        classes = np.frombuffer(class_bytes, "<u2").astype(np.int64)
        if len(classes) and int(classes.max()) >= 64 * self.words:
            # The server lets none in; a width that was lowered since finds them here.
            raise ForeignDataError(
                f"the replica holds class {int(classes.max())}, and storage.class_width is {64 * self.words}; "
                "set it to what it was"
            )
        bits = np.left_shift(np.uint64(1), (classes & 63).astype(np.uint64))
        np.bitwise_or.at(self.masks, (np.repeat(rows, np.asarray(counts, np.int64)), classes >> 6), bits)
        alive = np.frombuffer(self.bits, np.uint8)
        np.bitwise_or.at(alive, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))

    def kill(self, dead: list[int]) -> None:
        bits = self.bits
        for row in dead:
            bits[row >> 3] &= ~(1 << (row & 7))

    def alive(self, rows: int) -> npt.NDArray[np.uint8]:
        """A copy of the alive bits of rows [0, rows), read-only."""
        return np.frombuffer(bytes(self.bits[: (rows + 7) // 8]), np.uint8)


class Space:
    """Entries are looked up in `overlay`, then `frozen` (a running checkpoint's), then the table."""

    def __init__(self, kind: Kind, file: RowFile, rowset: int, class_width: int) -> None:
        self.kind, self.file, self.rowset = kind, file, rowset
        # (overlay, frozen): one attribute, because other threads read it while the writer swaps it.
        self.layers: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
        self.rows = self.alive = self.entries = 0
        self.buckets = [0] * BUCKETS
        self.tombstones = Tombstones()
        # Items only: a user's row is found by its entry alone.
        self.arrays = Rows(class_width) if kind is Kind.ITEM else None
        # Ids changed since a compaction began; None while none runs.
        self.changed: set[int] | None = None

    @property
    def dead(self) -> int:
        return self.rows - self.alive

    def wasteful(self, config: StorageConfig) -> bool:
        """Whether dead rows are so many that compaction pays."""
        return self.rows > config.compact_rows_min and self.dead > config.compact_dead_ratio * self.rows

    def digest(self) -> int:
        return reduce(xor, self.buckets)

    def state(self) -> KindState:
        return KindState(rowset=self.rowset, rows=self.rows, entries=self.entries, digest=self.digest())

    def find(self, table: Table, id: int) -> bytes | None:
        """The newest entry of `id`, not verified."""
        overlay, frozen = self.layers
        entry = overlay.get(id)
        if entry is None:
            entry = frozen.get(id)
        return table.get(self.kind, id) if entry is None else entry or None

    def apply(self, records: Sequence[Record], lookup: Lookup) -> None:
        """Takes records of this kind in the order of the log; those that are not newer change nothing.

        The row file must have room. Written for speed: one pass, no objects but the entry's bytes.
        """
        (overlay, frozen), buckets = self.layers, self.buckets
        hash64, kind, tombstones = xxh3_64_intdigest, int(self.kind), self.tombstones
        first = row = self.rows
        ids, vectors, classes_bytes, counts, dead = [], [], [], [], []
        count, made = 0, dict[int, bytes]()
        for _, _, version, _, _, operation, _, id, vector, classes, metadata, body_check in records:
            old = made.get(id) or overlay.get(id)
            if old is None:
                old = frozen.get(id)
                if old is None:
                    old = lookup(id.to_bytes(8, "big"))
            if not old:
                count += 1
            else:
                if VERSION.unpack_from(old, VERSION_OFFSET) >= version:
                    continue
                buckets[id & 255] ^= hash64(old[CONTENT], id)
                if old[OPERATION_OFFSET] == _PUT:
                    dead.append(int.from_bytes(old[4:8], "little"))
                else:
                    tombstones.discard(id)
            class_count = len(classes)
            packed = CLASSES[class_count].pack(*classes)
            if operation is Operation.PUT:
                tail = TAIL.pack(row, *version, body_check, class_count, _PUT, kind) + packed + metadata
                row += 1
                ids.append(id)
                vectors.append(vector)
                classes_bytes.append(packed)
                counts.append(class_count)
            else:
                tail = TAIL.pack(NO_ROW, *version, body_check, class_count, _DELETE, kind) + packed + metadata
            made[id] = (hash64(tail, id) & 0xFFFFFFFF).to_bytes(4, "little") + tail
            content_hash = hash64(tail[4:32], id)
            buckets[id & 255] ^= content_hash
            if operation is not Operation.PUT:
                tombstones.add(id, version, content_hash)
        # Before the entries, by which other threads find them.
        if ids:
            self.file.write(first, vectors)
        overlay.update(made)
        if self.changed is not None:
            self.changed.update(made)
        self.rows, self.entries = row, self.entries + count
        self.alive += len(ids) - len(dead)
        if self.arrays is not None:
            self.arrays.place(np.arange(first, row, dtype=np.int64), ids, b"".join(classes_bytes), counts)
            self.arrays.kill(dead)

    def apply_columns(self, records: Columns, table: Table, write: WriteRows) -> None:
        """As `apply`, with the same outcome, for records of this kind that replay has as columns.

        `write` may write the rows later; they must be there before a checkpoint or a view.
        """
        head = records.headers
        ids: list[int] = head["id"].tolist()
        if len(set(ids)) < len(ids):
            # An id that comes twice depends on itself: rare in one batch, and left to the plain way.
            with table.lookup(self.kind) as lookup:
                self.apply(records.records(), lookup)
            return
        taken, dead = self._newer(ids, records, table)
        if not taken.all():
            records = records.at(taken)
            head, ids = records.headers, records.headers["id"].tolist()
        put = head["operation"] == _PUT
        first, count = self.rows, int(put.sum())
        rows = np.where(put, first + np.cumsum(put) - 1, NO_ROW)
        tails = np.empty(len(ids), _TAIL)
        tails["row"] = rows
        for mine, theirs in _SHARED.items():
            tails[mine] = head[theirs]
        splits = records.starts + RECORD_BYTES + head["vector_bytes"]
        class_ends = splits + 2 * head["class_count"].astype(np.int64)
        stops = class_ends + head["metadata_bytes"]
        where = splits
        if not put.all():
            rows, where, class_ends, head = rows[put], splits[put], class_ends[put], head[put]
        assert (head["vector_bytes"] == self.file.row_bytes).all()
        view, ends = memoryview(records.data), where.tolist()
        # Before the entries, by which other threads find them.
        write(self.file, first, [view[end - self.file.row_bytes : end] for end in ends])
        self._take(ids, tails, put, records.data, splits, stops)
        if self.changed is not None:
            self.changed.update(ids)
        self.rows += count
        self.alive += count - len(dead)
        if self.arrays is not None:
            blobs = [view[low:high] for low, high in zip(ends, class_ends.tolist(), strict=True)]
            self.arrays.place(rows, head["id"], b"".join(blobs), head["class_count"])
            self.arrays.kill(dead)

    def _take(
        self,
        ids: Sequence[int],
        tails: npt.NDArray[np.void],
        put: npt.NDArray[np.bool_],
        data: Buffer,
        splits: npt.NDArray[np.int64],
        stops: npt.NDArray[np.int64],
    ) -> None:
        """Entries of `tails` [n] and data[splits:stops] (class ids, metadata) into the overlay, their hashes into the digest."""
        overlay, hash64, heads = self.layers[0], xxh3_64_intdigest, tails.tobytes()
        hashes: list[int] = []
        note = hashes.append
        places = range(0, TAIL_BYTES * len(ids), TAIL_BYTES)
        for id, at, low, high in zip(ids, places, splits.tolist(), stops.tolist(), strict=True):
            head = heads[at : at + TAIL_BYTES]
            tail = head + data[low:high]
            overlay[id] = (hash64(tail, id) & 0xFFFFFFFF).to_bytes(4, "little") + tail
            note(hash64(head[4:], id))
        change = np.zeros(BUCKETS, np.uint64)
        np.bitwise_xor.at(change, np.array(ids, np.uint64) & np.uint64(255), np.array(hashes, np.uint64))
        self.buckets = [old ^ new for old, new in zip(self.buckets, change.tolist(), strict=True)]
        for n in np.flatnonzero(~put).tolist():
            self.tombstones.add(ids[n], VERSION.unpack_from(heads, n * TAIL_BYTES + 4), hashes[n])

    def _newer(
        self, ids: Sequence[int], records: Columns, table: Table
    ) -> tuple[npt.NDArray[np.bool_], list[int]]:
        """Which records are newer than what is there, and the rows that die of it; counts and digest follow."""
        head = records.headers
        overlay, frozen = self.layers
        keys = head["id"].astype(">u8").tobytes()
        at_rest = table.find_many(self.kind, [keys[at : at + 8] for at in range(0, len(keys), 8)])
        known = {int.from_bytes(key, "big"): entry for key, entry in at_rest.items()}
        for layer in (frozen, overlay):
            if not layer.keys().isdisjoint(ids):
                known |= {id: layer[id] for id in ids if id in layer}
        known = {id: entry for id, entry in known.items() if entry}
        taken, dead, old_count = np.ones(len(ids), np.bool_), list[int](), len(known)
        for place, id in enumerate(ids) if known else ():
            old = known.get(id)
            if old is None:
                continue
            version = (int(head["version_epoch"][place]), int(head["version_sequence"][place]))
            if VERSION.unpack_from(old, VERSION_OFFSET) >= version:
                taken[place] = False
                continue
            self.buckets[id & 255] ^= xxh3_64_intdigest(old[CONTENT], id)
            if old[OPERATION_OFFSET] == _PUT:
                dead.append(int.from_bytes(old[4:8], "little"))
            else:
                self.tombstones.discard(id)
        self.entries += len(ids) - old_count
        return taken, dead

    def purge(self, floor: Version) -> None:
        """Every tombstone at or below `floor` is forgotten: here now, in the table with the next checkpoint."""
        gone, overlay = self.tombstones.purge(floor), self.layers[0]
        for id, content_hash in gone:
            self.buckets[id & 255] ^= content_hash
            overlay[id] = GONE
        self.entries -= len(gone)
        if self.changed is not None:
            self.changed.update(id for id, _ in gone)

    def drop(self, table: Table, id: int, version: Version) -> bool:
        """Forgets `id` as if it had never been written, if its entry is of exactly that version."""
        entry = self.find(table, id)
        if entry is None or VERSION.unpack_from(entry, VERSION_OFFSET) != version:
            return False
        if entry[OPERATION_OFFSET] == _PUT:
            self.alive -= 1
            if self.arrays is not None:
                self.arrays.kill([int.from_bytes(entry[4:8], "little")])
        self.tombstones.discard(id)
        self.buckets[id & 255] ^= entries.content_hash(id, entry)
        self.entries -= 1
        self.layers[0][id] = GONE
        if self.changed is not None:
            self.changed.add(id)
        return True

    def freeze(self) -> dict[int, bytes]:
        """The changes since the last checkpoint, set aside until `thaw`."""
        overlay, frozen = self.layers
        assert not frozen, "one checkpoint at a time"
        self.layers = ({}, overlay)
        return overlay

    def thaw(self, *, kept: bool) -> None:
        """The table has the frozen changes (`kept`), or they go back."""
        overlay, frozen = self.layers
        self.layers = (overlay if kept else {**frozen, **overlay}, {})

    def load(self, table: Table, state: KindState) -> None:
        """Fills memory from the table, verifying entries, live rows, count, digest. Raises DamagedError."""
        _read_through(self.file, state.rows)
        row_bytes, raw = self.file.row_bytes, self.file.raw
        seen = bytearray(state.rows)
        rows, ids, blobs, counts, deleted = [], [], [], [], []
        hash64, unpack, buckets = xxh3_64_intdigest, TAIL.unpack_from, self.buckets
        kind, total = int(self.kind), 0
        for key, entry in table.scan(self.kind):
            total += 1
            id = int.from_bytes(key, "big")
            if len(key) != 8 or not entries.intact(id, entry):
                raise DamagedError(
                    table.path, None, f"checksum of the entry of {kind_id(self.kind, id)} does not match"
                )
            row, _, _, body_check, class_count, operation, entry_kind = unpack(entry, 4)
            content_hash = hash64(entry[CONTENT], id)
            buckets[id & 255] ^= content_hash
            if operation != _PUT:
                deleted.append((*VERSION.unpack_from(entry, VERSION_OFFSET), id, content_hash))
                continue
            if row >= state.rows or seen[row] or entry_kind != kind:
                raise DamagedError(
                    table.path, None, f"the entry of {kind_id(self.kind, id)} points at row {row}"
                )
            seen[row] = 1
            start = row * row_bytes
            if hash64(b"".join((raw[start : start + row_bytes], entry[36:]))) != body_check:
                raise DamagedError(
                    self.file.path,
                    self.file.offset(row),
                    f"the row of {kind_id(self.kind, id)} does not match its checksum",
                )
            rows.append(row)
            ids.append(id)
            blobs.append(entry[36 : 36 + 2 * class_count])
            counts.append(class_count)
        self.rows, self.alive, self.entries = state.rows, len(rows), total
        self.tombstones.load(deleted)
        if (total, self.digest()) != (state.entries, state.digest):
            raise DamagedError(
                table.path, None, f"{entries.kind_name(self.kind)} are not those of the last checkpoint"
            )
        if self.arrays is not None:
            self.arrays.room(state.rows)
            self.arrays.place(np.array(rows, np.int64), ids, b"".join(blobs), counts)


def space_figures(spaces: Mapping[Kind, Space]) -> dict[str, Any]:
    """What `Replica.statistics` says of rows and entries."""
    items, users = spaces[Kind.ITEM], spaces[Kind.USER]
    return {
        "rows": items.rows,
        "alive": items.alive,
        "dead": items.dead,
        "items": items.entries,
        "users": users.alive,
        "user_rows": users.rows,
        "rowset": items.rowset,
        "vector_bytes": (items.rows + users.rows) * items.file.row_bytes,
        "digest": f"{items.digest() ^ users.digest():016x}",
        "tombstones": len(items.tombstones) + len(users.tombstones),
        "unsaved_entries": sum(len(part) for space in (items, users) for part in space.layers),
    }


def kind_id(kind: Kind, id: int) -> str:
    return f"{'item' if kind is Kind.ITEM else 'user'} {id}"


def _read_through(file: RowFile, rows: int) -> None:
    # Entries come in the order of ids, rows in the order of writing: without this a cold start reads the file
    # by random 4 KiB faults instead of one pass.
    buffer, offset, end = bytearray(4 << 20), 0, file.offset(rows)
    with file.path.open("rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, end, os.POSIX_FADV_SEQUENTIAL)
        while offset < end and (count := source.readinto(buffer)):
            offset += count
