"""Five real daemons under faults: nothing acknowledged is lost, one primary for each epoch, all replicas end alike."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import gmco
from tests.processes.cluster import Daemon, cluster, free_ports, member, put_down
from tests.processes.faults import Nemesis, Proxy
from tests.processes.ledger import DIM, TIMEOUT_S, Writer, wait_alike

SETTLE_S = 40.0


@contextmanager
def proxied(folder: Path, count: int) -> Iterator[tuple[list[Daemon], list[Proxy]]]:
    """Nodes that reach each other through proxies only, by TCP."""
    ports = free_ports(3 * count)
    fronts = ports[2 * count :]
    daemons, proxies = [], []
    for i in range(count):
        peer_port, app_port = ports[2 * i : 2 * i + 2]
        proxies.append(Proxy(fronts[i], peer_port))
        daemons.append(
            member(
                folder,
                f"node-{i + 1}",
                (peer_port, app_port),
                fronts[:2],
                bootstrap=count,
                storage=f"dim = {DIM}\nwal_segment_bytes = 65536\nwal_segment_bytes_max = 0\ncheckpoint_bytes = 65536",
                more=f'[gossip]\nudp = "off"\nadvertise = "127.0.0.1:{fronts[i]}"',
            )
        )
    try:
        for daemon in daemons:
            daemon.start(wait=False)
        for daemon in daemons:
            daemon.wait_ready()
        yield daemons, proxies
    finally:
        put_down(daemons)
        for proxy in proxies:
            proxy.close()


def wait_no_primary(client: gmco.BlockingClient) -> None:
    """Until whoever led has given up for want of a majority."""
    deadline = time.monotonic() + SETTLE_S
    while any(row["role"] == "primary" for row in client.shards()["replicas"]):
        assert time.monotonic() < deadline, "a primary without a majority leads on"
        time.sleep(0.1)


def wait_all_vote(client: gmco.BlockingClient, voters: int) -> None:
    """Until each shard is led under a placement with so many voters."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        led = [row for row in client.shards()["replicas"] if row["role"] == "primary"]
        if len(led) == 4 and all(len(row["voters"]) == voters for row in led):
            return
        assert time.monotonic() < deadline, [(row["shard"], row["voters"], row["move"]) for row in led]
        time.sleep(0.1)


def check_one_primary(daemons: list[Daemon]) -> int:
    """`one-primary`, by the logs: who opened which epoch. Returns how many were opened."""
    opened: dict[tuple[int, int], set[str]] = defaultdict(set)
    for daemon in daemons:
        for line in daemon.log.read_text(errors="replace").splitlines():
            if '"leads"' in line:
                told = json.loads(line)
                opened[told["shard"], told["epoch"]].add(daemon.name)
    twice = {key: names for key, names in opened.items() if len(names) > 1}
    assert not twice, f"one-primary: {twice}"
    return len(opened)


def faults(folder: Path, count: int, seed: int) -> None:
    print(f"seed {seed}")
    with proxied(folder, 5) as (daemons, proxies):
        stop = threading.Event()
        urls = [daemon.url for daemon in daemons]
        writers = [Writer(urls, number, stop, ["quorum", "primary", "quorum"]) for number in range(1, 5)]
        for writer in writers:
            writer.start()
        nemesis = Nemesis(daemons, proxies, seed)
        try:
            for _ in range(count):
                nemesis.strike()
        finally:
            print("\n".join(nemesis.story))
            nemesis.heal()
            time.sleep(1.0)
            stop.set()
            for writer in writers:
                writer.join(2 * TIMEOUT_S)
        with gmco.connect_blocking(urls, timeout_s=TIMEOUT_S) as client:
            wait_alike(client)
            for writer in writers:
                writer.check_end(client)
        problems = [problem for writer in writers for problem in writer.problems]
        assert not problems, "\n".join(problems)
        print(
            f"{check_one_primary(daemons)} epochs, {sum(w.writes for w in writers)} writes, "
            f"{sum(w.failed_writes for w in writers)} failed, {sum(w.reads for w in writers)} reads, "
            f"{sum(len(w.failed_reads) for w in writers)} failed, longest gap {max(max(w.gaps) for w in writers):.1f} s"
        )
        assert sum(writer.writes for writer in writers) > 200, "the writers hardly wrote"


def test_nothing_acknowledged_is_lost_under_faults(tmp_path: Path) -> None:
    faults(tmp_path, 20, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))


@pytest.mark.soak
def test_nothing_acknowledged_is_lost_under_a_thousand_faults(tmp_path: Path) -> None:
    for part in range(50):
        faults(tmp_path / str(part), 20, random.randrange(1 << 30))


def test_a_rolling_restart_fails_no_request(tmp_path: Path) -> None:
    storage = f"dim = {DIM}"
    with cluster(tmp_path, 3, storage=storage) as daemons:
        stop = threading.Event()
        urls = [daemon.url for daemon in daemons]
        writers = [Writer(urls, number, stop, ["primary", "quorum"]) for number in range(1, 4)]
        for writer in writers:
            writer.start()
        try:
            for daemon in daemons:
                time.sleep(0.5)
                assert daemon.stop() == 0, daemon.tail()
                daemon.start()
        finally:
            stop.set()
            for writer in writers:
                writer.join(2 * TIMEOUT_S)
        assert not [problem for writer in writers for problem in writer.problems]
        assert sum(writer.failed_writes for writer in writers) == 0
        assert not [failed for writer in writers for failed in writer.failed_reads]
        # How long they wait, `bench.failover` measures on a machine that has nothing else to do.
        print(f"longest gap {max(max(writer.gaps) for writer in writers):.2f} s")
        with gmco.connect_blocking(urls, timeout_s=TIMEOUT_S) as client:
            wait_alike(client)
            for writer in writers:
                writer.check_end(client)
        assert not [problem for writer in writers for problem in writer.problems]
        check_one_primary(daemons)


def test_failover_moves_a_shard_and_force_says_what_it_may_lose(tmp_path: Path) -> None:
    """`reads-go-on`."""
    with (
        cluster(tmp_path, 3, storage=f"dim = {DIM}") as daemons,
        gmco.connect_blocking([daemons[0].url], timeout_s=TIMEOUT_S) as client,
    ):
        client.put_items([gmco.Item(i, [1.0] * DIM, (), {"value": i}) for i in range(1, 50)], ack="all")
        wait_alike(client)
        leader = {
            row["shard"]: row["node"] for row in client.shards()["replicas"] if row["role"] == "primary"
        }
        other = next(d.name for d in daemons if d.name != leader[0])
        done = client.failover(0, to=other)
        assert (done["from"], done["to"]) == (leader[0], other)
        with pytest.raises(gmco.GmcoError) as caught:
            client.failover(0, to=daemons[0].name, force=True, confirmed=True)
        assert caught.value.code == "refused"
        for daemon in daemons[1:]:
            daemon.kill()
        with pytest.raises(gmco.GmcoError) as caught:
            client.put_items([gmco.Item(1, [1.0] * DIM, (), {})], ack="quorum", timeout_s=3.0)
        assert caught.value.code in (
            "no_primary",
            "no_lease",
            "ack_timeout",
            "outcome_unknown",
            "deadline_exceeded",
        )
        wait_no_primary(client)
        assert len(client.search([1.0] * DIM, 10).hits) == 10, "reads go on at the one replica that is left"
        for shard in range(4):
            told = client.failover(shard, to=daemons[0].name, force=True)
            assert not told["forced"]
            assert set(told["silent"]) == {daemons[1].name, daemons[2].name}
            assert client.failover(shard, to=daemons[0].name, force=True, confirmed=True)["forced"]
        client.put_items([gmco.Item(i, [1.0] * DIM, (), {"value": -i}) for i in range(1, 25)], ack="quorum")
        for daemon in daemons[1:]:
            daemon.start(wait=False)
        for daemon in daemons[1:]:
            daemon.wait_ready()
        wait_all_vote(client, 3)
        wait_alike(client)
        found = client.get_items(list(range(1, 50)))
        assert [one and one.metadata["value"] for one in found] == [-i if i < 25 else i for i in range(1, 50)]
        check_one_primary(daemons)
