"""Real daemons on loopback for tests and benches: start, kill, restart, look at their logs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gmco
from admin.cluster import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
READY_S = 60.0
# A machine that runs many tests at once stops a process for longer than the defaults allow a query to take.
PATIENT = "[router]\ndeadline_ms = 2000\ntry_ms = 400"


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
    def peer_port(self) -> int:
        port: int = tomllib.loads(self.config.read_text())["listen"]["peer_port"]
        return port

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
        """Until it serves, and everybody whom it takes for alive is linked to it."""
        deadline = time.monotonic() + READY_S
        while True:
            assert self.process is not None
            code = self.process.poll()
            assert code is None, f"{self.name} ended with {code}:\n{self.tail()}"
            with contextlib.suppress(gmco.GmcoError):
                status = self.status()
                alive = [one for one in status["members"] if one["state"] == "alive"]
                if status["state"] == "ready" and all(one["connected"] for one in alive):
                    return
            assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.tail()}"
            time.sleep(0.05)

    def status(self) -> dict[str, Any]:
        with gmco.connect_blocking([self.url], timeout_s=1.0) as client:
            return client.status()

    def states(self) -> dict[str, str]:
        """Of each member, as this node sees it."""
        return {one["name"]: one["state"] for one in self.status()["members"]}

    def wait_states(self, wanted: dict[str, str], timeout_s: float) -> float:
        """Until it sees the members so, others aside; returns the seconds that took."""
        began = time.monotonic()
        while True:
            states = self.states()
            if {**states, **wanted} == states:
                return time.monotonic() - began
            assert time.monotonic() - began < timeout_s, f"{self.name} sees {states}:\n{self.tail()}"
            time.sleep(0.02)

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


def member(
    folder: Path,
    name: str,
    ports: Sequence[int],
    seeds: Sequence[int],
    *,
    bootstrap: int,
    storage: str = "dim = 16",
    replication: int = 3,
    shard_count: int = 4,
    place: str = "",
    settings: str = "",
    more: str = "",
) -> Daemon:
    """One node, not started. ports: peer and app; seeds: peer ports; place: its region, its zone, a zone of its own when not
    given; settings: of the cluster; more: further sections."""
    folder.mkdir(parents=True, exist_ok=True)
    peer_port, app_port = ports
    place = place or f'zone = "{name}"'
    listed = ", ".join(f'"127.0.0.1:{port}"' for port in seeds)
    lines = [
        f'[node]\nname = "{name}"\ndata_dir = "{name}"\n{place}',
        f'[listen]\nhost = "127.0.0.1"\napp_port = {app_port}\npeer_port = {peer_port}\nhttp_port = 0',
        f'[cluster]\nid = "test"\nshard_count = {shard_count}\nreplication = {replication}',
        f"seeds = [{listed}]\nbootstrap = {bootstrap}\n{settings}",
        f"[storage]\n{storage}",
        "" if "[router]" in more else PATIENT,
        more,
    ]
    return Daemon(name, folder, "\n".join(lines) + "\n", app_port)


@contextlib.contextmanager
def cluster(
    folder: Path,
    count: int = 3,
    *,
    storage: str = "dim = 16",
    replication: int = 3,
    shard_count: int = 4,
    settings: str = "",
    more: str = "",
    name: str = "node",
    regions: Sequence[str] = (),
) -> Iterator[list[Daemon]]:
    """`count` nodes, ready; killed at the end whatever happened. Each knows one seed only, the first of them. They stand in
    the regions in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(2 * count)
    daemons = [
        member(
            folder,
            f"{name}-{i + 1}",
            ports[2 * i : 2 * i + 2],
            ports[:1] if count > 1 else [],
            bootstrap=count,
            storage=storage,
            replication=replication,
            shard_count=shard_count,
            settings=settings,
            more=more,
            place=f'region = "{regions[i % len(regions)]}"\nzone = "{name}-{i + 1}"' if regions else "",
        )
        for i in range(count)
    ]
    try:
        for daemon in daemons:
            daemon.start(wait=False)
        for daemon in daemons:
            daemon.wait_ready()
        yield daemons
    finally:
        put_down(daemons)


def put_down(daemons: Sequence[Daemon]) -> None:
    for daemon in daemons:
        if daemon.running:
            daemon.signal(signal.SIGCONT)
            daemon.kill()


def gmco_cluster(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What an operator types, asked of that node."""
    return subprocess.run(
        [sys.executable, "-m", "admin.cli", "cluster", *arguments, "--node", daemon.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
