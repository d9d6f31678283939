"""`kill -9` at random moments of a writing node: every acknowledged write is there, and nothing half-written."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from pathlib import Path

import pytest

import gmco
from tests.processes.cluster import Daemon, cluster

DIM = 16


def _vector(media_id: int, version: int) -> list[float]:
    rng = random.Random(media_id * 1_000_003 + version)
    return [rng.uniform(-1, 1) for _ in range(DIM)]


class Ledger:
    """What a writer sent and what was acknowledged, per item: version n is in its metadata."""

    def __init__(self) -> None:
        self.sent: dict[int, int] = {}
        self.acknowledged: dict[int, int] = {}
        self.stop = threading.Event()

    def write(self, url: str, seed: int) -> None:
        rng = random.Random(seed)
        try:
            with gmco.connect_blocking([url], timeout_s=1.0) as client:
                while not self.stop.is_set():
                    media_id = seed * 1_000 + rng.randrange(200)
                    version = self.sent.get(media_id, 0) + 1
                    self.sent[media_id] = version
                    item = gmco.Item(
                        media_id, _vector(media_id, version), (version % 64,), {"version": version}
                    )
                    client.put_items([item])
                    self.acknowledged[media_id] = version
        except gmco.GmcoError:
            return  # the node was killed: what is in flight is not acknowledged


def _kill_cycles(tmp_path: Path, cycles: int, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    storage = f"dim = {DIM}\nwal_segment_bytes = 65536\nwal_segment_bytes_max = 0\ncheckpoint_bytes = 65536"
    with cluster(tmp_path, 1, storage=storage, replication=1, shard_count=2) as (daemon,):
        ledgers = [Ledger() for _ in range(4)]
        for cycle in range(cycles):
            _wait_writable(daemon)
            threads = []
            for number, ledger in enumerate(ledgers):
                ledger.stop.clear()
                threads.append(threading.Thread(target=ledger.write, args=(daemon.url, number + 1)))
                threads[-1].start()
            time.sleep(0.05 + rng.random() * 0.5)
            daemon.kill()
            for ledger in ledgers:
                ledger.stop.set()
            for thread in threads:
                thread.join(20)
            daemon.start()
            _check(daemon, ledgers, cycle)
        assert sum(len(ledger.acknowledged) for ledger in ledgers) > 100, "the writers hardly wrote"


def _wait_writable(daemon: Daemon) -> None:
    """A restarted primary stands for a new epoch, and waits for a lease before it does."""
    deadline = time.monotonic() + 10.0
    while not all(one["role"] == "primary" for one in daemon.status()["shards"]):
        assert time.monotonic() < deadline, f"it does not lead again:\n{daemon.tail()}"
        time.sleep(0.02)


def _check(daemon: Daemon, ledgers: list[Ledger], cycle: int) -> None:
    with gmco.connect_blocking([daemon.url], timeout_s=10.0) as client:
        for ledger in ledgers:
            ids = list(ledger.sent)
            for start in range(0, len(ids), 200):
                chunk = ids[start : start + 200]
                for media_id, item in zip(chunk, client.get_items(chunk, vector=True), strict=True):
                    acknowledged = ledger.acknowledged.get(media_id, 0)
                    if item is None:
                        assert acknowledged == 0, (
                            f"cycle {cycle}: item {media_id} was acknowledged and is gone"
                        )
                        continue
                    version = item.metadata["version"]
                    assert acknowledged <= version <= ledger.sent[media_id], f"cycle {cycle}: item {media_id}"
                    assert tuple(item.classes) == (version % 64,)
                    wanted = _vector(media_id, version)
                    stored = struct.unpack(f"<{DIM}e", item.vector)
                    norm = sum(x * x for x in wanted) ** 0.5
                    assert max(abs(a - b / norm) for a, b in zip(stored, wanted, strict=True)) < 1e-3
                    ledger.acknowledged[media_id] = version
                    ledger.sent[media_id] = version


def test_every_acknowledged_write_survives_kill_9(tmp_path: Path) -> None:
    """`durable-before-reply`."""
    _kill_cycles(tmp_path, 8, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))


@pytest.mark.soak
def test_every_acknowledged_write_survives_kill_9_many_times(tmp_path: Path) -> None:
    _kill_cycles(tmp_path, 200, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))
