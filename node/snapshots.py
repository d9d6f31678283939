"""Snapshots that this node's primaries give to replicas whose logs end before theirs begin. An actor (docs/replication.md).

  snapshot_open   [shard, [epoch, sequence] that it must reach] → [id, epoch of the primary, [epoch, sequence] that it holds
                    everything up to, [[file, bytes]…]]
  snapshot_checks [id] → [[file, xxh3 in hex]…], when all have been read
  snapshot_close  [id] → nil

In between its files are read (node/bulk.py). The log is kept from a snapshot's position while it is open, so that whoever takes
it can go on from there.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import structlog
import trio

from node import bulk
from node.blocking import Runner, ThreadRunner
from node.shard import ShardActor
from router.ports import NodeError
from storage.errors import DamagedError, StorageError
from storage.records import Version
from storage.replica import Replica
from storage.snapshot import checksum

log = structlog.get_logger(__name__)

AT_ONCE = 2
RETRY_MS = 500
EXPIRE_S = 60.0
LOOK_S = 1.0
# Between two epochs of one primary.
OPENING_S = 0.5

Handler = Callable[[str, Any], Awaitable[Any]]


@dataclass(slots=True, eq=False)
class _Open:
    """files: name → bytes; empty while it is being made."""

    id: str
    peer: str
    replica: Replica
    directory: Path
    files: dict[str, int]
    touched: float
    reading: int = 0


class Snapshots:
    """At most AT_ONCE at a time; one for each asker and shard, the last it asked for."""

    def __init__(
        self, shards: Mapping[int, ShardActor], directory: Path, *, expire_s: float = EXPIRE_S
    ) -> None:
        """directory: for the files of open snapshots, on the replicas' file system; what is in it is removed by `run`."""
        self._shards, self._directory, self._expire_s = shards, directory, expire_s
        self._making: Runner = ThreadRunner("snapshots", limit=AT_ONCE)
        self._checking: Runner = ThreadRunner("snapshot-checks", limit=AT_ONCE)
        self._sending = ThreadRunner("snapshot-sends", limit=2 * AT_ONCE)
        self._open: dict[str, _Open] = {}
        self._begun = 0
        self.counters = {"opened": 0, "closed": 0, "expired": 0, "read_bytes": 0}

    def handlers(self) -> dict[str, Handler]:
        """By op; they raise NodeError."""
        return {
            "snapshot_open": self.open,
            "snapshot_checks": self.checks,
            "snapshot_close": self.close,
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        for one in list(self._open.values()):
            self._forget(one)
        await self._making(partial(shutil.rmtree, self._directory, ignore_errors=True))
        task_status.started()
        while True:
            await trio.sleep(LOOK_S)
            late = trio.current_time() - self._expire_s
            for one in [one for one in self._open.values() if one.touched < late and not one.reading]:
                log.warning("snapshot expired", shard=one.replica.shard, asker=one.peer)
                self.counters["expired"] += 1
                await self._drop(one)

    async def open(self, peer: str, body: Any) -> Any:
        shard, (epoch, sequence) = body
        actor = self._shards.get(shard)
        if actor is not None:
            await self._leading(actor)
        if actor is None or actor.reign is None:
            raise NodeError("no_primary", f"shard {shard} is not led by this node")
        for one in [one for one in self._open.values() if (one.peer, one.replica.shard) == (peer, shard)]:
            await self._drop(one)
        # One that is still being made is in both.
        made = sum(bool(one.files) for one in self._open.values())
        if self._begun + made >= AT_ONCE:
            raise NodeError("overloaded", f"{AT_ONCE} snapshots are being read from this node", RETRY_MS)
        self._begun += 1
        try:
            return await self._make(peer, actor, actor.reign.epoch, Version(epoch, sequence))
        except StorageError as error:
            if isinstance(error, DamagedError):
                actor.harm(error)
            raise NodeError(error.code, str(error), RETRY_MS) from error
        finally:
            self._begun -= 1

    async def _leading(self, actor: ShardActor) -> None:
        """One that learns asks for a snapshot just while the epoch is opened that names it: a moment later it may have it."""
        with trio.move_on_after(OPENING_S):
            while actor.reign is None and actor.primary == "":
                await actor.changed()

    async def _make(self, peer: str, actor: ShardActor, epoch: int, wanted: Version) -> Any:
        began = trio.current_time()
        id_ = secrets.token_hex(16)
        directory = self._directory / f"{actor.shard:03}-{id_}"
        replica, pinned = await actor.upkeep.pin(id_, directory, self._making)
        one = _Open(id_, peer, replica, directory, {}, trio.current_time(), reading=1)
        self._open[id_] = one
        try:
            _check_reach(pinned.state.position, wanted)
        except BaseException:
            await self._drop(one)
            raise
        one.files = pinned.files
        one.reading, one.touched = 0, trio.current_time()
        self.counters["opened"] += 1
        position = pinned.state.position
        log.info(
            "snapshot made", shard=actor.shard, asker=peer, position=tuple(position),
            bytes=sum(pinned.files.values()), seconds=round(trio.current_time() - began, 3),
        )  # fmt: skip
        return [id_, epoch, position, [list(file) for file in one.files.items()]]

    async def checks(self, peer: str, body: Any) -> list[tuple[str, str]]:
        (id_,) = body
        one = self._open.get(id_)
        if one is None or one.peer != peer:
            raise _gone()
        one.reading += 1
        try:
            return await self._checking(_checksums, one.directory, one.files)
        except DamagedError as error:
            if id_ not in self._open:
                # Its files went because they were asked for anew, not because they are harmed.
                raise _gone() from error
            if (actor := self._shards.get(one.replica.shard)) is not None:
                actor.harm(error)
            raise NodeError(error.code, str(error), RETRY_MS) from error
        finally:
            one.reading -= 1
            one.touched = trio.current_time()

    async def give(self, stream: trio.abc.Stream) -> None:
        """A connection for files (node/bulk.py), until it ends. Raises ProtocolError, trio.BrokenResourceError."""
        await bulk.give(stream, self.reading, self._sending)

    @contextmanager
    def reading(self, piece: bulk.Piece) -> Iterator[Path]:
        """The file of a piece of an open snapshot. Raises NodeError."""
        one = self._open.get(piece.snapshot)
        if one is None:
            raise _gone()
        if piece.file not in one.files or piece.offset + piece.bytes > one.files[piece.file]:
            raise NodeError("bad_request", f"the snapshot has no such part of a file {piece.file!r}")
        one.touched = trio.current_time()
        one.reading += 1
        try:
            yield one.directory / piece.file
        finally:
            one.reading -= 1
            one.touched = trio.current_time()
        self.counters["read_bytes"] += piece.bytes

    async def close(self, peer: str, body: Any) -> None:
        (id_,) = body
        one = self._open.get(id_)
        if one is not None and one.peer == peer:
            self.counters["closed"] += 1
            await self._drop(one)

    def _forget(self, one: _Open) -> None:
        self._open.pop(one.id, None)
        one.replica.log_holds.pop(one.id, None)

    async def _drop(self, one: _Open) -> None:
        self._forget(one)
        with trio.CancelScope(shield=True):
            await self._making(partial(shutil.rmtree, one.directory, ignore_errors=True))


def _check_reach(position: Version, wanted: Version) -> None:
    if position < wanted:
        raise NodeError(
            "snapshot_behind", f"it ends at {tuple(position)}, the asker's log at {tuple(wanted)}"
        )


def _gone() -> NodeError:
    return NodeError("snapshot_gone", "this snapshot is not open (any more); ask for another")


def _checksums(directory: Path, files: Mapping[str, int]) -> list[tuple[str, str]]:
    try:
        return [(name, checksum(directory / name, size)) for name, size in files.items()]
    except OSError as error:
        raise DamagedError(directory, None, f"it cannot be read ({error.strerror})") from error
