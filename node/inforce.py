"""The placements of version 1: who founds each shard, and who is believed to hold one of which nobody has told yet.

In `data/placements`; a node that comes later asks the others, also which of the shards have been founded (node/founders.py).
What is in force stands in each shard's log (node/placement.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio

from node import checked, founders
from node.founders import Founders
from node.links import Links
from node.members import Members
from node.peerlink import PeerError
from router.layout import Layout, Placement
from storage.errors import DamagedFileError, ForeignDataError, FormatError
from storage.files import write_atomically

log = structlog.get_logger(__name__)

FORMAT = 1
# A node that comes to a cluster that has been changed before asks the others, again and again.
ASK_S = 1.0


class InForce(Mapping[int, Placement]):
    """First placements by shard, of all shards of the cluster."""

    def __init__(self, placements: Mapping[int, Placement]) -> None:
        self._placements = dict(placements)

    def __getitem__(self, shard: int) -> Placement:
        return self._placements[shard]

    def __iter__(self) -> Iterator[int]:
        return iter(self._placements)

    def __len__(self) -> int:
        return len(self._placements)

    def pack(self) -> list[Any]:
        """For peers: [shard, epoch, voters] each."""
        return [[one.shard, one.epoch, list(one.voters)] for one in self._placements.values()]


def unpack(raw: Any, shard_count: int) -> InForce:
    """Raises ValueError or TypeError for what is not `pack`'s of all these shards."""
    found = {}
    for shard, epoch, voters in raw:
        if type(shard) is not int or type(epoch) is not int or not voters or type(voters) is not list:
            raise ValueError("not a placement")
        found[shard] = Placement(shard=shard, epoch=epoch, voters=tuple(str(name) for name in voters))
    if sorted(found) != list(range(shard_count)):
        raise ValueError(f"placements of {len(found)} shards, not of {shard_count}")
    return InForce(found)


def load(path: Path, *, cluster: str, shard_count: int) -> InForce | None:
    """None when there are none yet. Raises DamagedFileError, ForeignDataError, FormatError, OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        fields = checked.decode(data)
        version, owner = fields["format"], fields["cluster"]
        if version != FORMAT:
            raise FormatError(f"{path} has format {version}, this build knows {FORMAT}")
        placements = unpack(fields["placements"], shard_count)
    except (ValueError, KeyError, TypeError) as error:
        advice = "restore it, or remove it so that this node asks the others"
        raise DamagedFileError(path, error, advice) from error
    if owner != cluster:
        raise ForeignDataError(f"{path} is of cluster {owner!r}, not of {cluster!r}")
    return placements


def save(path: Path, placements: InForce, *, cluster: str) -> None:
    """Durable when it returns. Raises OSError."""
    fields = {"format": FORMAT, "cluster": cluster, "placements": placements.pack()}
    write_atomically(path, checked.encode(fields))


async def find(
    directory: Path,
    cluster: str,
    layout: Layout,
    members: Members,
    links: Links,
    say: Callable[[str], None],
) -> tuple[InForce, Founders]:
    """From the disk, from a first layout, or from the others; on the disk when it returns. Raises StorageError, OSError."""
    path = directory / "placements"
    known = await trio.to_thread.run_sync(
        partial(load, path, cluster=cluster, shard_count=layout.shard_count)
    )
    if known is not None:
        return known, await trio.to_thread.run_sync(founders.load, directory / "founders", cluster)
    founded: list[int] = []
    if layout.version == 1:
        known = InForce({one.shard: one for one in layout.placements()})
        # Nobody can be asked: it may be that all of us are just beginning.
        founded = [shard for shard in known if members.primary(shard)]
    while known is None:
        say("waiting for a node that tells who holds the shards")
        known, founded = await _ask(members, links, layout.shard_count)
    ours = [one.shard for one in known.values() if members.own.name in one.voters]
    may = Founders(directory / "founders", cluster, set(ours) - set(founded), founded)
    # Before the placements, by which a restart knows that it was written.
    await trio.to_thread.run_sync(founders.save, may)
    await trio.to_thread.run_sync(partial(save, path, known, cluster=cluster))
    return known, may


async def _ask(members: Members, links: Links, shard_count: int) -> tuple[InForce | None, list[int]]:
    for known in members.others():
        if known.fact is None or not known.alive:
            continue
        link = await links.add(known.name)
        with trio.move_on_after(ASK_S):
            await link.wait_connected()
            try:
                placements, founded = await link.call("placements", None, ASK_S)
                return unpack(placements, shard_count), founders.unpack(founded)
            except (PeerError, ValueError, TypeError) as error:
                log.info("placements_not_told", peer=known.name, reason=str(error))
    await trio.sleep(ASK_S)
    return None, []
