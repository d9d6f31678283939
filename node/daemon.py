"""The composition root: what a node is made of, started in order and stopped in order (docs/daemon.md)."""

from __future__ import annotations

import random
import signal
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import structlog
import trio

from node import facts, forming, joining, layoutfile, notify, promises
from node.blocking import DedicatedThread, ThreadRunner
from node.config import Address, Config
from node.facts import Health
from node.failover import Failover
from node.fetching import Fetcher
from node.health import HealthWatch, Watched
from node.history import History
from node.identity import DataDirectory, Identity
from node.keyrings import Keyrings
from node.lane import SearchLane
from node.links import Links
from node.local import LocalNode
from node.members import Members
from node.offering import Offering
from node.operations import Operations
from node.peerlink import Hello, PeerLimits, PeerListener
from node.promises import Promises
from node.publishing import Publisher
from node.remote import coded, handlers
from node.replicator import Replicator
from node.routing import GossipCluster
from node.server import AppServer, Connection, ServerBounds
from node.shard import ShardActor
from node.snapshots import Snapshots
from node.status import READY, Parts, own_status
from node.steering import Steering
from node.supervisor import RestartPolicy, Supervisor
from router.coordinator import Coordinator, RouterConfig
from router.errors import RequestError
from router.layout import Layout, Placement
from router.operating import Operating
from router.requests import Limits, Request
from storage.config import StorageConfig
from storage.errors import DamagedError, ForeignDataError
from storage.installing import Installing
from storage.replica import Replica

log = structlog.get_logger(__name__)

OPENING_AT_ONCE = 2
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
        self._served = trio.Event()
        self._starting = trio.CancelScope()
        self._handlers: dict[str, Any] = {}

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
        hello = self._hello(identity)
        listener = PeerListener(
            self._handlers,
            hello,
            listen=Address(self._config.listen.host, self._config.listen.peer_port),
            limits=self._peer_limits(),
            known=members,
            gossip=agent.serve_stream,
        )
        listener.closed = f"{self._name} is still starting"
        layout = await self._layout_on_disk(directory)
        address = await agent.bind((await listener.bind()).port)
        members.own = joining.node_fact(self._config, address.host)
        agent.set_fact(facts.NODE, facts.pack_node(members.own))
        if layout is not None:
            forming.tell(members, layout)
        history = History(members)
        shards: dict[int, ShardActor] = {}
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
                    shards=shards,
                )
                self._operations = Operations(self._parts, history, self._keyrings())
                nursery.start_soon(self._stop_on_signals)
                nursery.start_soon(notifier.run)
                nursery.start_soon(self._end_when_superseded)
                await nursery.start(listener.run)
                await nursery.start(self._serve)
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
                await _close(shards, notifier)
        log.info("stopped", node=self._name)

    async def _wind_down(self, notifier: notify.Notifier, listener: PeerListener, history: History) -> None:
        notifier.stopping()
        log.info("stopping", node=self._name)
        history.close()
        if self._parts.failover is not None:
            await self._parts.failover.hand_over_all()
        self._parts.server.stop()
        listener.stop()
        await self._parts.agent.leave()
        with trio.move_on_after(STOP_S):
            await self._served.wait()
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

    # -- parts ----------------------------------------------------------------------------------------------------

    def _keyrings(self) -> Keyrings:
        keyrings = Keyrings(self._parts.agent, self._parts.members, self._parts.links)
        self._handlers["keyring"] = keyrings.handle_peer
        return keyrings

    def _hello(self, identity: Identity) -> Hello:
        config = self._config
        return Hello(
            cluster_id=config.cluster.id,
            node=self._name,
            shard_count=config.cluster.shard_count,
            dim=config.storage.dim,
            metric=config.storage.metric,
            class_width=config.storage.class_width,
            boot=identity.boots,
        )

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
            layout = await forming.form(parts.members, path, self._config.cluster.id, say)
        parts.layout = layout
        parts.guard = forming.LayoutGuard(parts.members, layout)
        parts.state = "recovering shards"
        notifier.status(parts.state)
        placements = {one.shard: one for one in layout.placements()}
        thread = await stack.enter_async_context(DedicatedThread("promises"))
        path = directory.path / "promises"
        parts.promises = Promises(path, await thread(promises.load, path), thread)
        await parts.supervisor.start(parts.promises, name="promises")
        logs = await self._open_shards(directory, placements, notifier, stack)
        await self._start(placements, logs, stack)

    def _say_ready(self, notifier: notify.Notifier) -> None:
        parts = self._parts
        parts.state = READY
        log.info(
            "ready", node=self._name, app_port=parts.server.port, shards=len(parts.shards), boot=parts.boot
        )
        notifier.ready(f"serving {len(parts.shards)} shards")

    async def _open_shards(
        self,
        directory: DataDirectory,
        placements: dict[int, Placement],
        notifier: notify.Notifier,
        stack: AsyncExitStack,
    ) -> dict[int, DedicatedThread]:
        """Recovery, a few shards at a time; nothing is served before all are done. Returns the log threads."""
        limit = trio.CapacityLimiter(OPENING_AT_ONCE)
        maintenance = ThreadRunner("maintenance")
        logs: dict[int, DedicatedThread] = {}
        mine = [one for one in placements.values() if self._name in one.voters]

        async def open_one(placement: Placement) -> None:
            shard = placement.shard
            replica = await trio.to_thread.run_sync(
                partial(
                    _open,
                    directory.path / f"shard-{shard:03}",
                    shard=shard,
                    node_id=directory.identity.node_id,
                    config=self._config.storage,
                ),
                limiter=limit,
            )
            promised, owes = await self._promised(replica)
            logs[shard] = await stack.enter_async_context(DedicatedThread(f"wal-{shard}"))
            self._parts.shards[shard] = ShardActor(
                replica,
                placement.voters,
                name=self._name,
                promised=promised,
                owes=owes,
                log_runner=logs[shard],
                maintenance_runner=maintenance,
                queue_max=self._config.limits.write_queue,
            )
            log.info("recovered", shard=shard, **asdict(replica.recovery))
            notifier.extend_timeout(SHARD_S, f"recovered {len(self._parts.shards)} of {len(mine)} shards")

        async with trio.open_nursery() as nursery:
            for placement in mine:
                nursery.start_soon(open_one, placement)
        return logs

    async def _promised(self, replica: Replica) -> tuple[int, bool]:
        """What this replica has promised, and whether it may be bound by a lease. Of one that cannot know what it promised, a new
        id is made: it votes again when a primary has let it in under that."""
        kept = self._parts.promises
        assert kept is not None
        promised = kept.of(replica.shard, replica.replica_id)
        if promised is not None:
            return promised, True
        if replica.position.sequence:
            log.warning("promises lost", shard=replica.shard)
            await trio.to_thread.run_sync(replica.renew_replica_id)
        await kept.keep(replica.shard, replica.replica_id, 0)
        return 0, False

    async def _start(
        self, placements: dict[int, Placement], logs: dict[int, DedicatedThread], stack: AsyncExitStack
    ) -> None:
        """Everything that serves, in the order in which one needs the other."""
        parts, config = self._parts, self._config
        supervisor, links, shards = parts.supervisor, parts.links, parts.shards
        assert parts.layout is not None
        lane_thread = await stack.enter_async_context(DedicatedThread("search"))
        lane = parts.lane = SearchLane(lane_thread, queue_max=config.limits.requests_in_flight)
        await supervisor.start(lane, name="search-lane")
        for shard, actor in sorted(shards.items()):
            await supervisor.start(actor, name=f"shard-{shard:03}")
        for member in parts.layout.members:
            if member.name != self._name:
                await links.add(member.name)
        await supervisor.start(links, name="links")
        local = LocalNode(shards, parts.replicators, lane, len(placements))
        self._handlers.update(handlers(local, shards, lambda: own_status(parts)))
        publisher = Publisher(parts.agent, shards, parts.replicators, lane, lane_thread.statistics)
        assert parts.promises is not None
        failover = parts.failover = Failover(
            self._name, shards, parts.promises, links, on_change=publisher.tell_shards
        )
        self._handlers["elect"] = failover.on_peer
        steering = parts.steering = Steering(parts.members, links, shards, failover)
        self._handlers |= {"failover": coded(steering.handle_peer), "shard_end": steering.tell_end}
        await supervisor.start(failover, name="failover")
        snapshots = parts.snapshots = Snapshots(shards, config.node.data_dir / "snapshots")
        self._handlers |= {op: coded(handler) for op, handler in snapshots.handlers().items()}
        await supervisor.start(snapshots, name="snapshots")
        fetcher = parts.fetcher = Fetcher(bytes_per_s=config.limits.snapshot_bytes_per_s, settle=lane.settle)
        for shard, actor in sorted(shards.items()):
            follower = Replicator(actor, links, random.Random(), fetcher)
            parts.replicators[shard] = follower
            await supervisor.start(follower, name=f"follow-{shard:03}")
        parts.offering = Offering(shards, links, ThreadRunner("tails"))
        await supervisor.start(parts.offering, name="offering")
        cluster = GossipCluster(
            parts.members, placements, local, links, shards, parts.replicators, parts.flags
        )
        parts.coordinator = Coordinator(cluster, RouterConfig(), metric=config.storage.metric)
        watched = [
            Watched(Health.DISK, f"the log of shard {s}", t.statistics) for s, t in sorted(logs.items())
        ]
        watched.append(Watched(Health.DEVICE, "the search lane", lane_thread.statistics))
        parts.health = publisher.health = HealthWatch(watched, publisher.on_health)
        await supervisor.start(parts.health, name="health")
        await supervisor.start(publisher, name="publisher")
        publisher.tell_shards()

    def _app_server(self) -> AppServer:
        config = self._config
        limits = Limits(
            dim=config.storage.dim,
            metric=config.storage.metric,
            class_width=config.storage.class_width,
            items_max=config.limits.items_per_request,
            frame_bytes_max=config.limits.frame_bytes,
        )
        bounds = ServerBounds(
            connections_max=config.limits.connections,
            in_flight_max=config.limits.requests_in_flight,
            connection_in_flight_max=config.limits.requests_in_flight_per_connection,
        )
        return AppServer(self._handle, limits, bounds, host=config.listen.host, port=config.listen.app_port)

    async def _serve(self, *, task_status: trio.TaskStatus[int]) -> None:
        try:
            await self._parts.server.run(task_status=task_status)
        finally:
            self._served.set()

    def _handle(self, request: Request, connection: Connection) -> Any | Awaitable[Any]:
        if isinstance(request, Operating):
            return self._operations.handle(request)
        parts = self._parts
        if parts.coordinator is None or parts.state != READY:
            raise RequestError("unavailable", f"{self._name} is not ready: {parts.state}; ask another node")
        return parts.coordinator.handle(request)


def _open(directory: Path, *, shard: int, node_id: str, config: StorageConfig) -> Replica:
    """After what a crash may have left of another's taking its place."""
    Installing(directory).recover()
    return Replica.open(directory, shard=shard, node_id=node_id, config=config)


async def _close(shards: dict[int, ShardActor], notifier: notify.Notifier) -> None:
    async def close_one(actor: ShardActor) -> None:
        await trio.to_thread.run_sync(actor.replica.close)
        notifier.extend_timeout(SHARD_S, f"closed shard {actor.shard}")

    async with trio.open_nursery() as nursery:
        for actor in shards.values():
            nursery.start_soon(close_one, actor)
