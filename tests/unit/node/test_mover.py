"""What a node does with its replicas when other primaries ask it to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

from node.config import ClusterConfig
from node.mover import Mover
from node.placement import Placement
from node.shard import ShardActor
from tests.unit.node.peers import on_trio, until
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
async def test_what_has_lost_a_voter_comes_before_what_is_only_balanced() -> None:
    """`lost-first`: in each round, whatever the order of the shards."""
    steps: list[int] = []

    class Recording(Mover):
        async def _step(self, actor: Any) -> None:
            await trio.lowlevel.checkpoint()
            steps.append(actor.shard)

        async def _dismiss(self, actor: Any) -> None:
            await trio.lowlevel.checkpoint()

    async def nothing() -> None:
        await trio.lowlevel.checkpoint()

    def shard(number: int, *voters: str) -> Any:
        placement = Placement(tuple((name, 1) for name in voters))
        return SimpleNamespace(shard=number, leads=True, placement=placement, purge=nothing)

    known = {name: SimpleNamespace(alive=name != "dead") for name in ("a", "b", "c", "dead")}
    members = SimpleNamespace(own=SimpleNamespace(name="a"), get=known.get)
    shards = [shard(0, "a", "b"), shard(1, "a", "dead", "b"), shard(2, "a", "c"), shard(3, "dead", "a")]
    held = SimpleNamespace(
        actors={one.shard: one for one in shards}, fetcher=SimpleNamespace(pace=lambda *_: None)
    )

    async def end_drain(**_: bool) -> None:
        await trio.lowlevel.checkpoint()

    duty = SimpleNamespace(end_drain=end_drain)
    mover = Recording(held, None, members, None, lambda: None, duty, ClusterConfig())  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mover.run)
        await until(lambda: len(steps) >= 4)
        nursery.cancel_scope.cancel()
    assert steps[:4] == [1, 3, 0, 2]


@on_trio
async def test_a_replica_with_records_that_nobody_else_may_have_is_not_removed(tmp_path: Path) -> None:
    """`tail-kept`: one that comes back from the dead is in no placement any more; its log may end in records that it alone has
    acknowledged. Only when it follows that primary it is known what it must offer first."""
    async with running(tmp_path, ("a", "b", "c")) as actor:
        held = Held(actor)
        members = SimpleNamespace(own=SimpleNamespace(name="a"))
        mover = Mover(held, None, members, None, lambda: None, None, ClusterConfig())  # type: ignore[arg-type]
        actor.election.on_echo("b", trio.current_time())
        await actor.write([change(1)], "primary", b"1" * 16, 2.0)
        assert not await mover.on_dismiss("b", [0, 9]), "it leads"
        actor.act(actor, actor.election.on_leader(9, trio.current_time()))
        assert not await mover.on_dismiss("b", [0, 9])
        told = actor.replica.position
        actor.act(actor, actor.election.on_stream("b", 9, trio.current_time()))
        assert not await mover.on_dismiss("b", [0, 9]), "its log has not been compared with that primary's"
        blobs, records = epoch_record(9, told.sequence, actor.placement.pack())
        assert await actor.follow(9, blobs, records)
        assert not await mover.on_dismiss("c", [0, 8]), "a primary that is one no more"
        assert await mover.on_dismiss("b", [0, 9])
        assert not held.actors
