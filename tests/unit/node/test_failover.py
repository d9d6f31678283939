"""Three real replicas over real links: who leads, what changes that, and that nothing acknowledged is lost meanwhile."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.lowlevel

from node.election import Role
from router import requests
from router.errors import RequestError
from router.ports import NodeError
from router.writing import Writer
from storage.errors import ReplicaStoppedError
from storage.records import Kind, Version
from storage.replica import Replica
from tests.unit.node import voters
from tests.unit.node.peers import on_trio, until
from tests.unit.node.voters import DIM, Site, Trio, View, change, three


def put(id_: int, ack: str = "quorum", write_id: bytes | None = None) -> requests.Put:
    return requests.Put(
        kind=Kind.ITEM,
        ids=(id_,),
        vectors=np.ones((1, DIM), np.float16),
        classes=((),),
        metadata=(b"\x80",),
        ack=ack,  # type: ignore[arg-type]
        write_id=write_id,
        timeout_ms=None,
    )


class Writers:
    """Coordinators on some nodes that write on, one item after the other, until told to stop."""

    def __init__(self, *sites: Site) -> None:
        self.sites = sites
        self.acknowledged: list[int] = []
        self.failed: list[tuple[int, str]] = []
        self.done = False
        self._next = 0

    async def run(self, site: Site) -> None:
        writer = Writer(View(site), 10.0)
        while not self.done:
            self._next += 1
            item = self._next
            try:
                await writer.put(put(item))
            except RequestError as error:
                self.failed.append((item, error.code))
            else:
                self.acknowledged.append(item)
            await trio.sleep(0.002)

    def missing(self, site: Site) -> list[int]:
        return [i for i in self.acknowledged if site.actor.replica.get(Kind.ITEM, i) is None]


@on_trio
async def test_the_first_epoch_names_every_replica_of_the_shard(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        await world.level()
        ids = tuple((site.name, site.actor.replica.replica_id) for site in world)
        for site in world:
            assert site.actor.placement.voters == ids
            assert not site.actor.founding
            assert site.actor.replica.position == Version(1, 1)
        (leader,) = world.leaders()
        assert leader.name == "a", "the first of them in the layout's order"
        assert {site.actor.primary for site in world} == {"a"}


@on_trio
async def test_a_shard_is_not_founded_before_all_its_voters_are_there(tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            world = Trio(tmp_path, nursery, 1)
            for name in ("a", "b"):
                await world[name].start()
            await world["a"].wire("b")
            await world["b"].wire("a")
            await trio.sleep(1.5)
            assert not world["a"].leads
            assert not world["b"].leads
            await world["c"].start()
            await world.join()
            await world.leader(4.0)
            nursery.cancel_scope.cancel()


@on_trio
async def test_when_the_primary_is_cut_off_another_leads_and_the_old_one_acknowledges_nothing(
    tmp_path: Path,
) -> None:
    async with three(tmp_path) as world:
        old = world.leaders()[0]
        assert await old.actor.write([change(1)], "quorum", b"1" * 16, 2.0)
        await world.level()
        began = trio.current_time()
        acknowledged_at: list[float] = []

        async def write_at_the_old_one(ack: str) -> None:
            for i in range(10_000):
                try:
                    await old.actor.write([change(1_000 + i)], ack, i.to_bytes(8, "big") + b"old prim", 0.05)
                except NodeError:
                    await trio.sleep(0.005)
                else:
                    acknowledged_at.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_at_the_old_one, "primary")
            await trio.sleep(0.05)
            assert acknowledged_at
            world.cut(old.name)
            new = await world.leader(3.0, among=[n for n in world.names if n != old.name])
            leads_at = trio.current_time()
            assert leads_at - began < 3.0
            assert new.actor.reign is not None
            assert new.actor.reign.epoch > 1
            await new.actor.write([change(2)], "quorum", b"2" * 16, 2.0)
            await until(lambda: not old.leads)
            await trio.sleep(0.3)
            nursery.cancel_scope.cancel()
        assert max(acknowledged_at) < leads_at, "two never acknowledge at once"
        assert new.actor.replica.get(Kind.ITEM, 1) is not None
        assert old.actor.election.role is not Role.PRIMARY


@on_trio
async def test_a_primary_that_comes_back_cuts_what_nobody_else_has_keeps_it_aside_and_follows(
    tmp_path: Path,
) -> None:
    async with three(tmp_path) as world:
        old = world.leaders()[0]
        await old.actor.write([change(1)], "all", b"1" * 16, 2.0)
        world.cut(old.name)
        # Its lease lasts a little, so its own disk takes these.
        for i in range(5):
            await old.actor.write([change(100 + i)], "primary", bytes([i]) * 16, 2.0)
        new = await world.leader(4.0, among=[n for n in world.names if n != old.name])
        await new.actor.write([change(2)], "quorum", b"2" * 16, 2.0)
        await world.join()
        await world.level()
        assert not old.leads
        assert old.actor.counters["cuts"] >= 1
        (tail,) = old.actor.replica.side_files()
        assert tail.records == 5
        assert await new.actor.write([change(3)], "all", b"3" * 16, 3.0)
        assert old.actor.replica.get(Kind.ITEM, 2) is not None


@on_trio
async def test_a_tail_is_kept_aside_however_old_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`unsettled-stays`: its segments are old and in a checkpoint, and nobody else has what is in them."""
    monkeypatch.setattr(voters, "CONFIG", replace(voters.CONFIG, wal_keep_s=0.0))
    async with three(tmp_path) as world:
        old = world.leaders()[0]
        await old.actor.write([change(i) for i in range(1_000)], "all", b"1" * 16, 2.0)
        world.cut(old.name)
        for part in (1_000, 2_000):
            await old.actor.write(
                [change(part + i) for i in range(1_000)], "primary", bytes(14) + part.to_bytes(2, "big"), 2.0
            )
        await old.actor.upkeep.checkpoint()
        told = old.actor.replica.statistics()
        assert told["log"]["segments"] > 2
        assert told["log"]["first_sequence"] > 1, "what all have may go"
        assert told["unsettled"] >= 2_000
        await world.leader(4.0, among=[n for n in world.names if n != old.name])
        await world.join()
        await world.level()
        (tail,) = old.actor.replica.side_files()
        assert tail.records == 2_000


@on_trio
async def test_a_new_primary_has_every_write_that_a_quorum_acknowledged(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        old = world.leaders()[0]
        others = [site for site in world if site is not old]
        writers = Writers(*others)
        async with trio.open_nursery() as nursery:
            for site in others:
                nursery.start_soon(writers.run, site)
            await trio.sleep(0.4)
            before = len(writers.acknowledged)
            assert before > 10
            await old.stop()  # a crash
            world.cut(old.name)
            new = await world.leader(4.0, among=[site.name for site in others])
            await until(lambda: len(writers.acknowledged) > before + 10)
            writers.done = True
        assert not writers.failed, "coordinators wait for the new primary, and retries are safe"
        assert not writers.missing(new)


def slow_down(replica: Replica, by_s: float) -> None:
    append = replica.append

    def slow(blobs: Sequence[bytes], rows: int) -> None:
        time.sleep(by_s)
        append(blobs, rows)

    replica.append = slow  # type: ignore[method-assign]


@on_trio
async def test_handing_over_under_writes_loses_none_and_fails_none(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        for site in world:
            slow_down(site.actor.replica, 0.02)  # so that there is always something on its way to a disk
        writers = Writers(*world)
        longest = 0.0
        async with trio.open_nursery() as nursery:
            for site in world:
                nursery.start_soon(writers.run, site)
            for to in ("b", "c", "a", "c"):
                await trio.sleep(0.3)
                old = await world.leader()
                began = trio.current_time()
                await old.failover.hand_over(old.actor, to)
                longest = max(longest, trio.current_time() - began)
                await until(lambda to=to: world[to].leads)  # type: ignore[misc]
                assert not old.leads
            await trio.sleep(0.3)
            writers.done = True
        assert not writers.failed
        assert longest < 1.0, "no lease is waited for"
        assert not any(site.actor.counters["cuts"] for site in world), "the successor had everything"
        await world.level()
        for site in world:
            assert not writers.missing(site)
        assert len(writers.acknowledged) > 20


@on_trio
async def test_a_follower_that_stops_and_comes_back_follows_without_an_election(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        leader = world.leaders()[0]
        gone = next(site for site in world if site is not leader)
        await gone.stop()
        await leader.actor.write([change(1)], "quorum", b"1" * 16, 5.0)
        await gone.start()
        await leader.actor.write([change(2)], "all", b"2" * 16, 8.0)
        assert leader.actor.reign is not None
        assert leader.actor.reign.epoch == 1
        assert gone.actor.replica.position == leader.actor.replica.position
        assert gone.actor.election.promised == 1, "it has kept what it promised"


@on_trio
async def test_a_replica_on_a_new_disk_follows_and_does_not_vote_until_an_epoch_names_it(
    tmp_path: Path,
) -> None:
    async with three(tmp_path) as world:
        leader = world.leaders()[0]
        gone = next(site for site in world if site is not leader)
        before = dict(leader.actor.placement.voters)[gone.name]
        await leader.actor.write([change(1)], "all", b"1" * 16, 5.0)
        await gone.stop()
        shutil.rmtree(gone.path)
        await gone.start()
        mine = gone.actor.replica.replica_id
        assert mine != before
        # Level, and then a new epoch says who it is.
        await until(lambda: dict(gone.actor.placement.voters).get(gone.name) == mine)
        new = await world.leader()
        assert new is leader, "who has led stands, with its own lease given up"
        assert new.actor.reign is not None
        assert new.actor.reign.epoch > 1
        version = await new.actor.write([change(2)], "all", b"2" * 16, 5.0)
        assert gone.actor.replica.position >= version
        for id_ in (1, 2):
            assert gone.actor.replica.get(Kind.ITEM, id_) is not None
        assert gone.actor.election.voters == world.names


@on_trio
async def test_a_replica_on_a_new_disk_helps_nobody_to_win(tmp_path: Path) -> None:
    """`learners-silent`: One voter is left of three, and one whose log is lost: that is no majority, whatever it says."""
    async with three(tmp_path) as world:
        leader = world.leaders()[0]
        emptied, voter = (site for site in world if site is not leader)
        await leader.actor.write([change(1)], "all", b"1" * 16, 5.0)
        await leader.stop()
        world.cut(leader.name)
        await emptied.stop()
        shutil.rmtree(emptied.path)
        await emptied.start()
        await trio.sleep(4.0)
        assert not world[voter.name].leads
        assert not emptied.leads
        assert emptied.actor.replica.position == Version(0, 0)


@on_trio
async def test_a_replica_whose_promises_are_gone_gets_a_new_id_and_is_let_in_again(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        leader = world.leaders()[0]
        gone = next(site for site in world if site is not leader)
        await leader.actor.write([change(1)], "all", b"1" * 16, 5.0)
        before = gone.actor.replica.replica_id
        await gone.stop()
        (gone.path / "promises").unlink()
        await gone.start()
        mine = gone.actor.replica.replica_id
        assert mine != before
        assert gone.actor.election.voters == tuple(n for n in world.names if n != gone.name), (
            "it votes no more"
        )
        assert gone.actor.election.next_deadline == float("inf")
        await until(lambda: dict(gone.actor.placement.voters).get(gone.name) == mine)
        assert gone.actor.election.voters == world.names
        new = await world.leader()
        await new.actor.write([change(2)], "all", b"2" * 16, 5.0)


@on_trio
async def test_who_cannot_write_lets_another_lead(tmp_path: Path) -> None:
    """A disk whose fsync has failed takes nothing any more; its node answers pulls all the same, which keeps its lease."""
    async with three(tmp_path) as world:
        old = world.leaders()[0]
        await old.actor.write([change(1)], "all", b"1" * 16, 5.0)

        def fail(blobs: object, rows: int) -> None:
            raise ReplicaStoppedError("fdatasync: Input/output error")

        old.actor.replica.append = fail  # type: ignore[method-assign]
        old.mortal = True  # as a follower it ends, loudly
        other = next(site for site in world if site is not old)
        reply = await Writer(View(other), 10.0).put(put(2))
        assert reply["written"] == 1
        assert not old.leads


@on_trio
async def test_a_hand_over_that_is_given_up_leaves_a_primary_that_writes(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        leader = world.leaders()[0]
        to = next(site for site in world if site is not leader)
        await leader.actor.write([change(1)], "all", b"1" * 16, 5.0)
        world.cut(to.name)
        await leader.actor.write([change(2)], "quorum", b"2" * 16, 5.0)
        with pytest.raises(NodeError) as caught:
            await leader.failover.hand_over(leader.actor, to.name, 0.4)
        assert caught.value.code == "no_successor"
        await leader.actor.write([change(3)], "quorum", b"3" * 16, 1.0)
        with trio.move_on_after(0.1) as scope:  # whoever asked for it has gone
            await leader.failover.hand_over(leader.actor, to.name, 5.0)
        assert scope.cancelled_caught
        await leader.actor.write([change(4)], "quorum", b"4" * 16, 2.0)
