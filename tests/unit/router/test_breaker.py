"""The breaker's table, and its laws under any sequence of events."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.breaker import OPEN_MAX_S, OPEN_S, RUN, WINDOW, Breaker


def _opened() -> Breaker:
    breaker = Breaker()
    for _ in range(RUN):
        assert breaker.may(0.0)
        breaker.failed(0.0, breaker.began(0.0))
    assert not breaker.closed
    return breaker


def test_a_run_of_failures_opens_it_and_a_success_between_does_not_let_it() -> None:
    assert not _opened().may(OPEN_S - 0.001)
    breaker = Breaker()
    for _ in range(WINDOW // 2 - 1):
        breaker.failed(0.0, False)
        breaker.succeeded(False)
    assert breaker.closed


def test_how_many_in_a_row_is_for_its_owner_to_say() -> None:
    breaker = Breaker(2)
    breaker.failed(0.0, False)
    assert breaker.closed
    breaker.failed(0.0, False)
    assert not breaker.closed


def test_half_of_the_last_ones_open_it() -> None:
    breaker = Breaker()
    for _ in range(WINDOW // 2):
        assert breaker.closed
        breaker.succeeded(False)
        breaker.failed(0.0, False)
    assert not breaker.closed


def test_one_probe_at_a_time_and_each_that_fails_doubles_the_pause() -> None:
    breaker = _opened()
    now, pause = OPEN_S, OPEN_S
    for _ in range(6):
        assert breaker.may(now)
        assert breaker.began(now)
        assert not breaker.may(now)
        assert not breaker.began(now), "others that go there for want of any other are no probes"
        breaker.failed(now, False)
        assert not breaker.may(now)
        breaker.failed(now, True)
        pause = min(2 * pause, OPEN_MAX_S)
        assert not breaker.may(now + pause - 0.001)
        now += pause
    assert breaker.began(now)
    breaker.succeeded(True)
    assert breaker.closed
    assert breaker.may(now)
    assert breaker.pause_s == OPEN_S


def test_a_probe_that_is_given_up_lets_the_next_be_it() -> None:
    breaker = _opened()
    assert breaker.began(OPEN_S)
    breaker.given_up(True)
    assert breaker.may(OPEN_S)
    assert breaker.began(OPEN_S)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ask", "good", "bad", "none"]), st.floats(0, 3)), max_size=200))
def test_it_never_locks_for_good_and_never_lets_two_probes_out(events: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(), 0.0
    out: list[bool] = []
    for what, later in events:
        now += later
        if what == "ask":
            if breaker.may(now):
                out.append(breaker.began(now))
        elif out:
            probe = out.pop(0)
            if what == "good":
                breaker.succeeded(probe)
                assert breaker.closed
            elif what == "bad":
                breaker.failed(now, probe)
            else:
                breaker.given_up(probe)
        assert sum(out) <= 1
    for probe in out:
        breaker.given_up(probe)
    assert breaker.may(now + OPEN_MAX_S)
