"""What a replica needs in the background: the log's next segment, checkpoints, compaction, graph building.

One at a time, in threads.
"""

from __future__ import annotations

from typing import NoReturn

import structlog
import trio

from node.blocking import Runner
from storage.errors import DamagedError, DiskFullError, ReplicaStoppedError
from storage.replica import Replica

log = structlog.get_logger(__name__)

EVERY_S = 1.0
BUILD_STEP_S = 0.05
# Between two steps of the graph builder the search lane gets its turn.
BUILD_REST_S = 0.005


class Upkeep:
    """`writing`: the shard's lock, taken for the short ends of a job. `jobs`: held while any job is under way."""

    def __init__(self, replica: Replica, runner: Runner, writing: trio.Lock) -> None:
        self._replica, self._runner, self._writing = replica, runner, writing
        self.jobs = trio.Lock()

    async def run(self) -> NoReturn:
        """Raises DamagedError."""
        replica = self._replica
        while True:
            try:
                async with self.jobs:
                    if replica.log_ahead_due:
                        await self._runner(replica.make_log_ahead)
                    if replica.checkpoint_due():
                        await self._checkpoint()
                    if replica.compaction_due():
                        await self._compact()
                more = await self._runner(replica.engine.build, replica.view, BUILD_STEP_S)
            except DamagedError:
                raise
            except (DiskFullError, ReplicaStoppedError) as error:
                # Nothing is lost: the log holds everything. Try again when there may be room.
                log.warning("maintenance put off", shard=replica.shard, code=error.code, reason=str(error))
                more = False
            await trio.sleep(BUILD_REST_S if more else EVERY_S)

    async def checkpoint(self) -> None:
        """Bring table and vectors up to the log. Safe beside writes; only the ends hold their lock."""
        async with self.jobs:
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        async with self._writing:
            job = self._replica.begin_checkpoint()
        await self._runner(job.run)
        async with self._writing:
            self._replica.finish_checkpoint(job)

    async def _compact(self) -> None:
        async with self._writing:
            job = self._replica.begin_compaction()
        await self._runner(job.run)
        async with self._writing:
            await self._runner(job.commit)
            self._replica.finish_compaction(job)
        log.info("compacted", shard=self._replica.shard, rows=self._replica.view.rows)
