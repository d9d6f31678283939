"""When Redis is left alone, and when it is tried again."""

from __future__ import annotations

from node.l1breaker import FAILURES_MAX, OPEN_S, OPEN_S_MAX, L1Breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = L1Breaker()
    for now in range(20):
        assert breaker.allows(now)
        breaker.begin()
        if now % FAILURES_MAX == FAILURES_MAX - 1:
            breaker.succeeded()
        else:
            assert not breaker.failed(now)
    assert breaker.opened == 0


def test_open_it_lets_one_probe_through_ever_more_rarely_and_closes_when_one_succeeds() -> None:
    breaker, now = L1Breaker(), 0.0
    for _ in range(FAILURES_MAX):
        breaker.begin()
        opened = breaker.failed(now)
    assert opened
    waits = []
    for _ in range(6):
        assert not breaker.allows(now)
        waited = 0.0
        while not breaker.allows(now + waited):
            waited += 0.5
        waits.append(waited)
        now += waited
        breaker.begin()
        assert not breaker.allows(now)  # while the probe is under way
        breaker.failed(now)
    assert waits == [OPEN_S, 2.0, 4.0, 8.0, OPEN_S_MAX, OPEN_S_MAX]
    now += OPEN_S_MAX
    breaker.begin()
    breaker.succeeded()
    assert breaker.allows(now)
    assert breaker.state == "closed"
