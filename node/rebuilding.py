"""Replicas that were found damaged while they ran: rebuilt from the others, one at a time, without the process. An actor.

Only when the others can do without it (`one-copy-stays` of docs/storage.md): a primary hands over first; then somebody else must
lead, and those who vote beside us and are alive, the witness too, must be a majority. Until then it just answers no reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import structlog
import trio

from node.failover import Failover
from node.holdings import Holdings
from node.shard import ShardActor
from router.ports import NodeError
from storage.errors import StorageError

log = structlog.get_logger(__name__)

EVERY_S = 0.5


class Rebuilding:
    """alive: whether that node can be reached."""

    def __init__(
        self, holdings: Holdings, failover: Failover, name: str, alive: Callable[[str], bool]
    ) -> None:
        self._holdings, self._failover = holdings, failover
        self._name, self._alive = name, alive
        # shard → what it waits for, for people.
        self.waits: dict[int, str] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        task_status.started()
        while True:
            for actor in [one for one in self._holdings.actors.values() if one.harmed]:
                try:
                    why = await self._rebuild(actor)
                except (NodeError, StorageError, OSError) as error:
                    why = str(error)
                if why and self.waits.get(actor.shard) != why:
                    log.warning("damaged replica waits", shard=actor.shard, reason=why)
                self.waits[actor.shard] = why
            await trio.sleep(EVERY_S)

    async def _rebuild(self, actor: ShardActor) -> str:
        """Why it cannot be rebuilt now; empty when it was."""
        if actor.leads:
            await self._failover.hand_over(actor, self._failover.successor(actor))
        primary, names = actor.primary, actor.placement.names
        if not primary or primary == self._name or not self._alive(primary):
            return "nobody else leads the shard now"
        electors = actor.placement.electors
        others = [name for name in electors if name != self._name and self._alive(name)]
        if self._name in names and 2 * len(others) <= len(electors):
            return f"only {len(others)} of its {len(electors)} voters are there besides this one"
        if self._name in names and not set(others).intersection(names):
            # A witness has nothing that we could be rebuilt from.
            return "no other voter with data is there"
        await self._holdings.rebuild(actor.shard, self._failover)
        return ""
