"""Packets that are not taken: counted by reason, logged at most once a minute for each."""

from __future__ import annotations

import structlog

from gossip.errors import DropReason

LOG_EVERY_S = 60.0
log = structlog.get_logger(__name__)


class Drops:
    """A flood of garbage costs a counter each, and one line a minute."""

    def __init__(self) -> None:
        self.counts: dict[DropReason, int] = {}
        self._log_at: dict[DropReason, float] = {}
        self._logged: dict[DropReason, int] = {}

    def count(self, reason: DropReason, source: object, now: float) -> None:
        """source: whom to name in the log; the one who happens to come when a line is due."""
        count = self.counts[reason] = self.counts.get(reason, 0) + 1
        if now < self._log_at.get(reason, now):
            return
        self._log_at[reason] = now + LOG_EVERY_S
        log.warning(
            "gossip_dropped",
            reason=reason,
            source=str(source),
            since_last=count - self._logged.get(reason, 0),
        )
        self._logged[reason] = count
