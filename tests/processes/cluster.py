"""Real daemons on loopback for tests and benches: start, kill, restart, look at their logs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gmco
from admin.cluster import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
READY_S = 60.0


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, below the range from which the system hands out its own."""
    sockets = []
    for _ in range(count):
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sockets.append(sock)
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


class Daemon:
    """One `gmco-node run` process."""

    def __init__(self, name: str, folder: Path, config: str, app_port: int) -> None:
        self.name, self.folder, self.app_port = name, folder, app_port
        self.config = folder / f"{name}.toml"
        self.config.write_text(config)
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.app_port}"

    @property
    def data(self) -> Path:
        return self.folder / self.name

    def start(self, *, wait: bool = True, env: dict[str, str] | None = None, files: int = 0) -> None:
        """files: how many the process may open; 0 leaves it as it is."""
        command = [sys.executable, "-m", "node.main", "run", str(self.config)]
        if files:
            command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
                preexec_fn=die_with_parent(),  # a test run that is killed leaves no daemons behind
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            assert self.process is not None
            code = self.process.poll()
            assert code is None, f"{self.name} ended with {code}:\n{self.tail()}"
            try:
                with gmco.connect_blocking([self.url], timeout_s=1.0) as client:
                    client.ping()
                    return
            except gmco.GmcoError:
                assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.tail()}"
                time.sleep(0.05)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(10)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(30)

    def wait(self, timeout_s: float) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


def config_text(
    name: str,
    members: list[tuple[str, int, int]],
    *,
    storage: str = "",
    replication: int = 3,
    shard_count: int = 4,
) -> str:
    """TOML of one node. members: (name, peer port, app port) of all."""
    _, peer_port, app_port = next(m for m in members if m[0] == name)
    lines = [
        f'[node]\nname = "{name}"\ndata_dir = "{name}"',
        f'[listen]\nhost = "127.0.0.1"\napp_port = {app_port}\npeer_port = {peer_port}',
        f'[cluster]\nid = "test"\nshard_count = {shard_count}\nreplication = {replication}',
    ]
    lines += [
        f'[[cluster.members]]\nname = "{member}"\npeer = "127.0.0.1:{peer}"\napp = "ws://127.0.0.1:{app}"\nzone = "{member}"'
        for member, peer, app in members
    ]
    lines.append(f"[storage]\n{storage}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def cluster(
    folder: Path, count: int = 3, *, storage: str = "dim = 16", replication: int = 3, shard_count: int = 4
) -> Iterator[list[Daemon]]:
    """`count` nodes, ready; killed at the end whatever happened."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(2 * count)
    members = [(f"node-{i + 1}", ports[2 * i], ports[2 * i + 1]) for i in range(count)]
    daemons = [
        Daemon(
            name,
            folder,
            config_text(name, members, storage=storage, replication=replication, shard_count=shard_count),
            app,
        )
        for name, _, app in members
    ]
    try:
        for daemon in daemons:
            daemon.start(wait=False)
        for daemon in daemons:
            daemon.wait_ready()
        yield daemons
    finally:
        for daemon in daemons:
            if daemon.running:
                daemon.signal(signal.SIGCONT)
                daemon.kill()
