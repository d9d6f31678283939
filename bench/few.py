"""What asking for few hits saves (docs/fan-out.md, *How few are enough*): `few.cpu_us`, `few.metadata_us`, `few.bytes`.

cpu_us: CPU of the lane's thread per search of 12 shards of 2,000 × 128 (exact engine, batches of 8, one thread), each asked for
its share of k, against each asked for k. metadata_us: the same with metadata, when the node is asked for its share (3 of 100
shards) of k = 50, against k; what a node's part of a wide fan-out costs it. bytes: of the replies of 34 nodes together for
k = 50 with 100 bytes of metadata each. In turns.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np

from bench.harness import arguments, figure, interleaved
from node.lane import LaneAsk, LaneTicket, _BatchSearch
from router import tail
from storage.config import StorageConfig
from storage.records import Kind, Operation, decode, encode
from storage.replica import Replica
from storage.view import ClassConstraint

DIM, SHARDS, ROWS, BATCH = 128, 12, 2_000, 8
METADATA: bytes = msgpack.packb({"title": "x" * 90})
NEVER_FEW = -1.0


def replicas(folder: Path) -> list[Replica]:
    rng = np.random.default_rng(1)
    config = StorageConfig(dim=DIM, engine="exact", threads=1)
    made = []
    for shard in range(SHARDS):
        replica = Replica.open(folder / str(shard), shard=shard, node_id="n", config=config)
        vectors = rng.normal(size=(ROWS, DIM))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        packed = [
            encode(
                epoch=1, sequence=n + 1, timestamp_ns=1, operation=Operation.PUT, kind=Kind.ITEM,
                id=shard + SHARDS * n, vector=vector.astype(np.float16).tobytes(), metadata=METADATA,
            )
            for n, vector in enumerate(vectors)
        ]  # fmt: skip
        replica.append(packed, len(packed))
        replica.apply([decode(record) for record in packed])
        made.append(replica)
    return made


def cpu_us(shards: list[Replica], k: int, metadata: bool, miss: float, batches: int) -> Callable[[], float]:
    """Per search."""
    rng = np.random.default_rng(2)
    queries = rng.normal(size=(batches, BATCH, DIM)).astype(np.float16)

    def run() -> float:
        tail.MISS = miss
        tail.enough.cache_clear()
        began = time.thread_time_ns()
        for some in queries:
            asks = [LaneAsk(shards, query, k, ClassConstraint(), metadata) for query in some]
            search = _BatchSearch([LaneTicket(None, ask) for ask in asks])  # type: ignore[arg-type]
            search.run()
            assert all(len(reply.ids) == k for reply in search.replies())  # type: ignore[union-attr]
        return (time.thread_time_ns() - began) / batches / BATCH / 1000

    return run


def reply_bytes(k: int) -> int:
    return len(msgpack.packb([2, 12_345, "", [b"i" * 8 * k, b"s" * 4 * k, [METADATA] * k, {}, 0]])) + 4


def main() -> None:
    options = arguments(__doc__ or "")
    batches, runs = (20, 5) if options.quick else (60, 9)
    folder = Path(".bench/few")
    shutil.rmtree(folder, ignore_errors=True)
    shards = replicas(folder)
    usual = tail.MISS
    for k in (10, 50, 500):
        ours, peer = interleaved(
            cpu_us(shards, k, False, usual, batches), cpu_us(shards, k, False, NEVER_FEW, batches), runs
        )
        figure(
            f"few.cpu_us_k{k}", ours, "µs CPU per search of 12 shards", peer=f"{k} of each", peer_value=peer,
            target="<= 1", n=batches * BATCH * runs,
        )  # fmt: skip
    tail.MISS = usual
    tail.enough.cache_clear()
    share = tail.enough(50, 3, 100)
    ours, peer = interleaved(
        cpu_us(shards[:3], share, True, usual, batches), cpu_us(shards[:3], 50, True, usual, batches), runs
    )
    figure(
        "few.metadata_us", ours, "µs CPU of a node per search of 3 of 100 shards, k = 50, with metadata",
        peer="50 of the node", peer_value=peer, target="<= 1", n=batches * BATCH * runs,
    )  # fmt: skip
    figure(
        "few.bytes", 34 * reply_bytes(share), "bytes of 34 replies", peer="50 of each node",
        peer_value=34 * reply_bytes(50), target="<= 0.3", n=1,
    )  # fmt: skip
    for replica in shards:
        replica.abort()


if __name__ == "__main__":
    main()
