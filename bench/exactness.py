"""`exactness.equal`: hits through a cluster against one exact index that holds everything, bit for bit.

Three real nodes with the exact engine, 24 shards, one replica each, so that every query is merged from three nodes' k' hits, and
some nodes are asked again. Queries go to all three coordinators, 32 at a time, so that they meet in batches of all sizes;
a part of them has constraints. Every tenth vector is there twice under another id: ties. The index of the same records is read in
this process. Value: percent of queries whose ids and float32 scores are equal in every bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

import gmco
from bench.harness import arguments, figure, say
from router.vectors import from_wire
from storage.config import StorageConfig
from storage.records import Kind, Operation, decode, encode
from storage.replica import Replica
from storage.view import ClassConstraint
from tests.processes.cluster import Daemon, cluster

DIM, ITEMS, K = 64, 5_000, 50
CLASSES = 8
WORKERS = 32
PATIENT = "[router]\ndeadline_ms = 30000\ntry_ms = 10000"


def records(rng: np.random.Generator) -> list[gmco.Item]:
    vectors = rng.normal(size=(ITEMS, DIM)).astype(np.float32)
    vectors[::10] = vectors[1::10]
    return [gmco.Item(int(rng.integers(1 << 63)), vector, (n % CLASSES,)) for n, vector in enumerate(vectors)]


def one_index(folder: Path, items: list[gmco.Item]) -> Replica:
    config = StorageConfig(dim=DIM, engine="exact", threads=1)
    replica = Replica.open(folder, shard=0, node_id="one", config=config)
    vectors = from_wire([item.vector.tobytes() for item in items], DIM, "cosine", dtype="f4")
    packed = [
        encode(
            epoch=1, sequence=n + 1, timestamp_ns=1, operation=Operation.PUT, kind=Kind.ITEM, id=item.media_id,
            vector=vectors[n].tobytes(), classes=tuple(item.classes), metadata=b"\x80",
        )
        for n, item in enumerate(items)
    ]  # fmt: skip
    replica.append(packed, len(packed))
    replica.apply([decode(record) for record in packed])
    return replica


def expected(replica: Replica, query: npt.NDArray[np.float32], classes: tuple[int, ...]) -> bytes:
    view, engine = replica.searchable
    (hits,) = engine.search(
        view,
        from_wire([query.tobytes()], DIM, "cosine", dtype="f4"),
        K,
        [ClassConstraint(require_any=classes)],
    )
    return hits.ids.astype("<u8").tobytes() + hits.scores.astype("<f4").tobytes()


async def count_equal(daemons: list[Daemon], replica: Replica, queries: int) -> int:
    equal = 0
    left = iter(range(queries))

    async def work(client: gmco.Client) -> None:
        nonlocal equal
        for number in left:
            rng = np.random.default_rng([7, number])
            query = rng.normal(size=DIM).astype(np.float32)
            classes = (int(rng.integers(CLASSES)),) if number % 4 == 0 else ()
            answer = await client.search(query, K, require_any=classes, require_full=True, timeout_s=60)
            ids = np.array([hit.media_id for hit in answer.hits], "<u8")
            scores = np.array([hit.score for hit in answer.hits], "<f4")
            equal += ids.tobytes() + scores.tobytes() == expected(replica, query, classes)
            if number % 1_000 == 0:
                say(f"{number} queries")

    async with trio.open_nursery() as nursery:
        clients = [await nursery.start(hold, daemon.url) for daemon in daemons]
        async with trio.open_nursery() as workers:
            for worker in range(WORKERS):
                workers.start_soon(work, clients[worker % len(clients)])
        nursery.cancel_scope.cancel()
    return equal


async def hold(url: str, *, task_status: trio.TaskStatus[gmco.Client]) -> None:
    async with gmco.connect([url], timeout_s=60.0) as client:
        task_status.started(client)
        await trio.sleep_forever()


def asked_again(daemons: list[Daemon]) -> tuple[int, int]:
    counters: list[dict[str, Any]] = [daemon.status()["counters"] for daemon in daemons]
    return sum(one["router"]["more"] for one in counters), sum(one["search"]["again"] for one in counters)


def main() -> None:
    options = arguments(__doc__ or "")
    queries = 1_000 if options.quick else 10_000
    folder = Path(".bench/exactness")
    shutil.rmtree(folder, ignore_errors=True)
    items = records(np.random.default_rng(1))
    replica = one_index(folder / "one", items)
    storage = f'dim = {DIM}\nengine = "exact"\nthreads = 1'
    with cluster(
        folder / "three", 3, storage=storage, replication=1, shard_count=24, more=PATIENT
    ) as daemons:
        with gmco.connect_blocking([daemons[0].url], timeout_s=60.0) as client:
            for start in range(0, ITEMS, 500):
                client.put_items(items[start : start + 500])
        equal = trio.run(count_equal, daemons, replica, queries)
        nodes, shards = asked_again(daemons)
        say(f"asked again for more: nodes {nodes} times, shards in a lane {shards} times")
    replica.abort()
    figure(
        "exactness.equal", 100 * equal / queries, "% of queries", peer="one exact index that holds everything",
        peer_value=None, target="100", n=queries,
    )  # fmt: skip


if __name__ == "__main__":
    main()
