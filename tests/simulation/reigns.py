"""What a simulated primary remembers of its epoch, around the real picture of its voters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from node.replication import Ack, Progress


@dataclass(slots=True, eq=False)
class Wait:
    """Somebody who waits for a position to be acknowledged."""

    sequence: int
    ack: Ack
    done: Callable[[bool], None]


@dataclass(slots=True, eq=False)
class Reign:
    """An epoch that this process has opened. heard: of whom it names, voters and learners: who has pulled and
    matched. witness_at: when the witness was heard last."""

    epoch: int
    progress: Progress
    bugs: frozenset[str] = frozenset()
    heard: dict[str, int] = field(default_factory=dict)
    witness_at: float = -1e9
    since: float = 0.0
    insists: bool = False
    # What a witness would have if its echo were a disk's.
    _echoed: int = 0

    @property
    def positions(self) -> dict[str, int]:
        return self.progress.positions

    def echoed(self, end: int) -> None:
        self._echoed = end

    def reached(self, ack: Ack) -> int:
        progress = self.progress
        if "unsealed" in self.bugs and ack == "quorum":
            return progress._held(len(progress.voters) // 2)
        if "witness-counted" in self.bugs and ack == "quorum" and progress.placement.witness is not None:
            held = sorted(
                [self._echoed, *(self.positions.get(one, 0) for one in progress.voters)], reverse=True
            )
            return held[len(held) // 2]
        return progress.reached(ack)
