"""Replicas of one shard that elect, write and follow, in one process, on real disks: alone, beside voters that are not there
and say yes to everything, or three of them over real loopback links."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import trio

from node import promises
from node.blocking import DedicatedThread, InlineRunner, ThreadRunner
from node.config import Address, RepairConfig
from node.election import ElectionConfig
from node.failover import Failover
from node.local import LocalNode
from node.mending import Mending
from node.peerlink import PeerGoneError, PeerLink, PeerListener
from node.promises import Promises
from node.pulls import Answer, Pull
from node.remote import RemoteNode, coded, handlers
from node.repairer import Repairer
from node.replicator import Replicator
from node.shard import ShardActor
from router.layout import Placement
from router.ports import Change, Node, NodeGoneError
from storage.config import StorageConfig
from storage.errors import DamagedError, LogGoneError
from storage.records import EMPTY, Fingerprint, Kind, Operation
from storage.replica import Replica
from tests.unit.node.peers import ANY, hello

DIM = 8
CONFIG = StorageConfig(
    dim=DIM, class_width=64, engine="exact", wal_segment_bytes=1 << 16, wal_segment_bytes_max=0
)
# A start or a restart costs a lease; only the tests of leases themselves need real ones.
BRISK = ElectionConfig(lease_s=0.2, rank_s=0.02, retry_min_s=0.01, retry_max_s=0.05, candidacy_s=0.1)
# Replica ids of voters that are not there.
ABSENT = {"a": 0xA, "b": 0xB, "c": 0xC}


def change(id_: int, fill: float = 1.0, classes: tuple[int, ...] = ()) -> Change:
    return Change(Operation.PUT, Kind.ITEM, id_, np.full(DIM, fill, np.float16).tobytes(), classes, b"\x80")


class Clock:
    def __init__(self) -> None:
        self.ns = 10**18

    def __call__(self) -> int:
        return self.ns


class Willing:
    """Links to voters that are not there: each would promise, and promises, whatever it is asked."""

    def __init__(self, names: Sequence[str], ids: Mapping[str, int]) -> None:
        self.names, self.ids = names, {**ABSENT, **ids}
        self.failover: Failover | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> _WillingLink:
        return _WillingLink(self, name)


class _WillingLink:
    def __init__(self, links: Willing, name: str) -> None:
        self._links, self._name = links, name

    async def call(self, op: str, body: Any, timeout_s: float) -> Any:
        await trio.lowlevel.checkpoint()
        if op != "elect":
            raise PeerGoneError(self._name, "it is not there", sent=False)
        yes = {"ask": "would", "stand": "promise"}
        answers = [
            [shard, self._links.ids[self._name], yes[kind], fields[0]]
            for shard, _, kind, *fields in body
            if kind in yes
        ]
        assert self._links.failover is not None
        self._links.failover.on_peer(self._name, answers)


def opened(path: Path, name: str) -> Replica:
    path.mkdir(parents=True, exist_ok=True)
    return Replica.open(path / "shard-000", shard=0, node_id=name, config=CONFIG)


async def promised_by(replica: Replica, kept: Promises) -> tuple[int, bool]:
    """As the daemon does it when it starts."""
    promised = kept.of(replica.shard, replica.replica_id)
    if promised is not None:
        return promised, True
    replica.renew_replica_id()
    await kept.keep(replica.shard, replica.replica_id, 0)
    return 0, False


@asynccontextmanager
async def running(
    path: Path,
    voters: tuple[str, ...] = ("a",),
    clock: Callable[[], int] | None = None,
    *,
    name: str = "a",
    lead: bool = True,
    keep: bool = False,
    election: ElectionConfig = BRISK,
    ids: Mapping[str, int] = {},  # read only
) -> AsyncIterator[ShardActor]:
    """One replica with its own election; the other `voters` agree to everything. lead: not before it does. keep: closes the
    replica at the end, else leaves what a crash would. ids: replica ids of the others, where a test has them."""
    replica = opened(path, name)
    kept = Promises(path / "promises", promises.load(path / "promises"), ThreadRunner("promises"))
    links = Willing([one for one in voters if one != name], ids)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(kept.run)
            promised, owes = await promised_by(replica, kept)
            actor = ShardActor(
                replica,
                voters,
                name=name,
                promised=promised,
                owes=owes,
                log_runner=ThreadRunner("log"),
                maintenance_runner=InlineRunner(),
                queue_max=100,
                election=election,
                random=Random(1),
                now_ns=clock or Clock(),
            )
            await nursery.start(actor.run)
            links.failover = Failover(name, {0: actor}, kept, links)  # type: ignore[arg-type]
            await nursery.start(links.failover.run)
            if lead:
                await leading(actor)
            yield actor
            nursery.cancel_scope.cancel()
    finally:
        (replica.close if keep else replica.abort)()


async def leading(actor: ShardActor, within_s: float = 5.0) -> None:
    with trio.fail_after(within_s):
        while not actor.leads:
            await actor.changed()


async def pull(
    actor: ShardActor,
    follower: str,
    named: Fingerprint,
    *,
    wait_s: float = 0.0,
    max_bytes: int = 1 << 20,
    replica: int | None = None,
    epoch: int | None = None,
    promised: int = 0,
    echo: float | None = None,
) -> Answer:
    """A pull by a voter that is not there, which follows the present epoch and has just heard its primary."""
    assert actor.reign is not None
    asked = Pull(
        actor.shard,
        ABSENT[follower] if replica is None else replica,
        actor.reign.epoch if epoch is None else epoch,
        promised,
        named,
        trio.current_time() if echo is None else echo,
        max_bytes,
        int(wait_s * 1000),
    )
    return await actor.serve_pull(follower, asked)


async def keep_lease(actor: ShardActor, follower: str) -> None:
    """That voter hears the primary, and says so, and has nothing yet."""
    while actor.leads:
        with suppress(LogGoneError):
            await pull(actor, follower, EMPTY, max_bytes=1)
        await trio.sleep(BRISK.lease_s / 10)


@asynccontextmanager
async def leased(actor: ShardActor, follower: str) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_lease, actor, follower)
        yield
        nursery.cancel_scope.cancel()


# -- several nodes ------------------------------------------------------------------------------------------------------


class Site:
    """One node of a `Trio`: its replica of the shard, its promises, its election, its stream."""

    def __init__(self, world: Trio, name: str) -> None:
        self.world, self.name = world, name
        self.path = world.path / name
        self.links: dict[str, PeerLink] = {}
        self._wires: dict[str, trio.CancelScope] = {}
        self.actor: ShardActor
        self.failover: Failover
        self.promises: Promises
        self.replicator: Replicator
        self.repairer: Repairer
        self.local: LocalNode
        self.remote: dict[str, RemoteNode] = {}
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        # Damage ends a node's process; only where a test brings it about.
        self.mortal = False

    @property
    def leads(self) -> bool:
        return self.actor.leads

    async def start(self) -> None:
        await self.world.nursery.start(self._run)

    async def stop(self) -> None:
        """As a crash: nothing is handed over, nothing is written."""
        self._scope.cancel()
        await self._stopped.wait()

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        self._scope, self._stopped = trio.CancelScope(), trio.Event()
        replica = opened(self.path, self.name)
        file = self.path / "promises"
        try:
            with self._scope:
                async with (
                    DedicatedThread("log") as log_thread,
                    DedicatedThread("promises") as thread,
                    trio.open_nursery() as nursery,
                ):
                    self.promises = Promises(file, promises.load(file), thread)
                    await nursery.start(self.promises.run)
                    promised, owes = await promised_by(replica, self.promises)
                    self.actor = actor = ShardActor(
                        replica, self.world.names, name=self.name, promised=promised, owes=owes,
                        log_runner=log_thread, maintenance_runner=InlineRunner(), queue_max=1_000,
                        random=Random(f"{self.name} {self.world.seed}"),
                    )  # fmt: skip
                    await nursery.start(actor.run)
                    self.failover = Failover(self.name, {0: actor}, self.promises, self.links)  # type: ignore[arg-type]
                    self.replicator = Replicator(actor, self.links, Random(self.name))  # type: ignore[arg-type]
                    self.local = LocalNode({0: actor}, {0: self.replicator}, None, 1)  # type: ignore[arg-type]
                    looking = ThreadRunner("repair")
                    self.repairer = Repairer(
                        self.name, {0: actor}, self.links, RepairConfig(every_s=0), looking  # type: ignore[arg-type]
                    )  # fmt: skip
                    answers = {
                        **{
                            op: coded(handler)
                            for op, handler in Mending(self.name, {0: actor}, looking).handlers().items()
                        },
                        **handlers(self.local, {0: actor}, dict),
                        "elect": lambda peer, body: self.failover.on_peer(peer, body),
                    }
                    listener = PeerListener(answers, hello(self.name), listen=ANY)
                    self.world.addresses[self.name] = await nursery.start(listener.run)
                    await nursery.start(self.failover.run)
                    await nursery.start(self.replicator.run)
                    task_status.started()
                    await trio.sleep_forever()
        except* DamagedError:
            if not self.mortal:
                raise
        finally:
            replica.abort()
            self._stopped.set()

    async def wire(self, to: str) -> None:
        """A link to that node, kept up until `unwire`."""
        if to not in self.links:
            await self.world.nursery.start(self._keep_wire, to)

    async def _keep_wire(self, to: str, *, task_status: trio.TaskStatus[None]) -> None:
        link = PeerLink(lambda: self.world.addresses.get(to), hello(self.name), jitter=Random(to))
        with trio.CancelScope() as scope:
            self._wires[to], self.links[to] = scope, link
            self.remote[to] = RemoteNode(to, link)
            task_status.started()
            await link.run()

    def unwire(self, to: str) -> None:
        self.links.pop(to, None)
        self.remote.pop(to, None)
        if to in self._wires:
            self._wires.pop(to).cancel()


class View:
    """The cluster as a coordinator on one of its nodes sees it. Implements `router.ports.Cluster`."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.local, self.shard_count = site.name, 1

    def node(self, name: str) -> Node:
        if name == self.local:
            return self._site.local
        remote = self._site.remote.get(name)
        if remote is None:
            raise NodeGoneError(name, sent=False)
        return remote

    def placement(self, shard: int) -> Placement:
        return Placement(shard=shard, epoch=1, voters=self._site.world.names)

    def primary(self, shard: int) -> str:
        return self._site.actor.primary or self._site.world.names[0]

    def alive(self, name: str) -> bool:
        return name == self.local or (name in self._site.links and self._site.links[name].connected)

    def avoid(self, name: str) -> bool:
        return False

    def lags_ms(self, name: str) -> Mapping[int, int]:
        return {}


class Trio:
    """Three nodes and the wires between them."""

    names = ("a", "b", "c")

    def __init__(self, path: Path, nursery: trio.Nursery, seed: int) -> None:
        self.path, self.nursery, self.seed = path, nursery, seed
        self.addresses: dict[str, Address] = {}
        self.sites = {name: Site(self, name) for name in self.names}

    def __getitem__(self, name: str) -> Site:
        return self.sites[name]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites.values())

    async def join(self, *names: str) -> None:
        """Wires between these and all others."""
        for one in names or self.names:
            for other in self.names:
                if one != other:
                    await self.sites[one].wire(other)
                    await self.sites[other].wire(one)

    def cut(self, name: str) -> None:
        """No byte goes to or from that node any more."""
        for other in self.names:
            if other != name:
                self.sites[name].unwire(other)
                self.sites[other].unwire(name)

    def leaders(self) -> list[Site]:
        return [site for site in self if site.leads]

    async def leader(self, within_s: float = 5.0, *, among: Sequence[str] = names) -> Site:
        """Waits for one that leads with a lease."""
        with trio.fail_after(within_s):
            while True:
                for site in self:
                    now = trio.current_time()
                    if site.name in among and site.leads and site.actor.election.may_acknowledge(now):
                        return site
                await trio.sleep(0.01)

    async def level(self, within_s: float = 5.0) -> None:
        """Waits until all logs end alike."""
        with trio.fail_after(within_s):
            while len({site.actor.replica.position for site in self}) > 1:
                await trio.sleep(0.01)


@asynccontextmanager
async def three(path: Path, seed: int = 1) -> AsyncIterator[Trio]:
    """Three wired nodes, one of which leads; a test that takes longer than 60 s has failed."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            world = Trio(path, nursery, seed)
            for site in world:
                await site.start()
            await world.join()
            await world.leader()
            yield world
            nursery.cancel_scope.cancel()
