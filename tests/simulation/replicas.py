"""A simulated replica's life in one process: its election, what it writes while it leads, and what it does with the outcome.
After node/failover.py and node/shard.py. The two ends of the stream are in streams.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from node.election import (
    Ask,
    Lead,
    Message,
    Persist,
    Promise,
    Refuse,
    Role,
    Stand,
    StepDown,
    Tell,
    Would,
    forced_above,
)
from node.placement import Placement
from node.pulls import Beat
from node.replication import Progress
from storage.records import Version
from tests.simulation.planted import CONFIG, Planted
from tests.simulation.reigns import Reign, Wait
from tests.simulation.stores import NOTHING, Files, Rec, Store
from tests.simulation.streams import Follower, Leading

if TYPE_CHECKING:
    from tests.simulation.shards import Host

TICK_S = 0.02
CHECKPOINT_S = 1.0
# A learner this near may become a voter.
LEVEL_RECORDS = 20


class Replica:
    def __init__(
        self, host: Host, files: Files, founders: Sequence[str], *, promised: int, owes: bool
    ) -> None:
        self.host, self.sim, self.files = host, host.sim, files
        self.name, self.id = host.name, files.id
        self.bugs, self.laws = host.sim.bugs, host.sim.laws
        self._founders = tuple(founders)
        self.closed = False
        self.store = Store(files)
        for at, _ in self.store.placements:
            self.laws.on_disk(self.who, self.store.log[at - 1].epoch)
        self.reign: Reign | None = None
        self.waits: list[Wait] = []
        self.flushing = False
        # Our log up to here is known to be on a quorum: that much of it may be forgotten.
        self.shared = 0
        # (when, where the log ended), at each checkpoint.
        self._aging: deque[tuple[float, int]] = deque(maxlen=64)
        # (who, replica id) as heard from; whom the first epoch will name.
        self._founding_ids: dict[str, int] = {}
        # Under which placement the next epoch is to be opened, when not under the present one.
        self._next: Placement | None = None
        self._opened_in_this_life: set[int] = set()
        # Who leads in which epoch, as far as we have heard.
        self.hint: tuple[int, str] = (0, "")
        voters = self._voters()
        self.election = Planted(
            CONFIG,
            self.name,
            voters=voters,
            promised=promised,
            last=lambda: self.store.last,
            random=Random(self.sim.random.getrandbits(32)),
            now=host.clock,
            durable=lambda: self.store.position,
            founding=self.founding,
            owes=owes and voters != (self.name,),
        )
        self.election.bugs = self.bugs
        self.leading, self.follower = Leading(self), Follower(self)
        if "no-start-wait" in self.bugs:
            self.election._bound_until = host.clock
        if "write-on-after-restart" in self.bugs:
            self._go_on()
        self.later(0.01, self._tick)
        self.later(CHECKPOINT_S * self.sim.random.random(), self._checkpoint)

    def _go_on(self) -> None:
        epoch = self.store.last.epoch
        if epoch and self.laws.opened.get(epoch) == self.name:
            self.election.role, self.election.epoch = Role.PRIMARY, epoch
            self.reign = self._reign(epoch)

    def _reign(self, epoch: int) -> Reign:
        began = next(first for one, first in self.store.starts if one == epoch)
        progress = Progress(self.name, self.placement, epoch, began)
        return Reign(epoch, progress, self.bugs, since=self.sim.now)

    def crash(self) -> None:
        kept = self.sim.random.randint(self.store.synced, len(self.store.log))
        self.files.log = self.store.log[:kept]
        self.close()

    def close(self) -> None:
        self.closed = True
        waits, self.waits = self.waits, []
        for wait in waits:
            wait.done(False)

    def later(self, delay: float, do: Callable[[], None]) -> None:
        self.host.later(delay, lambda: None if self.closed else do())

    def send(self, target: str, what: str, *args: Any) -> None:
        self.host.send(target, what, *args)

    def point(self, name: str) -> None:
        sim = self.sim
        sim.points[name] = sim.points.get(name, 0) + 1
        sim.at(sim.now, lambda: sim.danger(self.host, name))

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def who(self) -> tuple[str, int]:
        return self.name, self.id

    @property
    def leads(self) -> bool:
        return self.reign is not None

    @property
    def founding(self) -> bool:
        return not self.store.placements

    @property
    def placement(self) -> Placement:
        if self.founding:
            return Placement(tuple((name, 0) for name in self._founders))
        return self.store.placements[-1][1]

    def _voters(self) -> tuple[str, ...]:
        placement = self.placement
        mine = self.founding or placement.is_voter(self.name, self.id)
        if "learner-votes" in self.bugs and (self.name, self.id) in placement.learners:
            return (*placement.names, self.name)
        return tuple(name for name in placement.electors if mine or name != self.name)

    @property
    def settled(self) -> bool:
        reign = self.reign
        if reign is None:
            return False
        start = next(first for epoch, first in self.store.starts if epoch == reign.epoch)
        return reign.reached("quorum") >= start

    def note_settled(self) -> int:
        if self.reign is not None and self.settled:
            self.shared = max(self.shared, self.reign.reached("quorum"))
        return self.shared

    def may_acknowledge(self) -> bool:
        return self.election.may_acknowledge(self.host.clock)

    # -- election ---------------------------------------------------------------------------------------------------

    def configure(self) -> None:
        """The last placement in our log may be another one."""
        self.election.configure(self._voters(), founding=self.founding)

    def _tick(self) -> None:
        self.act(self.election.on_timer(self.host.clock))
        if self.election.role is Role.PRIMARY and self.hint[0] > self.election.epoch:
            self.laws.broken("one-leads", f"{self.name} knows of {self.hint} and leads on")
        self.follower.tick()
        self.later(TICK_S, self._tick)

    def hear(self, epoch: int, primary: str) -> None:
        """That host says that it leads in that epoch."""
        if "leader-ignored" not in self.bugs:
            self.act(self.election.on_leader(epoch, self.host.clock))
        if epoch > self.hint[0]:
            self.hint = (epoch, primary)
            self.follower.pull()

    def on_leads(self, source: str, epoch: int) -> None:
        self.hear(epoch, source)

    def act(self, effects: Sequence[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Persist):
                self._persist(effect.epoch)
            elif isinstance(effect, Tell):
                self._tell(effect.to, effect.message)
            elif isinstance(effect, Lead):
                self._open(effect)
            elif isinstance(effect, StepDown):
                self._step_down()

    def _tell(self, to: str, message: Message) -> None:
        if isinstance(message, Promise):
            self._promised(message.epoch)
        if isinstance(message, Ask | Stand) and not self.founding:
            message = message._replace(to=dict(self.placement.votes).get(to, 0))
        self.send(to, "election", self.id, message)
        asks = isinstance(message, Ask | Stand)
        if "learner-votes" in self.bugs and asks and to in self.placement.names[:2]:
            for name, _ in self.placement.learners:
                self.send(name, "election", self.id, message)

    def _promised(self, epoch: int) -> None:
        self.laws.on_promise(self.who, epoch, self.store.last.epoch)
        self.point("promised")

    def on_election(self, source: str, replica: int, message: Message) -> None:
        if "log-not-compared" in self.bugs and isinstance(message, Ask | Stand):
            message = message._replace(last=Version(1 << 40, 0))
        named = isinstance(message, Ask | Stand) and message.to == self.id
        if self.founding:
            self._founding_ids[source] = replica
        elif not named and not self.placement.may_elect(source, replica):
            if isinstance(message, Ask | Stand):
                self._tell(source, Refuse(message.epoch, self.election.promised, "learner"))
                return
            if "learner-votes" not in self.bugs or not isinstance(message, Would | Promise):
                return
            candidacy = self.election._candidacy
            yes = candidacy.yes if candidacy is not None else set()
            source = next((name for name in self.election.voters if name not in yes), source)
        self.act(self.election.on_message(source, message, self.host.clock, named=named))

    def _persist(self, epoch: int) -> None:
        def done() -> None:
            disk = self.host.disk
            if self.host.full:
                self.election.on_persist_failed(epoch, self.host.clock)
                return
            if "promise-not-persisted" not in self.bugs:
                before = disk.promised[1] if disk.promised is not None and disk.promised[0] == self.id else 0
                disk.promised = (self.id, max(before, epoch))
            effects = self.election.on_persisted(epoch, self.host.clock)
            if any(isinstance(one, Tell) and isinstance(one.message, Stand) for one in effects) or any(
                isinstance(one, Lead) for one in effects
            ):
                self._promised(epoch)
            self.act(effects)

        self.later(self.host.fsync_s(), done)

    def _open(self, lead: Lead) -> None:
        if self.host.full:
            self.act(self.election.give_up("its disk is full", self.host.clock))
            return
        wanted, self._next = self._next, None
        forced = self.bugs & {"old-majority-only", "change-retried"}
        new = wanted if wanted is not None and (lead.changes or forced) else self._present()
        before = None if self.founding else self.placement
        at = self.store.log[self.store.placements[-1][0] - 1].epoch if before is not None else 0
        self.laws.on_open(self.name, lead.epoch, before, at, new)
        self._opened_in_this_life.add(lead.epoch)
        sequence = len(self.store.log) + 1
        self.append(Rec(lead.epoch, sequence, Version(lead.epoch, sequence), "epoch", value=new))

    def _present(self) -> Placement:
        if not self.founding:
            return self.placement.replaced(self.name, self.id)
        ids = {name: self._founding_ids.get(name, 0) for name in self.placement.names}
        ids[self.name] = self.id
        return Placement(tuple(ids.items()))

    def _step_down(self) -> None:
        self.reign = None
        self.leading.parked = []
        waits, self.waits = self.waits, []
        for wait in waits:
            wait.done(False)

    def force(self, known: int) -> None:
        """Lead as the only voter, without anybody's leave. known: the greatest epoch of those who could be asked."""
        epoch = forced_above(known, self.sim.random)
        if "forced-low" in self.bugs:
            epoch = max(self.election.seen, self.election.bound) + 1
        self._next = Placement((self.who,))
        self.laws.forced.add(epoch)
        self.sim.on_force()
        self.point("forced")
        self.act(self.election.force(epoch, self.host.clock))

    def change(self, new: Placement) -> bool:
        """As primary: open an epoch under that placement."""
        reign = self.reign
        if reign is None:
            return False
        if (
            not (self.may_acknowledge() and reign.progress.established)
            and "change-unsettled" not in self.bugs
        ):
            reign.insists = reign.progress.stuck(self.sim.now - reign.since, CONFIG.lease_s)
            return False
        self._next = new.after(self.placement)
        also = () if "old-majority-only" in self.bugs else new.electors
        self.point("changing")
        self.act(self.election.renew(self.host.clock, also))
        return True

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(
        self, op: str, key: str, value: Any, write_id: int, ack: str, done: Callable[..., None]
    ) -> None:
        """done("refused", None, None), done("unknown", …) or done("ok", version, session token)."""
        if self.reign is None or not self.may_acknowledge() or self.host.full:
            done("refused", None, None)
            return
        epoch = self.reign.epoch
        store = self.store
        version = store.written.get(write_id)
        if version is None:
            version = Version(epoch, len(store.log) + 1)
            if epoch not in self._opened_in_this_life:
                self.laws.broken("own-epoch", f"{self.name} writes in {epoch} without having opened it")
            store.written[write_id] = version
            self.append(Rec(epoch, version.sequence, version, op, key, value, write_id))
        # Of an older epoch, or of a batch under way: settled with what is in the log by now.
        answer, at = version, len(store.log)

        def told(ok: bool) -> None:
            if ok:
                self.laws.on_acknowledge(epoch, self.name)
                if op == "delete" and ack == "quorum":
                    self.laws.deleted[key] = max(answer, self.laws.deleted.get(key, NOTHING))
            # The session's token is a place in the log; a version may be of a place that was cut.
            token = Version(store.log[at - 1].epoch, at) if ok else None
            done("ok" if ok else "unknown", answer, token)

        if "ack-before-fsync" in self.bugs and ack == "primary":
            told(True)
            self.point("acknowledged")
            return
        self.waits.append(Wait(at, ack, told))
        self.settle()

    def wait(self, sequence: int, ack: str, done: Callable[[], None]) -> None:
        self.waits.append(Wait(sequence, ack, lambda ok: done() if ok else None))
        self.settle()

    # What others ask of a primary.
    def on_pull(self, source: str, *args: Any) -> None:
        self.leading.pulled(source, *args)

    def on_echo(self, source: str, beat: Beat) -> None:
        self.leading.beaten(source, beat)

    def on_fetch(self, source: str, wanted: Version) -> None:
        self.leading.fetched(source, wanted)

    def on_offer(self, source: str, *args: Any) -> None:
        self.leading.offered(source, *args)

    def append(self, rec: Rec) -> None:
        self.store.append(rec)
        self.flush()

    def flush(self) -> None:
        if not self.flushing:
            self.flushing = True
            upto = len(self.store.log)
            self.later(self.host.fsync_s(), lambda: self._flushed(upto))

    def _flushed(self, upto: int) -> None:
        self.flushing = False
        store = self.store
        for rec in store.sync(min(upto, len(store.log))):
            if rec.op == "epoch":
                self.laws.on_disk(self.who, rec.epoch)
                self.configure()
        if store.synced < len(store.log):
            self.flush()
        if self.election.role is not Role.PRIMARY:
            self.follower.pull()
            return
        epoch = self.election.epoch
        if self.reign is None and store.position.epoch == epoch:
            self.reign = self._reign(epoch)
            self.hint = (epoch, self.name)
            for name in self.sim.names:
                if name != self.name:
                    self.send(name, "leads", epoch)
            self.point("opened")
        if self.reign is not None:
            self.reign.positions[self.name] = store.synced
            self.settle()
            self.leading.unpark()

    def settle(self) -> None:
        if self.reign is None:
            return
        holds = self.may_acknowledge() or "lease-not-checked" in self.bugs
        for wait in list(self.waits):
            reached = self.store.synced if wait.ack == "primary" else self.reign.reached(wait.ack)
            if holds and reached >= wait.sequence and wait in self.waits:
                self.waits.remove(wait)
                wait.done(True)
                self.point("acknowledged")

    def purge(self) -> None:
        """As primary: raise the floor to what every holder has passed, learners included."""
        reign = self.reign
        if reign is None or not self.settled or not self.may_acknowledge():
            return
        passed = min(
            reign.reached("all"),
            self.store.synced,
            *(reign.heard.get(name, 0) for name, _ in self.placement.learners),
        )
        if "tombstone-purged-early" in self.bugs:
            passed = self.store.synced
        if passed and any(row.value is None for row in self.store.table.values()):
            floor = Version(self.store.log[passed - 1].epoch, passed)
            if floor > self.store.floor and self.store.synced == len(self.store.log):
                sequence = len(self.store.log) + 1
                place = Version(reign.epoch, sequence)
                self.append(Rec(reign.epoch, sequence, place, "purge", value=floor))

    def _checkpoint(self) -> None:
        self.store.checkpoint()
        self._aging.append((self.sim.now, self.store.synced))
        old = max((end for at, end in self._aging if at <= self.sim.now - self.sim.log_keep_s), default=0)
        if self.sim.random.random() < 0.2:
            self.store.forget(min(self.note_settled(), old), self.sim.random)
        self.later(CHECKPOINT_S, self._checkpoint)
