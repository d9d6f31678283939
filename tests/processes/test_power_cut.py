"""Power cuts under one writing node of three: its file system is shut down in the middle of writing (what was not flushed is
gone), the process is killed, the file system mounted again; nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gmco
from tests.processes.cluster import Daemon, free_ports, member, put_down
from tests.processes.ledger import DIM, TIMEOUT_S, Writer, wait_alike

SIZE_MIB = 512
TOOLS = ("mkfs.xfs", "xfs_io", "mount", "umount", "losetup")
SETTLE_S = 40.0
CAP_SYS_ADMIN = 21


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
    return done.stdout


class Disk:
    """An XFS in a file, through a loop device."""

    def __init__(self, folder: Path) -> None:
        self.image, self.folder = folder / "image", folder / "disk"
        self.folder.mkdir()
        with self.image.open("wb") as file:
            file.truncate(SIZE_MIB << 20)
        run("mkfs.xfs", "-q", str(self.image))
        self.mount()

    def mount(self) -> None:
        run("mount", "-o", "loop", str(self.image), str(self.folder))

    def cut(self, *, flush: bool) -> None:
        """No write reaches it from now on. flush: its own log is written first, as if the cut came later."""
        run("xfs_io", "-x", "-c", f"shutdown{' -f' if flush else ''}", str(self.folder))

    def unmount(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            done = subprocess.run(["umount", str(self.folder)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.02)


def cannot() -> str:
    """What this machine lacks; empty: nothing, so whatever fails from here on is a failure."""
    if os.geteuid() != 0 or not effective_capabilities() >> CAP_SYS_ADMIN & 1:
        return "mounting an XFS needs root, with the right to mount (CAP_SYS_ADMIN)"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (on Debian: apt install xfsprogs mount)"
    free = subprocess.run(["losetup", "-f"], capture_output=True, text=True, timeout=60, check=False)
    if free.returncode:
        return f"there is no loop device: {free.stderr.strip()}"
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", "xfs"], capture_output=True, timeout=60, check=False)
    if "xfs" not in Path("/proc/filesystems").read_text().split():
        return "this kernel knows no XFS"
    return ""


def effective_capabilities() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))


@pytest.fixture
def disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Disk]:
    if why := cannot():
        # Loudly: who reads only that all is green must not think that power was cut.
        with capfd.disabled():
            print(f"\nNO POWER CUTS WERE TESTED: {why}")
        pytest.skip(f"no power cuts were tested: {why}")
    made = Disk(tmp_path)
    try:
        yield made
    finally:
        subprocess.run(["umount", "-l", str(made.folder)], capture_output=True, check=False)


def nodes(folder: Path, disk: Path) -> list[Daemon]:
    """Three, the first of which lives on the disk that loses its power."""
    ports = free_ports(6)
    # Its settings are not on that disk: nobody has flushed those.
    (folder / "node-1").symlink_to(disk)
    storage = f"dim = {DIM}\nwal_segment_bytes = 65536\nwal_segment_bytes_max = 0\ncheckpoint_bytes = 65536"
    return [
        member(
            folder,
            f"node-{i + 1}",
            ports[2 * i : 2 * i + 2],
            ports[:1],
            bootstrap=3,
            storage=storage,
            shard_count=2,
        )
        for i in range(3)
    ]


def wait_writing(writers: list[Writer]) -> None:
    """It is cut from a node that is being written to, not from one that waits for an election."""
    before, deadline = sum(writer.writes for writer in writers), time.monotonic() + SETTLE_S
    while sum(writer.writes for writer in writers) < before + 20:
        assert time.monotonic() < deadline, "nobody can write"
        time.sleep(0.01)


def lead(client: gmco.BlockingClient, name: str) -> None:
    """That node leads, so that what is acknowledged with ack=primary is on its disk alone."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        away = [
            row["shard"]
            for row in client.shards()["replicas"]
            if row["role"] == "primary" and row["node"] != name
        ]
        if not away:
            return
        try:
            for shard in away:
                client.failover(shard, to=name)
        except gmco.GmcoError as error:
            assert time.monotonic() < deadline, error
            time.sleep(0.1)


def power_cuts(folder: Path, disk: Disk, cycles: int, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    daemons = nodes(folder, disk.folder)
    victim = daemons[0]
    stop = threading.Event()
    writers = [
        Writer([daemon.url for daemon in daemons], n, stop, ["primary", "primary", "quorum"])
        for n in range(1, 5)
    ]
    led = 0
    try:
        for daemon in daemons:
            daemon.start(wait=False)
        for daemon in daemons:
            daemon.wait_ready()
        for writer in writers:
            writer.start()
        with gmco.connect_blocking([daemon.url for daemon in daemons], timeout_s=TIMEOUT_S) as client:
            for _ in range(cycles):
                if rng.random() < 0.5:
                    lead(client, victim.name)
                    led += 1
                wait_writing(writers)
                time.sleep(0.2 * rng.random())
                disk.cut(flush=rng.random() < 0.5)
                # What the disk has refused must not be acknowledged either.
                time.sleep(0.3 * rng.random())
                if victim.running:
                    victim.kill()
                disk.unmount()
                disk.mount()
                before = victim.log.stat().st_size
                victim.start()
                said = victim.log.read_text(errors="replace")[before:]
                assert "damaged replica moved aside" not in said, (
                    f"a torn tail was taken for damage:\n{said[:4000]}"
                )
            stop.set()
            for writer in writers:
                writer.join(2 * TIMEOUT_S)
            wait_alike(client)
            for writer in writers:
                writer.check_end(client)
    finally:
        stop.set()
        put_down(daemons)
    problems = [problem for writer in writers for problem in writer.problems]
    assert not problems, "\n".join(problems)
    written = sum(writer.writes for writer in writers)
    print(
        f"{cycles} power cuts, {led} under a primary; {written} writes acknowledged, "
        f"{sum(writer.failed_writes for writer in writers)} failed, 0 lost"
    )
    assert written >= 20 * cycles, "the writers hardly wrote"


def test_nothing_acknowledged_is_lost_by_power_cuts(tmp_path: Path, disk: Disk) -> None:
    cycles = int(os.environ.get("GMCO_CYCLES", "3"))
    power_cuts(tmp_path, disk, cycles, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))


@pytest.mark.soak
def test_nothing_acknowledged_is_lost_by_two_hundred_power_cuts(tmp_path: Path, disk: Disk) -> None:
    power_cuts(tmp_path, disk, 200, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))
