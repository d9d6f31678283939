"""Clients and trouble for `registers.py`, and the checker: is the register linearizable, and does it outlive who leaves?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.layout import Layout, Member
from tests.simulation.registers import NAMES, Host, Sim, Try

SECONDS = 60.0
HEAL_S = 25.0


@dataclass(frozen=True)
class Result:
    violations: list[str]
    tries: int
    outcomes: dict[str, int]
    versions: int
    # A commit after everything was healed; None: too many disks were lost for one.
    last: bool | None


def changed(sim: Sim, base: Layout, ids: bool) -> Layout:
    """Another layout: members come and go, and some are named with the disks that they have now (`ids`)."""
    random = sim.random
    members = {member.name: member for member in base.members}
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        name = random.choice(NAMES)
        if name in members and len(members) > 1 and random.random() < 0.6:
            del members[name]
        elif name not in members and len(members) < 5:
            members[name] = Member(name=name, id=sim.hosts[name].disk.id)
    if ids:
        members = {name: Member(name=name, id=sim.hosts[name].disk.id) for name in members}
    first = min(members)
    members[first] = Member(name=first, id=members[first].id, capacity=random.randint(1, 1 << 40))
    return Layout(
        version=base.version + 1,
        shard_count=1,
        replication=1,
        members=tuple(members[name] for name in sorted(members)),
        targets=((first,),),
        base=base.hash,
        cluster_id=base.cluster_id,
    )


class Trouble:
    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.random = sim.random
        # Who proposes above another, until when.
        self._dueling = "", 0.0
        sim.danger = self.danger
        sim.at(0.5, self.again)

    def again(self) -> None:
        sim, random = self.sim, self.random
        if not sim.trouble:
            return
        sim.at(sim.now + random.uniform(0.1, 1.2), self.again)
        random.choice(
            (self.crash, self.crash, self.partition, self.one_way, self.lossy, self.slow_disk, self.disk)
        )()

    def danger(self, host: Host, point: str, to: str) -> None:
        """Right after something was told: a crash, often a short one, or a cut."""
        sim, random = self.sim, self.random
        if not sim.trouble:
            return
        chance = random.random()
        if point == "Promise" and (to, True) == (self._dueling[0], sim.now < self._dueling[1]):
            # A promise that is not on disk is forgotten before the ballot below it comes along; what it was given for is later.
            sim.late[to] = sim.now + 0.05, 0.03
            if host.proposer is None:
                self._restart(host, 0.0005)
        elif point == "Promise" and chance < 0.4:
            self._duel(host, to)
        elif point in ("Accept", "Learn") and chance < 0.1:
            # Whoever asked sees the connection break, and asks the same node again for something else.
            self._restart(host, 0.002)
            sim.at(sim.now + 0.004, lambda: Clients.ask(sim, host))
        elif chance < 0.12:
            self._restart(host, random.choice((0.05, 0.5)))
        elif chance < 0.13:
            self.isolate(host.name)

    def _duel(self, host: Host, first: str) -> None:
        """While an acceptor's promise is on its way to `first`, another proposes, too, above it: `first` asks late for what the
        acceptors, which start again right after they have promised the other, must not do any more."""
        sim, proposer, base = self.sim, self.sim.hosts[first].proposer, host.slot.layout
        able = [
            one
            for one in sim.hosts.values()
            if one.running and one.proposer is None and one.disk.slot.layout == base
        ]
        if proposer is None or base is None or not able or sim.now < self._dueling[1]:
            return
        second = self.random.choice([one for one in able if base.member(one.name) is None] or able)
        # As if it had proposed and been refused before.
        second.counter = max(second.counter, proposer._ballot.counter)
        self._dueling = second.name, sim.now + 0.1
        sim.late[first] = sim.now + 0.1, 0.015
        Clients.ask(sim, second)

    def _restart(self, host: Host, seconds: float) -> None:
        if host.running:
            host.crash()
            self.sim.at(self.sim.now + seconds, lambda: None if host.running else host.start())

    def crash(self) -> None:
        self._restart(self.sim.hosts[self.random.choice(NAMES)], self.random.choice((0.01, 0.3, 3.0)))

    def disk(self) -> None:
        """A member's disk is replaced, while a majority of all newest and coming layouts keeps theirs."""
        sim = self.sim
        name = self.random.choice(NAMES)
        under_way = [one.value for one in sim.tries if not one.outcome]
        for layout in [*sim.needed(), *under_way]:
            member = layout.member(name)
            if member is not None and sim.voters_left(layout) - 1 <= len(layout.members) // 2:
                return
        if sim.hosts[name].running:
            sim.hosts[name].lose_disk()
            sim.at(sim.now + 0.2, lambda: None if sim.hosts[name].running else sim.hosts[name].start())

    def _cut(self, cut: Callable[[str, str], bool], seconds: float) -> None:
        sim = self.sim
        sim.cut = cut

        def heal() -> None:
            if sim.cut is cut:
                sim.cut = None

        sim.at(sim.now + seconds, heal)

    def partition(self) -> None:
        side = {name for name in NAMES if self.random.random() < 0.5}
        self._cut(lambda a, b: (a in side) is not (b in side), self.random.uniform(0.3, 3.0))

    def one_way(self) -> None:
        deaf = self.random.choice(NAMES)
        self._cut(lambda a, b: b == deaf, self.random.uniform(0.3, 3.0))

    def isolate(self, name: str) -> None:
        self._cut(lambda a, b: name in (a, b), self.random.uniform(0.3, 1.5))

    def lossy(self) -> None:
        self.sim.loss = self.random.choice((0.0, 0.0, 0.1, 0.3))
        self.sim.repeat = self.random.choice((0.05, 0.5))

    def slow_disk(self) -> None:
        self.sim.hosts[self.random.choice(NAMES)].fsync_slow = self.random.choice((1.0, 1.0, 10.0, 50.0))


class Clients:
    """Somebody changes the layout at any node, often two at once; who has left is wiped."""

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self._wiped: set[int] = set()
        sim.at(0.2, self.again)

    def again(self) -> None:
        sim, random = self.sim, self.sim.random
        if not sim.trouble:
            return
        sim.at(sim.now + random.uniform(0.05, 0.6), self.again)
        for name in random.sample(NAMES, random.choice((1, 1, 2, 3))):
            self.ask(sim, sim.hosts[name])
        for number, one in enumerate(sim.tries):
            if one.outcome == "committed" and number not in self._wiped:
                self._wiped.add(number)
                if random.random() < 0.7:
                    self._wipe(one)

    @staticmethod
    def ask(sim: Sim, host: Host) -> None:
        if host.running and host.proposer is None and host.disk.slot.layout is not None:
            host.commit(changed(sim, host.disk.slot.layout, sim.random.random() < 0.5))

    def _wipe(self, one: Try) -> None:
        sim = self.sim
        for member in one.base.members:
            if not any(layout.member(member.name) for layout in (one.value, *sim.needed())):
                sim.hosts[member.name].lose_disk()
                host = sim.hosts[member.name]
                sim.at(sim.now + 1.0, lambda host=host: None if host.running else host.start())  # type: ignore[misc]


def check(sim: Sim) -> None:
    """Acknowledged commits are in the chain, refused ones are not, and the order in time is that of the versions."""
    say = sim.violations.append
    for one in sim.tries:
        there = sim.decided.get(one.value.version)
        inside = there is not None and there.hash == one.value.hash
        if one.outcome == "committed" and not inside:
            say(f"committed: version {one.value.version} of {one.value.hash} is not in the chain")
        if one.outcome in ("conflict", "unavailable") and inside:
            say(f"{one.outcome}: {one.value.hash} is version {one.value.version}")
    done = sorted((one for one in sim.tries if one.outcome == "committed"), key=lambda one: one.began)
    for earlier in done:
        for later in done:
            if earlier.ended < later.began and earlier.value.version >= later.value.version:
                say(f"order: version {later.value.version} was begun after {earlier.value.version} had ended")
    acknowledged = max((one.value.version for one in done), default=1)
    if sim.newest.version < acknowledged or all(
        host.disk.slot.layout is None or host.disk.slot.layout.version < acknowledged
        for host in sim.hosts.values()
    ):
        say(f"lost: version {acknowledged} was acknowledged, and nobody goes by it or a later one")


def run(seed: int, bugs: frozenset[str] = frozenset(), seconds: float = SECONDS) -> Result:
    sim = Sim(seed, bugs)
    Trouble(sim)
    Clients(sim)
    sim.run(seconds)
    sim.trouble, sim.cut, sim.loss = False, None, 0.0
    for host in sim.hosts.values():
        host.fsync_slow = 1.0
        if not host.running:
            host.start()
    sim.run(seconds + HEAL_S)
    check(sim)
    last = _last(sim, seconds + HEAL_S)
    outcomes: dict[str, int] = {}
    for one in sim.tries:
        outcomes[one.outcome] = outcomes.get(one.outcome, 0) + 1
    return Result(sim.violations, len(sim.tries), outcomes, max(sim.decided), last)


def _last(sim: Sim, now: float) -> bool | None:
    """All is well: everybody goes by the same layout, and another one can be committed."""
    layouts = [host.disk.slot.layout for host in sim.hosts.values()]
    newest = max((one for one in layouts if one is not None), key=lambda one: one.version)
    if any(one is None or one.hash != newest.hash for one in layouts):
        sim.violations.append("heal: not everybody goes by the newest layout")
        return False
    host = sim.hosts[newest.members[0].name]
    for begin in (now, now + 8.0):  # what a dead proposer has left behind is completed by the first
        base = host.disk.slot.layout
        assert base is not None
        if sim.voters_left(base) <= len(base.members) // 2:
            return None
        host.commit(changed(sim, base, ids=True))
        sim.run(begin + 8.0)
        if sim.tries[-1].outcome == "committed":
            check(sim)
            return True
    sim.violations.append(f"heal: no commit any more: {sim.tries[-1].outcome}")
    return False
