"""Nodes of another cluster that has our name and key: where they were heard, for people. Bounded."""

from __future__ import annotations

KEPT_S, KEPT_MAX = 60.0, 64
# So often one of them is told of which cluster we are, so that both ends can say it.
ANSWER_EVERY_S = 1.0


class Strangers:
    def __init__(self) -> None:
        self._heard: dict[str, float] = {}
        self._answered_at = float("-inf")

    def note(self, where: str, now: float) -> bool:
        """Whether it is time to answer."""
        self._heard.pop(where, None)
        self._heard[where] = now
        while len(self._heard) > KEPT_MAX:
            del self._heard[next(iter(self._heard))]
        if now < self._answered_at + ANSWER_EVERY_S:
            return False
        self._answered_at = now
        return True

    def heard(self, now: float) -> list[str]:
        """From where, in the last minute."""
        return sorted(where for where, at in self._heard.items() if at > now - KEPT_S)
