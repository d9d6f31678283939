"""One request of an app, from its parsed form to its reply. The shell over ring, coverage and merge."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import trio

from router import coverage, merge, requests
from router.coverage import Sight
from router.errors import Code, RequestError, known
from router.ports import Answers, Cluster, NodeError, NodeGoneError, SearchAsk, SearchReply, StoredRecord
from router.requests import Session
from router.ring import shard_of
from router.wire import Columns
from router.writing import Writer
from storage.records import Kind

Query = npt.NDArray[np.float16]
# By node: the shards that it is asked for; and those that nobody can answer.
Assignment = tuple[dict[str, list[int]], list[int]]
# What is known of other nodes is older than that anyway, and a try that fails looks again.
SHARED_S = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Time limits of a request, in milliseconds, and how often a shard is tried on another replica."""

    deadline_ms: int = 1_000
    try_ms: int = 400
    retries: int = 2
    write_deadline_ms: int = 10_000


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


class Recommended(NamedTuple):
    """A reply's fields, the user's record that it was made from, and how old in ms what it says may be."""

    reply: dict[str, Any]
    user: StoredRecord
    age_ms: int


class Coordinator:
    """Answers parsed requests over a `Cluster`. Holds no state but counters."""

    def __init__(self, cluster: Cluster, config: RouterConfig, *, metric: str) -> None:
        self._cluster = cluster
        self._config = config
        self._metric = metric
        self._writer = Writer(cluster, config.write_deadline_ms / 1000)
        self._all = tuple(range(cluster.shard_count))
        self._answers: dict[type, Callable[[Any], Awaitable[dict[str, Any]]]] = {
            requests.Recommend: self._recommend,
            requests.Similar: self._similar,
            requests.Search: self._search,
            requests.Batch: self._batch,
            requests.Get: self._get,
            requests.Put: self._writer.put,
            requests.Delete: self._writer.delete,
        }
        self._first: tuple[float, Assignment] = (-math.inf, ({}, []))
        self.counters = {"retries": 0, "partial": 0}

    def statistics(self) -> dict[str, int]:
        return dict(self.counters)

    async def handle(self, request: object) -> dict[str, Any]:
        """The reply's fields. Raises RequestError."""
        return await self._answers[type(request)](request)

    # -- the ops ------------------------------------------------------------------------------------------------

    async def _search(self, request: requests.Search) -> dict[str, Any]:
        return self._reply(await self._find(request.vector, request))

    async def _recommend(self, request: requests.Recommend) -> dict[str, Any]:
        return (await self.recommend(request)).reply

    async def recommend(
        self, request: requests.Recommend, deadline: float | None = None, user: StoredRecord | None = None
    ) -> Recommended:
        """An answer for the caches. user: the record, when it is known already. Raises RequestError."""
        deadline = deadline or self._deadline(request.timeout_ms)
        age_ms = 0
        if user is None:
            user, age_ms = await self.one_user(request.user_id, deadline, request.session)
        query = np.frombuffer(user.vector, np.float16)
        found = await self._find(query, request, deadline, age_ms=age_ms)
        return Recommended(self._reply(found), user, found.age_ms)

    async def items_exist(self, ids: Sequence[int], deadline: float) -> int | None:
        """How old in ms the answer may be, when it is that all of them are there; else None."""
        records, age_ms = await self._look_up(Kind.ITEM, ids, deadline, ())
        return age_ms if all(isinstance(record, StoredRecord) for record in records) else None

    def allowed_s(self, timeout_ms: float | None) -> float:
        """How long a read may take that asks for that limit."""
        return (timeout_ms or self._config.deadline_ms) / 1000

    async def _similar(self, request: requests.Similar) -> dict[str, Any]:
        deadline = self._deadline(request.timeout_ms)
        given = [*request.positive, *request.negative]
        records, age_ms = await self._look_up(Kind.ITEM, given, deadline, request.session)
        # The mean of the positive items, less the mean of the negative ones.
        weights = [1.0 / len(request.positive)] * len(request.positive)
        weights += [-1.0 / len(request.negative)] * len(request.negative) if request.negative else []
        mean = np.zeros(0, np.float32)
        for media_id, record, weight in zip(given, records, weights, strict=True):
            if not isinstance(record, StoredRecord):
                raise _missing_record("unknown_item", "media_id", media_id, record)
            vector = np.frombuffer(record.vector, np.float16).astype(np.float32)
            mean = vector * weight if not mean.size else mean + vector * weight
        if self._metric == "cosine":
            norm = float(np.linalg.norm(mean))
            if norm == 0.0:
                raise RequestError("zero_vector", "the given items cancel each other out", "negative")
            mean /= norm
        found = await self._find(
            mean.astype(np.float16), request, deadline, drop=frozenset(given), age_ms=age_ms
        )
        return self._reply(found)

    async def _batch(self, request: requests.Batch) -> dict[str, Any]:
        deadline = self._deadline(request.timeout_ms)
        user, age_ms = await self.one_user(request.user_id, deadline, request.session)
        query = np.frombuffer(user.vector, np.float16)

        async def ask(node: str, ids: Sequence[int], timeout_s: float) -> Answers[Any]:
            return await self._cluster.node(node).score(
                query, ids, request.metadata, request.session, timeout_s
            )

        scored, scored_age_ms = await self._scatter(list(dict.fromkeys(request.media_ids)), ask, deadline)
        shard_count = self._cluster.shard_count
        lost = {shard_of(i, shard_count): str(v) for i, v in scored.items() if isinstance(v, str)}
        good = sorted(
            ((i, v) for i, v in scored.items() if isinstance(v, tuple)),
            key=lambda pair: (-pair[1][0], pair[0]),
        )
        columns = Columns(
            np.array([i for i, _ in good], np.uint64),
            np.array([v[0] for _, v in good], np.float32),
            [v[1] for _, v in good] if request.metadata else None,
        )
        asked = {shard_of(i, shard_count) for i in scored}
        reply = self._reply(Found(columns, list(lost), len(asked), lost, max(age_ms, scored_age_ms)))
        reply["unknown"] = [i for i, v in scored.items() if v is None]
        return reply

    async def _get(self, request: requests.Get) -> dict[str, Any]:
        records, age_ms = await self._look_up(
            request.kind, request.ids, self._deadline(request.timeout_ms), request.session
        )
        out: list[dict[str, Any] | None] = []
        for id_, record in zip(request.ids, records, strict=True):
            if isinstance(record, str):
                raise _missing_record("unknown_item", "ids", id_, record)
            if record is None:
                out.append(None)
                continue
            entry: dict[str, Any] = {
                "id": id_,
                "version": list(record.version),
                "classes": list(record.classes),
                "metadata": record.metadata,
            }
            if request.vector:
                entry["vector"] = record.vector
            out.append(entry)
        return {"records": out} | _stale(age_ms)

    # -- fan-out ------------------------------------------------------------------------------------------------

    def _deadline(self, timeout_ms: float | None) -> float:
        return trio.current_time() + self.allowed_s(timeout_ms)

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

    async def _find(
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
        deadline = deadline or self._deadline(request.timeout_ms)
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

    async def one_user(self, user_id: int, deadline: float, session: Session) -> tuple[StoredRecord, int]:
        """The user and how old, in ms, the replica that brought it may be."""
        (record,), age_ms = await self._look_up(Kind.USER, [user_id], deadline, session)
        if not isinstance(record, StoredRecord):
            raise _missing_record("unknown_user", "user_id", user_id, record)
        return record, age_ms

    async def _look_up(
        self, kind: Kind, ids: Sequence[int], deadline: float, session: Session
    ) -> Answers[StoredRecord]:
        """Records by id, in order, from all shards."""

        async def ask(node: str, some: Sequence[int], timeout_s: float) -> Answers[Any]:
            return await self._cluster.node(node).get(kind, some, session, timeout_s)

        found, age_ms = await self._scatter(list(dict.fromkeys(ids)), ask, deadline)
        return Answers([found[i] for i in ids], age_ms)

    async def _scatter(
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

    @staticmethod
    def _reply(found: Found) -> dict[str, Any]:
        return {"hits": found.columns, "coverage": found.coverage()} | _stale(found.age_ms)


def _stale(age_ms: int) -> dict[str, int]:
    """The reply's word that it may be too old; replicas that do not lag count as level."""
    return {"stale_ms": age_ms} if age_ms > coverage.LAG_MS_MAX else {}


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


def _missing_record(code: Code, field: str, id_: int, found: object) -> RequestError:
    """Absent is one thing, unreachable another."""
    if found is None:
        word = field.removesuffix("_id")
        return RequestError(code, f"{word} {id_} is not known; put it first", field)
    if found == "overloaded":
        return RequestError(
            "overloaded", f"the shard of {field} {id_} has too much to do", field, retry_after_ms=50
        )
    return RequestError(
        "unavailable" if found in ("unavailable", "deadline_exceeded") else known(str(found)),
        f"no replica of the shard of {field} {id_} could answer ({found}); try again",
        field,
    )
