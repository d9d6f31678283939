"""The shards of which this node is a witness: the shell of node/witness.py. An actor.

Votes that follow one primary beat together: a witness of all shards of two hosts costs a few calls a second, not a few each.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random
from typing import Any, NoReturn

import structlog
import trio

from node.commit import CommitStoppedError, OverloadedError
from node.election import Effect, ElectionConfig, Message, Persist, Tell
from node.failover import Failover
from node.links import Links
from node.peerlink import PeerError, RemoteError
from node.promises import Promises
from node.pulls import NotPrimary, read_beaten
from node.witness import Kept, Remember, Vote
from storage.crash_points import reached

log = structlog.get_logger(__name__)

CALL_S = 1.0
SHARDS_MAX = 65_536


class Witnessing:
    """`votes`, by shard, are read by others; only this object changes them."""

    def __init__(
        self,
        name: str,
        kept: Promises,
        failover: Failover,
        links: Links,
        *,
        election: ElectionConfig | None = None,
    ) -> None:
        """kept: of `data/witnessed`. A vote that has been here before this process owes what it may have promised."""
        self._name, self._kept, self._failover, self._links = name, kept, failover, links
        self._config = election or ElectionConfig()
        now = trio.current_time()
        self.votes: dict[int, Vote] = {
            shard: self._vote(Kept(*entry), now, owes=True) for shard, entry in kept.entries().items()
        }
        self._lock = trio.Lock()
        self._news = trio.Event()
        self._following: set[str] = set()
        self._nursery: trio.Nursery | None = None
        self.counters = {"beats": 0, "promises": 0, "failed": 0}

    def _vote(self, kept: Kept, now: float, *, owes: bool) -> Vote:
        return Vote(self._config, self._name, kept, random=Random(), now=now, owes=owes)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        self._following.clear()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                while True:
                    news = self._news
                    for primary in {vote.hint[1] for vote in self.votes.values()} - self._following - {""}:
                        self._following.add(primary)
                        nursery.start_soon(self._follow, primary)
                    await news.wait()
            finally:
                # What comes before it runs again is as good as lost on the way.
                self._nursery = None
        raise AssertionError("unreachable")

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # -- elections ----------------------------------------------------------------------------------------------------

    def on_message(self, peer: str, shard: int, message: Message) -> bool:
        """Of a candidate; whether it was for a vote of ours."""
        vote = self.votes.get(shard)
        if vote is None or getattr(message, "to", 0) != vote.id:
            return False
        self._act(shard, vote, vote.on_message(peer, message, trio.current_time()))
        return True

    def hear(self, shard: int, epoch: int, primary: str) -> None:
        """Somebody says, to us or by gossip, who leads."""
        vote = self.votes.get(shard)
        if vote is not None:
            vote.hear(epoch, primary, trio.current_time())
            self._tell()

    def _act(self, shard: int, vote: Vote, effects: Sequence[Effect | Remember]) -> None:
        for effect in effects:
            if isinstance(effect, Persist | Remember):
                if self._nursery is not None:
                    self._nursery.start_soon(self._keep, shard, vote, effect)
            elif isinstance(effect, Tell):
                self._failover.tell(shard, vote.id, effect.to, effect.message)

    async def _keep(self, shard: int, vote: Vote, effect: Persist | Remember) -> None:
        promised = effect.epoch if isinstance(effect, Persist) else 0
        remembered = effect.epoch if isinstance(effect, Remember) else 0
        try:
            await self._kept.keep(shard, vote.id, promised, remembered)
        except (OSError, CommitStoppedError, OverloadedError) as error:
            log.warning("vote not written", shard=shard, epoch=effect.epoch, reason=str(error))
            self.counters["failed"] += 1
            if isinstance(effect, Persist):
                vote.election.on_persist_failed(effect.epoch, trio.current_time())
            else:
                vote.on_remember_failed()
            return
        now = trio.current_time()
        if isinstance(effect, Remember):
            vote.on_remembered(effect.epoch, now)
            self._tell()
            return
        reached("failover.after_promise")
        self.counters["promises"] += 1
        self._act(shard, vote, vote.election.on_persisted(effect.epoch, now))

    # -- the heartbeat ------------------------------------------------------------------------------------------------

    async def _follow(self, primary: str) -> None:
        """Beats for all votes that take it for their primary; ends when none does."""
        while followed := [one for one in self.votes.items() if one[1].hint[1] == primary]:
            now = trio.current_time()
            due = [(shard, vote) for shard, vote in followed if vote.beat_at <= now]
            if due:
                await self._beat(primary, due)
                continue
            news = self._news
            with trio.move_on_at(min(vote.beat_at for _, vote in followed)):
                await news.wait()
        self._following.discard(primary)

    async def _beat(self, primary: str, due: Sequence[tuple[int, Vote]]) -> None:
        now = trio.current_time()
        body = [[shard, *vote.beat(now).body()] for shard, vote in due]
        self.counters["beats"] += 1
        try:
            link = await self._links.add(primary)
            answers = await link.call("beat", body, CALL_S)
            for (shard, vote), raw in zip(due, answers, strict=True):
                self._take(shard, vote, primary, raw)
        except PeerError:
            await trio.lowlevel.checkpoint()
        except (TypeError, ValueError) as error:
            log.warning("beat_not_answered", primary=primary, reason=str(error))

    def _take(self, shard: int, vote: Vote, primary: str, raw: Any) -> None:
        """Raises TypeError, ValueError."""
        now = trio.current_time()
        answer = None if raw is None else read_beaten(raw)
        if isinstance(answer, NotPrimary):
            vote.hear(answer.epoch, answer.primary, now)
            self._tell()
        elif answer is not None:
            self._act(shard, vote, vote.on_beaten(primary, answer, now))

    # -- what primaries ask -------------------------------------------------------------------------------------------

    def handlers(self) -> Mapping[str, Callable[[str, Any], Awaitable[Any]]]:
        """By op."""
        return {"witness": self.on_bring}

    async def on_bring(self, peer: str, body: Any) -> int:
        """The peer op `witness`: [shard, epoch, primary] → the id of the vote that is here, on the disk. Raises RemoteError."""
        shard, epoch, primary = body
        if type(shard) is not int or not 0 <= shard < SHARDS_MAX:
            raise ValueError(f"{shard!r:.40} is no shard")
        async with self._lock:
            vote = self.votes.get(shard)
            if vote is None:
                id_ = secrets.randbits(62) + 1
                try:
                    await self._kept.keep(shard, id_, 0)
                except (OSError, CommitStoppedError, OverloadedError) as error:
                    raise RemoteError("unavailable", f"the vote could not be written: {error}") from error
                vote = self.votes[shard] = self._vote(Kept(id_), trio.current_time(), owes=False)
                log.info("witnesses", shard=shard, primary=peer)
        vote.beat_at = trio.current_time()
        vote.hear(int(epoch), str(primary), trio.current_time())
        self._tell()
        return vote.id
