"""How many hits are enough: against the binomial itself."""

from __future__ import annotations

import math

import pytest

from router import tail


def _above(k: int, p: float, n: int) -> float:
    """P(Binomial(k, p) > n)."""
    return math.fsum(math.comb(k, i) * p**i * (1 - p) ** (k - i) for i in range(n + 1, k + 1))


@pytest.mark.parametrize("k", [1, 4, 5, 10, 50, 100, 300])
@pytest.mark.parametrize(
    ("numerator", "denominator"), [(1, 100), (3, 100), (1, 12), (4, 12), (1, 2), (11, 12)]
)
def test_it_is_the_least_that_is_seldom_too_few(k: int, numerator: int, denominator: int) -> None:
    found = tail.enough(k, numerator, denominator)
    p = numerator / denominator
    assert found <= k
    assert _above(k, p, found) <= tail.MISS * (1 + 1e-9)
    if found > min(k, tail.K_MIN):
        assert _above(k, p, found - 1) > tail.MISS * (1 - 1e-9)


def test_all_shards_are_asked_for_k_and_large_numbers_are_no_trouble() -> None:
    assert tail.enough(50, 12, 12) == 50
    assert tail.enough(3, 1, 100) == 3
    assert 9_850 < tail.enough(10_000, 99, 100) <= 10_000
    assert 100 < tail.enough(10_000, 1, 100) < 150
    assert tail.enough(10_000, 65_534, 65_535) == 10_000


def test_who_has_no_more_is_asked_for_none() -> None:
    assert tail.more(10, 50, last=49) == 0  # its last hit is the last of the best
    assert tail.more(10, 50, last=50) == 0  # it is not among them
    assert tail.more(10, 50, last=48) == 11
    assert tail.more(10, 50, last=9) == 50  # all of the best so far are its own
