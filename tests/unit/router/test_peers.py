"""What is seen of a peer, and the hedge budget."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.peers import SAMPLES_MIN, TOKENS_MAX, HedgeBudget, Peer, usual_p95_s


def _answer(peer: Peer, took_s: float) -> None:
    peer.answered(0.0, took_s, peer.began(0.0))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.0005, 0.005, 0.05])
def test_the_p95_is_about_where_one_in_twenty_is_above(seed: int, scale: float) -> None:
    random, peer = Random(seed), Peer()
    above = count = 0
    for number in range(4_000):
        took_s = scale * random.lognormvariate(0, 0.5)
        if number >= 1_000:
            count += 1
            above += took_s > peer.p95_s
        _answer(peer, took_s)
    assert 0.03 < above / count < 0.08
    true = scale * math.exp(0.5 * 1.645)
    assert 0.6 * true < peer.p95_s < 1.6 * true


def test_what_is_usual_follows_most_peers_and_not_a_bad_one() -> None:
    peers = [Peer() for _ in range(3)]
    assert usual_p95_s(peers) == 0.0
    for _ in range(100):
        for peer in peers:
            _answer(peer, 0.002)
    usual_s = usual_p95_s(peers)
    assert 0.001 < usual_s < 0.004
    for bad in peers:
        for _ in range(60):
            bad.failed(0.0, 0.03, "deadline_exceeded", bad.began(0.0), hurried=False)
        assert not bad.breaker.closed
        if bad is peers[0]:
            assert usual_p95_s(peers) == usual_s
    assert usual_p95_s(peers) > 0.03, "all of them: they get the time that they take"


def test_a_peer_that_was_slow_is_thought_better_of_after_a_while() -> None:
    slow, quick = Peer(), Peer()
    _answer(slow, 0.06)
    _answer(quick, 0.002)
    assert slow.load_s(0.0) > quick.load_s(0.0)
    # The quick one is asked all the time.
    quick.answered(12.0, 0.002, quick.began(12.0))
    assert slow.load_s(12.0) < quick.load_s(12.0)
    slow.began(12.0)
    assert slow.load_s(12.0) == pytest.approx(2 * 0.06 / 64)


def test_little_is_known_at_first_and_nothing_is_made_of_it() -> None:
    peer = Peer()
    for _ in range(SAMPLES_MIN - 1):
        _answer(peer, 0.5)
        assert peer.hedge_after_s() is None
    _answer(peer, 0.5)
    assert peer.hedge_after_s() is not None


def test_what_is_not_its_fault_does_not_count_against_it() -> None:
    peer = Peer()
    for code in ("overloaded", "session_behind", "shutting_down") * 20:
        peer.failed(0.0, 0.001, code, peer.began(0.0), hurried=False)
    for _ in range(60):
        peer.failed(0.0, 0.002, "deadline_exceeded", peer.began(0.0), hurried=True)
        peer.given_up(peer.began(0.0))
    assert peer.breaker.closed
    assert peer.in_flight == 0
    for _ in range(5):
        peer.failed(0.0, 0.001, "internal", peer.began(0.0), hurried=False)
    assert not peer.breaker.closed


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=300), st.floats(0, 20))
def test_hedges_never_exceed_their_part_of_the_messages(
    steps: list[tuple[bool, int]], percent: float
) -> None:
    budget = HedgeBudget(percent)
    for first, count in steps:
        if first:
            budget.first(count)
        else:
            budget.take(count)
        assert budget.hedges <= percent / 100 * budget.firsts + 1e-6


def test_a_quiet_hour_pays_for_no_storm() -> None:
    budget = HedgeBudget(5)
    budget.first(1_000_000)
    assert sum(budget.take(1) for _ in range(1_000)) == TOKENS_MAX
