"""Records made for one append: the bytes that the log gets, and the values that `Replica.apply` gets. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from storage.records import NO_WRITE_ID, Kind, Mark, Operation, Record, Version, make

# One change, as a client wants it: operation, kind, id, vector, classes, metadata.
Wanted = tuple[Operation, Kind, int, bytes, tuple[int, ...], bytes]


class Batch:
    """Grows by `add`; sequences go on from `after`, and all records carry one epoch and one time."""

    __slots__ = ("_epoch", "_timestamp_ns", "blobs", "records", "sequence")

    def __init__(self, epoch: int, after: int, timestamp_ns: int) -> None:
        self._epoch, self._timestamp_ns = epoch, timestamp_ns
        # Of the last record that was added.
        self.sequence = after
        self.blobs: list[bytes] = []
        # Equal to what decoding the blobs would give, without the 2 µs that it takes for each.
        self.records: list[Record] = []

    def add(self, changes: Iterable[Wanted], write_id: bytes) -> Version:
        """Where the last of `changes` stands; there must be one."""
        epoch, sequence, stamp = self._epoch, self.sequence, self._timestamp_ns
        for operation, kind, id_, vector, classes, metadata in changes:
            sequence += 1
            blob, record = make(
                epoch, sequence, None, stamp, write_id, operation, kind, id_, vector, classes, metadata
            )
            self.blobs.append(blob)
            self.records.append(record)
        self.sequence = sequence
        return self.records[-1].version

    def add_again(self, record: Record) -> Version:
        """Where a record of a cut tail stands anew; its version, write_id and timestamp stay (`version-kept`)."""
        self.sequence += 1
        blob, again = make(
            self._epoch, self.sequence, record.version, record.timestamp_ns, record.write_id, record.operation,
            record.kind, record.id, record.vector, record.classes, record.metadata,
        )  # fmt: skip
        self.blobs.append(blob)
        self.records.append(again)
        return Version(self._epoch, self.sequence)

    def add_mark(self, mark: Mark, metadata: bytes, write_id: bytes = NO_WRITE_ID) -> Version:
        """Where a record about the shard itself stands."""
        return self.add(((Operation.MARK, Kind.NONE, int(mark), b"", (), metadata),), write_id)
