"""Real daemons come and go while clients write and read: shards move, nothing is lost, no request fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Literal

import pytest

import gmco
from tests.processes.cluster import Daemon, cluster, free_ports, member, put_down
from tests.processes.ledger import DIM, TIMEOUT_S, Writer, replicas_differ

SETTLE_S = 60.0
STORAGE = f"dim = {DIM}"


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


def joiners(folder: Path, seed: Daemon, count: int, shard_count: int) -> list[Daemon]:
    """Nodes that know one of the cluster, not started."""
    ports = free_ports(2 * count)
    return [
        member(
            folder,
            f"node-{4 + i}",
            ports[2 * i : 2 * i + 2],
            [seed.peer_port],
            bootstrap=0,
            storage=STORAGE,
            shard_count=shard_count,
        )
        for i in range(count)
    ]


def test_a_cluster_grows_and_shrinks_under_load(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, storage=STORAGE, shard_count=6) as daemons:
        more = joiners(tmp_path, daemons[0], 2, 6)
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


def test_the_first_nodes_of_a_shard_that_has_moved_away_do_not_found_it_again(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, storage=STORAGE, shard_count=2) as daemons:
        more = joiners(tmp_path, daemons[0], 3, 2)
        try:
            for daemon in more:
                daemon.start()
            with gmco.connect_blocking([daemons[0].url], timeout_s=TIMEOUT_S) as client:
                client.put_items([gmco.Item(i, [1.0] * DIM, (), {"v": i}) for i in range(1, 50)], ack="all")
                for daemon in more:
                    client.cluster("join", {"node": daemon.name})
                for daemon in daemons:
                    client.cluster("leave", {"node": daemon.name})
                client.cluster("commit", {"hash": client.cluster("plan")["hash"]})
                wait_moved(client, {daemon.name for daemon in more}, 3)
            # The power comes back, and the first nodes are up first.
            for daemon in [*daemons, *more]:
                daemon.kill()
            for daemon in daemons:
                daemon.start(wait=False)
            for daemon in daemons:
                daemon.wait_ready()
            time.sleep(8.0)  # longer than any election
            with gmco.connect_blocking([daemons[0].url], timeout_s=TIMEOUT_S) as client:
                assert not client.shards()["replicas"]
                with pytest.raises(gmco.GmcoError):
                    client.put_items([gmco.Item(1, [1.0] * DIM, (), {"v": -1})], timeout_s=1.0)
            for daemon in more:
                daemon.start(wait=False)
            for daemon in more:
                daemon.wait_ready()
            with gmco.connect_blocking([more[0].url], timeout_s=TIMEOUT_S) as client:
                wait_moved(client, {daemon.name for daemon in more}, 3)
                found = client.get_items(list(range(1, 50)))
                assert [one.metadata["v"] for one in found if one is not None] == list(range(1, 50))
        finally:
            put_down(more)
