"""Real daemons whose logs are dropped: who was away catches up by a snapshot, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import gmco
from tests.processes.cluster import Daemon, cluster
from tests.processes.ledger import replicas_differ, wait_alike

# So that what memory keeps of a log (4 MiB) does not reach back either.
DIM = 256
ROWS = 20_000
# The log is dropped as soon as a checkpoint has it; a graph is built from 1,000 rows on.
STORAGE = (
    f"dim = {DIM}\nwal_segment_bytes = 65536\nwal_segment_bytes_max = 0\nwal_keep_s = 0.0\ncheckpoint_bytes = 262144\n"
    "graph_rows_min = 1000\nm = 8\nef_construction = 20"
)


def load(client: gmco.BlockingClient, first: int, count: int) -> None:
    vectors = np.random.default_rng(first).standard_normal((count, DIM))
    for at in range(0, count, 500):
        client.put_items(
            [
                gmco.Item(first + i, vectors[i].tolist(), (), {"n": first + i})
                for i in range(at, min(at + 500, count))
            ],
            ack="quorum",
        )


def told(daemon: Daemon, event: str) -> list[dict[str, Any]]:
    lines = daemon.log.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if f'"event": "{event}"' in line]


def leaders(client: gmco.BlockingClient) -> dict[int, str]:
    return {row["shard"]: row["node"] for row in client.shards()["replicas"] if row["role"] == "primary"}


@contextmanager
def writing(urls: list[str], problems: list[str]) -> Iterator[list[int]]:
    """Writes one item after the other until the end of the block; yields the ids that were acknowledged."""
    stop = threading.Event()
    done: list[int] = []

    def run() -> None:
        with gmco.connect_blocking(urls, timeout_s=15.0) as client:
            id_ = 1_000_000
            while not stop.is_set():
                id_ += 1
                try:
                    client.put_items([gmco.Item(id_, [1.0] * DIM, (), {"n": id_})], ack="quorum")
                    done.append(id_)
                except gmco.GmcoError as error:
                    problems.append(f"{id_}: {error.code}: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join(30.0)


def test_a_node_that_was_away_catches_up_by_snapshots_and_can_lead(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, storage=STORAGE, shard_count=2) as daemons:
        urls = [daemon.url for daemon in daemons]
        with gmco.connect_blocking(urls[:2], timeout_s=15.0) as client:
            load(client, 1, 100)
            wait_alike(client)
            away = daemons[2]
            ids = {row["shard"] for row in client.shards()["replicas"]}
            away.kill()
            load(client, 1_000, ROWS)
            problems: list[str] = []
            with writing(urls[:2], problems) as written:
                time.sleep(0.5)
                began = time.monotonic()
                away.start(wait=False)
                while {one["shard"] for one in told(away, "caught up by a snapshot")} != ids:
                    assert time.monotonic() - began < 30, away.tail()
                    time.sleep(0.05)
                print(f"caught up after {time.monotonic() - began:.2f} s")
                time.sleep(0.5)
            assert not problems
            assert written
            wait_alike(client)
            for one in told(away, "caught up by a snapshot"):
                print(one)
                assert one["graph_loaded"], one
            assert {name for name in away.data.iterdir() if name.name.startswith("shard")} == {
                away.data / "shard-000",
                away.data / "shard-001",
            }
            for daemon in daemons:
                assert not list((daemon.data / "snapshots").glob("*"))
            rows = [row for row in client.shards()["replicas"] if row["node"] == away.name]
            assert all(row["state"] in ("following", "leading") and row["snapshot"] for row in rows), rows
        # The others go; with one of the first two back there is a majority again, and the one that caught up can lead.
        daemons[0].kill()
        with gmco.connect_blocking([urls[1], urls[2]], timeout_s=15.0) as client:
            for shard in ids:
                deadline = time.monotonic() + 20
                while shard not in leaders(client):
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                if leaders(client)[shard] != away.name:
                    client.failover(shard, to=away.name)
            assert set(leaders(client).values()) == {away.name}
            (found,) = client.get_items([written[-1]])
            assert found is not None
            load(client, 900_000, 100)
        daemons[0].start()
        away.kill()
        away.start()
        with gmco.connect_blocking(urls, timeout_s=15.0) as client:
            wait_alike(client)
            assert not replicas_differ(client)


def test_who_fetches_and_who_gives_may_be_killed_in_the_middle(tmp_path: Path) -> None:
    slow = "[limits]\nsnapshot_bytes_per_s = 4000000"
    with cluster(tmp_path, 3, storage=STORAGE, shard_count=1, more=slow) as daemons:
        urls = [daemon.url for daemon in daemons]
        with gmco.connect_blocking(urls, timeout_s=15.0) as client:
            load(client, 1, 100)
            wait_alike(client)
            leader = leaders(client)[0]
            away = next(daemon for daemon in daemons if daemon.name != leader)
            away.kill()
            load(client, 1_000, ROWS)
        giver = next(daemon for daemon in daemons if daemon.name == leader)
        for victim in (away, giver, away):
            if not away.running:
                away.start()
            wait_fetching(away)
            if victim is giver:
                # While one of three fetches and one is dead, the other cannot lead without it: it answers, and promises.
                giver.kill()
                time.sleep(1.0)
                giver.start()
            else:
                away.kill()
        away.start()
        with gmco.connect_blocking(urls, timeout_s=15.0) as client:
            load(client, 500_000, 10)
            # Not alike without it: who is asked may not have heard yet that it is back.
            wait_told(client, [daemon.name for daemon in daemons])
            wait_alike(client)
            (row,) = [row for row in client.shards()["replicas"] if row["node"] == away.name]
            assert row["items"] == 110 + ROWS
        assert told(away, "caught up by a snapshot")
        assert [path.name for path in away.data.glob("shard*")] == ["shard-000"]
        # What was pinned for one that was killed goes after a minute without reads.
        deadline = time.monotonic() + 80
        while left := [path for daemon in daemons for path in (daemon.data / "snapshots").glob("*")]:
            assert time.monotonic() < deadline, left
            time.sleep(0.5)


def test_a_primary_keeps_its_lease_by_one_that_fetches(tmp_path: Path) -> None:
    slow = "[limits]\nsnapshot_bytes_per_s = 4000000"
    with cluster(tmp_path, 3, storage=STORAGE, shard_count=1, more=slow) as daemons:
        with gmco.connect_blocking([daemon.url for daemon in daemons], timeout_s=15.0) as client:
            load(client, 1, 100)
            wait_alike(client)
            leader = leaders(client)[0]
            away, other = (daemon for daemon in daemons if daemon.name != leader)
            away.kill()
            load(client, 1_000, ROWS)
        giver = next(daemon for daemon in daemons if daemon.name == leader)
        away.start()
        wait_fetching(away)
        other.kill()
        with gmco.connect_blocking([giver.url], timeout_s=5.0) as client:
            began = time.monotonic()
            written = 0
            while not told(away, "caught up by a snapshot"):
                client.put_items([gmco.Item(77, [1.0] * DIM, (), {})], ack="primary")
                written += 1
                assert time.monotonic() - began < 30
                time.sleep(0.05)
            # Longer than a lease and than it takes to step down.
            print(
                f"{written} writes in {time.monotonic() - began:.1f} s with two of three, one of them fetching"
            )
            assert time.monotonic() - began > 2.0
            assert len(told(giver, "leads no more")) == 0, giver.tail()
            client.put_items([gmco.Item(78, [1.0] * DIM, (), {})], ack="quorum")


def wait_told(client: gmco.BlockingClient, names: list[str]) -> None:
    """Until whoever answers tells of replicas on all these nodes."""
    deadline = time.monotonic() + 30
    while missing := set(names) - {row["node"] for row in client.shards()["replicas"]}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.05)


def wait_fetching(daemon: Daemon) -> None:
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(gmco.GmcoError):
            (row,) = daemon.status()["shards"]
            if row["state"].startswith("fetching snapshot") and row["snapshot"]["bytes"] > 1 << 20:
                print(row["state"])
                return
        assert time.monotonic() < deadline, daemon.tail()
        time.sleep(0.02)
