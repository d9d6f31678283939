"""What a simulated primary remembers of its epoch. After node/replication.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from node.placement import Placement


@dataclass(slots=True, eq=False)
class Wait:
    """Somebody who waits for a position to be acknowledged."""

    sequence: int
    ack: str
    done: Callable[[bool], None]


@dataclass(slots=True, eq=False)
class Reign:
    """An epoch that this process has opened. heard: of whom it names, voters and learners: who has pulled and
    matched."""

    epoch: int
    placement: Placement
    positions: dict[str, int] = field(default_factory=dict)
    heard: dict[str, int] = field(default_factory=dict)

    def reached(self, ack: str) -> int:
        held = sorted((self.positions.get(name, 0) for name in self.placement.names), reverse=True)
        return held[-1] if ack == "all" else held[len(held) // 2]
