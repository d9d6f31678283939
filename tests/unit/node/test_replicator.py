"""A follower and its primary over a real socket: it follows, it knows how old it is, and it never joins two histories."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
import trio

from node import replicator
from node.blocking import DedicatedThread, InlineRunner, ThreadRunner
from node.election import ElectionConfig
from node.lane import SearchLane
from node.local import LocalNode
from node.peerlink import PeerLink, PeerOverloadedError
from node.peerlistener import PeerListener
from node.pulls import NotPrimary, Streamed
from node.remote import RemoteNode, handlers
from node.replication import WAIT_MS
from node.replicator import Replicator
from node.shard import ShardActor
from router.coverage import LAG_MS_MAX
from router.ports import Change, NodeError, SearchAsk
from storage.arrival import Arrival, arrival
from storage.batch import Batch
from storage.errors import DamagedError, ReplicaStoppedError
from storage.records import Kind, Operation, Version
from storage.view import ClassConstraint
from tests.unit.node.peers import answer, hello, linked, on_trio, until
from tests.unit.node.voters import change, opened, running

VOTERS = ("b", "a")
USER = Change(Operation.PUT, Kind.USER, 7, change(7).vector, (), b"\x80")


@asynccontextmanager
async def replica_of(name: str, path: Path) -> AsyncIterator[ShardActor]:
    """One that follows; nobody drives its election."""
    replica = opened(path, name)
    actor = ShardActor(
        replica,
        VOTERS,
        name=name,
        promised=0,
        owes=False,
        log_runner=ThreadRunner("log"),
        maintenance_runner=InlineRunner(),
        queue_max=100,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        try:
            yield actor
        finally:
            nursery.cancel_scope.cancel()
    replica.close()


@asynccontextmanager
async def primary_of(path: Path, follower: ShardActor) -> AsyncIterator[ShardActor]:
    """`b`, which leads and counts `follower` as its other voter."""
    async with running(
        path, VOTERS, name="b", keep=True, election=ElectionConfig(), ids={"a": follower.replica.replica_id}
    ) as primary:
        yield primary


@asynccontextmanager
async def following(primary: ShardActor, actor: ShardActor) -> AsyncIterator[Replicator]:
    local = LocalNode({0: primary}, {}, None, 1)  # type: ignore[arg-type]  # nothing is searched here
    async with linked(handlers(local, {0: primary}, dict)) as (link, _), pulling(actor, link) as follower:
        yield follower


@asynccontextmanager
async def pulling(actor: ShardActor, link: PeerLink) -> AsyncIterator[Replicator]:
    actor.hear_of(0, "b")
    follower = Replicator(actor, {"b": link}, Random(1))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        yield follower
        nursery.cancel_scope.cancel()


async def write(primary: ShardActor, count: int, fill: float, ack: str = "primary") -> Version:
    version = Version(0, 0)
    for i in range(count):
        version = await primary.write([change(i, fill)], ack, Random(f"{i} {fill}").randbytes(16), 2.0)
    return version


@on_trio
async def test_it_follows_and_its_disk_counts(tmp_path: Path) -> None:
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        async with following(primary, actor) as follower:
            await write(primary, 3, 1.0)
            assert await write(primary, 2, 2.0, "all") == Version(1, 6), "the first is the epoch's own record"
            await until(lambda: actor.replica.position == Version(1, 6))
            assert follower.state == "following"
            assert actor.placement == primary.placement
            assert actor.hint == (1, "b")
        async with following(primary, actor) as follower:  # level, and again
            await until(lambda: follower.state == "following")
            assert await write(primary, 1, 3.0, "all") == Version(1, 7)


@on_trio
async def test_both_logs_are_byte_for_byte_the_same(tmp_path: Path) -> None:
    """`same-bytes`: puts, deletes, a user and the epoch's own record."""
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        async with following(primary, actor):
            await write(primary, 20, 1.0, "all")
            await primary.write(
                [Change(Operation.DELETE, Kind.ITEM, 3, b"", (), b""), USER], "all", b"d" * 16, 2.0
            )
        logs = [one.replica.read_log(0, 1 << 20) for one in (primary, actor)]
        assert logs[0] == logs[1]
        assert len(logs[0]) > 20 * len(change(1).vector)


@on_trio
async def test_what_is_on_its_way_to_the_disk_is_not_streamed(tmp_path: Path) -> None:
    """`durable-before-stream`: a follower hears of a record only when the primary's append has returned."""
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        async with following(primary, actor) as follower, trio.open_nursery() as nursery:
            await until(lambda: follower.state == "following" and primary.note_settled() == 1)
            hold, append = threading.Event(), primary.replica.append

            def slow(blobs: list[bytes], rows: int) -> None:
                hold.wait(20.0)
                append(blobs, rows)

            primary.replica.append = slow  # type: ignore[method-assign]
            nursery.start_soon(write, primary, 1, 1.0)
            await until(lambda: primary.end == 2)
            # Its next pull and the one after are answered meanwhile.
            for _ in range(2):
                heard = follower._heard
                await until(lambda heard=heard: follower._heard > heard)  # type: ignore[misc]
            assert actor.replica.logged == 1
            hold.set()
            await until(lambda: actor.replica.logged == 2)


@on_trio
async def test_both_know_what_is_on_a_quorum_and_so_which_of_their_log_may_go(tmp_path: Path) -> None:
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        primary.election.on_echo("a", trio.current_time() + 60.0)  # a lease without a follower
        await write(primary, 3, 1.0)
        assert primary.note_settled() == 0, "nobody has pulled"
        async with following(primary, actor):
            end = (await write(primary, 2, 2.0, "all")).sequence
            await until(lambda: primary.note_settled() == end)
            await until(lambda: actor.replica.settled == end)
        await write(primary, 3, 3.0)
        assert primary.note_settled() == actor.replica.settled == end, "what it alone has is not"
        await primary.upkeep.checkpoint()
        assert primary.replica.statistics()["unsettled"] == 3


@on_trio
@pytest.mark.parametrize("overtaken", [2, 5, 9])
async def test_a_primary_with_another_history_is_never_followed(tmp_path: Path, overtaken: int) -> None:
    """Only a broken law brings it about: that epoch has been opened twice."""
    async with replica_of("a", tmp_path / "a") as actor:
        async with primary_of(tmp_path / "b", actor) as primary, following(primary, actor):
            await write(primary, 5, 1.0, "all")
        async with primary_of(tmp_path / "new disk", actor) as primary:
            primary.election.on_echo("a", trio.current_time() + 60.0)  # a lease without a follower
            await write(primary, overtaken, 2.0)
            async with following(primary, actor) as follower:
                await until(lambda: follower.state == "diverged")
                with pytest.raises(NodeError) as caught:
                    await primary.write([change(100)], "quorum", b"q" * 16, 0.3)
                assert caught.value.code == "ack_timeout"
                assert "1 of 2" in caught.value.message
                assert primary.reign is not None
                assert primary.reign.progress.holders(1) == 1
                last = min(6, overtaken + 1)
                assert actor.replica.position == Version(1, last), "nothing was taken from the other history"
                assert not await actor.wait_applied(1, 1, 0.0), "its positions say nothing of the primary's"


@on_trio
async def test_a_follower_of_another_epoch_is_told_where_to_cut(tmp_path: Path) -> None:
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        cuts: list[tuple[int, Version, Version]] = []

        async def cut(epoch: int, told: Version, named: Version) -> bool:
            cuts.append((epoch, told, named))
            await trio.sleep(0.05)
            return False

        actor.cut = cut  # type: ignore[method-assign]
        async with following(primary, actor):
            await write(primary, 3, 1.0, "all")
            # What nobody but this replica has of that epoch: left by a primary that we never hear of.
            left = came(record(1, 5), record(1, 6))
            await actor.follow(1, left)
            await until(lambda: bool(cuts))
            assert cuts[0] == (1, Version(1, 4), Version(1, 6))
            assert primary.reign is not None
            assert primary.reign.progress.holders(5) == 0


@on_trio
@pytest.mark.parametrize("what", ["append_run", "cut"])
async def test_a_disk_that_stops_under_a_follower_ends_it_as_damage(tmp_path: Path, what: str) -> None:
    """What is fatal by the node's policy: anything else would be tried again and again."""
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        local = LocalNode({0: primary}, {}, None, 1)  # type: ignore[arg-type]
        async with linked(handlers(local, {0: primary}, dict)) as (link, _):
            async with pulling(actor, link):
                await write(primary, 2, 1.0, "all")
            left = came(record(1, 4))
            await actor.follow(1, left)

            def stop(*_: object) -> None:
                raise ReplicaStoppedError("fdatasync: Input/output error")

            if what == "append_run":
                # As far as both go they are the same again.
                await actor.cut(1, Version(1, 3), Version(1, 4))
                await write(primary, 3, 2.0)
            setattr(actor.replica, what, stop)
            with pytest.raises(ExceptionGroup) as caught:
                async with pulling(actor, link):
                    await trio.sleep(3.0)
            assert caught.group_contains(DamagedError)


def record(epoch: int, sequence: int) -> bytes:
    batch = Batch(epoch, sequence - 1, 1)
    batch.add([change(sequence, 9.0)], bytes([sequence]) * 16)
    return batch.blobs[0]


def came(*blobs: bytes) -> Arrival:
    """As a stream brings them."""
    found = arrival(b"".join(blobs))
    assert found is not None
    return found


@on_trio
async def test_what_its_peer_answers_never_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer in turn, then the true ones."""
    monkeypatch.setattr(replicator, "BACKOFF_S", (0.001, 0.01))
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        true = handlers(LocalNode({0: primary}, {}, None, 1), {0: primary}, dict)["pull"]  # type: ignore[arg-type]
        odd: list[object] = [
            None, 5, [], [7, 1], [0, 1, 2], [2, 0, ""], [2, 9, 9, 9], [0, "x", 1.0, 5, 0, b""], [0, 1, "x", 5, 0, b""],
            [0, 1, 1.0, "x", 0, b""], [0, 1, 1.0, 5, "x", b""], [0, 1, 1.0, 5, 0, "text"], [0, 1, 1.0, 5, 0, None],
            [0, 1, 1.0, 5, 0, b"rubbish"], [1, 1, 1.0, None], [1, 1, 1.0, ["x", "y"]], [1, None, 1.0, [1, 2]],
            [2, "x", "b"], [2, 1, 5], [2, 1, ["b"]], [0, None, 1.0, 5, 0, b""],
            Streamed(1, 1.0, 5, 0, b"").body(), NotPrimary(0, "").body(),
        ]  # fmt: skip
        told = list(odd)

        async def pull(peer: str, body: object) -> object:
            if told:
                await trio.lowlevel.checkpoint()
                return told.pop(0)
            return await true(peer, body)

        async with linked({"pull": pull}) as (link, _), pulling(actor, link) as follower:
            with trio.fail_after(9):
                while told or follower.state != "following":
                    actor.hear_of(1, "b")
                    await trio.sleep(0.01)
            assert await write(primary, 1, 3.0, "all")


@on_trio
async def test_a_link_that_has_no_room_is_waited_for(tmp_path: Path) -> None:
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        local = LocalNode({0: primary}, {}, None, 1)  # type: ignore[arg-type]
        async with linked(handlers(local, {0: primary}, dict)) as (link, _):
            call, refused = link.call, 3

            async def full(op: str, body: object, timeout_s: float) -> object:
                nonlocal refused
                if refused:
                    refused -= 1
                    await trio.lowlevel.checkpoint()
                    raise PeerOverloadedError("too many calls are under way")
                return await call(op, body, timeout_s)

            link.call = full  # type: ignore[method-assign]
            async with pulling(actor, link) as follower:
                await until(lambda: follower.state == "following")


@on_trio
async def test_an_answer_says_how_old_it_is_wherever_it_comes_from(tmp_path: Path) -> None:
    async with (
        replica_of("a", tmp_path / "a") as actor,
        primary_of(tmp_path / "b", actor) as primary,
        following(primary, actor) as follower,
        DedicatedThread("search") as thread,
        trio.open_nursery() as nursery,
    ):
        await primary.write([change(1), USER], "all", b"1" * 16, 2.0)
        await until(lambda: follower.state == "following")
        lane = SearchLane(thread, queue_max=8)
        await nursery.start(lane.run)
        here = LocalNode({0: actor}, {0: follower}, lane, 1)
        asker, answerer = hello("c"), hello("a")
        async with linked(handlers(here, {0: actor}, dict), mine=asker, theirs=answerer) as (
            link,
            _,
        ):
            query = np.full(8, 1.0, np.float16)
            ask = SearchAsk((0,), query, 3, ClassConstraint(), False)
            for node in (here, RemoteNode("a", link)):
                for lag_ms in (0, 5_000):
                    follower._old_ms = lag_ms
                    found = await answer(functools.partial(node.search, ask, 1.0))
                    got = await answer(functools.partial(node.get, Kind.USER, [7], (), 1.0))
                    scored = await answer(functools.partial(node.score, query, [1], False, (), 1.0))
                    assert len(found.ids) == 1
                    for age_ms in (found.age_ms, got.age_ms, scored.age_ms):
                        assert lag_ms <= age_ms < lag_ms + 2_000
        nursery.cancel_scope.cancel()


@on_trio
async def test_an_idle_level_replica_has_no_lag_until_its_stream_is_cut(tmp_path: Path) -> None:
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        hung: list[trio.Event] = []
        answers = handlers(LocalNode({0: primary}, {}, None, 1), {0: primary}, dict)  # type: ignore[arg-type]
        pull = answers["pull"]

        async def may_hang(peer: str, body: object) -> object:
            if hung:
                await hung[0].wait()
            return await pull(peer, body)

        async with (
            linked({**answers, "pull": may_hang}) as (link, listener),
            pulling(actor, link) as follower,
        ):
            await write(primary, 1, 1.0, "all")
            await until(lambda: follower.state == "following" and not follower.behind)
            lags, ages = set[int](), set[int]()
            end = trio.current_time() + 1.2  # longer than a long poll
            while trio.current_time() < end:
                lags.add(follower.lag_ms)
                ages.add(follower.age_ms)
                await trio.sleep(0.02)
            assert lags == {0}
            assert max(ages) > 0.8 * WAIT_MS, "what answers tell is the age still"
            hung.append(trio.Event())  # the primary hangs: its next answer does not come
            await until(lambda: follower.lag_ms > 1_500)
            assert abs(follower.lag_ms - follower.age_ms) <= 1
            hung.pop().set()
            await until(lambda: follower.lag_ms == 0)
            listener_gone(listener)
            await until(lambda: follower.state == "primary silent" and follower.lag_ms > 0)


def listener_gone(listener: PeerListener) -> None:
    """The primary takes no connection any more and drops those that it has."""
    listener.closed = "gone"
    for session in list(listener._peers.values()):
        session.conn.close("gone")


@on_trio
async def test_age_grows_while_the_primary_is_silent_and_survives_a_restart(tmp_path: Path) -> None:
    async with replica_of("a", tmp_path / "a") as actor, primary_of(tmp_path / "b", actor) as primary:
        primary._now_ns = time.time_ns
        async with following(primary, actor) as follower:
            await write(primary, 1, 1.0, "all")
            await until(lambda: follower.state == "following")
            assert follower.age_ms < 2_000
    async with linked({}, connect=False) as (link, _), replica_of("a", tmp_path / "a") as actor:
        hour_ns = 3_600 * 10**9
        clock = actor._now_ns
        actor._now_ns = lambda: clock() + hour_ns
        follower = Replicator(actor, {"b": link}, Random(1))  # type: ignore[arg-type]
        assert follower.age_ms >= 3_600_000, (
            "nobody has told it of anything newer; that is no proof of being level"
        )
        before = follower.age_ms
        await trio.sleep(0.05)
        assert follower.age_ms >= before + 50


@on_trio
async def test_an_empty_replica_is_not_fresh_before_it_has_heard_a_primary(tmp_path: Path) -> None:
    """It has just been brought here, and would answer searches with nothing."""
    async with replica_of("a", tmp_path / "a") as actor:
        follower = Replicator(actor, {}, Random(1))  # type: ignore[arg-type]
        assert follower.lag_ms > LAG_MS_MAX
        assert follower.age_ms > LAG_MS_MAX
