"""A shard's replicas under trouble: nothing acknowledged is lost, whatever happens, and the checker would notice if it were."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.simulation.history import run
from tests.simulation.shards import BUGS, WITNESS_BUGS

# So many seeds in `make test`; `make soak SEEDS=…` asks for more.
SEEDS, WITNESSED_SEEDS, SOAK_SEEDS = 60, 18, int(os.environ.get("SEEDS", "1000"))


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.parametrize("first", range(0, SEEDS, 6))
def test_nothing_acknowledged_is_lost_while_replicas_move(first: int) -> None:
    results = []
    for seed in range(first, first + 6):
        result = run(seed)
        assert result.violations == [], f"seed {seed}"
        assert result.acknowledged > 100, f"seed {seed}: too quiet to show anything"
        results.append(result)
    # Each has a move at the least; and some show the rare things.
    assert all(result.changes for result in results)
    assert any(result.dismissed and result.outlived and result.points.get("installed") for result in results)


def test_five_replicas_keep_the_same_promises() -> None:
    for seed in range(3):
        assert run(seed, replicas=5, seconds=40).violations == [], f"seed {seed}"


def test_replicas_that_stay_where_they_are_keep_them_too() -> None:
    for seed in range(3):
        result = run(seed, count=3, moves=False)
        assert result.violations == [], f"seed {seed}"


@pytest.mark.parametrize("first", range(0, WITNESSED_SEEDS, 6))
def test_two_replicas_and_a_witness_keep_them_while_replicas_move(first: int) -> None:
    results = []
    for seed in range(first, first + 6):
        result = run(seed, replicas=2, witness=True)
        assert result.violations == [], f"seed {seed}"
        assert result.acknowledged > 100, f"seed {seed}: too quiet to show anything"
        results.append(result)
    assert all(result.changes for result in results)
    assert any(result.dismissed and result.points.get("remembered") for result in results)


def test_two_replicas_and_a_witness_on_as_many_hosts() -> None:
    for seed in range(3):
        assert run(seed, count=3, replicas=2, witness=True, moves=False).violations == [], f"seed {seed}"


def test_a_shard_that_leaves_its_founders_is_not_founded_again() -> None:
    for seed in range(3):
        assert run(seed, count=7).violations == [], f"seed {seed}"


@pytest.mark.parametrize("first", [3, 9, 11])
def test_by_force_nothing_is_lost_but_with_all_disks_that_have_it(first: int) -> None:
    """`forced-alone`: also when those who were given up go on, and come back."""
    results = [run(seed, force=True, seconds=40) for seed in range(first, first + 2)]
    assert [result.violations for result in results] == [[], []]
    assert any(result.points.get("forced") for result in results), "too quiet to show anything"


def test_a_seed_repeats_a_run_exactly() -> None:
    assert run(7, seconds=20) == run(7, seconds=20) != run(8, seconds=20)


# A seed in which each planted mistake shows. A change of the machines or of the trouble moves them: `make soak` counts anew.
NOTICED = {
    "ack-before-fsync": 0,
    "stream-unsynced": 0,
    "promise-not-persisted": 0,
    "no-start-wait": 24,
    "log-not-compared": 12,
    "lower-epoch-accepted": 2,
    "write-on-after-restart": 0,
    "tail-cut-without-reoffer": 0,
    "side-file-deleted-early": 6,
    "stayed-row-is-proof": 0,
    "tombstone-purged-early": 0,
    "amnesiac-votes": 0,
    "lease-not-checked": 25,
    "old-majority-only": 0,
    "new-majority-only": 1,
    "change-unsettled": 0,
    "change-retried": 0,
    "learner-votes": 0,
    "dismissed-early": 3,
    "dismissed-with-a-tail": 2,
    "wiped-keeps-id": 0,
    "leader-ignored": 0,
    "forced-low": 3,
    "witness-counted": 0,
    "witness-forgets-promise": 0,
    "witness-forgets-placement": 1,
    "unsealed": 6,
}


def noticed(bug: str, seed: int) -> bool:
    witness = bug in WITNESS_BUGS
    try:
        return bool(
            run(seed, replicas=2 if witness else 3, witness=witness, bugs=frozenset([bug])).violations
        )
    except AssertionError:
        return True  # the machines themselves noticed


@pytest.mark.parametrize("bug", BUGS + WITNESS_BUGS)
def test_the_checker_notices_a_planted_mistake(bug: str) -> None:
    # Beside the known seed its neighbours, so that a small change elsewhere does not ask for new numbers.
    first = NOTICED[bug]
    assert any(noticed(bug, seed) for seed in (first, *range(first + 1, first + 20))), (
        f"nothing noticed {bug}"
    )


@pytest.mark.soak
@pytest.mark.parametrize("bug", BUGS + WITNESS_BUGS)
def test_how_often_each_planted_mistake_is_noticed(bug: str) -> None:
    count = sum(noticed(bug, seed) for seed in range(60))
    print(f"| `{bug}` | {count} of 60 |")
    assert count >= 1


@pytest.mark.soak
def test_nothing_acknowledged_is_lost_in_many_seeds() -> None:
    for seed in range(SEEDS, SEEDS + SOAK_SEEDS):
        assert run(seed).violations == [], f"seed {seed}"


@pytest.mark.soak
def test_nothing_acknowledged_is_lost_with_a_witness_in_many_seeds() -> None:
    for seed in range(WITNESSED_SEEDS, WITNESSED_SEEDS + SOAK_SEEDS // 2):
        assert run(seed, replicas=2, witness=True).violations == [], f"seed {seed}"
