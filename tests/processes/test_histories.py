"""Replicas and the truth between them, with real daemons: logs that have parted, and answers that are behind."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gmco
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


def _new_disk(daemon: Daemon) -> None:
    """The shards' disk. A node that has lost its layout, too, waits until another one is there to tell it."""
    for place in daemon.data.glob("shard-*"):
        shutil.rmtree(place)


def _sequences(daemon: Daemon) -> dict[int, int]:
    return {one["shard"]: one["sequence"] for one in _status(daemon)["shards"]}


def test_a_primary_on_a_new_disk_writes_nothing_before_it_has_everything_again(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, replication=3, shard_count=SHARDS) as daemons:
        lost = daemons[0]
        with gmco.connect_blocking([d.url for d in daemons], timeout_s=15.0) as client:
            client.put_items(_items(list(range(200)), "old"), ack="all")
            assert _of_primary(lost, lost.name), "node-1 is the primary of no shard"
            lost.kill()
            _new_disk(lost)
            lost.start()
            client.put_items(_items(list(range(200, 300)), "new"), ack="quorum")
            # Let in again by an epoch that names its new replicas: from then on its disk counts.
            client.put_items(_items(list(range(300, 400)), "newer"), ack="all")
            _wait(
                lambda: all(_sequences(one) == _sequences(daemons[1]) for one in daemons),
                "the replicas do not end alike",
            )
        with gmco.connect_blocking([lost.url], timeout_s=15.0) as client:
            found = client.get_items(list(range(400)))
        assert [None if one is None else one.metadata["from"] for one in found] == (
            ["old"] * 200 + ["new"] * 100 + ["newer"] * 100
        )


def test_of_two_the_one_with_a_new_disk_cannot_begin_another_history(tmp_path: Path) -> None:
    with cluster(tmp_path, 2, replication=2, shard_count=SHARDS) as (primary, follower):
        with gmco.connect_blocking([primary.url], timeout_s=15.0) as client:
            client.put_items(_items(list(range(200)), "old"), ack="all")
        before = _sequences(follower)
        follower.kill()
        primary.kill()
        _new_disk(primary)
        primary.start()
        with gmco.connect_blocking([primary.url], timeout_s=15.0) as client:
            with pytest.raises(gmco.GmcoError) as caught:
                client.put_items(_items([1], "new"), timeout_s=2.0)
            assert caught.value.code in ("no_primary", "deadline_exceeded")
        # It has noted that it founded them once: removed by hand, they are not founded again, and nobody brings them yet.
        assert not any(_sequences(primary).values()), "it has written nothing"
        follower.start()
        time.sleep(4.0)  # elections would be over
        assert all(one["primary"] == "" for one in _status(follower)["shards"]), "one of two is no majority"
        assert _sequences(follower) == before, "nothing was cut and nothing was taken"
        # The way out: where the data is, by force, and in so many words.
        with gmco.connect_blocking([follower.url], timeout_s=15.0) as client:
            for shard in range(SHARDS):
                forced = client.failover(shard, to=follower.name, force=True, confirmed=True, timeout_s=10.0)
                assert forced["forced"]
            client.put_items(_items(list(range(200, 300)), "newer"), ack="all")
        with gmco.connect_blocking([primary.url], timeout_s=15.0) as client:
            _wait(lambda: _sequences(primary) == _sequences(follower), "the replicas do not end alike")
            found = client.get_items(list(range(300)))
        assert [None if one is None else one.metadata["from"] for one in found] == ["old"] * 200 + [
            "newer"
        ] * 100


def test_an_answer_from_a_follower_whose_primary_is_silent_says_so(tmp_path: Path) -> None:
    # Of two nobody can be elected without the other, so the silence lasts.
    with cluster(tmp_path, 2, replication=2, shard_count=SHARDS) as (silent, asked):
        with gmco.connect_blocking([asked.url], timeout_s=10.0) as client:
            client.put_items(_items(list(range(100)), "x"), ack="all")
            client.put_users([gmco.User(1, [1.0] * DIM, (), {})], ack="all")
            _wait(lambda: client.search([1.0] * DIM, 5).stale_ms is None, "it never becomes level")
        silent.signal(signal.SIGSTOP)
        with gmco.connect_blocking([asked.url], timeout_s=10.0) as client:
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
