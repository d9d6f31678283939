"""Six real daemons in three regions: one region is lost, then another. Reads go on; a shard elects where a majority is left."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import gmco
from tests.processes.cluster import cluster
from tests.processes.ledger import DIM, TIMEOUT_S, Writer, wait_alike

SHARDS = 6
REGIONS = ("east", "north", "west")


def primaries(client: gmco.BlockingClient) -> dict[int, str]:
    return {row["shard"]: row["node"] for row in client.shards()["replicas"] if row["role"] == "primary"}


def lost_or_unled(client: gmco.BlockingClient, home: dict[str, str]) -> set[int]:
    """Shards whose primary, as far as the living say, is in the east or nowhere."""
    leaders = primaries(client)
    return {shard for shard in range(SHARDS) if home.get(leaders.get(shard, ""), "east") == "east"}


def whole(client: gmco.BlockingClient) -> bool:
    coverage = client.search([1.0] * DIM, 10).coverage
    return coverage.answered == coverage.total == SHARDS


def test_a_region_is_lost_and_then_another(tmp_path: Path) -> None:
    """`reads-go-on`: with one of three replicas gone everything goes on, with two gone reads do."""
    with cluster(tmp_path, 6, storage=f"dim = {DIM}", shard_count=SHARDS, regions=REGIONS) as daemons:
        by_region = {region: daemons[i::3] for i, region in enumerate(REGIONS)}
        left = [*by_region["north"], *by_region["west"]]
        stop = threading.Event()
        with gmco.connect_blocking([by_region["west"][0].url], timeout_s=TIMEOUT_S) as client:
            rows = client.shards()["replicas"]
            home = {daemon.name: region for region, some in by_region.items() for daemon in some}
            for shard in range(SHARDS):
                held = {home[row["node"]] for row in rows if row["shard"] == shard}
                assert held == set(REGIONS), f"shard {shard} is in {held} alone"

            writers = [
                Writer([d.url for d in left], number, stop, ["primary", "quorum"]) for number in (1, 2)
            ]
            for writer in writers:
                writer.start()
            try:
                time.sleep(0.5)
                for daemon in by_region["east"]:
                    daemon.kill()
                until = time.monotonic() + 4 * TIMEOUT_S
                while lost_or_unled(client, home):
                    assert whole(client)
                    assert time.monotonic() < until, f"led by {primaries(client)}"
                    time.sleep(0.1)
                before = [writer.writes for writer in writers]
                time.sleep(1.0)
                assert all(now.writes > then for now, then in zip(writers, before, strict=True))
            finally:
                stop.set()
                for writer in writers:
                    writer.join(2 * TIMEOUT_S)
            assert not [problem for writer in writers for problem in writer.problems]
            assert not [failed for writer in writers for failed in writer.failed_reads]
            assert sum(writer.failed_writes for writer in writers) == 0

            for daemon in by_region["north"]:
                daemon.kill()
            for _ in range(10):
                assert whole(client), "two of three replicas are gone, and one that answers is enough"
                for writer in writers:
                    writer.check_end(client)
            with pytest.raises(gmco.GmcoError) as caught:
                client.put_items([gmco.Item(1, [1.0] * DIM, (), {})], ack="quorum", timeout_s=3.0)
            assert caught.value.code in ("no_primary", "no_lease", "ack_timeout", "deadline_exceeded")

            for daemon in [*by_region["east"], *by_region["north"]]:
                daemon.start(wait=False)
            wait_alike(client)
            for writer in writers:
                writer.check_end(client)
            assert not [problem for writer in writers for problem in writer.problems]
