"""Replicas whose bytes have changed at rest, in a real cluster: never a wrong answer; rebuilt from the others, or refused with a
clear line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import gmco
from router.ring import shard_of
from tests.processes.cluster import ROOT, Daemon, cluster

DIM = 16
SHARDS = 12
ITEMS = 600
# A graph in each shard, several segments, several checkpoints.
STORAGE = (
    f"dim = {DIM}\nwal_segment_bytes = 65536\nwal_segment_bytes_max = 0\n"
    'checkpoint_bytes = 65536\nengine = "hnsw"\ngraph_rows_min = 20\nm = 8\n'
    "ef_construction = 20\nef = 400"
)
# Files of a node, not of a shard: an operator's affair.
OWN = ("promises", "register", "layout", "placements", "node.id")


def vector(id_: int) -> list[float]:
    rng = random.Random(id_)
    return [rng.uniform(-1, 1) for _ in range(DIM)]


def fill(client: gmco.BlockingClient, first: int, count: int) -> None:
    items = [gmco.Item(i, vector(i), (i % 50,), {"n": i}) for i in range(first, first + count)]
    users = [gmco.User(i, vector(-i), (), {"n": i}) for i in range(first, first + count, 5)]
    client.put_items(items, ack="all")
    client.put_users(users, ack="all")
    client.delete_items(list(range(first, first + count, 10)), ack="all")


class Truth:
    """What every node must answer."""

    def __init__(self, client: gmco.BlockingClient, last: int) -> None:
        self.last = last
        self.seen = self.ask(client)

    def ask(self, client: gmco.BlockingClient) -> list[Any]:
        ids = list(range(1, self.last + 1))
        found: list[Any] = [(one.id, one.version, one.vector, one.metadata) if one else None
                            for one in client.get_items(ids, vector=True)]  # fmt: skip
        found += [(one.version, one.vector) if one else None for one in client.get_users(ids, vector=True)]
        for seed in range(3):
            answer = client.search(vector(10_000 + seed), 10)
            found.append([(hit.media_id, round(hit.score, 5)) for hit in answer.hits])
            assert answer.coverage is not None
            assert not answer.coverage.missing, answer
        return found

    def check(self, daemon: Daemon) -> None:
        with gmco.connect_blocking([daemon.url], timeout_s=10.0) as client:
            assert self.ask(client) == self.seen, f"{daemon.name} answers wrong:\n{daemon.tail()}"


def rows(daemons: list[Daemon]) -> list[dict[str, Any]]:
    with gmco.connect_blocking([daemons[0].url], timeout_s=10.0) as client:
        return list(client.shards()["replicas"])


def wait_whole(daemons: list[Daemon], timeout_s: float = 40.0) -> None:
    """All replicas are there, vote, and hold the same."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = rows(daemons)
        apart = [row for row in found if not row["votes"] or row["damaged"]]
        same = Counter((row["shard"], row["sequence"], *row["digests"].values()) for row in found)
        led = {row["shard"] for row in found if row["role"] == "primary"}
        if not apart and len(led) == SHARDS and set(same.values()) == {len(daemons)} and len(same) == SHARDS:
            return
        assert time.monotonic() < deadline, f"{apart or same}\n" + "\n".join(d.tail() for d in daemons)
        time.sleep(0.1)


def flip(path: Path, rng: random.Random) -> tuple[int, int]:
    """One bit somewhere in the used part of the file. Where, so that it can be taken back."""
    size = path.stat().st_size
    data = path.read_bytes()
    used = len(data.rstrip(b"\0")) or size
    # Mostly where something is: a flip in zeros is easy, or nobody's affair.
    at, bit = rng.randrange(used if rng.random() < 0.9 else size), rng.randrange(8)
    toggle(path, at, bit)
    return at, bit


def toggle(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def shard_files(daemon: Daemon, shard: int) -> dict[str, list[Path]]:
    """By sort, so that each sort is hit as often."""
    found: dict[str, list[Path]] = {}
    for path in (daemon.data / f"shard-{shard:03}").rglob("*"):
        if path.is_file() and path.stat().st_size and path.name != "lock.mdb":
            sort = next(
                (part for part in ("wal", "table", "index", "tail", "quarantine") if part in str(path)),
                "rows",
            )
            found.setdefault(sort, []).append(path)
    return found


def start_again(daemon: Daemon) -> int:
    """As systemd does, a few times when it ends at once. How often it ended by a signal."""
    died = 0
    for _ in range(6):
        daemon.start(wait=False)
        try:
            daemon.wait_ready()
        except AssertionError:
            if daemon.running:
                raise
            died += 1
            continue
        return died
    raise AssertionError(f"it does not start:\n{daemon.tail()}")


def flips(daemons: list[Daemon], truth: Truth, count: int, rng: random.Random) -> Counter[str]:
    """So many bits of one node's shards, each in another shard, while it is down; what became of them."""
    daemon = rng.choice(daemons)
    before = told(daemon, "damaged replica moved aside")
    graceful = rng.random() < 0.5
    if graceful:
        assert daemon.stop() == 0
    else:
        daemon.kill()
    hit = {}
    for shard in rng.sample(range(SHARDS), count):
        files = shard_files(daemon, shard)
        sort = rng.choice(sorted(files))
        path = rng.choice(files[sort])
        hit[shard] = (sort, f"{path.name} at {flip(path, rng)}")
    print(daemon.name, "stopped" if graceful else "killed", hit)
    died = start_again(daemon)
    truth.check(daemon)
    wait_whole(daemons)
    truth.check(daemon)
    moved = {one["shard"] for one in told(daemon, "damaged replica moved aside")[len(before) :]}
    assert moved <= set(hit), "one that was not hit was rebuilt"
    seen = Counter(
        f"{sort} {'rebuilt' if shard in moved else 'harmless'}" for shard, (sort, _) in hit.items()
    )
    seen["ended while opening"] += died
    return seen


def told(daemon: Daemon, event: str) -> list[dict[str, Any]]:
    lines = daemon.log.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if f'"event": "{event}"' in line]


def own_flips(daemons: list[Daemon], truth: Truth, count: int, rng: random.Random) -> Counter[str]:
    """Bits of a node's own files: it refuses to start and says which file, or nothing comes of it."""
    seen: Counter[str] = Counter()
    daemon = rng.choice(daemons)
    assert daemon.stop() == 0
    for _ in range(count):
        path = daemon.data / rng.choice([name for name in OWN if (daemon.data / name).exists()])
        kept = path.read_bytes()
        flip(path, rng)
        length = daemon.log.stat().st_size if daemon.log.exists() else 0
        daemon.start(wait=False)
        try:
            daemon.wait_ready()
        except AssertionError:
            assert not daemon.running
            said = daemon.log.read_text(errors="replace")[length:]
            last = said.strip().splitlines()[-1]
            assert "error[" in last, f"{path}: {said[-2000:]}"
            assert str(path) in last, f"{path}: {said[-2000:]}"
            seen[f"{path.name} refused"] += 1
            path.write_bytes(kept)
        else:
            seen[f"{path.name} harmless"] += 1
            truth.check(daemon)
            assert daemon.stop() == 0
    daemon.start()
    wait_whole(daemons)
    return seen


def run_flips(folder: Path, count: int, own: int, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    with cluster(folder, 3, storage=STORAGE, shard_count=SHARDS) as daemons:
        with gmco.connect_blocking([daemons[0].url], timeout_s=15.0) as client:
            fill(client, 1, ITEMS)
            wait_whole(daemons)
            truth = Truth(client, ITEMS)
        while count > 0:
            part = min(count, 10)
            seen += flips(daemons, truth, part, rng)
            count -= part
        seen += own_flips(daemons, truth, own, rng)
        for daemon in daemons:
            truth.check(daemon)
        # A damaged replica is kept for people to look at, the newest of each shard.
        for daemon in daemons:
            aside = Counter(path.name.partition(".")[0] for path in daemon.data.glob("shard-*.damaged-*"))
            assert not aside or max(aside.values()) == 1
        found = repair(daemons[0], "--all")
        assert all(one["equal"] for one in found), found
    print(dict(seen))
    assert sum(number for what, number in seen.items() if what.endswith("rebuilt")) > 0


def repair(daemon: Daemon, *args: str, code: int = 0) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "admin.cli", "repair", *args, "--node", daemon.url, "--output", "json"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_thirty_flipped_bits_give_no_wrong_answer_and_are_repaired(tmp_path: Path) -> None:
    run_flips(tmp_path, 30, 4, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))


@pytest.mark.soak
def test_a_thousand_flipped_bits_give_no_wrong_answer_and_are_repaired(tmp_path: Path) -> None:
    for part in range(10):
        run_flips(tmp_path / str(part), 100, 10, random.randrange(1 << 30))


def test_damage_found_by_a_read_is_answered_by_others_and_rebuilt_without_the_process(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, storage=STORAGE, shard_count=SHARDS) as daemons:
        with gmco.connect_blocking([daemons[0].url], timeout_s=15.0) as client:
            fill(client, 1, ITEMS)
            wait_whole(daemons)
            truth = Truth(client, ITEMS)
        # One that leads and one that follows: both answer for their own shards first.
        leader = {row["shard"]: row["node"] for row in rows(daemons) if row["role"] == "primary"}
        daemon = daemons[0]
        led = next(shard for shard, name in leader.items() if name == daemon.name)
        other = next(shard for shard, name in leader.items() if name != daemon.name)
        for shard in (led, other):
            for path in (daemon.data / f"shard-{shard:03}").glob("users-*.f16"):
                for at in range(4096, 4096 + 2 * DIM * 10, 2 * DIM):
                    toggle(path, at, 3)
        assert daemon.process is not None
        pid = daemon.process.pid
        deadline = time.monotonic() + 30
        while {one["shard"] for one in told(daemon, "damaged replica moved aside")} != {led, other}:
            truth.check(daemon)
            assert time.monotonic() < deadline, daemon.tail()
        wait_whole(daemons)
        truth.check(daemon)
        assert daemon.process.pid == pid
        assert daemon.running
        assert (daemon.data / f"shard-{led:03}.damaged-1").is_dir()
        assert daemon.status()["counters"]["rebuilt"] == 2


def test_a_single_copy_is_never_moved_away(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, storage=STORAGE, shard_count=1, replication=1) as (daemon,):
        with gmco.connect_blocking([daemon.url], timeout_s=15.0) as client:
            client.put_items([gmco.Item(i, vector(i), (), {"n": i}) for i in range(1, 50)])
        assert daemon.stop() == 0
        (path,) = (daemon.data / "shard-000").glob("items-*.f16")
        toggle(path, 4096 + 40, 2)
        daemon.start(wait=False)
        assert daemon.wait(30) != 0
        assert "error[damaged]" in daemon.tail()
        assert str(path) in daemon.tail().strip().splitlines()[-1]
        assert [one.name for one in daemon.data.glob("shard-*")] == ["shard-000"]
        toggle(path, 4096 + 40, 2)
        daemon.start()
        with gmco.connect_blocking([daemon.url], timeout_s=15.0) as client:
            assert None not in client.get_items(list(range(1, 50)))


def test_gmco_repair_compares_and_says_who_cannot_be(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, storage=STORAGE, shard_count=SHARDS) as daemons:
        with gmco.connect_blocking([daemons[0].url], timeout_s=15.0) as client:
            fill(client, 1, ITEMS)
            wait_whole(daemons)
            shard = shard_of(1, SHARDS)
            (one,) = repair(daemons[1], str(shard))
            assert one["equal"]
            assert set(one["replicas"].values()) == {"equal"}
            (primary,) = [
                row
                for row in client.shards()["replicas"]
                if row["shard"] == shard and row["role"] == "primary"
            ]
            assert primary["repair"] == f"equal at {one['sequence']}"
            away = next(daemon for daemon in daemons[1:] if daemon.name != primary["node"])
            away.signal(signal.SIGSTOP)
            (one,) = repair(daemons[0], str(shard), code=8)
            away.signal(signal.SIGCONT)
            assert one["replicas"][away.name] in ("silent", "behind")
