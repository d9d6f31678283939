"""What a gossip packet holds. The parts here, their bytes in docs/gossip.md."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Address(NamedTuple):
    """Where a node's gossip is reached: `host` is an IPv4 or IPv6 address in its canonical text form."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class State(IntEnum):
    """Ordered: of two claims of one incarnation the greater state wins."""

    ALIVE = 0
    SUSPECT = 1
    DOWN = 2
    LEFT = 3


class Ping(NamedTuple):
    """target 0: whoever is there. round: how far the sender is along the ring (u32)."""

    seq: int
    target: int
    round: int


class Ack(NamedTuple):
    seq: int


class PingReq(NamedTuple):
    """Please ping `target` for me, and tell me under my `seq`."""

    seq: int
    target: int
    address: Address


class Nack(NamedTuple):
    """I did ask for you, but have had no answer."""

    seq: int


class Claim(NamedTuple):
    """What `by` says of a member (of itself: by == id)."""

    id: int
    boot: int
    incarnation: int
    state: State
    address: Address
    by: int


class Fact(NamedTuple):
    """value empty: the key is removed."""

    origin: int
    boot: int
    counter: int
    key: bytes
    value: bytes


class Hot(NamedTuple):
    """The one vector of fast-changing numbers of a node; the last value is all that counts."""

    origin: int
    boot: int
    counter: int
    value: bytes


class Root(NamedTuple):
    """A hash of everything that the sender knows."""

    hash: int


class Buckets(NamedTuple):
    """One hash for each 64th of it, u32."""

    hashes: tuple[int, ...]


class Digest(NamedTuple):
    """(item, version) of everything in the buckets of `mask`."""

    mask: int
    items: tuple[tuple[int, int], ...]


class Want(NamedTuple):
    """Send me these items."""

    items: tuple[int, ...]


class Join(NamedTuple):
    """Send me everything."""


Part = Ping | Ack | PingReq | Nack | Claim | Fact | Hot | Root | Buckets | Digest | Want | Join
