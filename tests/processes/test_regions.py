"""`local-bytes` (docs/fan-out.md): with a replica of every shard in its region, a coordinator's reads stay there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gmco
from tests.processes.cluster import Daemon, cluster

DIM = 16
ITEMS = 200
REGIONS = ("east", "west")
# A try that is late asks elsewhere, which may be in the other region: here none is.
PATIENT = "[router]\ndeadline_ms = 20000\ntry_ms = 10000"


def _counters(daemons: Sequence[Daemon]) -> tuple[dict[str, int], bool]:
    """Bytes of reads by pair of regions, and whether all nodes take each other for well."""
    bytes_: dict[str, int] = {}
    well = True
    for daemon in daemons:
        status = daemon.status()
        well = well and all(one["state"] == "alive" and not one["degraded"] for one in status["members"])
        for pair, both in status["counters"]["read_bytes"].items():
            bytes_[pair] = bytes_.get(pair, 0) + both["out"] + both["in"]
    return bytes_, well


def _ask(daemon: Daemon) -> list[Any]:
    with gmco.connect_blocking([daemon.url], timeout_s=30.0) as client:
        answers = [
            client.search([1.0, 0.5] * (DIM // 2), 20, require_full=True),
            client.recommend(7, 20, require_full=True),
            client.similar(3, k=20, require_full=True),
        ]
        assert all(client.get_items(list(range(ITEMS))))
        batch = client.batch(7, list(range(ITEMS)), require_full=True)
        assert len(batch.hits) == ITEMS
        return [[(hit.media_id, hit.score) for hit in answer.hits] for answer in answers]


def test_no_byte_of_a_read_leaves_a_region_that_has_everything(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    with cluster(tmp_path, 4, replication=2, shard_count=8, more=PATIENT, regions=REGIONS,
                 storage=f'dim = {DIM}\nengine = "exact"') as daemons:  # fmt: skip
        with gmco.connect_blocking([daemons[0].url], timeout_s=30.0) as client:
            client.put_items([gmco.Item(i, rng.normal(size=DIM)) for i in range(ITEMS)], ack="all")
            client.put_users([gmco.User(7, rng.normal(size=DIM))], ack="all")
        _wait_for_holders(daemons)
        valid = 0
        for _ in range(10):
            before, well = _counters(daemons)
            answers = [_ask(daemon) for daemon in daemons]
            after, well_still = _counters(daemons)
            assert all(answer == answers[0] for answer in answers), "whoever coordinates, bit for bit"
            if not (well and well_still):
                continue  # an unwell node is avoided, for one that is well and far away
            valid += 1
            assert after.get("east>west", 0) == before.get("east>west", 0)
            assert after.get("west>east", 0) == before.get("west>east", 0)
            assert after["east>east"] > before["east>east"] + ITEMS
            assert after["west>west"] > before["west>west"] + ITEMS
            if valid == 3:
                break
        assert valid
        # The labels count what they say: with half of the region gone, it has to ask the other.
        daemons[2].kill()
        _ask(daemons[0])
        assert _counters(daemons[:2])[0]["east>west"] > before.get("east>west", 0)


def _wait_for_holders(daemons: Sequence[Daemon]) -> None:
    """Until each has heard who holds what: before that, placements are the first ones and bytes go where they say."""
    deadline = time.monotonic() + 30
    while True:
        if all(
            len(status["members"]) == len(daemons)
            and all(one["connected"] and one["shards"] == 4 for one in status["members"])
            for status in (daemon.status() for daemon in daemons)
        ):
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)
