"""Real daemons: a move goes at the rate that it was given, and two replicas come to a node at a time, whoever sends them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import gmco
from tests.processes.cluster import ROOT, Daemon, cluster
from tests.processes.ledger import TIMEOUT_S
from tests.processes.test_orders import ok, rows, wait

DIM, SHARDS, ITEMS = 256, 6, 12_000
# Each shard has a graph, so it comes by a snapshot, of some 2 MB.
STORAGE = f"dim = {DIM}\ngraph_rows_min = 1000\nm = 8\nef_construction = 20\nwal_segment_bytes = 1048576"


def load(client: gmco.BlockingClient) -> None:
    vectors = np.random.default_rng(1).standard_normal((ITEMS, DIM)).astype(np.float16)
    for first in range(0, ITEMS, 500):
        client.put_items(
            [gmco.Item(1 + at, vectors[at].tobytes(), (), {}) for at in range(first, first + 500)], ack="all"
        )


def led_by(daemon: Daemon, name: str) -> int:
    return next(row["shard"] for row in rows(daemon) if row["role"] == "primary" and row["node"] == name)


def still(daemon: Daemon) -> bool:
    with gmco.connect_blocking([daemon.url], timeout_s=TIMEOUT_S) as client:
        found = client.moves()
        return not (found["moves"] or found["unknown"] or found["silent"])


class Watch(threading.Thread):
    """How many replicas come to each node, and go from each primary, at most at a time."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self.daemon_, self.ended = daemon, threading.Event()
        self.coming: dict[str, int] = {}
        self.going: dict[str, int] = {}

    def run(self) -> None:
        with gmco.connect_blocking([self.daemon_.url], timeout_s=TIMEOUT_S) as client:
            while not self.ended.wait(0.03):
                # On a crowded machine one look may be late.
                with contextlib.suppress(gmco.GmcoError):
                    self._note(client.shards()["replicas"])

    def _note(self, replicas: list[dict[str, Any]]) -> None:
        coming: dict[str, int] = {}
        going: dict[str, int] = {}
        for row in replicas:
            if row["role"] == "primary":
                for name in row["learners"]:
                    coming[name] = coming.get(name, 0) + 1
                    going[row["node"]] = going.get(row["node"], 0) + 1
        for most, now in ((self.coming, coming), (self.going, going)):
            for name, count in now.items():
                most[name] = max(most.get(name, 0), count)


def test_rates_are_kept_and_changed_under_way_and_two_come_at_a_time(tmp_path: Path) -> None:
    # What all moves to a node share here is little, so that they overlap.
    slow = "[limits]\nsnapshot_bytes_per_s = 2500000"
    with cluster(
        tmp_path,
        3,
        storage=STORAGE,
        shard_count=SHARDS,
        replication=1,
        more=slow,
        settings="prefer_first = false",
    ) as daemons:
        one = daemons[0]
        with gmco.connect_blocking([daemon.url for daemon in daemons], timeout_s=30.0) as client:
            load(client)

        shard = led_by(one, "node-1")
        began = time.monotonic()
        ok(one, "shard", "move", str(shard), "--from", "node-1", "--to", "node-2", "--rate", "0.5")
        seconds = time.monotonic() - began
        assert fetched(daemons[1]) > 1 << 20
        # The first megabyte goes at once, what follows waits for it.
        assert seconds > 2.0, "at its own rate, not at its node's"

        arguments = f"shard move {shard} --from node-2 --to node-1 --rate 0.1 --node {one.url}".split()
        command = subprocess.Popen(
            [sys.executable, "-m", "admin.cli", *arguments], cwd=ROOT, stderr=subprocess.PIPE
        )
        try:
            wait(lambda: copying(one, shard))
            time.sleep(1.0)
            assert copying(one, shard)
            ok(one, "shard", "move", str(shard), "--from", "node-2", "--to", "node-1", "--rate", "0")
            assert command.wait(20) == 0
        finally:
            command.kill()
            command.communicate()

        watch = Watch(daemons[2])
        watch.start()
        for name in ("node-1", "node-2"):
            ok(daemons[2], "cluster", "leave", name)
        plan = ok(daemons[2], "cluster", "plan", "--output", "json")
        ok(daemons[2], "cluster", "commit", json.loads(plan)["hash"])
        wait(lambda: {row["node"] for row in rows(daemons[2])} == {"node-3"} and still(daemons[2]))
        watch.ended.set()
        watch.join()
        assert watch.coming == {"node-3": 2}
        assert max(watch.going.values()) <= 2


def fetched(daemon: Daemon) -> int:
    return int(daemon.status()["counters"]["snapshots"]["fetched_bytes"])


def copying(daemon: Daemon, shard: int) -> bool:
    with gmco.connect_blocking([daemon.url], timeout_s=TIMEOUT_S) as client:
        found: list[dict[str, Any]] = client.moves()["moves"]
        return any(one["shard"] == shard and one["stage"] == "copying" for one in found)
