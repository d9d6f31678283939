"""`data/promises`: what the replicas of this node have promised, durable before it is told. Blocking, but for the actor.
`data/witnessed`: the same of the shards of which this node is a witness, and what that remembers.

One small file for all shards, replaced as a whole: the promises for all shards of a dead host cost one write. An entry is of
one replica, or of one vote (its id): what a former one of that shard had promised, on a disk that is gone, binds nobody any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgpack
import trio
from xxhash import xxh3_64_intdigest

from node.blocking import Runner
from node.commit import GroupCommit
from storage.errors import DamagedFileError, FormatError
from storage.files import write_atomically

# 2: what witnesses remember.
FORMAT = 2
_MAGIC = b"GMCOPROM"
ADVICE = (
    "what this node's replicas have promised is lost. Remove the file: each replica then gets a new id, and votes again when a "
    "primary has let it in; not on several nodes at once"
)

# shard → (id, epoch promised, epoch remembered; 0 of replicas, which have a log for that)
Known = dict[int, tuple[int, int, int]]


def load(path: Path) -> Known:
    """Empty when there is none yet. Raises DamagedFileError, FormatError, OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    if data[:8] != _MAGIC or xxh3_64_intdigest(data[16:]).to_bytes(8, "little") != data[8:16]:
        raise DamagedFileError(path, "its checksum does not match", ADVICE)
    try:
        version, entries = msgpack.unpackb(data[16:], strict_map_key=False)
        if version != FORMAT:
            raise FormatError(f"{path} has format {version}, this build knows {FORMAT}")
        return {
            int(shard): (int(id_), int(first), int(last)) for shard, (id_, first, last) in entries.items()
        }
    except (ValueError, TypeError, AttributeError, OverflowError, msgpack.UnpackException) as error:
        raise DamagedFileError(path, f"it is not a list of promises: {error}", ADVICE) from error


def save(path: Path, known: Mapping[int, tuple[int, int, int]]) -> None:
    """Durable when it returns. Raises OSError."""
    body: bytes = msgpack.packb([FORMAT, dict(known)])
    write_atomically(path, _MAGIC + xxh3_64_intdigest(body).to_bytes(8, "little") + body)


class Promises:
    """An actor: promises that wait while one write runs go into the next."""

    def __init__(self, path: Path, known: Known, runner: Runner) -> None:
        self._path, self._known, self._runner = path, known, runner
        self._commit: GroupCommit[tuple[int, int, int, int], None] = GroupCommit(self._flush)

    def of(self, shard: int, replica: int) -> int | None:
        """The epoch that this replica has promised; None: this file knows nothing of it."""
        known = self._known.get(shard)
        return known[1] if known is not None and known[0] == replica else None

    def entries(self) -> Known:
        """What is on the disk."""
        return dict(self._known)

    async def keep(self, shard: int, id_: int, epoch: int, remembered: int = 0) -> None:
        """Durable when it returns; neither epoch goes back. Raises OSError, CommitStoppedError, OverloadedError."""
        await self._commit.submit((shard, id_, epoch, remembered))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._commit = GroupCommit(self._flush)
        await self._commit.run(task_status=task_status)

    async def _flush(self, items: list[tuple[int, int, int, int]]) -> list[Exception | None]:
        known = dict(self._known)
        for shard, id_, epoch, remembered in items:
            before = known.get(shard, (id_, 0, 0))
            _, promised, memory = before if before[0] == id_ else (id_, 0, 0)
            known[shard] = (id_, max(epoch, promised), max(remembered, memory))
        await self._runner(save, self._path, known)
        self._known = known
        return [None] * len(items)
