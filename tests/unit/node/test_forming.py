"""Nodes that form a cluster over gossip in memory, with their files: one layout, on every disk before it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog.testing
import trio

from node import facts, forming, layoutfile
from node.forming import Founding, LayoutGuard
from node.members import Members
from router.layout import Layout
from tests.unit.node.gossips import FakeGossip, Hub
from tests.unit.node.peers import on_trio, until
from tests.unit.node.test_bootstrap import fact, layout


class Founder:
    """A node on its way to a layout."""

    def __init__(self, hub: Hub, id: int, name: str, folder: Path, **changes: Any) -> None:
        self.gossip: FakeGossip = hub.join(id)
        self.members = Members(self.gossip, fact(name, **changes), id)
        self.gossip.set_fact(facts.NODE, facts.pack_node(self.members.own))
        self.path = folder / name
        self.said: list[str] = []
        self.layout: Layout | None = None
        self.founding = Founding()

    async def run(self) -> None:
        self.layout = await forming.form(self.members, self.path, "c", self.founding, self.said.append)

    @property
    def told(self) -> Layout | None:
        return facts.unpack_layout(self.gossip.facts(self.gossip.id))


@on_trio
async def test_three_make_one_layout_and_a_fourth_adopts_it(tmp_path: Path) -> None:
    hub = Hub()
    founders = [Founder(hub, i, name, tmp_path) for i, name in enumerate("ca")]
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for founder in founders:
                nursery.start_soon(founder.run)
            await until(lambda: all("waiting for 1 of 3 nodes" in one.said for one in founders))
            founders.append(Founder(hub, 3, "b", tmp_path))
            nursery.start_soon(founders[2].run)
        late = Founder(hub, 9, "A", tmp_path)  # whose name comes before all others
        await late.run()
    made = founders[0].layout
    assert made is not None
    assert [member.name for member in made.members] == ["a", "b", "c"]
    for one in [*founders, late]:
        assert one.layout == one.told == layoutfile.load(one.path, cluster="c") == made
        assert facts.WAITING not in one.gossip.facts(one.gossip.id)


@on_trio
async def test_it_is_on_the_disk_before_anybody_hears_of_it(tmp_path: Path) -> None:
    """`layout-first`."""
    hub = Hub()
    founder = Founder(hub, 1, "a", tmp_path, bootstrap=1)
    seen: list[bool] = []
    founder.gossip.watch.append(
        lambda event: seen.append(founder.path.exists()) if event.key == facts.LAYOUT else None
    )
    await founder.run()
    assert seen == [True]
    other = Founder(hub, 2, "b", tmp_path / "absent")
    try:
        await other.run()
    except FileNotFoundError:
        assert other.told is None
    else:
        raise AssertionError("it cannot have been written")


@on_trio
async def test_what_cannot_be_is_said_once_and_mended_by_the_others(tmp_path: Path) -> None:
    hub = Hub()
    a, b = Founder(hub, 1, "a", tmp_path, bootstrap=2), Founder(hub, 2, "b", tmp_path, bootstrap=2, dim=99)
    with structlog.testing.capture_logs() as logs, trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.run)
            await until(lambda: any("dim 16 here and 99 there" in said for said in a.said))
            b.gossip.set_fact(facts.NODE, facts.pack_node(fact("b", bootstrap=2)))
            b.members.own = fact("b", bootstrap=2)
            nursery.start_soon(b.run)
    assert [one["event"] for one in logs].count("config_mismatch") == 1
    assert a.layout == b.layout is not None


@on_trio
async def test_two_layouts_are_told_to_those_who_have_one_and_to_those_who_have_none(tmp_path: Path) -> None:
    hub = Hub()
    nodes = [Founder(hub, i, name, tmp_path) for i, name in enumerate("abc")]
    mine, theirs = layout("a"), layout("b")
    forming.tell(nodes[0].members, mine)
    with structlog.testing.capture_logs() as logs, trio.fail_after(10):
        guard = LayoutGuard(nodes[0].members, mine)
        assert guard.problem == ""
        forming.tell(nodes[1].members, theirs)
        assert mine.hash in guard.problem
        assert theirs.hash in guard.problem
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nodes[2].run)
            await until(lambda: any("layout_conflict" in said for said in nodes[2].said))
            nursery.cancel_scope.cancel()
        assert not nodes[2].path.exists()
        forming.tell(nodes[1].members, mine)
        assert guard.problem == ""
    assert [one["event"] for one in logs].count("layout_conflict") == 2
