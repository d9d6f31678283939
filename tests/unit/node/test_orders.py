"""What operators order: refused before anybody is told, told before it is committed, and taken back when it is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from node.duty import Duty
from node.fetching import Fetcher
from node.layouts import Layouts
from node.members import Members
from node.orders import Orders
from node.peerlink import PeerGoneError
from router.errors import RequestError
from router.operating import Maintenance, Moves, MovesAction
from router.planning import plan
from tests.unit.node.peers import on_trio
from tests.unit.node.test_bootstrap import fact
from tests.unit.node.test_registers import Net, first


class Node:
    """One of the net's, with its orders; what it leads is in `led`, and handing over takes all of it away."""

    def __init__(self, world: World, name: str, layouts: Layouts, members: Members) -> None:
        self.duty = Duty(world.net.folder / name / "duty", members, "")
        self.fetcher, self.led, self.follows = Fetcher(), {0}, True
        actors = {0: SimpleNamespace(shard=0, leads=False)}
        self._actor = actors[0]

        async def hand_over_all() -> None:
            await trio.lowlevel.checkpoint()
            if self.follows:
                self.lead(False)

        failover = SimpleNamespace(
            successor=lambda actor: "x" if self.follows and actor.leads else "", hand_over_all=hand_over_all
        )
        holdings = SimpleNamespace(actors=actors, fetcher=self.fetcher)
        self.layouts = layouts
        self.orders = Orders(members, world, layouts, self.duty, failover, holdings, world.rows)  # type: ignore[arg-type]

    def lead(self, leads: bool) -> None:
        self._actor.leads = leads

    def rate(self, shard: int) -> float | None:
        own = self.fetcher._own.get(shard)
        return None if own is None else own._bytes_per_s


class World:
    """Three members with registers, duty and orders of their own; a fourth that is none. Links end in each other's handlers."""

    def __init__(self, folder: Path) -> None:
        self.net = Net(folder)
        self.nodes: dict[str, Node] = {}
        self.asked: list[tuple[str, str]] = []
        self.voters: Sequence[str] = ()

    async def join(self) -> None:
        base = first()
        for name in ("a", "b", "c"):
            register = await self.net.join(name, base)
            gossip = self.net.gossips[name]
            members = Members(gossip, fact(name), gossip.id)
            layouts = Layouts(self.net.folder / name, members, self, SimpleNamespace(), dict)  # type: ignore[arg-type]
            layouts.register = register
            self.nodes[name] = Node(self, name, layouts, members)

    async def rows(self) -> dict[str, Any]:
        """As a cluster whose shard 0 is led by the first voter."""
        await trio.lowlevel.checkpoint()
        rows = [
            {"shard": 0, "node": name, "role": "replica" if at else "primary", "epoch": 1,
             "voters": list(self.voters)}
            for at, name in enumerate(self.voters)
        ]  # fmt: skip
        return {"replicas": rows, "silent": []}

    async def add(self, name: str) -> Any:
        await trio.lowlevel.checkpoint()

        async def call(op: str, body: Any, timeout_s: float) -> Any:
            if op == "register":
                return await (await self.net.add(name)).call(op, body, timeout_s)
            self.asked.append((name, op))
            if name in self.net.down:
                raise PeerGoneError(name, "connection refused", sent=False)
            if op == "sizes":
                return []
            return await self.nodes[name].orders.handlers()[op]("a", body)

        return SimpleNamespace(call=call)

    async def order(self, action: MovesAction, **fields: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "shard": 0, "source": "", "target": "", "bytes_per_s": None, "node": "", "dry_run": False,
            "timeout_ms": 2_000,
        }  # fmt: skip
        return await self.nodes["a"].orders.handle(Moves(action=action, **(values | fields)))

    def wished(self, shard: int = 0) -> Sequence[str]:
        return self.nodes["a"].layouts.here().layout.wished()[shard]

    def ends(self) -> tuple[str, str]:
        """One that is wished to hold shard 0, and the one that is not."""
        (target,) = {"a", "b", "c"}.difference(self.wished())
        return self.wished()[-1], target


async def world(folder: Path) -> World:
    made = World(folder)
    await made.join()
    return made


@on_trio
async def test_a_move_tells_its_rate_to_the_target_and_then_changes_the_wish(tmp_path: Path) -> None:
    one = await world(tmp_path)
    source, target = one.ends()
    done = await one.order("move", source=source, target=target, bytes_per_s=7_000)
    assert set(done["wished"]) == {"a", "b", "c"} - {source}
    assert one.wished() == tuple(done["wished"])
    assert one.nodes[target].rate(0) == 7_000
    # Once more it is done already.
    assert await one.order("move", source=source, target=target, bytes_per_s=7_000) == done


@on_trio
async def test_a_move_that_cannot_be_is_refused_before_the_target_hears_of_it(tmp_path: Path) -> None:
    one = await world(tmp_path)
    source, target = one.ends()
    for fields in (
        {"source": source, "target": "nobody"},
        {"source": target, "target": target},
        {"source": source, "target": one.wished()[0]},
        {"shard": 99, "source": source, "target": target},
    ):
        with pytest.raises(RequestError):
            await one.order("move", **fields, bytes_per_s=7_000)
    assert not one.asked
    assert all(node.rate(0) is None for node in one.nodes.values())


@on_trio
async def test_a_rate_is_taken_back_when_the_move_is_not_committed(tmp_path: Path) -> None:
    one = await world(tmp_path)
    source, target = one.ends()
    one.net.down = {"a", "b", "c"} - {"a", target}
    before = one.wished()

    async def nobody(peer: str, body: Any) -> Any:
        raise PeerGoneError("x", "gone", sent=False)

    for name, register in one.net.nodes.items():
        if name != "a":
            register.handle_peer = nobody  # type: ignore[method-assign]
    with pytest.raises(RequestError) as caught:
        await one.order("move", source=source, target=target, bytes_per_s=7_000, timeout_ms=1_000)
    assert caught.value.code in ("no_majority", "unavailable")
    assert one.wished() == before
    assert one.nodes[target].rate(0) is None


@on_trio
async def test_cancel_wishes_back_who_votes_and_takes_the_rate_back(tmp_path: Path) -> None:
    one = await world(tmp_path)
    one.voters = before = one.wished()
    with pytest.raises(RequestError, match="no replica of shard 0 is on its way"):
        await one.order("cancel")
    source, target = one.ends()
    await one.order("move", source=source, target=target, bytes_per_s=7_000)
    assert set((await one.order("cancel"))["wished"]) == set(before)
    assert one.nodes[target].rate(0) is None
    one.voters = ()
    with pytest.raises(RequestError) as caught:
        await one.order("cancel")
    assert caught.value.code == "no_primary"


@on_trio
async def test_a_drain_hands_over_first_and_is_taken_back_when_the_layout_cannot_be_committed(
    tmp_path: Path,
) -> None:
    one = await world(tmp_path)
    b = one.nodes["b"]
    b.lead(True)
    told = await one.order("drain", node="b", dry_run=True)
    assert told["moves"]
    assert (b.duty.order, sorted(one.asked)) == ("", [("b", "sizes"), ("c", "sizes")]), "only told"
    done = await one.order("drain", node="b")
    assert (done["handed_over"], done["kept"], b.duty.order) == ([0], [], "draining")
    assert "b" not in {member.name for member in one.nodes["a"].layouts.here().layout.members}
    assert await one.order("drain", node="b") == {"moves": [], "layout": done["layout"]}

    async def stale(*_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        raise RequestError("stale_plan", "another layout was committed first")

    one.nodes["a"].layouts.apply = stale  # type: ignore[method-assign]
    with pytest.raises(RequestError) as caught:
        await one.order("drain", node="c")
    assert caught.value.code == "stale_plan"
    assert one.nodes["c"].duty.order == ""
    with pytest.raises(RequestError):
        await one.order("drain", node="nobody")


@on_trio
async def test_the_list_counts_what_each_node_holds_and_witnesses(tmp_path: Path) -> None:
    """`gmco drain` waits for both. One that only follows and still names the old witness counts, too."""
    one = await world(tmp_path)
    named = [(0, "a", "c"), (0, "b", "c"), (1, "a", "c"), (1, "b", "")]
    rows = [{"shard": shard, "node": node, "role": "replica", "witness": w} for shard, node, w in named]

    async def told() -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"replicas": rows, "silent": []}

    one.nodes["a"].orders._rows = told
    found = await one.order("list")
    assert (found["held"], found["witnessed"]) == ({"a": 2, "b": 2}, {"c": 2})


@on_trio
async def test_maintenance_gives_up_handing_over_in_time_and_says_what_it_kept(tmp_path: Path) -> None:
    one = await world(tmp_path)
    b = one.nodes["b"]
    b.lead(True)
    b.follows = False
    ask = one.nodes["a"].orders.maintenance
    with trio.fail_after(5):
        assert (await ask(Maintenance("b", True, 500)))["kept"] == [0]
    assert b.duty.order == "maintenance"
    assert (await ask(Maintenance("b", False, 500)))["order"] == ""
    assert b.duty.order == ""
    with pytest.raises(RequestError) as caught:
        await ask(Maintenance("nobody", True, 500))
    assert caught.value.code == "unknown_node"
    one.net.down = {"b"}
    with pytest.raises(RequestError) as caught:
        await ask(Maintenance("b", True, 500))
    assert caught.value.code == "unavailable"
    with pytest.raises(Exception, match="no order"):
        await b.orders.on_duty("a", ["sleep", 100])


@on_trio
async def test_rebalance_changes_nothing_that_is_balanced_and_moves_back_what_is_not(tmp_path: Path) -> None:
    one = await world(tmp_path)
    before = one.nodes["a"].layouts.here().layout
    assert (await one.order("rebalance"))["layout"]["version"] == before.version
    # Everything to c, by hand.
    for shard in range(4):
        if "c" not in one.wished(shard):
            await one.order("move", shard=shard, source=one.wished(shard)[-1], target="c")
    version = one.nodes["a"].layouts.here().layout.version
    assert (await one.order("rebalance", dry_run=True))["moves"]
    assert one.nodes["a"].layouts.here().layout.version == version
    await one.order("rebalance")
    assert sum("c" in one.wished(shard) for shard in range(4)) < 4
    assert not plan(one.nodes["a"].layouts.here().layout, [], {}).moves
