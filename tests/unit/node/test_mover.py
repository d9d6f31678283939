"""What a node does with its replicas when other primaries ask it to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from node.arrivals import IN_MAX, Arrivals
from node.config import ClusterConfig
from node.duty import Duty
from node.fetching import Fetcher
from node.mover import AGAIN_S, CALL_S, EVERY_S, OUT_MAX, SETTLING_S, Mover
from node.peerlink import PeerTimeoutError, RemoteError
from node.placement import Placement
from node.shard import ShardActor
from router.layout import Layout, Member
from storage.errors import DiskFullError
from tests.unit.node.peers import on_trio
from tests.unit.node.test_failover_shell import epoch_record
from tests.unit.node.voters import change, running


class Held:
    """As Holdings, of one replica."""

    def __init__(self, actor: ShardActor) -> None:
        self.actors = {0: actor}

    async def drop(self, shard: int) -> None:
        await trio.lowlevel.checkpoint()
        del self.actors[shard]


@on_trio
async def test_a_replica_with_records_that_nobody_else_may_have_is_not_removed(tmp_path: Path) -> None:
    """`tail-kept`: one that comes back from the dead is in no placement any more; its log may end in records that it alone has
    acknowledged. Only when it follows that primary it is known what it must offer first."""
    async with running(tmp_path, ("a", "b", "c")) as actor:
        held = Held(actor)
        arrivals = Arrivals("a", held, None)  # type: ignore[arg-type]
        actor.election.on_echo("b", trio.current_time())
        await actor.write([change(1)], "primary", b"1" * 16, 2.0)
        assert not await arrivals.on_dismiss("b", [0, 9]), "it leads"
        actor.act(actor, actor.election.on_leader(9, trio.current_time()))
        assert not await arrivals.on_dismiss("b", [0, 9])
        told = actor.replica.position
        actor.act(actor, actor.election.on_stream("b", 9, trio.current_time()))
        assert not await arrivals.on_dismiss("b", [0, 9]), "its log has not been compared with that primary's"
        assert await actor.follow(9, epoch_record(9, told.sequence, actor.placement.pack()))
        assert not await arrivals.on_dismiss("c", [0, 8]), "a primary that is one no more"
        assert await arrivals.on_dismiss("b", [0, 9])
        assert not held.actors


# -- shards side by side ------------------------------------------------------------------------------------------------


class Led:
    """As a ShardActor that `a` leads, in a placement of its own."""

    def __init__(self, shard: int, *names: str) -> None:
        self.shard, self.leads, self.settled, self.primary = shard, True, True, "a"
        self.placement = Placement(tuple((name, number) for number, name in enumerate(names, 1)))
        self.hint, self.reign = (3, "a"), SimpleNamespace(epoch=3, witness_at=0.0, since=0.0)
        self.purges = 0

    def is_level(self, name: str) -> bool:
        return True

    async def changed(self) -> None:
        await trio.sleep_forever()

    async def purge(self) -> bool:
        await trio.lowlevel.checkpoint()
        self.purges += 1
        return False


class Links:
    """`silent` answers nothing for as long as a call may take; each other brings what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []

    async def add(self, name: str) -> Any:
        await trio.lowlevel.checkpoint()

        async def call(op: str, body: Any, timeout_s: float) -> Any:
            self.asked.append((name, op, body[0]))
            if name == "silent":
                await trio.sleep(timeout_s)
                raise PeerTimeoutError(name, timeout_s)
            return 1_000 + body[0]

        return SimpleNamespace(call=call)

    def brought(self) -> list[int]:
        return [shard for _, op, shard in self.asked if op == "bring"]


def mover_of(
    actors: Mapping[int, Any], targets: tuple[tuple[str, ...], ...], path: Path
) -> tuple[Mover, Links]:
    """`a` leads all of it; the layout wishes `targets`, and everybody else is alive but `dead`."""
    names = sorted({"a", *(name for names in targets for name in names)})
    layout = Layout(
        version=2, shard_count=len(targets), replication=len(targets[0]), targets=targets, base="0" * 16,
        cluster_id="0" * 32, members=tuple(Member(name=name) for name in names),
    )  # fmt: skip
    gone = SimpleNamespace(alive=False, tells_shards=True, order="")
    there = SimpleNamespace(alive=True, tells_shards=False, order="")
    members = SimpleNamespace(
        own=SimpleNamespace(name="a"), get=lambda name: gone if name == "dead" else there,
        holders=lambda shard: [], gossip=SimpleNamespace(set_fact=lambda key, value: None), refresh=lambda: None,
    )  # fmt: skip

    def change(actor: Led, new: Placement) -> bool:
        actor.placement = new
        return True

    links = Links()
    failover = SimpleNamespace(change=change)
    held = SimpleNamespace(actors=actors, fetcher=Fetcher())
    config = ClusterConfig(prefer_first=False)
    duty = Duty(path / "duty", members, "")  # type: ignore[arg-type]
    mover = Mover(held, failover, members, links, lambda: layout, duty, config)  # type: ignore[arg-type]
    return mover, links


def in_virtual_time(test: Any, *args: Any) -> None:
    trio.run(test, *args, clock=trio.testing.MockClock(autojump_threshold=0))


async def a_silent_peer(path: Path) -> None:
    actors = {0: Led(0, "a", "b"), 1: Led(1, "a", "b")}
    mover, links = mover_of(actors, (("a", "silent"), ("a", "c")), path)
    async with trio.open_nursery() as nursery:
        await nursery.start(mover.run)
        await trio.sleep(CALL_S / 2)
        assert actors[1].placement.names == ("a", "c"), "moved while the other shard's peer was silent"
        assert links.brought().count(0) == 1
        purged = actors[1].purges
        await trio.sleep(CALL_S / 2 + AGAIN_S + 2 * EVERY_S)
        assert actors[1].purges > purged
        assert links.brought().count(0) == 2, "what failed is tried again"
        nursery.cancel_scope.cancel()
    assert mover.counters["failed"] == 1


def test_one_shards_silent_peer_holds_up_no_other_shard(tmp_path: Path) -> None:
    in_virtual_time(a_silent_peer, tmp_path)


async def too_many_out(path: Path) -> None:
    """Five shards want another replica, none comes level. The last has lost a voter, so it is among the first."""
    actors = {shard: Led(shard, "a", "b") for shard in range(4)}
    actors[4] = Led(4, "a", "dead")
    for actor in actors.values():
        actor.is_level = lambda name: name != "c"  # type: ignore[method-assign]
    mover, links = mover_of(actors, (("a", "c"),) * 5, path)
    async with trio.open_nursery() as nursery:
        await nursery.start(mover.run)
        await trio.sleep(20 * EVERY_S)
        assert sorted(set(links.brought())) == [0, 4]
        assert sum(len(actor.placement.learners) for actor in actors.values()) == OUT_MAX
        assert mover.stages[1] == "waits for other moves from this node"
        actors[4].is_level = lambda name: name != "dead"  # type: ignore[method-assign]
        await trio.sleep(4 * EVERY_S)
        assert sorted(set(links.brought())) == [0, 1, 4], "the next has its turn"
        nursery.cancel_scope.cancel()


def test_two_go_out_at_a_time_and_who_has_lost_a_voter_comes_first(tmp_path: Path) -> None:
    """`lost-first`"""
    in_virtual_time(too_many_out, tmp_path)


async def out_to_the_gone(path: Path) -> None:
    """Two that are to come to dead or resting hosts, and one that can go."""
    actors = {shard: Led(shard, "a", "b") for shard in range(3)}
    for shard, name in ((0, "dead"), (1, "rests")):
        actors[shard].placement = Placement((("a", 1), ("b", 2)), ((name, 9),))
    targets = (("a", "b", "dead"), ("a", "b", "rests"), ("a", "b", "c"))
    for actor in actors.values():
        actor.is_level = lambda name: name in ("a", "b")  # type: ignore[method-assign]
    mover, links = mover_of(actors, targets, path)
    assert mover._others(actors[2]) == 1  # type: ignore[arg-type]
    mover._duty.rests = lambda name: name == "rests"  # type: ignore[method-assign]
    assert mover._others(actors[2]) == 0  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(mover.run)
        await trio.sleep(4 * EVERY_S)
        nursery.cancel_scope.cancel()
    assert 2 in links.brought()


def test_learners_whose_host_is_dead_or_rests_hold_up_no_other_move(tmp_path: Path) -> None:
    in_virtual_time(out_to_the_gone, tmp_path)


async def unsettled(path: Path) -> None:
    actor = Led(0, "a", "b")
    actor.settled = False
    mover, _ = mover_of({0: actor}, (("a", "b"),), path)
    actor.reign.since = trio.current_time()
    assert mover._expects_news(actor)  # type: ignore[arg-type]
    await trio.sleep(SETTLING_S + 0.1)
    assert not mover._expects_news(actor)  # type: ignore[arg-type]
    mover.stages[0] = "c learns"
    assert mover._expects_news(actor)  # type: ignore[arg-type]


def test_an_unsettled_shard_with_nothing_on_its_way_wakes_nobody_for_long(tmp_path: Path) -> None:
    in_virtual_time(unsettled, tmp_path)


class Opening:
    """As Holdings: a replica that is brought takes a while to be there."""

    def __init__(self) -> None:
        self.actors: dict[int, Any] = {}
        self.fails = False

    async def bring(self, shard: int, failover: Any) -> Any:
        await trio.sleep(0.1)
        if self.fails:
            raise DiskFullError("no room")
        if shard not in self.actors:
            self.actors[shard] = Coming(shard)
        return self.actors[shard]

    async def drop(self, shard: int) -> None:
        await trio.lowlevel.checkpoint()
        del self.actors[shard]


class Coming(Led):
    """At `a`, brought by `b`."""

    def __init__(self, shard: int) -> None:
        super().__init__(shard, "b")
        self.leads = False
        self.replica = SimpleNamespace(
            replica_id=1_000 + shard, side_files=tuple, position=SimpleNamespace(epoch=3, sequence=9)
        )

    def hear_of(self, epoch: int, primary: str) -> None:
        self.hint = (epoch, primary)


async def too_many_in() -> None:
    held = Opening()
    arrivals = Arrivals("a", held, None)  # type: ignore[arg-type]
    done: list[int] = []
    busy: list[int] = []

    async def ask(shard: int) -> None:
        try:
            assert await arrivals.on_bring("b", [shard, 3, "b"]) == 1_000 + shard
            done.append(shard)
        except RemoteError as error:
            assert error.code == "busy"
            busy.append(shard)

    async def ask_all(*shards: int) -> None:
        done.clear()
        busy.clear()
        async with trio.open_nursery() as nursery:
            for shard in shards:
                nursery.start_soon(ask, shard)

    # All at the same moment, before any of them is there.
    await ask_all(0, 1, 2, 3)
    assert (len(done), len(busy)) == (IN_MAX, 2)
    first, second = sorted(held.actors)
    await ask_all(first, second, 4)
    assert (sorted(done), busy) == ([first, second], [4]), (
        "those that are on their way may be asked for again"
    )
    # One votes: the next may come. That it is voted out again and waits to be removed takes nobody's place.
    held.actors[first].placement = Placement((("b", 1), ("a", 1_000 + first)))
    await ask_all(4)
    assert done == [4]
    held.actors[first].placement = Placement((("b", 1), ("c", 3)))
    held.actors[second].placement = Placement((("b", 1), ("a", 1_000 + second)))
    await ask_all(5)
    assert done == [5]
    # One of those that come is dismissed.
    assert await arrivals.on_dismiss("b", [5, 3])
    await ask_all(6)
    assert done == [6]
    # One that cannot be begun is not on its way.
    held.actors[4].placement = held.actors[second].placement
    held.fails = True
    with pytest.raises(RemoteError) as caught:
        await arrivals.on_bring("b", [7, 3, "b"])
    assert caught.value.code == "disk_full"
    held.fails = False
    await ask_all(8)
    assert done == [8]
    # Nobody knows who leads what was to come: it may never come, and the next does not wait for it.
    await ask_all(9)
    assert busy == [9]
    held.actors[8].primary = held.actors[6].primary = ""
    await ask_all(9, 10, 11)
    assert (len(done), len(busy)) == (IN_MAX, 1)


def test_two_come_in_at_a_time_whoever_asks_at_the_same_moment_and_leavers_do_not_count() -> None:
    in_virtual_time(too_many_in)


async def empty_again(path: Path) -> None:
    """Brought, named as a learner, and started again before a byte had come: it knows nobody to ask."""
    told: list[tuple[int, int, str]] = []
    blank, known = Led(0), Led(1, "a", "b")
    for actor in (blank, known):
        actor.leads, actor.primary = False, ""
    mover, _ = mover_of({0: blank, 1: known}, (("a", "b"),) * 2, path)
    mover._members.reign = lambda shard: (7, "b")  # type: ignore[method-assign]
    mover._failover.hear = lambda shard, epoch, name: told.append((shard, epoch, name))  # type: ignore
    async with trio.open_nursery() as nursery:
        await nursery.start(mover.run)
        await trio.sleep(3 * EVERY_S)
        nursery.cancel_scope.cancel()
    # Again and again: it may come to doubt what it was told.
    assert len(told) > 1
    assert set(told) == {(0, 7, "b")}


def test_a_replica_that_knows_no_voter_is_told_who_leads(tmp_path: Path) -> None:
    in_virtual_time(empty_again, tmp_path)


async def stubborn(path: Path) -> None:
    """One that is in no placement any more and does not let go yet (its log is not level, say)."""
    actor = Led(0, "a", "b")
    mover, links = mover_of({0: actor}, (("a", "b"),), path)
    mover._members.holders = lambda shard: ["a", "b", "c"]  # type: ignore[method-assign]

    async def refusing(name: str) -> Any:
        await trio.lowlevel.checkpoint()

        async def call(op: str, body: Any, timeout_s: float) -> bool:
            await trio.lowlevel.checkpoint()
            links.asked.append((name, op, body[1]))
            return False

        return SimpleNamespace(call=call)

    mover._links.add = refusing  # type: ignore[method-assign, assignment]
    async with trio.open_nursery() as nursery:
        await nursery.start(mover.run)
        await trio.sleep(10 * EVERY_S)
        nursery.cancel_scope.cancel()
    assert set(links.asked) == {("c", "dismiss", 3)}
    assert 5 <= len(links.asked) <= 15, "again, and not without a pause"


def test_who_does_not_let_go_yet_is_asked_again_and_not_at_once(tmp_path: Path) -> None:
    in_virtual_time(stubborn, tmp_path)
