"""Real Redis servers and a real Redis Cluster for tests and benches, on free ports, gone when the test is."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from redis import Redis, RedisCluster
from redis.exceptions import RedisError

from admin.cluster import die_with_parent

READY_S = 20.0
# A cluster's nodes also listen 10,000 ports higher.
CLUSTER_PORT_MAX = 55_000


def binary() -> str:
    """Where redis-server is: of the dev extra, or on the PATH. Without one the tests are skipped with a shout, or fail where
    REQUIRE_REDIS is set, as .ci/run does."""
    found = shutil.which("redis-server", path=str(Path(sys.executable).parent)) or shutil.which(
        "redis-server"
    )
    if found is not None:
        return found
    said = (
        "NO redis-server HERE: the tests of the Redis cache DO NOT RUN. `make setup` brings one for Python below 3.13 "
        "on x86_64; elsewhere install the system's package redis-server"
    )
    if os.environ.get("REQUIRE_REDIS"):
        pytest.fail(said)
    print(f"\n*** {said} ***", file=sys.stderr)
    pytest.skip(said)


def ports(count: int) -> list[int]:
    """Free, as far as anybody can tell, and so are those 10,000 above."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError), socket.socket() as bus:
                if port < CLUSTER_PORT_MAX:
                    bus.bind(("127.0.0.1", port + 10_000))
                    found.append(port)
    return found


class RedisServer:
    """One redis-server process."""

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self.folder, self.port, self.options = folder, port, options
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "no", *self.options]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent()
            )
        wait(self.answers, f"redis-server on {self.port}")

    def answers(self) -> bool:
        with contextlib.suppress(RedisError, OSError), self.client() as client:
            return bool(client.ping())
        return False

    def client(self) -> Redis:
        return Redis(port=self.port, socket_timeout=5.0)

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)


def wait(true: object, what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not in {READY_S} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    server = RedisServer(folder, ports(1)[0], *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def redis_cluster(folder: Path) -> Iterator[list[RedisServer]]:
    """Three masters, then a replica of each; all slots served."""
    servers = [
        RedisServer(folder / str(port), port, "--cluster-enabled", "yes", "--cluster-node-timeout", "1000")
        for port in ports(6)
    ]
    try:
        for server in servers:
            server.start()
        _form(servers)
        yield servers
    finally:
        for server in servers:
            server.kill()


def _form(servers: Sequence[RedisServer]) -> None:
    clients = [server.client() for server in servers]
    try:
        masters = clients[:3]
        for i, client in enumerate(masters):
            first, past = 16_384 * i // 3, 16_384 * (i + 1) // 3
            client.execute_command("CLUSTER", "ADDSLOTS", *range(first, past))
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
        for server in servers[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port)
        ids = [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
        wait(
            lambda: all(_knows(client, 6) for client in clients), "nodes of the Redis Cluster know each other"
        )
        for client, master in zip(clients[3:], ids, strict=False):
            client.execute_command("CLUSTER", "REPLICATE", master)
        wait(lambda: all(_ok(client) for client in clients), "the Redis Cluster is up")
        for client in clients[3:]:
            wait(
                lambda client=client: client.info("replication")["master_link_status"] == "up", "its replicas"
            )
    finally:
        for client in clients:
            client.close()


def _info(client: Redis) -> dict[str, str]:
    """`CLUSTER INFO`, whichever way the library gives it."""
    raw = client.execute_command("CLUSTER INFO")
    if isinstance(raw, dict):
        return {str(key): str(value) for key, value in raw.items()}
    return dict(line.split(":", 1) for line in raw.decode().split())


def _knows(client: Redis, count: int) -> bool:
    return _info(client).get("cluster_known_nodes") == str(count)


def _ok(client: Redis) -> bool:
    info = _info(client)
    return info.get("cluster_state") == "ok" and info.get("cluster_size") == "3"


def cluster_client(servers: Sequence[RedisServer]) -> RedisCluster:
    return RedisCluster(port=servers[0].port, host="127.0.0.1", socket_timeout=5.0)
