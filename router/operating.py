"""Requests of operators: typed and checked. What is asked about the cluster instead of its records. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from router import shapes
from router.errors import RequestError

KEY_BYTES = 32
KeyAction = Literal["list", "install", "use", "remove"]


@dataclass(frozen=True, slots=True)
class Status:
    pass


@dataclass(frozen=True, slots=True)
class Events:
    """Events past the sequence `after`; an answer may be held back `wait_ms` for the first of them."""

    after: int
    wait_ms: float


@dataclass(frozen=True, slots=True)
class ForgetNode:
    node: str


@dataclass(frozen=True, slots=True)
class Keyring:
    """key: 32 bytes, with install; fingerprint: with use and remove."""

    action: KeyAction
    key: bytes
    fingerprint: str
    timeout_ms: float | None


@dataclass(frozen=True, slots=True)
class Shards:
    """Every replica of every node."""


@dataclass(frozen=True, slots=True)
class FailOver:
    """Another node shall lead the shard: `to`, or the one that has most of it. force: without a majority of its voters.

    confirmed: with force; without it only what would be lost is told.
    """

    shard: int
    to: str
    force: bool
    confirmed: bool
    timeout_ms: float | None


@dataclass(frozen=True, slots=True)
class Repair:
    """The shard's replicas are compared, and what differs is repaired."""

    shard: int
    timeout_ms: float | None


ClusterAction = Literal["show", "join", "leave", "set", "plan", "commit", "revert", "init", "recover"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """What an operator does to the layout (docs/layout.md). values: region, zone, host, capacity, replication, as given."""

    action: ClusterAction
    node: str
    values: dict[str, Any]
    members: tuple[str, ...]
    hash: str
    force: bool
    timeout_ms: float | None


MovesAction = Literal["list", "move", "cancel", "drain", "rebalance"]


@dataclass(frozen=True, slots=True)
class Moves:
    """Replicas on their way, and what sends them there: one shard's by hand, all of a node, or whatever balances the layout.

    bytes_per_s: of that move alone; 0: unthrottled; None: the target's share of its node's. dry_run: tell only.
    """

    action: MovesAction
    shard: int
    source: str
    target: str
    bytes_per_s: int | None
    node: str
    dry_run: bool
    timeout_ms: float | None


@dataclass(frozen=True, slots=True)
class Maintenance:
    """A node is worked at: it leads nothing meanwhile, and nobody rebuilds what it holds."""

    node: str
    on: bool
    timeout_ms: float | None


Operating = (
    Status | Events | ForgetNode | Keyring | Shards | FailOver | Repair | Cluster | Moves | Maintenance
)
STATUS = Status()


def _status(fields: dict[str, Any]) -> Status:
    if fields:
        shapes.convert(fields, shapes.NothingFields)
    return STATUS


def _events(fields: dict[str, Any]) -> Events:
    raw = shapes.convert(fields, shapes.EventsFields)
    return Events(raw.after, raw.wait_ms)


def _forget_node(fields: dict[str, Any]) -> ForgetNode:
    return ForgetNode(shapes.convert(fields, shapes.ForgetNodeFields).node)


def _keyring(fields: dict[str, Any]) -> Keyring:
    raw = shapes.convert(fields, shapes.KeyringFields)
    wanted = {"list": (), "install": ("key",), "use": ("fingerprint",), "remove": ("fingerprint",)}[
        raw.action
    ]
    for name in ("key", "fingerprint"):
        given = getattr(raw, name) is not None
        if given and name not in wanted:
            raise RequestError("bad_request", f"{raw.action} takes no {name}", name)
        if not given and name in wanted:
            raise RequestError("missing_field", f"send {name}", name)
    key = b"" if raw.key is None else _key(raw.key)
    return Keyring(raw.action, key, raw.fingerprint or "", raw.timeout_ms)


def _key(raw: Any) -> bytes:
    # What is wrong with it is not shown: it may be a good key, misspelt.
    message = f"send a key as {KEY_BYTES} bytes or {2 * KEY_BYTES} hex digits"
    if isinstance(raw, str):
        if len(raw) != 2 * KEY_BYTES or not raw.isalnum():  # fromhex skips blanks
            raise RequestError("bad_type", message, "key")
        try:
            raw = bytes.fromhex(raw)
        except ValueError:
            raise RequestError("bad_type", message, "key") from None
    if not isinstance(raw, bytes) or len(raw) != KEY_BYTES:
        raise RequestError("bad_type", message, "key")
    return raw


def _shards(fields: dict[str, Any]) -> Shards:
    if fields:
        shapes.convert(fields, shapes.NothingFields)
    return Shards()


def _fail_over(fields: dict[str, Any]) -> FailOver:
    raw = shapes.convert(fields, shapes.FailOverFields)
    if raw.force and not raw.to:
        raise RequestError("missing_field", "force needs to: the node that shall lead", "to")
    if raw.confirmed and not raw.force:
        raise RequestError("bad_request", "only force is to be confirmed", "confirmed")
    return FailOver(raw.shard, raw.to, raw.force, raw.confirmed, raw.timeout_ms)


def _repair(fields: dict[str, Any]) -> Repair:
    raw = shapes.convert(fields, shapes.RepairFields)
    return Repair(raw.shard, raw.timeout_ms)


# What each action of `cluster` needs, and what it may have besides.
_PLACES = ("region", "zone", "host", "capacity")
_CLUSTER_FIELDS: dict[ClusterAction, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "show": ((), ()),
    "join": (("node",), _PLACES),
    "leave": (("node",), ()),
    "set": ((), ("node", "replication", *_PLACES)),
    "plan": ((), ()),
    "commit": (("hash",), ()),
    "revert": ((), ()),
    "init": ((), ("members",)),
    "recover": (("force",), ()),
}


def _cluster(fields: dict[str, Any]) -> Cluster:
    raw = shapes.convert(fields, shapes.ClusterFields)
    needed, allowed = _CLUSTER_FIELDS[raw.action]
    given = {
        name for name in fields if name not in ("action", "timeout_ms") and getattr(raw, name) is not None
    }
    for name in needed:
        if name not in given or getattr(raw, name) is False:
            raise RequestError("missing_field", f"{raw.action} needs {name}", name)
    for name in sorted(given.difference(needed, allowed)):
        raise RequestError("bad_request", f"{raw.action} takes no {name}", name)
    values = {name: getattr(raw, name) for name in (*_PLACES, "replication") if name in given}
    if raw.action == "set":
        whole = "replication" in values
        if whole == ("node" in given) or (whole and len(values) > 1) or not values:
            raise RequestError(
                "bad_request", "set a node's region, zone, host or capacity, or replication alone"
            )
    return Cluster(
        raw.action,
        raw.node or "",
        values,
        tuple(raw.members or ()),
        raw.hash or "",
        raw.force,
        raw.timeout_ms,
    )


# As _CLUSTER_FIELDS, of `moves`.
_MOVES_FIELDS: dict[MovesAction, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "list": ((), ()),
    "move": (("shard", "source", "target"), ("bytes_per_s",)),
    "cancel": (("shard",), ()),
    "drain": (("node",), ("dry_run",)),
    "rebalance": ((), ("dry_run",)),
}
# Below it a snapshot would be closed for idleness between two parts.
MOVE_BYTES_PER_S_MIN = 100_000


def _moves(fields: dict[str, Any]) -> Moves:
    raw = shapes.convert(fields, shapes.MovesFields)
    needed, allowed = _MOVES_FIELDS[raw.action]
    given = {
        name for name in fields if name not in ("action", "timeout_ms") and getattr(raw, name) is not None
    }
    for name in needed:
        if name not in given:
            raise RequestError("missing_field", f"{raw.action} needs {name}", name)
    for name in sorted(given.difference(needed, allowed)):
        raise RequestError("bad_request", f"{raw.action} takes no {name}", name)
    if raw.bytes_per_s and raw.bytes_per_s < MOVE_BYTES_PER_S_MIN:
        raise RequestError(
            "out_of_range", f"at least {MOVE_BYTES_PER_S_MIN:,} bytes/s, or 0: unthrottled", "bytes_per_s"
        )
    return Moves(
        raw.action,
        raw.shard or 0,
        raw.source or "",
        raw.target or "",
        raw.bytes_per_s,
        raw.node or "",
        bool(raw.dry_run),
        raw.timeout_ms,
    )


def _maintenance(fields: dict[str, Any]) -> Maintenance:
    raw = shapes.convert(fields, shapes.MaintenanceFields)
    return Maintenance(raw.node, raw.on, raw.timeout_ms)


PARSERS: dict[str, Callable[[dict[str, Any]], Operating]] = {
    "status": _status,
    "events": _events,
    "forget_node": _forget_node,
    "keyring": _keyring,
    "shards": _shards,
    "failover": _fail_over,
    "repair": _repair,
    "cluster": _cluster,
    "moves": _moves,
    "maintenance": _maintenance,
}
