"""A follower and its primary over a real socket: it follows, it knows how old it is, and it never joins two histories."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
import trio

from node.blocking import DedicatedThread, InlineRunner, ThreadRunner
from node.lane import SearchLane
from node.local import LocalNode
from node.peerlistener import PeerListener
from node.remote import RemoteNode, handlers
from node.replicator import Replicator
from node.shard import ShardActor
from router.layout import Placement
from router.ports import Change, NodeError, SearchAsk
from storage.records import Kind, Operation, Version
from storage.replica import Replica
from storage.view import ClassConstraint
from tests.unit.node.peers import hello, linked, on_trio, until
from tests.unit.node.test_shard import CONFIG, change

PLACEMENT = Placement(shard=0, epoch=1, voters=("b", "a"))
USER = Change(Operation.PUT, Kind.USER, 7, change(7).vector, (), b"\x80")


@asynccontextmanager
async def replica_of(name: str, path: Path) -> AsyncIterator[ShardActor]:
    """`b` is the primary, `a` follows."""
    replica = Replica.open(path, shard=0, node_id=name, config=CONFIG)
    actor = ShardActor(
        replica,
        PLACEMENT,
        name=name,
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
async def following(primary: ShardActor, path: Path) -> AsyncIterator[tuple[ShardActor, Replicator]]:
    local = LocalNode({0: primary}, {}, None, 1)  # type: ignore[arg-type]  # nothing is searched here
    answers = handlers(local, {0: primary}, dict)
    async with linked(answers) as (link, _), replica_of("a", path) as actor:
        follower = Replicator(actor, link, Random(1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.run)
            yield actor, follower
            nursery.cancel_scope.cancel()


async def write(primary: ShardActor, count: int, fill: float, ack: str = "primary") -> Version:
    version = Version(0, 0)
    for i in range(count):
        version = await primary.write([change(i, fill)], ack, Random(f"{i} {fill}").randbytes(16), 2.0)
    return version


@on_trio
async def test_it_follows_and_its_disk_counts(tmp_path: Path) -> None:
    async with replica_of("b", tmp_path / "b") as primary:
        await write(primary, 3, 1.0)
        async with following(primary, tmp_path / "a") as (actor, follower):
            assert await write(primary, 2, 2.0, "all") == Version(1, 5)
            await until(lambda: actor.replica.position == Version(1, 5))
            assert follower.state == "following"
        async with following(primary, tmp_path / "a") as (actor, follower):  # level, and again
            await until(lambda: follower.state == "following")
            assert await write(primary, 1, 3.0, "all") == Version(1, 6)


@on_trio
@pytest.mark.parametrize("overtaken", [2, 5, 9])
async def test_a_primary_with_another_history_is_never_followed(tmp_path: Path, overtaken: int) -> None:
    async with replica_of("b", tmp_path / "b") as primary, following(primary, tmp_path / "a"):
        await write(primary, 5, 1.0, "all")
    async with replica_of("b", tmp_path / "new disk") as primary:
        await write(primary, overtaken, 2.0)
        async with following(primary, tmp_path / "a") as (actor, follower):
            await until(lambda: follower.state == "diverged")
            with pytest.raises(NodeError) as caught:
                await primary.write([change(100)], "quorum", b"q" * 16, 0.3)
            assert caught.value.code == "ack_timeout"
            assert "1 of 2" in caught.value.message
            assert actor.replica.position == Version(1, 5), "nothing was taken from the other history"
            assert not await actor.wait_applied(1, 1, 0.0), "its positions say nothing of the primary's"


@on_trio
async def test_an_answer_says_how_old_it_is_wherever_it_comes_from(tmp_path: Path) -> None:
    async with (
        replica_of("b", tmp_path / "b") as primary,
        following(primary, tmp_path / "a") as (actor, follower),
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
                    found = await node.search(ask, 1.0)
                    got = await node.get(Kind.USER, [7], (), 1.0)
                    scored = await node.score(query, [1], False, (), 1.0)
                    assert len(found.ids) == 1
                    for age_ms in (found.age_ms, got.age_ms, scored.age_ms):
                        assert lag_ms <= age_ms < lag_ms + 2_000
        nursery.cancel_scope.cancel()


@on_trio
async def test_an_idle_level_replica_has_no_lag_until_its_stream_is_cut(tmp_path: Path) -> None:
    async with replica_of("b", tmp_path / "b") as primary:
        hung: list[trio.Event] = []
        answers = handlers(LocalNode({0: primary}, {}, None, 1), {0: primary}, dict)  # type: ignore[arg-type]
        pull = answers["pull"]

        async def may_hang(peer: str, body: object) -> object:
            if hung:
                await hung[0].wait()
            return await pull(peer, body)

        async with (
            linked({**answers, "pull": may_hang}) as (link, listener),
            replica_of("a", tmp_path / "a") as actor,
            trio.open_nursery() as nursery,
        ):
            follower = Replicator(actor, link, Random(1))
            nursery.start_soon(follower.run)
            await write(primary, 1, 1.0, "all")
            await until(lambda: follower.state == "following" and not follower.behind)
            lags, ages = set[int](), set[int]()
            end = trio.current_time() + 1.2  # longer than a long poll
            while trio.current_time() < end:
                lags.add(follower.lag_ms)
                ages.add(follower.age_ms)
                await trio.sleep(0.02)
            assert lags == {0}
            assert max(ages) > 500, "what answers tell is the age still"
            hung.append(trio.Event())  # the primary hangs: its next answer does not come
            await until(lambda: follower.lag_ms > 1_500)
            assert abs(follower.lag_ms - follower.age_ms) <= 1
            hung.pop().set()
            await until(lambda: follower.lag_ms == 0)
            listener_gone(listener)
            await until(lambda: follower.state == "primary silent" and follower.lag_ms > 0)
            nursery.cancel_scope.cancel()


def listener_gone(listener: PeerListener) -> None:
    """The primary takes no connection any more and drops those that it has."""
    listener.closed = "gone"
    for session in list(listener._peers.values()):
        session.conn.close("gone")


@on_trio
async def test_age_grows_while_the_primary_is_silent_and_survives_a_restart(tmp_path: Path) -> None:
    async with replica_of("b", tmp_path / "b") as primary:
        async with following(primary, tmp_path / "a") as (actor, follower):
            await write(primary, 1, 1.0, "all")
            await until(lambda: follower.state == "following")
            assert follower.age_ms < 2_000
    async with linked({}, connect=False) as (link, _), replica_of("a", tmp_path / "a") as actor:
        hour_ns = 3_600 * 10**9
        clock = actor._now_ns
        actor._now_ns = lambda: clock() + hour_ns
        follower = Replicator(actor, link, Random(1))
        assert follower.age_ms >= 3_600_000, (
            "nobody has told it of anything newer; that is no proof of being level"
        )
        before = follower.age_ms
        await trio.sleep(0.05)
        assert follower.age_ms >= before + 50
