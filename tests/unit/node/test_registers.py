"""The register's shell: what is on the disk when something is told, commits over links, later layouts taken over from gossip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from node import facts, inforce, layoutfile, registerwire, staged
from node.inforce import InForce
from node.members import Members
from node.peerlink import PeerGoneError, RemoteError
from node.register import (
    NEVER,
    Accept,
    Accepted,
    Ballot,
    Learn,
    Learned,
    Prepare,
    Promise,
    Refuse,
    Slot,
    Stale,
)
from node.registers import Register, load, open_register
from router.layout import Layout, Member
from router.planning import Change, first_layout, plan
from storage.errors import DamagedFileError, ForeignDataError, FormatError
from tests.unit.node.gossips import FakeGossip, Hub
from tests.unit.node.peers import on_trio, until
from tests.unit.node.test_bootstrap import fact

NAMES = "abc"


def first() -> Layout:
    members = [Member(name=name, zone=name, id=f"{i:016x}") for i, name in enumerate(NAMES, 1)]
    return first_layout(members, 4, 2, "0f" * 16)


def follower(base: Layout, capacity: int) -> Layout:
    return plan(base, [Change(action="set", node="a", values=(("capacity", capacity),))], {}).layout


class Net:
    """Nodes whose links end in each other's handlers. Implements `node.registers.Links`."""

    def __init__(self, folder: Path) -> None:
        self.hub, self.folder = Hub(), folder
        self.nodes: dict[str, Register] = {}
        self.gossips: dict[str, FakeGossip] = {}
        self.down: set[str] = set()

    async def join(self, name: str, layout: Layout) -> Register:
        id_ = len(self.nodes) + 1
        gossip = self.gossips[name] = self.hub.join(id_)
        members = Members(gossip, fact(name), id_)
        gossip.set_fact(facts.NODE, facts.pack_node(members.own))
        (self.folder / name).mkdir()
        self.nodes[name] = await open_register(self.folder / name, "c", members, self, layout)
        return self.nodes[name]

    async def add(self, name: str) -> _Link:
        await trio.lowlevel.checkpoint()
        return _Link(self, name)


class _Link:
    def __init__(self, net: Net, name: str) -> None:
        self.net, self.name = net, name

    async def call(self, op: str, body: Any, timeout_s: float) -> Any:
        assert op == "register"
        if self.name in self.net.down:
            raise PeerGoneError(self.name, "connection refused", sent=False)
        # As over a wire: what cannot be packed does not travel.
        return msgpack.unpackb(
            msgpack.packb(
                await self.net.nodes[self.name].handle_peer("x", msgpack.unpackb(msgpack.packb(body)))
            )
        )


@on_trio
async def test_a_commit_is_on_the_disks_of_both_majorities_and_told(tmp_path: Path) -> None:
    net, base = Net(tmp_path), first()
    a, b, c = [await net.join(name, base) for name in NAMES]
    net.down = {"c"}
    seen: list[Layout] = []
    a.watch.append(seen.append)
    value = follower(base, 2)
    with trio.fail_after(10):
        done = await a.commit(value, 5.0)
    assert done.outcome == "committed"
    assert seen == [value]
    for name, register in (("a", a), ("b", b)):
        assert register.layout == layoutfile.load(tmp_path / name / "layout", cluster="c") == value
        assert load(tmp_path / name / "register", cluster="c").version == 2
        assert facts.unpack_layout(net.hub.told[net.gossips[name].id]) == value
    assert c.layout == base
    # The third hears it by gossip.
    async with trio.open_nursery() as nursery:
        await nursery.start(c.run)
        await until(lambda: c.layout == value)
        nursery.cancel_scope.cancel()
    # Once more is the same commit; another one on the old base is not.
    assert (await a.commit(value, 5.0)).outcome == "committed"
    assert (await a.commit(follower(base, 3), 5.0)).outcome == "conflict"


@on_trio
async def test_without_a_majority_nothing_happens_and_it_says_so(tmp_path: Path) -> None:
    net, base = Net(tmp_path), first()
    a, _, _ = [await net.join(name, base) for name in NAMES]
    net.down = {"b", "c"}
    with trio.fail_after(10):
        assert (await a.commit(follower(base, 2), 0.5)).outcome == "unavailable"
    assert a.layout == base
    # Its own promise and its counter are on the disk, and a restart goes on above them.
    kept = load(tmp_path / "a" / "register", cluster="c")
    assert (kept.counter, kept.promised, kept.hash) == (1, Ballot(1, f"a:{1:016x}"), base.hash)


@on_trio
async def test_two_at_once_have_one_winner(tmp_path: Path) -> None:
    net, base = Net(tmp_path), first()
    nodes = [await net.join(name, base) for name in NAMES]
    outcomes: list[str] = []

    async def commit(register: Register, capacity: int) -> None:
        outcomes.append((await register.commit(follower(base, capacity), 10.0)).outcome)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for i, register in enumerate(nodes):
                nursery.start_soon(commit, register, i + 2)
    assert sorted(outcomes) == ["committed", "conflict", "conflict"]
    assert len({register.layout.hash for register in nodes}) == 1


@on_trio
async def test_layouts_of_other_clusters_and_rubbish_are_not_taken(tmp_path: Path) -> None:
    net, base = Net(tmp_path), first()
    a = await net.join("a", base)
    foreign = first_layout(base.members, 4, 2, "ee" * 16)
    later = follower(foreign, 2)
    await a.hear(later)
    assert a.layout == base
    for body in (
        registerwire.pack_ask(Learn(later)),
        [1],
        ["x", base.canonical, NEVER, None],
        ["learn", b"", NEVER, 0],
    ):
        with pytest.raises(RemoteError) as caught:
            await a.handle_peer("b", body)
        assert caught.value.code == "bad_request"


ONE = first()
TWO = follower(ONE, 2)
B = Ballot(7, "a")


def test_messages_travel_as_they_are() -> None:
    for ask in (Prepare(ONE, B), Accept(ONE, B, TWO), Learn(TWO)):
        assert registerwire.unpack_ask(registerwire.pack_ask(ask)) == ask
    for reply in (
        Promise(B, None),
        Promise(B, (B, TWO)),
        Accepted(B),
        Learned(TWO.hash),
        Refuse(B, NEVER, "new_disk"),
        Stale(TWO),
    ):
        assert registerwire.unpack_reply(registerwire.pack_reply(reply)) == reply


def test_the_file_is_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "register"
    assert load(path, cluster="c").slot(ONE) == Slot(ONE)
    slot = Slot(ONE, B, (B, TWO))
    path.write_bytes(registerwire.to_file(registerwire.keep(slot, 9), "c"))
    kept = load(path, cluster="c")
    assert kept.slot(ONE) == slot
    assert kept.counter == 9
    assert kept.slot(TWO) == Slot(TWO), "it is about another version"
    # The layout beside it was set back: no part in anything until it has caught up.
    path.write_bytes(registerwire.to_file(registerwire.keep(Slot(TWO, B), 9), "c"))
    assert load(path, cluster="c").slot(ONE).promised > Ballot(1 << 60, "z")
    good = path.read_bytes()
    for bad, error in (
        (good.replace(b'"counter": 9', b'"counter": 8'), DamagedFileError),
        (good[:30], DamagedFileError),
        (good.replace(b'"format": 1', b'"format": 2'), FormatError),
    ):
        path.write_bytes(bad)
        with pytest.raises(error):
            load(path, cluster="c")
    path.write_bytes(good)
    with pytest.raises(ForeignDataError):
        load(path, cluster="other")


def test_placements_in_force_are_kept_apart_from_the_wish(tmp_path: Path) -> None:
    path = tmp_path / "placements"
    assert inforce.load(path, cluster="c", shard_count=4) is None
    known = InForce({one.shard: one for one in ONE.placements()})
    inforce.save(path, known, cluster="c")
    again = inforce.load(path, cluster="c", shard_count=4)
    assert again is not None
    assert dict(again) == dict(known)
    with pytest.raises(DamagedFileError):
        inforce.load(path, cluster="c", shard_count=5)
    with pytest.raises(ForeignDataError):
        inforce.load(path, cluster="d", shard_count=4)
    with pytest.raises(ValueError, match="not of 4"):
        inforce.unpack(known.pack()[1:], 4)


def test_staged_changes_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "staged"
    assert staged.load(path) == []
    changes = [
        Change(action="join", node="x", values=(("zone", "z"), ("capacity", 2))),
        Change(action="set", values=(("replication", 2),)),
        Change(action="leave", node="a"),
    ]
    staged.save(path, changes)
    assert staged.load(path) == changes
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DamagedFileError):
        staged.load(path)
