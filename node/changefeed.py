"""Tells peers of changes each 200 ms, hears theirs, and hands both to the caches (docs/caching.md). The shell over
`node/telling.py` and `node/hearing.py`; to the caches it is `router.ports.Trust`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import trio

from node.hearing import Hearing
from node.links import Links
from node.peerlink import PeerError, RemoteError
from node.shard import ShardActor
from node.telling import Change, Telling, Told
from router.cachevalues import TICK_MS, Origin
from router.changes import Changes
from storage.bulk import Columns
from storage.records import Kind, Operation, Record

TICK_S = TICK_MS / 1000
# A message that is not answered by then is sent again, to be heard soon after a link is back.
ANSWER_S = 1.0


LOOK_AGAIN_S = 0.02


class Forgetful(Protocol):
    """`router.caching.Caches`."""

    def user_changed(self, user_id: int, version: tuple[int, int]) -> None: ...
    def item_deleted(self, media_id: int) -> None: ...
    def drop_all(self) -> None: ...


class ChangeFeed:
    """An actor. `caches` is set before it runs."""

    def __init__(
        self, name: str, boot: int, links: Links, shards: Mapping[int, ShardActor], shard_count: int
    ) -> None:
        now = trio.current_time()
        self._name, self._boot = name, boot
        self._links, self._shards = links, shards
        self._telling = Telling(boot, now)
        self._hearing = Hearing(name, shard_count)
        self.changes = Changes(now)
        self.caches: Forgetful | None = None
        self._looked_at = now

    # -- what replicas apply --------------------------------------------------------------------------------------

    def applied(self, actor: ShardActor, records: Sequence[Record] | Columns | None) -> None:
        """As `ShardActor.applied`."""
        now = trio.current_time()
        if records is None:
            self._telling.replaced(actor.shard, now)
            self._drop()
            return
        if isinstance(records, Columns):
            changes = changes_of(records)
        else:
            changes = [change for record in records if (change := change_of(record)) is not None]
        if changes:
            self._telling.applied(actor.shard, changes, actor.leads, now)
            for change in changes:
                self._note(change.id, change.version)

    def _drop(self) -> None:
        self._hearing.dropped()
        if self.caches is not None:
            self.caches.drop_all()

    def _note(self, id_: int, version: tuple[int, int] | None) -> None:
        if self.caches is None:
            return
        if version is None:
            self.caches.item_deleted(id_)
        else:
            self.caches.user_changed(id_, version)

    # -- telling --------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._round(nursery)
                await trio.sleep(TICK_S)
        raise AssertionError("unreachable")

    def _round(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        leading = self._leading(now)
        self._telling.begin_round(leading, now)
        self._hear_self(leading, now)
        self.changes.expire(now)
        for peer in self._links:
            if self._links.connected(peer):
                told = self._telling.compose(peer, leading, now)
                if told is not None:
                    nursery.start_soon(self._tell, peer, told)

    def _hear_self(self, leading: Mapping[int, int], now: float) -> None:
        led = self._telling.led(leading, now)
        if self._hearing.hear_self(self._boot, led, self._telling.tick, now):
            self._drop()

    def _leading(self, now: float) -> dict[int, int]:
        """shard → epoch, of those that this node leads and whose lease holds: nobody else acknowledges their writes."""
        return {
            shard: actor.reign.epoch
            for shard, actor in self._shards.items()
            if actor.reign is not None and actor.election.may_acknowledge(now)
        }

    async def _tell(self, peer: str, told: Told) -> None:
        answered = False
        try:
            await self._links[peer].call("changes", told, ANSWER_S)
            answered = True
        except PeerError:
            pass  # it is told again, with what has come since
        finally:
            self._telling.answered(peer, answered)

    # -- hearing --------------------------------------------------------------------------------------------------

    def handle_peer(self, peer: str, body: Any) -> bool:
        """A peer's message. Raises RemoteError for what is none."""
        try:
            told = Told.read(body)
        except (TypeError, ValueError) as error:
            raise RemoteError("bad_request", f"the message could not be read: {error}") from error
        if self._hearing.hear(peer, told, trio.current_time()):
            self._drop()
        for user_id, epoch, sequence in told.users:
            self._note(user_id, (epoch, sequence))
        for media_id in told.items:
            self._note(media_id, None)
        return True

    # -- router.ports.Trust ---------------------------------------------------------------------------------------

    def current(self, now: float) -> bool:
        if self._hearing.current(now):
            return True
        if now >= self._looked_at + LOOK_AGAIN_S:
            # A round may be late because this process was held up. What we lead ourselves we need not be told.
            self._looked_at = now
            self._hear_self(self._leading(now), now)
        return self._hearing.current(now)

    def trusts(self, origin: Origin) -> bool:
        return self._hearing.trusts(origin, self.changes.complete_since)

    def origin(self, age_ms: int) -> Origin:
        return Origin(self._name, self._boot, self._telling.tick).older(age_ms)

    def statistics(self) -> dict[str, Any]:
        now = trio.current_time()
        return {**self._telling.counters, **self._hearing.figures(now), "current": self.current(now)}


def changes_of(columns: Columns) -> list[Change]:
    """`change_of` of each."""
    head = columns.headers
    deletes = head["operation"] == Operation.DELETE
    users = (head["kind"] == Kind.USER) & (deletes | (head["operation"] == Operation.PUT))
    head = head[users | ((head["kind"] == Kind.ITEM) & deletes)]
    names = ("id", "kind", "version_epoch", "version_sequence")
    rows = zip(*(head[name].tolist() for name in names), strict=True)
    return [
        Change(id_, (epoch, sequence) if kind == Kind.USER else None) for id_, kind, epoch, sequence in rows
    ]


def change_of(record: Record) -> Change | None:
    """What it changes for a cache."""
    if record.kind == Kind.USER and record.operation in (Operation.PUT, Operation.DELETE):
        return Change(record.id, (record.version.epoch, record.version.sequence))
    if record.kind == Kind.ITEM and record.operation == Operation.DELETE:
        return Change(record.id, None)
    return None
