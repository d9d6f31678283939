"""Members by name and the routing over them: what gossip tells is what the router is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import structlog.testing
import trio

from gossip.messages import Address, State
from node import facts
from node.facts import Health, Held, Load, pack_hot, pack_node, pack_primaries, pack_shards
from node.members import Members
from node.routing import GossipCluster
from node.status import members_status
from router.layout import Placement
from router.planning import first_layout
from tests.unit.node.gossips import FakeGossip, Hub
from tests.unit.node.peers import on_trio
from tests.unit.node.test_bootstrap import fact


def join(hub: Hub, id: int, name: str, **changes: Any) -> FakeGossip:
    gossip = hub.join(id, **changes)
    gossip.set_fact(facts.NODE, pack_node(fact(name)))
    return gossip


def pair() -> tuple[Hub, Members, FakeGossip]:
    hub = Hub()
    members = Members(join(hub, 1, "a"), fact("a"), 1)
    return hub, members, join(hub, 2, "b", port=7_500)


@on_trio
async def test_members_are_found_by_the_name_they_tell() -> None:
    hub, members, b = pair()
    assert [one.name for one in members.all()] == ["a", "b"]
    assert [one.name for one in members.others()] == ["b"]
    assert "b" in members
    assert "c" not in members
    assert members.address("b") == ("127.0.0.1", 7_500)
    assert members.address("c") is None
    hub.join(3)
    assert members.name_of(3) == "0000000000000003"
    assert members.address(members.name_of(3)) is None, "nobody is called before it has said who it is"
    hub.put(2, "moved", address=Address("127.0.0.1", 7_600))
    assert members.address("b") == ("127.0.0.1", 7_600)
    b.set_fact(facts.NODE, b"\xc1")
    assert "b" not in members
    members.gossip.forget(2)
    assert len(members.all()) == 2
    assert members.name_of(2) == "b", "who has left keeps its name in what is told of it"
    await trio.lowlevel.checkpoint()


@on_trio
async def test_of_two_with_one_name_the_living_one_then_the_smaller_id_counts() -> None:
    hub, members, _ = pair()
    with structlog.testing.capture_logs() as logs:
        join(hub, 3, "b", port=7_700)
        known = members.get("b")
        assert known is not None
        assert known.id == 2
        assert "name_conflict" in members.problems()[0]
        hub.put(2, "suspected", state=State.SUSPECT)  # still alive
        assert members.get("b").id == 2  # type: ignore[union-attr]
        hub.put(2, "down", state=State.DOWN)
        assert members.get("b").id == 3  # type: ignore[union-attr]
        assert members.problems() == []
    conflicts = [one for one in logs if one["event"] == "name_conflict"]
    assert len(conflicts) == 1, "told once"
    assert conflicts[0]["chosen"] == f"{2:016x}"
    await trio.lowlevel.checkpoint()


@on_trio
async def test_who_has_left_is_told_from_who_was_never_heard() -> None:
    hub, members, _ = pair()
    layout = first_layout([fact(n).member() for n in "abc"], 4, 3, "0f" * 16)
    parts = SimpleNamespace(members=members, layout=layout, links=FakeLinks())

    def states() -> dict[str, str]:
        return {row["name"]: row["state"] for row in members_status(parts)}  # type: ignore[arg-type]

    assert states() == {"a": "alive", "b": "alive", "c": "unheard"}
    members.gossip.forget(2)
    assert states() == {"a": "alive", "b": "left", "c": "unheard"}
    hub.put(2, "joined", state=State.ALIVE, boot=2)
    assert states() == {"a": "alive", "b": "alive", "c": "unheard"}
    await trio.lowlevel.checkpoint()


class FakeLinks:
    def __init__(self) -> None:
        self.up = {"b"}

    def connected(self, name: str) -> bool:
        return name in self.up

    def __getitem__(self, name: str) -> str:
        return f"link to {name}"


def routing(members: Members, links: FakeLinks, *flags: Health) -> GossipCluster:
    health = flags[0] if flags else Health(0)
    rests = lambda name: name == "resting"  # noqa: E731
    return GossipCluster(members, {}, None, links, {}, {}, lambda: health, rests)  # type: ignore[arg-type]


@on_trio
async def test_who_leads_is_what_our_replica_hears_then_what_the_living_say_then_the_layout() -> None:
    hub, members, b = pair()
    c = join(hub, 3, "c")
    actor = SimpleNamespace(primary="")
    placements = {s: Placement(shard=s, epoch=1, voters=("a", "b", "c")) for s in (4, 9)}
    parts = (members, placements, None, FakeLinks(), {4: actor}, {})
    cluster = GossipCluster(*parts, lambda: Health(0), lambda _name: False)  # type: ignore[arg-type]
    assert [cluster.primary(4), cluster.primary(9)] == ["a", "a"]
    b.set_fact(facts.PRIMARIES, pack_primaries({4: 2, 9: 7}))
    c.set_fact(facts.PRIMARIES, pack_primaries({9: 6}))
    assert [cluster.primary(4), cluster.primary(9)] == ["b", "b"], "the greatest epoch counts"
    c.set_fact(facts.PRIMARIES, pack_primaries({9: 8}))
    assert members.primary(9) == "c"
    actor.primary = "c"
    assert cluster.primary(4) == "c"
    actor.primary = ""
    hub.put(3, "down", state=State.DOWN)
    assert members.primary(9) == "b", "the dead lead nothing"
    b.set_fact(facts.PRIMARIES, b"\x01\x00")
    assert members.primary(9) == "", "what cannot be read is skipped"
    assert cluster.primary(9) == "a"
    await trio.lowlevel.checkpoint()


@on_trio
async def test_alive_needs_gossip_and_a_link() -> None:
    hub, members, _ = pair()
    links = FakeLinks()
    cluster = routing(members, links)
    assert cluster.alive("a")
    assert cluster.alive("b")
    assert not cluster.alive("nobody")
    links.up.clear()
    assert not cluster.alive("b")
    links.up.add("b")
    hub.put(2, "suspected", state=State.SUSPECT)
    assert cluster.alive("b"), "a suspect is the last resort, not a dead one"
    assert cluster.avoid("b")
    hub.put(2, "refuted", state=State.ALIVE)
    assert not cluster.avoid("b")
    hub.put(2, "down", state=State.DOWN)
    assert not cluster.alive("b")
    await trio.lowlevel.checkpoint()


@on_trio
async def test_who_says_that_it_is_not_well_is_avoided_ourselves_included() -> None:
    _, members, b = pair()
    cluster = routing(members, FakeLinks())
    assert not cluster.avoid("a")
    assert routing(members, FakeLinks(), Health.DISK).avoid("a")
    b.set_hot(pack_hot(b"", Load(), Health.DISK, []))
    assert cluster.avoid("b")
    b.set_hot(pack_hot(b"", Load(), Health(0), []))
    assert not cluster.avoid("b")
    await trio.lowlevel.checkpoint()


@on_trio
async def test_lag_is_read_only_with_the_shards_that_it_speaks_of() -> None:
    _, members, b = pair()
    cluster = routing(members, FakeLinks())
    shards = pack_shards([Held(4, True), Held(9, False)])
    hot = pack_hot(shards, Load(), Health(0), [0, 5_000])
    b.set_hot(hot)
    assert cluster.lags_ms("b") == {}, "nothing is known before the list of shards is"
    b.set_fact(facts.SHARDS, shards)
    assert cluster.lags_ms("b") == {9: pytest.approx(5_000, rel=0.05)}
    assert cluster.lags_ms("nobody") == {}
    b.set_fact(facts.SHARDS, pack_shards([Held(9, False), Held(4, True)]))
    assert cluster.lags_ms("b") == {}, "old lags are not read with new shards"
    await trio.lowlevel.checkpoint()
