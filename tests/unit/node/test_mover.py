"""What a node does with its replicas when other primaries ask it to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import trio

from node.config import ClusterConfig
from node.mover import Mover
from node.shard import ShardActor
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
        assert await actor.follow(9, epoch_record(9, told.sequence, actor.placement.pack()))
        assert not await mover.on_dismiss("c", [0, 8]), "a primary that is one no more"
        assert await mover.on_dismiss("b", [0, 9])
        assert not held.actors
