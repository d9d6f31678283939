"""One flipped byte anywhere in a replica at rest is found, or changes no answer."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from storage.errors import StorageError
from storage.records import Kind
from storage.replica import Replica
from storage.view import ClassConstraint
from tests.unit.storage.replica_writer import CONFIG, DIM, Writer, vector

COUNT = 60
ROOT = Path(__file__).resolve().parents[2]


def build(directory: Path) -> Writer:
    writer = Writer(directory)
    writer.put(*range(COUNT))
    writer.put(*range(10), seed=100)  # dead rows
    writer.put(*range(20), kind=Kind.USER)
    writer.write((Kind.ITEM, 11), write_id=b"w" * 16)
    return writer


def answers(replica: Replica) -> list[object]:
    """Everything that an app can see."""
    view, engine = replica.searchable
    queries = np.frombuffer(b"".join(vector(seed) for seed in (3, 30, 107)), np.float16).reshape(3, DIM)
    constraint = ClassConstraint(exclude=(5, 6))
    out: list[object] = [replica.get(kind, id) for kind in (Kind.ITEM, Kind.USER) for id in range(COUNT)]
    packed = replica.metadata(range(COUNT))
    if None in packed:
        raise StorageError("a search would leave this shard out")
    out.append(packed)
    for hits in engine.search(view, queries, 10, [ClassConstraint(), constraint, ClassConstraint()]):
        out.append((hits.ids.tolist(), hits.scores.tolist()))
    out.append((replica.written(b"w" * 16), replica.position, replica.epoch_starts))
    return out


def judge(directory: Path, wanted: list[object]) -> str:
    """ "refused", or "right"; anything else is the fault that this page is about."""
    try:
        replica = Replica.open(directory, shard=3, node_id="n1", config=CONFIG)
    except StorageError:
        return "refused"
    try:
        return "right" if answers(replica) == wanted else "WRONG"
    except StorageError:
        return "refused"
    finally:
        replica.abort()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    directory = tmp_path_factory.mktemp("flips") / "shard-003"
    writer = build(directory)
    wanted = answers(writer.replica)
    writer.replica.close()
    return directory, wanted


def flipped(source: Path, target: Path, name: str, position: int, bit: int) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    with (target / name).open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))
    return target


@pytest.mark.parametrize("name", ["items-0000000001.f16", "users-0000000001.f16"])
def test_flips_in_row_files(closed: tuple[Path, list[object]], tmp_path: Path, name: str) -> None:
    source, wanted = closed
    rng = random.Random(name)
    used = 4096 + 2 * DIM * (COUNT + 10)
    positions = [*range(48), *(rng.randrange(48, used) for _ in range(110))]
    seen = {judge(flipped(source, tmp_path / "s", name, p, rng.randrange(8)), wanted) for p in positions}
    assert seen == {"refused", "right"}, "right: a flip in a dead or unused row"


def test_flips_in_a_sealed_table_are_always_refused(
    closed: tuple[Path, list[object]], tmp_path: Path
) -> None:
    source, wanted = closed
    rng = random.Random(1)
    name = "table/data.mdb"
    size = (source / name).stat().st_size
    positions = [*range(0, 200, 2), *(rng.randrange(size) for _ in range(120))]
    for position in positions:
        assert judge(flipped(source, tmp_path / "s", name, position, rng.randrange(8)), wanted) == "refused"


def test_flips_in_an_unsealed_table_never_give_a_wrong_answer(tmp_path: Path) -> None:
    """After a crash LMDB maps what is there and may stop the process: so each part of them runs in one of its own."""
    writer = build(tmp_path / "source")
    writer.replica.checkpoint()
    size = (tmp_path / "source" / "table" / "data.mdb").stat().st_size
    writer.replica.abort()
    rng = random.Random(2)
    positions = [rng.randrange(size) for _ in range(120)]
    outcomes: list[str] = []
    while positions:
        run = subprocess.run(
            [sys.executable, "-c", _CHILD, str(tmp_path), *map(str, positions)],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        said = run.stdout.split()
        if run.returncode != 0 and len(said) < len(positions):
            said.append("died")  # loudly: that is detection, too
        assert said, run.stderr
        outcomes += said
        positions = positions[len(said) :]
    assert "WRONG" not in outcomes
    assert set(outcomes) <= {"right", "refused", "died"}
    assert outcomes.count("refused") > outcomes.count("died")


_CHILD = """
import sys
from pathlib import Path
from tests.properties import test_flips as t

root = Path(sys.argv[1])
fresh = t.build(root / "wanted") if not (root / "wanted").exists() else None
if fresh is not None:
    fresh.replica.close()
replica = t.Replica.open(root / "wanted", shard=3, node_id="n1", config=t.CONFIG)
wanted = t.answers(replica)
replica.abort()
for position in map(int, sys.argv[2:]):
    target = t.flipped(root / "source", root / "s", "table/data.mdb", position, position % 8)
    print(t.judge(target, wanted), flush=True)
"""
