"""The replicas of this node: opened at the start or when a move brings one, closed when a placement names us no more.

A replica consists of its directory, a thread for its log, its actor, and the loop that follows its primary.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import structlog
import trio

from node.blocking import DedicatedThread, ThreadRunner
from node.config import Config
from node.facts import Health
from node.failover import Failover
from node.fetching import Fetcher
from node.health import Watched
from node.links import Links
from node.promises import Promises
from node.replicator import Replicator
from node.shard import ShardActor
from node.supervisor import Supervisor
from storage import quarantine
from storage.anew import begin_anew, damaged_paths
from storage.attempts import ENDED_MAX, Attempts
from storage.bulk import Columns
from storage.config import StorageConfig
from storage.errors import DamagedError
from storage.files import fsync_directory
from storage.installing import Installing
from storage.records import Record
from storage.replica import Replica

log = structlog.get_logger(__name__)

OPENING_AT_ONCE = 2


def _nobody(_shard: int) -> bool:
    return False


async def _nothing(_shard: int) -> None:
    await trio.lowlevel.checkpoint()


class Holdings:
    """`actors` and `replicators`, by shard, are read by everybody else here; only this object changes them."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        node_id: str,
        promises: Promises,
        supervisor: Supervisor,
        links: Links,
        others: Callable[[int], bool] = _nobody,
        leave: Callable[[int], Awaitable[None]] = _nothing,
    ) -> None:
        """others: whether that shard has other voters than this node's, who can stand in for a replica that is damaged. leave:
        sees to it that this node does not found that shard again; called before its replica is brought, begun anew or removed."""
        self.actors: dict[int, ShardActor] = {}
        self.replicators: dict[int, Replicator] = {}
        # Called when the set of replicas has changed.
        self.changed: Callable[[], None] = lambda: None
        # Told of what replicas apply, as `ShardActor.applied`; set before any is opened.
        self.applied: Callable[[ShardActor, Sequence[Record] | Columns | None], None] = (
            lambda _actor, _records: None
        )
        # By which they catch up by snapshots.
        self.fetcher = Fetcher()
        # Returns when no search uses a replica that was in `actors` at the call.
        self.settle: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self._config, self._directory, self._node_id = config, directory, node_id
        self._promises, self._supervisor, self._links = promises, supervisor, links
        self._threads: dict[int, DedicatedThread] = {}
        # What a crash left of one that was being removed.
        for left in directory.glob("removed-*"):
            shutil.rmtree(left, ignore_errors=True)
        # One by one after a process has ended while it opened some: then it is known which.
        troubled = any(directory.glob("shard-*.opening"))
        self._limit = trio.CapacityLimiter(1 if troubled else OPENING_AT_ONCE)
        self._maintenance = ThreadRunner("maintenance")
        self._lock = trio.Lock()
        self._others, self._leave = others, leave
        self.counters = {"rebuilt": 0}

    def path(self, shard: int) -> Path:
        return self._directory / f"shard-{shard:03}"

    def on_disk(self) -> list[int]:
        """Shards that have a directory here, whoever has asked for them."""
        found = [path.name.removeprefix("shard-") for path in self._directory.glob("shard-*")]
        # A crash may have left one that was about to take another's place, or the other.
        names = {name.removesuffix(".new").removesuffix(".old").partition(".damaged-")[0] for name in found}
        return sorted(int(name) for name in names if name.isdigit())

    @property
    def _quarantine(self) -> Path:
        return self._directory / "quarantine"

    def quarantined(self) -> list[Path]:
        """Files of records that were put aside and wait for a person: of replicas that went, and of those that are here."""
        here = [actor.replica.quarantine_path for _, actor in sorted(self.actors.items())]
        return [*sorted(self._quarantine.glob("shard-*")), *(path for path in here if path.exists())]

    def watched(self) -> list[Watched]:
        return [
            Watched(Health.DISK, f"the log of shard {shard}", thread.statistics)
            for shard, thread in sorted(self._threads.items())
        ]

    async def open(self, shard: int, founders: Sequence[str]) -> ShardActor:
        """Recovers what is on the disk, or begins anew; not started yet. What is damaged is moved aside when other voters can
        stand in for it, and a new replica begun, which founds nothing. Raises StorageError, OSError."""
        ended = Attempts(self.path(shard)).ended
        if ended >= ENDED_MAX and self._others(shard):
            await self._begin_anew(shard, f"{ended} processes in a row ended while they opened it")
            founders = ()
        try:
            replica = await self._recover(shard)
        except DamagedError as error:
            if not self._others(shard):
                raise
            await self._begin_anew(shard, str(error))
            founders = ()
            replica = await self._recover(shard)
        thread = DedicatedThread(f"wal-{shard}")
        try:
            promised, owes = await self._promised(replica)
            actor = ShardActor(
                replica,
                founders,
                name=self._config.node.name,
                promised=promised,
                owes=owes,
                log_runner=thread,
                maintenance_runner=self._maintenance,
                queue_max=self._config.limits.write_queue,
            )
        except BaseException:
            replica.abort()
            raise
        actor.applied = self.applied
        actor.blank = not replica.position.sequence and bool(damaged_paths(self.path(shard)))
        self._threads[shard], self.actors[shard] = thread, actor
        log.info("recovered", shard=shard, **asdict(replica.recovery))
        return actor

    async def _recover(self, shard: int) -> Replica:
        opening = partial(
            _open, self.path(shard), shard=shard, node_id=self._node_id, config=self._config.storage
        )
        return await trio.to_thread.run_sync(opening, limiter=self._limit)

    async def _begin_anew(self, shard: int, reason: str) -> None:
        """`one-copy-stays` of docs/storage.md: the caller has made sure that other voters have what this one had."""
        begin = partial(
            begin_anew, self.path(shard), shard=shard, segment_bytes=self._config.storage.wal_segment_bytes
        )
        await self._leave(shard)
        done = await trio.to_thread.run_sync(begin, limiter=self._limit)
        self.counters["rebuilt"] += 1
        log.error(
            "damaged replica moved aside", shard=shard, reason=reason, aside=str(done.aside), lost=done.lost,
            side_files=done.side_files, records=done.records,
            what="a new replica is rebuilt from the others; look at the disk, and remove what was moved aside",
        )  # fmt: skip

    async def _promised(self, replica: Replica) -> tuple[int, bool]:
        """What this replica has promised, and whether it may be bound by a lease. Of one that cannot know what it promised, a
        new id is made: it votes again when a primary has let it in under that."""
        promised = self._promises.of(replica.shard, replica.replica_id)
        if promised is not None:
            return promised, True
        if replica.position.sequence:
            log.warning("promises lost", shard=replica.shard)
        # Of an empty log, too: a founder may have promised the first epoch before a byte of it came.
        await trio.to_thread.run_sync(replica.renew_replica_id)
        await self._promises.keep(replica.shard, replica.replica_id, 0)
        return 0, False

    async def start(self, shard: int, failover: Failover) -> None:
        """From here on it follows, votes and may lead."""
        actor = self.actors[shard]
        await self._supervisor.start(actor, name=f"shard-{shard:03}")
        failover.adopt(actor)
        follower = self.replicators[shard] = Replicator(actor, self._links, random.Random(), self.fetcher)
        await self._supervisor.start(follower, name=f"follow-{shard:03}")

    async def bring(self, shard: int, failover: Failover) -> ShardActor:
        """A replica of that shard, there already or begun now, that follows and does not vote before a placement names it."""
        async with self._lock:
            if shard not in self.actors:
                # Whoever asks may go away meanwhile; half a replica would stay in the way of the next one.
                with trio.CancelScope(shield=True):
                    await self._leave(shard)
                    await self.open(shard, ())
                    await self.start(shard, failover)
                self.changed()
            return self.actors[shard]

    async def rebuild(self, shard: int, failover: Failover) -> None:
        """In the place of a replica that is damaged, and does not lead, a new one is begun, started, and learns from the others.
        The caller has made sure that they can do without it."""
        async with self._lock:
            actor = self.actors.get(shard)
            if actor is None:
                return
            # As in `bring`.
            with trio.CancelScope(shield=True):
                await self._stop(shard)
                await self._begin_anew(shard, actor.harmed)
                anew = await self.open(shard, ())
                anew.hear_of(*actor.hint)
                await self.start(shard, failover)
                self.changed()

    async def _stop(self, shard: int) -> None:
        """Its actors have ended and its files are closed, as a crash would leave them."""
        actor = self.actors.pop(shard)
        self.replicators.pop(shard, None)
        self.fetcher.pace(shard, None)
        self.changed()
        await self._supervisor.stop(f"follow-{shard:03}")
        await self._supervisor.stop(f"shard-{shard:03}")
        await self.settle()
        thread = self._threads.pop(shard)
        await thread(actor.replica.abort)
        await thread.aclose()

    async def drop(self, shard: int) -> None:
        """Stops it and removes its files. The caller has made sure that no placement needs it."""
        async with self._lock:
            if shard in self.actors:
                # As in `bring`.
                with trio.CancelScope(shield=True):
                    await self._leave(shard)
                    await self._stop(shard)
                    await trio.to_thread.run_sync(self._remove, shard)
                log.info("replica removed", shard=shard)

    def _remove(self, shard: int) -> None:
        # A name that is no shard's first: half of a directory must not be taken for a replica.
        path, gone = self.path(shard), self._directory / f"removed-{shard:03}"
        for left in (gone, *damaged_paths(path)):
            shutil.rmtree(left, ignore_errors=True)
        Installing(path).clear()
        aside = quarantine.keep(path, self._quarantine, shard)
        if aside is not None:
            log.warning("quarantine kept", shard=shard, file=str(aside))
        path.rename(gone)
        fsync_directory(self._directory)
        shutil.rmtree(gone, ignore_errors=True)

    async def close(self, closed: Callable[[int], object]) -> None:
        """Everything on the disk; `closed` is called with each shard that is."""

        async def close_one(actor: ShardActor) -> None:
            await trio.to_thread.run_sync(actor.replica.close)
            closed(actor.shard)

        async with trio.open_nursery() as nursery:
            for actor in self.actors.values():
                nursery.start_soon(close_one, actor)
        for thread in self._threads.values():
            await thread.aclose()


def _open(directory: Path, *, shard: int, node_id: str, config: StorageConfig) -> Replica:
    """After what a crash may have left of another's taking its place."""
    attempts = Attempts(directory)
    attempts.begin()
    try:
        Installing(directory).recover()
        return Replica.open(directory, shard=shard, node_id=node_id, config=config)
    finally:
        attempts.end()
