"""A circuit breaker: a peer, or Redis, that fails again and again is left alone, and tried now and then. Pure.

Laws (docs/fan-out.md, `open-is-avoided`):
- Closed until `run` failures in a row, or until half of the last WINDOW outcomes are failures.
- Open for `pause`: OPEN_S at first, twice as long after each failed probe, at most OPEN_MAX_S.
- Then half open: one request is the probe. Its success closes, its failure opens again; one that is given up
  without an outcome lets the next be the probe.
- Outcomes of requests that were sent before it opened change nothing while it is open, except that a success closes it.

| state     | may        | success | failure        | given up |
|-----------|------------|---------|----------------|----------|
| closed    | yes        | closed  | closed or open | closed   |
| open      | no         | closed  | open           | open     |
| half open | the first  | closed  | open, longer   | the next |
"""

from __future__ import annotations

RUN = 5
WINDOW = 20
OPEN_S = 1.0
OPEN_MAX_S = 10.0


class Breaker:
    """`may` says whether to ask; each request that is asked tells `began`, and then one of the outcomes."""

    __slots__ = ("_outcomes", "_probing", "_run", "_run_max", "_until", "opened", "pause_s")

    def __init__(self, run: int = RUN) -> None:
        """run: so many failures in a row open it."""
        self._run_max = run
        self.opened = 0
        self.pause_s = OPEN_S
        # None: closed. Else when it stops being open.
        self._until: float | None = None
        self._probing = False
        self._run = 0
        # The last WINDOW outcomes as bits, newest lowest; a failure is 1.
        self._outcomes = 0

    @property
    def closed(self) -> bool:
        return self._until is None

    def may(self, now: float) -> bool:
        return self._until is None or (now >= self._until and not self._probing)

    def began(self, now: float) -> bool:
        """A request is sent. True when it is the probe: then its outcome must be told as one."""
        if self._until is None or self._probing or now < self._until:
            return False
        self._probing = True
        return True

    def succeeded(self, probe: bool) -> None:
        self._until, self.pause_s = None, OPEN_S
        self._probing = False
        self._run = 0
        self._note(0)

    def failed(self, now: float, probe: bool) -> None:
        self._run += 1
        self._note(1)
        if probe:
            self._probing = False
            self.pause_s = min(2 * self.pause_s, OPEN_MAX_S)
            self._until = now + self.pause_s
        elif self._until is None and (
            self._run >= self._run_max or self._outcomes.bit_count() >= WINDOW // 2
        ):
            self._until = now + self.pause_s
            self.opened += 1
            # What it does after this is judged by itself.
            self._outcomes = self._run = 0

    def given_up(self, probe: bool) -> None:
        if probe:
            self._probing = False

    def _note(self, bit: int) -> None:
        self._outcomes = (self._outcomes << 1 | bit) & ((1 << WINDOW) - 1)
