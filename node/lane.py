"""The search lane of one device: all searches that wait make one batch, one thread hop for all asked shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import outcome
import structlog
import trio

from node.blocking import Runner
from node.commit import CommitStoppedError, GroupCommit, OverloadedError, Ticket
from node.pending import Deadlines
from router import merge
from storage.errors import DamagedError, StorageError
from storage.replica import Replica
from storage.view import ClassConstraint, Hits

log = structlog.get_logger(__name__)

BATCH_MAX = 100


class LaneAsk(NamedTuple):
    """One query over some of this node's replicas. query: float16 [dim]."""

    replicas: Sequence[Replica]
    query: npt.NDArray[np.float16]
    k: int
    constraint: ClassConstraint
    metadata: bool


class LaneReply(NamedTuple):
    """The best k over all asked replicas. ids: uint64 [n], scores: float32 [n]."""

    ids: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float32]
    metadata: list[bytes] | None
    failed: dict[int, str]  # shard → error code


LaneTicket = Ticket[LaneAsk, LaneReply]


class LaneTimeoutError(Exception):
    """The search took longer than its time limit."""


class SearchLane:
    """Natural batching: what arrives while a batch runs is the next batch."""

    def __init__(
        self, runner: Runner, *, queue_max: int, sizes: Callable[[float], None] = lambda size: None
    ) -> None:
        """sizes: told of each batch how many queries it has."""
        self._runner = runner
        self._sizes = sizes
        self._commit: GroupCommit[LaneAsk, LaneReply] = GroupCommit(
            self._flush, waiting_max=queue_max, batch_max=BATCH_MAX
        )
        self._deadlines: Deadlines[LaneTicket] = Deadlines(_expire)
        self._counters = {"searches": 0, "batches": 0, "engine_cpu_ns": 0}

    def statistics(self) -> dict[str, int]:
        return dict(self._counters)

    @property
    def waiting(self) -> int:
        """Searches that wait for the next batch."""
        return self._commit.statistics().waiting

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deadlines.run)
            await self._commit.run(task_status=task_status)

    def begin(self, ask: LaneAsk, timeout_s: float) -> LaneTicket:
        """The search waits for the next batch from now on. Raises OverloadedError, CommitStoppedError.

        Waiting for its reply raises LaneTimeoutError after `timeout_s`.
        """
        ticket = self._commit.begin(ask)
        self._deadlines.add(ticket, timeout_s)
        return ticket

    async def settle(self) -> None:
        """Returns when every search that was asked before has ended."""
        nothing = LaneAsk((), np.empty(0, np.float16), 0, ClassConstraint(), False)
        while True:
            try:
                await self._commit.submit(nothing)
            except OverloadedError as error:
                await trio.sleep(error.retry_after_ms / 1000)
            except CommitStoppedError:
                return  # nobody searches
            else:
                return

    async def _flush(self, asks: list[LaneAsk]) -> list[LaneReply | Exception]:
        self._sizes(len(asks))
        return await self._runner(self._run_batch, asks)

    def _run_batch(self, asks: list[LaneAsk]) -> list[LaneReply | Exception]:
        """In the lane's thread. Queries for the same replica, and of like k, go to its engine together."""
        groups: dict[tuple[int, int], tuple[Replica, list[int]]] = {}
        for place, ask in enumerate(asks):
            for replica in ask.replicas:
                key = (id(replica), ask.k.bit_length())
                groups.setdefault(key, (replica, []))[1].append(place)
        found: list[list[tuple[Replica, Hits]]] = [[] for _ in asks]
        failed: list[dict[int, str]] = [{} for _ in asks]
        begun = time.thread_time_ns()
        for replica, places in groups.values():
            # One read of the attributes: a compaction may put a new pair in place meanwhile.
            view, engine = replica.searchable
            try:
                queries = np.stack([asks[place].query for place in places])
                k = max(asks[place].k for place in places)
                answers = engine.search(view, queries, k, [asks[place].constraint for place in places])
            except StorageError as error:
                for place in places:
                    failed[place][view.shard] = error.code
                continue
            except Exception:
                # A bug, or a body from a peer that no server of ours would let in: the other shards still answer.
                log.exception("search failed", shard=view.shard)
                for place in places:
                    failed[place][view.shard] = "internal"
                continue
            for place, hits in zip(places, answers, strict=True):
                found[place].append((replica, hits))
        self._counters["engine_cpu_ns"] += time.thread_time_ns() - begun
        self._counters["batches"] += 1
        self._counters["searches"] += len(asks)
        return _replies(asks, found, failed)


def _expire(ticket: LaneTicket) -> None:
    ticket.abandon()
    ticket.settle(outcome.Error(LaneTimeoutError("the search took longer than its time limit")))


def _replies(
    asks: Sequence[LaneAsk], found: list[list[tuple[Replica, Hits]]], failed: list[dict[int, str]]
) -> list[LaneReply | Exception]:
    """Of what was found for each ask in each replica, the best; all asks of the batch together, which costs a quarter."""
    replies: dict[int, LaneReply] = {}
    todo: Sequence[int] = range(len(asks))
    while todo:
        merged = merge.tops(
            [([(hits.ids, hits.scores) for _, hits in found[place]], asks[place].k) for place in todo]
        )
        # Of each hit that wants metadata, in order: its replica, and its id.
        wanted: dict[Replica, list[int]] = {}
        owners: dict[int, list[Replica]] = {}
        for place, best in zip(todo, merged, strict=True):
            if asks[place].metadata:
                of = [replica for replica, hits in found[place] for _ in range(len(hits.ids))]
                owners[place] = [of[at] for at in best.places.tolist()]
                for replica, id in zip(owners[place], best.ids.tolist(), strict=True):
                    wanted.setdefault(replica, []).append(id)
        packed = {replica: iter(_metadata(replica, ids)) for replica, ids in wanted.items()}
        again = []
        for place, best in zip(todo, merged, strict=True):
            metadata: list[bytes] | None = None
            if place in owners:
                metadata, damaged = [], set()
                for replica in owners[place]:
                    one = next(packed[replica])
                    if one is None:
                        damaged.add(replica)
                    else:
                        metadata.append(one)
                if damaged:
                    # A damaged shard leaves the answer; what it crowded out of the top k comes back.
                    found[place] = [part for part in found[place] if part[0] not in damaged]
                    failed[place] |= dict.fromkeys([replica.shard for replica in damaged], DamagedError.code)
                    again.append(place)
                    continue
            replies[place] = LaneReply(best.ids, best.scores, metadata, failed[place])
        todo = again
    return [replies[place] for place in range(len(asks))]


def _metadata(replica: Replica, ids: list[int]) -> Sequence[bytes | None]:
    try:
        return replica.metadata(ids)
    except StorageError:
        log.exception("metadata cannot be read", shard=replica.shard)
        return [None] * len(ids)
