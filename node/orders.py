"""What operators order: moves, drains, maintenance. Each is a change of the wish, or of what a node says of itself; the primaries
do the rest (docs/layout.md, *Orders*)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import structlog
import trio

from node.duty import ORDERS, Duty, Order
from node.failover import Failover
from node.holdings import Holdings
from node.layouts import Layouts
from node.links import Links
from node.members import Members
from node.peerlink import PeerError, RemoteError
from node.progress import overview
from node.remote import coded
from router.errors import RequestError, known
from router.layout import Layout
from router.moving import moved, stayed
from router.operating import Maintenance, Moves
from router.planning import Change, limits, plan
from router.ports import NodeError

log = structlog.get_logger(__name__)

TIMEOUT_S = 20.0
CALL_S = 2.0
AGAIN_S = 0.2


class Orders:
    """Handles the ops `moves` and `maintenance`, and for peers `duty` and `pace`."""

    def __init__(
        self,
        members: Members,
        links: Links,
        layouts: Layouts,
        duty: Duty,
        failover: Failover,
        holdings: Holdings,
        rows: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        """rows: every replica of every node (`gmco shards`)."""
        self._members, self._links, self._layouts = members, links, layouts
        self._duty, self._failover, self._holdings = duty, failover, holdings
        self._rows = rows

    def handlers(self) -> dict[str, Callable[[str, Any], Awaitable[Any]]]:
        """Of peers' ops."""
        return {"duty": coded(self.on_duty), "pace": coded(self.on_pace)}

    async def handle(self, request: Moves) -> dict[str, Any]:
        """The reply's fields. Raises RequestError."""
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else TIMEOUT_S
        if request.action == "list":
            return await self._list()
        if request.action == "move":
            return await self._move(request, timeout_s)
        if request.action == "cancel":
            return await self._cancel(request.shard, timeout_s)
        if request.action == "drain":
            return await self._drain(request.node, request.dry_run, timeout_s)
        return await self._rebalance(request.dry_run, timeout_s)

    async def _list(self) -> dict[str, Any]:
        layout = self._layouts.here().layout
        found = await self._rows()
        seen = overview(found["replicas"], layout.version, layout.wished())
        held: dict[str, int] = {}
        # Of those that it witnesses, too, a node must be free before it can be stopped. Any replica that names it counts: who
        # follows slowly may be asked for its vote yet.
        witnessed: dict[str, set[int]] = {}
        for row in found["replicas"]:
            held[row["node"]] = held.get(row["node"], 0) + 1
            if row.get("witness"):
                witnessed.setdefault(row["witness"], set()).add(row["shard"])
        return {
            "moves": [asdict(one) for one in seen.moves],
            "unknown": list(seen.unknown),
            "silent": found["silent"],
            "held": held,
            "witnessed": {name: len(shards) for name, shards in witnessed.items()},
            "layout": {"version": layout.version, "hash": layout.hash},
        }

    # -- one shard ------------------------------------------------------------------------------------------------

    async def _move(self, request: Moves, timeout_s: float) -> dict[str, Any]:
        make = partial(moved, shard=request.shard, source=request.source, target=request.target)
        # Refused before anybody is told anything.
        await self._layouts.checked(make)
        await self._pace(request.target, request.shard, request.bytes_per_s)
        try:
            layout = await self._layouts.apply(make, timeout_s)
        except RequestError as error:
            if error.code != "outcome_unknown":
                await self._pace(request.target, request.shard, None)
            raise
        return self._done(request.shard, layout)

    async def _cancel(self, shard: int, timeout_s: float) -> dict[str, Any]:
        rows = [row for row in (await self._rows())["replicas"] if row["shard"] == shard]
        leading = [row for row in rows if row["role"] == "primary"]
        if not leading:
            raise RequestError(
                "no_primary", f"nobody leads shard {shard} now, so nobody knows who votes; try again", "shard"
            )
        voters = max(leading, key=lambda row: int(row["epoch"]))["voters"]
        before = self._layouts.here().layout
        layout = await self._layouts.apply(partial(stayed, shard=shard, voters=voters), timeout_s)
        if layout.hash == before.hash:
            raise RequestError(
                "refused",
                f"no replica of shard {shard} is on its way: all that are wished vote already ({', '.join(voters)})",
                "shard",
            )
        for name in set(before.wished()[shard]).difference(layout.wished()[shard]):
            await self._pace(name, shard, None)
        return self._done(shard, layout)

    def _done(self, shard: int, layout: Layout) -> dict[str, Any]:
        return {
            "shard": shard,
            "wished": list(layout.wished()[shard]),
            "layout": {"version": layout.version, "hash": layout.hash},
            "limits": [asdict(limit) for limit in limits(layout)],
        }

    async def _pace(self, name: str, shard: int, bytes_per_s: int | None) -> None:
        """Who takes the replica keeps the rate, so that it counts whoever leads. None need not be heard."""
        try:
            await self._tell(name, "pace", [shard, bytes_per_s], CALL_S)
        except RequestError:
            if bytes_per_s is not None:
                raise

    async def on_pace(self, peer: str, body: Any) -> None:
        """The peer op `pace`: [shard, bytes/s or nil]."""
        shard, bytes_per_s = body
        self._holdings.fetcher.pace(int(shard), None if bytes_per_s is None else float(bytes_per_s))

    # -- a node ---------------------------------------------------------------------------------------------------

    async def _drain(self, node: str, dry_run: bool, timeout_s: float) -> dict[str, Any]:
        leave = Change(action="leave", node=node)
        layout = self._layouts.here().layout
        if layout.member(node) is None and self._members.get(node) is not None:
            # It was drained before; perhaps this very order was, and its answer was lost.
            return {"moves": [], "layout": {"version": layout.version, "hash": layout.hash}}
        told = await self._layouts.told([leave])
        if dry_run:
            return told
        away = self._members.get(node)
        handed: dict[str, Any] = {"handed_over": [], "kept": []}
        try:
            if away is not None and away.alive:
                handed = await self._tell(node, "duty", ["draining", int(500 * timeout_s)], timeout_s)
            layout = await self._layouts.apply(lambda base: plan(base, [leave], {}).layout, timeout_s)
        except RequestError as error:
            if away is not None and away.alive and error.code != "outcome_unknown":
                # Also when only its answer was lost; what failed first is what is told.
                with contextlib.suppress(RequestError):
                    await self._tell(node, "duty", ["", 0], CALL_S)
            raise
        return {**told, **handed, "layout": {"version": layout.version, "hash": layout.hash}}

    async def _rebalance(self, dry_run: bool, timeout_s: float) -> dict[str, Any]:
        told = await self._layouts.told([])
        if dry_run or not (told["moves"] or told["handovers"]):
            layout = self._layouts.here().layout
        else:
            layout = await self._layouts.apply(lambda base: plan(base, [], {}).layout, timeout_s)
        return {**told, "layout": {"version": layout.version, "hash": layout.hash}}

    async def maintenance(self, request: Maintenance) -> dict[str, Any]:
        """Raises RequestError."""
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else TIMEOUT_S
        order: Order = "maintenance" if request.on else ""
        handed = await self._tell(request.node, "duty", [order, int(800 * timeout_s)], timeout_s)
        return {"node": request.node, "order": order, **handed}

    async def on_duty(self, peer: str, body: Any) -> dict[str, Any]:
        """The peer op `duty`: [order, time left ms] → the shards that we led and lead no more, and those that we still lead.

        On disk and told before anything is handed over, so that nothing comes back. Raises NodeError.
        """
        order, left_ms = body
        if order not in ORDERS:
            raise NodeError("bad_request", f"{order!r} is no order that this node knows")
        try:
            await self._duty.set(order)
        except OSError as error:
            raise NodeError("internal", f"the disk of {self._members.own.name} failed: {error}") from error
        before = self._led()
        if self._duty.resting:
            with trio.move_on_after(left_ms / 1000):
                while any(self._failover.successor(self._holdings.actors[shard]) for shard in self._led()):
                    await self._failover.hand_over_all()
                    await trio.sleep(AGAIN_S)
        kept = self._led()
        return {"handed_over": sorted(before - kept), "kept": sorted(kept)}

    def _led(self) -> set[int]:
        return {shard for shard, actor in self._holdings.actors.items() if actor.leads}

    async def _tell(self, name: str, op: str, body: Any, timeout_s: float) -> Any:
        """That node, which may be this one. Raises RequestError."""
        handlers = {"duty": self.on_duty, "pace": self.on_pace}
        try:
            if name == self._members.own.name:
                return await handlers[op](name, body)
            if self._members.get(name) is None:
                raise RequestError("unknown_node", f"there is no node {name!a} in gossip", "node")
            return await (await self._links.add(name)).call(op, body, timeout_s)
        except (RemoteError, NodeError) as error:
            raise RequestError(known(error.code), error.message) from error
        except PeerError as error:
            raise RequestError("unavailable", f"{name} cannot be reached: {error}", "node") from error
