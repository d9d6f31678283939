"""What operators ask of a node: status, events, keys, the layout; and once it has its shards, moves, failovers, repairs."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import structlog

from node.history import History
from node.keyrings import Keyrings
from node.layouts import Layouts
from node.orders import Orders
from node.status import Parts, own_status, whole_status
from node.steering import Steering
from router.errors import RequestError
from router.operating import (
    Cluster,
    Events,
    FailOver,
    ForgetNode,
    Keyring,
    Maintenance,
    Moves,
    Operating,
    Repair,
    Shards,
    Status,
)

log = structlog.get_logger(__name__)


class Operations:
    """Answers operators. What needs no shards is answered from the start, so that a node that waits can be asked what for."""

    def __init__(self, parts: Parts, history: History, keyrings: Keyrings, layouts: Layouts) -> None:
        self._parts, self._history, self._keyrings, self._layouts = parts, history, keyrings, layouts

    def handle(self, request: Operating) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        """The reply's fields. Raises RequestError."""
        match request:
            case Status():
                return whole_status(self._parts)
            case Events(after, wait_ms):
                return self._events(after, wait_ms / 1000)
            case ForgetNode(name):
                return self._forget(name)
            case Keyring():
                return self._keyrings.apply(request)
            case Shards():
                return self.shards()
            case FailOver():
                return self._steering().apply(request)
            case Repair():
                return self._steering().repair(request)
            case Cluster():
                return self._layouts.handle(request)
            case Moves():
                return self._orders().handle(request)
            case Maintenance():
                return self._orders().maintenance(request)

    def _steering(self) -> Steering:
        if self._parts.steering is None:
            raise self._not_ready()
        return self._parts.steering

    def _orders(self) -> Orders:
        if self._parts.orders is None:
            raise self._not_ready()
        return self._parts.orders

    def _not_ready(self) -> RequestError:
        return RequestError(
            "unavailable", f"{self._parts.name} is not ready: {self._parts.state}; ask another node"
        )

    async def shards(self) -> dict[str, Any]:
        """Every replica of every node. Raises RequestError."""
        others = await self._steering().shards()
        own = [{**row, "node": self._parts.name} for row in own_status(self._parts)["shards"]]
        rows = sorted(own + others["replicas"], key=lambda row: (row["shard"], row["node"]))
        return {"replicas": rows, "silent": others["silent"]}

    async def _events(self, after: int, wait_s: float) -> dict[str, Any]:
        found = await self._history.read(after, wait_s)
        # Sequences begin anew with each start: a reader that is answered by another node or boot begins anew, too.
        return {"node": self._parts.name, "boot": self._parts.boot, **found}

    def _forget(self, name: str) -> dict[str, Any]:
        members = self._parts.members
        known = next((one for one in members.all() if name in (one.name, f"{one.id:016x}")), None)
        if known is None:
            raise RequestError("unknown_node", f"there is no member {name!a}; see `gmco nodes`", "node")
        if known.alive:
            raise RequestError("refused", f"{name} is {known.state.name.lower()}; stop it first", "node")
        members.gossip.forget(known.id)
        log.warning("forgotten", member=name, id=f"{known.id:016x}")
        return {"node": known.name, "forgotten": f"{known.id:016x}"}
