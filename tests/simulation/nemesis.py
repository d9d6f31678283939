"""Trouble for a simulated shard: at random times, and more often right after something was promised."""

from __future__ import annotations

from random import Random

from node.placement import Placement
from tests.simulation.planted import CONFIG
from tests.simulation.shards import Host, Sim

# So long nobody leads before an operator gives up waiting.
FORCE_S = 2.0
# How often trouble follows a moment at which something was promised.
DANGER = {
    "acknowledged": 0.01,
    "streamed": 0.005,
    "promised": 0.15,
    "opened": 0.15,
    "changing": 0.15,
    "handing-over": 0.3,
    "wiped": 0.3,
    "installed": 0.3,
    "side-file-gone": 0.4,
    "cut": 0.3,
    "reoffered": 0.4,
}
# With how often each is chosen among all.
TROUBLES = {
    "crash": 3,
    "lose_disk": 1,
    "pause": 1,
    "isolate": 2,
    "cut_link": 2,
    "split": 1,
    "ambush": 1,
    "forget_lease": 3,
    "exile": 1,
    "heal": 3,
    "weather": 1,
    "fill_disk": 1,
    "skew": 1,
    "slow_disk": 2,
    "hand_over": 1,
    "wish": 3,
}


class Nemesis:
    """Never so much trouble that the promises of docs/ownership.md do not hold any more: a disk is lost only while a majority of
    each placement that may be in force keeps theirs."""

    def __init__(self, sim: Sim, *, moves: bool = True, force: bool = False) -> None:
        self.sim, self.random, self.moves = sim, Random(sim.seed + 7), moves
        self._troubles = TROUBLES | ({"desperate": 2} if force else {})
        if sim.wish[2]:
            self._troubles |= {"leave_behind": 2}
        self.stopped = False
        # While one that takes several steps is under way, no other comes between.
        self._calm_until = 0.0
        sim.at(sim.now + 3, self.act)
        sim.danger = self.danger

    def danger(self, host: Host, point: str) -> None:
        """Where something has just been promised, trouble comes more often than by chance."""
        if self.stopped or self.sim.now < max(3.0, self._calm_until) or not host.running:
            return
        if self.random.random() > DANGER.get(point, 0.1):
            return
        if point == "side-file-gone":
            self.lose_disk(next(iter(self.sim.leading), host))
            return
        if point == "acknowledged" and self.random.random() < 0.3:
            self.exile(host)
            return
        if point == "cut":
            self.lead_with_a_tail(host)
            return
        if point == "reoffered":
            self.mute("stream", 0.4)
            return
        if point == "promised" and self.random.random() < 0.5:
            self.forget(host)
            return
        if point in ("changing", "opened") and self.random.random() < 0.4:
            self.split(host)
            return
        getattr(self, self.random.choice(["crash", "crash", "isolate", "cut_link", "pause"]))(host)

    def act(self) -> None:
        if self.stopped:
            return
        self.sim.at(self.sim.now + self.random.uniform(0.1, 1.2), self.act)
        if self.sim.now < self._calm_until:
            return
        host = self.sim.hosts[self.random.choice(self.sim.names)]
        if self.sim.leading and self.random.random() < 0.4:
            host = self.sim.leading[0]
        (trouble,) = self.random.choices(list(self._troubles), weights=self._troubles.values())
        getattr(self, trouble)(host)

    # -- processes and disks ----------------------------------------------------------------------------------------

    def crash(self, host: Host) -> None:
        if host.running:
            host.crash()
            self.sim.at(self.sim.now + self.random.choice([0.05, 0.3, 2.0]), lambda: self.restart(host))

    def restart(self, host: Host) -> None:
        if not host.running:
            host.start()

    def forget(self, host: Host) -> None:
        """Who has just promised starts again, and the others cannot hear each other: what it promised is its disk's to know."""
        others = {name for name in self.sim.names if name != host.name}

        def strike() -> None:
            if host.running:
                self.sim.network.cut = lambda a, b: a in others and b in others
                host.crash()
                self.sim.at(self.sim.now + 0.02, lambda: self.restart(host))

        self.sim.at(self.sim.now + self.random.uniform(0.001, 0.006), strike)

    def lose_disk(self, host: Host) -> None:
        if host.running and (host.disk.files or host.disk.witnessed) is not None and self._spare(host):
            host.lose_disk()
            self.sim.at(self.sim.now + 0.5, lambda: self.restart(host))

    def _spare(self, host: Host) -> bool:
        others = [one for one in self.sim.holding if one is not host]
        if not all(one.running and one.disk.files is not None and not one.disk.files.sides for one in others):
            return False

        def whole(placement: Placement) -> bool:
            """All it names have their disks, and a majority of its voters will when this one is lost."""
            named = placement.voters + placement.learners
            there = [
                name
                for name, id_ in named
                if (files := self.sim.hosts[name].disk.files) is not None and files.id == id_
            ]
            if placement.witness is not None:
                kept = self.sim.hosts[placement.witness_name].disk.witnessed
                if kept is None or kept.id != placement.witness[1]:
                    return False
                logs = [self.sim.hosts[name].disk.files for name in placement.names if name != host.name]
                if not any(
                    one is not None and one.log and one.log[-1].epoch >= kept.remembered for one in logs
                ):
                    # Nobody else could lead any more.
                    return False
            left = [name for name in placement.electors if name != host.name]
            return len(there) == len(named) and len(left) > len(placement.electors) // 2

        return all(whole(placement) for placement in self.sim.laws.in_force())

    def pause(self, host: Host) -> None:
        if host.running:
            host.pause(self.random.choice([0.2, 0.7, 1.5, 3.0]))

    def fill_disk(self, host: Host) -> None:
        host.full = True

        def clear() -> None:
            host.full = False

        self.sim.at(self.sim.now + self.random.uniform(0.5, 4.0), clear)

    def slow_disk(self, host: Host) -> None:
        host.fsync_slow = self.random.choice([1.0, 1.0, 10.0, 40.0])

    def skew(self, host: Host) -> None:
        now = host.clock
        host.clock_rate = self.random.uniform(0.98, 1.02)
        host.clock_offset = now - self.sim.now * host.clock_rate

    # -- network ----------------------------------------------------------------------------------------------------

    def isolate(self, host: Host) -> None:
        one_way = self.random.random()
        name = host.name
        if one_way < 0.25:
            self.sim.network.cut = lambda a, b: a == name
        elif one_way < 0.5:
            self.sim.network.cut = lambda a, b: b == name
        else:
            self.sim.network.cut = lambda a, b: (a == name) != (b == name)

    def split(self, host: Host) -> None:
        """That host and some others on one side."""
        others = [name for name in self.sim.names if name != host.name]
        side = {host.name, *self.random.sample(others, self.random.randint(1, len(others) - 1))}
        self.sim.network.cut = lambda a, b: (a in side) != (b in side)

    def cut_link(self, host: Host) -> None:
        pair = {host.name, self.random.choice([name for name in self.sim.names if name != host.name])}
        self.sim.network.cut = lambda a, b: {a, b} == pair

    def heal(self, host: Host) -> None:
        self.sim.network.cut = None
        self.sim.network.loss, self.sim.network.slow, self.sim.network.mute = 0.0, 1.0, frozenset()

    def mute(self, what: str, seconds: float) -> None:
        """Messages of that kind get lost for a while."""
        network = self.sim.network
        network.mute |= {what}

        def clear() -> None:
            network.mute -= {what}

        self.sim.at(self.sim.now + seconds, clear)

    def weather(self, host: Host) -> None:
        self.sim.network.loss = self.random.choice([0.0, 0.05, 0.3])
        self.sim.network.slow = self.random.choice([1.0, 1.0, 10.0, 60.0])

    # -- aimed at a promise -----------------------------------------------------------------------------------------

    def _followers(self) -> tuple[Host, list[Host]] | None:
        """The primary, and two others that vote with it."""
        leader = next(iter(self.sim.leading), None)
        if leader is None or leader.replica is None:
            return None
        names = [name for name in leader.replica.placement.electors if name != leader.name]
        if len(names) < 2:
            return None
        return leader, [self.sim.hosts[name] for name in self.random.sample(names, 2)]

    def ambush(self, host: Host) -> None:
        """One replica falls behind; another loses its disk; then the primary, which has everything, is away for a while."""
        found = self._followers()
        if found is None:
            return
        leader, (behind, bare) = found
        self.sim.network.cut = lambda a, b: behind.name in (a, b)

        def strike() -> None:
            self.lose_disk(bare)
            self.crash(leader)
            self.sim.network.cut = None

        self.sim.at(self.sim.now + self.random.uniform(0.1, 0.4), strike)

    def forget_lease(self, host: Host) -> None:
        """While nobody writes, one replica loses the primary, and the other starts again: it must not help the first to become
        primary while the old one may still acknowledge by what it had echoed before."""
        found = self._followers()
        if found is None:
            return
        leader, (lonely, again) = found
        pair = {leader.name, lonely.name}
        self.sim.quiet_until = self.sim.now + 0.7
        self._calm_until = self.sim.now + 1.3
        self.heal(leader)

        def cut() -> None:
            self.sim.network.cut = lambda a, b: {a, b} == pair

        def strike() -> None:
            if again.running:
                # It must not hear of the primary before it is asked for its vote.
                self.mute("gossip", 0.4)
                again.crash()
                self.sim.at(self.sim.now + 0.02, lambda: self.restart(again))

        self.sim.at(self.sim.now + 0.1, cut)
        self.sim.at(self.sim.now + 0.1 + CONFIG.lease_s + self.random.uniform(0.0, 0.1), strike)

    def leave_behind(self, host: Host) -> None:
        """One of two disks is away while another takes its place; then it meets the witness alone."""
        leader = next(iter(self.sim.leading), None)
        if leader is None or leader.replica is None or not self.moves:
            return
        placement = leader.replica.placement
        others = [name for name in placement.names if name != leader.name]
        fresh = [name for name in self.sim.names if name not in placement.electors]
        if len(others) != 1 or placement.witness is None or not fresh:
            return
        behind, witness = others[0], placement.witness_name
        pair = {behind, witness}
        self._calm_until = self.sim.now + 6
        self.heal(leader)
        self.sim.network.cut = lambda a, b: behind in (a, b)
        self._tell(leader, [leader.name, self.random.choice(fresh), witness])

        def meet() -> None:
            if not self.stopped:
                self.sim.network.cut = lambda a, b: (a in pair) != (b in pair)

        self.sim.at(self.sim.now + self.random.uniform(2.0, 4.5), meet)

    def lead_with_a_tail(self, host: Host) -> None:
        """Who has just cut its log, and could not offer what it cut yet, is to lead next."""
        leader = next(iter(self.sim.leading), None)
        if leader is not None and leader is not host:
            self.mute("offer", 2.0)
            leader.crash()
            self.sim.at(self.sim.now + 1.5, lambda: self.restart(leader))

    def exile(self, host: Host) -> None:
        """The primary writes what nobody gets, and dies; the layout wants it no more; and it comes back."""
        leader = host if host.leads else next(iter(self.sim.leading), None)
        if leader is None or not self.moves:
            return
        name = leader.name
        self.sim.network.cut = lambda a, b: name in (a, b)

        def strike() -> None:
            if leader.running:
                leader.crash()
            self.heal(leader)
            others = [one for one in self.sim.names if one != name]
            told = self.sim.hosts[self.random.choice(others)]
            self._tell(told, self.random.sample(others, min(len(others), self._wished)))
            self.sim.at(self.sim.now + 3.5, back)

        def back() -> None:
            self.mute("fork", 0.5)
            self.restart(leader)

        self.sim.at(self.sim.now + 0.3, strike)

    # -- operators --------------------------------------------------------------------------------------------------

    def hand_over(self, host: Host) -> None:
        """A planned one: writes stop, the successor becomes level, and stands."""
        if host.awake and host.replica is not None and host.replica.reign is not None:
            voters = [name for name in host.replica.placement.names if name != host.name]
            if voters:
                host.mover.hand_over(host.replica, self.random.choice(voters))

    def desperate(self, host: Host) -> None:
        """One voter is left that an operator can reach: the others are down for long, or go on without it. It is made to lead."""
        found = self._followers()
        if found is None:
            return
        left, *others = self.random.sample([found[0], *found[1]], 3)
        down = self.random.random() < 0.5
        self._calm_until = self.sim.now + 1.0 + FORCE_S
        if down:
            for one in others:
                one.crash()
                self.sim.at(
                    self.sim.now + FORCE_S + self.random.uniform(1.0, 4.0), lambda one=one: self.restart(one)
                )  # type: ignore[misc]
        else:
            apart = {one.name for one in others}
            self.sim.network.cut = lambda a, b: (a in apart) != (b in apart)
        self.sim.at(self.sim.now + FORCE_S, lambda: self._force(left))
        self.sim.at(self.sim.now + FORCE_S + self.random.uniform(0.5, 3.0), lambda: self.heal(left))

    def _force(self, host: Host) -> None:
        """As node/steering.py: not while anybody whom it reaches leads, or has more."""
        replica, cut = host.replica, self.sim.network.cut
        if not host.awake or host.full or replica is None or replica.founding:
            return
        asked = [one for one in self.sim.hosts.values() if one is not host]
        ends = [replica] + [
            one.replica
            for one in asked
            if one.awake
            and one.replica is not None
            and not (cut is not None and (cut(one.name, host.name) or cut(host.name, one.name)))
        ]
        if any(one.leads for one in ends) or max(ends, key=lambda one: one.store.position) is not replica:
            return
        replica.force(max(max(one.election.seen, one.store.last.epoch) for one in ends))

    def wish(self, host: Host) -> None:
        """Another layout, told to one host, whatever is still on its way, and whoever is down."""
        if self.moves:
            self._tell(host, self.random.sample(self.sim.names, self._wished))

    @property
    def _wished(self) -> int:
        """Voters and the witness."""
        return len(self.sim.founders) + bool(self.sim.wish[2])

    def _tell(self, host: Host, names: list[str]) -> None:
        """names: of those who may hold it, or witness it, in their order."""
        count = len(self.sim.founders)
        if host.running and len(names) >= count:
            witness = "".join(names[count : count + 1]) if self.sim.wish[2] else ""
            self.sim.wish = (self.sim.wish[0] + 1, tuple(names[:count]), witness)
            host.mover.wish = self.sim.wish
