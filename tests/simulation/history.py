"""Clients, and the checker that follows every operation on a simulated shard. `run(seed)` returns what went wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from random import Random
from typing import Any

from storage.records import Version
from tests.simulation.nemesis import Nemesis
from tests.simulation.shards import Host, Sim
from tests.simulation.stores import Rec

KEYS = [f"k{i}" for i in range(8)]
CLIENTS = 6
CLIENT_TIMEOUT_S = 3.0
# Where a primary may be forced: longer than those who do not know of it stay away.
LOG_KEEP_S = 15.0


@dataclass(slots=True, eq=False)
class Operation:
    key: str
    op: str
    value: Any
    write_id: int
    ack: str
    # When acknowledged: as what, which replica promised it, and under which voters.
    version: Version | None = None
    disk: int = 0
    # When a primary was forced: ids of the replicas that had it then, or, by one that did not know of that, when acknowledged.
    holders: frozenset[int] | None = None
    voters: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True)
class Result:
    violations: list[str]
    acknowledged: int
    epochs: int
    # Changes of the voters, replicas dismissed, and quorum writes acknowledged by voters of which the last placement has not all.
    changes: int
    dismissed: int
    outlived: int
    side_files: int
    quarantined: int
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
        if self.sim.now < self.sim.quiet_until:
            self.sim.at(self.sim.quiet_until, lambda: self.attempt(one, deadline))
            return
        host = self.sim.hosts[self.random.choice(self.sim.names)]
        leading = self.sim.leading
        if leading and self.random.random() < 0.8:
            host = self.random.choice(leading)
        replica = host.replica
        again = self.sim.now + self.random.uniform(0.02, 0.2)

        def done(what: str, version: Version | None, token: Version | None) -> None:
            if what == "ok" and one is self.pending:
                assert version is not None
                assert replica is not None
                one.version, one.disk, one.voters = version, replica.id, replica.placement.voters
                if self.sim.laws.overruled(replica.store.last.epoch):
                    note_holders(self.sim, [one])
                self.pending = None
                if one.ack == "quorum":
                    assert token is not None
                    self.read(one.key, version, token)
                self.sim.at(self.sim.now + self.random.uniform(0.0, 0.05), self.next)

        if replica is not None and host.awake:
            replica.write(one.op, one.key, one.value, one.write_id, one.ack, done)
        self.sim.at(max(again, self.sim.now + 0.02), lambda: self.attempt(one, deadline))

    def read(self, key: str, version: Version, token: Version) -> None:
        """With the session's token: who satisfies it must show the write or a later one."""
        host = self.sim.hosts[self.random.choice(self.sim.names)]
        if host.replica is None or not host.awake:
            return
        store = host.replica.store
        # Force breaks sessions, too: what they have seen may be gone for a while.
        if store.starts.matches(token, store.synced) and not self.sim.laws.overruled(token.epoch):
            row = store.table.get(key)
            if (row is None and version > store.floor) or (row is not None and row.version < version):
                self.sim.laws.broken(
                    "read-your-writes", f"{host.name} satisfies {tuple(token)} but shows {key} as {row}"
                )


def note_holders(sim: Sim, operations: list[Operation]) -> None:
    """Which disks have what was acknowledged: it may be lost with all of them, not before."""
    held: dict[tuple[int, Version], set[int]] = {}
    for host in sim.holding:
        files = host.disk.files
        assert files is not None
        for rec in itertools.chain(files.log, *files.sides.values()):
            held.setdefault((rec.write_id, rec.version), set()).add(files.id)
    for one in operations:
        if one.version is not None and one.holders is None:
            one.holders = frozenset(held.get((one.write_id, one.version), ()))


def run(
    seed: int,
    *,
    seconds: float = 60.0,
    count: int = 5,
    replicas: int = 3,
    moves: bool = True,
    force: bool | None = None,
    witness: bool = False,
    bugs: frozenset[str] = frozenset(),
) -> Result:
    """A shard of so many replicas on `count` hosts under trouble for so long, then healed, quiet, and judged. With a planted
    mistake the first broken law ends it. force: whether a primary may be forced; None: in each fourth seed."""
    sim = Sim(seed, count, replicas, bugs, witness=witness)
    history: list[Operation] = []
    clients = [Client(sim, history, number) for number in range(CLIENTS)]
    force = seed % 4 == 3 if force is None else force
    nemesis = Nemesis(sim, moves=moves, force=force)
    # By force a quorum's records may be cut, too: they are offered again as long as logs reach back to where they parted.
    sim.log_keep_s = LOG_KEEP_S if force else 0.0
    sim.on_force = lambda: note_holders(sim, history)
    while sim.now < seconds:
        sim.run(sim.now + 1.0)
        if bugs and sim.laws.violations:
            return _judge(sim, history, 0)
    nemesis.stopped = True
    sim.run(sim.now + 1.0)  # what it has begun comes to an end
    nemesis.heal(sim.hosts[sim.names[0]])
    for host in sim.hosts.values():
        host.full, host.fsync_slow = False, 1.0
        if not host.running:
            host.start()
        # Whom the last layout was told may have crashed before it told anybody.
        host.mover.wish = sim.wish
    sim.run(sim.now + 12)
    for client in clients:
        client.stopped, client.pending = True, None
    sides = sum(len(host.disk.files.sides) for host in sim.holding if host.disk.files is not None)
    sim.run(sim.now + 8)
    return _judge(sim, history, sides)


def _judge(sim: Sim, history: list[Operation], sides: int) -> Result:
    laws = sim.laws
    wrong = list(laws.violations)
    leaders = [host for host in sim.leading if host.replica is not None and host.replica.may_acknowledge()]
    if len(leaders) != 1:
        wrong.append(f"liveness: {len(leaders)} primaries at the end")
    acknowledged = [one for one in history if one.version is not None]
    last = sorted(laws.placements.items())
    changes = sum(one.votes != before.votes for (_, before), (_, one) in itertools.pairwise(last))
    voters = last[-1][1].voters if last else ()
    outlived = sum(one.ack == "quorum" and not set(one.voters) <= set(voters) for one in acknowledged)
    if leaders:
        wrong += _converged(sim, leaders[0]) + _lost(sim, leaders[0], acknowledged)
    return Result(
        wrong,
        len(acknowledged),
        len(laws.opened),
        changes,
        laws.dismissed,
        outlived,
        sides,
        len(laws.aside),
        sim.points,
    )


def _converged(sim: Sim, leader: Host) -> list[str]:
    """The placement is as wished, who is named holds the same, and nobody else holds anything."""
    wrong = []
    assert leader.replica is not None
    placement = leader.replica.placement
    if (
        set(placement.names) != set(sim.wish[1])
        or placement.learners
        or placement.witness_name != sim.wish[2]
    ):
        wrong.append(f"liveness: {placement} is not as wished, {sim.wish[1]}")
    if {host.name for host in sim.holding} != set(placement.holders):
        wrong.append(f"liveness: {[host.name for host in sim.holding]} hold it, not {placement.holders}")
    replicas = [host.replica for host in sim.holding if host.replica is not None]
    if any(one.placement != placement for one in replicas):
        wrong.append("convergence: the placements differ")
    if any(not one.placement.is_voter(*one.who) for one in replicas):
        wrong.append("liveness: a rebuilt replica was never admitted")
    logs = {tuple((r.epoch, r.sequence, r.version) for r in one.store.log) for one in replicas}
    if len(logs) > 1:
        wrong.append("convergence: the logs differ")
    if len({tuple(sorted(one.store.table.items())) for one in replicas}) > 1:
        wrong.append("convergence: the tables differ")
    if any(one.files.sides for one in replicas):
        wrong.append("liveness: a tail was never taken back")
    return wrong


def _lost(sim: Sim, leader: Host, acknowledged: list[Operation]) -> list[str]:
    """What the whole log says (the replicas forget of it, the model does not) against the table and the clients' memory."""
    wrong = []
    assert leader.replica is not None
    log, table, laws = leader.replica.store.log, leader.replica.store.table, sim.laws
    newest: dict[str, Rec] = {}
    for rec in log:
        if rec.op in ("put", "delete") and (rec.key not in newest or rec.version > newest[rec.key].version):
            newest[rec.key] = rec
    for key in KEYS:
        row, last = table.get(key), newest.get(key)
        shown = None if row is None else row.value
        if shown != (last.value if last is not None and last.op == "put" else None):
            kind = "deletes-stay" if shown is not None else "lost"
            wrong.append(f"{kind}: the log says {last}, the table says {row}")
    there = {(rec.write_id, rec.version) for rec in log} | laws.superseded
    for one in acknowledged:
        if one.write_id in laws.aside or (one.ack == "primary" and one.disk in laws.destroyed):
            continue
        if one.holders is not None and one.holders <= laws.destroyed:
            continue
        if (one.write_id, one.version) not in there:
            wrong.append(f"lost: {one.op} {one.key} {tuple(one.version or ())} acknowledged as {one.ack}")
    return wrong
