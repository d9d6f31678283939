"""Another node over the peer link, and what we answer when another node asks. The two ends of each message stand side by side.

Bodies are msgpack lists, in this order:
  search  [shards, query FP16, k, [all, any, exclude], metadata, session, time left ms]
            → [ids u64, scores f32, metadata | nil, failed, age ms]
  get     [kind, [id…], session, time left ms] → [[[version, vector, classes, metadata] | nil | code …], age ms]
  score   [query FP16, [id…], metadata, session, time left ms] → [[[score, metadata] | nil | code …], age ms]
  write   [[shard, [[operation, kind, id, vector, classes, metadata]…], ack, write_id]…, time left ms]
            → [[shard, epoch, sequence, error, primary]…]
  pull    → node/pulls.py
  beat    [[shard, …]…] of node/pulls.py → [answer | nil for a shard that is not here …]
  offer   [shard, raw records of a tail, time left ms] → [[kind, id, version]…] of those that were put aside
  status  [] → this node's own part of `status`
Time left travels, not wall clock. age ms: how old the oldest replica that answered may be (`Replicator.age_ms`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from node.commit import OverloadedError
from node.local import RETRY_AFTER_MS, LocalNode
from node.peerlink import (
    Call,
    PeerError,
    PeerGoneError,
    PeerLink,
    PeerOverloadedError,
    PeerTimeoutError,
    RemoteError,
)
from node.pulls import NotPrimary, read_beat, read_pull
from node.shard import ShardActor
from router.ports import (
    Answers,
    Change,
    NodeError,
    NodeGoneError,
    SearchAsk,
    SearchReply,
    StoredRecord,
    WriteAsk,
    WriteReply,
)
from router.requests import Session
from storage.errors import DamagedError, StorageError
from storage.records import Kind, Operation, RecordError, split
from storage.view import ClassConstraint

# A reply in flight may come a little after its own time limit; better late than asked again.
GRACE_S = 0.02


class RemoteNode:
    """Implements `router.ports.Node` over a PeerLink."""

    def __init__(self, name: str, link: PeerLink) -> None:
        self._name = name
        self._link = link

    async def _call(self, op: str, body: list[Any], timeout_s: float) -> Any:
        return await self._answer(self._begin(op, body, timeout_s))

    def _begin(self, op: str, body: list[Any], timeout_s: float) -> Call:
        body.append(int(timeout_s * 1000))
        try:
            return self._link.begin(op, body, timeout_s + GRACE_S)
        except PeerError as error:
            raise self._translated(error) from error

    async def _answer(self, call: Call) -> Any:
        try:
            return await call.wait()
        except PeerError as error:
            raise self._translated(error) from error

    def _translated(self, error: PeerError) -> NodeGoneError | NodeError:
        match error:
            case PeerGoneError():
                return NodeGoneError(self._name, sent=error.sent)
            case PeerTimeoutError():
                return NodeError("deadline_exceeded", f"node {self._name} did not answer in time")
            case PeerOverloadedError():
                return NodeError("overloaded", str(error), RETRY_AFTER_MS)
            case RemoteError():
                return NodeError(error.code, error.message, error.retry_after_ms)
            case _:
                return NodeError("too_large", str(error))

    def search(self, ask: SearchAsk, timeout_s: float) -> Coroutine[Any, Any, SearchReply]:
        limit = ask.constraint
        body = [
            ask.shards,
            ask.query.tobytes(),
            ask.k,
            (limit.require_all, limit.require_any, limit.exclude),
            ask.metadata,
            ask.session,
        ]
        return self._found(self._begin("search", body, timeout_s))

    async def _found(self, call: Call) -> SearchReply:
        ids, scores, metadata, failed, age_ms = await self._answer(call)
        return SearchReply(np.frombuffer(ids, "<u8"), np.frombuffer(scores, "<f4"), metadata, failed, age_ms)

    async def get(
        self, kind: Kind, ids: Sequence[int], session: Session, timeout_s: float
    ) -> Answers[StoredRecord]:
        found, age_ms = await self._call("get", [int(kind), ids, session], timeout_s)
        records = [
            StoredRecord((one[0][0], one[0][1]), one[1], tuple(one[2]), one[3])
            if isinstance(one, list)
            else one
            for one in found
        ]
        return Answers(records, age_ms)

    async def score(
        self,
        query: npt.NDArray[np.float16],
        ids: Sequence[int],
        metadata: bool,
        session: Session,
        timeout_s: float,
    ) -> Answers[tuple[float, bytes]]:
        found, age_ms = await self._call("score", [query.tobytes(), ids, metadata, session], timeout_s)
        return Answers([(one[0], one[1]) if isinstance(one, list) else one for one in found], age_ms)

    async def write(self, asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]:
        body = [[ask.shard, [tuple(change) for change in ask.changes], ask.ack, ask.write_id] for ask in asks]
        replies = await self._call("write", [body], timeout_s)
        return [WriteReply(r[0], r[1], r[2], None if r[3] is None else tuple(r[3]), r[4]) for r in replies]


def handlers(
    local: LocalNode, shards: Mapping[int, ShardActor], status: Callable[[], dict[str, Any]]
) -> dict[str, Callable[[str, Any], Awaitable[Any]]]:
    """What this node answers to its peers, by op. Errors leave as RemoteError with their code."""

    async def search(peer: str, body: Any) -> Any:
        wanted, query, k, (every, some, none), metadata, session, left_ms = body
        ask = SearchAsk(
            tuple(wanted),
            np.frombuffer(query, np.float16),
            k,
            ClassConstraint(tuple(every), tuple(some), tuple(none)),
            metadata,
            tuple((s, e, n) for s, e, n in session),
        )
        reply = await local.search(ask, left_ms / 1000)
        return [reply.ids.tobytes(), reply.scores.tobytes(), reply.metadata, reply.failed, reply.age_ms]

    async def get(peer: str, body: Any) -> Any:
        kind, ids, session, left_ms = body
        return await local.get(Kind(kind), ids, tuple((s, e, n) for s, e, n in session), left_ms / 1000)

    async def score(peer: str, body: Any) -> Any:
        query, ids, metadata, session, left_ms = body
        tokens = tuple((s, e, n) for s, e, n in session)
        return await local.score(np.frombuffer(query, np.float16), ids, metadata, tokens, left_ms / 1000)

    async def write(peer: str, body: Any) -> Any:
        asks, left_ms = body
        return await local.write(
            [
                WriteAsk(
                    shard,
                    [
                        Change(Operation(operation), Kind(kind), id_, vector, tuple(classes), metadata)
                        for operation, kind, id_, vector, classes, metadata in changes
                    ],
                    ack,
                    write_id,
                )
                for shard, changes, ack, write_id in asks
            ],
            left_ms / 1000,
        )

    async def pull(peer: str, body: Any) -> Any:
        asked = read_pull(body)
        actor = shards.get(asked.shard)
        if actor is None:
            return NotPrimary(0, "").body()
        try:
            return (await actor.serve_pull(peer, asked)).body()
        except StorageError as error:
            if isinstance(error, DamagedError):
                actor.harm(error)
            raise RemoteError(error.code, str(error)) from error

    async def beat(peer: str, body: Any) -> Any:
        answers: list[Any] = []
        for shard, *fields in body:
            actor = shards.get(shard)
            answers.append(None if actor is None else actor.serve_beat(peer, read_beat(fields)).body())
        return answers

    async def offer(peer: str, body: Any) -> Any:
        shard, data, left_ms = body
        actor = shards.get(shard)
        if actor is None:
            raise RemoteError("no_primary", f"shard {shard} is not on this node")
        try:
            offered = [record for _, record in split(data)]
            aside = await actor.offer(offered, left_ms / 1000)
        except RecordError as error:
            raise RemoteError("bad_request", f"an offered record is damaged: {error}") from error
        except OverloadedError as error:
            raise RemoteError("overloaded", str(error), RETRY_AFTER_MS) from error
        except StorageError as error:
            raise RemoteError(error.code, str(error)) from error
        return [[int(one.kind), one.id, one.version] for one in aside]

    async def tell_status(peer: str, body: Any) -> Any:
        return status()

    return {
        "search": coded(search),
        "get": coded(get),
        "score": coded(score),
        "write": coded(write),
        "pull": coded(pull),
        "beat": coded(beat),
        "offer": coded(offer),
        "status": coded(tell_status),
    }


def coded(handler: Callable[[str, Any], Awaitable[Any]]) -> Callable[[str, Any], Awaitable[Any]]:
    """A peer of a newer or broken version may send a body that we cannot read: that is its fault, and coded so."""

    async def coded(peer: str, body: Any) -> Any:
        try:
            return await handler(peer, body)
        except NodeError as error:
            raise RemoteError(error.code, error.message, retry_after_ms=error.retry_after_ms) from error
        except (TypeError, ValueError) as error:
            raise RemoteError("bad_request", f"the message could not be read: {error}") from error

    return coded
