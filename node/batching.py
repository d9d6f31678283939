"""One group commit's records from what clients want written, and from tails that are offered again. No I/O.

Retries are answered and not applied again; what does not fit this node, or finds no room, is refused by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from router.ports import Change, NodeError
from storage.batch import Batch
from storage.config import StorageConfig
from storage.errors import IndexingError
from storage.records import NO_WRITE_ID, Operation, Record, Version
from storage.replica import Replica


class WriteItem(NamedTuple):
    """One client's changes for this shard."""

    changes: Sequence[Change]
    write_id: bytes


class OfferItem(NamedTuple):
    """Records of a tail that was cut from some replica's log."""

    records: Sequence[Record]


class AgainItem(NamedTuple):
    """Records as this replica has them, which others lack."""

    records: Sequence[Record]


Item = WriteItem | OfferItem | AgainItem


class Written(NamedTuple):
    """at: the place in the log that is to be acknowledged. new: records that this batch adds for the item."""

    at: Version
    new: int
    # Of an offer: records of ids that are absent below the purge floor.
    aside: Sequence[Record] = ()


class Made(NamedTuple):
    """results: per item. rows: of vectors that the batch adds."""

    results: list[Written | Exception]
    batch: Batch
    rows: int
    deduplicated: int


def make(replica: Replica, items: Sequence[Item], epoch: int, now_ns: int) -> Made:
    """The records that follow what `replica` has applied, in `epoch`."""
    maker = _Maker(replica, Batch(epoch, replica.position.sequence, now_ns))
    results: list[Written | Exception] = []
    for item in items:
        try:
            results.append(maker.make(item))
        except IndexingError as error:
            results.append(NodeError(error.code, str(error), error.retry_after_ms))
        except NodeError as error:
            results.append(error)
    return Made(results, maker.batch, maker.rows, maker.deduplicated)


class _Maker:
    def __init__(self, replica: Replica, batch: Batch) -> None:
        self.replica, self.batch = replica, batch
        self.rows = self.deduplicated = 0
        # A retry may wait in the same batch as its first try.
        self._here: dict[bytes, int] = {}

    def make(self, item: Item) -> Written:
        """Raises NodeError, IndexingError."""
        match item:
            case WriteItem():
                return self.write(item)
            case OfferItem(records):
                return self.offer(records)
            case AgainItem(records):
                return self.again(records)

    def write(self, item: WriteItem) -> Written:
        changes, write_id = item
        unfit = unfit_reason(changes, self.replica.config)
        if unfit:
            raise NodeError("bad_request", unfit)
        done = self._here.get(write_id)
        if done is None:
            before = self.replica.written(write_id)
            done = before[1] if before is not None else 0
        done = min(done, len(changes))
        self.deduplicated += done
        todo = changes[done:]
        if not todo:
            # Where the first try stands may since have been cut and offered again; all of the log is behind its end.
            return Written(self._end(), 0)
        self._take_room(sum(change.operation is Operation.PUT for change in todo))
        version = self.batch.add(todo, write_id)
        if write_id != NO_WRITE_ID:
            self._here[write_id] = len(changes)
        return Written(version, len(todo))

    def offer(self, records: Sequence[Record]) -> Written:
        """Each unless something as new is there; with the version, write_id and time of its first writing."""
        unfit = unfit_reason(records, self.replica.config)
        if unfit:
            raise NodeError("bad_request", unfit)
        aside: list[Record] = []
        again: list[Record] = []
        for record in records:
            if self.replica.holds(record):
                continue
            absent = self.replica.version_of(record.kind, record.id) is None
            purged = absent and record.version <= self.replica.purge_floor
            (aside if purged else again).append(record)
        self._take_room(sum(record.operation is Operation.PUT for record in again))
        for record in again:
            self.batch.add_again(record)
        return Written(self._end(), len(again), aside)

    def again(self, records: Sequence[Record]) -> Written:
        """Those that are still the newest here: what is newer is in the log and comes to all by itself."""
        fresh = [one for one in records if self.replica.version_of(one.kind, one.id) == one.version]
        self._take_room(sum(record.operation is Operation.PUT for record in fresh))
        for record in fresh:
            self.batch.add_again(record)
        return Written(self._end(), len(fresh))

    def _take_room(self, rows: int) -> None:
        self.replica.check_room(self.rows + rows)
        self.rows += rows

    def _end(self) -> Version:
        """Where the log will end with what is in the batch so far."""
        records = self.batch.records
        return Version(records[-1].epoch, records[-1].sequence) if records else self.replica.position


def unfit_reason(changes: Sequence[Change | Record], config: StorageConfig) -> str | None:
    """Why changes must not enter the log. The coordinator has checked them by its own settings, not by ours."""
    for change in changes:
        if change.classes and max(change.classes) >= config.class_width:
            return f"class {max(change.classes)} is not below this node's class_width of {config.class_width}"
        if change.operation is Operation.PUT and len(change.vector) != 2 * config.dim:
            return f"a vector of {len(change.vector)} bytes is not FP16 of dimension {config.dim}"
    return None
