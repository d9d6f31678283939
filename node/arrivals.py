"""What other primaries ask of this node while they move replicas: to have one, to let go of one. The other end: node/mover.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from node.failover import Failover
from node.holdings import Holdings
from node.peerlink import RemoteError
from storage.errors import StorageError

log = structlog.get_logger(__name__)

# Replicas that may come to a node at the same time.
IN_MAX = 2


class Arrivals:
    def __init__(self, own: str, holdings: Holdings, failover: Failover) -> None:
        """own: this node's name."""
        self._own, self._holdings, self._failover = own, holdings, failover
        # Shards whose replicas others have brought here, until they vote.
        self._arriving: set[int] = set()
        # Those of them that are just being begun: nobody has told them yet who leads.
        self._beginning: set[int] = set()

    def handlers(self) -> dict[str, Callable[[str, Any], Awaitable[Any]]]:
        """By op."""
        return {"bring": self.on_bring, "dismiss": self.on_dismiss}

    async def on_bring(self, peer: str, body: Any) -> int:
        """The peer op `bring`: [shard, epoch, primary] → the id of the replica that is here now. Raises RemoteError."""
        shard, epoch, primary = int(body[0]), int(body[1]), str(body[2])
        held = self._holdings
        coming = self._coming() - {shard}
        if shard not in held.actors and len(coming) >= IN_MAX:
            raise RemoteError("busy", f"{len(coming)} other replicas are coming to this node; later")
        # Before anything is waited for: others ask meanwhile.
        self._arriving.add(shard)
        self._beginning.add(shard)
        try:
            actor = await held.bring(shard, self._failover)
        except BaseException as error:
            if shard not in held.actors:
                self._arriving.discard(shard)
            if isinstance(error, StorageError):
                raise RemoteError(error.code, str(error)) from error
            raise
        finally:
            self._beginning.discard(shard)
        actor.hear_of(epoch, primary)
        return actor.replica.replica_id

    def _coming(self) -> set[int]:
        """Shards that are to vote here and do not yet. Not those that have voted, and only wait to be removed; nor those whose
        primary nobody knows: nothing comes from it, and it may never be back."""
        own, actors = self._own, self._holdings.actors
        learns = {shard for shard, actor in actors.items() if own in dict(actor.placement.learners)}
        votes = {shard for shard, actor in actors.items() if own in actor.placement.names}
        self._arriving -= votes
        led = {shard for shard, actor in actors.items() if actor.primary}
        return ((self._arriving | learns) & led | self._beginning) - votes

    async def on_dismiss(self, peer: str, body: Any) -> bool:
        """The peer op `dismiss`: [shard, epoch]: the primary of that epoch does not count on our replica. Whether it is gone; not
        while it may hold what somebody was told is written, and nobody else has (`tail-kept`)."""
        shard, epoch = body
        actor = self._holdings.actors.get(shard)
        if actor is None:
            return True
        replica = actor.replica
        # What our log has that the primary's lacks is known, and put aside to be offered, once it ends in that primary's epoch.
        follows = replica.position.epoch == epoch or not replica.position.sequence
        if actor.leads or not follows or replica.side_files():
            return False
        log.info("dismissed", shard=shard, by=peer, epoch=epoch)
        await self._holdings.drop(shard)
        self._arriving.discard(shard)
        return True
