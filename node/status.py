"""What a node says of itself and of the members it knows, as plain maps for people and tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import trio

from gossip.agent import Agent
from node.changefeed import ChangeFeed
from node.config import Address, Config
from node.duty import Duty
from node.facts import Health
from node.failover import Failover
from node.forming import LayoutGuard
from node.health import HealthWatch
from node.holdings import Holdings
from node.httpserver import HttpServer
from node.l1 import RedisStore
from node.lane import SearchLane
from node.links import Links
from node.members import Known, Members
from node.mover import Mover
from node.offering import Offering
from node.orders import Orders
from node.promises import Promises
from node.rebuilding import Rebuilding
from node.repairer import Repairer
from node.replicator import Replicator
from node.routing import GossipCluster
from node.server import AppServer
from node.shard import ShardActor
from node.snapshots import Snapshots
from node.steering import Steering
from node.supervisor import Supervisor
from node.witnessing import Witnessing
from router.caching import Caches
from router.coordinator import Coordinator
from router.layout import Layout
from storage.records import Kind

READY = "ready"


@dataclass(kw_only=True)
class Parts:
    """What a node consists of, as far as it has come. `state`: ready, or what it waits for."""

    config: Config
    boot: int
    members: Members
    agent: Agent
    supervisor: Supervisor
    links: Links
    server: AppServer
    state: str = "starting"
    holdings: Holdings | None = None
    layout: Layout | None = None
    guard: LayoutGuard | None = None
    promises: Promises | None = None
    witnessed: Promises | None = None
    failover: Failover | None = None
    witnessing: Witnessing | None = None
    offering: Offering | None = None
    steering: Steering | None = None
    duty: Duty | None = None
    orders: Orders | None = None
    snapshots: Snapshots | None = None
    mover: Mover | None = None
    repairer: Repairer | None = None
    rebuilding: Rebuilding | None = None
    lane: SearchLane | None = None
    health: HealthWatch | None = None
    cluster: GossipCluster | None = None
    coordinator: Coordinator | None = None
    caches: Caches | None = None
    store: RedisStore | None = None
    feed: ChangeFeed | None = None
    http: HttpServer | None = None

    @property
    def shards(self) -> Mapping[int, ShardActor]:
        return self.holdings.actors if self.holdings is not None else {}

    @property
    def replicators(self) -> Mapping[int, Replicator]:
        return self.holdings.replicators if self.holdings is not None else {}

    @property
    def name(self) -> str:
        return self.config.node.name

    def go_by(self, layout: Layout) -> None:
        """A later layout counts."""
        self.layout = layout

    def flags(self) -> Health:
        return self.health.flags if self.health is not None else Health(0)


def own_status(parts: Parts) -> dict[str, Any]:
    """This node and its replicas."""
    return {
        "node": parts.name,
        "state": parts.state,
        "duty": parts.duty.order if parts.duty is not None else "",
        "degraded": list(parts.health.reasons) if parts.health is not None else [],
        "shards": [_shard(parts, actor) for _, actor in sorted(parts.shards.items())],
        "witnesses": _witnessed(parts),
    }


def whole_status(parts: Parts) -> dict[str, Any]:
    """And its cluster, as it sees it."""
    config, layout = parts.config, parts.layout
    problems = [
        *parts.members.problems(),
        *([parts.guard.problem] if parts.guard else []),
        *_put_aside(parts),
        *_strangers(parts),
    ]
    return {
        **own_status(parts),
        "http": _http_url(parts),
        "boot": parts.boot,
        "cluster": config.cluster.id,
        "cluster_id": layout.cluster_id if layout else "",
        "version": version("gmco"),
        "shard_count": layout.shard_count if layout else config.cluster.shard_count,
        "dim": config.storage.dim,
        "metric": config.storage.metric,
        "layout": {"version": layout.version, "hash": layout.hash} if layout else None,
        "problems": [problem for problem in problems if problem],
        "members": members_status(parts),
        "counters": counters(parts),
    }


def _http_url(parts: Parts) -> str:
    """Where this node answers HTTP; empty when it does not."""
    listen = parts.config.listen
    if parts.http is None:
        return ""
    return listen.http_url or f"http://{Address(listen.host, parts.http.port)}"


def _put_aside(parts: Parts) -> list[str]:
    files = parts.holdings.quarantined() if parts.holdings is not None else []
    return [
        f"quarantine: {path} holds records that were put aside; look at them, then move it away"
        for path in files
    ]


def _strangers(parts: Parts) -> list[str]:
    """What a person should mend, in a sentence."""
    found = parts.agent.cluster.strangers(trio.current_time())
    if not found or parts.layout is None:
        return []
    return [
        f"other_cluster: {', '.join(found[:5])} speaks with our cluster.id and key and is of another cluster than "
        f"{parts.layout.cluster_id}; nothing of it is taken: give one of the two another cluster.id, or this node its own data"
    ]


def members_status(parts: Parts) -> list[dict[str, Any]]:
    """By name: everybody whom gossip knows, and those of the layout whom it does not.

    The latter are `left` (they said good-bye, or an operator forgot them), or `unheard` since this node started.
    """
    parts.members.refresh()
    layout = parts.layout
    placed = {member.name: member for member in layout.members} if layout else {}
    now = trio.current_time()
    rows = [_member(parts, known, known.name in placed, now) for known in parts.members.all()]
    named = {row["name"] for row in rows}
    for name, member in placed.items():
        if name not in named:
            rows.append(
                {
                    "name": name,
                    "state": "left" if parts.members.has_left(name) else "unheard",
                    "connected": False,
                    "in_layout": True,
                    "region": member.region,
                    "zone": member.zone,
                }
            )
    return sorted(rows, key=lambda row: str(row["name"]))


def _member(parts: Parts, known: Known, placed: bool, now: float) -> dict[str, Any]:
    view, fact, hot = known.view, known.fact, known.hot
    own = known.id == parts.members.own_id
    heard = now if own else view.heard_at
    row: dict[str, Any] = {
        "name": known.name,
        "id": f"{known.id:016x}",
        "state": known.state.name.lower(),
        "connected": own or parts.links.connected(known.name),
        "in_layout": placed,
        "address": str(view.address),
        "boot": view.boot,
        "incarnation": view.incarnation,
        "heard_ms": None if heard is None else max(0, round(1000 * (now - heard))),
        "state_ms": max(0, round(1000 * (now - view.since))),
        "rtt_ms": None if view.rtt_s is None else round(1000 * view.rtt_s, 2),
        "shards": len(known.held),
        "lag_ms": max(known.lags_ms.values(), default=0) if known.held else None,
        "degraded": known.reason,
        "duty": known.order,
    }
    if fact is not None:
        row |= {
            name: getattr(fact, name)
            for name in ("region", "zone", "host", "capacity", "app", "http", "version")
        }
    if hot is not None:
        row["load"] = {name: round(value, 1) for name, value in hot.load._asdict().items()}
    return row


def _witnessed(parts: Parts) -> list[int]:
    """Shards of which this node is a witness."""
    votes = parts.witnessing.votes if parts.witnessing is not None else {}
    return sorted(shard for shard, vote in votes.items() if vote.named)


def _shard(parts: Parts, actor: ShardActor) -> dict[str, Any]:
    replica = actor.replica
    numbers = replica.statistics()
    follower = parts.replicators.get(actor.shard)
    return {
        "shard": actor.shard,
        "role": "primary" if actor.leads else "replica",
        "primary": actor.primary,
        "voters": list(actor.placement.names),
        "witness": actor.placement.witness_name,
        "witness_heard": _witness_heard(actor),
        "votes": actor.placement.is_voter(parts.name, replica.replica_id),
        "epoch": replica.position.epoch,
        "sequence": replica.position.sequence,
        "items": replica.view.alive_rows,
        "users": numbers.get("users", 0),
        "fresh": replica.fresh_rows(),
        "log_bytes": numbers["log"]["bytes"],
        "unsettled": numbers["unsettled"],
        "unsettled_dropped": numbers["unsettled_dropped"],
        "digests": {
            name: f"{replica.digest(kind):016x}"
            for name, kind in (("items", Kind.ITEM), ("users", Kind.USER))
        },
        "engine": parts.config.storage.engine,
        "lag": follower.behind if follower else 0,
        "lag_ms": follower.lag_ms if follower else 0,
        "state": "damaged" if actor.harmed else follower.state if follower else "starting",
        "damaged": actor.harmed,
        "snapshot": follower.transfer.figures() if follower else None,
        "learners": [name for name, _ in actor.placement.learners],
        "target": list(parts.mover.target(actor)) if parts.mover and actor.leads else [],
        "target_witness": parts.mover.witness(actor) if parts.mover and actor.leads else "",
        "layout": parts.layout.version if parts.layout else 0,
        "move": parts.mover.stages.get(actor.shard, "") if parts.mover else "",
        "repair": _repair(parts, actor),
    }


def _witness_heard(actor: ShardActor) -> bool:
    """Whether its lease has lived by the witness's echo of late, too; only the primary knows."""
    reign = actor.reign
    return reign is not None and trio.current_time() - reign.witness_at < 2 * actor.election.lease_s


def _repair(parts: Parts, actor: ShardActor) -> str:
    """What came of the last comparison, if this node leads and has made one."""
    report = parts.repairer.reports.get(actor.shard) if parts.repairer else None
    return str(report) if report is not None and actor.leads else ""


def counters(parts: Parts) -> dict[str, Any]:
    """What the parts count, by part."""
    return {
        "server": asdict(parts.server.statistics()),
        "http": asdict(parts.http.statistics()) if parts.http else {},
        "search": parts.lane.statistics() if parts.lane else {},
        "router": parts.coordinator.statistics() if parts.coordinator else {},
        "peers": parts.coordinator.peers() if parts.coordinator else {},
        "read_bytes": parts.links.read_bytes(),
        "cache": parts.caches.statistics() if parts.caches else {},
        "redis": parts.store.statistics() if parts.store else {},
        "changes": parts.feed.statistics() if parts.feed else {},
        "elections": dict(parts.failover.counters) if parts.failover else {},
        "witness": dict(parts.witnessing.counters) if parts.witnessing else {},
        "moves": dict(parts.mover.counters) if parts.mover else {},
        "tails": dict(parts.offering.counters) if parts.offering else {},
        "snapshots": _snapshots(parts),
        "repair": dict(parts.repairer.counters) if parts.repairer else {},
        "rebuilt": parts.holdings.counters["rebuilt"] if parts.holdings else 0,
        "writes": _sum([actor.counters for actor in parts.shards.values()]),
        "gossip": asdict(parts.agent.statistics()),
        "crashes": sum(one.crashes for one in parts.supervisor.statistics()),
    }


def _snapshots(parts: Parts) -> dict[str, int]:
    """Given and taken."""
    given = parts.snapshots.counters if parts.snapshots else {}
    return given | (parts.holdings.fetcher.counters if parts.holdings else {})


def _sum(counters: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counters:
        for key, value in one.items():
            total[key] = total.get(key, 0) + value
    return total
