"""The search lane of one device: searches that wait make one batch, one thread hop for all asked shards (docs/fan-out.md)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import outcome
import structlog
import trio

from node.blocking import Runner
from node.commit import OverloadedError
from node.fairqueue import FairQueue, FullError
from node.pending import Deadlines, Pending
from router import merge, tail
from router.merge import Merged
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
    # Who takes turns with whom; the lower priority goes first.
    source: Hashable = 0
    priority: int = 0


class LaneReply(NamedTuple):
    """The best k over all asked replicas. ids: uint64 [n], scores: float32 [n]."""

    ids: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float32]
    metadata: list[bytes] | None
    failed: dict[int, str]  # shard → error code


# From this k on a shard is asked for its share; below it the engine is no faster for less (bench.few).
FEW_FROM = 32
BATCH_WEIGHT = 0.2
RETRY_AFTER_MS = (10, 1_000)


class LaneTimeoutError(Exception):
    """The search took longer than its time limit."""


class LaneStoppedError(Exception):
    """The lane does not run (any more)."""

    code = "unavailable"


class LaneTicket(Pending[LaneReply]):
    """A search that waits or runs; `wait` for its reply, or be told."""

    __slots__ = ("_lane", "ask", "ended")

    def __init__(self, lane: SearchLane, ask: LaneAsk) -> None:
        super().__init__()
        self._lane, self.ask = lane, ask
        # Nothing is read for it any more.
        self.ended = False

    def abandon(self) -> None:
        """Leaves the queue; while it runs, the batch goes on to its next shard without it."""
        self._lane.take_back(self)


class SearchLane:
    """Natural batching: what arrives while a batch runs is the next batch."""

    def __init__(
        self, runner: Runner, *, queue_max: int, sizes: Callable[[float], None] = lambda size: None
    ) -> None:
        """sizes: told of each batch how many queries it has."""
        self._runner = runner
        self._sizes = sizes
        self._queue: FairQueue[LaneTicket] = FairQueue(queue_max)
        self._batch: list[LaneTicket] = []
        self._deadlines: Deadlines[LaneTicket] = Deadlines(_expire)
        self._loop: trio.lowlevel.Task | None = None
        self._parked = False
        self._stopped = False
        # How long a batch takes, a moving mean.
        self._batch_s = 0.0
        self._changed = trio.Event()
        self._counters = {
            "searches": 0, "batches": 0, "engine_cpu_ns": 0, "again": 0, "refused": 0, "taken_back": 0,
        }  # fmt: skip

    def statistics(self) -> dict[str, int]:
        return dict(self._counters)

    @property
    def waiting(self) -> int:
        """Searches that wait for the next batch."""
        return len(self._queue)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deadlines.run)
            assert self._loop is None, "one loop per lane"
            self._loop = trio.lowlevel.current_task()
            self._stopped = False
            task_status.started()
            try:
                while True:
                    await self._wait_for_some()
                    self._batch = self._queue.take(BATCH_MAX)
                    await self._run_some(self._batch)
                    self._end(self._batch)
                    self._batch = []
            finally:
                self._loop = None
                self._stop()

    def begin(self, ask: LaneAsk, timeout_s: float) -> LaneTicket:
        """The search waits for the next batch from now on. Raises OverloadedError, LaneStoppedError.

        Its result is LaneTimeoutError after `timeout_s`; OverloadedError when it had to make room for another.
        """
        if self._stopped:
            raise LaneStoppedError("this node's search lane has stopped")
        ticket = LaneTicket(self, ask)
        try:
            out = self._queue.push(ticket, ask.source, ask.priority)
        except FullError:
            raise self._overloaded() from None
        if out is not None:
            out.ended = True
            if not out.over:
                out.settle(outcome.Error(self._overloaded()))
        self._deadlines.add(ticket, timeout_s)
        if self._parked:
            self._wake()
        return ticket

    def _overloaded(self) -> OverloadedError:
        self._counters["refused"] += 1
        least, most = RETRY_AFTER_MS
        batches = 1 + len(self._queue) // BATCH_MAX
        after_ms = min(most, max(least, round(1000 * self._batch_s * batches)))
        return OverloadedError("too many searches wait already; try again", after_ms)

    def take_back(self, ticket: LaneTicket) -> None:
        self._counters["taken_back"] += 1
        if not ticket.ended and ticket not in self._batch:
            self._queue.remove(ticket, ticket.ask.source, ticket.ask.priority)
            self._end([ticket])

    async def settle(self) -> None:
        """Returns when nothing is read any more for any search that was asked before."""
        before = [*self._queue, *self._batch]
        while not all(ticket.ended for ticket in before):
            await self._changed.wait()

    def _end(self, tickets: Sequence[LaneTicket]) -> None:
        for ticket in tickets:
            ticket.ended = True
        self._changed.set()
        self._changed = trio.Event()

    async def _run_some(self, batch: list[LaneTicket]) -> None:
        self._sizes(len(batch))
        began = trio.current_time()
        results: Sequence[LaneReply | Exception]
        try:
            results = await self._runner(self._run_batch, batch)
        except Exception as error:
            log.exception("a batch of searches failed")
            results = [error] * len(batch)
        self._batch_s += BATCH_WEIGHT * (trio.current_time() - began - self._batch_s)
        for ticket, result in zip(batch, results, strict=True):
            if not ticket.over:
                ticket.settle(
                    outcome.Error(result) if isinstance(result, Exception) else outcome.Value(result)
                )

    async def _wait_for_some(self) -> None:
        if self._queue:
            # Batches that never block must not starve everybody else.
            await trio.lowlevel.checkpoint()
        # Again, when what woke it was taken back meanwhile.
        while not self._queue:
            self._parked = True
            await trio.lowlevel.wait_task_rescheduled(self._leave)

    def _leave(self, _raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self._parked = False
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake(self) -> None:
        assert self._loop is not None
        self._parked = False
        trio.lowlevel.reschedule(self._loop)

    def _stop(self) -> None:
        self._stopped = True
        tickets = [*self._batch, *self._queue.take(self.waiting)]
        self._batch = []
        for ticket in tickets:
            if not ticket.over:
                ticket.settle(outcome.Error(LaneStoppedError("this node's search lane has stopped")))
        self._end(tickets)

    def _run_batch(self, batch: list[LaneTicket]) -> list[LaneReply | Exception]:
        """In the lane's thread."""
        begun = time.thread_time_ns()
        search = _BatchSearch(batch)
        search.run()
        self._counters["engine_cpu_ns"] += time.thread_time_ns() - begun
        self._counters["batches"] += 1
        self._counters["searches"] += len(batch)
        replies = search.replies()
        self._counters["again"] += search.again
        return replies


def _expire(ticket: LaneTicket) -> None:
    ticket.abandon()
    ticket.settle(outcome.Error(LaneTimeoutError("the search took longer than its time limit")))


class _Found(NamedTuple):
    """What a replica has for a query that asked it for k."""

    replica: Replica
    hits: Hits
    k: int


class _BatchSearch:
    """The searches of one batch, in the lane's thread. Those that are over meanwhile are left out of what follows."""

    def __init__(self, batch: Sequence[LaneTicket]) -> None:
        self._batch = batch
        self._found: list[list[_Found]] = [[] for _ in batch]
        self._failed: list[dict[int, str]] = [{} for _ in batch]
        # Searches of one shard that was asked for too few at first.
        self.again = 0

    def run(self) -> None:
        """Queries for the same replica, and of like k, go to its engine together."""
        groups: dict[tuple[int, int], tuple[Replica, list[tuple[int, int]]]] = {}
        for place, ticket in enumerate(self._batch):
            ask = ticket.ask
            count = len(ask.replicas)
            k = tail.enough(ask.k, 1, count) if count > 1 and ask.k >= FEW_FROM else ask.k
            for replica in ask.replicas:
                groups.setdefault((id(replica), k.bit_length()), (replica, []))[1].append((place, k))
        for replica, asked in groups.values():
            wanted = [(place, k) for place, k in asked if not self._batch[place].over]
            if wanted:
                self._search(replica, [place for place, _ in wanted], max(k for _, k in wanted))

    def _search(self, replica: Replica, places: Sequence[int], k: int) -> None:
        # One read of the attributes: a compaction may put a new pair in place meanwhile.
        view, engine = replica.searchable
        asks = [self._batch[place].ask for place in places]
        try:
            queries = np.stack([ask.query for ask in asks])
            answers = engine.search(view, queries, k, [ask.constraint for ask in asks])
        except StorageError as error:
            for place in places:
                self._failed[place][view.shard] = error.code
            return
        except Exception:
            # A bug, or a body from a peer that no server of ours would let in: the other shards still answer.
            log.exception("search failed", shard=view.shard)
            for place in places:
                self._failed[place][view.shard] = "internal"
            return
        for place, hits in zip(places, answers, strict=True):
            self._found[place].append(_Found(replica, hits, k))

    def replies(self) -> list[LaneReply | Exception]:
        """Of what was found for each ask in each replica, the best; all asks of the batch together, which costs a quarter."""
        batch, found = self._batch, self._found
        replies: dict[int, LaneReply] = {}
        todo: Sequence[int] = [place for place, ticket in enumerate(batch) if not ticket.over]
        while todo:
            merged = merge.tops(
                [([(f.hits.ids, f.hits.scores) for f in found[at]], batch[at].ask.k) for at in todo]
            )
            pairs = list(zip(todo, merged, strict=True))
            again = [place for place, best in pairs if self._ask_more(place, best)]
            again += self._reply([pair for pair in pairs if pair[0] not in again], replies)
            todo = again
        late = LaneTimeoutError("nobody waits for it any more")
        return [replies.get(place, late) for place in range(len(batch))]

    def _ask_more(self, place: int, best: Merged) -> bool:
        """Searches again, for all that there may be, in replicas that may go on among the best k (`exact-merge`)."""
        k = self._batch[place].ask.k
        found = self._found[place]
        if len(found) < 2 or k < FEW_FROM:
            return False
        full = len(best.ids) >= k
        # What comes before this may go on among the best.
        end = (-float(best.scores[-1]), int(best.ids[-1])) if full else (math.inf, 0)
        kept: list[_Found] = []
        short: list[Replica] = []
        for one in found:
            if one.k >= k or len(one.hits.ids) < one.k:
                kept.append(one)  # there is no more of it
            elif (-float(one.hits.scores[-1]), int(one.hits.ids[-1])) < end:
                short.append(one.replica)
            else:
                kept.append(one)
        if not short:
            return False
        self._found[place] = kept
        for replica in short:
            self.again += 1
            self._search(replica, [place], k)
        return True

    def _reply(self, pairs: Sequence[tuple[int, Merged]], replies: dict[int, LaneReply]) -> list[int]:
        """Fills in the replies; returns the places of those that must be merged again, without a shard that is damaged."""
        # Of each hit that wants metadata, in order: its replica, and its id.
        wanted: dict[Replica, list[int]] = {}
        owners: dict[int, list[Replica]] = {}
        for place, best in pairs:
            if self._batch[place].ask.metadata:
                of = [one.replica for one in self._found[place] for _ in range(len(one.hits.ids))]
                owners[place] = [of[at] for at in best.places.tolist()]
                for replica, id in zip(owners[place], best.ids.tolist(), strict=True):
                    wanted.setdefault(replica, []).append(id)
        packed = {replica: iter(_metadata(replica, ids)) for replica, ids in wanted.items()}
        again = []
        for place, best in pairs:
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
                    self._found[place] = [f for f in self._found[place] if f.replica not in damaged]
                    codes = dict.fromkeys([replica.shard for replica in damaged], DamagedError.code)
                    self._failed[place] |= codes
                    again.append(place)
                    continue
            replies[place] = LaneReply(best.ids, best.scores, metadata, self._failed[place])
        return again


def _metadata(replica: Replica, ids: list[int]) -> Sequence[bytes | None]:
    try:
        return replica.metadata(ids)
    except StorageError:
        log.exception("metadata cannot be read", shard=replica.shard)
        return [None] * len(ids)
