"""Three real replicas over real links: who leads, what changes that, and that nothing acknowledged is lost meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.lowlevel
from hypothesis import given, settings
from hypothesis import strategies as st

from node.election import Role
from node.failover import Failover
from router import requests
from router.errors import RequestError
from router.ports import NodeError
from router.writing import Writer
from storage.batch import Batch
from storage.errors import ReplicaStoppedError
from storage.records import Kind, Mark, Version
from tests.unit.node.peers import on_trio, until
from tests.unit.node.voters import DIM, Site, Trio, View, Willing, change, leading, running, three


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


@on_trio
async def test_handing_over_under_writes_loses_none_and_fails_none(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
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
        await world.level()
        for site in world:
            assert not writers.missing(site)
        assert len(writers.acknowledged) > 50


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
    """One voter is left of three, and one whose log is lost: that is no majority, whatever it says."""
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
async def test_what_a_wrong_replica_says_counts_for_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        wrong, epoch = 0xBAD, 50
        told: list[list[Any]] = []

        class Noted(Willing):
            def __getitem__(self, name: str) -> Any:
                class Link:
                    async def call(self, op: str, body: Any, timeout_s: float) -> None:
                        await trio.lowlevel.checkpoint()
                        told.extend(body)

                return Link()

        failover._links = Noted(["b", "c"], {})  # type: ignore[assignment]
        assert actor.reign is not None
        reign, election = actor.reign, actor.election
        for kind, fields in (
            ("ask", [epoch, [9, 9], 0]),
            ("stand", [epoch, [9, 9], 9]),
            ("refuse", [epoch, 77, "promised", 0.0]),
            ("succeed", [9]),
        ):
            failover.on_peer("b", [[0, wrong, kind, *fields]])
        await trio.sleep(0.05)
        assert actor.reign is reign
        assert (election.promised, election.seen) == (1, 1)
        assert [message[2:4] + message[5:6] for message in told if message[2] != "leads"] == [
            ["refuse", epoch, "learner"]
        ] * 2
        # Nor do its promises open anything.
        for site in ("would", "promise"):
            actor.act(actor, election.renew(trio.current_time()))
            failover.on_peer("b", [[0, wrong, site, 2]])
            failover.on_peer("c", [[0, wrong, site, 2]])
            await trio.sleep(0.02)
            assert not actor.leads


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


@on_trio
async def test_a_write_that_waits_for_a_hand_over_goes_on_as_soon_as_it_is_given_up(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        actor.election.on_echo("b", trio.current_time() + 100.0)  # a lease for the length of this test
        assert actor.reign is not None
        actor.reign.progress.count("c", 0)
        async with trio.open_nursery() as nursery:

            async def hand_over() -> None:
                with pytest.raises(NodeError):
                    await failover.hand_over(actor, "c", 0.2)

            nursery.start_soon(hand_over)
            await trio.sleep(0.02)
            await actor.write([change(1)], "primary", b"1" * 16, 0.5)


@on_trio
async def test_a_successor_whose_log_has_parted_meanwhile_is_no_successor(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        assert actor.reign is not None
        progress = actor.reign.progress
        progress.count("c", 0)
        async with trio.open_nursery() as nursery:

            async def hand_over() -> None:
                with pytest.raises(NodeError) as caught:
                    await failover.hand_over(actor, "c", 0.2)
                assert caught.value.code == "no_successor"

            nursery.start_soon(hand_over)
            await trio.sleep(0.02)
            progress.positions.pop("c")  # as `Progress.found` does
            actor._tell()


@on_trio
async def test_a_placement_that_was_not_opened_is_not_opened_later(tmp_path: Path) -> None:
    """To let a voter in a primary stands again. When another wins, what it meant to open must be forgotten."""
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        links = failover._links
        failover._links = {}  # type: ignore[assignment]  # nobody hears that it stands
        actor.election.on_echo("c", trio.current_time())
        failover.readmit(actor, "b", 0x111)
        await trio.sleep(0.02)
        assert not actor.leads
        # c leads epoch 2 and lets b in under yet another id; we follow it.
        newer = actor.placement.replaced("b", 0x222)
        assert actor.election.takes(5)
        actor.act(actor, actor.election.on_stream("c", 5, trio.current_time()))
        blobs, records = epoch_record(5, actor.replica.position.sequence, newer.pack())
        assert await actor.follow(5, blobs, records)
        assert actor.placement == newer
        failover._links = links
        await leading(actor)
        assert actor.placement == newer


def epoch_record(epoch: int, after: int, placement: bytes) -> tuple[list[bytes], list[Any]]:
    batch = Batch(epoch, after, 1)
    batch.add_mark(Mark.EPOCH, placement)
    return batch.blobs, batch.records


FIELD = st.one_of(
    st.none(), st.integers(-3, 3), st.integers(0, (1 << 64) - 1), st.text(max_size=3), st.floats(),
    st.lists(st.integers(0, (1 << 64) - 1), max_size=3), st.binary(max_size=3),
)  # fmt: skip
MESSAGE = st.builds(
    lambda shard, replica, kind, fields: [shard, replica, kind, *fields],
    st.just(0) | FIELD,
    st.sampled_from([0xB, 0xC]) | FIELD,
    st.sampled_from(["ask", "would", "stand", "promise", "refuse", "succeed", "leads"]) | FIELD,
    st.lists(FIELD, max_size=4),
)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(MESSAGE, max_size=4), max_size=8), st.booleans())
def test_rubbish_from_a_peer_never_ends_the_actor(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[list[Any]]], founding: bool
) -> None:
    async def main() -> None:
        path = tmp_path_factory.mktemp("rubbish")
        async with running(path, ("a", "b", "c"), lead=not founding) as actor:
            failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
            for batch in batches:
                failover.on_peer("b", batch)
                await trio.lowlevel.checkpoint()
            await trio.sleep(0.06)

    trio.run(main)
