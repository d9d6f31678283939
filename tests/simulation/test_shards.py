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


@pytest.mark.parametrize("bug", BUGS)
def test_the_checker_catches_a_planted(bug: str) -> None:
    """How many seeds of a hundred catch each is in docs/testing.md; here one has to."""
    for seed in range(60):
        try:
            if run(seed, bugs=frozenset([bug])).violations:
                return
        except AssertionError:
            return  # the machines themselves noticed
    pytest.fail(f"60 seeds did not notice {bug}")


@pytest.mark.soak
def test_nothing_acknowledged_is_lost_in_many_seeds() -> None:
    for seed in range(SEEDS, SEEDS + SOAK_SEEDS):
        assert run(seed).violations == [], f"seed {seed}"
