"""Several `gmco-node` processes on this machine that never outlive us: what the demo runs on."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

MARK = ".gmco-demo"
PORT_FIRST, PORT_STEP = 7400, 10
PR_SET_PDEATHSIG = 1
STOP_S = 5.0
LOG_TAIL_LINES = 25


class ClusterError(RuntimeError):
    """The nodes cannot be started or did not get ready. The message says why, with the end of their logs."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Of one node, on the loopback address."""

    app: int
    http: int
    peer: int

    @property
    def url(self) -> str:
        """For `gmco.connect`."""
        return f"ws://127.0.0.1:{self.app}"

    @property
    def http_url(self) -> str:
        """For `curl`."""
        return f"http://127.0.0.1:{self.http}"


def choose_ports(count: int) -> list[Ports]:
    """7400 to 7402, 7410 to 7412, … while all of them are free, or else what the system gives."""
    firsts = [PORT_FIRST + PORT_STEP * i for i in range(count)]
    wanted = [Ports(first, first + 1, first + 2) for first in firsts]
    if all(_free(port) for ports in wanted for port in (ports.app, ports.http, ports.peer)):
        return wanted
    with ExitStack() as held:  # held together, or the system might give one port twice
        sockets = [held.enter_context(socket.socket()) for _ in range(3 * count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        numbers = [int(one.getsockname()[1]) for one in sockets]
    return [Ports(*numbers[3 * i : 3 * i + 3]) for i in range(count)]


def _free(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def config_toml(index: int, ports: Sequence[Ports], cluster_id: str, shard_count: int) -> str:
    """The configuration of node `index` (from 0). It knows one other node; of the rest it hears by gossip.

    Every node is a replica of every shard.
    The exact engine: 17,472 films are few, and then every replica gives bit-identical answers.
    """
    quoted = json.dumps  # a JSON string is a TOML basic string
    lines = ["[node]", f'name = "node-{index + 1}"', f'data_dir = "node-{index + 1}"', ""]
    lines += [
        "[listen]",
        'host = "127.0.0.1"',
        f"app_port = {ports[index].app}",
        f"http_port = {ports[index].http}",
        f"peer_port = {ports[index].peer}",
    ]
    lines += ["", "[cluster]", f"id = {quoted(cluster_id)}", f"shard_count = {shard_count}"]
    lines += [f"replication = {min(3, len(ports))}"]
    if len(ports) > 1:
        lines += [f'seeds = ["127.0.0.1:{ports[index - 1].peer}"]', f"bootstrap = {len(ports)}"]
    lines += [""]
    # A laptop that is busy with something else is not to show half an answer.
    lines += ["[router]", "deadline_ms = 2000", "try_ms = 400", ""]
    lines += ["[storage]", "dim = 1024", 'engine = "exact"', "threads = 1", "", "[log]", 'level = "info"', ""]
    return "\n".join(lines)


@contextmanager
def own_directory(path: Path) -> Iterator[Path]:
    """An empty directory of ours, removed at the end. Raises ClusterError rather than remove a stranger's."""
    if path.exists() and not (path / MARK).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ClusterError(f"{path} exists and is not a demo's; give another --dir")
    path.mkdir(parents=True, exist_ok=True)
    with (path / MARK).open("a") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ClusterError(f"another demo runs in {path}; stop it or give another --dir") from error
        _empty(path)
        try:
            yield path
        finally:
            _empty(path)
            (path / MARK).unlink(missing_ok=True)
            path.rmdir()


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name == MARK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def die_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: the kernel kills the child when we die, even by SIGKILL. Elsewhere than on Linux: nothing."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    libc = ctypes.CDLL(None)  # loaded here: after the fork it is too late
    parent = os.getpid()

    def set_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # we died between the fork and the call
            os._exit(1)

    return set_signal


class LocalCluster:
    """The nodes' processes. Names are node-1, node-2, …; logs lie beside the data as node-1.log."""

    def __init__(self, directory: Path, count: int = 3, shard_count: int = 12) -> None:
        """Writes the configurations; nothing runs yet."""
        self.directory = directory
        self.ports = choose_ports(count)
        self.names = [f"node-{number}" for number in range(1, count + 1)]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        cluster_id = f"demo-{os.urandom(4).hex()}"
        for index, name in enumerate(self.names):
            text = config_toml(index, self.ports, cluster_id, shard_count)
            (directory / f"{name}.toml").write_text(text, encoding="utf-8")

    @property
    def urls(self) -> list[str]:
        """Of all nodes, running or not."""
        return [ports.url for ports in self.ports]

    def start(self, name: str) -> None:
        """Starts a node, or starts it again."""
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "node.main", "run", str(self.directory / f"{name}.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A session of their own: Ctrl-C is for us, we stop them in order.
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509  # one prctl call, and we have no threads yet
            )

    def check(self) -> None:
        """Raises ClusterError when a node that should run has ended."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is not None:
                raise ClusterError(f"{name} ended with exit code {code}\n{self.log_tail(name)}")

    def kill(self, name: str) -> None:
        """SIGKILL: no goodbye to anybody, as when the power fails."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def log_tail(self, name: str) -> str:
        """The last lines of a node's log, indented."""
        try:
            lines = (self.directory / f"{name}.log").read_text(errors="replace").splitlines()
        except OSError:
            return "    (no log)"
        return (
            "\n".join(f"    {name}: {line}" for line in lines[-LOG_TAIL_LINES:])
            or f"    {name}: (log is empty)"
        )

    def stop(self) -> None:
        """SIGTERM to all, SIGKILL to those that do not listen."""
        for process in self._processes.values():
            process.terminate()
        end = time.monotonic() + STOP_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
