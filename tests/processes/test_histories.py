"""Replicas and the truth between them, with real daemons: logs that have parted, and answers that are behind."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gmco
from router.ring import shard_of
from tests.processes.cluster import Daemon, cluster

DIM = 16
SHARDS = 4


def _items(ids: list[int], name: str) -> list[gmco.Item]:
    return [gmco.Item(i, [1.0, float(i % 13)] * (DIM // 2), (), {"from": name}) for i in ids]


def _status(daemon: Daemon) -> dict[str, Any]:
    with gmco.connect_blocking([daemon.url], timeout_s=5.0) as client:
        return client.status()


def _wait(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _of_primary(daemon: Daemon, primary: str) -> list[dict[str, Any]]:
    return [one for one in _status(daemon)["shards"] if one["primary"] == primary]


def test_a_primary_on_a_new_disk_that_has_overtaken_a_follower_is_not_followed(tmp_path: Path) -> None:
    with cluster(tmp_path, 2, replication=2, shard_count=SHARDS) as (primary, follower):
        with gmco.connect_blocking([primary.url], timeout_s=10.0) as client:
            client.put_items(_items(list(range(200)), "old"), ack="all")
        before = {one["shard"]: one["sequence"] for one in _of_primary(follower, primary.name)}
        assert before, "node-1 is the primary of no shard"
        follower.kill()
        primary.kill()
        # The shards' disk. A node that has lost its layout, too, waits until another one is there to tell it.
        for place in primary.data.glob("shard-*"):
            shutil.rmtree(place)
        primary.start()
        mine = [i for i in range(10_000) if shard_of(i, SHARDS) in before]
        with gmco.connect_blocking([primary.url], timeout_s=10.0) as client:
            client.put_items(_items(mine[:500], "new"))
        now = {one["shard"]: one["sequence"] for one in _of_primary(primary, primary.name)}
        assert all(now[shard] > sequence for shard, sequence in before.items()), "it has not overtaken"
        follower.start()
        _wait(
            lambda: all(one["state"] == "diverged" for one in _of_primary(follower, primary.name)),
            "the follower does not say that the logs have parted",
        )
        errors = [json.loads(line) for line in follower.log.read_text().splitlines() if '"diverged"' in line]
        assert {one["shard"] for one in errors if one["level"] == "error"} == set(before)
        with gmco.connect_blocking([primary.url], timeout_s=10.0) as client:
            with pytest.raises(gmco.GmcoError) as caught:
                client.put_items(_items(mine[:1], "new"), ack="quorum", timeout_s=1.0)
            # Whoever's clock runs out first, the node's or the client's: it is not acknowledged.
            assert caught.value.code in ("ack_timeout", "deadline_exceeded")
        assert {one["shard"]: one["sequence"] for one in _of_primary(follower, primary.name)} == before
        assert all(one["state"] == "writing" for one in _of_primary(follower, follower.name))
        # The way out: the copy that is given up goes, and the replica follows from the start.
        follower.kill()
        for shard in before:
            shutil.rmtree(follower.data / f"shard-{shard:03}")
        follower.start()
        with gmco.connect_blocking([primary.url], timeout_s=10.0) as client:
            client.put_items(_items(mine[:100], "newer"), ack="all")


def test_an_answer_from_a_follower_whose_primary_is_silent_says_so(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, replication=3, shard_count=SHARDS) as daemons:
        silent, asked, other = daemons
        with gmco.connect_blocking([asked.url], timeout_s=10.0) as client:
            client.put_items(_items(list(range(100)), "x"), ack="all")
            client.put_users([gmco.User(1, [1.0] * DIM, (), {})], ack="all")
            _wait(lambda: client.search([1.0] * DIM, 5).stale_ms is None, "it never becomes level")
        silent.signal(signal.SIGSTOP)
        for daemon in (asked, other):
            with gmco.connect_blocking([daemon.url], timeout_s=10.0) as client:
                _wait(
                    lambda: client.search([1.0] * DIM, 5).stale_ms is not None,
                    "its answers claim to be level",
                )
                for answer in (
                    client.search([1.0] * DIM, 5),
                    client.recommend(1),
                    client.batch(1, list(range(100))),
                ):
                    assert answer.coverage.answered == answer.coverage.total
                    assert answer.stale_ms is not None
                    assert answer.stale_ms >= 2_000
        silent.signal(signal.SIGCONT)
        with gmco.connect_blocking([asked.url], timeout_s=10.0) as client:
            _wait(lambda: client.search([1.0] * DIM, 5).stale_ms is None, "it does not become level again")
