"""Three real daemons: reads and writes through any node, acks, a killed node, clean stops, bad starts."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gmco
from tests.processes.cluster import ROOT, Daemon, cluster

DIM = 16


def _items(count: int, seed: int = 1) -> list[gmco.Item]:
    rng = random.Random(seed)
    return [
        gmco.Item(i, [rng.gauss(0, 1) for _ in range(DIM)], (i % 3,), {"title": f"film {i}"})
        for i in range(1, count + 1)
    ]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    with cluster(tmp_path_factory.mktemp("three")) as daemons:
        with gmco.connect_blocking([daemons[0].url], timeout_s=10.0) as client:
            client.put_items(_items(200), ack="all")
            client.put_users([gmco.User(7, _items(7)[6].vector, (), {"name": "seven"})], ack="all")
        yield daemons


def test_any_node_gives_the_same_answer(nodes: list[Daemon]) -> None:
    answers = []
    for daemon in nodes:
        with gmco.connect_blocking([daemon.url], timeout_s=5.0) as client:
            answers.append([(h.media_id, h.score) for h in client.recommend(7, 10).hits])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0][0] == 7  # the user's vector is item 7's
    assert len(answers[0]) == 10


def test_constraints_hold_and_metadata_comes_back(nodes: list[Daemon]) -> None:
    with gmco.connect_blocking([nodes[1].url], timeout_s=5.0) as client:
        answer = client.recommend(7, 20, require_all=[1])
        assert len(answer.hits) == 20
        assert all(hit.media_id % 3 == 1 for hit in answer.hits)
        assert all(hit.metadata == {"title": f"film {hit.media_id}"} for hit in answer.hits)
        assert answer.coverage.answered == answer.coverage.total == 4


def test_similar_leaves_the_given_out_and_batch_scores(nodes: list[Daemon]) -> None:
    with gmco.connect_blocking([nodes[2].url], timeout_s=5.0) as client:
        similar = client.similar(7, k=5)
        assert 7 not in [hit.media_id for hit in similar.hits]
        assert len(similar.hits) == 5
        direct = {hit.media_id: hit.score for hit in client.recommend(7, 200).hits}
        batch = client.batch(7, [3, 1, 2, 999_999])
        assert {hit.media_id: hit.score for hit in batch.hits} == {i: direct[i] for i in (1, 2, 3)}


def test_a_write_is_read_through_any_node_with_its_session(nodes: list[Daemon]) -> None:
    with gmco.connect_blocking([nodes[0].url], timeout_s=5.0) as client:
        client.put_items([gmco.Item(5_000, [1.0] * DIM, (), {"title": "new"})], ack="all")
    for daemon in nodes:
        with gmco.connect_blocking([daemon.url], timeout_s=5.0) as client:
            (item,) = client.get_items([5_000])
            assert item is not None
            assert item.metadata == {"title": "new"}
    with gmco.connect_blocking([nodes[2].url], timeout_s=5.0) as client:
        client.delete_items([5_000], ack="all")
    with gmco.connect_blocking([nodes[1].url], timeout_s=5.0) as client:
        assert client.get_items([5_000]) == [None]


def test_a_retried_write_is_applied_once(nodes: list[Daemon]) -> None:
    with gmco.connect_blocking([nodes[0].url], timeout_s=5.0) as client:
        items = [gmco.Item(i, [1.0, float(i)] * (DIM // 2), (), {}) for i in range(6_000, 6_050)]
        first = client.put_items(items, write_id=b"w" * 16)
    with gmco.connect_blocking([nodes[1].url], timeout_s=5.0) as client:
        before = {one["shard"]: one["sequence"] for one in client.status()["shards"]}
        again = client.put_items(items, write_id=b"w" * 16)
        # A retry is answered with where the log ends: not before the first try, and nothing is written for it.
        assert [shard for shard, _, _ in again.session] == [shard for shard, _, _ in first.session]
        assert all(later >= earlier for later, earlier in zip(again.session, first.session, strict=True))
        for shard, _, sequence in again.session:
            assert sequence == before[shard]
        client.delete_items([item.media_id for item in items], ack="all")


def test_an_unknown_user_is_named(nodes: list[Daemon]) -> None:
    with gmco.connect_blocking([nodes[0].url], timeout_s=5.0) as client:
        with pytest.raises(gmco.GmcoError) as caught:
            client.recommend(404)
        assert caught.value.code == "unknown_user"


def test_a_killed_node_costs_no_read_and_no_write_and_comes_back_level(tmp_path: Path) -> None:
    with (
        cluster(tmp_path) as daemons,
        gmco.connect_blocking([d.url for d in daemons], timeout_s=15.0) as client,
    ):
        client.put_items(_items(100), ack="all")
        client.put_users([gmco.User(7, _items(7)[6].vector, (), {})], ack="all")
        before = [(h.media_id, h.score) for h in client.recommend(7).hits]
        daemons[0].kill()
        for _ in range(50):
            answer = client.recommend(7)
            assert answer.coverage.answered == answer.coverage.total
            assert [(h.media_id, h.score) for h in answer.hits] == before
        longest = 0.0
        for item in _items(20, seed=2):
            began = time.monotonic()
            client.put_items([item], ack="quorum")
            longest = max(longest, time.monotonic() - began)
        assert longest < 5.0, "another primary is elected when a lease is over, in about two seconds"
        daemons[0].start()
        client.put_items(_items(100, seed=3), ack="all")
        for daemon in daemons:
            with gmco.connect_blocking([daemon.url], timeout_s=5.0) as one:
                assert all(item is not None for item in one.get_items(list(range(1, 101))))


def test_sigterm_ends_with_zero_and_the_data_is_there(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, replication=1) as (daemon,):
        with gmco.connect_blocking([daemon.url], timeout_s=5.0) as client:
            client.put_items(_items(50))
        assert daemon.stop() == 0, daemon.tail()
        daemon.start()
        with gmco.connect_blocking([daemon.url], timeout_s=5.0) as client:
            assert all(item is not None for item in client.get_items(list(range(1, 51))))
        assert daemon.stop() == 0


def _fails_with_one_line(daemon: Daemon, word: str) -> None:
    daemon.log.unlink(missing_ok=True)
    daemon.start(wait=False)
    assert daemon.wait(20) != 0
    text = daemon.tail()
    assert "Traceback" not in text
    assert word in text.strip().splitlines()[-1], text


def test_bad_starts_say_why_in_one_line(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, replication=1) as (daemon,):
        twin = Daemon(
            "twin", tmp_path, daemon.config.read_text().replace('data_dir = "node-1"', 'data_dir = "x"'), 0
        )
        _fails_with_one_line(twin, "in use")  # the ports
        twin.config.write_text(daemon.config.read_text())
        _fails_with_one_line(twin, "in use")  # the directory
        with gmco.connect_blocking([daemon.url], timeout_s=5.0) as client:
            client.put_items(_items(50))
        daemon.kill()
        good = daemon.config.read_text()
        daemon.config.write_text(good.replace("dim = 16", "dmi = 16"))
        _fails_with_one_line(daemon, "dmi")
        daemon.config.write_text(good.replace('id = "test"', 'id = "other"'))
        _fails_with_one_line(daemon, "belongs to node")
        daemon.config.write_text(good.replace("dim = 16", "dim = 32"))
        _fails_with_one_line(daemon, "16")
        daemon.config.write_text(good)
        wal = next(daemon.data.glob("shard-*/wal/*.wal"))
        content = bytearray(wal.read_bytes())
        content[700] ^= 0xFF  # inside the first records
        wal.write_bytes(content)
        _fails_with_one_line(daemon, "damaged")


def test_check_config_says_so_without_starting(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('[node]\nname = "a"\n[storage]\ndim = "many"\n')
    done = subprocess.run(
        [sys.executable, "-m", "node.main", "check-config", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode != 0
    assert "storage.dim" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stopped_node_is_asked_no_more(tmp_path: Path) -> None:
    with cluster(tmp_path, replication=1, shard_count=6) as daemons:
        with gmco.connect_blocking([daemons[0].url], timeout_s=5.0) as client:
            client.put_items(_items(60))
            daemons[2].signal(signal.SIGSTOP)
            time.sleep(4.0)
            answer = client.search([1.0] * DIM, 10)
            assert answer.coverage.answered == 4
            assert len(answer.coverage.missing) == 2
            daemons[2].signal(signal.SIGCONT)
            deadline = time.monotonic() + 10
            while client.search([1.0] * DIM, 10).coverage.answered < 6:
                assert time.monotonic() < deadline
                time.sleep(0.1)
