"""What a question to many nodes is made of: rules, tries, and what the machine wants done (`router/gathering.py`). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from router.peers import Peer

Failed = AbstractSet[tuple[str, int]]


class Send(NamedTuple):
    """A message to send. k: how many hits are wanted; 0 in look-ups."""

    id: int
    node: str
    shards: Sequence[int]
    k: int
    timeout_s: float


class Cancel(NamedTuple):
    """Nobody wants that message's answer any more."""

    id: int


Effect = Send | Cancel
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Rules:
    """deadline: absolute; total: shards of the cluster, of which each holds as much as any other."""

    deadline: float
    try_s: float
    retries: int
    k: int = 0
    total: int = 1


@dataclass(slots=True)
class Answer(Generic[R]):
    """What a node has answered for `shards`. Its hits are the best `asked` of them."""

    node: str
    shards: Sequence[int]
    asked: int
    reply: R
    rounds: int = 0


@dataclass(slots=True)
class Try:
    node: str
    peer: Peer
    shards: Sequence[int]
    k: int
    began: float
    timeout_s: float
    probe: bool
    hedge: bool
    # When to ask others, too: for they may be faster; because it is late.
    hedge_at: float | None = None
    late_at: float | None = None
    # The answer of which it asks for more.
    more_of: int | None = None


@dataclass(slots=True)
class Counters:
    messages: int = 0
    retries: int = 0
    hedges: int = 0
    hedges_won: int = 0
    more: int = 0
    needless: int = 0
    late: int = 0
