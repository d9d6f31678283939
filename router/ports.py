"""What the router needs of the node, as protocols. The node implements them; simulations and tests bring their own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import outcome

from router.cachevalues import Origin
from router.layout import Placement
from router.merge import Part
from router.requests import Session
from storage.records import Kind, Operation
from storage.view import ClassConstraint

T = TypeVar("T")


class SearchAsk(NamedTuple):
    """One query for some shards of one node. query: float16 [dim]."""

    shards: tuple[int, ...]
    query: npt.NDArray[np.float16]
    k: int
    constraint: ClassConstraint
    metadata: bool
    # Positions that the answering replicas must have applied; tokens of other shards do not matter here.
    session: Session = ()
    # The lower goes first: 0 interactive, 1 batch, 2 prefetch.
    priority: int = 0
    # Who asks, as far as taking turns goes: a number of a connection on the coordinator.
    source: Hashable = 0


class SearchReply(NamedTuple):
    """The best k over all answered shards. ids: uint64 [n], scores: float32 [n]."""

    ids: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float32]
    metadata: list[bytes] | None
    # Shards that were asked for and could not be answered here, with the code that says why.
    failed: dict[int, str]
    # How old the oldest of the answering replicas may be, as its own node knows it; 0 for primaries.
    age_ms: int

    @property
    def hits(self) -> Part:
        return self.ids, self.scores


class StoredRecord(NamedTuple):
    """A record as a point look-up brings it; vector is raw FP16."""

    version: tuple[int, int]
    vector: bytes
    classes: tuple[int, ...]
    metadata: bytes


class Answers(NamedTuple, Generic[T]):
    """Answers in the order of the ids that were asked for.

    None: no such record; a string: the code of the error that its shard has there. age_ms: as in SearchReply.
    """

    found: Sequence[T | str | None]
    age_ms: int


class Change(NamedTuple):
    """One record to write. vector is raw FP16, already normalised; metadata packed."""

    operation: Operation
    kind: Kind
    id: int
    vector: bytes
    classes: tuple[int, ...]
    metadata: bytes


@dataclass(frozen=True, slots=True)
class WriteAsk:
    """Changes for one shard, in order, under one client write_id (16 bytes)."""

    shard: int
    changes: Sequence[Change]
    ack: str
    write_id: bytes


class WriteReply(NamedTuple):
    """Outcome for one shard: where its last record stands, or an error."""

    shard: int
    epoch: int
    sequence: int
    error: tuple[str, str, int | None] | None  # code, message, retry_after_ms
    # With `no_primary`: the node that leads the shard, as far as the answerer knows.
    primary: str = ""


class NodeGoneError(Exception):
    """The node cannot be reached, or the link broke. `sent`: the message may have arrived."""

    def __init__(self, node: str, sent: bool) -> None:
        self.node, self.sent = node, sent
        super().__init__(f"node {node} cannot be reached")


class NodeError(Exception):
    """The node answered with an error."""

    def __init__(self, code: str, message: str, retry_after_ms: int | None = None) -> None:
        self.code, self.message, self.retry_after_ms = code, message, retry_after_ms
        super().__init__(f"{code}: {message}")


Outcome = outcome.Value[T] | outcome.Error
# Called once, on the event loop, with what came of a question, perhaps before the call that asked returns; never after
# the question was cancelled. An error is a NodeGoneError or a NodeError.
Done = Callable[[Outcome[T]], None]


class Asked(Protocol):
    """A question that is under way."""

    def cancel(self) -> None:
        """Nobody wants the answer any more: what waits or runs for it ends, here and there. Harmless after it came."""


class Node(Protocol):
    """A node as the coordinator sees it, itself included.

    Reads ask at once and never wait, so that one task can ask many: a task per node would cost more than the asking.
    They raise NodeGoneError or NodeError instead of asking. A node waits for a session's writes before it answers, but
    for the local one, which `Cluster.caught_up` is for.
    """

    def search(self, ask: SearchAsk, timeout_s: float, done: Done[SearchReply]) -> Asked: ...

    def get(
        self,
        kind: Kind,
        ids: Sequence[int],
        session: Session,
        timeout_s: float,
        done: Done[Answers[StoredRecord]],
    ) -> Asked: ...

    def score(
        self,
        query: npt.NDArray[np.float16],
        ids: Sequence[int],
        metadata: bool,
        session: Session,
        timeout_s: float,
        done: Done[Answers[tuple[float, bytes]]],
    ) -> Asked: ...

    async def write(self, asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]:
        """Raises NodeGoneError or NodeError."""
        ...


class Cluster(Protocol):
    """Who is there and who has what, as far as this node knows now."""

    local: str
    shard_count: int

    def node(self, name: str) -> Node: ...

    def placement(self, shard: int) -> Placement: ...

    def primary(self, shard: int) -> str:
        """Who writes it, as far as this node knows; a guess when it has heard of nobody."""

    def alive(self, name: str) -> bool:
        """Whether it is worth a try."""

    def avoid(self, name: str) -> bool:
        """Whether another replica is the better choice: this one is suspected, or says that it is not well."""

    def lags_ms(self, name: str) -> Mapping[int, int]:
        """How far behind a node's replicas are, by shard; absent: level, or nothing is known against it."""

    def distance(self, name: str) -> int:
        """How far away: `coverage.HERE`, `SAME_ZONE`, `SAME_REGION` or `FAR`."""

    def load_s(self, name: str) -> float:
        """How long a search waits there, by what that node tells of itself; 0 when it has told nothing."""

    async def caught_up(self, shards: Sequence[int], session: Session, timeout_s: float) -> dict[int, str]:
        """Waits until this node's own replicas have what the session has seen, half of `timeout_s` at most: another may be
        ahead. Those of `shards` that have not, with the code that says so."""
        ...


class Trust(Protocol):
    """What a node has been told of changes, and by whom (docs/caching.md)."""

    def current(self, now: float) -> bool:
        """Whether every shard's primary has been heard of late, so that no change can be unknown for long."""

    def trusts(self, origin: Origin) -> bool:
        """Whether all changes since a value of that origin was begun are known."""

    def origin(self, age_ms: int) -> Origin:
        """Of a value that reflects what was there `age_ms` before now."""


class Store(Protocol):
    """L1. Neither method raises; what goes wrong counts as absent, and is counted."""

    async def get(self, keys: Sequence[str], deadline: float) -> list[bytes | None]:
        """Values in the order of the keys. It takes no longer than to the deadline."""

    def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Sends it sometime soon, if there is room."""
