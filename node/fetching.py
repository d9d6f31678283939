"""A snapshot of a shard fetched from its primary, and put in the place of a live replica. The other end is node/snapshots.py."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import structlog
import trio

from node.blocking import ThreadRunner
from node.bulk import PIECE_BYTES_MAX, Piece, RefusedError, Target, asking
from node.fork import EpochStarts, shared_end
from node.peerlink import (
    Call,
    PeerError,
    PeerGoneError,
    PeerLink,
    PeerOverloadedError,
    PeerTimeoutError,
    RemoteError,
)
from node.shard import ShardActor
from node.transfer import Throttle, Transfer
from storage.crash_points import reached
from storage.errors import DamagedError, StorageError
from storage.installing import Installing
from storage.records import Version
from storage.replica import Replica
from storage.snapshot import become_replica
from storage.table import TableState
from storage.vectors import disk_error

log = structlog.get_logger(__name__)

# Of one request when there is a rate to keep; as large as may be, when there is none.
CHUNK_BYTES = 1 << 20
IN_FLIGHT = 2
# The primary makes a checkpoint before it answers; and reads everything once for the checksums.
OPEN_S = 300.0
CLOSE_S = 1.0
# A giver that cannot be reached is waited for as long as the primary keeps an idle snapshot.
AWAY_S = 60.0
AGAIN_S = 0.1


class SnapshotError(Exception):
    """A snapshot that was begun cannot be used; another can be asked for."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        super().__init__(reason)


class File(NamedTuple):
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a primary has opened for us. epoch: the one that it leads."""

    id: str
    epoch: int
    position: Version
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def read_snapshot(body: Any) -> Snapshot:
    """The answer to `snapshot_open`. Raises TypeError, ValueError."""
    id_, epoch, (at, sequence), files = body
    found = tuple(File(str(name), int(size)) for name, size in files)
    for file in found:
        path = PurePosixPath(file.name)
        if path.is_absolute() or not path.parts or ".." in path.parts or file.bytes < 0:
            raise ValueError(f"a file {file.name!r} of {file.bytes} bytes")
    if len({file.name for file in found}) < len(found):
        raise ValueError("one file twice")
    return Snapshot(str(id_), int(epoch), Version(int(at), int(sequence)), found)


@asynccontextmanager
async def opened(link: PeerLink, shard: int, wanted: Version) -> AsyncIterator[Snapshot]:
    """A snapshot that holds everything to `wanted`, kept by the primary until the end of the block, as its log is from there.

    Raises PeerError, RemoteError.
    """
    answer = await link.call("snapshot_open", [shard, wanted], OPEN_S)
    try:
        snapshot = read_snapshot(answer)
    except (TypeError, ValueError) as error:
        raise RemoteError("bad_answer", f"{link.name} sent what is no snapshot: {error}") from error
    try:
        yield snapshot
    finally:
        with trio.move_on_after(CLOSE_S, shield=True), suppress(PeerError):
            await link.call("snapshot_close", [snapshot.id], CLOSE_S)


async def fetch(
    snapshot: Snapshot,
    link: PeerLink,
    directory: Path,
    *,
    throttle: Callable[[], Throttle],
    transfer: Transfer,
    runner: ThreadRunner,
    wanted: Callable[[], bool],
) -> None:
    """Its files in `directory`, which is made, verified and on the disk. A broken connection goes on where it was.

    throttle: that of the moment. wanted: whether to go on, asked before each piece.

    Raises PeerError, SnapshotError, DiskFullError, ReplicaStoppedError.
    """
    transfer.begin(snapshot.bytes)
    # Made while the bytes come.
    checks = _Checks(link, snapshot)
    with ExitStack() as stack:
        targets = await runner(_make_files, directory, snapshot.files, stack)
        until = trio.current_time() + AWAY_S
        while transfer.done_bytes < snapshot.bytes:
            before = transfer.done_bytes
            try:
                await _fetch_on(snapshot, link, targets, throttle, transfer, runner, wanted)
            except OSError as error:
                transfer.done_bytes = sum(target.done for target in targets.values())
                if transfer.done_bytes > before:
                    until = trio.current_time() + AWAY_S
                elif trio.current_time() >= until:
                    raise PeerGoneError(link.name, str(error), sent=True) from error
                await trio.sleep(AGAIN_S)
        await runner(_verify, snapshot.files, targets, await checks.get())
        transfer.ended = trio.current_time()


async def _fetch_on(
    snapshot: Snapshot,
    link: PeerLink,
    targets: dict[str, Target],
    throttle: Callable[[], Throttle],
    transfer: Transfer,
    runner: ThreadRunner,
    wanted: Callable[[], bool],
) -> None:
    """From where the targets are. Raises OSError when the connection breaks, and as `fetch`."""
    if link.address is None:
        raise ConnectionError("its address is not known yet")
    pieces = iter(list(_pieces(snapshot, targets, CHUNK_BYTES if throttle().bounded else PIECE_BYTES_MAX)))
    asked: deque[Piece] = deque()
    async with asking(link.address) as asker:
        while True:
            # One ahead, so that the giver never waits for us.
            while len(asked) < IN_FLIGHT and (piece := next(pieces, None)) is not None:
                if not wanted():
                    raise SnapshotError("overtaken", "its epoch is not followed any more")
                await throttle().take(piece.bytes)
                await asker.ask(piece)
                asked.append(piece)
            if not asked:
                return
            piece = asked.popleft()
            try:
                await asker.take(targets[piece.file], piece.bytes, runner)
            except RefusedError as error:
                raise RemoteError(error.code, error.message) from error
            transfer.done_bytes += piece.bytes


def _pieces(snapshot: Snapshot, targets: dict[str, Target], most: int) -> Iterator[Piece]:
    for file in snapshot.files:
        for offset in range(targets[file.name].done, file.bytes, most):
            yield Piece(snapshot.id, file.name, offset, min(most, file.bytes - offset))


def _make_files(directory: Path, files: tuple[File, ...], stack: ExitStack) -> dict[str, Target]:
    targets: dict[str, Target] = {}
    try:
        for file in files:
            path = directory / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
            stack.callback(os.close, fd)
            targets[file.name] = Target(path, fd)
            if file.bytes:
                os.posix_fallocate(fd, 0, file.bytes)
    except OSError as error:
        raise disk_error(error, directory) from error
    return targets


class _Checks:
    """The giver's checksums of all files. Asked for at once; whoever wants to know waits."""

    def __init__(self, link: PeerLink, snapshot: Snapshot) -> None:
        self._link, self._snapshot = link, snapshot
        self._call: Call | None = None
        with suppress(PeerError):
            self._call = self._begin()

    def _begin(self) -> Call:
        return self._link.begin("snapshot_checks", [self._snapshot.id], OPEN_S)

    async def get(self) -> dict[str, str]:
        """By file name. Raises PeerError."""
        until = trio.current_time() + AWAY_S
        while True:
            try:
                call, self._call = self._call or self._begin(), None
                return {str(name): str(check) for name, check in await call.wait()}
            except (PeerGoneError, PeerTimeoutError, PeerOverloadedError):
                if trio.current_time() >= until:
                    raise
                await trio.sleep(AGAIN_S)
            except (TypeError, ValueError) as error:
                raise RemoteError(
                    "bad_answer", f"{self._link.name} sent what are no checksums: {error}"
                ) from error


def _verify(files: tuple[File, ...], targets: dict[str, Target], checks: dict[str, str]) -> None:
    """On the disk, and what was sent."""
    for file in files:
        targets[file.name].sync()
        if targets[file.name].xxh3 != checks.get(file.name):
            raise SnapshotError("snapshot_damaged", f"{file.name} is not what was sent")


async def _nothing() -> None:
    await trio.lowlevel.checkpoint()


class Fetcher:
    """What the fetches of one node share."""

    def __init__(self, *, bytes_per_s: float = 0, settle: Callable[[], Awaitable[None]] = _nothing) -> None:
        """settle: returns when no search uses a replica that was in its actor's hands at the call."""
        self._throttle = Throttle(bytes_per_s)
        # By shard: of moves that were given a rate of their own.
        self._own: dict[int, Throttle] = {}
        self._settle = settle
        self._runner = ThreadRunner("fetch", limit=4)
        self.counters = {"fetches": 0, "fetched_bytes": 0, "fetch_ms": 0, "installed": 0}

    def pace(self, shard: int, bytes_per_s: float | None) -> None:
        """That shard's snapshots are fetched at this rate of their own, 0: unthrottled; None: as the others, which share one.
        Kept until the replica votes or is removed, or this process ends."""
        before = self._own.pop(shard, None)
        if bytes_per_s is not None:
            self._own[shard] = Throttle(bytes_per_s)
        if before is not None:
            before.end()

    def throttle(self, shard: int) -> Throttle:
        """Which one counts for that shard now."""
        return self._own.get(shard, self._throttle)

    async def catch_up(
        self, actor: ShardActor, snapshot: Snapshot, link: PeerLink, transfer: Transfer
    ) -> None:
        """The actor's replica is replaced by one from the snapshot, under the same replica id.

        Raises PeerError, SnapshotError, StorageError; then the old one is as it was, but for a side file perhaps.
        """
        old = actor.replica
        installing = Installing(old.directory)
        self.counters["fetches"] += 1
        try:
            await self._put_in_place(actor, snapshot, link, transfer, installing)
        except Exception:
            await self._runner(partial(shutil.rmtree, installing.fetch, ignore_errors=True))
            raise
        self.counters["installed"] += 1
        reached("move.after_snapshot")
        with trio.CancelScope(shield=True):  # what is left open could not be opened again
            await self._settle()
            await self._runner(old.retire)
            await self._runner(installing.clear)

    async def _put_in_place(
        self,
        actor: ShardActor,
        snapshot: Snapshot,
        link: PeerLink,
        transfer: Transfer,
        installing: Installing,
    ) -> None:
        await self._runner(installing.clear)
        await fetch(
            snapshot, link, installing.fetch,
            throttle=partial(self.throttle, actor.shard), transfer=transfer, runner=self._runner,
            wanted=lambda: actor.election.takes(snapshot.epoch),
        )  # fmt: skip
        self.counters["fetched_bytes"] += snapshot.bytes
        self.counters["fetch_ms"] += round(1_000 * (transfer.ended - transfer.began))
        state = await self._runner(_prepare, installing.fetch, actor.replica)
        if state.position != snapshot.position:
            raise SnapshotError("snapshot_damaged", "it does not end where it was said to end")
        install = partial(_install, installing, state)
        if not await actor.replace(snapshot.epoch, state.position, install, self._runner):
            raise SnapshotError("overtaken", "its epoch is not followed any more, or our log is beyond it")


def _prepare(directory: Path, old: Replica) -> TableState:
    try:
        return become_replica(
            directory, shard=old.shard, node_id=old.node_id, config=old.config, replica_id=old.replica_id
        )
    except OSError as error:
        raise disk_error(error, directory) from error


def _install(installing: Installing, state: TableState, old: Replica) -> Replica:
    """Nothing is written to `old` meanwhile."""
    ours, theirs = EpochStarts(old.epoch_starts.items()), EpochStarts(state.epoch_starts.items())
    shared = shared_end(ours, old.position.sequence, theirs, state.position.sequence)
    kept = old.keep_tail(shared)
    if kept is not None:
        log.warning("tail kept", shard=old.shard, after=shared, file=kept.name, records=kept.records)
    try:
        installing.swap([file.path for file in old.side_files()], old.quarantine_path)
        try:
            return Replica.open(old.directory, shard=old.shard, node_id=old.node_id, config=old.config)
        except StorageError as error:
            installing.swap_back()
            raise SnapshotError("snapshot_damaged", f"it did not open: {error}") from error
    except OSError as error:
        if not installing.directory.exists():
            # A restart puts it right; going on without would not.
            raise DamagedError(installing.directory, None, f"renaming failed: {error}") from error
        raise disk_error(error, installing.directory) from error
