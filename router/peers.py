"""What a coordinator has seen of each node that it asks: how fast, how busy, how reliable; and the hedge budget. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from router.breaker import Breaker

# Weight of a new sample in the mean latency, and step of the p95 as a part of it.
MEAN_WEIGHT = 0.1
P95_STEP = 0.2
# A peer that was slow is given the benefit of the doubt after a while: with nobody asking it, it could not show that it is well.
DOUBT_HALF_S = 2.0
# Before so many answers nothing is said of a p95.
SAMPLES_MIN = 20
HEDGE_MIN_S = 0.001
# Hedges that may be saved up. Without a bound a quiet hour would pay for a storm.
TOKENS_MAX = 20.0
# Says nothing against the peer itself: it is busy, stops in good order, or lacks what this one request needs.
NO_FAULT = frozenset({"overloaded", "indexing", "session_behind", "shutting_down", "too_large"})


class Peer:
    """One node as its asker sees it."""

    __slots__ = ("answers", "breaker", "errors", "in_flight", "mean_s", "p95_s", "seen_at", "timeouts")

    def __init__(self) -> None:
        self.breaker = Breaker()
        self.in_flight = 0
        self.answers = self.errors = self.timeouts = 0
        self.mean_s = 0.0
        self.p95_s = 0.0
        self.seen_at = 0.0

    def began(self, now: float) -> bool:
        """A message is sent; returns whether it is a probe, for the outcome."""
        self.in_flight += 1
        return self.breaker.began(now)

    def answered(self, now: float, took_s: float, probe: bool) -> None:
        self.in_flight -= 1
        self.answers += 1
        self._observe(now, took_s)
        self.breaker.succeeded(probe)

    def failed(self, now: float, took_s: float, code: str, probe: bool, *, hurried: bool) -> None:
        """hurried: it had been given so little time that lateness is not its fault."""
        self.in_flight -= 1
        if code == "deadline_exceeded":
            self.timeouts += 1
            if hurried:
                self.breaker.given_up(probe)
                return
            # It takes at least that long; without this a peer that is slower than the limit would never be known as slow.
            self._observe(now, 2 * took_s)
        if code in NO_FAULT:
            self.breaker.given_up(probe)
            return
        self.errors += code != "deadline_exceeded"
        self.breaker.failed(now, probe)

    def given_up(self, probe: bool) -> None:
        """Nobody wanted the answer any more."""
        self.in_flight -= 1
        self.breaker.given_up(probe)

    def load_s(self, now: float) -> float:
        """About how long one more request takes there, by what was seen from here; what is long ago counts for less."""
        doubt: float = 2.0 ** ((self.seen_at - now) / DOUBT_HALF_S)
        return (self.in_flight + 1) * self.mean_s * doubt

    def hedge_after_s(self) -> float | None:
        """The p95; None while too little is known."""
        return max(HEDGE_MIN_S, self.p95_s) if self.answers >= SAMPLES_MIN else None

    def _observe(self, now: float, took_s: float) -> None:
        self.seen_at = now
        if not self.mean_s:
            self.mean_s, self.p95_s = took_s, 2 * took_s
            return
        self.mean_s += MEAN_WEIGHT * (took_s - self.mean_s)
        # Stochastic approximation (Robbins and Monro 1951): at rest where 1 in 20 is above.
        step = P95_STEP * self.mean_s
        self.p95_s = max(0.0, self.p95_s + (step if took_s > self.p95_s else -step / 19))


def usual_p95_s(peers: Iterable[Peer]) -> float:
    """The (lower) median of the peers' p95; 0 while little is known. One that is bad does not move it."""
    known = sorted([peer.p95_s for peer in peers if peer.answers + peer.timeouts >= SAMPLES_MIN])
    return known[(len(known) - 1) // 2] if known else 0.0


class HedgeBudget:
    """Tokens: a first message earns a part of one, a hedge takes one (docs/fan-out.md, `hedge-budget`)."""

    def __init__(self, percent: float) -> None:
        self._earned = percent / 100
        self._tokens = 0.0
        self.firsts = self.hedges = 0

    def first(self, messages: int) -> None:
        self.firsts += messages
        self._tokens = min(TOKENS_MAX, self._tokens + self._earned * messages)

    def take(self, messages: int) -> bool:
        """Whether so many hedges may be sent; they count as sent."""
        if self._tokens < messages:
            return False
        self._tokens -= messages
        self.hedges += messages
        return True

    @property
    def any(self) -> bool:
        return self._tokens >= 1
