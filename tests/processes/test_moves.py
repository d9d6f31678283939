"""Real daemons come and go while clients write and read: shards move, nothing is lost, no request fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Literal

import gmco
from tests.processes.cluster import cluster, free_ports, member, put_down
from tests.processes.ledger import DIM, TIMEOUT_S, Writer, replicas_differ

SETTLE_S = 60.0


def wait_moved(client: gmco.BlockingClient, names: set[str], copies: int) -> None:
    """Until exactly these nodes hold something, each shard has so many replicas, and all are alike."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        rows = client.shards()["replicas"]
        held = {row["node"] for row in rows}
        by_shard: dict[int, int] = {}
        for row in rows:
            by_shard[row["shard"]] = by_shard.get(row["shard"], 0) + 1
        moving = [row["move"] for row in rows if row["move"]]
        why = replicas_differ(client)
        if held == names and set(by_shard.values()) == {copies} and not moving and not why:
            return
        assert time.monotonic() < deadline, f"held by {held}, {by_shard}, {moving}, {why}"
        time.sleep(0.2)


def change(client: gmco.BlockingClient, action: Literal["join", "leave"], *names: str) -> None:
    for name in names:
        client.cluster(action, {"node": name})
    client.cluster("commit", {"hash": client.cluster("plan")["hash"]})


def test_a_cluster_grows_and_shrinks_under_load(tmp_path: Path) -> None:
    storage = f"dim = {DIM}"
    with cluster(tmp_path, 3, storage=storage, shard_count=6) as daemons:
        ports = free_ports(4)
        more = [
            member(
                tmp_path,
                f"node-{4 + i}",
                ports[2 * i : 2 * i + 2],
                [daemons[0].peer_port],
                bootstrap=0,
                storage=storage,
                shard_count=6,
            )
            for i in range(2)
        ]
        stop = threading.Event()
        urls = [daemon.url for daemon in daemons]
        writers = [Writer(urls, number, stop, ["primary", "quorum"]) for number in range(1, 4)]
        for writer in writers:
            writer.start()
        try:
            for daemon in more:
                daemon.start()
            with gmco.connect_blocking(urls[:1], timeout_s=TIMEOUT_S) as client:
                change(client, "join", *(daemon.name for daemon in more))
                wait_moved(client, {d.name for d in [*daemons, *more]}, 3)
                change(client, "leave", daemons[1].name)
                wait_moved(client, {d.name for d in [daemons[0], daemons[2], *more]}, 3)
        finally:
            stop.set()
            for writer in writers:
                writer.join(2 * TIMEOUT_S)
            try:
                problems = [problem for writer in writers for problem in writer.problems]
                failed = [one for writer in writers for one in writer.failed_reads]
                writes = sum(writer.writes for writer in writers)
                assert not problems
                assert not failed
                assert sum(writer.failed_writes for writer in writers) == 0
                assert writes > 100, "the writers hardly wrote"
                with gmco.connect_blocking([more[0].url], timeout_s=TIMEOUT_S) as client:
                    for writer in writers:
                        writer.check_end(client)
                assert not [problem for writer in writers for problem in writer.problems]
            finally:
                put_down(more)
