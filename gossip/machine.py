"""All of gossip behind one pure machine: (event, now) → effects. The laws are in docs/gossip.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from gossip.config import GossipConfig
from gossip.effects import Effect
from gossip.messages import Address, Part, State


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


class Machine:
    """Gossip of one node. Time is monotonic seconds, given by the caller; packets come already opened and decoded."""

    def __init__(
        self, config: GossipConfig, *, id: int, boot: int, address: Address, random: Random, now: float
    ) -> None: ...

    @property
    def next_deadline(self) -> float:
        """When `on_timer` wants to be called; infinity: never."""

    def start(self, seeds: Sequence[Address], now: float) -> list[Effect]: ...
    def set_seeds(self, seeds: Sequence[Address]) -> None: ...
    def on_timer(self, now: float) -> list[Effect]: ...
    def on_packet(
        self, sender: int, boot: int, source: Address, parts: Sequence[Part], now: float
    ) -> list[Effect]: ...
    def on_stream_failed(self, address: Address, refused: bool, now: float) -> list[Effect]:
        """A stream to `address` could not be had; `refused`: its host says that nobody listens there."""

    def on_link_lost(self, id: int, now: float) -> list[Effect]:
        """A connection to that member was reset: find out at once."""

    def set_fact(self, key: bytes, value: bytes, now: float) -> list[Effect]: ...
    def set_hot(self, value: bytes, now: float) -> list[Effect]: ...
    def set_address(self, address: Address, now: float) -> list[Effect]: ...
    def leave(self, now: float) -> list[Effect]:
        """Say good-bye to all; the process may end a moment later."""

    def forget(self, id: int, now: float) -> list[Effect]:
        """An operator says that a down member will not come back. If it lives it refutes that."""

    def members(self) -> list[MemberView]:
        """All but those who left, this node included, by id."""

    def facts(self, id: int) -> Mapping[bytes, bytes]: ...
    def hot(self, id: int) -> bytes: ...
    def statistics(self) -> dict[str, int]: ...
