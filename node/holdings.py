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
from storage.config import StorageConfig
from storage.files import fsync_directory
from storage.installing import Installing
from storage.replica import Replica

log = structlog.get_logger(__name__)

OPENING_AT_ONCE = 2


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
    ) -> None:
        self.actors: dict[int, ShardActor] = {}
        self.replicators: dict[int, Replicator] = {}
        # Called when the set of replicas has changed.
        self.changed: Callable[[], None] = lambda: None
        # By which they catch up by snapshots.
        self.fetcher = Fetcher()
        # Returns when no search uses a replica that was in `actors` at the call.
        self.settle: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self._config, self._directory, self._node_id = config, directory, node_id
        self._promises, self._supervisor, self._links = promises, supervisor, links
        self._threads: dict[int, DedicatedThread] = {}
        self._limit = trio.CapacityLimiter(OPENING_AT_ONCE)
        self._maintenance = ThreadRunner("maintenance")
        self._lock = trio.Lock()

    def path(self, shard: int) -> Path:
        return self._directory / f"shard-{shard:03}"

    def on_disk(self) -> list[int]:
        """Shards that have a directory here, whoever has asked for them."""
        found = [path.name.removeprefix("shard-") for path in self._directory.glob("shard-*")]
        # A crash may have left one that was about to take another's place, or the other.
        names = {name.removesuffix(".new").removesuffix(".old") for name in found}
        return sorted(int(name) for name in names if name.isdigit())

    def removed(self, shard: int) -> bool:
        """Whether a replica of that shard was here and was removed, and none has been brought since: then it is no founder."""
        return self._gone(shard).exists() and not self.path(shard).exists()

    def _gone(self, shard: int) -> Path:
        return self._directory / f"removed-{shard:03}"

    def watched(self) -> list[Watched]:
        return [
            Watched(Health.DISK, f"the log of shard {shard}", thread.statistics)
            for shard, thread in sorted(self._threads.items())
        ]

    async def open(self, shard: int, founders: Sequence[str]) -> ShardActor:
        """Recovers what is on the disk, or begins anew; not started yet. Raises StorageError, OSError."""
        replica = await trio.to_thread.run_sync(
            partial(
                _open,
                self.path(shard),
                shard=shard,
                node_id=self._node_id,
                config=self._config.storage,
            ),
            limiter=self._limit,
        )
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
        self._threads[shard], self.actors[shard] = thread, actor
        log.info("recovered", shard=shard, **asdict(replica.recovery))
        return actor

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
                    await self.open(shard, ())
                    await trio.to_thread.run_sync(
                        partial(shutil.rmtree, self._gone(shard), ignore_errors=True)
                    )
                    await self.start(shard, failover)
                self.changed()
            return self.actors[shard]

    async def drop(self, shard: int) -> None:
        """Stops it and removes its files. The caller has made sure that no placement needs it."""
        async with self._lock:
            actor = self.actors.pop(shard, None)
            if actor is not None:
                # As in `bring`.
                with trio.CancelScope(shield=True):
                    await self._drop(actor)

    async def _drop(self, actor: ShardActor) -> None:
        shard = actor.shard
        self.replicators.pop(shard, None)
        self.fetcher.pace(shard, None)
        self.changed()
        await self._supervisor.stop(f"follow-{shard:03}")
        await self._supervisor.stop(f"shard-{shard:03}")
        await self.settle()
        thread = self._threads.pop(shard)
        await thread(actor.replica.abort)
        await thread.aclose()
        await trio.to_thread.run_sync(self._remove, shard)
        log.info("replica removed", shard=shard)

    def _remove(self, shard: int) -> None:
        # A name that is no shard's first: half of a directory must not be taken for a replica. The name stays, for `removed`.
        path, gone = self.path(shard), self._gone(shard)
        shutil.rmtree(gone, ignore_errors=True)
        Installing(path).clear()
        path.rename(gone)
        fsync_directory(self._directory)
        shutil.rmtree(gone, ignore_errors=True)
        gone.mkdir(exist_ok=True)
        fsync_directory(self._directory)

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
    Installing(directory).recover()
    return Replica.open(directory, shard=shard, node_id=node_id, config=config)
