"""What the router needs of the node, as protocols. The node implements them; simulations and tests bring their own."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from router.cachevalues import Origin
from router.layout import Placement
from router.requests import Session
from storage.records import Kind, Operation
from storage.view import ClassConstraint

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SearchAsk:
    """One query for some shards of one node. query: float16 [dim]."""

    shards: tuple[int, ...]
    query: npt.NDArray[np.float16]
    k: int
    constraint: ClassConstraint
    metadata: bool
    # Positions that the answering replicas must have applied; tokens of other shards do not matter here.
    session: Session = ()


class SearchReply(NamedTuple):
    """The best k over all answered shards. ids: uint64 [n], scores: float32 [n]."""

    ids: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float32]
    metadata: list[bytes] | None
    # Shards that were asked for and could not be answered here, with the code that says why.
    failed: dict[int, str]
    # How old the oldest of the answering replicas may be, as its own node knows it; 0 for primaries.
    age_ms: int


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


class Node(Protocol):
    """A node as the coordinator sees it, itself included. All raise NodeGoneError or NodeError."""

    def search(self, ask: SearchAsk, timeout_s: float) -> Coroutine[Any, Any, SearchReply]:
        """Asks at once, and never waits; await the answer, or close it. A task per node would cost more than the asking."""

    async def get(
        self, kind: Kind, ids: Sequence[int], session: Session, timeout_s: float
    ) -> Answers[StoredRecord]: ...

    async def score(
        self,
        query: npt.NDArray[np.float16],
        ids: Sequence[int],
        metadata: bool,
        session: Session,
        timeout_s: float,
    ) -> Answers[tuple[float, bytes]]: ...

    async def write(self, asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]: ...


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
