"""The node's settings: one TOML file → frozen dataclasses. Defaults work on a laptop.

An unknown key, a wrong type or a value out of range is refused with its path, in one line:
`node.toml: storage.dmi: unknown key; did you mean "dim"?`
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from node.config_reader import ConfigError, read_section
from router.layout import Member
from storage.config import StorageConfig

__all__ = [
    "Address",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "LimitsConfig",
    "ListenConfig",
    "LogConfig",
    "MemberConfig",
    "NodeConfig",
    "load",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenConfig:
    """Port 0 lets the system choose one (for tests)."""

    host: str = "127.0.0.1"
    app_port: int = field(default=7400, metadata={"range": PORTS})
    peer_port: int = field(default=7402, metadata={"range": PORTS})


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberConfig:
    """One node of the cluster as the others reach it. The list must be the same on every node."""

    name: str
    peer: str
    app: str = ""
    region: str = "local"
    zone: str = "local"
    host: str = ""  # empty: the member's name
    capacity: int = field(default=1, metadata={"range": (1, 1_000_000)})

    @property
    def peer_address(self) -> Address:
        return parse_address(self.peer)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What all nodes of a cluster agree on. A hello from another cluster id or shard count is refused."""

    id: str = ""
    shard_count: int = field(default=12, metadata={"range": (1, 65_536)})
    replication: int = field(default=3, metadata={"range": (1, 15)})
    members: tuple[MemberConfig, ...] = ()

    def layout_members(self) -> list[Member]:
        """The members as `router.layout.place` takes them."""
        return [
            Member(
                name=one.name,
                region=one.region,
                zone=one.zone,
                host=one.host or one.name,
                capacity=one.capacity,
            )
            for one in self.members
        ]

    def member(self, name: str) -> MemberConfig:
        """The member of that name. Raises KeyError."""
        for one in self.members:
            if one.name == name:
                return one
        raise KeyError(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsConfig:
    """Bounds; what goes over one is refused with `overloaded` or `too_large`, never queued without end."""

    connections: int = field(default=1_024, metadata={"range": (1, 1_000_000)})
    requests_in_flight_per_connection: int = field(default=256, metadata={"range": (1, 1_000_000)})
    requests_in_flight: int = field(default=4_096, metadata={"range": (1, 10_000_000)})
    # One WebSocket message of an app, and one frame between nodes.
    frame_bytes: int = field(default=8 << 20, metadata={"range": (1 << 10, 1 << 30)})
    peer_frame_bytes: int = field(default=32 << 20, metadata={"range": (1 << 16, 1 << 30)})
    peer_connections: int = field(default=1_024, metadata={"range": (1, 1_000_000)})
    peer_requests_in_flight: int = field(default=1_024, metadata={"range": (1, 1_000_000)})
    items_per_request: int = field(default=1_000, metadata={"range": (1, 1_000_000)})
    # Records that may wait for one shard's log.
    write_queue: int = field(default=4_096, metadata={"range": (1, 1_000_000)})


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole file, checked. `warnings` are sentences to log once at start."""

    node: NodeConfig
    listen: ListenConfig = ListenConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = field(default_factory=StorageConfig)
    limits: LimitsConfig = LimitsConfig()
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
    "wal_keep_s": (0, 10 * 365 * 86_400),
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
    given: dict[str, Any] = tables["node"]
    if not whole.cluster.members:
        whole = _alone(dataclasses.replace(whole, node=node))
    else:
        whole = _among_members(dataclasses.replace(whole, node=node), given)
    return dataclasses.replace(whole, warnings=_warnings(whole))


def _alone(config: Config) -> Config:
    """A single-node cluster of this node itself."""
    node = dataclasses.replace(config.node, host=config.node.host or config.node.name)
    listen = config.listen
    me = MemberConfig(
        name=node.name,
        peer=str(Address(listen.host, listen.peer_port)),
        app=f"ws://{Address(listen.host, listen.app_port)}",
        region=node.region,
        zone=node.zone,
        host=node.host,
        capacity=node.capacity,
    )
    cluster_id = config.cluster.id or f"single-{node.name}"
    cluster = dataclasses.replace(config.cluster, id=cluster_id, members=(me,))
    return dataclasses.replace(config, node=node, cluster=cluster)


def _among_members(config: Config, given: dict[str, Any]) -> Config:
    """This node takes its place from the list, because every node must compute the same layout from it."""
    cluster, node = config.cluster, config.node
    if not cluster.id:
        raise ConfigError("cluster.id: missing; give the same id on every node of the cluster")
    seen: dict[str, str] = {}
    for i, member in enumerate(cluster.members):
        path = f"cluster.members[{i}]"
        _check_name(f"{path}.name", member.name)
        for key, value in (("name", member.name), ("peer", member.peer)):
            if value in seen:
                raise ConfigError(f'{path}.{key}: "{value}" is already {seen[value]}')
            seen[value] = f"{path}.{key}"
        _check_member_addresses(path, member)
    names = [member.name for member in cluster.members]
    if node.name not in names:
        raise ConfigError(f'node.name: "{node.name}" is not in cluster.members ({", ".join(names)})')
    me = cluster.member(node.name)
    path = f"cluster.members[{names.index(node.name)}]"
    for key in ("region", "zone", "host", "capacity"):
        mine, listed = getattr(node, key), getattr(me, key)
        if key in given and mine != (listed or me.name):
            raise ConfigError(f"node.{key}: is {mine!r} but {path}.{key} is {listed!r}; make them equal")
    members = tuple(dataclasses.replace(one, host=one.host or one.name) for one in cluster.members)
    me = members[names.index(node.name)]
    node = dataclasses.replace(node, region=me.region, zone=me.zone, host=me.host, capacity=me.capacity)
    return dataclasses.replace(config, node=node, cluster=dataclasses.replace(cluster, members=members))


def _check_member_addresses(path: str, member: MemberConfig) -> None:
    try:
        parse_address(member.peer)
    except ValueError as error:
        raise ConfigError(f"{path}.peer: {error}") from error
    if member.app and not member.app.startswith(("ws://", "wss://")):
        raise ConfigError(f'{path}.app: must begin with ws:// or wss://, is "{member.app}"')


def _check_name(path: str, name: str) -> None:
    # Names become file names, log fields and ring points: printable, no blanks, no separators.
    if not 1 <= len(name) <= 64 or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name):
        raise ConfigError(f'{path}: "{name}" must be 1–64 letters, digits, ".", "_" or "-"')


def _warnings(config: Config) -> tuple[str, ...]:
    said = []
    count = len(config.cluster.members)
    if config.cluster.replication > count:
        said.append(
            f"cluster.replication is {config.cluster.replication} but there "
            f"{'is 1 member' if count == 1 else f'are {count} members'}: each shard has {count} "
            f"{'replica' if count == 1 else 'replicas'}"
        )
    if config.limits.requests_in_flight < config.limits.requests_in_flight_per_connection:
        said.append(
            "limits.requests_in_flight is below limits.requests_in_flight_per_connection: "
            "one app can fill the node"
        )
    return tuple(said)


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
