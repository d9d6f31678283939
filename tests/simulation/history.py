"""Clients, trouble, and the checker that follows every operation on a simulated shard. `run(seed)` returns what went wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from storage.records import Version
from tests.simulation.shards import Host, Sim

KEYS = [f"k{i}" for i in range(8)]
CLIENTS = 6
CLIENT_TIMEOUT_S = 3.0


@dataclass(slots=True, eq=False)
class Operation:
    key: str
    op: str
    value: Any
    write_id: int
    ack: str
    # When acknowledged: as what, and which disk promised it.
    version: Version | None = None
    disk: int = 0
    host: str = ""


@dataclass(slots=True)
class Result:
    violations: list[str]
    acknowledged: int
    epochs: int
    side_files: int
    quarantined: int = 0
    points: dict[str, int] = field(default_factory=dict)


class Client:
    """Writes one operation after the other, to whoever takes it, and reads its own writes anywhere."""

    def __init__(self, sim: Sim, history: list[Operation], number: int) -> None:
        self.sim, self.history, self.random = sim, history, Random(sim.seed * 1_000 + number)
        self.stopped = False
        self.number = number
        self.pending: Operation | None = None
        sim.at(sim.now + self.random.random(), self.next)

    def next(self) -> None:
        if self.stopped:
            return
        op = "delete" if self.random.random() < 0.3 else "put"
        ack = "quorum" if self.random.random() < 0.6 else "primary"
        write_id = self.random.getrandbits(60) + 1
        self.pending = Operation(
            self.random.choice(KEYS), op, write_id if op == "put" else None, write_id, ack
        )
        self.history.append(self.pending)
        self.attempt(self.pending, self.sim.now + CLIENT_TIMEOUT_S)

    def attempt(self, one: Operation, deadline: float) -> None:
        if one is not self.pending:
            return
        if self.sim.now > deadline:
            self.sim.at(self.sim.now + 0.05, self.next)
            return
        host = self.sim.hosts[self.random.choice(self.sim.names)]
        leading = [one for one in self.sim.hosts.values() if one.leads and one.running]
        if leading and self.random.random() < 0.8:
            host = self.random.choice(leading)
        again = self.sim.now + self.random.uniform(0.02, 0.2)

        def done(what: str, version: Version | None, token: Version | None) -> None:
            if what == "ok" and one is self.pending:
                assert version is not None
                one.version, one.disk, one.host = version, host.disk.token, host.name
                self.pending = None
                if one.ack == "quorum":
                    assert token is not None
                    self.read(one.key, version, token)
                self.sim.at(self.sim.now + self.random.uniform(0.0, 0.05), self.next)

        host.write(one.op, one.key, one.value, one.write_id, one.ack, done)
        self.sim.at(max(again, self.sim.now + 0.02), lambda: self.attempt(one, deadline))

    def read(self, key: str, version: Version, token: Version) -> None:
        """With the session's token: who satisfies it must show the write or a later one."""
        host = self.sim.hosts[self.random.choice(self.sim.names)]
        if not host.running or self.sim.now < host.paused_until:
            return
        if host.starts.matches(token, host.synced):
            row = host.table.get(key)
            if (row is None and version > host.floor) or (row is not None and row.version < version):
                self.sim.violations.append(
                    f"read-your-writes: {host.name} satisfies {tuple(token)} but shows {key} as {row}"
                )


class Nemesis:
    """Trouble at random times; never so much that the promises of docs/ownership.md do not hold any more: at most one replica
    is on a new disk, and a majority keeps its disks."""

    def __init__(self, sim: Sim) -> None:
        self.sim, self.random = sim, Random(sim.seed + 7)
        self.stopped = False
        sim.at(sim.now + 3, self.act)
        sim.danger = self.danger

    def danger(self, host: Host, point: str) -> None:
        """Where something has just been promised, trouble comes more often than by chance."""
        if (
            self.stopped
            or self.sim.now < 3
            or not host.running
            or self.random.random() > DANGER.get(point, 0.1)
        ):
            return
        if point == "side-file-gone":
            host = next((one for one in self.sim.hosts.values() if one.leads), host)
            self.lose_disk(host)
            return
        if point == "promised" and self.random.random() < 0.5:
            self.forget(host)
            return
        getattr(self, self.random.choice(["crash", "crash", "isolate", "cut_link", "pause"]))(host)

    def forget(self, host: Host) -> None:
        """Who has just promised starts again, and the others cannot hear each other: what it promised is its disk's to know."""
        others = {name for name in self.sim.names if name != host.name}

        def strike() -> None:
            if host.running:
                self.sim.network.cut = lambda a, b: a in others and b in others
                host.crash()
                self.sim.at(self.sim.now + 0.02, lambda: self.restart(host))

        self.sim.at(self.sim.now + self.random.uniform(0.001, 0.006), strike)

    def act(self) -> None:
        if self.stopped:
            return
        self.sim.at(self.sim.now + self.random.uniform(0.1, 1.2), self.act)
        host = self.sim.hosts[self.random.choice(self.sim.names)]
        leader = [one for one in self.sim.hosts.values() if one.leads]
        if leader and self.random.random() < 0.4:
            host = leader[0]
        getattr(self, self.random.choice(TROUBLES))(host)

    def crash(self, host: Host) -> None:
        if host.running:
            host.crash()
            self.sim.at(self.sim.now + self.random.choice([0.05, 0.3, 2.0]), lambda: self.restart(host))

    def restart(self, host: Host) -> None:
        if not host.running:
            host.start()

    def lose_disk(self, host: Host) -> None:
        others = [one for one in self.sim.hosts.values() if one is not host]
        clean = all(one.running and not one.disk.rebuilding and not one.disk.sides for one in others)
        if host.running and not host.disk.rebuilding and clean:
            host.lose_disk()
            self.sim.at(self.sim.now + 0.5, lambda: self.restart(host))

    def pause(self, host: Host) -> None:
        if host.running:
            host.pause(self.random.choice([0.2, 0.7, 1.5, 3.0]))

    def isolate(self, host: Host) -> None:
        one_way = self.random.random()
        name = host.name
        if one_way < 0.25:
            self.sim.network.cut = lambda a, b: a == name
        elif one_way < 0.5:
            self.sim.network.cut = lambda a, b: b == name
        else:
            self.sim.network.cut = lambda a, b: (a == name) != (b == name)

    def cut_link(self, host: Host) -> None:
        pair = {host.name, self.random.choice([name for name in self.sim.names if name != host.name])}
        self.sim.network.cut = lambda a, b: {a, b} == pair

    def ambush(self, host: Host) -> None:
        """One replica falls behind; another loses its disk; then the primary, which has everything, is away for a while."""
        leader = next((one for one in self.sim.hosts.values() if one.leads), None)
        if leader is None:
            return
        behind, bare = self.random.sample([one for one in self.sim.hosts.values() if one is not leader], 2)
        self.sim.network.cut = lambda a, b: behind.name in (a, b)

        def strike() -> None:
            self.lose_disk(bare)
            self.crash(leader)
            self.sim.network.cut = None

        self.sim.at(self.sim.now + self.random.uniform(0.1, 0.4), strike)

    def heal(self, host: Host) -> None:
        self.sim.network.cut = None
        self.sim.network.loss, self.sim.network.slow = 0.0, 1.0

    def weather(self, host: Host) -> None:
        self.sim.network.loss = self.random.choice([0.0, 0.05, 0.3])
        self.sim.network.slow = self.random.choice([1.0, 1.0, 10.0, 60.0])

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

    def hand_over(self, host: Host) -> None:
        """A planned one: writes stop, the successor becomes level, and stands."""
        if not host.running or not host.leads or self.sim.now < host.paused_until:
            return
        level = [n for n, at in host.positions.items() if at == len(host.log) == host.synced]
        fit = [n for n in level if not self.sim.hosts[n].disk.rebuilding]
        if fit:
            host.election.resign()
            host._do(host.election.hand_over(self.random.choice(fit), host.clock))


# How often trouble follows a moment at which something was promised.
DANGER = {"acknowledged": 0.01, "streamed": 0.005, "promised": 0.2, "opened": 0.2, "side-file-gone": 0.3}
TROUBLES = [
    *(
        "crash",
        "crash",
        "crash",
        "cut_link",
        "cut_link",
        "ambush",
        "lose_disk",
        "pause",
        "isolate",
        "isolate",
        "heal",
        "heal",
    ),
    *("weather", "fill_disk", "skew", "slow_disk", "slow_disk", "hand_over"),
]


def run(seed: int, *, seconds: float = 60.0, count: int = 3, bugs: frozenset[str] = frozenset()) -> Result:
    """A shard under trouble for so long, then healed, quiet, and judged."""
    sim = Sim(seed, count, bugs)
    history: list[Operation] = []
    destroyed: set[int] = set()
    clients = [Client(sim, history, number) for number in range(CLIENTS)]
    nemesis = Nemesis(sim)
    tokens = {host.disk.token for host in sim.hosts.values()}
    end = seconds
    while sim.now < end:
        sim.run(sim.now + 0.25)
        tokens |= {host.disk.token for host in sim.hosts.values()}
    nemesis.stopped = True
    nemesis.heal(sim.hosts[sim.names[0]])
    for host in sim.hosts.values():
        host.full, host.fsync_slow = False, 1.0
        if not host.running:
            host.start()
    sim.run(sim.now + 8)
    for client in clients:
        client.stopped, client.pending = True, None
    sides = sum(len(host.disk.sides) for host in sim.hosts.values())
    sim.run(sim.now + 8)
    destroyed = tokens - {host.disk.token for host in sim.hosts.values()}
    return _judge(sim, history, destroyed, sides)


def _judge(sim: Sim, history: list[Operation], destroyed: set[int], sides: int) -> Result:
    wrong = list(sim.violations)
    hosts = list(sim.hosts.values())
    leaders = [host for host in hosts if host.leads and host.election.may_acknowledge(host.clock)]
    if len(leaders) != 1:
        wrong.append(f"liveness: {len(leaders)} primaries at the end")
    logs = {tuple((r.epoch, r.sequence, r.version) for r in host.log) for host in hosts}
    if len(logs) > 1:
        wrong.append("convergence: the logs differ")
    if len({tuple(sorted(host.table.items())) for host in hosts}) > 1:
        wrong.append("convergence: the tables differ")
    if any(host.disk.sides for host in hosts):
        wrong.append("liveness: a tail was never taken back")
    if any(host.disk.rebuilding for host in hosts):
        wrong.append("liveness: a rebuilt replica was never admitted")
    # The model never drops old records, so the log of everybody holds all that ever was settled.
    newest: dict[str, Any] = {}
    for rec in hosts[0].log:
        if rec.op in ("put", "delete") and (rec.key not in newest or rec.version > newest[rec.key].version):
            newest[rec.key] = rec
    for key in KEYS:
        row, rec = hosts[0].table.get(key), newest.get(key)
        shown = None if row is None else row.value
        if shown != (rec.value if rec is not None and rec.op == "put" else None):
            kind = "deletes-stay" if shown is not None else "lost"
            wrong.append(f"{kind}: the log says {rec}, the table says {row}")
    aside = {rec.write_id for host in hosts for rec in host.disk.quarantine}
    acknowledged = [one for one in history if one.version is not None]
    there = {(rec.write_id, rec.version) for rec in hosts[0].log} | sim.superseded
    for one in acknowledged:
        if one.write_id in aside or (one.ack == "primary" and one.disk in destroyed):
            continue
        if (one.write_id, one.version) not in there:
            wrong.append(f"lost: {one.op} {one.key} {tuple(one.version or ())} acknowledged as {one.ack}")
    return Result(wrong, len(acknowledged), len(sim.opened), sides, len(aside), sim.points)
