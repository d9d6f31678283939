"""One request of an app, from its parsed form to its reply. Who is asked for it is up to the fan-out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from router import coverage, requests
from router.config import RouterConfig
from router.errors import Code, RequestError, known
from router.fanout import FanOut, Found
from router.ports import Answers, Asked, Cluster, Done, Node, StoredRecord
from router.requests import Session
from router.ring import shard_of
from router.wire import Columns
from router.writing import Writer
from storage.records import Kind

__all__ = ["Coordinator", "RouterConfig"]

Score = tuple[float, bytes]


class Recommended(NamedTuple):
    """A reply's fields, the user's record that it was made from, and how old in ms what it says may be."""

    reply: dict[str, Any]
    user: StoredRecord
    age_ms: int


class Coordinator:
    """Answers parsed requests over a `Cluster`. Holds no state but counters."""

    def __init__(self, cluster: Cluster, config: RouterConfig, *, metric: str) -> None:
        self._cluster = cluster
        self._fanout = FanOut(cluster, config)
        self._metric = metric
        self._writer = Writer(cluster, config.write_deadline_ms / 1000)
        self._answers: dict[type, Callable[[Any], Awaitable[dict[str, Any]]]] = {
            requests.Recommend: self._recommend,
            requests.Similar: self._similar,
            requests.Search: self._search,
            requests.Batch: self._batch,
            requests.Get: self._get,
            requests.Put: self._writer.put,
            requests.Delete: self._writer.delete,
        }

    def statistics(self) -> dict[str, int]:
        return self._fanout.statistics()

    def peers(self) -> dict[str, dict[str, float]]:
        """Of each node that was asked: latency, load and health as they were seen from here."""
        return self._fanout.peers()

    async def handle(self, request: object) -> dict[str, Any]:
        """The reply's fields. Raises RequestError."""
        return await self._answers[type(request)](request)

    # -- the ops ------------------------------------------------------------------------------------------------

    async def _search(self, request: requests.Search) -> dict[str, Any]:
        return self._reply(await self._fanout.find(request.vector, request))

    async def _recommend(self, request: requests.Recommend) -> dict[str, Any]:
        return (await self.recommend(request)).reply

    async def recommend(
        self, request: requests.Recommend, deadline: float | None = None, user: StoredRecord | None = None
    ) -> Recommended:
        """An answer for the caches. user: the record, when it is known already. Raises RequestError."""
        deadline = deadline or self._fanout.deadline(request.timeout_ms)
        age_ms = 0
        if user is None:
            user, age_ms = await self.one_user(request.user_id, deadline, request.session)
        query = np.frombuffer(user.vector, np.float16)
        found = await self._fanout.find(query, request, deadline, age_ms=age_ms)
        return Recommended(self._reply(found), user, found.age_ms)

    async def items_exist(self, ids: Sequence[int], deadline: float) -> int | None:
        """How old in ms the answer may be, when it is that all of them are there; else None."""
        records, age_ms = await self._look_up(Kind.ITEM, ids, deadline, ())
        return age_ms if all(isinstance(record, StoredRecord) for record in records) else None

    def allowed_s(self, timeout_ms: float | None) -> float:
        """How long a read may take that asks for that limit."""
        return self._fanout.allowed_s(timeout_ms)

    async def _similar(self, request: requests.Similar) -> dict[str, Any]:
        deadline = self._fanout.deadline(request.timeout_ms)
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
        found = await self._fanout.find(
            mean.astype(np.float16), request, deadline, drop=frozenset(given), age_ms=age_ms
        )
        return self._reply(found)

    async def _batch(self, request: requests.Batch) -> dict[str, Any]:
        deadline = self._fanout.deadline(request.timeout_ms)
        user, age_ms = await self.one_user(request.user_id, deadline, request.session)
        query = np.frombuffer(user.vector, np.float16)

        def begin(node: Node, ids: Sequence[int], timeout_s: float, done: Done[Answers[Score]]) -> Asked:
            return node.score(query, ids, request.metadata, request.session, timeout_s, done)

        scored, scored_age_ms = await self._fanout.look_up(
            request.media_ids, begin, deadline, request.session
        )
        shard_count = self._cluster.shard_count
        lost = {shard_of(i, shard_count): v for i, v in scored.items() if isinstance(v, str)}
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
        found = Found(columns, lost, len(asked), max(age_ms, scored_age_ms))
        found.check(require_full=request.require_full)
        reply = self._reply(found)
        reply["unknown"] = [i for i, v in scored.items() if v is None]
        return reply

    async def _get(self, request: requests.Get) -> dict[str, Any]:
        records, age_ms = await self._look_up(
            request.kind, request.ids, self._fanout.deadline(request.timeout_ms), request.session
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

        def begin(
            node: Node, some: Sequence[int], timeout_s: float, done: Done[Answers[StoredRecord]]
        ) -> Asked:
            return node.get(kind, some, session, timeout_s, done)

        found, age_ms = await self._fanout.look_up(ids, begin, deadline, session)
        return Answers([found[i] for i in ids], age_ms)

    @staticmethod
    def _reply(found: Found) -> dict[str, Any]:
        return {"hits": found.columns, "coverage": found.coverage()} | _stale(found.age_ms)


def _stale(age_ms: int) -> dict[str, int]:
    """The reply's word that it may be too old; replicas that do not lag count as level."""
    return {"stale_ms": age_ms} if age_ms > coverage.LAG_MS_MAX else {}


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
