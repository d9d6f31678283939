"""The pull stream: one loop per replica of this node. It rests while we lead, and follows whoever leads; where the primary's log
no longer begins before ours ends, by a snapshot. The shell of node/replication.py and node/fork.py."""

from __future__ import annotations

import contextlib
from random import Random
from typing import NoReturn

import structlog
import trio

from node import replication
from node.fetching import Fetcher, SnapshotError, opened
from node.links import Links
from node.peerlink import (
    PeerError,
    PeerGoneError,
    PeerLink,
    PeerOverloadedError,
    PeerTimeoutError,
    PeerTooLargeError,
    RemoteError,
)
from node.pulls import Answer, Forked, NotPrimary, Pull, Streamed, read_answer
from node.shard import ShardActor
from node.transfer import Transfer
from storage.arrival import arrival
from storage.errors import DamagedError, DiskFullError, LogGoneError, ReplicaStoppedError, StorageError
from storage.records import EMPTY, Fingerprint, RecordError

log = structlog.get_logger(__name__)

PULL_BYTES = 1 << 20
CALL_S = 2.0
BACKOFF_S = (0.02, 0.5)
# While nobody is known to lead, voters are asked in turn.
ASK_AROUND_S = 0.2
DOUBT_AFTER = 6
# Between two tries to catch up by a snapshot; the lesser when it is only not our turn.
SNAPSHOT_BACKOFF_S = (0.5, 15.0)
# How old the data of a replica is taken to be that has none yet: older than that of any other.
BLANK_MS = 86_400_000


class Replicator:
    """Follows one shard's primary. An actor: `run` never returns unless the logs have diverged."""

    def __init__(
        self, actor: ShardActor, links: Links, random: Random, fetcher: Fetcher | None = None
    ) -> None:
        """links: by node name; those that are missing cannot be reached. fetcher: shared by the replicas of a node."""
        self._actor = actor
        self._fetcher = fetcher or Fetcher()
        # The snapshot that is being fetched, or was last.
        self.transfer = Transfer()
        self._snapshot_failures = 0
        self._links = links
        self._random = random
        self._failures = 0
        self._turn = 0
        self._state = "starting"
        self.behind = 0
        # How old our data may have been at `_heard`. Before the primary is heard we only know when we wrote last.
        self._old_ms = int(actor.idle_s() * 1000)
        # Its log was empty when it was opened, and it has not been level since: it may lack anything.
        self._blank = actor.replica.position.sequence == 0
        self._heard = trio.current_time()
        self._named = EMPTY  # our last record as pulls name it; the disk is asked once after a start
        # The newest stamp of the primary that we follow, and in which epoch it was sent.
        self._echo: tuple[int, float] | None = None

    @property
    def state(self) -> str:
        """In words; a snapshot that is being fetched with how far it is."""
        actor = self._actor
        if actor.leads:
            return "leading"  # also before the loop has noticed
        if self._state in ("primary silent", "no primary") and actor.election.overruled:
            return (
                "no vote: a primary was forced elsewhere; it waits for that one, or for gmco failover --force"
            )
        if self._state in ("primary silent", "no primary") and actor.disowned:
            # Nobody is to be waited for when it is the only one.
            return "no vote: its promises were lost; a primary lets it in again, or gmco failover --force"
        return str(self.transfer) if self._state == "fetching" else self._state

    @property
    def age_ms(self) -> int:
        """How old this replica's data may be: its lag when it last heard the primary, and the time since."""
        if self._actor.leads:
            return 0
        return max(self._old_ms, BLANK_MS * self._blank) + self._silent_ms

    @property
    def lag_ms(self) -> int:
        """How far behind it is: 0 while it leads, or is level on a live stream, else its age."""
        if self._actor.leads:
            return 0
        return replication.follower_lag_ms(
            following=self.state == "following" and not self._blank,
            behind=self.behind,
            old_ms=max(self._old_ms, BLANK_MS * self._blank),
            silent_ms=self._silent_ms,
        )

    @property
    def _silent_ms(self) -> int:
        return int((trio.current_time() - self._heard) * 1000)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        task_status.started()
        actor = self._actor
        while True:
            if actor.leads:
                await self._rest()
                continue
            _, primary = actor.hint
            if not primary or primary == actor.name:
                primary = await self._somebody()
            try:
                await self._pull(primary)
            except (PeerGoneError, PeerTimeoutError):
                self._state = "primary silent"
                if self._failures >= DOUBT_AFTER:
                    # What we were told of it may be wrong; others may know better.
                    actor.doubt(actor.hint[0])
                await self._back_off()
            except RemoteError as error:
                if error.code == "diverged":
                    await self._stop_for_good(primary, error.message)
                if error.code == LogGoneError.code:
                    await self._catch_up(primary)
                    continue
                self._say(f"refused: {error.code}", error.message)
                await self._back_off()
            except LogGoneError:
                # The logs part before ours begins.
                await self._catch_up(primary)
            except (PeerOverloadedError, PeerTooLargeError) as error:
                self._say(f"stuck: {error.code}", str(error))
                await self._back_off()
            except DamagedError as error:
                # Our log cannot be read where the primary asks for it.
                if not actor.harm(error):
                    raise
                self._say("damaged", str(error))
                await trio.sleep_forever()
            except ReplicaStoppedError as error:
                # Never again into the dark: the process stops, loudly, through the supervisor.
                raise DamagedError(f"shard-{actor.shard:03}", None, str(error)) from error
            except DiskFullError as error:
                self._say(f"stuck: {error.code}", str(error))
                await self._back_off()

    async def _rest(self) -> None:
        self._state = "leading"
        self._level()
        self.behind = self._old_ms = 0
        self._echo = None
        while self._actor.leads:
            self._heard = trio.current_time()
            await self._actor.changed()
        self._heard = trio.current_time()

    async def _somebody(self) -> str:
        """A voter that may know more; waits a little for news first."""
        self._state = "no primary"
        hint = self._actor.hint
        with trio.move_on_after(ASK_AROUND_S * (0.5 + self._random.random() / 2)):
            while self._actor.hint == hint and not self._actor.leads:
                await self._actor.changed()
        _, primary = self._actor.hint
        if primary and primary != self._actor.name:
            return primary
        others = [name for name in self._actor.placement.names if name != self._actor.name]
        self._turn += 1
        return others[self._turn % len(others)] if others else ""

    async def _stop_for_good(self, primary: str, reason: str) -> NoReturn:
        # Only a person can say which copy is right; pulling on would not help and writing would harm.
        self._state = "diverged"
        self._actor.diverged = True
        log.error("diverged", shard=self._actor.shard, primary=primary, reason=reason)
        await trio.sleep_forever()

    def _level(self) -> None:
        self._blank = self._actor.blank = False

    def _say(self, state: str, reason: str) -> None:
        if state != self._state:
            log.warning("cannot follow", shard=self._actor.shard, state=state, reason=reason)
        self._state = state

    async def _back_off(self) -> None:
        low, high = BACKOFF_S
        limit = min(high, low * 2 ** min(self._failures, 10))
        self._failures += 1
        # News of another primary end the wait.
        hint = self._actor.hint
        with trio.move_on_after(limit * (0.5 + self._random.random() / 2)):
            while self._actor.hint == hint:
                await self._actor.changed()

    def _link(self, name: str) -> PeerLink:
        try:
            return self._links[name]
        except KeyError:
            raise PeerGoneError(name, "there is no link to it yet", sent=False) from None

    async def _ask(self, primary: str, named: Fingerprint, max_bytes: int) -> Answer:
        actor, election = self._actor, self._actor.election
        link = self._link(primary)
        # Until the first answer we do not know whether we are level, so that one must not wait for news.
        echo = self._echo[1] if self._echo is not None and self._echo[0] == election.epoch else None
        pull = Pull(
            actor.shard,
            actor.replica.replica_id,
            election.epoch,
            max(election.promised, actor.replica.position.epoch),
            named,
            echo,
            max_bytes,
            replication.WAIT_MS if echo is not None else 0,
        )
        try:
            answer = read_answer(await link.call("pull", pull.body(), CALL_S))
        except (TypeError, ValueError) as error:
            raise RemoteError("bad_answer", f"{primary} sent what is no answer to a pull: {error}") from error
        if isinstance(answer, NotPrimary):
            actor.doubt(actor.hint[0] if actor.hint[1] == primary else 0)
            if answer.primary:
                actor.hear_of(answer.epoch, answer.primary)
        elif election.takes(answer.epoch):
            actor.act(actor, election.on_stream(primary, answer.epoch, trio.current_time()))
            actor.hear_of(answer.epoch, primary)
            self._echo = (answer.epoch, answer.stamp)
        return answer

    async def _pull(self, primary: str) -> None:
        actor = self._actor
        last = actor.replica.position
        if self._named.sequence != last.sequence or self._named.epoch != last.epoch:
            self._named = actor.replica.fingerprint(last.sequence)
        answer = await self._ask(primary, self._named, PULL_BYTES)
        now = trio.current_time()
        if isinstance(answer, NotPrimary):
            self._state = "no primary"
            await self._back_off()
            return
        if not actor.election.takes(answer.epoch):
            # Our next pull says which epochs we take; its primary must stand above them.
            self._state = "waiting for a higher epoch"
            await self._back_off()
            return
        self._failures = 0
        if isinstance(answer, Forked):
            await actor.cut(answer.epoch, answer.fork.at, last)
            return
        if not last.sequence and answer.primary_last > actor.replica.config.graph_rows_min:
            # An empty log could be filled from the primary's, but there is a graph, and a snapshot brings that along.
            await self._catch_up(primary)
            return
        await self._take(answer, now)

    async def _take(self, answer: Streamed, heard: float) -> None:
        actor = self._actor
        last = actor.replica.position
        try:
            came = arrival(answer.records)
        except RecordError as error:
            self._say("refused: damaged", f"a streamed record is damaged: {error}")
            await self._back_off()
            return
        step = replication.on_stream(
            last=last,
            primary_last=answer.primary_last,
            first=came.run.first.sequence if came is not None else None,
            count=len(came) if came is not None else 0,
        )
        if isinstance(step, replication.Refuse):
            self._say("refused: stream", step.reason)
            await self._back_off()
            return
        if came is not None and isinstance(step, replication.Take):
            # Not level from now on, however long our disk takes.
            self.behind = answer.primary_last - last.sequence
            if not await actor.follow(answer.epoch, came):
                return
        # Our log is the primary's as far as it goes: what we named was found there.
        replica = actor.replica
        replica.settled = max(replica.settled, min(answer.settled, replica.position.sequence))
        self._state = "following"
        self.behind = max(0, answer.primary_last - actor.replica.position.sequence)
        self._old_ms = answer.lag_ms if self.behind else 0
        if not self.behind:
            self._level()
        self._heard = heard

    # -- by a snapshot --------------------------------------------------------------------------------------------

    async def _catch_up(self, primary: str) -> None:
        """One try; and, when it fails, the wait before the next."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_bound)
            damaged: DamagedError | None = None
            try:
                await self._by_snapshot(primary)
                self._snapshot_failures = 0
            except DamagedError as error:
                damaged = error
            except ReplicaStoppedError as error:
                # As in `run`: never again into the dark.
                damaged = DamagedError(f"shard-{self._actor.shard:03}", None, str(error))
            except (PeerError, SnapshotError, StorageError) as error:
                code = getattr(error, "code", "unreachable")
                self._say(f"no snapshot: {code}", str(error))
                await self._wait_for_snapshot(turn=code == "overloaded")
            nursery.cancel_scope.cancel()
        if damaged is not None:
            raise damaged

    async def _by_snapshot(self, primary: str) -> None:
        actor = self._actor
        link = self._link(primary)
        self.transfer = Transfer()
        self._state = "fetching"
        async with opened(link, actor.shard, actor.replica.position) as snapshot:
            log.info("fetching a snapshot", shard=actor.shard, primary=primary, bytes=snapshot.bytes)
            await self._fetcher.catch_up(actor, snapshot, link, self.transfer)
            log.warning(
                "caught up by a snapshot", shard=actor.shard, position=tuple(snapshot.position),
                bytes=snapshot.bytes, bytes_per_s=round(self.transfer.bytes_per_s),
                graph_loaded=actor.replica.recovery.graph_loaded, open_s=round(actor.replica.recovery.total_s, 3),
            )  # fmt: skip
            # The primary keeps its log for us until the block ends.
            await self._pull(primary)
            while self.behind and self.state == "following":
                await self._pull(primary)

    async def _wait_for_snapshot(self, *, turn: bool) -> None:
        low, high = SNAPSHOT_BACKOFF_S
        limit = low if turn else min(high, low * 2 ** min(self._snapshot_failures, 10))
        self._snapshot_failures += not turn
        await trio.sleep(limit * (0.5 + self._random.random() / 2))

    async def _keep_bound(self) -> NoReturn:
        """While we fetch we pull nothing; but whoever leads needs our echo to keep its lease, and we its stamps to stay bound."""
        while True:
            _, primary = self._actor.hint
            if primary and primary != self._actor.name:
                with contextlib.suppress(PeerError):
                    answer = await self._ask(primary, EMPTY, 0)
                    if isinstance(answer, Streamed):
                        self.behind = max(0, answer.primary_last - self._actor.replica.position.sequence)
            await trio.sleep(replication.WAIT_MS / 1000)
