"""What this node's replicas answer to the primaries that compare them, and what they let them put right (node/repairwire.py)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from node import repairwire
from node.blocking import Runner
from node.shard import ShardActor
from router.ports import NodeError
from storage.buckets import encoded
from storage.errors import DamagedError, StorageError
from storage.records import Kind, Record, Version, split

# Entries, and records, in one message.
LISTING_MAX = 20_000
CHUNK = 100

Handler = Callable[[str, Any], Awaitable[Any]]
# (kind, id, version) of a row that is to go.
Drop = tuple[Kind, int, Version]


class Mending:
    def __init__(self, name: str, shards: Mapping[int, ShardActor], runner: Runner) -> None:
        self._name, self._shards, self._runner = name, shards, runner

    def handlers(self) -> dict[str, Handler]:
        """By op; they raise NodeError."""
        return {
            "digests": self._tell_digests,
            "listing": self._tell_listing,
            "copies": self._tell_copies,
            "mend": self._mend,
        }

    def _actor(self, shard: Any) -> ShardActor:
        actor = self._shards.get(shard)
        if actor is None:
            raise NodeError("bad_request", f"shard {shard!r} has no replica on {self._name}")
        return actor

    async def _tell_digests(self, _peer: str, body: Any) -> Any:
        shard, (epoch, sequence) = body
        replica = self._actor(shard).replica
        digests = replica.digested.at(Version(epoch, sequence))
        return None if digests is None else repairwire.pack_digests(digests, len(replica.side_files()))

    async def _tell_listing(self, _peer: str, body: Any) -> Any:
        shard, kind, buckets, after = body
        actor = self._actor(shard)
        look = partial(actor.replica.listing, Kind(kind), frozenset(buckets), after, LISTING_MAX)
        try:
            found, end = await self._runner(look)
        except DamagedError as error:
            actor.harm(error)
            raise NodeError(error.code, str(error)) from error
        return [repairwire.pack_listing(found), end]

    async def _tell_copies(self, _peer: str, body: Any) -> bytes:
        shard, kind, ids = body
        if len(ids) > CHUNK:
            raise NodeError("too_large", f"{len(ids)} records at once; the most is {CHUNK}")
        return encoded(await self._runner(self._actor(shard).replica.copies, Kind(kind), ids))

    async def _mend(self, peer: str, body: Any) -> int:
        shard, epoch, data, drops = body
        actor = self._actor(shard)
        if not actor.election.takes(epoch) or actor.primary != peer:
            raise NodeError("no_primary", f"{self._name} does not follow {peer} in epoch {epoch}")
        records = [record for _, record in split(data)]
        wanted = [(Kind(kind), int(id_), Version(*version)) for kind, id_, version in drops]
        try:
            return await changed(actor, records, wanted)
        except StorageError as error:
            raise NodeError(error.code, str(error)) from error


async def changed(actor: ShardActor, records: Sequence[Record], drops: Sequence[Drop]) -> int:
    """Contents put right and rows dropped; how many. Raises StorageError."""
    count = await actor.mend(records)
    for kind, id_, version in drops:
        count += await actor.drop_row(kind, id_, version)
    return count
