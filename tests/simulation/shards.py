"""One shard's replicas in virtual time: the real machines of election and forks around a model of log, table and disk.

A host loses what it had not fsynced when it crashes, and everything when its disk is replaced. `bugs` plants one of the mistakes
of docs/testing.md; the checker (tests/simulation/history.py) has to notice each.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from node.election import Election, ElectionConfig, Lead, Message, Persist, Role, StepDown, Tell
from node.fork import EpochStarts, cut_at, fork_of
from storage.records import Version

# A third of the real times, so that a minute sees more elections.
CONFIG = ElectionConfig(lease_s=0.5, rank_s=0.04, retry_min_s=0.02, retry_max_s=0.1, candidacy_s=0.2)
POLL_S = 0.1
CALL_S = 0.3
OFFER_S = 0.3
ANNOUNCE_S = 0.1
CHECKPOINT_S = 1.0

NOTHING = Version(0, 0)

BUGS = (
    "ack-before-fsync",
    "stream-unsynced",
    "promise-not-persisted",
    "no-start-wait",
    "log-not-compared",
    "lower-epoch-accepted",
    "write-on-after-restart",
    "tail-cut-without-reoffer",
    "side-file-deleted-early",
    "tombstone-purged-early",
    "amnesiac-votes",
    "lease-not-checked",
)


class Rec(NamedTuple):
    """A record as far as replication cares. op: put, delete, epoch (value: who is admitted again), purge (value: the floor)."""

    epoch: int
    sequence: int
    version: Version
    op: str
    key: str = ""
    value: Any = None
    write_id: int = 0


class Row(NamedTuple):
    version: Version
    value: Any  # None: a tombstone


@dataclass(slots=True)
class Disk:
    """What survives a crash."""

    token: int
    rebuilding: bool = False
    promised: int = 0
    log: list[Rec] = field(default_factory=list)
    sides: dict[int, list[Rec]] = field(default_factory=dict)
    quarantine: list[Rec] = field(default_factory=list)
    table: dict[str, Row] = field(default_factory=dict)
    floor: Version = NOTHING
    # The log up to here is in `table`.
    checkpoint: int = 0


@dataclass(slots=True, eq=False)
class Wait:
    """Somebody who waits for a position to be acknowledged."""

    sequence: int
    ack: str
    done: Callable[[bool], None]
    version: Version


class Network:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.loss = 0.0
        self.slow = 1.0
        self.cut: Callable[[str, str], bool] | None = None

    def delay(self) -> float | None:
        if self.random.random() < self.loss:
            return None
        rare = 20.0 if self.random.random() < 0.02 else 1.0
        return self.random.uniform(0.001, 0.004) * rare * self.slow


class Sim:
    """Clock, events, hosts."""

    def __init__(self, seed: int, count: int = 3, bugs: frozenset[str] = frozenset()) -> None:
        self.random = Random(seed)
        self.seed, self.bugs, self.now = seed, bugs, 0.0
        self.network = Network(self.random)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.names = tuple(f"n{i}" for i in range(count))
        # epoch → who opened it; two are a violation, noted at once.
        self.opened: dict[int, str] = {}
        self.violations: list[str] = []
        self.newest_acknowledged = 0
        # key → the greatest version of a delete that a quorum has acknowledged.
        self.deleted: dict[str, Version] = {}
        # (write_id, version) of what was offered again when something newer had long taken its place.
        self.superseded: set[tuple[int, Version]] = set()
        self.points: dict[str, int] = {}
        # Told of moments at which trouble hurts most: something has just been promised to somebody.
        self.danger: Callable[[Host, str], None] = lambda host, point: None
        self.hosts = {name: Host(self, name) for name in self.names}

    def at(self, when: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(when, self.now), self._count, do))

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, do = heapq.heappop(self._heap)
            do()
        self.now = until

    def acknowledged(self, epoch: int, by: str) -> None:
        """`lease`: once a later primary has acknowledged anything, no earlier one does."""
        if epoch < self.newest_acknowledged:
            self.violations.append(
                f"lease: {by} acknowledges in {epoch}, {self.newest_acknowledged} has done so before"
            )
        self.newest_acknowledged = max(epoch, self.newest_acknowledged)

    def send(self, source: str, target: str, what: str, *args: Any) -> None:
        if what == "stream" and args[3] and args[3][-1].sequence > len(self.hosts[source].disk.log):
            self.violations.append(f"durable-before-stream: {source} sends what is not on its disk")
        if source != target and self.network.cut is not None and self.network.cut(source, target):
            return
        delay = self.network.delay()
        if delay is not None:
            host = self.hosts[target]
            self.at(self.now + delay, lambda: host.receive(what, source, *args))


class Host:
    """One replica: a process that comes and goes, and its disk."""

    def __init__(self, sim: Sim, name: str) -> None:
        self.sim, self.name = sim, name
        self.disk = Disk(token=sim.random.getrandbits(40))
        self.running = False
        self.full = False
        self.fsync_slow = 1.0
        self.paused_until = 0.0
        self.life = 0
        self._held: list[Callable[[], None]] = []
        self.clock_rate, self.clock_offset = 1.0, sim.random.uniform(0, 1e6)
        self.start()

    # -- process ----------------------------------------------------------------------------------------------------

    @property
    def clock(self) -> float:
        return self.sim.now * self.clock_rate + self.clock_offset

    def start(self) -> None:
        sim, disk = self.sim, self.disk
        self.life += 1
        self.running, self.paused_until = True, 0.0
        self._held.clear()
        self.log = list(disk.log)
        self.synced = len(self.log)
        self.starts = EpochStarts()
        for rec in self.log:
            self.starts.begin(rec.epoch, rec.sequence)
        self.table, self.floor = dict(disk.table), disk.floor
        self.written: dict[int, Version] = {rec.write_id: rec.version for rec in self.log if rec.write_id}
        for rec in self.log[disk.checkpoint :]:
            self._apply(rec)
        self.positions: dict[str, int] = {}
        self.waits: list[Wait] = []
        self.parked: list[tuple[str, Version, int]] = []
        self.opened = 0
        self.flushing = False
        self.offering: set[int] = set()
        self.opened_in_this_life: set[int] = set()
        self.pulled_at = -1e9
        self.announced: tuple[int, str] = (0, "")
        self.election = Election(
            CONFIG,
            self.name,
            voters=sim.names,
            promised=disk.promised,
            last=lambda: self.last,
            random=Random(sim.random.getrandbits(32)),
            now=self.clock,
        )
        if "no-start-wait" in sim.bugs:
            self.election._bound_until = self.election._stand_at = self.clock
        if (
            "write-on-after-restart" in sim.bugs
            and self.log
            and sim.opened.get(self.log[-1].epoch) == self.name
        ):
            self.election.role, self.election.epoch = Role.PRIMARY, self.log[-1].epoch
            self.opened = self.log[-1].epoch
        self._later(0.01, self._tick)
        self._later(ANNOUNCE_S * sim.random.random(), self._announce)
        self._later(CHECKPOINT_S * sim.random.random(), self._checkpoint)

    def crash(self) -> None:
        """What was written but not fsynced is there up to some record, or not at all."""
        kept = self.sim.random.randint(self.synced, len(self.log))
        self.disk.log = self.log[:kept]
        self.running = False
        self.life += 1
        for wait in self.waits:
            wait.done(False)
        self.waits = []

    def lose_disk(self) -> None:
        """A new, empty disk: the replica must not vote before a primary has admitted it again."""
        self.crash()
        self.disk = Disk(
            token=self.sim.random.getrandbits(40), rebuilding="amnesiac-votes" not in self.sim.bugs
        )

    def pause(self, seconds: float) -> None:
        self.paused_until = self.sim.now + seconds
        self.sim.at(self.paused_until, self._resume)

    def _resume(self) -> None:
        if self.sim.now >= self.paused_until:
            held, self._held = self._held, []
            for do in held:
                do()

    def _later(self, delay: float, do: Callable[[], None]) -> None:
        """In this life of the process only, and not while it is paused."""
        life = self.life

        def go() -> None:
            if not self.running or self.life != life:
                return
            if self.sim.now < self.paused_until:
                self._held.append(go)
                return
            do()

        self.sim.at(self.sim.now + delay, go)

    def receive(self, what: str, source: str, *args: Any) -> None:
        self._later(0.0, lambda: getattr(self, f"on_{what}")(source, *args))

    def send(self, target: str, what: str, *args: Any) -> None:
        self.sim.send(self.name, target, what, *args)

    # -- election ---------------------------------------------------------------------------------------------------

    @property
    def last(self) -> Version:
        return Version(self.log[-1].epoch, len(self.log)) if self.log else Version(0, 0)

    @property
    def leads(self) -> bool:
        return self.election.role is Role.PRIMARY and self.opened == self.election.epoch

    def _tick(self) -> None:
        if not self.disk.rebuilding:
            self._do(self.election.on_timer(self.clock))
        elected = self.election
        if (
            elected.role is not Role.PRIMARY
            and self.announced[0]
            and self.sim.now - self.pulled_at > POLL_S + CALL_S
        ):
            self._pull()
        if self.leads:
            self._offer_sides(self.name)
        self._later(0.02, self._tick)

    def on_election(self, source: str, message: Message) -> None:
        if self.disk.rebuilding:
            return
        if "log-not-compared" in self.sim.bugs and hasattr(message, "last"):
            message = message._replace(last=Version(1 << 40, 0))
        self._do(self.election.on_message(source, message, self.clock))

    def _do(self, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Persist):
                self._persist(effect.epoch)
            elif isinstance(effect, Tell):
                self.send(effect.to, "election", effect.message)
            elif isinstance(effect, Lead):
                self._open(effect.epoch)
            elif isinstance(effect, StepDown):
                self._stop_leading()

    def _persist(self, epoch: int) -> None:
        def done() -> None:
            if "promise-not-persisted" not in self.sim.bugs:
                self.disk.promised = max(self.disk.promised, epoch)
            self._do(self.election.on_persisted(epoch, self.clock))
            self.point("promised")

        self._later(self._fsync_s(), done)

    def _open(self, epoch: int) -> None:
        before = self.sim.opened.setdefault(epoch, self.name)
        if before != self.name:
            self.sim.violations.append(f"one-primary: epoch {epoch} opened by {before} and {self.name}")
        self.positions = {}
        self.opened_in_this_life.add(epoch)
        self._append(
            Rec(epoch, len(self.log) + 1, Version(epoch, len(self.log) + 1), "epoch", value=self._admit)
        )

    _admit: tuple[str, int] | None = None

    def _stop_leading(self) -> None:
        waits, self.waits = self.waits, []
        for wait in waits:
            wait.done(False)
        self.parked = []
        self._admit = None
        self.opened = 0

    def _announce(self) -> None:
        """Gossip: who leads which epoch."""
        if self.leads:
            for name in self.sim.names:
                if name != self.name:
                    self.send(name, "announce", self.election.epoch)
        self._later(ANNOUNCE_S, self._announce)

    def on_announce(self, source: str, epoch: int) -> None:
        self._do(self.election.on_higher_epoch(epoch, self.clock))
        if epoch > self.announced[0]:
            self.announced = (epoch, source)
            if self.election.role is not Role.PRIMARY:
                self._pull()

    def on_ahead(self, source: str, epoch: int) -> None:
        self._do(self.election.on_higher_epoch(epoch, self.clock))

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(
        self, op: str, key: str, value: Any, write_id: int, ack: str, done: Callable[..., None]
    ) -> None:
        """done("refused", None, None), done("unknown", …) or done("ok", version, session token)."""
        if not self.running or self.sim.now < self.paused_until:
            return
        if not self.leads or not self.election.may_acknowledge(self.clock) or self.full:
            done("refused", None, None)
            return
        version = self.written.get(write_id)
        if version is None:
            sequence = len(self.log) + 1
            version = Version(self.election.epoch, sequence)
            if version.epoch not in self.opened_in_this_life:
                self.sim.violations.append(
                    f"own-epoch: {self.name} writes in {version.epoch} without having opened it"
                )
            self._append(Rec(version.epoch, sequence, version, op, key, value, write_id))
            self.written[write_id] = version
        # Of an older epoch, or of a batch under way: settled with what is in the log by now.
        answer, at, epoch = version, len(self.log), self.election.epoch

        def told(ok: bool) -> None:
            if ok:
                self.sim.acknowledged(epoch, self.name)
                if op == "delete" and ack == "quorum":
                    self.sim.deleted[key] = max(answer, self.sim.deleted.get(key, NOTHING))
            # The session's token is a place in the log; a version may be of a place that was cut.
            done("ok" if ok else "unknown", answer, Version(self.log[at - 1].epoch, at) if ok else None)

        wait = Wait(at, ack, told, version)
        self.waits.append(wait)
        if "ack-before-fsync" in self.sim.bugs and ack == "primary":
            self.waits.remove(wait)
            wait.done(True)
            self.point("acknowledged")
        self._settle()

    def _append(self, rec: Rec) -> None:
        self.log.append(rec)
        self.starts.begin(rec.epoch, rec.sequence)
        self._flush()

    def _fsync_s(self) -> float:
        return self.sim.random.uniform(0.001, 0.01) * self.fsync_slow

    def point(self, name: str) -> None:
        self.sim.points[name] = self.sim.points.get(name, 0) + 1
        self.sim.at(self.sim.now, lambda: self.sim.danger(self, name))

    def _flush(self) -> None:
        if self.flushing:
            return
        self.flushing = True
        upto = len(self.log)
        self._later(self._fsync_s(), lambda: self._flushed(upto))

    def _flushed(self, upto: int) -> None:
        self.flushing = False
        upto = min(upto, len(self.log))
        for rec in self.log[self.synced : upto]:
            self._apply(rec)
        self.synced = max(self.synced, upto)
        self.disk.log = self.log[: self.synced]
        if self.synced < len(self.log):
            self._flush()
        if self.election.role is Role.PRIMARY:
            if (
                not self.opened
                and self.starts.up_to(self.election.epoch, self.synced).epoch == self.election.epoch
            ):
                self.opened = self.election.epoch
                self._announce_now()
                self.point("opened")
            self._settle()
            self._unpark()
        else:
            self._pull()

    def _announce_now(self) -> None:
        for name in self.sim.names:
            if name != self.name:
                self.send(name, "announce", self.election.epoch)

    def _reached(self, ack: str) -> int:
        if ack == "primary":
            return self.synced
        held = sorted(
            [self.synced, *(self.positions.get(n, 0) for n in self.sim.names if n != self.name)], reverse=True
        )
        return held[-1] if ack == "all" else held[len(held) // 2]

    def _settle(self) -> None:
        if not self.leads:
            return
        holds = self.election.may_acknowledge(self.clock) or "lease-not-checked" in self.sim.bugs
        for wait in list(self.waits):
            if holds and self._reached(wait.ack) >= wait.sequence:
                self.waits.remove(wait)
                wait.done(True)
                self.point("acknowledged")
        self._purge()

    def _purge(self) -> None:
        """Raise the floor, now and then, to what every replica has passed."""
        if self.sim.random.random() > 0.1:
            return
        passed = self.synced if "tombstone-purged-early" in self.sim.bugs else self._reached("all")
        if passed and any(row.value is None for row in self.table.values()):
            floor = Version(self.log[passed - 1].epoch, passed)
            if floor > self.floor:
                sequence = len(self.log) + 1
                self._append(
                    Rec(
                        self.election.epoch,
                        sequence,
                        Version(self.election.epoch, sequence),
                        "purge",
                        value=floor,
                    )
                )

    def _apply(self, rec: Rec) -> None:
        if rec.op in ("put", "delete"):
            row = self.table.get(rec.key)
            if rec.write_id:
                self.written.setdefault(rec.write_id, rec.version)
            if row is None or rec.version > row.version:
                self.table[rec.key] = Row(rec.version, rec.value if rec.op == "put" else None)
        elif rec.op == "purge":
            self.floor = max(self.floor, rec.value)
            for key, row in list(self.table.items()):
                if row.value is None and row.version <= self.floor:
                    del self.table[key]
        elif rec.op == "epoch" and rec.value is not None and rec.value == (self.name, self.disk.token):
            self.disk.rebuilding = False
            self.disk.promised = max(self.disk.promised, rec.epoch)
            self.election.promised = max(self.election.promised, rec.epoch)

    def _checkpoint(self) -> None:
        disk = self.disk
        disk.table, disk.checkpoint, disk.floor = dict(self.table), self.synced, self.floor
        self._later(CHECKPOINT_S, self._checkpoint)

    # -- the stream, as primary -------------------------------------------------------------------------------------

    def on_pull(self, source: str, epoch: int, last: Version, echo: float, token: int | None) -> None:
        """token: of a rebuilt replica that must not count yet."""
        self._do(self.election.on_higher_epoch(epoch, self.clock))
        if not self.leads:
            return
        fork = fork_of(last, self.starts, len(self.log))
        if fork is not None:
            self.send(source, "fork", self.election.epoch, self.clock, last, fork)
            return
        if epoch == self.election.epoch and token is None:
            self.positions[source] = max(last.sequence, self.positions.get(source, 0))
            self.election.on_echo(source, echo)
            self._settle()
        if token is not None and last.sequence >= self.synced and self.positions:
            self._admit_again(source, token)
            return
        if last.sequence < self._streamable:
            self._stream(source, last)
            return
        parked = (source, last, self.life)
        self.parked.append(parked)
        self._later(POLL_S, lambda: self._answer_parked(parked))

    @property
    def _streamable(self) -> int:
        return len(self.log) if "stream-unsynced" in self.sim.bugs else self.synced

    def _admit_again(self, source: str, token: int) -> None:
        """A level replica on a new disk becomes a voter again, by an epoch that it had no part in opening."""
        elected = self.election
        if self.leads and elected.may_acknowledge(self.clock):
            epoch = elected.epoch
            elected.resign()
            self._do(elected.hand_over(self.name, self.clock)[:1])
            self._admit = (source, token)
            self._do(elected._stand(self.clock, released=epoch))

    def _answer_parked(self, parked: tuple[str, Version, int]) -> None:
        if parked in self.parked:
            self.parked.remove(parked)
            self._stream(parked[0], parked[1])

    def _unpark(self) -> None:
        waiting, self.parked = self.parked, []
        for source, last, _ in waiting:
            if last.sequence < self._streamable:
                self._stream(source, last)
            else:
                self.parked.append((source, last, self.life))

    def _stream(self, target: str, after: Version) -> None:
        if self.leads:
            batch = self.log[after.sequence : min(self._streamable, after.sequence + 50)]
            self.send(target, "stream", self.election.epoch, self.clock, after, batch)
            if batch:
                self.point("streamed")

    # -- the stream, as follower ------------------------------------------------------------------------------------

    _echo = -math.inf
    _echo_epoch = 0

    def _pull(self) -> None:
        epoch, primary = self.announced
        if not epoch or primary == self.name or self.election.role is Role.PRIMARY or self.flushing:
            return
        self.pulled_at = self.sim.now
        if not self._takes(epoch):
            # Our promise is above that primary: it must overtake it.
            self.send(primary, "ahead", max(self.election.promised, self.last.epoch))
            return
        token = self.disk.token if self.disk.rebuilding else None
        echo = self._echo if self._echo_epoch == epoch else -math.inf
        self.send(primary, "pull", epoch, self.last, echo, token)

    def _takes(self, epoch: int) -> bool:
        if "lower-epoch-accepted" in self.sim.bugs:
            return self.election.role is not Role.PRIMARY
        return self.election.takes(epoch)

    def _heard(self, source: str, epoch: int, stamp: float) -> bool:
        if not self._takes(epoch):
            return False
        self._do(self.election.on_stream(source, epoch, self.clock))
        self._echo, self._echo_epoch = stamp, epoch
        if epoch > self.announced[0]:
            self.announced = (epoch, source)
        return True

    def on_stream(self, source: str, epoch: int, stamp: float, after: Version, batch: list[Rec]) -> None:
        if not self._heard(source, epoch, stamp):
            return
        if after != self.last or self.flushing:
            return  # an answer to an older question
        if not batch or self.full:
            self._later(0.2 if self.full else 0.0, self._pull)
            return
        if epoch < self.disk.promised:
            self.sim.violations.append(
                f"promise-binds: {self.name} takes epoch {epoch}, promised {self.disk.promised}"
            )
        for rec in batch:
            self.log.append(rec)
            self.starts.begin(rec.epoch, rec.sequence)
        self._flush()
        self._offer_sides(source)

    def on_fork(self, source: str, epoch: int, stamp: float, last: Version, told: Version) -> None:
        if not self._heard(source, epoch, stamp) or last != self.last or self.flushing:
            return
        at = cut_at(told, self.starts, len(self.log)).sequence
        tail = [rec for rec in self.log[at:] if rec.op in ("put", "delete")]
        disk = self.disk
        if tail and "tail-cut-without-reoffer" not in self.sim.bugs:
            disk.sides[self.sim.random.getrandbits(40)] = tail
        self.log = self.log[:at]
        disk.log, self.synced = list(self.log), at
        disk.checkpoint = min(disk.checkpoint, at)
        self.starts.cut(at)
        kept = {rec.write_id for rec in self.log}
        self.written = {one: version for one, version in self.written.items() if one in kept}
        self.point("cut")
        self._pull()

    # -- tails ------------------------------------------------------------------------------------------------------

    def _offer_sides(self, primary: str) -> None:
        for number, tail in self.disk.sides.items():
            if number not in self.offering:
                self.offering.add(number)
                self.send(primary, "offer", number, tail)
                self._later(OFFER_S, lambda number=number: self.offering.discard(number))  # type: ignore[misc]

    def on_offer(self, source: str, number: int, tail: list[Rec]) -> None:
        if not self.leads or self.full or not self.election.may_acknowledge(self.clock):
            return
        aside = []
        for rec in tail:
            row = self.table.get(rec.key)
            waiting = [
                one for one in self.log[self.synced :] if one.key == rec.key and one.version >= rec.version
            ]
            if waiting or (row is not None and row.version >= rec.version):
                self.sim.superseded.add((rec.write_id, rec.version))
                continue
            if row is None and rec.version <= self.floor and "tombstone-purged-early" not in self.sim.bugs:
                self.disk.quarantine.append(rec)
                aside.append(rec)
                continue
            if row is None and rec.op == "put" and rec.version < self.sim.deleted.get(rec.key, NOTHING):
                self.sim.violations.append(
                    f"deletes-stay: {self.name} brings back {rec.key} {tuple(rec.version)}"
                )
            self._append(rec._replace(epoch=self.election.epoch, sequence=len(self.log) + 1))
        ack = "primary" if "side-file-deleted-early" in self.sim.bugs else "quorum"

        def done(ok: bool) -> None:
            if ok:
                self.send(source, "offered", number, aside)

        self.waits.append(Wait(len(self.log), ack, done, Version(0, 0)))
        self._settle()

    def on_offered(self, source: str, number: int, aside: list[Rec]) -> None:
        """All is on a quorum. What was put aside may have been deleted long ago, so its row here must go as well."""
        for rec in aside:
            row = self.table.get(rec.key)
            if row is not None and row.version == rec.version:
                del self.table[rec.key]
        self.disk.sides.pop(number, None)
        self.point("side-file-gone")
