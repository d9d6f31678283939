"""One question, many nodes: who is asked, who is asked again, and one answer. The shell over coverage and merge."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from router import coverage, merge, requests
from router.config import RouterConfig
from router.coverage import Sight
from router.ports import Answers, Cluster, NodeError, NodeGoneError, SearchAsk, SearchReply
from router.ring import shard_of
from router.wire import Columns

Query = npt.NDArray[np.float16]
# By node: the shards that it is asked for; and those that nobody can answer.
Assignment = tuple[dict[str, list[int]], list[int]]
# What is known of other nodes is older than that anyway, and a try that fails looks again.
SHARED_S = 0.001


@dataclass(frozen=True, slots=True)
class Found:
    """What a fan-out brought. reasons: shard → code, of those that failed."""

    columns: Columns
    missing: list[int]
    total: int
    reasons: dict[int, str]
    # How old the oldest replica that answered may be, by what the nodes said of themselves.
    age_ms: int = 0

    def coverage(self) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "answered": self.total - len(self.missing),
            "total": self.total,
            "missing": sorted(self.missing),
        }
        if self.missing:
            answer["reason"] = next(
                (self.reasons[s] for s in self.missing if s in self.reasons), "unavailable"
            )
        return answer


class FanOut:
    """Asks the nodes of a `Cluster`. Holds no state but counters and the last choice."""

    def __init__(self, cluster: Cluster, config: RouterConfig) -> None:
        self._cluster = cluster
        self._config = config
        self._all = tuple(range(cluster.shard_count))
        self._first: tuple[float, Assignment] = (-math.inf, ({}, []))
        self.counters = {"retries": 0, "partial": 0}

    def deadline(self, timeout_ms: float | None) -> float:
        """When the answer to a request must be there, by trio's clock."""
        return trio.current_time() + (timeout_ms or self._config.deadline_ms) / 1000

    def _assign_all(self) -> Assignment:
        """Of all shards, for a first try. Not to be changed: the requests of a frame share it."""
        now = trio.current_time()
        if now >= self._first[0] + SHARED_S:
            self._first = (now, self._assign(self._all, set()))
        return self._first[1]

    def _assign(self, shards: Sequence[int], failed: set[tuple[str, int]]) -> Assignment:
        cluster = self._cluster
        # Each node is looked at once, whatever the number of its shards.
        seen: dict[str, Sight | None] = {}

        def sight(name: str) -> Sight | None:
            if name not in seen:
                seen[name] = (
                    Sight(cluster.avoid(name), cluster.lags_ms(name)) if cluster.alive(name) else None
                )
            return seen[name]

        def candidates(shard: int) -> list[str]:
            voters: Sequence[str] = cluster.placement(shard).voters
            if failed:
                voters = [name for name in voters if (name, shard) not in failed]
            return coverage.choose(shard, voters, sight, cluster.local)

        return coverage.cover(shards, candidates, cluster.local)

    def _try_s(self, deadline: float) -> float:
        """Time for the next try. The last bit of a deadline is not worth a message."""
        return min(self._config.try_ms / 1000, deadline - trio.current_time())

    async def find(
        self,
        query: Query,
        request: requests.Query,
        deadline: float | None = None,
        drop: frozenset[int] = frozenset(),
        age_ms: int = 0,
    ) -> Found:
        """The best k over all shards, `drop` left out. Each node answers for all its asked shards in one message.

        age_ms: of what the query was made from.
        """
        deadline = deadline or self.deadline(request.timeout_ms)
        k = request.k + len(drop)
        parts: list[SearchReply] = []
        reasons: dict[int, str] = {}
        failed: set[tuple[str, int]] = set()
        missing: list[int] = []
        todo: Sequence[int] = self._all

        def lost(name: str, codes: Mapping[int, str]) -> None:
            reasons.update(codes)
            failed.update([(name, shard) for shard in codes])
            again.extend(codes)

        for attempt in range(self._config.retries + 1):
            again: list[int] = []
            assigned, unanswerable = self._assign(todo, failed) if attempt else self._assign_all()
            missing += unanswerable
            timeout_s = self._try_s(deadline)
            if timeout_s <= 0:
                missing += [shard for shards in assigned.values() for shard in shards]
                break
            self.counters["retries"] += attempt > 0
            calls = []
            try:
                for name, shards in assigned.items():
                    ask = SearchAsk(
                        tuple(shards), query, k, request.constraint, request.metadata, request.session
                    )
                    try:
                        calls.append((name, shards, self._cluster.node(name).search(ask, timeout_s)))
                    except (NodeGoneError, NodeError) as error:
                        lost(name, dict.fromkeys(shards, _code(error)))
                for name, shards, call in calls:
                    try:
                        reply = await call
                    except (NodeGoneError, NodeError) as error:
                        lost(name, dict.fromkeys(shards, _code(error)))
                    else:
                        parts.append(reply)
                        if reply.failed:
                            lost(name, reply.failed)
            finally:
                for _, _, call in calls:
                    call.close()
            todo = again
            if not todo:
                break
        else:
            missing += todo
        self.counters["partial"] += bool(missing)
        age_ms = max([age_ms, *[part.age_ms for part in parts]])
        return Found(_merge(parts, request, drop), missing, len(self._all), reasons, age_ms)

    async def scatter(
        self,
        ids: list[int],
        ask: Callable[[str, Sequence[int], float], Awaitable[Answers[Any]]],
        deadline: float,
    ) -> tuple[dict[int, Any], int]:
        """Ask each id's shard, one message per node, on another replica where one fails; also the answers' age in ms."""
        by_shard: dict[int, list[int]] = {}
        for id_ in ids:
            by_shard.setdefault(shard_of(id_, self._cluster.shard_count), []).append(id_)
        found: dict[int, Any] = dict.fromkeys(ids, "unavailable")
        failed: set[tuple[str, int]] = set()
        todo = list(by_shard)
        ages_ms = [0]

        async def one(name: str, shards: list[int], timeout_s: float) -> None:
            wanted = [i for shard in shards for i in by_shard[shard]]
            try:
                answers, age_ms = await ask(name, wanted, timeout_s)
                ages_ms.append(age_ms)
            except (NodeGoneError, NodeError) as error:
                answers = [_code(error)] * len(wanted)
            found.update(zip(wanted, answers, strict=True))
            lost = {shard_of(i, self._cluster.shard_count) for i in wanted if isinstance(found[i], str)}
            failed.update((name, shard) for shard in lost)
            again.extend(lost)

        for _ in range(self._config.retries + 1):
            again: list[int] = []
            assigned, _unanswerable = self._assign(todo, failed)
            timeout_s = self._try_s(deadline)
            if timeout_s <= 0 or not assigned:
                break
            if len(assigned) == 1:
                await one(*next(iter(assigned.items())), timeout_s)
            else:
                async with trio.open_nursery() as nursery:
                    for name, shards in assigned.items():
                        nursery.start_soon(one, name, shards, timeout_s)
            todo = again
            if not todo:
                break
        return found, max(ages_ms)


def _merge(
    parts: list[SearchReply],
    request: requests.Query,
    drop: frozenset[int],
) -> Columns:
    if len(parts) == 1 and not drop:
        return Columns(parts[0].ids, parts[0].scores, parts[0].metadata)
    best = merge.top([(part.ids, part.scores) for part in parts], request.k + len(drop))
    if drop:
        keep = np.flatnonzero(~np.isin(best.ids, np.array(list(drop), np.uint64)))[: request.k]
        best = merge.Merged(best.ids[keep], best.scores[keep], best.places[keep])
    metadata: list[bytes] | None = None
    if request.metadata:
        packed = [one for part in parts for one in part.metadata or ()]
        metadata = [packed[place] for place in best.places.tolist()]
    return Columns(best.ids, best.scores, metadata)


def _code(error: NodeGoneError | NodeError) -> str:
    return error.code if isinstance(error, NodeError) else "unavailable"
