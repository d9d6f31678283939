"""The table of one replica: LMDB with entries, write_ids and the one state record (docs/storage.md)."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from xxhash import xxh3_64_intdigest

from storage.entries import GONE, kind_name
from storage.errors import DamagedError, DiskFullError, FormatError, ReplicaStoppedError, StorageError
from storage.records import Kind, Version
from storage.table_seal import check_seal, write_seal

FORMAT_VERSION = 2
MAP_BYTES = 1 << 30
_STATE_KEY = b"state"
NOWHERE = Version(0, 0)
_KINDS = (Kind.ITEM, Kind.USER)
# Entries read under one hold of the lock: about a millisecond, because the event loop may wait for it.
SCAN_STEP = 512
Lookup = Callable[[bytes], bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindState:
    """Of one kind: the current rowset, the rows in its file, and what the entries must add up to."""

    rowset: int = 1
    rows: int = 0
    entries: int = 0
    digest: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """What a checkpoint says of itself; changes only in the transaction that changes the entries."""

    node_id: str
    shard: int
    dim: int
    metric: str
    position: Version = NOWHERE
    items: KindState = KindState()
    users: KindState = KindState()
    # epoch → the first sequence logged in it
    epoch_starts: Mapping[int, int] = field(default_factory=dict)
    # sequence of an EPOCH mark → its metadata
    placements: Mapping[int, bytes] = field(default_factory=dict)
    purge_floor: Version = NOWHERE
    write_ids: int = 0
    # Names this copy of the shard's data: another one when it was made anew or came from a snapshot.
    replica_id: int = 0

    def of(self, kind: Kind) -> KindState:
        return self.items if kind is Kind.ITEM else self.users

    def with_rowset(self, kind: Kind, rowset: int, rows: int) -> TableState:
        """The same with another rowset of `kind`, which has `rows` rows."""
        of = replace(self.of(kind), rowset=rowset, rows=rows)
        return replace(self, items=of) if kind is Kind.ITEM else replace(self, users=of)


# Less room than this, and a short write was the disk's fault.
FULL_BELOW_BYTES = 4 << 20


class Table:
    """One writer at a time (locked here), readers from any thread. No read transaction outlives its call."""

    def __init__(self, directory: Path, map_bytes: int) -> None:
        self.directory, self.path = directory, directory / "data.mdb"
        size = self.path.stat().st_size if self.path.exists() else 0
        self._map_bytes = max(map_bytes, 2 * size)
        # Held around every read transaction and around changes of the map's size, which LMDB allows only
        # while no transaction of this process is open.
        self._lock = threading.Lock()
        # Held around changes of the map and around `copy`, which reads all of it without holding readers up. Taken after
        # `_writer` and before `_lock`.
        self._mapped = threading.Lock()
        self._writer = threading.Lock()
        self._env = lmdb.open(
            str(directory), map_size=self._map_bytes, max_dbs=16, max_spare_txns=4, meminit=False, mode=0o640
        )
        self._dbs: dict[str, Any] = {}
        self._current = dict.fromkeys(_KINDS, 1)

    @classmethod
    def open(cls, directory: Path, *, map_bytes: int = MAP_BYTES) -> Table:
        """Checks the seal of a clean close, removes it. Raises DamagedError, FormatError, DiskFullError."""
        directory.mkdir(parents=True, exist_ok=True)
        check_seal(directory)
        try:
            table = cls(directory, map_bytes)
        except lmdb.Error as error:
            raise _mapped(error, directory / "data.mdb") from error
        try:
            state = table.state()
            if state is not None:
                table._current = {kind: state.of(kind).rowset for kind in _KINDS}
            with table._failing():
                table._open_current()
                if state is None:
                    table._must_be_empty()
                table._drop_where(lambda kind, rowset: rowset != table._current[kind])
        except BaseException:
            table.close(seal=False)
            raise
        return table

    def state(self) -> TableState | None:
        """The last checkpoint's state; None in a new table. Raises DamagedError, FormatError."""
        with self._lock, self._failing(), self._env.begin() as txn:
            raw = txn.get(_STATE_KEY)
        return None if raw is None else _decode_state(self.path, raw)

    def get(self, kind: Kind, id: int) -> bytes | None:
        """The entry's bytes, not verified."""
        with self.lookup(kind) as find:
            return find(id.to_bytes(8, "big"))

    @contextmanager
    def lookup(self, kind: Kind) -> Iterator[Lookup]:
        """One read transaction for many look-ups: a function from key (8 bytes, big endian) to entry."""
        with self._lock, self._failing(), self._env.begin(db=self._db(kind)) as txn:
            yield txn.get

    def find_many(self, kind: Kind, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those of the keys (8 bytes, big endian) that are there, with their entries."""
        with self._lock, self._failing(), self._env.begin(db=self._db(kind)) as txn:
            if not txn.stat(self._db(kind))["entries"]:
                return {}
            with txn.cursor() as cursor:
                return dict(cursor.getmulti(keys))

    def scan(self, kind: Kind, *, after: int = -1, limit: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """(key, entry) of the current rowset in key order, ids greater than `after`, at most `limit`.

        Read in steps: between two of them nothing is held, so that the table may be changed or closed.
        """
        if after >= (1 << 64) - 1:
            return
        first, left = (after + 1).to_bytes(8, "big"), limit
        while left is None or left > 0:
            step = SCAN_STEP if left is None else min(left, SCAN_STEP)
            with (
                self._lock,
                self._failing(),
                self._env.begin(db=self._db(kind)) as txn,
                txn.cursor() as cursor,
            ):
                pairs = list(islice(cursor, step)) if cursor.set_range(first) else []
            yield from pairs
            if len(pairs) < step:
                return
            # The least key after the last one.
            first, left = pairs[-1][0] + b"\0", None if left is None else left - step

    def write_ids(self) -> list[tuple[bytes, bytes]]:
        """(write_id, value) pairs, verified. Raises DamagedError."""
        with self._lock, self._failing():
            db = self._open_db("writes")
            with self._env.begin(db=db) as txn, txn.cursor() as cursor:
                pairs = [(key, value[8:], value[:8]) for key, value in cursor]
        for key, value, check in pairs:
            if xxh3_64_intdigest(key + value).to_bytes(8, "little") != check:
                raise DamagedError(self.path, None, f"checksum of write_id {key.hex()} does not match")
        return [(key, value) for key, value, _ in pairs]

    def commit(
        self,
        state: TableState,
        changes: Mapping[Kind, Mapping[int, bytes]],
        write_ids: Mapping[bytes, bytes | None] | None = None,
    ) -> None:
        """One synced transaction: entries (GONE removes) into the rowsets `state` names, write_ids (None removes), state.

        Raises DiskFullError (nothing has changed), ReplicaStoppedError, DamagedError.
        """
        batches = [
            (self._handle(kind, state.of(kind).rowset), _in_order(entries))
            for kind, entries in changes.items()
            if entries
        ]
        writes = self._handle_named("writes") if write_ids else None

        def work(txn: Any) -> None:
            for db, (keys, values) in batches:
                gone = GONE in values
                pairs = zip(keys, values, strict=True)
                with txn.cursor(db=db) as cursor:
                    cursor.putmulti((pair for pair in pairs if pair[1] != GONE) if gone else pairs)
                for key, entry in zip(keys, values, strict=True) if gone else ():
                    if entry == GONE:
                        txn.delete(key, db=db)
            for key, value in (write_ids or {}).items():
                if value is None:
                    txn.delete(key, db=writes)
                else:
                    txn.put(key, xxh3_64_intdigest(key + value).to_bytes(8, "little") + value, db=writes)
            txn.put(_STATE_KEY, _encode_state(state))

        self._write(work)

    def put_ahead(self, kind: Kind, rowset: int, entries: Mapping[int, bytes]) -> None:
        """Entries of a rowset that is not current yet. Raises as `commit`."""
        db, (keys, values) = self._handle(kind, rowset), _in_order(entries)

        def work(txn: Any) -> None:
            with txn.cursor(db=db) as cursor:
                cursor.putmulti(zip(keys, values, strict=True))

        self._write(work)

    def switch(self, kind: Kind, rowset: int) -> None:
        """Reads go to `rowset` from now on; a commit has made it the current one on disk."""
        with self._lock:
            self._current[kind] = rowset

    def drop_behind(self) -> None:
        """Removes entries of rowsets before the current ones. Those ahead may belong to a compaction that runs."""
        with self._failing():
            self._drop_where(lambda kind, rowset: rowset < self._current[kind])

    def drop_ahead(self, kind: Kind, rowset: int) -> None:
        """Removes what a compaction that was given up has left in a rowset that it did not make current."""
        assert rowset != self._current[kind]
        with self._failing():
            self._drop_where(lambda kind_, rowset_: (kind_, rowset_) == (kind, rowset))

    def size_bytes(self) -> int:
        """0 when it has another name: the replica's directory is just being replaced, or was removed."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def copy(self, directory: Path) -> None:
        """A compact, consistent, fsynced copy."""
        directory.mkdir(parents=True)
        with self._mapped, self._failing():
            self._env.copy(str(directory), compact=True)
        fd = os.open(directory / "data.mdb", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self, *, seal: bool) -> None:
        """Closes; `seal` leaves a checksum of the whole file for the next open. Waits for calls in other threads.

        To close unmaps the file: a thread that is reading it then would end the process.
        """
        with self._writer, self._mapped, self._lock:
            self._env.close()
        if seal:
            write_seal(self.directory)

    def _db(self, kind: Kind) -> Any:
        return self._open_db(f"{kind_name(kind)}-{self._current[kind]}")

    def _open_db(self, name: str) -> Any:
        db = self._dbs.get(name)
        if db is None:
            db = self._dbs[name] = self._env.open_db(name.encode())
        return db

    def _open_current(self) -> None:
        # Opening a sub-database is a write transaction: done here, so that no reader ever waits for a writer.
        for kind, rowset in self._current.items():
            self._open_db(f"{kind_name(kind)}-{rowset}")
        self._open_db("writes")

    def _must_be_empty(self) -> None:
        # A crash before the first commit leaves empty sub-databases; entries mean that the state is lost.
        with self._env.begin() as txn:
            if any(txn.stat(db)["entries"] for db in self._dbs.values()):
                raise DamagedError(self.path, None, "entries without a state record")

    def _handle_named(self, name: str) -> Any:
        with self._writer, self._lock, self._failing():
            return self._open_db(name)

    def _handle(self, kind: Kind, rowset: int) -> Any:
        return self._handle_named(f"{kind_name(kind)}-{rowset}")

    def _drop_where(self, unwanted: Callable[[Kind, int], bool]) -> None:
        with self._lock, self._env.begin() as txn, txn.cursor() as cursor:
            keys = list(cursor.iternext(values=False))
        for kind in _KINDS:
            prefix = f"{kind_name(kind)}-".encode()
            for key in keys:
                if key.startswith(prefix) and unwanted(kind, int(key[len(prefix) :])):
                    self._drop(key.decode())

    def _drop(self, name: str) -> None:
        db = self._handle_named(name)
        del self._dbs[name]
        self._write(lambda txn: txn.drop(db))

    def _write(self, work: Callable[[Any], None]) -> None:
        with self._writer, self._failing():
            while True:
                try:
                    with self._env.begin(write=True) as txn:
                        work(txn)
                except lmdb.MapFullError:
                    with self._mapped, self._lock:
                        self._map_bytes *= 2
                        self._env.set_mapsize(self._map_bytes)
                else:
                    return

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise _mapped(error, self.path) from error


def _in_order(entries: Mapping[int, bytes]) -> tuple[list[bytes], list[bytes]]:
    """Keys and entries. In key order LMDB fills its pages one after the other."""
    ids = np.fromiter(entries, np.uint64, len(entries))
    order = np.argsort(ids)
    keys, values = ids[order].astype(">u8").tobytes(), list(entries.values())
    return [keys[at : at + 8] for at in range(0, len(keys), 8)], [values[place] for place in order.tolist()]


def _encode_state(state: TableState) -> bytes:
    fields = {"format": FORMAT_VERSION} | asdict(state)
    fields["placements"] = {at: placement.hex() for at, placement in state.placements.items()}
    text = json.dumps(fields, sort_keys=True).encode()
    return xxh3_64_intdigest(text).to_bytes(8, "little") + text


def _decode_state(path: Path, raw: bytes) -> TableState:
    if xxh3_64_intdigest(raw[8:]).to_bytes(8, "little") != raw[:8]:
        raise DamagedError(path, None, "checksum of the state record does not match")
    fields = json.loads(raw[8:])
    version = fields.pop("format")
    if version != FORMAT_VERSION:
        raise FormatError(f"{path} has format version {version}; this build knows {FORMAT_VERSION}")
    fields["position"] = Version(*fields["position"])
    fields["items"], fields["users"] = KindState(**fields["items"]), KindState(**fields["users"])
    fields["epoch_starts"] = {int(epoch): start for epoch, start in fields["epoch_starts"].items()}
    fields["placements"] = {int(at): bytes.fromhex(text) for at, text in fields["placements"].items()}
    fields["purge_floor"] = Version(*fields["purge_floor"])
    return TableState(**fields)


def _free_bytes(path: Path) -> int:
    room = os.statvfs(path.parent)
    return room.f_bavail * room.f_frsize


def _mapped(error: lmdb.Error, path: Path) -> StorageError:
    text = str(error)
    # LMDB calls a write that was cut short by a full disk an I/O error; which it was, the room left tells. Trying again
    # is safe either way: the transaction was aborted, and the next one writes all its pages anew.
    full = "Input/output error" in text and _free_bytes(path) < FULL_BELOW_BYTES
    if full or isinstance(error, lmdb.DiskError) or "No space left" in text:
        return DiskFullError(f"{path}: no room left on the disk; free some space, reads go on meanwhile")
    harmed = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError)
    if isinstance(error, harmed) or "Invalid argument" in text:
        return DamagedError(path, None, f"LMDB says: {text}")
    return ReplicaStoppedError(f"{path}: LMDB says: {text}")
