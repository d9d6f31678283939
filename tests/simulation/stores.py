"""What one simulated replica holds: log, table, side files, purge floor; in memory and on the disk. After storage/replica.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from node.fork import EpochStarts, shared_end
from node.placement import Placement
from node.witness import Kept
from storage.records import Version

NOTHING = Version(0, 0)
# Whose cut, and which of them.
SideName = tuple[int, int]


class Rec(NamedTuple):
    """A record as far as replication cares. op: put, delete, epoch (value: its Placement), purge (value: the floor)."""

    epoch: int
    sequence: int
    version: Version
    op: str
    key: str = ""
    value: Any = None
    write_id: int = 0


class Row(NamedTuple):
    version: Version
    value: Any  # None: a tombstone


@dataclass(slots=True)
class Files:
    """A replica's directory. log: all of it, for the checker; the replica has forgotten it up to `dropped`."""

    id: int
    log: list[Rec] = field(default_factory=list)
    dropped: int = 0
    sides: dict[SideName, list[Rec]] = field(default_factory=dict)
    cuts: int = 0
    table: dict[str, Row] = field(default_factory=dict)
    floor: Version = NOTHING
    # The log up to here is in `table`.
    checkpoint: int = 0


@dataclass(slots=True)
class Disk:
    """Of a host: what survives a crash. promised: (replica id, epoch); left: a replica was dismissed here, and
    none has been brought since."""

    left: bool = False
    promised: tuple[int, int] | None = None
    files: Files | None = None
    # Of the vote without data that may be here.
    witnessed: Kept | None = None


@dataclass(slots=True)
class Snapshot:
    position: Version
    log: list[Rec]
    starts: list[tuple[int, int]]
    placements: list[tuple[int, Placement]]
    table: dict[str, Row]
    floor: Version
    written: dict[int, Version]
    sides: dict[SideName, list[Rec]]


class Store:
    """Opened from its files: what follows the checkpoint is replayed."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.log = list(files.log)
        self.synced = 0
        self.starts = EpochStarts()
        # (sequence, placement) of the epoch records that are applied.
        self.placements: list[tuple[int, Placement]] = []
        self.table, self.floor = dict(files.table), files.floor
        self.written: dict[int, Version] = {}
        for rec in self.log:
            self.starts.begin(rec.epoch, rec.sequence)
            if rec.op == "epoch" and rec.sequence <= files.checkpoint:
                self.placements.append((rec.sequence, rec.value))
            if rec.write_id:
                self.written.setdefault(rec.write_id, rec.version)
        # Versions of what was cut and is not in the log again, though its row may have stayed.
        self.afloat = self._afloat()
        for rec in self.log[files.checkpoint :]:
            self._apply(rec)
        self.synced = len(self.log)

    def _afloat(self) -> set[Version]:
        cut = {rec.version for tail in self.files.sides.values() for rec in tail}
        return cut - {rec.version for rec in self.log[self.files.dropped :]}

    @property
    def last(self) -> Version:
        """Of the log, bytes that are being written included."""
        return Version(self.log[-1].epoch, len(self.log)) if self.log else NOTHING

    @property
    def position(self) -> Version:
        return Version(self.log[self.synced - 1].epoch, self.synced) if self.synced else NOTHING

    def append(self, rec: Rec) -> None:
        self.log.append(rec)
        self.starts.begin(rec.epoch, rec.sequence)

    def sync(self, upto: int) -> list[Rec]:
        """The log's records to there are on the disk; applied, and returned."""
        new = self.log[self.synced : upto]
        self.files.log = self.log[: max(self.synced, upto)]
        for rec in new:
            self._apply(rec)
        self.synced = max(self.synced, upto)
        return new

    def _apply(self, rec: Rec) -> None:
        self.afloat.discard(rec.version)
        if rec.op in ("put", "delete"):
            row = self.table.get(rec.key)
            if rec.write_id:
                self.written.setdefault(rec.write_id, rec.version)
            if row is None or rec.version > row.version:
                self.table[rec.key] = Row(rec.version, rec.value if rec.op == "put" else None)
        elif rec.op == "purge":
            self.floor = max(self.floor, rec.value)
            for key, row in list(self.table.items()):
                if row.value is None and row.version <= self.floor:
                    del self.table[key]
        elif rec.op == "epoch":
            self.placements.append((rec.sequence, rec.value))

    def checkpoint(self) -> None:
        files = self.files
        files.table, files.checkpoint, files.floor = dict(self.table), self.synced, self.floor

    def forget(self, shared: int, random: Random) -> None:
        """Old segments go, behind the checkpoint and what others have, too."""
        end = min(shared, self.files.checkpoint) - random.randint(1, 60)
        self.files.dropped = max(self.files.dropped, end)

    def holds(self, rec: Rec) -> bool:
        """Whether a record that is offered again came too late. Not when all that is here of it is the row that stayed when
        this replica cut its own tail."""
        if any(one.key == rec.key and one.version >= rec.version for one in self.log[self.synced :]):
            return True
        row = self.table.get(rec.key)
        if row is None or row.version < rec.version:
            return False
        return row.version > rec.version or rec.version not in self.afloat

    def cut(self, at: int, *, keep: bool = True) -> bool:
        """The log ends at `at`; False: it does not reach back so far."""
        files = self.files
        if at < files.dropped:
            return False
        if keep:
            self._keep_tail(at)
        self.log = self.log[:at]
        self.synced = at
        files.log = list(self.log)
        self.checkpoint()
        self.starts.cut(at)
        self.placements = [one for one in self.placements if one[0] <= at]
        kept = {rec.write_id for rec in self.log}
        self.written = {one: version for one, version in self.written.items() if one in kept}
        return True

    def _keep_tail(self, at: int) -> None:
        tail = [rec for rec in self.log[max(at, self.files.dropped) :] if rec.op in ("put", "delete")]
        if tail:
            self.files.cuts += 1
            self.files.sides[self.files.id, self.files.cuts] = tail
            self.afloat |= {rec.version for rec in tail}

    def forget_side(self, name: SideName) -> None:
        self.files.sides.pop(name, None)
        if not self.files.sides:
            self.afloat.clear()

    def drop_row(self, key: str, version: Version) -> None:
        row = self.table.get(key)
        if row is not None and row.version == version:
            del self.table[key]

    # -- snapshots --------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Of a checkpoint that is made now. What was cut here travels along: its rows may be in the table."""
        self.checkpoint()
        sides = {name: list(tail) for name, tail in self.files.sides.items()}
        return Snapshot(
            self.position,
            self.log[: self.synced],
            [one for one in self.starts if one[1] <= self.synced],
            list(self.placements),
            dict(self.table),
            self.floor,
            {rec.write_id: rec.version for rec in self.log[: self.synced] if rec.write_id},
            sides,
        )

    def install(self, one: Snapshot) -> None:
        """It takes the place of all that is here, but for what our log has beyond what the two logs share."""
        theirs = EpochStarts(one.starts)
        self._keep_tail(shared_end(self.starts, len(self.log), theirs, one.position.sequence))
        files = self.files
        files.sides |= one.sides
        self.log, self.synced = list(one.log), one.position.sequence
        files.log, files.dropped = list(one.log), one.position.sequence
        self.starts, self.placements = theirs, list(one.placements)
        self.table, self.floor, self.written = dict(one.table), one.floor, dict(one.written)
        self.checkpoint()
        self.afloat = self._afloat()
