"""The composition root: what a node is made of, started in order and stopped in order (docs/daemon.md)."""

from __future__ import annotations

import random
import signal
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, NoReturn

import structlog
import trio

from gossip.effects import Event
from node import facts, forming, inforce, joining, layoutfile, notify, promises
from node.arrivals import Arrivals
from node.blocking import DedicatedThread, ThreadRunner
from node.changefeed import ChangeFeed
from node.config import Address, Config
from node.duty import open_duty
from node.facts import Health
from node.failover import Failover
from node.fetching import Fetcher
from node.founders import Founders, Noting
from node.health import HealthWatch, Watched
from node.history import History
from node.holdings import Holdings
from node.httpserver import HttpServer
from node.identity import DataDirectory
from node.inforce import InForce
from node.keyrings import Keyrings
from node.l1 import RedisStore
from node.lane import SearchLane
from node.layouts import Layouts, disk_sizes
from node.links import Links
from node.local import LocalNode
from node.members import Members
from node.mending import Mending
from node.meters import Meters
from node.mover import Mover
from node.offering import Offering
from node.operations import Operations
from node.orders import Orders
from node.peerlink import PeerLimits, PeerListener
from node.promises import Promises
from node.publishing import Publisher
from node.rebuilding import Rebuilding
from node.registers import open_register
from node.remote import coded, handlers
from node.repairer import Repairer
from node.routing import GossipCluster
from node.server import AppServer, Connection, ServerBounds
from node.snapshots import Snapshots
from node.status import READY, Parts, own_status
from node.steering import Steering
from node.supervisor import RestartPolicy, Supervisor
from node.web import make_http_server
from node.witnessing import Witnessing
from router.caching import Caches, CacheSizes
from router.coordinator import Coordinator
from router.errors import RequestError
from router.layout import Layout
from router.operating import Operating
from router.requests import Limits, Request
from storage.errors import DamagedError, ForeignDataError

log = structlog.get_logger(__name__)

STOP_S = 30.0
# Peers' writes under way get this long; their pulls wait at most a second by themselves.
PEER_GRACE_S = 2.0
# While it waits for others, systemd is asked for this much more time to start, again and again.
WAIT_MORE_S = 120.0
# Each shard that was recovered, or closed, earns this much more time from the service manager.
SHARD_S = 300.0
# What a restart of the actor cannot mend ends the process; systemd starts it again, and recovery decides.
POLICY = RestartPolicy(fatal=(DamagedError,))


class SupersededError(Exception):
    """Another process with this node's id has started since: this one must stop."""

    code = "superseded"


class Daemon:
    """One node. `run` returns when it has been told to stop and everything is on disk."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._name = config.node.name
        self._stop = trio.Event()
        self._served: list[trio.Event] = []
        self._starting = trio.CancelScope()
        self._handlers: dict[str, Any] = {}
        self._meters = Meters()

    def stop(self) -> None:
        self._stop.set()
        self._starting.cancel()

    async def run(self) -> None:
        """Raises StorageError, KeyringError, OSError, SupersededError or ActorGaveUpError: one line, what to do."""
        config = self._config
        directory = await trio.to_thread.run_sync(
            partial(DataDirectory.open, config.node.data_dir, name=self._name, cluster=config.cluster.id)
        )
        try:
            async with AsyncExitStack() as stack:
                await self._run(directory, notify.Notifier(), stack)
        finally:
            directory.close()

    async def _run(self, directory: DataDirectory, notifier: notify.Notifier, stack: AsyncExitStack) -> None:
        identity = directory.identity
        agent = joining.make_agent(self._config, directory)
        members = Members(agent, joining.node_fact(self._config, self._config.listen.host), agent.id)
        hello = joining.hello(self._config, identity.boots)
        listener = PeerListener(
            self._handlers,
            hello,
            listen=Address(self._config.listen.host, self._config.listen.peer_port),
            limits=self._peer_limits(),
            known=members,
            gossip=agent.serve_stream,
            bulk=self._give,
        )
        listener.closed = f"{self._name} is still starting"
        layout = await self._layout_on_disk(directory)
        address = await agent.bind((await listener.bind()).port)
        members.own = joining.node_fact(self._config, address.host)
        agent.set_fact(facts.NODE, facts.pack_node(members.own))
        self._hello = hello
        if layout is not None:
            agent.cluster.be_of(layout.cluster_id)
            hello.cluster_id = layout.cluster_id
            forming.tell(members, layout)
        history = History(members)
        try:
            async with trio.open_nursery() as nursery:
                supervisor = Supervisor(nursery, policy=POLICY)
                links = Links(members, hello, self._peer_limits(), supervisor)
                self._parts = Parts(
                    config=self._config,
                    boot=identity.boots,
                    members=members,
                    agent=agent,
                    supervisor=supervisor,
                    links=links,
                    server=self._app_server(),
                )
                if self._config.http.enabled:
                    self._parts.http = make_http_server(
                        lambda: self._parts, self._handle, self._limits(), self._meters, self._stop.is_set
                    )
                self._founding = forming.Founding()
                self._layouts = Layouts(
                    directory.path,
                    members,
                    links,
                    self._founding,
                    lambda: disk_sizes(directory.path, self._parts.shards),
                )
                self._operations = Operations(self._parts, history, self._keyrings(), self._layouts)
                nursery.start_soon(self._stop_on_signals)
                nursery.start_soon(notifier.run)
                nursery.start_soon(self._end_when_superseded)
                await nursery.start(listener.run)
                await nursery.start(self._serve, self._parts.server)
                if self._parts.http is not None:
                    await nursery.start(self._serve, self._parts.http)
                await supervisor.start(agent, name="gossip")
                with self._starting:
                    await self._become_ready(directory, layout, notifier, stack)
                    listener.closed = ""
                    self._say_ready(notifier)
                    await self._stop.wait()
                await self._wind_down(notifier, listener, history)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                # Also when it is an error that ends us: keepalives are over, and the watchdog must be, too.
                notifier.stopping("closing shards")
                if self._parts.holdings is not None:
                    await self._parts.holdings.close(
                        lambda shard: notifier.extend_timeout(SHARD_S, f"closed shard {shard}")
                    )
        log.info("stopped", node=self._name)

    async def _wind_down(self, notifier: notify.Notifier, listener: PeerListener, history: History) -> None:
        notifier.stopping()
        log.info("stopping", node=self._name)
        history.close()
        if self._parts.failover is not None:
            await self._parts.failover.hand_over_all()
        self._parts.server.stop()
        if self._parts.http is not None:
            self._parts.http.stop()
        listener.stop()
        await self._parts.agent.leave()
        with trio.move_on_after(STOP_S):
            for served in self._served:
                await served.wait()
            await listener.drained(PEER_GRACE_S)

    async def _stop_on_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                self.stop()

    async def _end_when_superseded(self) -> NoReturn:
        agent = self._parts.agent
        await agent.superseded.wait()
        raise SupersededError(
            f"another process runs as {self._name} with the node id {agent.id:016x} and was started later; this one stops. "
            "Was a data directory copied? Each node needs its own"
        )

    async def _give(self, stream: trio.abc.Stream) -> None:
        """A connection for files of snapshots."""
        if self._parts.snapshots is not None:
            await self._parts.snapshots.give(stream)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _keyrings(self) -> Keyrings:
        keyrings = Keyrings(self._parts.agent, self._parts.members, self._parts.links)
        self._handlers["keyring"] = keyrings.handle_peer
        return keyrings

    def _peer_limits(self) -> PeerLimits:
        limits = self._config.limits
        return PeerLimits(
            frame_bytes=limits.peer_frame_bytes,
            requests_in_flight=limits.peer_requests_in_flight,
            connections=limits.peer_connections,
        )

    async def _layout_on_disk(self, directory: DataDirectory) -> Layout | None:
        """What this node goes by from an earlier start. Raises StorageError."""
        cluster = self._config.cluster
        path = directory.path / "layout"
        layout = await trio.to_thread.run_sync(partial(layoutfile.load, path, cluster=cluster.id))
        if layout is not None and layout.shard_count != cluster.shard_count:
            raise ForeignDataError(
                f"{path} is of a cluster with {layout.shard_count} shards, cluster.shard_count is {cluster.shard_count}; "
                "the number is fixed for the life of the data"
            )
        return layout

    async def _become_ready(
        self,
        directory: DataDirectory,
        layout: Layout | None,
        notifier: notify.Notifier,
        stack: AsyncExitStack,
    ) -> None:
        parts = self._parts

        def say(text: str) -> None:
            if text != parts.state:
                log.info("waiting", state=text)
            parts.state = text
            notifier.extend_timeout(WAIT_MORE_S, text)

        if layout is None:
            path = directory.path / "layout"
            layout = await forming.form(parts.members, path, self._config.cluster.id, self._founding, say)
            parts.agent.cluster.be_of(layout.cluster_id)
            self._hello.cluster_id = layout.cluster_id
        parts.layout = layout
        parts.guard = forming.LayoutGuard(parts.members, layout)
        cluster = self._config.cluster.id
        placements, founders = await inforce.find(
            directory.path, cluster, layout, parts.members, parts.links, say
        )
        await self._take_part(directory, layout, placements, founders)
        parts.state = "recovering shards"
        notifier.status(parts.state)
        thread = await stack.enter_async_context(DedicatedThread("promises"))
        path = directory.path / "promises"
        kept = Promises(path, await thread(promises.load, path), thread)
        await parts.supervisor.start(kept, name="promises")
        parts.promises = kept
        path = directory.path / "witnessed"
        parts.witnessed = Promises(path, await thread(promises.load, path), thread)
        await parts.supervisor.start(parts.witnessed, name="witnessed")
        parts.holdings = Holdings(
            self._config, directory.path, directory.identity.node_id, kept, parts.supervisor, parts.links,
            lambda shard: self._others_vote(placements, shard), founders.leave,
        )  # fmt: skip
        parts.feed = ChangeFeed(
            self._name, directory.identity.boots, parts.links, parts.holdings.actors, len(placements)
        )
        parts.holdings.applied = parts.feed.applied
        await self._open_shards(placements, founders, notifier)
        await self._start(placements, founders, stack)

    def _others_vote(self, placements: InForce, shard: int) -> bool:
        """Whether others can stand in for our replica of that shard: somebody else leads it, or it is kept by several."""
        if self._parts.members.primary(shard) not in ("", self._name):
            return True
        layout = self._parts.layout
        several = layout is not None and layout.replication > 1 and len(layout.members) > 1
        return several and shard in placements and len(placements[shard].voters) > 1

    async def _take_part(
        self, directory: DataDirectory, layout: Layout, placements: InForce, founders: Founders
    ) -> None:
        """From here on this node has a part in what follows the layout. Raises StorageError, OSError."""
        parts = self._parts
        register = await open_register(
            directory.path, self._config.cluster.id, parts.members, parts.links, layout
        )
        assert parts.guard is not None
        register.watch += [parts.go_by, parts.guard.go_by]
        self._layouts.register = register
        self._handlers["register"] = register.handle_peer
        self._handlers["sizes"] = self._layouts.handle_sizes
        self._handlers["placements"] = lambda peer, body: [placements.pack(), sorted(founders.founded)]
        await parts.supervisor.start(register, name="register")

    def _say_ready(self, notifier: notify.Notifier) -> None:
        parts = self._parts
        parts.state = READY
        log.info(
            "ready",
            node=self._name,
            app_port=parts.server.port,
            http_port=parts.http.port if parts.http else None,
            shards=len(parts.shards),
            boot=parts.boot,
        )
        notifier.ready(f"serving {len(parts.shards)} shards")

    async def _open_shards(self, placements: InForce, founders: Founders, notifier: notify.Notifier) -> None:
        """Recovery, a few shards at a time; nothing is served before all are done. Those that lie here are opened, too, whoever
        is to hold them: what they have may be wanted."""
        holdings = self._parts.holdings
        assert holdings is not None
        there = holdings.on_disk()
        mine = {shard: placements[shard].voters for shard in founders.may(there)}
        mine |= {shard: () for shard in there if shard not in mine}

        async def open_one(shard: int, founders: Sequence[str]) -> None:
            await holdings.open(shard, founders)
            notifier.extend_timeout(SHARD_S, f"recovered {len(holdings.actors)} of {len(mine)} shards")

        async with trio.open_nursery() as nursery:
            for shard, voters in mine.items():
                nursery.start_soon(open_one, shard, voters)

    async def _start(self, placements: InForce, founders: Founders, stack: AsyncExitStack) -> None:
        """Everything that serves, in the order in which one needs the other."""
        parts, config = self._parts, self._config
        supervisor, links, holdings = parts.supervisor, parts.links, parts.holdings
        assert parts.layout is not None
        assert parts.promises is not None
        assert holdings is not None
        shards = holdings.actors
        lane_thread = await stack.enter_async_context(DedicatedThread("search"))
        lane = parts.lane = SearchLane(
            lane_thread, queue_max=config.limits.requests_in_flight, sizes=self._meters.batches.observe
        )
        await supervisor.start(lane, name="search-lane")
        named = {member.name for member in parts.layout.members}
        for name in sorted(named.union(*(one.voters for one in placements.values())) - {self._name}):
            await links.add(name)
        await supervisor.start(links, name="links")
        local = LocalNode(shards, holdings.replicators, lane, len(placements), self._meters.lookups.observe)
        self._handlers.update(handlers(local, shards, lambda: own_status(parts)))
        publisher = Publisher(parts.agent, shards, holdings.replicators, lane, lane_thread.statistics)
        holdings.changed = publisher.tell_shards
        failover = parts.failover = Failover(
            self._name, shards, parts.promises, links, on_change=lambda: self._lead(publisher)
        )
        looking = ThreadRunner("repair")
        repairer = parts.repairer = Repairer(self._name, shards, links, config.repair, looking)
        mending = Mending(self._name, shards, looking).handlers() | {"repair": repairer.on_repair}
        self._handlers |= {op: coded(handler) for op, handler in mending.items()}
        parts.members.watch.append(lambda event: self._hear_of_primaries(event, failover))
        await supervisor.start(failover, name="failover")
        witnessing = await self._start_witnessing(failover)
        steering = parts.steering = Steering(
            parts.members, links, shards, failover, repairer, witnessing.votes
        )
        self._handlers |= {"failover": coded(steering.handle_peer), "shard_end": steering.tell_end}
        snapshots = parts.snapshots = Snapshots(shards, config.node.data_dir / "snapshots")
        self._handlers |= {op: coded(handler) for op, handler in snapshots.handlers().items()}
        await supervisor.start(snapshots, name="snapshots")
        holdings.settle = lane.settle
        holdings.fetcher = Fetcher(bytes_per_s=config.limits.snapshot_bytes_per_s, settle=lane.settle)
        for shard in sorted(shards):
            await holdings.start(shard, failover)
        self._handlers["elect"] = failover.on_peer
        duty = parts.duty = await open_duty(config.node.data_dir / "duty", parts.members, failover)
        mover = parts.mover = Mover(
            holdings, failover, parts.members, links, lambda: parts.layout, duty, config.cluster
        )
        parts.members.watch.append(mover.hear)
        assert self._layouts.register is not None
        self._layouts.register.watch.append(lambda _layout: mover.wake())
        orders = parts.orders = Orders(
            parts.members, links, self._layouts, duty, failover, holdings, self._operations.shards
        )
        self._handlers |= Arrivals(self._name, holdings, failover).handlers() | orders.handlers()
        await supervisor.start(mover, name="mover")
        parts.offering = Offering(shards, links, ThreadRunner("tails"))
        await supervisor.start(parts.offering, name="offering")
        await supervisor.start(repairer, name="repairer")
        parts.rebuilding = Rebuilding(holdings, failover, self._name, links.connected)
        await supervisor.start(parts.rebuilding, name="rebuilding")
        cluster = parts.cluster = GossipCluster(
            parts.members, placements, local, links, shards, holdings.replicators, parts.flags, duty.rests
        )
        parts.coordinator = Coordinator(cluster, config.router, metric=config.storage.metric)
        await self._start_caches(parts.coordinator, cluster.shard_count, stack)
        device = Watched(Health.DEVICE, "the search lane", lane_thread.statistics)
        parts.health = publisher.health = HealthWatch(
            lambda: [*holdings.watched(), device], publisher.on_health
        )
        await supervisor.start(parts.health, name="health")
        await supervisor.start(publisher, name="publisher")
        publisher.tell_shards()
        # What was told before we listened.
        self._hear_of_primaries(None, failover)
        await supervisor.start(Noting(founders, parts.members, shards), name="founders")

    async def _start_witnessing(self, failover: Failover) -> Witnessing:
        parts = self._parts
        assert parts.witnessed is not None
        witnessing = parts.witnessing = Witnessing(self._name, parts.witnessed, failover, parts.links)
        await parts.supervisor.start(witnessing, name="witnessing")
        failover.witnessed = witnessing
        self._handlers |= {op: coded(handler) for op, handler in witnessing.handlers().items()}
        return witnessing

    async def _start_caches(self, coordinator: Coordinator, shard_count: int, stack: AsyncExitStack) -> None:
        parts, config = self._parts, self._config.cache
        assert parts.feed is not None
        if config.l1:
            thread = await stack.enter_async_context(DedicatedThread("redis"))
            parts.store = RedisStore(config, thread)
            await parts.supervisor.start(parts.store, name="l1")
        sizes = CacheSizes(l0_bytes=config.l0_bytes, dim=self._config.storage.dim)
        parts.caches = Caches(
            coordinator,
            parts.feed,
            parts.feed.changes,
            sizes,
            shard_count=shard_count,
            jitter=random.random,
            store=parts.store,
        )
        parts.feed.caches = parts.caches
        self._handlers["changes"] = parts.feed.handle_peer
        await parts.supervisor.start(parts.feed, name="changes")

    def _lead(self, publisher: Publisher) -> None:
        """A shard more, or one less."""
        publisher.tell_shards()
        if self._parts.mover is not None:
            self._parts.mover.wake()

    def _hear_of_primaries(self, event: Event | None, failover: Failover) -> None:
        """Who leads, for those who were away when it was told. event: None: whatever anybody has told."""
        if event is not None and event.kind == "fact" and event.key not in (facts.PRIMARIES, facts.NODE):
            return
        for known in self._parts.members.others():
            # Not before it has said its name: by that it is reached.
            if (event is None or known.id == event.id) and known.alive and known.fact is not None:
                for shard, epoch in known.led.items():
                    failover.hear(shard, epoch, known.name)

    def _limits(self) -> Limits:
        config = self._config
        return Limits(
            dim=config.storage.dim,
            metric=config.storage.metric,
            class_width=config.storage.class_width,
            items_max=config.limits.items_per_request,
            frame_bytes_max=config.limits.frame_bytes,
        )

    def _app_server(self) -> AppServer:
        config = self._config
        bounds = ServerBounds(
            connections_max=config.limits.connections,
            in_flight_max=config.limits.requests_in_flight,
            connection_in_flight_max=config.limits.requests_in_flight_per_connection,
        )
        return AppServer(
            self._handle, self._limits(), bounds, host=config.listen.host, port=config.listen.app_port
        )

    async def _serve(self, server: AppServer | HttpServer, *, task_status: trio.TaskStatus[int]) -> None:
        served = trio.Event()
        self._served.append(served)
        try:
            await server.run(task_status=task_status)
        finally:
            served.set()

    def _handle(self, request: Request, connection: Connection | None = None) -> Any | Awaitable[Any]:
        if isinstance(request, Operating):
            return self._operations.handle(request)
        parts = self._parts
        if parts.caches is None or parts.state != READY:
            raise RequestError("unavailable", f"{self._name} is not ready: {parts.state}; ask another node")
        return self._meters.ask(request, parts.caches.handle)
