"""Compares the replicas of the shards that this node leads, and repairs what differs: the shell of node/repair.py. An actor."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import structlog
import trio

from node import repairwire
from node.blocking import Runner
from node.commit import OverloadedError
from node.config import RepairConfig
from node.links import Links
from node.mending import CHUNK, LISTING_MAX, Drop, changed
from node.peerlink import PeerError, RemoteError
from node.repair import Steps, decide
from node.shard import ShardActor
from node.transfer import Throttle
from router.ports import NodeError
from storage.buckets import Digests, Seen, differing, encoded
from storage.errors import DamagedError, StorageError
from storage.records import ID_MAX, Kind, Mark, Record, Version, split
from storage.tombstones import encode_floor

log = structlog.get_logger(__name__)

LOOK_S = 1.0
# A follower that has not applied the mark by then is left out of this comparison.
APPLY_S = 5.0
CALL_S = 10.0
# For one shard in the background; what is left over is found again the next time.
BACKGROUND_S = 60.0
# Bounds of one round: buckets of one kind that are looked through, ids that are decided about.
BUCKETS_MAX = 16
IDS_MAX = 2_000
ROUNDS_MAX = 5


@dataclass(slots=True)
class Report:
    """Of one comparison and what followed. replicas: node → equal, differs, repaired, behind, silent, tails or failed."""

    shard: int
    primary: str
    epoch: int = 0
    sequence: int = 0
    replicas: dict[str, str] = field(default_factory=dict)
    buckets: int = 0
    rounds: int = 0
    written: int = 0
    taken: int = 0
    mended: int = 0
    dropped: int = 0
    set_aside: int = 0
    lost: int = 0
    problem: str = ""

    @property
    def equal(self) -> bool:
        return not self.problem and all(state in ("equal", "repaired") for state in self.replicas.values())

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        apart = [
            f"{name} {state}" for name, state in self.replicas.items() if state not in ("equal", "repaired")
        ]
        return ", ".join(apart) if apart else f"equal at {self.sequence}"


@dataclass(frozen=True, slots=True)
class _Compared:
    place: Version
    # Of those that could be compared and differ from us, by kind.
    apart: dict[str, dict[Kind, list[int]]]


class Repairer:
    """One shard at a time. `reports`: the last of each shard that this node has compared."""

    def __init__(
        self,
        name: str,
        shards: Mapping[int, ShardActor],
        links: Links,
        config: RepairConfig,
        runner: Runner,
    ) -> None:
        self._name, self._shards, self._links, self._config = name, shards, links, config
        self._runner = runner
        self._throttle = Throttle(config.records_per_s)
        self._lock = trio.Lock()
        self.reports: dict[int, Report] = {}
        self._due: dict[int, float] = {}
        self.counters = {
            "compared": 0, "equal": 0, "differed": 0, "not_compared": 0, "written": 0, "taken": 0, "mended": 0,
            "dropped": 0, "set_aside": 0, "lost": 0,
        }  # fmt: skip

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        task_status.started()
        while True:
            for actor in list(self._shards.values()):
                if self._is_due(actor):
                    self._due[actor.shard] = trio.current_time() + self._config.every_s
                    await self.repair(actor, BACKGROUND_S)
            await trio.sleep(LOOK_S)

    def _is_due(self, actor: ShardActor) -> bool:
        if not self._config.every_s or not actor.settled:
            return False
        # Not all shards of a node at once.
        first = trio.current_time() + self._config.every_s * random.random()
        due = self._due.setdefault(actor.shard, first)
        last = self.reports.get(actor.shard)
        position = actor.replica.position
        unchanged = last is not None and last.equal and (last.epoch, last.sequence) == position
        return trio.current_time() >= due and not unchanged

    # -- as primary -------------------------------------------------------------------------------------------------

    async def on_repair(self, _peer: str, body: Any) -> dict[str, Any]:
        """The peer op `repair`. Raises NodeError when we do not lead the shard."""
        shard, left_ms = body
        actor = self._shards.get(shard)
        if actor is None:
            raise NodeError("no_primary", f"shard {shard} has no replica on {self._name}")
        if not actor.leads:
            raise actor.not_primary()
        report = await self.repair(actor, left_ms / 1000)
        return asdict(report) | {"equal": report.equal}

    async def repair(self, actor: ShardActor, timeout_s: float) -> Report:
        """Compares, repairs and compares again, until all are equal, nothing helps, or the time is over."""
        deadline = trio.current_time() + timeout_s
        report = Report(actor.shard, self._name)
        try:
            with trio.move_on_at(deadline) as scope:
                async with self._lock:
                    await self._rounds(actor, report)
            if scope.cancelled_caught:
                report.problem = "out of time; what was repaired stays, ask again"
        except DamagedError as error:
            actor.harm(error)
            report.problem = f"failed: {error}"
        except (PeerError, NodeError, StorageError, OverloadedError) as error:
            report.problem = f"failed: {error}"
        except (KeyError, TypeError, ValueError) as error:
            # What a peer answered, or a mistake of ours: the log tells which.
            log.exception("repair failed", shard=actor.shard)
            report.problem = f"failed: {error!r}"
        self._note(report)
        return report

    def _note(self, report: Report) -> None:
        self.reports[report.shard] = report
        self.counters["compared"] += 1
        self.counters["equal"] += report.equal
        self.counters["differed"] += report.rounds > 0
        missing = [
            name
            for name, state in report.replicas.items()
            if state in ("behind", "silent", "tails", "failed")
        ]
        self.counters["not_compared"] += len(missing) + bool(report.problem)
        for name in ("written", "taken", "mended", "dropped", "set_aside", "lost"):
            self.counters[name] += getattr(report, name)
        if report.rounds or not report.equal:
            log.warning("compared", **asdict(report))
        else:
            log.info("compared", shard=report.shard, sequence=report.sequence, replicas=report.replicas)

    async def _rounds(self, actor: ShardActor, report: Report) -> None:
        while True:
            compared = await self._compare(actor, report)
            if compared is None or not compared.apart or report.rounds == ROUNDS_MAX:
                return
            report.rounds += 1
            names = [
                name for name, state in report.replicas.items() if state in ("equal", "repaired", "differs")
            ]
            before = _work(report)
            for kind in (Kind.ITEM, Kind.USER):
                buckets = sorted({n for apart in compared.apart.values() for n in apart.get(kind, ())})
                if buckets:
                    await self._repair_buckets(
                        actor, report, compared.place, names, kind, buckets[:BUCKETS_MAX]
                    )
            if _work(report) == before:
                return

    async def _compare(self, actor: ShardActor, report: Report) -> _Compared | None:
        """None: we do not lead, or not surely."""
        place = await actor.mark(Mark.DIGEST)
        if place is None:
            report.problem = "the primary has no lease"
            return None
        mine = actor.replica.digested.at(place)
        assert mine is not None
        report.epoch, report.sequence = place
        if actor.replica.side_files():
            report.problem = "a cut tail waits to be offered again"
            return None
        apart: dict[str, dict[Kind, list[int]]] = {}

        async def ask(name: str) -> None:
            state, theirs = await self._digests_of(actor, name, place)
            if theirs is not None:
                found = differing(mine, theirs)
                state = (
                    "differs" if found else ("repaired" if report.replicas.get(name) == "differs" else state)
                )
                if found:
                    apart[name] = found
                    report.buckets = max(report.buckets, sum(map(len, found.values())))
            report.replicas[name] = state

        async with trio.open_nursery() as nursery:
            for name in actor.placement.holders:
                if name != self._name:
                    nursery.start_soon(ask, name)
        return _Compared(place, apart)

    async def _digests_of(self, actor: ShardActor, name: str, place: Version) -> tuple[str, Digests | None]:
        reign = actor.reign
        try:
            if not self._links[name].connected:
                return "silent", None
        except KeyError:
            return "silent", None
        with trio.move_on_after(APPLY_S):
            while reign is not None and not reign.ended and reign.heard.get(name, -1) < place.sequence:
                await actor.changed()
        try:
            body = await self._call(name, "digests", [actor.shard, place])
            if body is None:
                return "behind", None
            digests, side_files = repairwire.read_digests(body)
        except RemoteError as error:
            log.warning("not compared", shard=actor.shard, node=name, reason=error.message)
            return "failed", None
        except (PeerError, KeyError, TypeError, ValueError):
            return "silent", None
        return ("tails", None) if side_files else ("equal", digests)

    async def _repair_buckets(
        self,
        actor: ShardActor,
        report: Report,
        place: Version,
        names: Sequence[str],
        kind: Kind,
        buckets: Sequence[int],
    ) -> None:
        after, left = -1, IDS_MAX
        while after < ID_MAX and left > 0:
            views: dict[str, dict[int, Seen]] = {}
            end = ID_MAX
            # Ours last: what a follower has is in our log by then.
            for name in (*names, self._name):
                views[name], until = await self._listing_of(actor, name, kind, buckets, after)
                end = min(end, until)
            cut = {
                name: {id_: one for id_, one in view.items() if id_ <= end} for name, view in views.items()
            }
            steps = decide(cut, self._name, actor.replica.purge_floor, place, left)
            left -= await self._carry_out(actor, report, kind, steps, cut)
            after = end

    async def _listing_of(
        self, actor: ShardActor, name: str, kind: Kind, buckets: Sequence[int], after: int
    ) -> tuple[dict[int, Seen], int]:
        if name == self._name:
            return await self._runner(actor.replica.listing, kind, frozenset(buckets), after, LISTING_MAX)
        data, end = await self._call(name, "listing", [actor.shard, int(kind), list(buckets), after])
        return repairwire.read_listing(data), int(end)

    async def _carry_out(
        self,
        actor: ShardActor,
        report: Report,
        kind: Kind,
        steps: Steps,
        views: Mapping[str, Mapping[int, Seen]],
    ) -> int:
        """How many ids were dealt with."""
        done = len(steps.lost)
        report.lost += len(steps.lost)
        for ids in _chunks(steps.write):
            records = await self._copies_of(actor, self._name, kind, ids)
            await actor.again(records, CALL_S)
            report.written += len(records)
            done += len(ids)
        for source, wanted in steps.take.items():
            for ids in _chunks(wanted):
                await self._take(actor, report, views, await self._copies_of(actor, source, kind, ids))
                done += len(ids)
        for (name, source), wanted in steps.mend.items():
            for ids in _chunks(wanted):
                records = await self._copies_of(actor, source, kind, ids)
                report.mended += await self._change(actor, name, records, [])
                done += len(ids)
        for ids in _chunks(steps.aside):
            records = await self._copies_of(actor, self._name, kind, ids)
            await actor.put_aside(records)
            report.set_aside += len(records)
            await self._drop(actor, report, views, records)
            done += len(ids)
        for name, wanted in steps.drop.items():
            for ids in _chunks(wanted):
                drops = [(kind, id_, views[name][id_].version) for id_ in ids]
                report.dropped += await self._change(actor, name, [], drops)
                done += len(ids)
        if steps.purge:
            await actor.mark(Mark.PURGE, encode_floor(actor.replica.purge_floor))
            report.dropped += 1
        return done

    async def _take(
        self,
        actor: ShardActor,
        report: Report,
        views: Mapping[str, Mapping[int, Seen]],
        records: Sequence[Record],
    ) -> None:
        """What we lack gets its place in our log, unless its id may have been deleted."""
        aside = await actor.offer(records, CALL_S)
        report.taken += len(records) - len(aside)
        report.set_aside += len(aside)
        await self._drop(actor, report, views, aside)

    async def _drop(
        self,
        actor: ShardActor,
        report: Report,
        views: Mapping[str, Mapping[int, Seen]],
        records: Sequence[Record],
    ) -> None:
        """Those versions of records that were put aside, wherever they are."""
        drops = [(one.kind, one.id, one.version) for one in records]
        for name in views if drops else ():
            report.dropped += await self._change(actor, name, [], drops)

    async def _copies_of(self, actor: ShardActor, name: str, kind: Kind, ids: Sequence[int]) -> list[Record]:
        await self._throttle.take(len(ids))
        if name == self._name:
            return await self._runner(actor.replica.copies, kind, ids)
        data = await self._call(name, "copies", [actor.shard, int(kind), list(ids)])
        return [record for _, record in split(data)]

    async def _change(
        self, actor: ShardActor, name: str, records: Sequence[Record], drops: Sequence[Drop]
    ) -> int:
        """Contents put right and rows dropped on that replica; how many."""
        if name == self._name:
            return await changed(actor, records, drops)
        reign = actor.reign
        if reign is None:
            raise actor.not_primary()
        body = [actor.shard, reign.epoch, encoded(records), [[int(kind), *rest] for kind, *rest in drops]]
        return int(await self._call(name, "mend", body))

    async def _call(self, name: str, op: str, body: list[Any]) -> Any:
        return await self._links[name].call(op, body, CALL_S)


def _work(report: Report) -> int:
    return report.written + report.taken + report.mended + report.dropped + report.set_aside


def _chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for at in range(0, len(ids), CHUNK):
        yield ids[at : at + CHUNK]
