"""One shard's replicas in virtual time: clock, network, disks, hosts. What a replica does is in replicas.py, streams.py and
movers.py, around the real machines of elections, forks and moves; laws.py looks on.

A host loses what it had not fsynced when it crashes, and everything when its disk is replaced. `bugs` plants one of the mistakes
of docs/testing.md; the checker (history.py) has to notice each.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from node.witness import Kept
from tests.simulation.laws import Laws
from tests.simulation.movers import Mover
from tests.simulation.replicas import Replica
from tests.simulation.stores import Disk, Files
from tests.simulation.witnesses import Witness

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
    "stayed-row-is-proof",
    "tombstone-purged-early",
    "amnesiac-votes",
    "lease-not-checked",
    "old-majority-only",
    "new-majority-only",
    "change-unsettled",
    "change-retried",
    "learner-votes",
    "dismissed-early",
    "dismissed-with-a-tail",
    "wiped-keeps-id",
    "leader-ignored",
    "forced-low",
)
# Of shards of two replicas and a witness.
WITNESS_BUGS = (
    "witness-counted",
    "witness-forgets-promise",
    "witness-forgets-placement",
    "unsealed",
)


Wish = tuple[int, tuple[str, ...], str]


class Network:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.loss = 0.0
        self.slow = 1.0
        self.cut: Callable[[str, str], bool] | None = None
        # Kinds of messages that get lost.
        self.mute: frozenset[str] = frozenset()

    def delay(self) -> float | None:
        if self.random.random() < self.loss:
            return None
        rare = 20.0 if self.random.random() < 0.02 else 1.0
        return self.random.uniform(0.001, 0.004) * rare * self.slow


class Sim:
    """Clock, events, hosts. The first `replicas` hosts found the shard."""

    def __init__(
        self,
        seed: int,
        count: int = 5,
        replicas: int = 3,
        bugs: frozenset[str] = frozenset(),
        *,
        witness: bool = False,
    ) -> None:
        self.random = Random(seed)
        self.seed, self.bugs, self.now = seed, bugs, 0.0
        self.network = Network(self.random)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.names = tuple(f"n{i}" for i in range(count))
        self.founders = self.names[:replicas]
        self.laws = Laws()
        # (version, voters, witness or ""): the layout; a host goes by what it has heard of.
        self.wish: Wish = (0, self.founders, self.names[replicas] if witness else "")
        # Clients and moves rest until then.
        self.quiet_until = 0.0
        self.points: dict[str, int] = {}
        # How long all of a log stays, at least.
        self.log_keep_s = 0.0
        # Called when a primary is forced, before it leads.
        self.on_force: Callable[[], None] = lambda: None
        # Told of moments at which trouble hurts most: something has just been promised to somebody.
        self.danger: Callable[[Host, str], None] = lambda host, point: None
        self.hosts: dict[str, Host] = {}
        for name in self.names:
            self.hosts[name] = Host(self, name)

    def at(self, when: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(when, self.now), self._count, do))

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, do = heapq.heappop(self._heap)
            do()
        self.now = until

    def send(self, source: str, target: str, what: str, *args: Any) -> None:
        if source != target and self.network.cut is not None and self.network.cut(source, target):
            return
        delay = None if what in self.network.mute else self.network.delay()
        if delay is not None:
            host = self.hosts[target]
            self.at(self.now + delay, lambda: host.receive(what, source, *args))

    @property
    def leading(self) -> list[Host]:
        return [one for one in self.hosts.values() if one.leads]

    @property
    def holding(self) -> list[Host]:
        """Who has a replica, running or not."""
        return [one for one in self.hosts.values() if one.disk.files is not None]


class Host:
    """A process that comes and goes, its disk, and the one replica that may be on it."""

    def __init__(self, sim: Sim, name: str) -> None:
        self.sim, self.name = sim, name
        self.disk = Disk()
        self.replica: Replica | None = None
        self.witness: Witness | None = None
        self.running = False
        self.full = False
        self.fsync_slow = 1.0
        self.paused_until = 0.0
        self.life = 0
        self._held: list[Callable[[], None]] = []
        self._former_id = 0
        self.clock_rate, self.clock_offset = 1.0, sim.random.uniform(0, 1e6)
        self.start()

    @property
    def clock(self) -> float:
        return self.sim.now * self.clock_rate + self.clock_offset

    @property
    def leads(self) -> bool:
        return self.running and self.replica is not None and self.replica.leads

    @property
    def awake(self) -> bool:
        return self.running and self.sim.now >= self.paused_until

    def start(self) -> None:
        self.life += 1
        self.running, self.paused_until = True, 0.0
        self._held.clear()
        self.replica = None
        self.mover = Mover(self)
        disk = self.disk
        founder = self.name in self.sim.founders and not disk.left
        if disk.files is not None or founder:
            self.open(self.sim.founders if founder else ())
        self.witness = None if disk.witnessed is None else Witness(self, disk.witnessed, owes=True)
        self.mover.begin()

    def open(self, founders: Sequence[str]) -> Replica:
        """What is on the disk, or a new replica. One whose promises are not known gets a new id."""
        disk = self.disk
        known = disk.promised
        owes = known is not None and disk.files is not None and known[0] == disk.files.id
        if disk.files is None:
            disk.files = Files(self._new_id())
        elif not owes:
            disk.files.id = self._new_id()
        if known is None or not owes:
            known = disk.promised = (disk.files.id, 0)
        self.replica = Replica(self, disk.files, founders, promised=known[1], owes=owes)
        return self.replica

    def bring_witness(self) -> Witness:
        """The vote that is here, or a new one; on the disk before anybody hears of it."""
        if self.witness is None:
            self.disk.witnessed = Kept(self.sim.random.getrandbits(40) + 1)
            self.witness = Witness(self, self.disk.witnessed, owes=False)
        return self.witness

    def _new_id(self) -> int:
        kept, self._former_id = self._former_id, 0
        return kept or self.sim.random.getrandbits(40) + 1

    def crash(self) -> None:
        """What was written but not fsynced is there up to some record, or not at all."""
        self.running = False
        self.life += 1
        if self.replica is not None:
            self.replica.crash()
        self.replica = self.witness = None

    def lose_disk(self) -> None:
        """A new, empty one: the replica must not vote before a primary has admitted it again."""
        self.crash()
        files = self.disk.files
        if files is not None:
            self.sim.laws.destroyed.add(files.id)
            self.sim.laws.wiped.add((self.name, files.id))
            self._former_id = files.id if "amnesiac-votes" in self.sim.bugs else 0
        if self.disk.witnessed is not None:
            self.sim.laws.wiped.add((self.name, self.disk.witnessed.id))
        self.disk = Disk()

    def wipe(self, epoch: int) -> None:
        """The primary of that epoch counts on our replica no more."""
        replica, files = self.replica, self.disk.files
        assert replica is not None
        assert files is not None
        self.sim.laws.on_wipe((self.name, files.id), epoch)
        self._former_id = files.id if "wiped-keeps-id" in self.sim.bugs else 0
        replica.close()
        self.replica, self.disk.files, self.disk.left = None, None, True
        if self._former_id:
            self.disk.promised = None
        replica.point("wiped")

    def pause(self, seconds: float) -> None:
        self.paused_until = self.sim.now + seconds
        self.sim.at(self.paused_until, self._resume)

    def _resume(self) -> None:
        if self.sim.now >= self.paused_until:
            held, self._held = self._held, []
            for do in held:
                do()

    def later(self, delay: float, do: Callable[[], None]) -> None:
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

    def fsync_s(self) -> float:
        return self.sim.random.uniform(0.001, 0.01) * self.fsync_slow

    def receive(self, what: str, source: str, *args: Any) -> None:
        def take() -> None:
            if self.witness is not None and self._for_witness(what, source, *args):
                return
            if hasattr(self.mover, f"on_{what}"):
                getattr(self.mover, f"on_{what}")(source, *args)
            elif self.replica is not None:
                side = self.replica if hasattr(self.replica, f"on_{what}") else self.replica.follower
                getattr(side, f"on_{what}")(source, *args)

        self.later(0.0, take)

    def _for_witness(self, what: str, source: str, *args: Any) -> bool:
        """Whether that was for it alone."""
        assert self.witness is not None
        if what == "echoed":
            self.witness.on_echoed(source, *args)
        elif what == "election" and getattr(args[1], "to", 0) == self.witness.vote.id:
            self.witness.on_election(source, args[1])
        else:
            if what == "leads":
                self.witness.hear(args[0], source)
            return False
        return True

    def send(self, target: str, what: str, *args: Any) -> None:
        self.sim.send(self.name, target, what, *args)
