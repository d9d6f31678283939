"""L1's actor against a real redis-server and a real Redis Cluster: killed, paused, full, failed over, and full of rubbish.

Whatever happens, `get` answers in time and never raises.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
import trio
import trio.lowlevel
from redis import Redis

from node.blocking import DedicatedThread
from node.config import CacheConfig
from node.l1 import ASKS_MAX, RedisStore
from tests.processes.redis_servers import RedisServer, cluster_client, redis_cluster, redis_server, wait

TIMEOUT_MS = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as one:
        yield one


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as six:
        yield six


@asynccontextmanager
async def running(config: CacheConfig):  # type: ignore[no-untyped-def]
    async with DedicatedThread("redis") as thread, trio.open_nursery() as nursery:
        store = RedisStore(config, thread)
        await nursery.start(store.run)
        yield store
        nursery.cancel_scope.cancel()


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(40):
            await test()

    trio.run(main)


def _one(server: RedisServer) -> CacheConfig:
    return CacheConfig(redis=server.url, redis_timeout_ms=TIMEOUT_MS)


async def _get(store: RedisStore, *keys: str) -> list[bytes | None]:
    """In time, whatever happens: a little is added for a crowded machine."""
    began = trio.current_time()
    found = await store.get(keys, began + 5.0)
    assert trio.current_time() - began < TIMEOUT_MS / 1000 + 0.3
    return found


async def _until(store: RedisStore, key: str, value: bytes | None) -> float:
    began = trio.current_time()
    while await _get(store, key) != [value]:
        assert trio.current_time() - began < 20, store.statistics()
        await trio.sleep(0.02)
    return trio.current_time() - began


def test_values_come_back_and_everything_that_waits_shares_a_trip(server: RedisServer) -> None:
    async def test() -> None:
        async with running(_one(server)) as store:
            for i in range(100):
                store.put(f"k{i}", b"v%d" % i, 100.0)
            await _until(store, "k99", b"v99")
            trips = store.statistics()["trips"]
            found: dict[int, list[bytes | None]] = {}

            async def ask(i: int) -> None:
                found[i] = await _get(store, f"k{i}", "absent")

            async with trio.open_nursery() as nursery:
                for i in range(100):
                    nursery.start_soon(ask, i)
            assert found == {i: [b"v%d" % i, None] for i in range(100)}
            assert store.statistics()["trips"] - trips <= 3
        with server.client() as client:
            assert 99_000 < client.pttl("k1") <= 100_000

    _run(test)


def test_a_value_of_another_type_is_absent(server: RedisServer) -> None:
    with server.client() as client:
        client.rpush("a-list", "x")
        client.set("a-string", "y")

    async def test() -> None:
        async with running(_one(server)) as store:
            assert await _get(store, "a-list", "a-string") == [None, b"y"]
            assert store.statistics()["breaker"] == "closed"

    _run(test)


def test_killed_and_started_again(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, structlog.testing.capture_logs() as logs:

        async def test() -> None:
            async with running(_one(server)) as store:
                store.put("k", b"v", 100.0)
                await _until(store, "k", b"v")
                await trio.to_thread.run_sync(server.kill)
                for _ in range(200):
                    assert await _get(store, "k") == [None]
                assert store.statistics()["breaker"] == "open"
                # While it is open nobody goes there: all but the first few asks cost nothing.
                assert store.statistics()["failures"] < 10
                await trio.to_thread.run_sync(server.start)
                store.put("k", b"again", 100.0)
                while await _get(store, "k") != [b"again"]:
                    store.put("k", b"again", 100.0)
                    await trio.sleep(0.02)
                assert store.statistics()["breaker"] == "closed"

        _run(test)
    lines = [one for one in logs if one["event"] == "l1_troubled"]
    assert len(lines) == 1, lines  # once a minute


def test_paused_and_let_go(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:

        async def test() -> None:
            async with running(_one(server)) as store:
                store.put("k", b"v", 100.0)
                await _until(store, "k", b"v")
                server.pause()
                async with trio.open_nursery() as nursery:
                    for _ in range(50):
                        nursery.start_soon(_get, store, "k")
                while store.statistics()["breaker"] != "open":
                    assert await _get(store, "k") == [None]
                    await trio.sleep(0.01)
                server.go_on()
                await _until(store, "k", b"v")

        _run(test)


def test_full_is_no_reason_not_to_read(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server:

        async def test() -> None:
            async with running(_one(server)) as store:
                store.put("k", b"v", 100.0)
                await _until(store, "k", b"v")
                for i in range(400):
                    store.put(f"big{i}", bytes(20_000), 100.0)
                while not store.statistics()["full"]:
                    await _get(store, "k")
                assert await _get(store, "k") == [b"v"]
                assert store.statistics()["breaker"] == "closed"
                store.put("more", b"x", 100.0)
                assert store.statistics()["refused_puts"] > 0

        _run(test)


@pytest.mark.parametrize(
    "rubbish", [b"\x00\xff" * 50, b"*1\r\n:5\r\n", b"$9999999999\r\nx", b"-ERR no\r\n", b""]
)
def test_a_server_that_talks_rubbish_is_an_absent_one(rubbish: bytes) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                conn, _ = listener.accept()
            except OSError:
                return
            with conn:
                try:
                    conn.settimeout(1.0)
                    conn.recv(65_536)
                    conn.sendall(rubbish * 3)
                except OSError:
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:

        async def test() -> None:
            port = listener.getsockname()[1]
            config = CacheConfig(redis=f"redis://127.0.0.1:{port}/0", redis_timeout_ms=TIMEOUT_MS)
            async with running(config) as store:
                for _ in range(6):
                    assert await _get(store, "k", "l") == [None, None]
                assert store.statistics()["failures"] >= 1

        _run(test)
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def test_what_waits_is_bounded_and_a_cancelled_asker_harms_nobody(server: RedisServer) -> None:
    async def test() -> None:
        async with running(_one(server)) as store:
            async with trio.open_nursery() as nursery:
                for _ in range(ASKS_MAX + 50):
                    nursery.start_soon(store.get, ["k"], trio.current_time() + 5)
                await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            store.put("huge", bytes(2 << 20), 100.0)
            assert store.statistics()["refused_puts"] == 1
            store.put("after", b"v", 100.0)
            await _until(store, "after", b"v")
        assert await store.get(["k"], trio.current_time() + 5) == [None]  # it has stopped

    _run(test)


def test_a_cluster_is_read_and_written_across_its_slots(servers: list[RedisServer]) -> None:
    async def test() -> None:
        config = CacheConfig(redis_cluster=tuple(s.address for s in servers), redis_timeout_ms=1_000)
        async with running(config) as store:
            for i in range(60):
                store.put(f"k{i}", b"v%d" % i, 100.0)
            while None in await store.get([f"k{i}" for i in range(60)], trio.current_time() + 5):
                await trio.sleep(0.02)
            assert await store.get(["k7", "no", "k3"], trio.current_time() + 5) == [b"v7", None, b"v3"]

    _run(test)
    with cluster_client(servers) as client:
        assert client.get("k11") == b"v11"


def test_a_cluster_whose_master_dies_is_absent_until_it_has_failed_over(servers: list[RedisServer]) -> None:
    with cluster_client(servers) as client:
        victim = next(s for s in servers if s.port == client.get_node_from_key("k5").port)
        client.set("k5", "v5", px=100_000)
        client.wait(1, 1_000, target_nodes=client.get_node_from_key("k5"))

    async def test() -> None:
        config = CacheConfig(redis_cluster=tuple(s.address for s in servers), redis_timeout_ms=TIMEOUT_MS)
        async with running(config) as store:
            await _until(store, "k5", b"v5")
            await trio.to_thread.run_sync(victim.kill)
            took = await _until(store, "k5", b"v5")
            assert took < 15
            assert store.statistics()["failures"] > 0

    _run(test)
    victim.start()
    with Redis(port=victim.port) as client:
        wait(lambda: client.info("replication")["role"] == "slave", "the old master follows")
