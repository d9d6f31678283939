"""The shard actor: the only writer of one replica. Searches do not pass through here; they read `replica.view`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog
import trio

from node.blocking import Runner
from node.commit import CommitStoppedError, GroupCommit
from node.replication import Diverged, LookUp, Progress
from router.layout import Placement
from router.ports import Change, NodeError
from storage.batch import Batch
from storage.errors import DamagedError, DiskFullError, IndexingError, ReplicaStoppedError, StorageError
from storage.records import HEADER_BYTES, NO_WRITE_ID, Fingerprint, Operation, Record, Version
from storage.replica import Replica

log = structlog.get_logger(__name__)

QUEUE_BYTES_MAX = 64 << 20
MAINTENANCE_S = 1.0
BUILD_STEP_S = 0.05
# Between two steps of the graph builder the search lane gets its turn.
BUILD_REST_S = 0.005


class WriteItem(NamedTuple):
    """One client's changes for this shard."""

    changes: Sequence[Change]
    write_id: bytes


class ShardActor:
    """Owns one replica: group commit, apply, checkpoints, graph building, compaction.

    One lock (`_writing`) keeps append-and-apply, and the short ends of checkpoint and compaction, from each other.
    """

    def __init__(
        self,
        replica: Replica,
        placement: Placement,
        *,
        name: str,
        log_runner: Runner,
        maintenance_runner: Runner,
        queue_max: int,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.replica = replica
        self.placement = placement
        self.primary = placement.primary == name
        self.progress = Progress(name, placement.voters)
        # A static placement keeps its epoch; what is on disk may be of that epoch or older, never newer.
        self.epoch = placement.epoch
        self._log_runner = log_runner
        self._maintenance_runner = maintenance_runner
        self._now_ns = now_ns
        self._writing = trio.Lock()
        self._queue_max = queue_max
        self._commit = self._new_commit()
        self._waiting_bytes = 0
        self._broken: Exception | None = None
        self._stopped = False
        # Set for good by the replicator: our log and the primary's are of two histories.
        self.diverged = False
        self._newest_ns = 0
        self._broke = trio.Event()
        self._moved = trio.Event()
        self._acked = trio.Event()
        self.counters = {"writes": 0, "records": 0, "deduplicated": 0, "refused": 0, "batches": 0}

    @property
    def shard(self) -> int:
        return self.placement.shard

    def idle_s(self) -> float:
        """Since the last record was logged, by the primaries' wall clocks; 0 in an empty log."""
        logged_ns = self.replica.logged_ns
        return max(0, self._now_ns() - logged_ns) / 1e9 if logged_ns else 0.0

    def _new_commit(self) -> GroupCommit[WriteItem, Version]:
        return GroupCommit(self._flush, waiting_max=self._queue_max)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Raises DamagedError when log and table have parted: only a restart with its recovery mends that."""
        self._commit = self._new_commit()
        # The log's end was passed when it was written, not now: what lags behind it is at least that old.
        self.progress.durable(self.replica.position.sequence, trio.current_time() - self.idle_s())
        async with trio.open_nursery() as nursery:
            await nursery.start(self._commit.run)
            nursery.start_soon(self._maintain)
            task_status.started()
            await self._broke.wait()
            raise DamagedError(
                f"shard-{self.shard:03}", None, f"a durable record could not be applied: {self._broken!r}"
            )

    # -- writing as primary ---------------------------------------------------------------------------------------

    async def write(self, changes: Sequence[Change], ack: str, write_id: bytes, timeout_s: float) -> Version:
        """The position of the last change, once it is as durable as `ack` asks. Raises NodeError."""
        if not self.primary:
            raise NodeError("no_primary", f"shard {self.shard} is not written here; its primary is elsewhere")
        if ack not in ("primary", "quorum", "all"):
            raise NodeError("bad_request", f"ack {ack!r} is not one of primary, quorum, all")
        deadline = trio.current_time() + timeout_s
        version: Version | None = None
        with trio.move_on_at(deadline):
            version = await self._submit(WriteItem(changes, write_id))
        if version is None:
            raise _unknown(f"shard {self.shard} did not get the write to disk in time")
        while self.progress.reached(ack) < version.sequence:  # type: ignore[arg-type]  # checked above
            acked = self._acked
            left = deadline - trio.current_time()
            with trio.move_on_after(max(0.0, left)) as scope:
                await acked.wait()
            if scope.cancelled_caught:
                count = self.progress.count(version.sequence)
                raise NodeError(
                    "ack_timeout",
                    f"written, but only {count} of {len(self.placement.voters)} replicas of shard {self.shard} have "
                    f"acknowledged it in time for ack={ack}; it stays written",
                )
        return version

    async def _submit(self, item: WriteItem) -> Version:
        """Bounded in bytes as well as in items: a few large requests must not take all memory."""
        size = sum(len(change.vector) + len(change.metadata) + HEADER_BYTES for change in item.changes)
        if self._waiting_bytes and self._waiting_bytes + size > QUEUE_BYTES_MAX:
            raise NodeError(
                "overloaded", f"shard {self.shard} has {QUEUE_BYTES_MAX >> 20} MiB of writes waiting", 100
            )
        self._waiting_bytes += size
        try:
            return await self._commit.submit(item)
        except CommitStoppedError as error:
            code = "outcome_unknown" if error.outcome_unknown else "unavailable"
            raise NodeError(code, str(error)) from error
        finally:
            self._waiting_bytes -= size

    async def _flush(self, items: list[WriteItem]) -> list[Version | Exception]:
        """One group commit: sequences given, one append with one durable write, then applied, then answered."""
        async with self._writing:
            results, batch, rows = self._encode(items)
            if batch.blobs:
                try:
                    await self._log_runner(self.replica.append, batch.blobs, rows)
                except StorageError as error:
                    self.counters["refused"] += len(items)
                    refused = _refusal(error, was_stopped=self._stopped)
                    self._stopped = self._stopped or isinstance(error, ReplicaStoppedError)
                    # What was answered from the log already needs no disk.
                    applied = self.replica.position
                    return [r if isinstance(r, Exception) or r <= applied else refused for r in results]
                try:
                    self._apply(batch.records)
                except Exception as error:
                    # Durable all the same: after the restart that follows, recovery applies it.
                    raise _unknown(f"shard {self.shard} stopped after the write was on disk") from error
            self.counters["writes"] += len(items)
            return results

    def _encode(self, items: list[WriteItem]) -> tuple[list[Version | Exception], Batch, int]:
        results: list[Version | Exception] = []
        rows = 0
        # Never back: the age of write_ids is counted by these, and a clock that is corrected must not age them all.
        self._newest_ns = max(self._now_ns(), self._newest_ns, self.replica.newest_ns)
        batch = Batch(self.epoch, self.replica.position.sequence, self._newest_ns)
        # A retry may wait in the same batch as its first try.
        here: dict[bytes, tuple[Version, int]] = {}
        for changes, write_id in items:
            unfit = self._unfit(changes)
            if unfit:
                results.append(NodeError("bad_request", unfit))
                continue
            before = here.get(write_id) or self.replica.written(write_id)
            done = min(before[1], len(changes)) if before else 0
            self.counters["deduplicated"] += done
            todo = changes[done:]
            if not todo:
                assert before is not None
                results.append(before[0])
                continue
            new = sum(change.operation is Operation.PUT for change in todo)
            try:
                self.replica.check_room(rows + new)
            except IndexingError as error:
                results.append(NodeError(error.code, str(error), error.retry_after_ms))
                continue
            rows += new
            version = batch.add(todo, write_id)
            results.append(version)
            if write_id != NO_WRITE_ID:
                here[write_id] = (version, done + len(todo))
        return results, batch, rows

    def _unfit(self, changes: Sequence[Change]) -> str | None:
        """Why changes must not enter the log. The coordinator has checked them by its own settings, not by ours."""
        config = self.replica.config
        for change in changes:
            if change.classes and max(change.classes) >= config.class_width:
                return f"class {max(change.classes)} is not below this node's class_width of {config.class_width}"
            if change.operation is Operation.PUT and len(change.vector) != 2 * config.dim:
                return f"a vector of {len(change.vector)} bytes is not FP16 of dimension {config.dim}"
        return None

    def _apply(self, batch: list[Record]) -> None:
        try:
            self.replica.apply(batch)
        except Exception as error:
            self._broken = error
            self._broke.set()
            raise
        self.counters["batches"] += 1
        self.counters["records"] += len(batch)
        self.progress.durable(self.replica.position.sequence, trio.current_time())
        self._moved.set()
        self._moved = trio.Event()
        self._wake_ackers()

    def _wake_ackers(self) -> None:
        self._acked.set()
        self._acked = trio.Event()

    # -- the pull stream ------------------------------------------------------------------------------------------

    async def serve_pull(
        self, follower: str, named: Fingerprint, max_bytes: int, wait_s: float
    ) -> tuple[int, int, int, bytes]:
        """For a follower whose disk has everything to `named`: (epoch, our last, its lag in ms, raw records).

        Raises NodeError `diverged` (law `log-matching`), and LogGoneError when our log no longer tells.
        """
        step = self.progress.pulled(follower, named)
        if isinstance(step, LookUp):
            step = self.progress.found(follower, named, self.replica.fingerprint(named.sequence))
        if isinstance(step, Diverged):
            log.error("follower diverged", shard=self.shard, follower=follower, reason=step.reason)
            raise NodeError("diverged", f"the logs of shard {self.shard} have parted: {step.reason}")
        self._wake_ackers()
        after = named.sequence
        deadline = trio.current_time() + wait_s
        while self.replica.position.sequence <= after:
            moved = self._moved
            with trio.move_on_at(deadline) as scope:
                await moved.wait()
            if scope.cancelled_caught:
                break
        data = b""
        if self.replica.position.sequence > after:
            data = self.replica.read_log(after, max_bytes)
        return (
            self.epoch,
            # What the log's thread has just made durable may be in `data` before the loop has applied it.
            self.replica.logged,
            self.progress.lag_ms(after, trio.current_time()),
            data,
        )

    async def follow(self, blobs: list[bytes], batch: list[Record]) -> None:
        """Append records that a primary streamed, and apply them. Raises StorageError."""
        async with self._writing:
            rows = sum(record.operation is Operation.PUT for record in batch)
            await self._log_runner(self.replica.append, blobs, rows)
            self._apply(batch)

    async def wait_applied(self, epoch: int, sequence: int, timeout_s: float) -> bool:
        """Whether this replica has applied (epoch, sequence) within `timeout_s`."""
        if self.diverged:
            return False  # positions of another history say nothing
        with trio.move_on_after(timeout_s):
            while self.replica.position < (epoch, sequence):
                await self._moved.wait()
            return True
        return False

    # -- background work ------------------------------------------------------------------------------------------

    async def _maintain(self) -> None:
        """The log's next segment, checkpoints, compaction, then graph building, one at a time, in threads."""
        while True:
            try:
                if self.replica.log_ahead_due:
                    await self._maintenance_runner(self.replica.make_log_ahead)
                if self.replica.checkpoint_due():
                    await self.checkpoint()
                if self.replica.compaction_due():
                    await self._compact()
                more = await self._maintenance_runner(
                    self.replica.engine.build, self.replica.view, BUILD_STEP_S
                )
            except DamagedError:
                raise
            except (DiskFullError, ReplicaStoppedError) as error:
                # Nothing is lost: the log holds everything. Try again when there may be room.
                log.warning("maintenance put off", shard=self.shard, code=error.code, reason=str(error))
                more = False
            await trio.sleep(BUILD_REST_S if more else MAINTENANCE_S)

    async def checkpoint(self) -> None:
        """Bring table and vectors up to the log. Safe beside writes; only the ends hold the lock."""
        async with self._writing:
            job = self.replica.begin_checkpoint()
        await self._maintenance_runner(job.run)
        async with self._writing:
            self.replica.finish_checkpoint(job)

    async def _compact(self) -> None:
        async with self._writing:
            job = self.replica.begin_compaction()
        await self._maintenance_runner(job.run)
        async with self._writing:
            await self._maintenance_runner(job.commit)
            self.replica.finish_compaction(job)
        log.info("compacted", shard=self.shard, rows=self.replica.view.rows)


def _unknown(why: str) -> NodeError:
    return NodeError(
        "outcome_unknown", f"{why}; send the same again with the same write_id to learn or settle the outcome"
    )


def _refusal(error: StorageError, *, was_stopped: bool) -> NodeError:
    if isinstance(error, ReplicaStoppedError) and not was_stopped:
        # The failed write itself may be on disk; those after it are refused and are not.
        return _unknown(str(error))
    retry = 1_000 if isinstance(error, DiskFullError) else None
    return NodeError(error.code, str(error), retry)
