"""The register of layouts in virtual time: the real acceptors and proposers of `node/register.py` on hosts that fail.

Hosts lose what they had not fsynced when they crash; disks are replaced; members come and go by the layouts themselves, and
who has left by a committed layout is wiped, as an operator would who reads "committed". `bugs` plants one of the mistakes of
docs/testing.md.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from node.register import (
    NEVER,
    Accept,
    Accepted,
    Ask,
    Ballot,
    Done,
    Learn,
    Learned,
    Promise,
    Proposer,
    Refuse,
    Reply,
    Reserve,
    Slot,
    Stale,
    Tell,
    answer,
    learn,
)
from router.layout import Layout, Member

BUGS = (
    "accept-without-promise-check",
    "promise-not-persisted",
    "acceptance-not-persisted",
    "old-majority-only",
    "new-majority-only",
    "ballot-reused",
    "compare-skipped",
    "amnesiac-votes",
)
NAMES = tuple(f"n{i}" for i in range(6))
COMMIT_S = 6.0
GOSSIP_S = 0.7


class OldMajorityOnly(Proposer):
    """Says committed as soon as it is decided."""

    def _teach(self, now: float) -> list[Reserve | Tell | Done]:
        return super()._teach(now) + self._end("committed", self.own)


class NewMajorityOnly(Proposer):
    """Asks a majority of the members after, and not of those before."""

    def _accept(self, now: float) -> list[Reserve | Tell | Done]:
        super()._accept(now)
        if self._value.hash != self.own.hash:
            return self._tell(
                [one.name for one in self.base.members], Accept(self.base, self._ballot, self._value)
            )
        return self._teach(now)


@dataclass(slots=True)
class Disk:
    """What survives a crash."""

    id: str
    slot: Slot = field(default_factory=Slot)
    counter: int = 0


@dataclass(slots=True)
class Try:
    """One commit, as its client saw it. outcome "": its node crashed before it could say."""

    base: Layout
    value: Layout
    began: float
    ended: float = float("inf")
    outcome: str = ""


class Sim:
    def __init__(self, seed: int, bugs: frozenset[str] = frozenset()) -> None:
        self.random = Random(seed)
        self.bugs, self.now = bugs, 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.loss, self.repeat = 0.0, 0.05
        self.cut: Callable[[str, str], bool] | None = None
        self.trouble = True
        self.violations: list[str] = []
        self.tries: list[Try] = []
        # (disk, version of the base) → the greatest ballot promised; (base, ballot) → what was to be accepted at it.
        self._promised: dict[tuple[str, int], Ballot] = {}
        self._proposed: dict[tuple[str, Ballot], str] = {}
        # version → the decided layout, as far as anybody has said so.
        self.decided: dict[int, Layout] = {}
        # Told of moments at which a crash hurts most: of whom, after what was said, and to whom.
        self.danger: Callable[[Host, str, str], None] = lambda host, point, to: None
        # Whose messages are late: until when, and by how much.
        self.late: dict[str, tuple[float, float]] = {}
        self.hosts = {name: Host(self, name) for name in NAMES}
        first = [Member(name=name, id=self.hosts[name].disk.id) for name in NAMES[:3]]
        self.first = Layout(
            version=1, shard_count=1, replication=1, members=tuple(first), targets=(("n0",),), cluster_id="00"
        )
        self.note(self.first)
        for name in NAMES[:3]:
            self.hosts[name].disk.slot = Slot(self.first)
        for host in self.hosts.values():
            host.start()

    def at(self, when: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(when, self.now), self._count, do))

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, do = heapq.heappop(self._heap)
            do()
        self.now = until

    def send(self, source: str, target: str, do: Callable[[Host], None]) -> None:
        """Calls `do` with the target later: once, twice or never, in any order."""
        random, host = self.random, self.hosts[target]
        for _ in range(1 + (random.random() < self.repeat)):
            if self.cut is not None and source != target and self.cut(source, target):
                continue
            if random.random() < self.loss:
                continue
            delay = random.uniform(0.001, 0.01)
            if random.random() < 0.2:
                delay *= random.choice((4.0, 10.0, 100.0))
            until, by = self.late.get(source, (0.0, 0.0))
            if until > self.now:
                delay += random.uniform(0.7, 1.3) * by
            self.at(self.now + delay, lambda: do(host) if host.running else None)

    def note(self, layout: Layout) -> None:
        """Somebody takes this layout for decided: `one-value` and `chain`."""
        known = self.decided.setdefault(layout.version, layout)
        if known.hash != layout.hash:
            self.violations.append(f"one-value: version {layout.version} is {known.hash} and {layout.hash}")
        before = self.decided.get(layout.version - 1)
        if before is not None and before.hash != layout.base:
            self.violations.append(
                f"chain: version {layout.version} follows {layout.base}, not {before.hash}"
            )

    def on_promise(self, disk: str, version: int, ballot: Ballot) -> None:
        """Told by that disk's acceptor, as a promise or with an acceptance: `promise-binds`."""
        least = self._promised.get((disk, version), NEVER)
        if ballot < least:
            self.violations.append(f"promise-binds: {disk} takes part in {ballot} after {least}")
        self._promised[disk, version] = max(ballot, least)

    def on_proposal(self, ask: Accept) -> None:
        """`on-disk-first`: no ballot is used twice, also not after a restart."""
        first = self._proposed.setdefault((ask.base.hash, ask.ballot), ask.value.hash)
        if first != ask.value.hash:
            self.violations.append(f"on-disk-first: {ask.ballot} is used for {first} and {ask.value.hash}")

    @property
    def newest(self) -> Layout:
        return self.decided[max(self.decided)]

    def needed(self) -> list[Layout]:
        """Layouts whose members no operator may take away: from the last acknowledged one on."""
        acknowledged = max((one.value.version for one in self.tries if one.outcome == "committed"), default=1)
        return [layout for version, layout in self.decided.items() if version >= acknowledged]

    def voters_left(self, layout: Layout) -> int:
        """Members that have not lost their promises."""
        return sum(self.hosts[member.name].disk.id == member.id for member in layout.members)


class Host:
    def __init__(self, sim: Sim, name: str) -> None:
        self.sim, self.name = sim, name
        self.disk = Disk(id=f"{sim.random.getrandbits(64):016x}")
        self.running = False
        self.life = 0
        self.fsync_slow = 1.0
        self.proposer: Proposer | None = None

    def start(self) -> None:
        self.life += 1
        self.running = True
        self.slot, self.counter = self.disk.slot, self.disk.counter
        self._writes: deque[tuple[Slot, int, Callable[[], None]]] = deque()
        self._written = self.slot, self.counter
        if "ballot-reused" in self.sim.bugs:
            self.counter = 0
        self.proposer = None
        self._later(GOSSIP_S * self.sim.random.random(), self._gossip)

    def crash(self) -> None:
        self.running = False
        self.life += 1
        self.proposer = None

    def lose_disk(self) -> None:
        self.crash()
        kept = self.disk.id
        self.disk = Disk(id=f"{self.sim.random.getrandbits(64):016x}")
        if "amnesiac-votes" in self.sim.bugs:
            self.disk.id = kept

    def _later(self, delay: float, do: Callable[[], None]) -> None:
        life = self.life

        def run() -> None:
            if self.life == life:
                do()

        self.sim.at(self.sim.now + delay, run)

    def _sync(self, then: Callable[[], None]) -> None:
        """Calls `then` when the state of now is on disk. Writes reach the disk in their order, one after the other."""
        self._writes.append((self.slot, self.counter, then))
        if len(self._writes) == 1:
            self._write()

    def _write(self) -> None:
        slot, counter, then = self._writes[0]
        # What is there already costs nothing: an answer that changes nothing waits for those before it.
        there = slot is self._written[0] and counter == self._written[1]
        took = 0.0 if there else self.sim.random.uniform(0.002, 0.01) * self.fsync_slow

        def done() -> None:
            self._written = slot, counter
            kept = slot
            if "acceptance-not-persisted" in self.sim.bugs:
                kept = (
                    replace(slot, accepted=self.disk.slot.accepted)
                    if slot.layout == self.disk.slot.layout
                    else slot
                )
            if "promise-not-persisted" in self.sim.bugs:
                promised = slot.accepted[0] if slot.accepted else NEVER
                kept = replace(kept, promised=promised)
            self.disk.slot, self.disk.counter = kept, max(counter, self.disk.counter)
            life = self.life
            then()
            if self.life == life:
                self._writes.popleft()
                if self._writes:
                    self._write()

        self._later(took, done)

    # -- acceptor -----------------------------------------------------------------------------------------------------

    def on_ask(self, source: str, ask: Ask) -> None:
        if isinstance(ask, Accept) and "accept-without-promise-check" in self.sim.bugs:
            self.slot = replace(self.slot, promised=NEVER)
        before = self.slot
        self.slot, reply = answer(self.slot, self.name, self.disk.id, ask)
        if self.slot is not before and isinstance(ask, Learn):
            self.sim.note(ask.layout)
        # Also an answer that changes nothing tells of a state that may still be on its way to the disk.
        if isinstance(reply, Promise | Accepted) and not isinstance(ask, Learn):
            disk, version, ballot = self.disk.id, ask.base.version, reply.ballot
            self._sync(lambda: self._promise(source, reply, disk, version, ballot))
        else:
            self._sync(lambda: self._reply(source, reply))

    def _promise(self, to: str, reply: Reply, disk: str, version: int, ballot: Ballot) -> None:
        self.sim.on_promise(disk, version, ballot)
        self._reply(to, reply)

    def _reply(self, to: str, reply: Reply) -> None:
        self.sim.send(self.name, to, lambda host: host.on_reply(self.name, reply))
        if isinstance(reply, Promise | Accepted | Learned):
            self.sim.danger(self, type(reply).__name__, to)

    def _gossip(self) -> None:
        self._later(GOSSIP_S, self._gossip)
        layout = self.disk.slot.layout
        if layout is not None:
            self.sim.send(self.name, self.sim.random.choice(NAMES), lambda host: host.hear(layout))

    def hear(self, layout: Layout) -> None:
        self.slot = learn(self.slot, layout)
        if self.slot.layout is layout:
            self._sync(lambda: None)

    # -- proposer -----------------------------------------------------------------------------------------------------

    def commit(self, value: Layout) -> None:
        base = self.disk.slot.layout
        assert base is not None
        assert self.proposer is None
        kind = Proposer
        if "old-majority-only" in self.sim.bugs:
            kind = OldMajorityOnly
        if "new-majority-only" in self.sim.bugs:
            kind = NewMajorityOnly
        self.proposer = kind(
            self.name,
            base,
            value,
            counter=self.counter,
            random=Random(self.sim.random.getrandbits(32)),
            deadline=self.sim.now + COMMIT_S,
        )
        self._current = Try(base, value, self.sim.now)
        self.sim.tries.append(self._current)
        self._do(self.proposer.start(self.sim.now))

    def on_reply(self, sender: str, reply: Reply) -> None:
        proposer = self.proposer
        if proposer is None:
            return
        if isinstance(reply, Promise) and "compare-skipped" in self.sim.bugs:
            reply = replace(reply, accepted=None)
        if isinstance(reply, Stale | Refuse) and self.sim.random.random() < 0.3:
            return  # some replies are lost
        self._do(proposer.on_reply(sender, reply, self.sim.now))

    def _do(self, effects: list[Reserve | Tell | Done]) -> None:
        proposer = self.proposer
        assert proposer is not None
        for effect in effects:
            if isinstance(effect, Tell):
                message = effect.message
                if isinstance(message, Learn):
                    self.sim.note(message.layout)
                elif isinstance(message, Accept):
                    self.sim.on_proposal(message)
                self.sim.send(
                    self.name, effect.to, lambda host, message=message: host.on_ask(self.name, message)
                )  # type: ignore[misc]
            elif isinstance(effect, Reserve):
                self.counter = effect.counter
                self._sync(lambda: self._if_still(proposer, lambda: proposer.on_reserved(self.sim.now)))
            else:
                self._current.outcome, self._current.ended = effect.outcome, self.sim.now
                self.proposer = None
                return
        if effects and isinstance(effects[0], Tell):
            self.sim.danger(self, type(effects[0].message).__name__, effects[0].to)
        if self.proposer is proposer:
            when = proposer.next_deadline
            self._later(
                when - self.sim.now + 1e-6,
                lambda: self._if_still(proposer, lambda: proposer.on_timer(self.sim.now)),
            )

    def _if_still(self, proposer: Proposer, do: Callable[[], list[Reserve | Tell | Done]]) -> None:
        if self.proposer is proposer:
            self._do(do())
