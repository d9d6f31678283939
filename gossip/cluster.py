"""Which cluster this node is of, and where nodes of another one with our name and key were heard, for people. Bounded."""

from __future__ import annotations

from gossip.codec import CLUSTER_BYTES

KEPT_S, KEPT_MAX = 60.0, 64
# So often one of them is told of which cluster we are, so that both ends can say it.
ANSWER_EVERY_S = 1.0


class Cluster:
    """tag: CLUSTER_BYTES of the random id; empty while this node knows of none, and takes whom it hears."""

    def __init__(self) -> None:
        self.tag = b""
        self._heard: dict[str, float] = {}
        self._answered_at = float("-inf")

    def be_of(self, cluster_id: str) -> None:
        """cluster_id: 32 hex digits. From now on all packets say it, and those of another cluster are dropped."""
        self.tag = bytes.fromhex(cluster_id)[:CLUSTER_BYTES]

    def is_other(self, tag: bytes) -> bool:
        return bool(self.tag and tag) and tag != self.tag

    def note(self, where: str, now: float) -> bool:
        """A stranger was heard; whether it is time to answer."""
        self._heard.pop(where, None)
        self._heard[where] = now
        while len(self._heard) > KEPT_MAX:
            del self._heard[next(iter(self._heard))]
        if now < self._answered_at + ANSWER_EVERY_S:
            return False
        self._answered_at = now
        return True

    def strangers(self, now: float) -> list[str]:
        """Where they were heard in the last minute."""
        return sorted(where for where, at in self._heard.items() if at > now - KEPT_S)
