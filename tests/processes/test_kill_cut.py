"""`kill -9` of a process that writes, saves and cuts: each durable write is in the log or a side file, and its row is there."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.batch import Batch
from storage.records import Kind, Mark, Operation, Version, decode, split
from storage.replica import Replica
from storage.side import SideFile
from tests.unit.storage.replica_writer import CONFIG, vector

ROOT = Path(__file__).parents[2]


def life(directory: Path, seed: int, epoch: int) -> None:
    """Until it is killed. Says "open", then each durable write: id, epoch, sequence; and each cut."""
    rng = random.Random(seed)
    replica = Replica.open(directory, shard=3, node_id="n1", config=CONFIG)
    print("open", flush=True)
    while True:
        epoch += 1
        batch = Batch(epoch, replica.position.sequence, 1)
        batch.add_mark(Mark.EPOCH, b"p%d" % epoch)
        for _ in range(rng.randrange(1, 30)):
            ids = [rng.randrange(60) for _ in range(rng.randrange(1, 20))]
            for id in ids:
                batch.add(
                    [(Operation.PUT, Kind.ITEM, id, vector(id), (id,), b"m" * 200)],
                    rng.randbytes(16),
                )
            replica.append(batch.blobs, len(ids))
            replica.apply(batch.records)
            for one in batch.records:
                if one.kind is Kind.ITEM:
                    print(one.id, *one.version)
            sys.stdout.flush()
            batch = Batch(epoch, replica.position.sequence, 1)
            if rng.random() < 0.1:
                replica.checkpoint()
        first = replica.statistics()["log"]["first_sequence"]
        last = replica.position.sequence
        at = rng.randrange(max(first, last - 300), last)
        print("cut", flush=True)
        replica.cut(at)


def records(file: SideFile) -> list[Version]:
    out, offset = list[Version](), 0
    while True:
        blobs, offset = file.read(offset, 1 << 20)
        if not blobs:
            return out
        out += [decode(blob).version for blob in blobs]


def lives(directory: Path, cycles: int, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    known: set[tuple[int, int, int]] = set()
    epoch = cuts = 0
    said = directory.with_name("said")
    for cycle in range(cycles):
        code = (
            "import sys; from pathlib import Path; from tests.processes.test_kill_cut import life; "
            "life(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
        )
        # A file and not a pipe: a child that waits for its reader would not be killed in the middle of anything.
        with said.open("w") as out:
            child = subprocess.Popen(
                [sys.executable, "-c", code, str(directory), str(rng.randrange(1 << 30)), str(epoch)],
                stdout=out, cwd=ROOT,
            )  # fmt: skip
        deadline = time.monotonic() + 30
        while not said.stat().st_size:
            assert child.poll() is None, "the child did not open the replica"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        child.kill()
        child.wait()
        text = said.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()
        cuts += lines.count("cut")
        for line in lines:
            with contextlib.suppress(ValueError):
                id, epoch_, sequence = map(int, line.split())
                known.add((id, epoch_, sequence))
        epoch = max((one[1] for one in known), default=0) + 1
        check(directory, known, cycle)
    assert cuts > cycles // 2, "it hardly cut"


def check(directory: Path, known: set[tuple[int, int, int]], cycle: int) -> None:
    replica = Replica.open(directory, shard=3, node_id="n1", config=CONFIG)
    kept: set[tuple[int, int]] = set()
    first = after = replica.statistics()["log"]["first_sequence"] - 1
    while data := replica.read_log(after, 1 << 20):
        for _, record in split(data):
            after = record.sequence
            kept.add(record.version)
    assert after == replica.position.sequence == replica.logged
    for file in replica.side_files():
        kept.update(records(file))
    for id, epoch, sequence in known:
        there = replica.version_of(Kind.ITEM, id)
        assert there is not None, f"cycle {cycle}: item {id}"
        assert there >= (epoch, sequence), f"cycle {cycle}: item {id}"
        if sequence > first:
            assert (epoch, sequence) in kept, f"cycle {cycle}: {epoch}, {sequence} is in no file"
    replica.close()


def test_a_kill_in_the_middle_of_cuts_loses_nothing(tmp_path: Path) -> None:
    lives(tmp_path / "shard-003", 8, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))


@pytest.mark.soak
def test_many_kills_in_the_middle_of_cuts_lose_nothing(tmp_path: Path) -> None:
    lives(tmp_path / "shard-003", 150, int(os.environ.get("GMCO_SEED", "0")) or random.randrange(1 << 30))
