"""A shard's replicas under trouble: nothing acknowledged is lost, whatever happens, and the checker would notice if it were."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.simulation.history import run
from tests.simulation.shards import BUGS

# So many seeds in `make test`; `make soak SEEDS=…` asks for more.
SEEDS, SOAK_SEEDS = 48, int(os.environ.get("SEEDS", "1000"))


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.parametrize("first", range(0, SEEDS, 8))
def test_nothing_acknowledged_is_lost(first: int) -> None:
    for seed in range(first, first + 8):
        result = run(seed)
        assert result.violations == [], f"seed {seed}"
        assert result.acknowledged > 100, f"seed {seed}: too quiet to show anything"


def test_five_replicas_keep_the_same_promises() -> None:
    for seed in range(6):
        assert run(seed, count=5, seconds=40).violations == [], f"seed {seed}"


def test_a_seed_repeats_a_run_exactly() -> None:
    assert run(7, seconds=20) == run(7, seconds=20) != run(8, seconds=20)


# A seed in which each planted mistake shows. A change of the machines or of the trouble moves them: `make soak` counts anew.
NOTICED = {
    "ack-before-fsync": 0,
    "stream-unsynced": 0,
    "promise-not-persisted": 7,
    "no-start-wait": 12,
    "log-not-compared": 3,
    "lower-epoch-accepted": 2,
    "write-on-after-restart": 0,
    "tail-cut-without-reoffer": 2,
    "side-file-deleted-early": 33,
    "tombstone-purged-early": 0,
    "amnesiac-votes": 1,
    "lease-not-checked": 1,
}


def noticed(bug: str, seed: int) -> bool:
    try:
        return bool(run(seed, bugs=frozenset([bug])).violations)
    except AssertionError:
        return True  # the machines themselves noticed


@pytest.mark.parametrize("bug", BUGS)
def test_the_checker_notices_a_planted_mistake(bug: str) -> None:
    # Beside the known seed its neighbours, so that a small change elsewhere does not ask for new numbers.
    first = NOTICED[bug]
    assert any(noticed(bug, seed) for seed in (first, *range(first + 1, first + 20))), (
        f"nothing noticed {bug}"
    )


@pytest.mark.soak
@pytest.mark.parametrize("bug", BUGS)
def test_how_often_each_planted_mistake_is_noticed(bug: str) -> None:
    count = sum(noticed(bug, seed) for seed in range(60))
    print(f"| `{bug}` | {count} of 60 |")
    assert count >= 1


@pytest.mark.soak
def test_nothing_acknowledged_is_lost_in_many_seeds() -> None:
    for seed in range(SEEDS, SEEDS + SOAK_SEEDS):
        assert run(seed).violations == [], f"seed {seed}"
