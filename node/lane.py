"""The search lane of one device: all searches that wait make one batch, one thread hop for all asked shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog
import trio

from node.blocking import Runner
from node.commit import GroupCommit, OverloadedError
from router import merge
from storage.errors import StorageError
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


class SearchLane:
    """Natural batching: what arrives while a batch runs is the next batch."""

    def __init__(self, runner: Runner, *, queue_max: int) -> None:
        self._runner = runner
        self._commit: GroupCommit[LaneAsk, LaneReply] = GroupCommit(
            self._flush, waiting_max=queue_max, batch_max=BATCH_MAX
        )
        self._counters = {"searches": 0, "batches": 0, "engine_cpu_ns": 0}

    def statistics(self) -> dict[str, int]:
        return dict(self._counters)

    @property
    def waiting(self) -> int:
        """Searches that wait for the next batch."""
        return self._commit.statistics().waiting

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._commit.run(task_status=task_status)

    async def search(self, ask: LaneAsk) -> LaneReply:
        return await self._commit.submit(ask)

    async def settle(self) -> None:
        """Returns when every search that was asked before has ended."""
        nothing = LaneAsk((), np.empty(0, np.float16), 0, ClassConstraint(), False)
        while True:
            try:
                await self._commit.submit(nothing)
            except OverloadedError as error:
                await trio.sleep(error.retry_after_ms / 1000)
            else:
                return

    async def _flush(self, asks: list[LaneAsk]) -> list[LaneReply | Exception]:
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
        replies: list[LaneReply | Exception] = []
        for ask, parts, lost in zip(asks, found, failed, strict=True):
            try:
                replies.append(_reply(ask, parts, lost))
            except Exception as error:
                replies.append(error)
        return replies


def _reply(ask: LaneAsk, parts: list[tuple[Replica, Hits]], failed: dict[int, str]) -> LaneReply:
    while True:
        best = merge.top([(hits.ids, hits.scores) for _, hits in parts], ask.k)
        if not ask.metadata:
            return LaneReply(best.ids, best.scores, None, failed)
        metadata: list[bytes] = [b""] * len(best.ids)
        damaged: list[int] = []
        for origin, (replica, _) in enumerate(parts):
            places = np.flatnonzero(best.origin == origin)
            if not len(places):
                continue
            try:
                packed = replica.metadata(best.ids[places].tolist())
            except StorageError as error:
                failed[replica.shard] = error.code
                damaged.append(origin)
                continue
            for place, data in zip(places.tolist(), packed, strict=True):
                metadata[place] = data
        if not damaged:
            return LaneReply(best.ids, best.scores, metadata, failed)
        # A damaged shard leaves the answer; what it crowded out of the top k comes back.
        parts = [part for origin, part in enumerate(parts) if origin not in damaged]
