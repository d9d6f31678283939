"""Which shards this node may still help to found, and which have had a primary: on its disk (`founded-once`, docs/ownership.md).

An empty log looks the same before a shard's first epoch and on a disk that has lost everything. So a node founds only with
replicas that it began before it knew of any primary of their shards, and it tells those who come later what it knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import structlog
import trio

from node import checked
from node.members import Members
from node.shard import ShardActor
from storage.errors import DamagedFileError, ForeignDataError, FormatError
from storage.files import write_atomically

log = structlog.get_logger(__name__)

FORMAT = 1
EVERY_S = 1.0


class Founders:
    """founds: shards of which this node's replica may promise the first epoch. founded: shards that have had a primary."""

    def __init__(self, path: Path, cluster: str, founds: Iterable[int], founded: Iterable[int]) -> None:
        self.founds, self.founded = frozenset(founds), frozenset(founded)
        self._path, self._cluster = path, cluster
        self._lock = trio.Lock()

    def may(self, there: Iterable[int]) -> frozenset[int]:
        """What is to be opened as a founder. there: shards with a directory; one that was founded and has none was removed by
        hand."""
        return self.founds - (self.founded - frozenset(there))

    async def note(self, shards: Iterable[int]) -> None:
        """They have a primary. Durable when it returns. Raises OSError."""
        async with self._lock:
            await self._become(self.founds, self.founded.union(shards))

    async def leave(self, shard: int) -> None:
        """Our replica of that shard is about to go, or to be begun anew: what is here next founds nothing. Durable when it
        returns. Raises OSError."""
        async with self._lock:
            await self._become(self.founds - {shard}, self.founded | {shard})

    async def _become(self, founds: frozenset[int], founded: frozenset[int]) -> None:
        if (founds, founded) != (self.founds, self.founded):
            await trio.to_thread.run_sync(save, Founders(self._path, self._cluster, founds, founded))
            self.founds, self.founded = founds, founded

    def pack(self) -> dict[str, object]:
        founds, founded = sorted(self.founds), sorted(self.founded)
        return {"format": FORMAT, "cluster": self._cluster, "founds": founds, "founded": founded}


class Noting:
    """An actor that keeps noting which shards have a primary, as far as anybody tells, or had one by our own log."""

    def __init__(self, founders: Founders, members: Members, shards: Mapping[int, ShardActor]) -> None:
        self._founders, self._members, self._shards = founders, members, shards

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        task_status.started()
        while True:
            told = [shard for one in self._members.all() for shard in one.led]
            ours = [shard for shard, actor in self._shards.items() if not actor.founding]
            try:
                await self._founders.note([*told, *ours])
            except OSError as error:
                log.warning("founders not written", reason=str(error))
            await trio.sleep(EVERY_S)


def save(founders: Founders) -> None:
    """Durable when it returns. Raises OSError."""
    write_atomically(founders._path, checked.encode(founders.pack()))


def load(path: Path, cluster: str) -> Founders:
    """One that founds nothing when there is no file: it is written before anything is founded.

    Raises DamagedFileError, ForeignDataError, FormatError, OSError.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Founders(path, cluster, (), ())
    try:
        fields = checked.decode(data)
        if fields["format"] != FORMAT:
            raise FormatError(f"{path} has format {fields['format']}, this build knows {FORMAT}")
        if fields["cluster"] != cluster:
            raise ForeignDataError(f"{path} is of cluster {fields['cluster']!r}, not of {cluster!r}")
        return Founders(path, cluster, unpack(fields["founds"]), unpack(fields["founded"]))
    except (ValueError, KeyError, TypeError) as error:
        advice = "remove it, unless no shard of this cluster has been written to yet"
        raise DamagedFileError(path, error, advice) from error


def unpack(raw: object) -> list[int]:
    """Raises ValueError for what is no list of shards."""
    if type(raw) is not list or any(type(shard) is not int for shard in raw):
        raise ValueError("not a list of shards")
    return raw
