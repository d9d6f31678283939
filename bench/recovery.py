"""From process start to serving, after a crash: `python -m bench.recovery [--quick]`.

A replica of 100,000 × 1,024 with its saved graph, 2,000 records past its last checkpoint, killed. The figure is
`Replica.open`: every entry and live row verified, the log replayed, the graph checked and loaded, one search answered.
The peer does the least that any node must: it loads an equal graph with hnswlib (its own format, float32) and reads
nothing else. A second figure opens the same replica with its graph missing: it serves by exact scans, nothing is built.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import graphs
from bench.harness import arguments, figure, interleaved, say
from bench.vectors import CACHE
from storage.config import StorageConfig
from storage.records import Kind, Operation, decode, encode
from storage.replica import Replica
from storage.view import ClassConstraint

TAIL = 2_000
CONFIG = StorageConfig(
    dim=graphs.DIM, m=graphs.M, ef_construction=graphs.EF_CONSTRUCTION, fresh_rows_max=1 << 30
)


def build(directory: Path, rows: int) -> None:
    """A replica as a crash leaves it, with a graph of all but the last rows."""
    vectors, _ = graphs.dataset(rows)
    replica = Replica.open(
        directory, shard=0, node_id="bench", config=dataclasses.replace(CONFIG, engine="exact")
    )
    for low in range(0, rows, 1_000):
        if low == rows - TAIL:
            replica.checkpoint()
        batch = [
            encode(
                epoch=1,
                sequence=row + 1,
                timestamp_ns=time.time_ns(),
                write_id=(row + 1).to_bytes(16, "big"),
                operation=Operation.PUT,
                kind=Kind.ITEM,
                id=row * 7919,
                vector=vectors[row].tobytes(),
                classes=(row % 250, 255),
                metadata=b"m" * 120,
            )
            for row in range(low, low + 1_000)
        ]
        replica.append(batch, len(batch))
        replica.apply([decode(record) for record in batch])
    replica.abort()


def saved_graph(rows: int) -> Path:
    """The graph of these rows as the engine saves it, built once and shared with bench.engines."""
    directory = CACHE / f"engine-hnsw16-{rows}"
    if not (directory / "manifest.json").exists():
        say(f"building the graph of {rows} rows, once")
        replica = Replica.open(CACHE / f"recovery-{rows}", shard=0, node_id="bench", config=CONFIG)
        while replica.engine.build(replica.view, 10.0):
            say(f"{replica.engine.covered(replica.view)} rows")
        replica.engine.save(directory)
        replica.abort()
    return directory


def opened(directory: Path, rows: int, graph: Path | None) -> tuple[float, Any]:
    """Seconds to the first answer, and what the recovery was, of a fresh copy's open."""
    index = directory / "index"
    shutil.rmtree(index, ignore_errors=True)
    if graph is not None:
        shutil.copytree(graph, index / f"{1:010d}")
    _, queries = graphs.dataset(rows)
    start = time.perf_counter()
    replica = Replica.open(directory, shard=0, node_id="bench", config=CONFIG)
    view, engine = replica.searchable
    hits = engine.search(view, queries[:1], 10, [ClassConstraint()])[0]
    seconds = time.perf_counter() - start
    assert len(hits.ids) == 10
    assert replica.recovery.graph_loaded == (graph is not None)
    assert replica.recovery.replayed == TAIL
    found = replica.recovery
    replica.abort()
    return seconds, found


def main() -> None:
    options = arguments(__doc__ or "")
    rows, runs = (graphs.ROWS_QUICK, 3) if options.quick else (graphs.ROWS, 5)
    directory = CACHE / f"recovery-{rows}"
    shutil.rmtree(directory, ignore_errors=True)
    build(directory, rows)
    graph = saved_graph(rows)
    graphs.hnswlib_graph(rows)  # built, if it must be, before the clock runs

    def ours() -> float:
        seconds, found = opened(directory, rows, graph)
        say(f"{seconds:.2f} s: {found}")
        return seconds

    def peer() -> float:
        start = time.perf_counter()
        index = graphs.hnswlib_graph(rows)
        index.knn_query(np.zeros((1, graphs.DIM), np.float32), k=10)
        return time.perf_counter() - start

    seconds, peer_seconds = interleaved(ours, peer, runs)
    figure(
        "recovery.seconds",
        seconds,
        "s",
        peer="hnswlib.load_index of an equal graph, nothing verified",
        peer_value=peer_seconds,
        target="under 5, graph not rebuilt",
        n=rows,
    )
    scanned = float(np.median([opened(directory, rows, None)[0] for _ in range(runs)]))
    figure(
        "recovery.without_graph_seconds",
        scanned,
        "s",
        peer="hnswlib.load_index of an equal graph, nothing verified",
        peer_value=peer_seconds,
        target="under 5, all rows scanned until the graph is back",
        n=rows,
    )
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
