"""The node's settings: one TOML file → frozen dataclasses. Defaults work on a laptop.

An unknown key, a wrong type or a value out of range is refused with its path, in one line:
`node.toml: storage.dmi: unknown key; did you mean "dim"?`
"""

from __future__ import annotations

import dataclasses
import ipaddress
import tomllib
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from node.config_reader import ConfigError, read_section
from router.config import RouterConfig
from router.layout import REPLICATION_MAX
from storage.config import StorageConfig

__all__ = [
    "Address",
    "CacheConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "GossipSettings",
    "HttpConfig",
    "LimitsConfig",
    "ListenConfig",
    "LogConfig",
    "NodeConfig",
    "load",
    "loopback",
    "parse_address",
]

PORTS = (0, 65_535)


class Address(NamedTuple):
    """Where to connect: `host` is a name or an IPv4 or IPv6 address without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeConfig:
    """Who this node is and where it stands. `host` tells which nodes die together with one machine."""

    name: str
    # Relative to the folder of the configuration file.
    data_dir: Path = Path("data")
    region: str = "local"
    zone: str = "local"
    host: str = ""  # empty: the node's name
    capacity: int = field(default=1, metadata={"range": (1, 1_000_000)})
    # Holds no data: votes for shards of two replicas, and passes requests on. Counts when it becomes a member.
    witness: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenConfig:
    """Port 0 lets the system choose one (for tests)."""

    host: str = "127.0.0.1"
    app_port: int = field(default=7400, metadata={"range": PORTS})
    # Where apps reach this node, when that is not ws://host:app_port.
    app_url: str = ""
    # HTTP, for those who have no WebSocket (docs/http.md).
    http_port: int = field(default=7401, metadata={"range": PORTS})
    # Where it is reached, when that is not http://host:http_port.
    http_url: str = ""
    peer_port: int = field(default=7402, metadata={"range": PORTS})


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpConfig:
    """The HTTP port beside its bounds, which are among the limits."""

    enabled: bool = True
    # Origins whose pages browsers may let ask, as in "https://app.example"; "*": all. None: no page at all.
    origins: tuple[str, ...] = ()
    # A connection without a request is closed after so long.
    idle_s: float = field(default=60.0, metadata={"range": (1, 86_400)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What all nodes of a cluster agree on, and how they find each other."""

    id: str = ""
    # What the first layout is made with; from then on the layout counts.
    shard_count: int = field(default=12, metadata={"range": (1, 65_535)})
    replication: int = field(default=3, metadata={"range": (1, REPLICATION_MAX)})
    # host:port of the peer ports of some nodes; others are heard of by gossip. This node's own may be among them.
    seeds: tuple[str, ...] = ()
    # The first layout is made when so many nodes see each other. 1: this node alone. 0: never, only join.
    bootstrap: int = field(default=1, metadata={"range": (0, 1_000)})
    # A shard goes back to its preferred primary once that has been there and level for so long.
    prefer_first: bool = True
    prefer_first_s: float = field(default=30.0, metadata={"range": (0, 86_400)})
    # A host that has been gone for so long has its replicas rebuilt elsewhere; not while it is in maintenance.
    rebuild_after_s: float = field(default=600.0, metadata={"range": (1, 86_400)})

    @property
    def alone(self) -> bool:
        return not self.seeds and self.bootstrap == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class GossipSettings:
    """How this node takes part in gossip. Its timings are those of `gossip.config`."""

    # host:port at which others reach this node, when that is not where it listens.
    advertise: str = ""
    # 64 hex digits, the same on all nodes (`gmco keyring generate`); only read while data/keyring is not there.
    key: str = ""
    # "off": gossip over TCP alone. "auto": TCP to members that UDP does not reach.
    udp: Literal["auto", "on", "off"] = "auto"

    @property
    def advertised(self) -> Address | None:
        return parse_address(self.advertise) if self.advertise else None

    @property
    def secret(self) -> bytes | None:
        return bytes.fromhex(self.key) if self.key else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsConfig:
    """Bounds; what goes over one is refused with `overloaded` or `too_large`, never queued without end."""

    connections: int = field(default=1_024, metadata={"range": (1, 1_000_000)})
    http_connections: int = field(default=1_024, metadata={"range": (1, 1_000_000)})
    requests_in_flight_per_connection: int = field(default=256, metadata={"range": (1, 1_000_000)})
    requests_in_flight: int = field(default=4_096, metadata={"range": (1, 10_000_000)})
    # One WebSocket message of an app, and one frame between nodes.
    frame_bytes: int = field(default=8 << 20, metadata={"range": (1 << 10, 1 << 30)})
    peer_frame_bytes: int = field(default=32 << 20, metadata={"range": (1 << 16, 1 << 30)})
    peer_connections: int = field(default=1_024, metadata={"range": (1, 1_000_000)})
    peer_requests_in_flight: int = field(default=1_024, metadata={"range": (1, 1_000_000)})
    # The body of one HTTP request.
    http_body_bytes: int = field(default=1 << 20, metadata={"range": (1 << 10, 1 << 26)})
    items_per_request: int = field(default=1_000, metadata={"range": (1, 1_000_000)})
    # Records that may wait for one shard's log.
    write_queue: int = field(default=4_096, metadata={"range": (1, 1_000_000)})
    # What this node's replicas together fetch when they catch up by snapshots; 0: as fast as it goes.
    snapshot_bytes_per_s: int = field(default=50_000_000, metadata={"range": (0, 1 << 40)})


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairConfig:
    """How this node's primaries compare their shards with the other replicas (docs/replication.md)."""

    # Between two comparisons of one shard, when something was written meanwhile; 0: only on demand.
    every_s: float = field(default=600.0, metadata={"range": (0, 10 * 365 * 86_400)})
    # What a repair writes, sends or drops at most.
    records_per_s: int = field(default=1_000, metadata={"range": (1, 1_000_000)})


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """What is kept of answers (docs/caching.md)."""

    # In this process; 0: nothing is.
    l0_bytes: int = field(default=64 << 20, metadata={"range": (0, 1 << 40)})
    # One server, as in redis://host:6379/0 (rediss:// with TLS, unix:// for a socket); empty: none.
    redis: str = ""
    # Or a Redis Cluster: host:port of some of its nodes.
    redis_cluster: tuple[str, ...] = ()
    # How long a query waits for it, and it for a connection or a reply.
    redis_timeout_ms: int = field(default=50, metadata={"range": (1, 10_000)})

    @property
    def l1(self) -> bool:
        return bool(self.redis or self.redis_cluster)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole file, checked. `warnings` are sentences to log once at start."""

    node: NodeConfig
    listen: ListenConfig = ListenConfig()
    http: HttpConfig = HttpConfig()
    cluster: ClusterConfig = ClusterConfig()
    gossip: GossipSettings = GossipSettings()
    storage: StorageConfig = field(default_factory=StorageConfig)
    limits: LimitsConfig = LimitsConfig()
    router: RouterConfig = field(default_factory=RouterConfig)
    repair: RepairConfig = RepairConfig()
    cache: CacheConfig = CacheConfig()
    log: LogConfig = LogConfig()
    warnings: tuple[str, ...] = ()


# storage.config knows no ranges of ours, so they stand here.
STORAGE_RANGES: dict[str, tuple[float, float]] = {
    "dim": (1, 8_192),
    "class_width": (64, 1_024),
    "m": (2, 256),
    "ef_construction": (1, 10_000),
    "ef": (1, 10_000),
    "fresh_rows_max": (1, 100_000_000),
    "graph_rows_min": (0, 1_000_000_000),
    "compact_dead_ratio": (0.01, 1.0),
    "compact_rows_min": (1, 1_000_000_000),
    "wal_segment_bytes": (1 << 16, 1 << 30),
    "wal_segment_bytes_max": (0, 1 << 30),
    "wal_keep_s": (0, 10 * 365 * 86_400),
    "wal_unsettled_bytes": (0, 1 << 40),
    "tombstones_keep_s": (0, 10 * 365 * 86_400),
    "checkpoint_bytes": (1 << 16, 1 << 40),
    "write_ids_keep_s": (0, 86_400),
    "write_ids_max": (1, 100_000_000),
    "float32_budget_bytes": (0, 1 << 44),
    "threads": (1, 1_024),
}


def load(path: Path | str) -> Config:
    """The file's settings. Raises ConfigError: one line with the file, the key and what is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    try:
        return parse(text, folder=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(text: str, *, folder: Path = Path()) -> Config:
    """Settings from TOML text; a relative `data_dir` is taken from `folder`."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from error
    whole = read_section(Config, tables, "", skip=("warnings",), ranges={"storage": STORAGE_RANGES})
    if whole.storage.class_width % 64:
        raise ConfigError(f"storage.class_width: must be a multiple of 64, is {whole.storage.class_width}")
    node = dataclasses.replace(whole.node, data_dir=folder / whole.node.data_dir)
    _check_name("node.name", node.name)
    _check_cluster(whole.cluster)
    _check_gossip(whole.gossip)
    _check_cache(whole.cache)
    if whole.listen.app_url and not whole.listen.app_url.startswith(("ws://", "wss://")):
        raise ConfigError(f'listen.app_url: must begin with ws:// or wss://, is "{whole.listen.app_url}"')
    if whole.listen.http_url and not whole.listen.http_url.startswith(("http://", "https://")):
        raise ConfigError(
            f'listen.http_url: must begin with http:// or https://, is "{whole.listen.http_url}"'
        )
    _check_origins(whole.http.origins)
    # A cluster of one needs no name of its own.
    cluster = dataclasses.replace(whole.cluster, id=whole.cluster.id or f"single-{node.name}")
    node = dataclasses.replace(node, host=node.host or node.name)
    whole = dataclasses.replace(whole, node=node, cluster=cluster)
    return dataclasses.replace(whole, warnings=_warnings(whole))


def _check_cluster(cluster: ClusterConfig) -> None:
    for i, seed in enumerate(cluster.seeds):
        try:
            parse_address(seed)
        except ValueError as error:
            raise ConfigError(f"cluster.seeds[{i}]: {error}") from error
    if cluster.seeds and cluster.bootstrap == 1:
        raise ConfigError(
            "cluster.bootstrap: with seeds, give how many nodes form the cluster at first, the same number on each; "
            "0 to only join one that is there"
        )
    if not cluster.alone and not cluster.id:
        raise ConfigError("cluster.id: missing; give the same id on every node of the cluster")


def _check_gossip(gossip: GossipSettings) -> None:
    try:
        _ = gossip.advertised
    except ValueError as error:
        raise ConfigError(f"gossip.advertise: {error}") from error
    # Never shown: it may be a good key with one digit too many.
    if gossip.key and not (
        len(gossip.key) == 64 and all(c in "0123456789abcdef" for c in gossip.key.lower())
    ):
        raise ConfigError("gossip.key: must be 64 hex digits, as `gmco keyring generate` prints them")


def _check_cache(cache: CacheConfig) -> None:
    # The URL is not shown: it may hold a password.
    if cache.redis and not cache.redis.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError("cache.redis: must begin with redis://, rediss:// or unix://")
    try:
        _ = urllib.parse.urlsplit(cache.redis).port
    except ValueError:
        raise ConfigError("cache.redis: its port must be a number up to 65,535") from None
    if cache.redis and cache.redis_cluster:
        raise ConfigError("cache.redis_cluster: give either this or cache.redis, not both")
    for i, node in enumerate(cache.redis_cluster):
        try:
            parse_address(node)
        except ValueError as error:
            raise ConfigError(f"cache.redis_cluster[{i}]: {error}") from error


def _check_origins(origins: tuple[str, ...]) -> None:
    for i, origin in enumerate(origins):
        scheme, _, rest = origin.partition("://")
        if origin != "*" and not (scheme in ("http", "https") and rest and "/" not in rest):
            raise ConfigError(
                f'http.origins[{i}]: must be as in "https://app.example", without a path, or "*"; is "{origin}"'
            )


def _check_name(path: str, name: str) -> None:
    # Names become file names, log fields and ring points: printable, no blanks, no separators.
    if not 1 <= len(name) <= 64 or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name):
        raise ConfigError(f'{path}: "{name}" must be 1–64 letters, digits, ".", "_" or "-"')


def _warnings(config: Config) -> tuple[str, ...]:
    said = []
    cluster, limits = config.cluster, config.limits
    if 0 < cluster.bootstrap < cluster.replication:
        count = cluster.bootstrap
        said.append(
            f"cluster.replication is {cluster.replication} but the cluster is formed by "
            f"{'1 node' if count == 1 else f'{count} nodes'}: each shard has {count} "
            f"{'replica' if count == 1 else 'replicas'}"
        )
    if limits.requests_in_flight < limits.requests_in_flight_per_connection:
        said.append(
            "limits.requests_in_flight is below limits.requests_in_flight_per_connection: "
            "one app can fill the node"
        )
    keyless = not config.gossip.key and not (config.node.data_dir / "keyring").exists()
    if not loopback(config.listen.host) and keyless:
        said.append(
            f"listening on {config.listen.host} without gossip.key: everyone who knows cluster.id and reaches the peer "
            "port can join, and tell the nodes what is not so; make a key with `gmco keyring generate`"
        )
    return tuple(said)


def loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_address(text: str) -> Address:
    """`host:port` or `[IPv6]:port`. Raises ValueError that says what is wrong."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f'an IPv6 address needs brackets, as in [::1]:7402; is "{text}"')
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > PORTS[1]:
        raise ValueError(f'must be "host:port", is "{text}"')
    return Address(host, int(port))
