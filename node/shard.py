"""The shard actor: the only writer of one replica. Searches do not pass through here; they read `replica.view`.

Who leads is for `node/election.py` to decide and for `node/failover.py` to carry out. Here is what follows from it: a write is
begun only in an epoch that this process has opened (`own-epoch`) and acknowledged only while the lease holds (`checked-twice`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import structlog
import trio

from node import batching, placement
from node.batching import AgainItem, Item, OfferItem, WriteItem, Written
from node.blocking import Runner
from node.commit import CommitStoppedError, GroupCommit
from node.election import Effect, Election, ElectionConfig, Role
from node.fork import EpochStarts, cut_at
from node.placement import Placement, PlacementError
from node.pulls import Answer, Beat, Beaten, Forked, NotPrimary, Pull, Streamed
from node.replication import Ack, Diverged, Fork, LookUp, Progress
from node.upkeep import Upkeep
from router.ports import Change, NodeError
from storage.arrival import Arrival
from storage.batch import Batch
from storage.bulk import Columns
from storage.errors import DamagedError, DiskFullError, ReplicaStoppedError, StorageError
from storage.records import HEADER_BYTES, Kind, Mark, Record, Version, decode
from storage.replica import Replica
from storage.side import SideFile
from storage.tombstones import encode_floor

log = structlog.get_logger(__name__)

QUEUE_BYTES_MAX = 64 << 20
# A new primary has no lease before a majority has pulled from it; a write waits this long for one.
LEASE_WAIT_S = 1.0
# A learner this near may become a voter: what is missing comes with its next pull or two.
LEVEL_RECORDS = 1_000


@dataclass(slots=True, eq=False)
class Reign:
    """An epoch that this process has opened. ended: why it is over, empty while it lasts."""

    epoch: int
    progress: Progress
    since: float = 0.0
    ended: str = ""
    # Where everybody's log ended who has pulled in this epoch and matched, by the replica that is named: voters and learners.
    heard: dict[str, int] = field(default_factory=dict)
    # When the placement's witness was heard last.
    witness_at: float = -math.inf
    # Its witness is to remember the epoch though its record is on no majority of the disks.
    insists: bool = False


class ShardActor:
    """Owns one replica: elections' outcome, group commit, apply, the stream's two ends.

    One lock (`_writing`) keeps append-and-apply, cuts, and the short ends of checkpoint and compaction, from each other.
    """

    def __init__(
        self,
        replica: Replica,
        founders: Sequence[str],
        *,
        name: str,
        promised: int,
        owes: bool,
        log_runner: Runner,
        maintenance_runner: Runner,
        queue_max: int,
        election: ElectionConfig | None = None,
        random: Random | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """founders: who votes, by the layout, until an epoch's record says it. promised, owes: as in Election."""
        self.replica = replica
        self.name = name
        self._founders = tuple(founders)
        self._log_runner = log_runner
        self._now_ns = now_ns
        self._writing = trio.Lock()
        self.upkeep = Upkeep(replica, maintenance_runner, self._writing, self.harm, self.note_settled)
        self._queue_max = queue_max
        self._commit = self._new_commit()
        self._waiting_bytes = 0
        self._broken: Exception | None = None
        self._stopped = False
        # Set for good by the replicator: our log and the primary's differ where they must not.
        self.diverged = False
        # What is damaged in our replica, which others can stand in for: it answers no reads until it has been rebuilt.
        self.harmed = ""
        # Begun in the place of a damaged one, and not level yet: that something is not here says nothing.
        self.blank = False
        self._newest_ns = 0
        self._broke = trio.Event()
        self._moved = trio.Event()
        self._changed = trio.Event()
        self.counters = {"writes": 0, "records": 0, "deduplicated": 0, "refused": 0, "batches": 0, "cuts": 0}
        # Where our log ends, bytes that are being written included.
        self._end = replica.position
        # Up to which epoch we may have stood with a log that is not ours.
        self._void = 0
        self._placed = replica.placement
        self.placement = self._read_placement()
        self.reign: Reign | None = None
        # Who leads in which epoch, as far as we have heard.
        self.hint: tuple[int, str] = (0, "")
        voters = self._voters()
        self.election = Election(
            election or ElectionConfig(),
            name,
            voters=voters,
            promised=promised,
            last=lambda: self._end,
            durable=lambda: self.replica.logged_at,
            random=random or Random(),
            now=trio.current_time(),
            founding=self.founding,
            # Who votes alone has promised its silence to nobody else.
            owes=owes and voters != (name,),
        )
        # Carry out what the election says, and let a voter on a new disk in again; set by whoever drives it.
        self.act: Callable[[ShardActor, list[Effect]], None] = lambda _actor, _effects: None
        self.readmit: Callable[[ShardActor, str, int], None] = lambda _actor, _voter, _replica: None
        # Told of records that were applied; None: the replica was made anew, and nobody knows which.
        self.applied: Callable[[ShardActor, Sequence[Record] | Columns | None], None] = (
            lambda _actor, _records: None
        )

    # -- what others ask ------------------------------------------------------------------------------------------

    @property
    def shard(self) -> int:
        return self.replica.shard

    @property
    def leads(self) -> bool:
        return self.reign is not None

    @property
    def founding(self) -> bool:
        """No epoch has been opened yet, as far as our log knows."""
        return not self._placed

    @property
    def primary(self) -> str:
        """Who leads, as far as we know; empty when we do not."""
        return self.name if self.reign is not None else self.hint[1]

    @property
    def disowned(self) -> bool:
        """Our log names this node as a voter, and with another replica than ours: what that one had promised is not known."""
        return not self.founding and self.name in self.placement.names and self.name not in self._voters()

    def idle_s(self) -> float:
        """Since the last record was logged, by the primaries' wall clocks; 0 in an empty log."""
        logged_ns = self.replica.logged_ns
        return max(0, self._now_ns() - logged_ns) / 1e9 if logged_ns else 0.0

    def harm(self, error: DamagedError) -> bool:
        """Something in our replica is damaged. False: ours is the only copy, so nobody can stand in for it."""
        if len(self.placement.names) < 2 and self.name in self.placement.names:
            return False
        if not self.harmed:
            self.harmed = str(error)
            log.error("replica damaged", shard=self.shard, reason=str(error))
            self._tell()
        return True

    @property
    def unreadable(self) -> str:
        """The code with which reads of this replica are refused; empty: they are not."""
        return DamagedError.code if self.harmed else "unavailable" if self.blank else ""

    async def changed(self) -> None:
        """Returns at the next change: leading or not, hint, placement, an acknowledgement, an echo."""
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def hear_of(self, epoch: int, primary: str) -> None:
        """Somebody says who leads; the greatest epoch counts."""
        if epoch > self.hint[0] or (epoch == self.hint[0] and not self.hint[1]):
            self.hint = (epoch, primary)
            self._tell()

    def doubt(self, epoch: int) -> None:
        """The primary of that epoch, as we were told, does not lead any more."""
        if self.hint[0] == epoch and self.hint[1]:
            self.hint = (epoch, "")
            self._tell()

    def _new_commit(self) -> GroupCommit[Item, Written]:
        return GroupCommit(self._flush, waiting_max=self._queue_max)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Raises DamagedError when log and table have parted: only a restart with its recovery mends that."""
        self._commit = self._new_commit()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._commit.run)
            nursery.start_soon(self.upkeep.run)
            task_status.started()
            await self._broke.wait()
            raise DamagedError(
                f"shard-{self.shard:03}", None, f"a durable record could not be applied: {self._broken!r}"
            )

    # -- leading --------------------------------------------------------------------------------------------------

    def _read_placement(self) -> Placement:
        if not self._placed:
            return Placement(tuple((name, 0) for name in self._founders))
        try:
            return placement.unpack(self._placed)
        except PlacementError as error:
            raise DamagedError(self.replica.directory, None, str(error)) from error

    def _voters(self) -> tuple[str, ...]:
        """By the last placement in our log; without us, when it names another replica than ours."""
        mine = self.founding or self.placement.is_voter(self.name, self.replica.replica_id)
        return tuple(name for name in self.placement.electors if mine or name != self.name)

    def _note_placement(self) -> None:
        if self.replica.placement is not self._placed:
            self._placed = self.replica.placement
            self.placement = self._read_placement()
            self.election.configure(self._voters(), founding=self.founding)
            if self.reign is not None:
                self.reign.progress.placement = self.placement
            self._tell()

    async def open_epoch(self, epoch: int, new: Placement) -> bool:
        """Append the epoch's record, and from then on write in it. False: the election is lost again, or the disk refuses."""
        async with self._writing:
            if not self._elected(epoch):
                return False
            if epoch <= self._void:
                self.act(
                    self, self.election.give_up("its log is not what it stood with", trio.current_time())
                )
                return False
            idle_s = self.idle_s()
            batch = Batch(epoch, self.replica.position.sequence, self._stamp_ns())
            batch.add_mark(Mark.EPOCH, new.pack())
            try:
                await self._append(batch, 0)
            except StorageError as error:
                log.warning("epoch not opened", shard=self.shard, epoch=epoch, reason=str(error))
                self.act(self, self.election.give_up(str(error), trio.current_time()))
                return False
            progress = Progress(self.name, new, epoch, batch.records[0].sequence)
            # What lags behind the record before ours is as old as that.
            progress.durable(self.replica.position.sequence, trio.current_time() - idle_s)
            self._apply(batch.records)
            if not self._elected(epoch):
                return False
            self.reign = Reign(epoch, progress, trio.current_time())
            progress.durable(self.replica.position.sequence, trio.current_time())
        self.hear_of(epoch, self.name)
        self._tell()
        log.info("leads", shard=self.shard, epoch=epoch, sequence=self.replica.position.sequence)
        return True

    def _elected(self, epoch: int) -> bool:
        return self.election.role is Role.PRIMARY and self.election.epoch == epoch

    def step_down(self, reason: str) -> None:
        """Write no more; what waits for an acknowledgement ends as `outcome_unknown`."""
        reign, self.reign = self.reign, None
        if reign is not None:
            reign.ended = reason
            self.doubt(reign.epoch)
            log.info("leads no more", shard=self.shard, epoch=reign.epoch, reason=reason)
        self._tell_moved()
        self._tell()

    def resume(self) -> None:
        """The successor did not come level: write on."""
        self.election.resume()
        self._tell()

    @property
    def end(self) -> int:
        """The last sequence of our log, bytes that are being written included."""
        return self._end.sequence

    @property
    def settled(self) -> bool:
        """As primary: our epoch's record, and so everything before it, is on a quorum that follows us."""
        reign = self.reign
        start = self.replica.epoch_starts.get(reign.epoch) if reign is not None else None
        return reign is not None and start is not None and reign.progress.reached("quorum") >= start

    def note_settled(self) -> int:
        """Up to which sequence our log is known to be on a quorum: while we lead by who follows, else as it was told us."""
        if self.reign is not None and self.settled:
            self.replica.settled = max(self.replica.settled, self.reign.progress.reached("quorum"))
        return self.replica.settled

    def not_primary(self) -> NodeError:
        known = f"; its primary is {self.hint[1]}" if self.hint[1] not in ("", self.name) else ""
        return NodeError("no_primary", f"shard {self.shard} is not written through {self.name}{known}")

    # -- writing as primary ---------------------------------------------------------------------------------------

    async def write(self, changes: Sequence[Change], ack: str, write_id: bytes, timeout_s: float) -> Version:
        """A place in the log behind the changes, once it is as durable as `ack` asks. Raises NodeError."""
        if ack not in ("primary", "quorum", "all"):
            raise NodeError("bad_request", f"ack {ack!r} is not one of primary, quorum, all")
        deadline = trio.current_time() + timeout_s
        await self._leased(deadline)
        written: Written | None = None
        with trio.move_on_at(deadline):
            written = await self._submit(WriteItem(changes, write_id))
        if written is None:
            raise unknown(f"shard {self.shard} did not get the write to disk in time")
        await self.acknowledged(written.at, ack, deadline)  # type: ignore[arg-type]  # checked above
        return written.at

    async def offer(self, records: Sequence[Record], timeout_s: float) -> Sequence[Record]:
        """Takes records of a tail again, returns when they are on a quorum. Those of ids that may have been purged are not taken
        but returned, and kept in the quarantine here. Raises NodeError."""
        written = await self._take_again(OfferItem(records), timeout_s)
        return written.aside

    async def again(self, records: Sequence[Record], timeout_s: float) -> None:
        """Writes records that we have and others lack again, as they are; returns when they are on a quorum. Raises NodeError."""
        await self._take_again(AgainItem(records), timeout_s)

    async def _take_again(self, item: OfferItem | AgainItem, timeout_s: float) -> Written:
        deadline = trio.current_time() + timeout_s
        await self._leased(deadline)
        written: Written | None = None
        with trio.move_on_at(deadline):
            written = await self._submit(item)
        if written is None:
            raise unknown(f"shard {self.shard} did not get the offered records to disk in time")
        if written.aside:
            await self.put_aside(written.aside)
        await self.acknowledged(written.at, "quorum", deadline)
        return written

    async def put_aside(self, records: Sequence[Record]) -> None:
        """Into the quarantine, durably. Raises StorageError."""
        log.error("quarantined", shard=self.shard, ids=[record.id for record in records][:20])
        await self._log_runner(self.replica.quarantine, records)

    async def _leased(self, deadline: float) -> None:
        until = min(deadline, trio.current_time() + LEASE_WAIT_S)
        while self.reign is None or not self.election.may_acknowledge(trio.current_time()):
            if self.reign is None:
                raise self.not_primary()
            with trio.move_on_at(until) as scope:
                await self._changed.wait()
            if scope.cancelled_caught:
                raise self._no_lease()

    def _no_lease(self) -> NodeError:
        return NodeError(
            "no_lease",
            f"the primary of shard {self.shard} has not been heard by a majority of its voters",
            50,
        )

    async def acknowledged(self, at: Version, ack: Ack, deadline: float) -> None:
        """Returns when everything up to `at` is as durable as `ack` asks, and the lease holds then. Raises NodeError."""
        reign = self.reign
        if reign is None or reign.epoch != at.epoch:
            raise unknown(f"shard {self.shard} has changed its primary meanwhile")
        progress = reign.progress
        while True:
            if reign.ended:
                raise unknown(
                    f"shard {self.shard} changed its primary ({reign.ended}) before the write was acknowledged"
                )
            reached = progress.reached(ack) >= at.sequence
            if reached and self.election.may_acknowledge(trio.current_time()):
                return
            changed = self._changed
            with trio.move_on_at(deadline) as scope:
                await changed.wait()
            if scope.cancelled_caught:
                break
        if reached:
            raise unknown(f"the primary of shard {self.shard} has lost its lease")
        raise NodeError(
            "ack_timeout",
            f"written, but only {progress.holders(at.sequence)} of {len(progress.voters)} replicas of shard {self.shard} have "
            f"acknowledged it in time for ack={ack}; send the same again with the same write_id to wait on",
        )

    async def purge(self) -> bool:
        """As primary: let go of tombstones that every replica has passed, if there are any old enough. Raises StorageError."""
        reign = self.reign
        if reign is None or not self.settled:
            return False
        learners = (reign.heard.get(name, 0) for name, _ in self.placement.learners)
        floor = self.replica.purge_point(
            min(reign.progress.reached("all"), *learners, self.replica.position.sequence)
        )
        if floor is None or not await self.mark(Mark.PURGE, encode_floor(floor), reign):
            return False
        log.info("purged", shard=self.shard, floor=floor)
        return True

    async def mark(self, mark: Mark, metadata: bytes = b"", only: Reign | None = None) -> Version | None:
        """As primary: where that mark stands in the log, on our disk; None when we lead no more, or no more in `only`. Raises
        StorageError."""
        async with self._writing:
            reign = self.reign
            if reign is None or (only or reign) is not reign:
                return None
            if not self.election.may_acknowledge(trio.current_time()):
                return None
            batch = Batch(reign.epoch, self.replica.position.sequence, self._stamp_ns())
            place = batch.add_mark(mark, metadata)
            await self._append(batch, 0)
            self._apply(batch.records)
            return place

    async def _submit(self, item: Item) -> Written:
        """Bounded in bytes as well as in items: a few large requests must not take all memory."""
        parts = item.changes if isinstance(item, WriteItem) else item.records
        size = sum(len(part.vector) + len(part.metadata) + HEADER_BYTES for part in parts)
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

    async def _flush(self, items: list[Item]) -> list[Written | Exception]:
        """One group commit: sequences given, one append with one durable write, then applied, then answered."""
        async with self._writing:
            if self.reign is None:
                return [self.not_primary() for _ in items]
            if not self.election.may_acknowledge(trio.current_time()):
                # Handing over, say: what is begun now would be a tail that the successor does not have.
                return [self._no_lease() for _ in items]
            made = batching.make(self.replica, items, self.reign.epoch, self._stamp_ns())
            self.counters["deduplicated"] += made.deduplicated
            if made.batch.blobs:
                try:
                    await self._append(made.batch, made.rows)
                except StorageError as error:
                    self.counters["refused"] += len(items)
                    refused = _refusal(error, was_stopped=self._stopped)
                    self._stopped = self._stopped or isinstance(error, ReplicaStoppedError)
                    if self._stopped and len(self.placement.voters) > 1:
                        # Its pulls would be answered and its lease kept, and nothing be written, for ever.
                        self.act(self, self.election.give_up(str(error), trio.current_time()))
                    # What was answered from the log already needs no disk.
                    applied = self.replica.position
                    return [
                        r if isinstance(r, Exception) or r.at <= applied else refused for r in made.results
                    ]
                try:
                    self._apply(made.batch.records)
                except Exception as error:
                    # Durable all the same: after the restart that follows, recovery applies it.
                    raise unknown(f"shard {self.shard} stopped after the write was on disk") from error
            self.counters["writes"] += len(items)
            return made.results

    def _stamp_ns(self) -> int:
        """Now, and never back: the age of write_ids is counted by these, and a clock that is corrected must not age them all."""
        self._newest_ns = max(self._now_ns(), self._newest_ns, self.replica.newest_ns)
        return self._newest_ns

    async def _append(self, batch: Batch, rows: int) -> None:
        """Raises StorageError; then the log's end is what it was, or, when nobody knows, what it may be. Cancelled: not begun."""
        before, self._end = self._end, Version(batch.records[-1].epoch, batch.sequence)
        try:
            await self._log_runner(self.replica.append, batch.blobs, rows)
        except ReplicaStoppedError:
            raise
        except (StorageError, trio.Cancelled):
            self._end = before
            raise

    def _apply(self, batch: Sequence[Record] | Columns) -> None:
        try:
            self.replica.apply(batch)
        except Exception as error:
            self._broken = error
            self._broke.set()
            raise
        self.counters["batches"] += 1
        self.counters["records"] += len(batch)
        self.applied(self, batch)
        self._note_placement()
        if self.reign is not None:
            self.reign.progress.durable(self.replica.position.sequence, trio.current_time())
        self._tell_moved()
        self._tell()

    def _tell_moved(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    # -- the pull stream ------------------------------------------------------------------------------------------

    async def serve_pull(self, follower: str, pull: Pull) -> Answer:
        """For a follower whose disk has everything to `pull.named`.

        Raises NodeError `diverged` (law `log-matching`), and LogGoneError when our log no longer tells.
        """
        self.act(self, self.election.on_higher_epoch(pull.promised, trio.current_time()))
        reign = self.reign
        if reign is None:
            return NotPrimary(*self.hint)
        if not pull.max_bytes:
            return self._heartbeat(follower, pull, reign)
        starts = EpochStarts(self.replica.epoch_starts.items())
        step = reign.progress.pulled(follower, pull.named, starts)
        if isinstance(step, LookUp):
            found = reign.progress.found(follower, pull.named, self.replica.fingerprint(pull.named.sequence))
            if isinstance(found, Diverged):
                log.error("follower diverged", shard=self.shard, follower=follower, reason=found.reason)
                raise NodeError("diverged", f"the logs of shard {self.shard} have parted: {found.reason}")
        if isinstance(step, Fork):
            return Forked(reign.epoch, trio.current_time(), step)
        if pull.epoch == reign.epoch and self.placement.is_voter(follower, pull.replica):
            reign.progress.count(follower, pull.named.sequence)
            if pull.echo is not None:
                self.election.on_echo(follower, pull.echo)
            self._tell()
        elif pull.epoch == reign.epoch and self._may_take_place(follower, pull):
            self.readmit(self, follower, pull.replica)
            return NotPrimary(*self.hint)
        if self.placement.names_replica(follower, pull.replica):
            reign.heard[follower] = pull.named.sequence
        else:
            # On another disk than the one that is named: what that had says nothing of this one.
            reign.heard.pop(follower, None)
        after = pull.named.sequence
        deadline = trio.current_time() + pull.wait_ms / 1000
        while not self._has_news(follower, after) and not reign.ended:
            moved = self._moved
            with trio.move_on_at(deadline) as scope:
                await moved.wait()
            if scope.cancelled_caught:
                break
        if reign.ended:
            return NotPrimary(*self.hint)
        data = b""
        if self._has_news(follower, after):
            data = self.replica.read_log(after, pull.max_bytes)
        now = trio.current_time()
        lag_ms = reign.progress.lag_ms(after, now)
        if data and after < reign.progress.began:
            # When that was written is not remembered; the record says it.
            lag_ms = max(lag_ms, (self._now_ns() - decode(data).timestamp_ns) // 1_000_000)
        # What the log's thread has just made durable may be in `data` before the loop has applied it.
        return Streamed(reign.epoch, now, self.replica.logged, lag_ms, data, self.note_settled())

    def _may_take_place(self, follower: str, pull: Pull) -> bool:
        """That of a former replica of that node, whose disk was replaced: a learner at once, a voter once it is level."""
        placement = self.placement
        if follower not in placement.holders or placement.names_replica(follower, pull.replica):
            return False
        return follower not in placement.names or self._level(pull)

    def _has_news(self, follower: str, after: int) -> bool:
        """Not, for one that is no holder any more, before the epoch is settled. With the record that takes its vote away it
        could not stand, and would still refuse those who lack that; and without its vote they could not win."""
        return self.replica.position.sequence > after and (follower in self.placement.holders or self.settled)

    def _heartbeat(self, follower: str, pull: Pull, reign: Reign) -> Streamed:
        """For one that fetches a snapshot. This answer binds it to our epoch, so its echo keeps our lease; what it holds it has
        not named, so that does not count."""
        if pull.epoch == reign.epoch and pull.echo is not None:
            if self.placement.is_voter(follower, pull.replica):
                self.election.on_echo(follower, pull.echo)
            self._tell()
        return Streamed(reign.epoch, trio.current_time(), self.replica.logged, 0, b"")

    def serve_beat(self, witness: str, beat: Beat) -> Beaten | NotPrimary:
        """For a witness. Its echo keeps our lease as any voter's; it holds nothing that could count for an acknowledgement."""
        now = trio.current_time()
        self.act(self, self.election.on_higher_epoch(beat.promised, now))
        reign = self.reign
        if reign is None:
            return NotPrimary(*self.hint)
        named = self.placement.witness == (witness, beat.id)
        if beat.epoch == reign.epoch:
            reign.progress.remember(witness, beat.id, beat.remembered)
            if named:
                reign.witness_at = now
                if beat.echo is not None:
                    self.election.on_echo(witness, beat.echo)
            self._tell()
        return Beaten(reign.epoch, now, reign.progress.on_majority or reign.insists, named)

    def is_level(self, name: str) -> bool:
        """As primary: that follower has all that we have, or is as good as there."""
        reign = self.reign
        # Who has not been heard is not level, however short our log is.
        return (
            reign is not None
            and name in reign.heard
            and reign.heard[name] >= self.replica.position.sequence - LEVEL_RECORDS
        )

    def _level(self, pull: Pull) -> bool:
        return pull.named.sequence >= self.replica.position.sequence

    async def follow(self, epoch: int, arrival: Arrival) -> bool:
        """Append records that the primary of `epoch` streamed, and apply them. False: they are not to be taken any more.

        Raises StorageError.
        """
        async with self._writing:
            run = arrival.run
            if not self.election.takes(epoch) or run.first.sequence != self.replica.position.sequence + 1:
                return False
            before, self._end = self._end, run.last
            try:
                await self._log_runner(self.replica.append_run, run, arrival.rows)
            except DiskFullError:
                self._take_back(before)
                raise
            self._apply(arrival.records)
            return True

    async def cut(self, epoch: int, told: Version, named: Version) -> bool:
        """The primary of `epoch` says that our log, which ended at `named`, leaves its own at `told` or before. False: not any
        more. Raises StorageError."""
        async with self.upkeep.jobs, self._writing:
            starts = EpochStarts(self.replica.epoch_starts.items())
            last = self.replica.position
            if not self.election.takes(epoch) or last != named:
                return False
            at = cut_at(told, starts, last.sequence).sequence
            # By force a quorum's records, too, may be cut.
            self.replica.settled = min(self.replica.settled, at)
            kept = await self._log_runner(self.replica.cut, at)
            self._end = self.replica.position
            self.counters["cuts"] += 1
            log.warning("tail cut", shard=self.shard, after=at, records=last.sequence - at, kept_aside=kept)
            self._note_placement()
            self._tell()
            return True

    async def replace(
        self, epoch: int, end: Version, make: Callable[[Replica], Replica], runner: Runner
    ) -> bool:
        """What `make` makes of our replica, in a thread of `runner`, takes its place; its log ends at `end`, and what it holds
        was taken from the primary of `epoch`. False: not any more. The old one is left open: searches may be using it.

        Raises what `make` raises; then all is as it was.
        """
        async with self.upkeep.jobs, self._writing:
            # As in `follow`; and our log's end must not go back: others count on what it was (`log-compared`).
            if not self.election.takes(epoch) or end < self.replica.position:
                return False
            before, self._end = self._end, end
            with trio.CancelScope(shield=True):
                try:
                    self.replica = self.upkeep.replica = await runner(make, self.replica)
                except BaseException:
                    self._take_back(before)
                    raise
            self._end = self.replica.position
            self.applied(self, None)
            self._note_placement()
            self._tell_moved()
            self._tell()
            return True

    def _take_back(self, end: Version) -> None:
        """Our log ends where it did after all; promises that were given to a longer one are void (`log-compared`)."""
        self._end = end
        self._void = max(self._void, self.election.seen)

    async def forget(self, file: SideFile) -> None:
        """Its records are on a quorum."""
        async with self._writing:
            if file in self.replica.side_files():
                await self._log_runner(file.remove)

    async def drop_row(self, kind: Kind, id_: int, version: Version) -> bool:
        """A record that was put aside elsewhere: its row, which our cut tail had left here, goes. Whether there was one."""
        async with self._writing:
            dropped = self.replica.drop_row(kind, id_, version)
        if dropped:
            self.applied(self, None)
        return dropped

    async def mend(self, records: Sequence[Record]) -> int:
        """The content that another replica has under the same versions takes the place of ours, which goes into the quarantine
        when it is intact, too. How many there were. Raises StorageError."""
        mended = 0
        for record in records:
            intact = self.replica.copies(record.kind, [record.id])
            if intact:
                await self.put_aside(intact)
            async with self._writing:
                mended += self.replica.mend(record)
        if mended:
            # Answers may have been made from what it was.
            self.applied(self, None)
        return mended

    async def wait_applied(self, epoch: int, sequence: int, timeout_s: float) -> bool:
        """Whether this replica has applied (epoch, sequence) within `timeout_s`.

        It has when its log holds that place: the epoch is there as far as the sequence. A place that was cut never comes.
        """
        if self.diverged:
            return False  # positions of another history say nothing
        token = Version(epoch, sequence)
        with trio.move_on_after(timeout_s):
            while True:
                position = self.replica.position
                if position.epoch == epoch:
                    if position.sequence >= sequence:
                        return True
                elif position.epoch > epoch:
                    starts = EpochStarts(self.replica.epoch_starts.items())
                    return starts.matches(token, position.sequence)
                await self._moved.wait()
        return False


def unknown(why: str) -> NodeError:
    return NodeError(
        "outcome_unknown", f"{why}; send the same again with the same write_id to learn or settle the outcome"
    )


def _refusal(error: StorageError, *, was_stopped: bool) -> NodeError:
    if isinstance(error, ReplicaStoppedError) and not was_stopped:
        # The failed write itself may be on disk; those after it are refused and are not.
        return unknown(str(error))
    retry = 1_000 if isinstance(error, DiskFullError) else None
    return NodeError(error.code, str(error), retry)
