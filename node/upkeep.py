"""What a replica needs in the background: the log's next segment, checkpoints, compaction, graph building.

One at a time, in threads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import structlog
import trio

from node.blocking import Runner
from storage.errors import DamagedError, DiskFullError, ReplicaStoppedError
from storage.replica import Replica
from storage.snapshot import Pinned

log = structlog.get_logger(__name__)

EVERY_S = 1.0
BUILD_STEP_S = 0.05
# Between two steps of the graph builder the search lane gets its turn.
BUILD_REST_S = 0.005


class Upkeep:
    """`writing`: the shard's lock, taken for the short ends of a job. `jobs`: held while any job is under way.

    `replica` is replaced by whoever holds both.
    """

    def __init__(
        self,
        replica: Replica,
        runner: Runner,
        writing: trio.Lock,
        harm: Callable[[DamagedError], bool],
        note_settled: Callable[[], int] = lambda: 0,
    ) -> None:
        """harm: told of damage; whether somebody sees to it. note_settled: tells the replica how much is on a quorum."""
        self._harm, self._note_settled = harm, note_settled
        self.replica, self._runner, self._writing = replica, runner, writing
        self.jobs = trio.Lock()

    async def run(self) -> NoReturn:
        """Raises DamagedError."""
        while True:
            try:
                async with self.jobs:
                    replica = self.replica
                    if replica.log_ahead_due:
                        await self._runner(replica.make_log_ahead)
                    if replica.checkpoint_due():
                        await self._checkpoint()
                    if replica.compaction_due():
                        await self._compact()
                more = await self._runner(replica.engine.build, replica.view, BUILD_STEP_S)
            except DamagedError as error:
                if not self._harm(error):
                    raise
                # Until the replica is rebuilt nothing more is made of it.
                await trio.sleep_forever()
            except (DiskFullError, ReplicaStoppedError) as error:
                # Nothing is lost: the log holds everything. Try again when there may be room.
                log.warning(
                    "maintenance put off", shard=self.replica.shard, code=error.code, reason=str(error)
                )
                more = False
            await trio.sleep(BUILD_REST_S if more else EVERY_S)

    async def checkpoint(self) -> None:
        """Bring table and vectors up to the log. Safe beside writes; only the ends hold their lock."""
        async with self.jobs:
            await self._checkpoint()

    async def pin(self, holder: str, directory: Path, runner: Runner) -> tuple[Replica, Pinned]:
        """A fresh checkpoint's files in `directory`, and the log held for `holder` from its position on. A disk too full for the
        checkpoint gives the last one. Raises StorageError."""
        async with self.jobs:
            replica = self.replica
            if replica.unsaved_bytes:
                await self._checkpoint()
            pinned = await runner(replica.pin, directory)
            replica.log_holds[holder] = pinned.state.position.sequence
            return replica, pinned

    async def _checkpoint(self) -> None:
        replica = self.replica
        self._note_settled()
        async with self._writing:
            job = replica.begin_checkpoint()
        # Whoever asked for it may be gone meanwhile: one that is begun and never finished would keep all others away.
        with trio.CancelScope(shield=True):
            await self._runner(job.run)
            async with self._writing:
                replica.finish_checkpoint(job)

    async def _compact(self) -> None:
        async with self._writing:
            job = self.replica.begin_compaction()
        await self._runner(job.run)
        async with self._writing:
            await self._runner(job.commit)
            self.replica.finish_compaction(job)
        log.info("compacted", shard=self.replica.shard, rows=self.replica.view.rows)
