"""Two real hosts with data, without and with a third that only votes: what a dead primary costs, both ways."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import gmco
from tests.processes.cluster import Daemon, free_ports, gmco_cluster, member, put_down
from tests.processes.ledger import DIM, TIMEOUT_S, Writer, wait_alike

SETTLE_S = 20.0
SHARDS = 4
READ_ONLY = {"no_primary", "no_lease", "outcome_unknown", "deadline_exceeded"}


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[list[Daemon], Daemon]]:
    """Two members with data, and a node that is none yet."""
    ports = free_ports(6)

    def node(number: int, bootstrap: int) -> Daemon:
        own = ports[2 * number - 2 : 2 * number]
        storage = f"dim = {DIM}\nwal_segment_bytes = 65536"
        return member(
            folder, f"node-{number}", own, ports[:1], bootstrap=bootstrap, storage=storage, replication=2
        )

    data, third = [node(1, 2), node(2, 2)], node(3, 0)
    try:
        for daemon in data:
            daemon.start(wait=False)
        for daemon in data:
            daemon.wait_ready()
        yield data, third
    finally:
        put_down([*data, third])


def put(client: gmco.BlockingClient, first: int, ack: str, timeout_s: float = TIMEOUT_S) -> None:
    items = [gmco.Item(i, [1.0] * DIM, (), {"value": 0}) for i in range(first, first + 40)]
    client.put_items(items, ack=ack, timeout_s=timeout_s)  # type: ignore[arg-type]


def wait_witnessed(client: gmco.BlockingClient) -> None:
    deadline = time.monotonic() + SETTLE_S
    while True:
        led = [row for row in client.shards()["replicas"] if row["role"] == "primary"]
        if len(led) == SHARDS and all(row["witness"] == "node-3" and row["witness_heard"] for row in led):
            return
        assert time.monotonic() < deadline, [(row["shard"], row["witness"], row["move"]) for row in led]
        time.sleep(0.1)


def leaders(daemon: Daemon) -> set[str]:
    with gmco.connect_blocking([daemon.url], timeout_s=TIMEOUT_S) as client:
        return {row["node"] for row in client.shards()["replicas"] if row["role"] == "primary"}


def survive(victim: Daemon, left: Daemon, writers: list[Writer]) -> None:
    """`victim` dies as by a power cut; the other leads every shard, and the writers go on."""
    for shard in range(SHARDS):
        with gmco.connect_blocking([left.url], timeout_s=TIMEOUT_S) as client:
            client.failover(shard, to=victim.name)
    victim.kill()
    deadline = time.monotonic() + SETTLE_S
    while leaders(left) != {left.name}:
        assert time.monotonic() < deadline, "nobody was elected"
        time.sleep(0.05)
    before = [writer.writes for writer in writers]
    while not all(writer.writes > count + 5 for writer, count in zip(writers, before, strict=True)):
        assert time.monotonic() < deadline, f"writes do not go on after {victim.name} has died"
        time.sleep(0.05)
    victim.start()
    with gmco.connect_blocking([left.url], timeout_s=TIMEOUT_S) as client:
        deadline = time.monotonic() + SETTLE_S
        while any(row["state"] not in ("leading", "following") for row in client.shards()["replicas"]):
            assert time.monotonic() < deadline, client.shards()
            time.sleep(0.1)


def test_two_hosts_alone_are_read_only_and_a_witness_lets_either_die(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as (data, third):
        one, two = data
        with gmco.connect_blocking([one.url], timeout_s=TIMEOUT_S) as client:
            put(client, 1, "quorum")
            assert "no witness" in " ".join(gmco_cluster(one, "show").stderr.split())
            two.kill()
            time.sleep(3.0)  # both leases are over
            with pytest.raises(gmco.GmcoError) as caught:
                put(client, 1, "primary", timeout_s=3.0)
            assert caught.value.code in READ_ONLY
            assert len(client.search([1.0] * DIM, 10).hits) == 10, "reads go on"
            two.start()
            third.start(wait=False)
            one.wait_states({"node-3": "alive"}, SETTLE_S)
            wait_alike(client)

        joined = gmco_cluster(one, "join", "node-3", "--witness")
        assert joined.returncode == 0, joined.stderr
        planned = gmco_cluster(one, "plan")
        assert f"node-3 witnesses {SHARDS} shards of two replicas" in " ".join(planned.stdout.split())
        assert "no witness" not in planned.stderr
        hash_ = planned.stdout.rsplit("commit ", 1)[1].strip()
        done = gmco_cluster(one, "commit", hash_)
        assert done.returncode == 0, done.stderr
        with gmco.connect_blocking([one.url], timeout_s=TIMEOUT_S) as client:
            wait_witnessed(client)
            assert third.status()["witnesses"] == list(range(SHARDS))
            assert third.status()["shards"] == [], "it holds no data"

        stop = threading.Event()
        urls = [daemon.url for daemon in (*data, third)]
        writers = [Writer(urls, number, stop, ["primary"]) for number in range(1, 4)]
        for writer in writers:
            writer.start()
        try:
            survive(one, two, writers)
            survive(two, one, writers)
        finally:
            stop.set()
            for writer in writers:
                writer.join(2 * TIMEOUT_S)
        with gmco.connect_blocking(urls, timeout_s=TIMEOUT_S) as client:
            wait_alike(client)
            for writer in writers:
                writer.check_end(client)
            put(client, 100, "all")
        assert not [problem for writer in writers for problem in writer.problems]
        print(f"longest gap {max(max(writer.gaps) for writer in writers):.1f} s")

        # The vote outlives its process; with the witness dead two hosts go on, and one alone does not.
        third.kill()
        third.start(wait=False)
        with gmco.connect_blocking([one.url], timeout_s=TIMEOUT_S) as client:
            wait_witnessed(client)
            third.kill()
            put(client, 200, "quorum")
            two.kill()
            time.sleep(3.0)
            with pytest.raises(gmco.GmcoError) as caught:
                put(client, 300, "primary", timeout_s=3.0)
            assert caught.value.code in READ_ONLY
