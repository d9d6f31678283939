"""The composition root: what a node is made of, started in order and stopped in order (docs/daemon.md)."""

from __future__ import annotations

import random
import signal
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import structlog
import trio

from node.blocking import DedicatedThread, ThreadRunner
from node.config import Address, Config
from node.identity import DataDirectory
from node.lane import SearchLane
from node.local import LocalNode
from node.members import StaticCluster
from node.notify import Notifier
from node.peerlink import Hello, PeerLimits, PeerLink, PeerListener
from node.remote import handlers
from node.replicator import Replicator
from node.server import AppServer, Connection, ServerBounds
from node.shard import ShardActor
from node.supervisor import RestartPolicy, Supervisor
from router.coordinator import Coordinator, RouterConfig
from router.layout import Placement, place
from router.requests import Limits, Request
from storage.errors import DamagedError
from storage.replica import Replica

log = structlog.get_logger(__name__)

OPENING_AT_ONCE = 2
STOP_S = 30.0
# Peers' writes under way get this long; their pulls wait at most a second by themselves.
PEER_GRACE_S = 2.0
# Each shard that was recovered, or closed, earns this much more time from the service manager.
SHARD_S = 300.0
# What a restart of the actor cannot mend ends the process; systemd starts it again, and recovery decides.
POLICY = RestartPolicy(fatal=(DamagedError,))


class Daemon:
    """One node. `run` returns when it has been told to stop and everything is on disk."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._name = config.node.name
        placements = place(
            config.cluster.layout_members(), config.cluster.shard_count, config.cluster.replication
        )
        self._placements: dict[int, Placement] = {one.shard: one for one in placements}
        self._mine = [one for one in placements if self._name in one.voters]
        self._shards: dict[int, ShardActor] = {}
        self._replicators: dict[int, Replicator] = {}
        self._links: dict[str, PeerLink] = {}
        self._stop = trio.Event()
        self._supervisor: Supervisor | None = None
        self._lane: SearchLane | None = None
        self._server: AppServer | None = None
        self._coordinator: Coordinator | None = None

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        """Raises StorageError, OSError or ActorGaveUpError with one line that says what to do."""
        config = self._config
        notifier = Notifier()
        directory = await trio.to_thread.run_sync(
            partial(DataDirectory.open, config.node.data_dir, name=self._name, cluster=config.cluster.id)
        )
        try:
            async with AsyncExitStack() as stack:
                await self._run(directory, notifier, stack)
        finally:
            directory.close()

    async def _run(self, directory: DataDirectory, notifier: Notifier, stack: AsyncExitStack) -> None:
        hello = self._hello(directory.identity.boots)
        listener = self._listener(hello)
        await listener.bind()
        notifier.status("recovering shards")
        try:
            await self._open_shards(directory, notifier, stack)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on_signals)
                nursery.start_soon(notifier.run)
                await self._start(nursery, hello, listener, stack)
                assert self._server is not None
                log.info(
                    "ready",
                    node=self._name,
                    app_port=self._server.port,
                    shards=len(self._shards),
                    boot=hello.boot,
                )
                notifier.ready(f"serving {len(self._shards)} shards")
                await self._stop.wait()
                notifier.stopping()
                log.info("stopping", node=self._name)
                self._server.stop()
                listener.stop()
                with trio.move_on_after(STOP_S):
                    await self._served.wait()
                    await listener.drained(PEER_GRACE_S)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                # Also when it is an error that ends us: keepalives are over, and the watchdog must be, too.
                notifier.stopping("closing shards")
                await self._close_shards(notifier)
        log.info("stopped", node=self._name)

    async def _stop_on_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                self.stop()

    # -- parts ----------------------------------------------------------------------------------------------------

    def _hello(self, boots: int) -> Hello:
        config = self._config
        return Hello(
            cluster_id=config.cluster.id,
            node=self._name,
            shard_count=config.cluster.shard_count,
            dim=config.storage.dim,
            metric=config.storage.metric,
            class_width=config.storage.class_width,
            boot=boots,
        )

    def _peer_limits(self) -> PeerLimits:
        limits = self._config.limits
        return PeerLimits(
            frame_bytes=limits.peer_frame_bytes,
            requests_in_flight=limits.peer_requests_in_flight,
            connections=limits.peer_connections,
        )

    def _listener(self, hello: Hello) -> PeerListener:
        listen = Address(self._config.listen.host, self._config.listen.peer_port)
        known = frozenset(member.name for member in self._config.cluster.members) - {self._name}
        self._handlers: dict[str, Any] = {}
        return PeerListener(self._handlers, hello, listen=listen, limits=self._peer_limits(), known=known)

    async def _open_shards(self, directory: DataDirectory, notifier: Notifier, stack: AsyncExitStack) -> None:
        """Recovery, a few shards at a time; nothing is served before all are done."""
        limit = trio.CapacityLimiter(OPENING_AT_ONCE)
        maintenance = ThreadRunner("maintenance")

        async def open_one(placement: Placement) -> None:
            replica = await trio.to_thread.run_sync(
                partial(
                    Replica.open,
                    directory.path / f"shard-{placement.shard:03}",
                    shard=placement.shard,
                    node_id=directory.identity.node_id,
                    config=self._config.storage,
                ),
                limiter=limit,
            )
            self._shards[placement.shard] = ShardActor(
                replica,
                placement,
                name=self._name,
                log_runner=await stack.enter_async_context(DedicatedThread(f"wal-{placement.shard}")),
                maintenance_runner=maintenance,
                queue_max=self._config.limits.write_queue,
            )
            log.info("recovered", shard=placement.shard, **asdict(replica.recovery))
            notifier.extend_timeout(SHARD_S, f"recovered {len(self._shards)} of {len(self._mine)} shards")

        async with trio.open_nursery() as nursery:
            for placement in self._mine:
                nursery.start_soon(open_one, placement)

    async def _close_shards(self, notifier: Notifier) -> None:
        async def close_one(actor: ShardActor) -> None:
            await trio.to_thread.run_sync(actor.replica.close)
            notifier.extend_timeout(SHARD_S, f"closed shard {actor.shard}")

        async with trio.open_nursery() as nursery:
            for actor in self._shards.values():
                nursery.start_soon(close_one, actor)

    async def _start(
        self, nursery: trio.Nursery, hello: Hello, listener: PeerListener, stack: AsyncExitStack
    ) -> None:
        config = self._config
        supervisor = self._supervisor = Supervisor(nursery, policy=POLICY)
        lane_thread = await stack.enter_async_context(DedicatedThread("search"))
        lane = self._lane = SearchLane(lane_thread, queue_max=config.limits.requests_in_flight)
        await supervisor.start(lane, name="search-lane")
        for shard, actor in sorted(self._shards.items()):
            await supervisor.start(actor, name=f"shard-{shard:03}")
        for member in config.cluster.members:
            if member.name != self._name:
                link = PeerLink(member.peer_address, hello, expect=member.name, limits=self._peer_limits())
                self._links[member.name] = link
                await supervisor.start(link, name=f"link-{member.name}")
        local = LocalNode(self._shards, self._replicators, lane, config.cluster.shard_count)
        self._handlers.update(handlers(local, self._shards, self._own_status))
        await nursery.start(listener.run)
        for shard, actor in sorted(self._shards.items()):
            if not actor.primary:
                follower = Replicator(actor, self._links[actor.placement.primary], random.Random())
                self._replicators[shard] = follower
                await supervisor.start(follower, name=f"follow-{shard:03}")
        cluster = StaticCluster(
            self._name, self._placements, local, self._links, self._replicators, self._status
        )
        self._coordinator = Coordinator(cluster, RouterConfig(), metric=config.storage.metric)
        await self._start_server(nursery)

    async def _start_server(self, nursery: trio.Nursery) -> None:
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
        server = self._server = AppServer(
            self._handle, limits, bounds, host=config.listen.host, port=config.listen.app_port
        )
        self._served = trio.Event()

        async def serve(*, task_status: trio.TaskStatus[int]) -> None:
            try:
                await server.run(task_status=task_status)
            finally:
                self._served.set()

        await nursery.start(serve)

    def _handle(self, request: Request, connection: Connection) -> Awaitable[dict[str, Any]]:
        assert self._coordinator is not None
        return self._coordinator.handle(request)

    # -- what operators see ---------------------------------------------------------------------------------------

    def _own_status(self) -> dict[str, Any]:
        return {
            "node": self._name,
            "shards": [self._shard_status(actor) for _, actor in sorted(self._shards.items())],
        }

    def _shard_status(self, actor: ShardActor) -> dict[str, Any]:
        replica = actor.replica
        numbers = replica.statistics()
        follower = self._replicators.get(actor.shard)
        return {
            "shard": actor.shard,
            "role": "primary" if actor.primary else "replica",
            "primary": actor.placement.primary,
            "voters": list(actor.placement.voters),
            "epoch": replica.position.epoch,
            "sequence": replica.position.sequence,
            "items": replica.view.alive_rows,
            "users": numbers.get("users", 0),
            "fresh": replica.fresh_rows(),
            "engine": self._config.storage.engine,
            "lag": follower.behind if follower else 0,
            "lag_ms": follower.lag_ms if follower else 0,
            "state": follower.state if follower else "writing",
        }

    def _status(self) -> dict[str, Any]:
        lag_ms = max((one.lag_ms for one in self._replicators.values()), default=0)
        members = [
            {
                "name": member.name,
                "app": member.app,
                "region": member.region,
                "zone": member.zone,
                "state": "alive"
                if member.name == self._name or self._links[member.name].connected
                else "down",
                "lag_ms": lag_ms if member.name == self._name else None,
            }
            for member in self._config.cluster.members
        ]
        assert self._server is not None
        assert self._lane is not None
        assert self._coordinator is not None
        assert self._supervisor is not None
        return {
            **self._own_status(),
            "cluster": self._config.cluster.id,
            "version": version("gmco"),
            "shard_count": self._config.cluster.shard_count,
            "dim": self._config.storage.dim,
            "metric": self._config.storage.metric,
            "members": members,
            "counters": {
                "server": asdict(self._server.statistics()),
                "search": self._lane.statistics(),
                "router": self._coordinator.statistics(),
                "writes": _sum([actor.counters for actor in self._shards.values()]),
                "crashes": sum(one.crashes for one in self._supervisor.statistics()),
            },
        }


def _sum(counters: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counters:
        for key, value in one.items():
            total[key] = total.get(key, 0) + value
    return total
