"""What the tests of a replica share: a writer that feeds it the way a shard actor does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.batch import Batch
from storage.config import StorageConfig
from storage.records import Kind, Mark, Operation, Record, decode, encode
from storage.replica import Replica
from storage.view import ClassConstraint

DIM = 8
CONFIG = StorageConfig(
    dim=DIM,
    engine="exact",
    class_width=64,
    compact_rows_min=4,
    wal_keep_s=0.0,
    wal_segment_bytes=1 << 16,
    wal_segment_bytes_max=0,
)


def vector(seed: int) -> bytes:
    v = np.random.default_rng(seed).standard_normal(DIM)
    return bytes((v / np.linalg.norm(v)).astype(np.float16).tobytes())


class Writer:
    """Gives sequences and feeds a replica the way a shard actor does."""

    def __init__(self, directory: Path, config: StorageConfig = CONFIG) -> None:
        self.directory, self.config = directory, config
        self.epoch = 1
        self.open()

    def open(self) -> Replica:
        self.replica = Replica.open(self.directory, shard=3, node_id="n1", config=self.config)
        return self.replica

    def crash(self) -> Replica:
        self.replica.abort()
        return self.open()

    def reopen(self) -> Replica:
        self.replica.close()
        return self.open()

    def encode(
        self, changes: Sequence[tuple[Any, ...]], write_id: bytes = bytes(16), at_ns: int = 1
    ) -> list[bytes]:
        out = []
        for offset, (kind, id, *rest) in enumerate(changes, 1):
            body: dict[str, Any] = (
                {"vector": rest[0], "classes": rest[1], "metadata": rest[2]} if rest else {}
            )
            out.append(
                encode(
                    epoch=self.epoch,
                    sequence=self.replica.position.sequence + offset,
                    timestamp_ns=at_ns,
                    write_id=write_id,
                    operation=Operation.PUT if rest else Operation.DELETE,
                    kind=kind,
                    id=id,
                    **body,
                )
            )
        return out

    def write(self, *changes: tuple[Any, ...], write_id: bytes = bytes(16), at_ns: int = 1) -> list[Record]:
        blobs = self.encode(changes, write_id, at_ns)
        self.replica.append(blobs, sum(len(change) > 2 for change in changes))
        records = [decode(blob) for blob in blobs]
        self.replica.apply(records)
        self.last = records
        return records

    def mark(self, mark: Mark, metadata: bytes = b"") -> Record:
        batch = Batch(self.epoch, self.replica.position.sequence, 1)
        batch.add_mark(mark, metadata)
        self.take(batch)
        return batch.records[0]

    def take(self, batch: Batch) -> None:
        self.replica.append(batch.blobs, sum(record.operation is Operation.PUT for record in batch.records))
        self.replica.apply(batch.records)

    def put(self, *ids: int, seed: int = 0, kind: Kind = Kind.ITEM) -> None:
        self.write(*((kind, id, vector(id + seed), (id % 64,), b"m%d" % (id + seed)) for id in ids))


def answer(replica: Replica, seed: int, k: int = 3) -> list[int]:
    query = np.frombuffer(vector(seed), np.float16).reshape(1, DIM)
    view, engine = replica.searchable
    return [int(id) for id in engine.search(view, query, k, [ClassConstraint()])[0].ids]
