"""One member: as this node sees another, as it sees itself, and as it shows either to the rest of the node."""

from __future__ import annotations

from dataclasses import dataclass, field

from gossip.messages import Address, Claim, State


@dataclass(slots=True)
class Me:
    """This node itself. health: Lifeguard's local health, 0 (good) to `health_max`."""

    id: int
    boot: int
    address: Address
    incarnation: int = 0
    health: int = 0
    leaving: bool = False

    def claim(self) -> Claim:
        state = State.LEFT if self.leaving else State.ALIVE
        return Claim(self.id, self.boot, self.incarnation, state, self.address, self.id)


@dataclass(slots=True, eq=False)
class Suspicion:
    """accusers: who said so, at most one more than the confirmations that count."""

    started: float
    deadline: float
    accusers: set[int]
    # Our own probe has failed, too.
    mine: bool = False
    # Nobody accuses it but those who have declared it dead while we hold it alive.
    hearsay: bool = False
    # When our burst failed last.
    burst_failed_at: float | None = None


@dataclass(slots=True, eq=False)
class Member:
    """Another node as we see it."""

    id: int
    boot: int
    incarnation: int
    state: State
    address: Address
    since: float
    item: int
    suspicion: Suspicion | None = None
    # Who accused this incarnation before a round trip of ours cleared it.
    cleared: set[int] = field(default_factory=set)
    # Who said that it left: itself or an operator.
    left_by: int = 0
    heard_at: float | None = None
    rtt_s: float | None = None
    # When it was last told what is said of it.
    told_at: float = -1e9

    @property
    def version(self) -> int:
        """For repair; suspicion passes by itself and is left out of it."""
        state = State.ALIVE if self.state is State.SUSPECT else self.state
        return self.boot << 32 | self.incarnation << 2 | state

    def claim(self, by: int) -> Claim:
        """What we say of it; a leave stays the word of whoever said it."""
        by = self.left_by if self.state is State.LEFT else by
        return Claim(self.id, self.boot, self.incarnation, self.state, self.address, by)


@dataclass(frozen=True, slots=True)
class MemberView:
    """One member as this node sees it. heard_at: when anything came from it last, in the machine's seconds; None: never."""

    id: int
    boot: int
    incarnation: int
    state: State
    address: Address
    since: float
    heard_at: float | None
    rtt_s: float | None
