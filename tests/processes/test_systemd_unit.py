"""The unit as systemd's own tools see it, and the daemon as a service manager does. docs/daemon.md has the rest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes.cluster import ROOT, cluster

UNIT = ROOT / "systemd" / "gmco-node.service"
NEWEST_KEY_SYSTEMD = 252
# Tenths of systemd's exposure, of 100; a line of hardening that is lost shows here.
EXPOSURE_MAX = 15


def _analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is missing; on Debian: apt install systemd")
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.split()[
        1
    ]
    if int(version.split(".")[0].split("~")[0]) < NEWEST_KEY_SYSTEMD:
        pytest.skip(f"systemd-analyze is of version {version}; {NEWEST_KEY_SYSTEMD} is needed")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60)


def test_systemd_finds_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    executable = Path(sys.executable).with_name("gmco-node")
    unit.write_text(UNIT.read_text().replace("/opt/gmco/.venv/bin/gmco-node", str(executable)))
    done = _analyze("verify", "--man=no", "--recursive-errors=no", str(unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_hardening_is_all_there() -> None:
    done = _analyze("security", "--offline=yes", f"--threshold={EXPOSURE_MAX}", "--no-pager", str(UNIT))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_account_and_the_folders_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for tool, file in (("systemd-sysusers", "gmco.sysusers"), ("systemd-tmpfiles", "gmco.tmpfiles")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing; on Debian: apt install systemd")
        # An empty root of its own: nothing of this machine is touched.
        command = [tool, f"--root={tmp_path}", str(ROOT / "systemd" / file)]
        if tool == "systemd-tmpfiles":
            command.insert(1, "--create")
            if os.geteuid() != 0:
                pytest.skip("folders that belong to root can only be made by root")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert "gmco" in (tmp_path / "etc" / "passwd").read_text()
    assert (tmp_path / "var" / "lib" / "gmco").stat().st_mode & 0o777 == 0o750


def _until(manager: socket.socket, key: str) -> list[dict[str, str]]:
    """What was sent, up to a message with `key` and with it."""
    said: list[dict[str, str]] = []
    deadline = time.monotonic() + 30
    while not said or key not in said[-1]:
        assert time.monotonic() < deadline, f"no {key} among {said}"
        said.append(dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines()))
    return said


def test_ready_comes_after_recovery_and_each_shard_earns_time(tmp_path: Path) -> None:
    with (
        cluster(tmp_path, 1, replication=1, shard_count=6) as (daemon,),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        daemon.kill()
        daemon.log.unlink()
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        daemon.start(wait=False, env={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"})
        *before, ready = _until(manager, "READY")
        assert daemon.process is not None
        assert ready == {"READY": "1", "MAINPID": str(daemon.process.pid), "STATUS": "serving 6 shards"}
        earned = [one["STATUS"] for one in before if "EXTEND_TIMEOUT_USEC" in one]
        assert sorted(earned) == [f"recovered {n} of 6 shards" for n in range(1, 7)]
        events = [json.loads(line)["event"] for line in daemon.log.read_text().splitlines()]
        assert events.index("ready") > max(i for i, event in enumerate(events) if event == "recovered")
        for _ in range(3):
            _until(manager, "WATCHDOG")
        daemon.signal(signal.SIGTERM)
        _until(manager, "STOPPING")
        for _ in range(6):
            _until(manager, "EXTEND_TIMEOUT_USEC")
        assert daemon.wait(30) == 0
