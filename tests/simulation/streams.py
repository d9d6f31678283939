"""The two ends of a simulated stream: a primary that is pulled from, and a follower with what was cut from its log.
After node/shard.py (`serve_pull`), node/replicator.py, node/offering.py, node/snapshots.py and node/fetching.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from node.election import Role
from node.fork import cut_at, fork_of
from node.pulls import Beat, Beaten
from storage.records import Version
from tests.simulation.stores import NOTHING, Rec, SideName, Snapshot

if TYPE_CHECKING:
    from tests.simulation.replicas import Replica

POLL_S = 0.1
CALL_S = 0.3
OFFER_S = 0.3
# A snapshot takes so long to be made and read, at most; who fetches one gives up after FETCH_S.
SNAPSHOT_S = 0.4
FETCH_S = 1.0
BATCH = 50


class Leading:
    """What others ask of a primary."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        # (who, the end of its log): waits for news.
        self.parked: list[tuple[str, Version]] = []

    def pulled(
        self, source: str, id_: int, epoch: int, promised: int, named: Version | None, echo: float
    ) -> None:
        """named: None by one that fetches a snapshot."""
        replica = self.replica
        replica.act(replica.election.on_higher_epoch(promised, replica.host.clock))
        reign, store = replica.reign, replica.store
        if reign is None:
            return
        voter = replica.placement.is_voter(source, id_)
        clock = replica.host.clock
        if named is None:
            if epoch == reign.epoch and voter:
                replica.laws.on_count((source, id_), epoch)
                replica.election.on_echo(source, echo)
            replica.send(source, "beat", reign.epoch, clock)
            return
        fork = fork_of(named, store.starts, store.synced)
        if fork is not None:
            replica.send(source, "fork", reign.epoch, clock, named, fork)
            return
        if named.sequence < store.files.dropped:
            replica.send(source, "gone", reign.epoch, clock)
            return
        if epoch == reign.epoch and voter:
            replica.laws.on_count((source, id_), epoch)
            reign.positions[source] = max(named.sequence, reign.positions.get(source, 0))
            replica.election.on_echo(source, echo)
            replica.settle()
        elif epoch == reign.epoch and self._may_take_place(source, id_, named):
            replica.change(replica.placement.replaced(source, id_))
            return
        if replica.placement.names_replica(source, id_):
            reign.heard[source] = named.sequence
        else:
            reign.heard.pop(source, None)
        if named.sequence < self._streamable:
            self._stream(source, named)
            return
        parked = (source, named)
        self.parked.append(parked)
        replica.later(POLL_S, lambda: self._answer_parked(parked))

    def _may_take_place(self, source: str, id_: int, named: Version) -> bool:
        """That of a former replica, on a disk that was replaced: a learner at once, a voter once it is level."""
        placement = self.replica.placement
        if source not in placement.holders or placement.names_replica(source, id_):
            return False
        return source not in placement.names or named.sequence >= self.replica.store.synced

    @property
    def _streamable(self) -> int:
        store = self.replica.store
        return len(store.log) if "stream-unsynced" in self.replica.bugs else store.synced

    def _answer_parked(self, parked: tuple[str, Version]) -> None:
        if parked in self.parked:
            self.parked.remove(parked)
            self._stream(*parked)

    def unpark(self) -> None:
        waiting, self.parked = self.parked, []
        for source, named in waiting:
            if named.sequence < self._streamable:
                self._stream(source, named)
            else:
                self.parked.append((source, named))

    def _stream(self, target: str, after: Version) -> None:
        replica = self.replica
        if replica.reign is None:
            return
        batch = replica.store.log[after.sequence : min(self._streamable, after.sequence + BATCH)]
        if target not in replica.placement.holders and not replica.settled:
            batch = []  # see `ShardActor._has_news`
        if batch and batch[-1].sequence > len(replica.files.log):
            replica.laws.broken("durable-before-stream", f"{replica.name} sends what is not on its disk")
        settled = replica.note_settled()
        replica.send(target, "stream", replica.reign.epoch, replica.host.clock, after, batch, settled)
        if batch:
            replica.point("streamed")

    def beaten(self, source: str, beat: Beat) -> None:
        """By a witness."""
        replica = self.replica
        replica.act(replica.election.on_higher_epoch(beat.promised, replica.host.clock))
        reign, clock = replica.reign, replica.host.clock
        if reign is None:
            return
        named = replica.placement.witness == (source, beat.id)
        if beat.epoch == reign.epoch:
            reign.progress.remember(source, beat.id, beat.remembered)
            if named:
                reign.witness_at = replica.sim.now
                replica.laws.on_count((source, beat.id), beat.epoch)
                if beat.echo is not None:
                    replica.election.on_echo(source, beat.echo)
                    reign.echoed(replica.store.synced)
            replica.settle()
        remember = reign.progress.on_majority or reign.insists
        replica.send(source, "echoed", Beaten(reign.epoch, clock, remember, named))

    def fetched(self, source: str, wanted: Version) -> None:
        replica = self.replica
        if replica.reign is not None and replica.store.position >= wanted:
            epoch, snapshot = replica.reign.epoch, replica.store.snapshot()
            replica.later(
                replica.sim.random.uniform(0.05, SNAPSHOT_S),
                lambda: replica.send(source, "snapshot", epoch, snapshot),
            )

    def offered(self, source: str, name: SideName, tail: list[Rec]) -> None:
        """A tail that was cut: each record gets a new place, unless it is here."""
        replica, store, laws = self.replica, self.replica.store, self.replica.laws
        if replica.reign is None or replica.host.full or not replica.may_acknowledge():
            return
        aside = []
        for rec in tail:
            row = store.table.get(rec.key)
            stayed = row is not None and row.version >= rec.version
            if store.holds(rec) or ("stayed-row-is-proof" in replica.bugs and stayed):
                laws.on_held(rec, store, replica.name)
                continue
            if row is None and rec.version <= store.floor and "tombstone-purged-early" not in replica.bugs:
                laws.aside.add(rec.write_id)
                aside.append(rec)
                continue
            deleted = laws.deleted.get(rec.key, NOTHING)
            # By force a primary may lack a delete, which then comes with the same tail, or is lost with its disks.
            known = not laws.forced or any(one.version == deleted for one in store.log)
            if row is None and rec.op == "put" and rec.version < deleted and known:
                laws.broken("deletes-stay", f"{replica.name} brings back {rec.key} {tuple(rec.version)}")
            replica.append(rec._replace(epoch=replica.reign.epoch, sequence=len(store.log) + 1))
        replica.point("reoffered")
        ack = "primary" if "side-file-deleted-early" in replica.bugs else "quorum"
        replica.wait(len(store.log), ack, lambda: replica.send(source, "offered", name, aside))


class Follower:
    """Pulls from whoever leads; offers what was cut."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self._echo: tuple[int, float] = (0, -math.inf)
        self._pulled_at = -1e9
        self._fetching_until = -1e9
        self._offering: set[SideName] = set()

    def tick(self) -> None:
        replica = self.replica
        if replica.leads:
            self._offer(replica.name)
        elif replica.hint[0] and replica.sim.now - self._pulled_at > POLL_S + CALL_S:
            self.pull()

    def pull(self) -> None:
        replica, election = self.replica, self.replica.election
        primary = replica.hint[1]
        if not primary or primary == replica.name or election.role is Role.PRIMARY or replica.flushing:
            return
        self._pulled_at = replica.sim.now
        echo = self._echo[1] if self._echo[0] == election.epoch else -math.inf
        fetching = replica.sim.now < self._fetching_until
        named = None if fetching else replica.store.last
        promised = max(election.promised, replica.store.last.epoch)
        replica.laws.on_pull(replica.who)
        replica.send(primary, "pull", replica.id, election.epoch, promised, named, echo)

    def _heard(self, source: str, epoch: int, stamp: float) -> bool:
        replica = self.replica
        if not replica.election.takes(epoch):
            return False
        replica.act(replica.election.on_stream(source, epoch, replica.host.clock))
        self._echo = (epoch, stamp)
        if epoch > replica.hint[0]:
            replica.hint = (epoch, source)
        return True

    def _check_bound(self, epoch: int) -> None:
        replica = self.replica
        known = replica.host.disk.promised
        promised = known[1] if known is not None and known[0] == replica.id else 0
        if epoch < max(promised, replica.store.last.epoch):
            replica.laws.broken("promise-binds", f"{replica.name} takes {epoch}, bound to {promised}")

    def on_stream(
        self, source: str, epoch: int, stamp: float, after: Version, batch: list[Rec], settled: int
    ) -> None:
        replica = self.replica
        if not self._heard(source, epoch, stamp):
            return
        if after != replica.store.last or replica.flushing:
            return  # an answer to an older question
        replica.shared = max(replica.shared, min(settled, after.sequence))
        if not batch or replica.host.full:
            replica.later(0.2 if replica.host.full else 0.0, self.pull)
            self._offer(source)
            return
        self._check_bound(epoch)
        for rec in batch:
            replica.store.append(rec)
        replica.flush()
        self._offer(source)

    def on_fork(self, source: str, epoch: int, stamp: float, last: Version, told: Version) -> None:
        replica, store = self.replica, self.replica.store
        if not self._heard(source, epoch, stamp) or last != store.last or replica.flushing:
            return
        self._check_bound(epoch)
        at = cut_at(told, store.starts, len(store.log)).sequence
        replica.shared = min(replica.shared, at)
        if not store.cut(at, keep="tail-cut-without-reoffer" not in replica.bugs):
            self._fetch(source)
            return
        replica.configure()
        replica.point("cut")
        self.pull()

    def on_gone(self, source: str, epoch: int, stamp: float) -> None:
        if self._heard(source, epoch, stamp):
            self._fetch(source)

    def _fetch(self, source: str) -> None:
        replica = self.replica
        if replica.sim.now >= self._fetching_until:
            self._fetching_until = replica.sim.now + FETCH_S
            replica.send(source, "fetch", replica.store.last)
            self.pull()

    def on_beat(self, source: str, epoch: int, stamp: float) -> None:
        if self._heard(source, epoch, stamp):
            self.replica.later(POLL_S, self.pull)

    def on_snapshot(self, source: str, epoch: int, snapshot: Snapshot) -> None:
        replica, store = self.replica, self.replica.store
        self._fetching_until = -1e9
        if replica.flushing or replica.host.full or not replica.election.takes(epoch):
            return
        if snapshot.position >= store.last:
            self._check_bound(epoch)
            store.install(snapshot)
            for at, _ in store.placements:
                replica.laws.on_disk(replica.who, store.log[at - 1].epoch)
            replica.configure()
            replica.point("installed")
            self.pull()

    # -- tails ------------------------------------------------------------------------------------------------------

    def _offer(self, primary: str) -> None:
        replica = self.replica
        for name, tail in replica.files.sides.items():
            if name not in self._offering:
                self._offering.add(name)
                replica.send(primary, "offer", name, tail)
                replica.later(OFFER_S, lambda name=name: self._offering.discard(name))  # type: ignore[misc]

    def on_offered(self, source: str, name: SideName, aside: list[Rec]) -> None:
        """All is on a quorum. What was put aside may have been deleted long ago, so its row here must go as well."""
        store = self.replica.store
        for rec in aside:
            store.drop_row(rec.key, rec.version)
        store.checkpoint()
        store.forget_side(name)
        self.replica.point("side-file-gone")
