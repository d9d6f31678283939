"""Another node over the peer link, and what we answer when another node asks. The two ends of each message stand side by side.

Bodies are msgpack lists, in this order:
  search  [shards, query FP16, k, [all, any, exclude], metadata, session, priority, source, time left ms]
            → [ids u64, scores f32, metadata | nil, failed, age ms]
  get     [kind, [id…], session, time left ms] → [[[version, vector, classes, metadata] | nil | code …], age ms]
  score   [query FP16, [id…], metadata, session, time left ms] → [[[score, metadata] | nil | code …], age ms]
  write   [[shard, [[operation, kind, id, vector, classes, metadata]…], ack, write_id]…, time left ms]
            → [[shard, epoch, sequence, error, primary]…]
  pull    → node/pulls.py
  beat    [[shard, …]…] of node/pulls.py → [answer | nil for a shard that is not here …]
  offer   [shard, raw records of a tail, time left ms] → [[kind, id, version]…] of those that were put aside
  status  [] → this node's own part of `status`
Time left travels, not wall clock; a read that its asker takes back ends (`frames.CANCEL`). source: for whom the coordinator
asks, a number that means something to it alone. age ms: how old the oldest replica that answered may be (`Replicator.age_ms`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CoroutineType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import outcome

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
from node.peerlistener import Later
from node.pulls import NotPrimary, read_beat, read_pull
from node.shard import ShardActor
from router.ports import (
    Answers,
    Asked,
    Change,
    Done,
    NodeError,
    NodeGoneError,
    SearchAsk,
    SearchReply,
    StoredRecord,
    WriteAsk,
    WriteReply,
)
from router.requests import PRIORITIES, Session
from storage.errors import DamagedError, StorageError
from storage.records import Kind, Operation, RecordError, split
from storage.view import ClassConstraint

# A reply in flight may come a little after its own time limit; better late than asked again.
GRACE_S = 0.02
GRACE_PART = 0.1
K_MAX = 1 << 20
LEFT_MAX_S = 3_600.0
T = TypeVar("T")


class RemoteNode:
    """Implements `router.ports.Node` over a PeerLink."""

    def __init__(self, name: str, link: PeerLink) -> None:
        self._name = name
        self._link = link

    def _begin(self, op: str, body: list[Any], timeout_s: float) -> Call:
        body.append(timeout_s * 1000)
        try:
            return self._link.begin(op, body, timeout_s + min(GRACE_S, GRACE_PART * timeout_s))
        except PeerError as error:
            raise self._translated(error) from error

    def _ask(
        self, op: str, body: list[Any], timeout_s: float, unpack: Callable[[Any], T], done: Done[T]
    ) -> Call:
        """`done` is called with what `unpack` makes of the answer."""

        def tell(result: outcome.Outcome[Any]) -> None:
            if isinstance(result, outcome.Value):
                try:
                    answer = unpack(result.value)
                except (TypeError, ValueError, IndexError) as error:
                    message = f"the answer of node {self._name} to {op} could not be read: {error}"
                    done(outcome.Error(NodeError("internal", message)))
                else:
                    done(outcome.Value(answer))
                return
            assert isinstance(result, outcome.Error)
            assert isinstance(result.error, PeerError)
            done(outcome.Error(self._translated(result.error)))

        call = self._begin(op, body, timeout_s)
        call.tell(tell)
        return call

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

    def search(self, ask: SearchAsk, timeout_s: float, done: Done[SearchReply]) -> Asked:
        limit = ask.constraint
        body = [
            ask.shards,
            ask.query.tobytes(),
            ask.k,
            (limit.require_all, limit.require_any, limit.exclude),
            ask.metadata,
            ask.session,
            ask.priority,
            ask.source,
        ]
        return self._ask("search", body, timeout_s, _search_reply, done)

    def get(
        self,
        kind: Kind,
        ids: Sequence[int],
        session: Session,
        timeout_s: float,
        done: Done[Answers[StoredRecord]],
    ) -> Asked:
        return self._ask("get", [int(kind), ids, session], timeout_s, _records, done)

    def score(
        self,
        query: npt.NDArray[np.float16],
        ids: Sequence[int],
        metadata: bool,
        session: Session,
        timeout_s: float,
        done: Done[Answers[tuple[float, bytes]]],
    ) -> Asked:
        return self._ask("score", [query.tobytes(), ids, metadata, session], timeout_s, _scores, done)

    async def write(self, asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]:
        body = [[ask.shard, [tuple(change) for change in ask.changes], ask.ack, ask.write_id] for ask in asks]
        try:
            replies = await self._begin("write", [body], timeout_s).wait()
        except PeerError as error:
            raise self._translated(error) from error
        return [WriteReply(r[0], r[1], r[2], None if r[3] is None else tuple(r[3]), r[4]) for r in replies]


def _search_reply(body: Any) -> SearchReply:
    ids, scores, metadata, failed, age_ms = body
    reply = SearchReply(np.frombuffer(ids, "<u8"), np.frombuffer(scores, "<f4"), metadata, failed, age_ms)
    lengths = {len(reply.ids), len(reply.scores), len(reply.ids if metadata is None else metadata)}
    if len(lengths) > 1 or type(failed) is not dict or type(age_ms) is not int:
        raise ValueError("columns of different lengths, or fields of wrong types")
    return reply


def _records(body: Any) -> Answers[StoredRecord]:
    found, age_ms = body
    records = [
        StoredRecord((one[0][0], one[0][1]), one[1], tuple(one[2]), one[3]) if isinstance(one, list) else one
        for one in found
    ]
    return Answers(records, age_ms)


def _scores(body: Any) -> Answers[tuple[float, bytes]]:
    found, age_ms = body
    return Answers([(one[0], one[1]) if isinstance(one, list) else one for one in found], age_ms)


def handlers(
    local: LocalNode, shards: Mapping[int, ShardActor], status: Callable[[], dict[str, Any]]
) -> dict[str, Callable[[str, Any], Awaitable[Any]]]:
    """What this node answers to its peers, by op. Errors leave as RemoteError with their code."""

    def search(peer: str, body: Any) -> Any:
        wanted, query, k, (every, some, none), metadata, session, priority, source, left_ms = body
        # What the lane sorts and counts by: nothing odd may get in, or it ends the others' searches, too.
        if type(k) is not int or not 1 <= k <= K_MAX or type(source) is not int:
            raise ValueError(f"k is {k!r:.40}, source is {source!r:.40}")
        left_s = float(left_ms) / 1000
        if not 0 <= left_s <= LEFT_MAX_S:
            raise ValueError(f"time left is {left_ms!r:.40} ms")
        priority = min(max(0, int(priority)), len(PRIORITIES) - 1)
        ask = SearchAsk(
            tuple(wanted),
            np.frombuffer(query, np.float16),
            k,
            ClassConstraint(tuple(every), tuple(some), tuple(none)),
            metadata,
            tuple((s, e, n) for s, e, n in session),
            priority,
            (peer, source),
        )
        if ask.session:
            return search_after(ask, left_s)
        return Later(lambda done: local.search(ask, left_s, done), pack_found)

    async def search_after(ask: SearchAsk, left_s: float) -> Any:
        return pack_found(await local.search_after(ask, left_s))

    def pack_found(reply: SearchReply) -> Any:
        return [reply.ids.tobytes(), reply.scores.tobytes(), reply.metadata, reply.failed, reply.age_ms]

    def get(peer: str, body: Any) -> Any:
        kind, ids, session, left_ms = body
        if session:
            return get_after(Kind(kind), ids, session, left_ms / 1000)
        return local.records(Kind(kind), ids)

    async def get_after(kind: Kind, ids: Sequence[int], session: Any, left_s: float) -> Any:
        tokens = tuple((s, e, n) for s, e, n in session)
        return local.records(kind, ids, await local.behind(ids, tokens, left_s))

    def score(peer: str, body: Any) -> Any:
        query, ids, metadata, session, left_ms = body
        vector = np.frombuffer(query, np.float16)
        if session:
            return score_after(vector, ids, metadata, session, left_ms / 1000)
        return local.scores(vector, ids, metadata)

    async def score_after(
        vector: npt.NDArray[np.float16], ids: Sequence[int], metadata: bool, session: Any, left_s: float
    ) -> Any:
        tokens = tuple((s, e, n) for s, e, n in session)
        return local.scores(vector, ids, metadata, await local.behind(ids, tokens, left_s))

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
        "search": coded_now(search),
        "get": coded_now(get),
        "score": coded_now(score),
        "write": coded(write),
        "pull": coded(pull),
        "beat": coded(beat),
        "offer": coded(offer),
        "status": coded(tell_status),
    }


def coded(handler: Callable[[str, Any], Awaitable[Any]]) -> Callable[[str, Any], Awaitable[Any]]:
    """A peer of a newer or broken version may send a body that we cannot read: that is its fault, and coded so."""

    async def coded(peer: str, body: Any) -> Any:
        with _coded():
            return await handler(peer, body)

    return coded


def coded_now(handler: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The same for a handler that answers at once, or returns what is to be awaited."""

    def coded_now(peer: str, body: Any) -> Any:
        with _coded():
            answer = handler(peer, body)
        return _awaited(answer) if isinstance(answer, CoroutineType) else answer

    return coded_now


async def _awaited(answer: Awaitable[Any]) -> Any:
    with _coded():
        return await answer


@contextmanager
def _coded() -> Iterator[None]:
    try:
        yield
    except NodeError as error:
        raise RemoteError(error.code, error.message, retry_after_ms=error.retry_after_ms) from error
    except (TypeError, ValueError) as error:
        raise RemoteError("bad_request", f"the message could not be read: {error}") from error
