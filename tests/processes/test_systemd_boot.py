"""The unit under a real systemd as process 1, in a container on top of this machine's own files. Slow: `make soak`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.cluster import ROOT

pytestmark = pytest.mark.soak

SYSTEM_PYTHON = "/usr/bin/python3"  # the unit hides /home and /root, where others may live
PREFIX = Path("opt/gmco/.venv")
SCRIPT = "#!/opt/gmco/.venv/bin/python\nimport sys\nfrom node.main import main\nsys.exit(main())\n"
CONFIG = '[node]\nname = "node-1"\ndata_dir = "/var/lib/gmco/data"\n[storage]\ndim = 16\n'
CLIENT = """
import gmco, sys
with gmco.connect_blocking(["ws://127.0.0.1:7400"], timeout_s=10) as client:
    if sys.argv[1] == "write":
        client.put_items([gmco.Item(i, [1.0, float(i)] * 8, (), {}) for i in range(1000)])
    assert all(client.get_items(list(range(1000)))), "an item is gone"
"""


def _needed() -> str | None:
    """What is missing here, as a reason to skip."""
    if os.geteuid() != 0:
        return "mounts and containers need root"
    if shutil.which("systemd-nspawn") is None:
        return "systemd-nspawn is missing; on Debian: apt install systemd-container"
    ask = [SYSTEM_PYTHON, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
    found = (
        subprocess.run(ask, capture_output=True, text=True).stdout.strip()
        if Path(SYSTEM_PYTHON).exists()
        else ""
    )
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        None
        if found == ours
        else f"{SYSTEM_PYTHON} with venv is of version {found or 'none'}; {ours} is needed"
    )


class Machine:
    """A booted container. `run` runs a command in it."""

    def __init__(self, root: Path, log: Path) -> None:
        command = [
            "systemd-nspawn",
            "-D",
            str(root),
            "-b",
            "--register=no",
            "--keep-unit",
            "--private-network",
        ]
        with log.open("wb") as console:
            self.process = subprocess.Popen(
                [*command, "--console=pipe", "systemd.unit=basic.target"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )

    def run(self, *command: str, check: bool = True) -> str:
        enter = ["nsenter", "-t", self._init(), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--"]
        done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def _init(self) -> str:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        deadline = time.monotonic() + 20
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline, "the container does not start"
            time.sleep(0.1)
        return found[0]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)  # an orderly power-off
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)

    def show(self, name: str) -> str:
        return self.run("systemctl", "show", "gmco-node", "--value", "-p", name)

    def until(self, name: str, value: str, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while (
            found := self.run("systemctl", "show", "gmco-node", "--value", "-p", name, check=False)
        ) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            assert self.process.poll() is None, "the container has ended"
            time.sleep(0.2)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    if reason := _needed():
        pytest.skip(reason)
    memory, root = tmp_path / "memory", tmp_path / "root"
    memory.mkdir()
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(memory)], check=True)
    try:
        for name in ("upper", "work"):
            (memory / name).mkdir()
        layers = f"lowerdir=/,upperdir={memory}/upper,workdir={memory}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(root)], check=True)
        _install(root)
        booted = Machine(root, tmp_path / "console.log")
        try:
            yield booted
        finally:
            booted.end()
    finally:
        subprocess.run(["umount", str(root)])
        subprocess.run(["umount", str(memory)], check=True)


def _install(root: Path) -> None:
    """As docs/daemon.md says, but without a package index."""
    subprocess.run(
        ["chroot", str(root), SYSTEM_PYTHON, "-m", "venv", "--without-pip", f"/{PREFIX}"], check=True
    )
    packages = root / PREFIX / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    here = Path(sysconfig.get_path("purelib"))
    shutil.copytree(here, packages, ignore=shutil.ignore_patterns("__editable__*"), dirs_exist_ok=True)
    for name in ("node", "gossip", "router", "storage", "admin"):
        shutil.copytree(ROOT / name, packages / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "gmco.py", packages)
    script = root / PREFIX / "bin/gmco-node"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    etc = root / "etc"
    for folder in ("gmco", "sysusers.d", "tmpfiles.d"):
        (etc / folder).mkdir(exist_ok=True)
    shutil.copy(ROOT / "systemd/gmco-node.service", etc / "systemd/system/")
    shutil.copy(ROOT / "systemd/gmco.sysusers", etc / "sysusers.d/gmco.conf")
    shutil.copy(ROOT / "systemd/gmco.tmpfiles", etc / "tmpfiles.d/gmco.conf")
    (etc / "gmco/node.toml").write_text(CONFIG)
    (etc / "systemd/system/network-online.target").unlink(missing_ok=True)
    (etc / "systemd/system/network-online.target").symlink_to("/dev/null")  # there is no network to wait for


def test_the_unit_lives_under_systemd(machine: Machine) -> None:
    machine.until("LoadState", "loaded", 60)
    machine.run("systemctl", "start", "gmco-node")  # returns when it is ready
    assert machine.show("ActiveState") == "active"
    assert machine.show("StatusText") == "serving 12 shards"
    assert machine.run("stat", "-c", "%U:%G %a", "/var/lib/gmco", "/etc/gmco").split("\n") == [
        "gmco:gmco 750",
        "root:gmco 750",
    ]
    client = ["/opt/gmco/.venv/bin/python", "-c", CLIENT]
    machine.run(*client, "write")

    machine.run("systemctl", "stop", "gmco-node")
    assert (machine.show("Result"), machine.show("ExecMainStatus")) == ("success", "0")
    machine.run("systemctl", "start", "gmco-node")
    machine.run(*client, "read")

    machine.run("systemctl", "kill", "-s", "STOP", "gmco-node")
    machine.until("NRestarts", "1")
    machine.until("ActiveState", "active")
    assert "result 'watchdog'" in machine.run("journalctl", "-u", "gmco-node", "-o", "cat", "--no-pager")
    machine.run(*client, "read")

    machine.run("sed", "-i", "s/^dim/dmi/", "/etc/gmco/node.toml")
    machine.run("systemctl", "restart", "gmco-node", check=False)
    time.sleep(5)  # longer than RestartSec: were it tried again, it would show
    assert (machine.show("ActiveState"), machine.show("ExecMainStatus")) == ("failed", "2")
    assert machine.show("NRestarts") == "0"
    assert "OK" in machine.run("systemd-analyze", "security", "gmco-node", "--no-pager").splitlines()[-1]
