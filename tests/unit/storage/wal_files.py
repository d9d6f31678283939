"""Records and segments for the log's tests."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from storage import segment as fmt
from storage import wal
from storage.disk import Log
from storage.records import Kind, Operation, Record, encode


def record(
    sequence: int, *, epoch: int = 1, vector_bytes: int = 40, seed: int = 0, timestamp_ns: int | None = None
) -> bytes:
    random_bytes = random.Random(sequence * 1_000_003 + seed).randbytes
    return encode(
        epoch=epoch,
        sequence=sequence,
        timestamp_ns=sequence if timestamp_ns is None else timestamp_ns,
        write_id=random_bytes(16),
        operation=Operation.PUT,
        kind=Kind.ITEM,
        id=sequence,
        vector=random_bytes(vector_bytes),
        classes=(3, 9),
        metadata=random_bytes(5),
    )


def replayed(log: Log, after: int) -> list[Record]:
    """Decoded, verified records after sequence `after`, as replay would meet them."""
    found = [one for data, offset, end in log.spans(after) for one in wal.replay(data, offset, end)]
    return [one for one in found if one.sequence > after]


def batches(sizes: Sequence[Sequence[int]], first: int = 1) -> Iterator[list[bytes]]:
    """One batch per inner sequence, of records with vectors of so many bytes."""
    sequence = first
    for vector_sizes in sizes:
        batch = []
        for vector_bytes in vector_sizes:
            batch.append(record(sequence, vector_bytes=vector_bytes))
            sequence += 1
        yield batch


class Built:
    """A segment's bytes with the offset at which each batch begins and ends, and each record's offset."""

    def __init__(
        self, content: Sequence[Sequence[bytes]], *, segment_bytes: int = 8192, first: int = 1, shard: int = 3
    ) -> None:
        self.header = fmt.SegmentHeader(
            shard, first, segment_bytes, 0xFEED, 0 if first == 1 else 1, first - 1
        )
        data = bytearray(fmt.encode_header(self.header))
        self.spans: list[tuple[int, int]] = []
        self.records: list[tuple[int, int]] = []
        for batch in content:
            start = len(data)
            for one in batch:
                self.records.append((len(data), len(one)))
                data += one
            data += fmt.encode_trailer(self.header, start, bytes(data[start:]))
            self.spans.append((start, len(data)))
        assert len(data) <= segment_bytes
        self.data = bytes(data).ljust(segment_bytes, b"\0")
        self.end = len(data)
