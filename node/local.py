"""This node as the coordinator sees it: its own replicas, without a wire between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import outcome
import trio

from node.commit import OverloadedError
from node.lane import LaneAsk, LaneReply, LaneStoppedError, LaneTicket, LaneTimeoutError, SearchLane
from node.replicator import Replicator
from node.shard import ShardActor
from router.ports import (
    Answers,
    Asked,
    Done,
    NodeError,
    SearchAsk,
    SearchReply,
    StoredRecord,
    WriteAsk,
    WriteReply,
)
from router.requests import Session
from router.ring import shard_of
from storage.errors import DamagedError, StorageError
from storage.records import Kind

RETRY_AFTER_MS = 50
NO_SHARDS: Mapping[int, str] = {}
T = TypeVar("T")


class _Nothing:
    """What has been answered before it could be cancelled."""

    def cancel(self) -> None:
        pass


NOTHING = _Nothing()


class LocalNode:
    """Answers for the shards whose actors it is given. Implements `router.ports.Node`."""

    def __init__(
        self,
        shards: Mapping[int, ShardActor],
        followers: Mapping[int, Replicator],
        lane: SearchLane,
        shard_count: int,
        looked_up: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """followers: of all shards; read at each answer, so may be filled later. looked_up: told how long each look-up took."""
        self._shards = shards
        self._followers = followers
        self._lane = lane
        self._shard_count = shard_count
        self._looked_up = looked_up

    def search(self, ask: SearchAsk, timeout_s: float, done: Done[SearchReply]) -> Asked:
        """Is in the lane when this returns; a session is for whoever asks to wait for (`caught_up`)."""
        failed: dict[int, str] = {}
        ticket = self._begin(ask, failed, timeout_s)
        ticket.tell(partial(self._tell, ask.shards, failed, done))
        return ticket

    async def search_after(self, ask: SearchAsk, timeout_s: float) -> SearchReply:
        """Waits for the session first."""
        deadline = trio.current_time() + timeout_s
        failed = await self.caught_up(ask.shards, ask.session, timeout_s)
        ticket = self._begin(ask, failed, deadline - trio.current_time())
        try:
            return self._found(ask.shards, failed, await ticket.wait())
        except (LaneTimeoutError, LaneStoppedError, OverloadedError) as error:
            raise _translated(error) from error

    def _begin(self, ask: SearchAsk, failed: dict[int, str], timeout_s: float) -> LaneTicket:
        """Into the lane, without the shards in `failed`, to which those are added that are not here."""
        replicas = []
        for shard in ask.shards:
            actor = self._shards.get(shard)
            if actor is None:
                failed[shard] = "unavailable"
            elif actor.unreadable:
                failed[shard] = actor.unreadable
            elif shard not in failed:
                replicas.append(actor.replica)
        try:
            return self._lane.begin(
                LaneAsk(replicas, ask.query, ask.k, ask.constraint, ask.metadata, ask.source, ask.priority),
                timeout_s,
            )
        except (LaneStoppedError, OverloadedError) as error:
            raise _translated(error) from error

    def _tell(
        self,
        shards: Sequence[int],
        failed: dict[int, str],
        done: Done[SearchReply],
        result: outcome.Outcome[LaneReply],
    ) -> None:
        if isinstance(result, outcome.Value):
            done(outcome.Value(self._found(shards, failed, result.value)))
        else:
            assert isinstance(result, outcome.Error)
            done(outcome.Error(_translated(result.error)))

    def _found(self, shards: Sequence[int], failed: dict[int, str], reply: LaneReply) -> SearchReply:
        failed |= reply.failed
        for shard, code in reply.failed.items():
            if code == DamagedError.code and shard in self._shards:
                self._shards[shard].harm(DamagedError(f"shard-{shard:03}", None, "a search found it"))
        age_ms = self._age_ms([shard for shard in shards if shard not in failed])
        return SearchReply(reply.ids, reply.scores, reply.metadata, failed, age_ms)

    def _age_ms(self, shards: Iterable[int]) -> int:
        """Whoever asked, this node knows best how far its own replicas are behind."""
        followers = self._followers
        return max([followers[shard].age_ms for shard in shards if shard in followers], default=0)

    async def caught_up(self, shards: Sequence[int], session: Session, timeout_s: float) -> dict[int, str]:
        """Those of `shards` that have not applied what the session has seen. Waits half the time: another may be ahead."""
        behind: dict[int, str] = {}
        deadline = trio.current_time() + timeout_s / 2
        for shard, epoch, sequence in session:
            actor = self._shards.get(shard)
            if shard not in shards or actor is None:
                continue
            if not await actor.wait_applied(epoch, sequence, max(0.0, deadline - trio.current_time())):
                behind[shard] = "session_behind"
        return behind

    async def behind(self, ids: Sequence[int], session: Session, timeout_s: float) -> dict[int, str]:
        """`caught_up`, for the shards of some ids."""
        return await self.caught_up([shard_of(i, self._shard_count) for i in ids], session, timeout_s)

    def get(
        self,
        kind: Kind,
        ids: Sequence[int],
        session: Session,
        timeout_s: float,
        done: Done[Answers[StoredRecord]],
    ) -> Asked:
        done(outcome.Value(self.records(kind, ids)))
        return NOTHING

    def records(
        self, kind: Kind, ids: Sequence[int], behind: Mapping[int, str] = NO_SHARDS
    ) -> Answers[StoredRecord]:
        begun = time.perf_counter()
        found = [self._get(kind, id_, behind) for id_ in ids]
        self._looked_up(time.perf_counter() - begun)
        return self._aged(ids, found)

    def _aged(self, ids: Sequence[int], found: Sequence[T | str | None]) -> Answers[T]:
        answered = {
            shard_of(id_, self._shard_count)
            for id_, one in zip(ids, found, strict=True)
            if not isinstance(one, str)
        }
        return Answers(found, self._age_ms(answered))

    def _get(self, kind: Kind, id_: int, behind: Mapping[int, str]) -> StoredRecord | str | None:
        shard = shard_of(id_, self._shard_count)
        actor = self._shards.get(shard)
        if actor is None:
            return "unavailable"
        if actor.unreadable:
            return actor.unreadable
        if shard in behind:
            return behind[shard]
        try:
            row = actor.replica.get(kind, id_)
        except StorageError as error:
            if isinstance(error, DamagedError):
                actor.harm(error)
            return error.code
        if row is None:
            return None
        return StoredRecord((row.version.epoch, row.version.sequence), row.vector, row.classes, row.metadata)

    def score(
        self,
        query: npt.NDArray[np.float16],
        ids: Sequence[int],
        metadata: bool,
        session: Session,
        timeout_s: float,
        done: Done[Answers[tuple[float, bytes]]],
    ) -> Asked:
        done(outcome.Value(self.scores(query, ids, metadata)))
        return NOTHING

    def scores(
        self,
        query: npt.NDArray[np.float16],
        ids: Sequence[int],
        metadata: bool,
        behind: Mapping[int, str] = NO_SHARDS,
    ) -> Answers[tuple[float, bytes]]:
        """Exact scores, as a search would give them: FP16 products summed in float64, rounded to float32."""
        wide = query.astype(np.float64)
        out: list[tuple[float, bytes] | str | None] = []
        for id_ in ids:
            record = self._get(Kind.ITEM, id_, behind)
            if isinstance(record, StoredRecord):
                vector = np.frombuffer(record.vector, np.float16).astype(np.float64)
                score = float(np.float32(np.add.reduce(vector * wide)))
                out.append((score, record.metadata if metadata else b""))
            else:
                out.append(record)
        return self._aged(ids, out)

    async def write(self, asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]:
        replies: list[WriteReply] = []

        async def one(ask: WriteAsk) -> None:
            replies.append(await self._write(ask, timeout_s))

        if len(asks) == 1:
            await one(asks[0])
        else:
            async with trio.open_nursery() as nursery:
                for ask in asks:
                    nursery.start_soon(one, ask)
        return replies

    async def _write(self, ask: WriteAsk, timeout_s: float) -> WriteReply:
        actor = self._shards.get(ask.shard)
        if actor is None:
            return WriteReply(ask.shard, 0, 0, ("no_primary", f"shard {ask.shard} is not on this node", None))
        try:
            version = await actor.write(ask.changes, ask.ack, ask.write_id, timeout_s)
        except OverloadedError as error:
            return WriteReply(ask.shard, 0, 0, ("overloaded", str(error), RETRY_AFTER_MS))
        except NodeError as error:
            hint = actor.hint[1] if error.code == "no_primary" else ""
            return WriteReply(ask.shard, 0, 0, (error.code, error.message, error.retry_after_ms), hint)
        return WriteReply(ask.shard, version.epoch, version.sequence, None)


def _translated(error: BaseException) -> NodeError:
    match error:
        case LaneTimeoutError():
            return NodeError("deadline_exceeded", str(error))
        case OverloadedError():
            return NodeError("overloaded", str(error), error.retry_after_ms)
        case LaneStoppedError():
            return NodeError(error.code, str(error))
        case _:
            return NodeError("internal", f"the search failed: {error!r}")
