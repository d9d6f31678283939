"""The election of a simulated replica: the real machine, and the mistakes that are planted in it."""

from __future__ import annotations

from node.election import Election, ElectionConfig, Role

# A third of the real times, so that a minute sees more elections.
CONFIG = ElectionConfig(lease_s=0.5, rank_s=0.04, retry_min_s=0.02, retry_max_s=0.1, candidacy_s=0.2)


class Planted(Election):
    """The real machine, but for the mistakes that are planted in it."""

    bugs: frozenset[str] = frozenset()

    @property
    def majority(self) -> int:
        candidacy = self._candidacy
        if "new-majority-only" in self.bugs and candidacy is not None and candidacy.also:
            return min(super().majority, len(candidacy.also) // 2 + 1)
        return super().majority

    def takes(self, epoch: int) -> bool:
        if "lower-epoch-accepted" in self.bugs:
            return self.role is not Role.PRIMARY
        return super().takes(epoch)
