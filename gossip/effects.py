"""What the pure machine wants done. The shell carries effects out in order and tells nothing back but what happens."""

from __future__ import annotations

from typing import Literal, NamedTuple

from gossip.messages import Address, Part

EventKind = Literal[
    "joined", "suspected", "refuted", "down", "returned", "left", "moved", "restarted", "fact"
]


class Send(NamedTuple):
    """Parts for one address. Without `stream`: one UDP packet, and they fit into it. With it: over TCP, in as many
    sealed packets as needed. What answers a packet that came on a stream goes back on that stream, whatever `stream` says:
    the machine addresses answers to the packet's source. A stream that cannot be had is told by `on_stream_failed`."""

    address: Address
    parts: tuple[Part, ...]
    stream: bool = False


class Event(NamedTuple):
    """Something that an operator or the rest of the node may want to know. `at`: the machine's monotonic seconds."""

    kind: EventKind
    id: int
    at: float
    boot: int
    incarnation: int
    # Who accused or declared it; 0 for nobody in particular.
    by: int = 0
    # Of a changed fact.
    key: bytes = b""


class Superseded(NamedTuple):
    """Another process with our id and a higher boot is there: this one must stop."""

    boot: int


Effect = Send | Event | Superseded
