"""What was cut from this node's logs, offered again to their primaries until it is on a quorum. An actor.

`tail-kept` of docs/replication.md: a side file goes only when each of its records is on a quorum, superseded by something newer
there, or in the primary's quarantine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import structlog
import trio

from node.blocking import Runner
from node.commit import OverloadedError
from node.links import Links
from node.peerlink import PeerError, RemoteError
from node.shard import ShardActor
from router.ports import NodeError
from storage.errors import StorageError
from storage.records import Kind, Version, split
from storage.side import SideFile

log = structlog.get_logger(__name__)

EVERY_S = 0.25
# What one message, and one group commit of the primary, takes.
CHUNK_BYTES = 1 << 20
CALL_S = 10.0
# Shards of which tails are offered to one primary at a time: each holds a chunk in memory.
AT_ONCE = 2

# (kind, id, version) of a record that the primary has put aside.
Aside = tuple[Kind, int, Version]


class Offering:
    """Looks after the replicas of `shards`, which may be filled later: of each one file after the other; those of different
    primaries side by side, so that one that is silent holds up its own only."""

    def __init__(self, shards: Mapping[int, ShardActor], links: Links, runner: Runner) -> None:
        self._shards, self._links, self._runner = shards, links, runner
        # Shards of which something is being offered now, and to whom.
        self._under_way: dict[int, str] = {}
        # By shard: when it had its turn last.
        self._tried: dict[int, float] = {}
        self.counters = {"offered": 0, "set_aside": 0, "files_done": 0}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        # After a crash: whoever was offering is gone.
        self._under_way.clear()
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                # Whoever has waited longest comes first.
                for shard in self._in_turn():
                    actor = self._shards[shard]
                    to, busy = actor.primary, list(self._under_way.values())
                    if to and not actor.diverged and busy.count(to) < AT_ONCE and actor.replica.side_files():
                        self._under_way[shard] = to
                        nursery.start_soon(self._offer_all, actor, to)
                await trio.sleep(EVERY_S)
        raise AssertionError("unreachable")

    def _in_turn(self) -> list[int]:
        """Those of which nothing is being offered; who has waited longest comes first."""
        self._tried = {shard: at for shard, at in self._tried.items() if shard in self._shards}
        waiting = [shard for shard in self._shards if shard not in self._under_way]
        return sorted(waiting, key=lambda shard: self._tried.get(shard, 0.0))

    async def _offer_all(self, actor: ShardActor, primary: str) -> None:
        """Until one is not taken."""
        self._tried[actor.shard] = trio.current_time()
        try:
            for file in actor.replica.side_files():
                try:
                    await self._offer(actor, file, primary)
                except (PeerError, NodeError, OverloadedError, StorageError, KeyError) as error:
                    log.info("tail not taken yet", shard=actor.shard, file=file.name, reason=str(error))
                    break
        finally:
            del self._under_way[actor.shard]

    async def _offer(self, actor: ShardActor, file: SideFile, primary: str) -> None:
        offset, dropped = 0, False
        while True:
            blobs, offset = await self._runner(file.read, offset, CHUNK_BYTES)
            if not blobs:
                break
            aside = await self._send(actor, primary, blobs)
            for kind, id_, version in aside:
                # It may have been deleted long ago, so its row here must go as well.
                dropped = await actor.drop_row(kind, id_, version) or dropped
            self.counters["offered"] += len(blobs)
            self.counters["set_aside"] += len(aside)
        if dropped:
            # On the disk before the file goes: else a crash brings the rows back.
            await actor.upkeep.checkpoint()
        await actor.forget(file)
        self.counters["files_done"] += 1
        log.info("tail is on a quorum again", shard=actor.shard, file=file.name, records=file.records)

    async def _send(self, actor: ShardActor, primary: str, blobs: Sequence[bytes]) -> Sequence[Aside]:
        data = b"".join(blobs)
        if primary == actor.name:
            records = await actor.offer([record for _, record in split(data)], CALL_S)
            return [(one.kind, one.id, one.version) for one in records]
        answer = await self._links[primary].call("offer", [actor.shard, data, int(CALL_S * 1000)], CALL_S)
        try:
            return [(Kind(kind), int(id_), Version(*version)) for kind, id_, version in answer]
        except (TypeError, ValueError) as error:
            raise RemoteError(
                "bad_answer", f"{primary} sent what is no answer to an offer: {error}"
            ) from error
