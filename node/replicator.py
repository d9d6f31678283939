"""The pull stream: one loop per shard that this node follows. The shell of node/replication.py."""

from __future__ import annotations

from random import Random

import structlog
import trio

from node import replication
from node.peerlink import PeerGoneError, PeerLink, PeerTimeoutError, RemoteError
from node.shard import ShardActor
from storage import records
from storage.errors import DamagedError, DiskFullError, LogGoneError, ReplicaStoppedError
from storage.records import EMPTY, HEADER, Record, RecordError

log = structlog.get_logger(__name__)

PULL_BYTES = 1 << 20
CALL_S = 5.0
BACKOFF_S = (0.1, 2.0)


class Replicator:
    """Follows one shard's primary. An actor: `run` never returns unless the logs have diverged."""

    def __init__(self, actor: ShardActor, link: PeerLink, random: Random) -> None:
        self._actor = actor
        self._link = link
        self._random = random
        self._failures = 0
        self.state = "starting"
        self.behind = 0
        # How old our data may have been at `_heard`. Before the primary is heard we only know when we wrote last.
        self._old_ms = int(actor.idle_s() * 1000)
        self._heard = trio.current_time()
        self._named = EMPTY  # our last record as pulls name it; the disk is asked once after a start

    @property
    def age_ms(self) -> int:
        """How old this replica's data may be: its lag when it last heard the primary, and the time since."""
        return self._old_ms + self._silent_ms

    @property
    def lag_ms(self) -> int:
        """How far behind it is: 0 while it is level on a live stream, else its age."""
        return replication.follower_lag_ms(
            following=self.state == "following",
            behind=self.behind,
            old_ms=self._old_ms,
            silent_ms=self._silent_ms,
        )

    @property
    def _silent_ms(self) -> int:
        return int((trio.current_time() - self._heard) * 1000)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        shard = self._actor.shard
        while True:
            try:
                step = await self._pull()
            except (PeerGoneError, PeerTimeoutError):
                self.state = "primary silent"
                await self._back_off()
                continue
            except RemoteError as error:
                self.state = f"refused: {error.code}"
                log.warning("pull refused", shard=shard, code=error.code, reason=error.message)
                await self._back_off()
                continue
            except (DiskFullError, LogGoneError) as error:
                self.state = f"stuck: {error.code}"
                log.warning("cannot follow", shard=shard, code=error.code, reason=str(error))
                await self._back_off()
                continue
            if isinstance(step, replication.Diverged):
                # Only a person can say which copy is right; pulling on would not help and writing would harm.
                self.state = "diverged"
                self._actor.diverged = True
                log.error("diverged", shard=shard, primary=self._link.name, reason=step.reason)
                await trio.sleep_forever()
            if isinstance(step, replication.Refuse):
                self.state = f"refused: {step.reason}"
                log.warning("pull reply dropped", shard=shard, reason=step.reason)
                await self._back_off()
                continue
            self.state = "following"
            self._failures = 0

    async def _back_off(self) -> None:
        low, high = BACKOFF_S
        limit = min(high, low * 2 ** min(self._failures, 10))
        self._failures += 1
        await trio.sleep(limit * (0.5 + self._random.random() / 2))

    async def _pull(self) -> replication.Step:
        actor = self._actor
        last = actor.replica.position
        if self._named.sequence != last.sequence:
            self._named = actor.replica.fingerprint(last.sequence)
        # Until the first answer we do not know whether we are level, so that one must not wait for news.
        wait_ms = replication.WAIT_MS if self.state == "following" else 0
        try:
            epoch, primary_last, lag_ms, data = await self._link.call(
                "pull", [actor.shard, self._named, PULL_BYTES, wait_ms, int(CALL_S * 1000)], CALL_S
            )
        except RemoteError as error:
            if error.code == "diverged":
                return replication.Diverged(error.message)
            raise
        heard = trio.current_time()
        try:
            blobs, batch = _split(data)
        except RecordError as error:
            return replication.Refuse(f"a streamed record is damaged: {error}")
        step = replication.on_pull_reply(
            epoch=actor.epoch,
            last=last,
            reply_epoch=epoch,
            primary_last=primary_last,
            first=batch[0].sequence if batch else None,
            count=len(batch),
        )
        if isinstance(step, replication.Take):
            # Not level from now on, however long our disk takes.
            self.behind = primary_last - last.sequence
            try:
                await actor.follow(blobs, batch)
            except ReplicaStoppedError as error:
                # Never again into the dark: the process stops, loudly, through the supervisor.
                raise DamagedError(f"shard-{actor.shard:03}", None, str(error)) from error
        if isinstance(step, (replication.Take, replication.PullAgain)):
            self.behind = primary_last - actor.replica.position.sequence
            self._old_ms = lag_ms if self.behind else 0
            self._heard = heard
        return step


def _split(data: bytes) -> tuple[list[bytes], list[Record]]:
    """The stream's records as bytes and as values, each verified."""
    blobs: list[bytes] = []
    batch: list[Record] = []
    offset = 0
    while offset < len(data):
        record = records.decode(data, offset)
        (length, *_) = HEADER.unpack_from(data, offset)
        blobs.append(data[offset : offset + length])
        batch.append(record)
        offset += length
    return blobs, batch
