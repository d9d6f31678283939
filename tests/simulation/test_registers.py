"""The register of layouts under trouble: linearizable, never guessing, and the checker would notice if it were not."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.simulation.register_history import run
from tests.simulation.registers import BUGS

SEEDS, SOAK_SEEDS = 120, int(os.environ.get("SEEDS", "2000"))


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_versions_form_one_chain_and_every_acknowledged_commit_is_in_it(first: int) -> None:
    versions = 0
    for seed in range(first, first + 20):
        result = run(seed)
        assert result.violations == [], f"seed {seed}"
        versions += result.versions
    assert versions > 20 * 5, "too quiet to show anything"


def test_a_seed_repeats_a_run_exactly() -> None:
    assert run(7, seconds=20) == run(7, seconds=20) != run(8, seconds=20)


# A seed in which each planted mistake shows. A change of the machine or of the trouble moves them: `make soak` counts anew.
NOTICED = {
    "accept-without-promise-check": 0,
    "promise-not-persisted": 0,
    "acceptance-not-persisted": 4,
    "old-majority-only": 0,
    "new-majority-only": 0,
    "ballot-reused": 33,
    "compare-skipped": 3,
    "amnesiac-votes": 0,
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_checker_notices_a_planted_mistake(bug: str) -> None:
    """`on-disk-first`, `both-majorities`, `read-first`, `same-disk`: each mistake breaks one, and the chain with it."""
    # Beside the known seed its neighbours, so that a small change elsewhere does not ask for new numbers.
    first = NOTICED[bug]
    assert any(run(seed, frozenset([bug])).violations for seed in range(first, first + 20)), (
        f"nothing noticed {bug}"
    )


@pytest.mark.soak
@pytest.mark.parametrize("bug", BUGS)
def test_how_often_each_planted_mistake_is_noticed(bug: str) -> None:
    count = sum(bool(run(seed, frozenset([bug])).violations) for seed in range(60))
    print(f"| `{bug}` | {count} of 60 |")
    assert count >= 1 or bool(run(NOTICED[bug], frozenset([bug])).violations)


@pytest.mark.soak
def test_the_chain_holds_in_many_seeds() -> None:
    for seed in range(SEEDS, SEEDS + SOAK_SEEDS):
        assert run(seed).violations == [], f"seed {seed}"
