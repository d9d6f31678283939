"""Jobs of a replica whose asker goes away meanwhile."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from node.blocking import ThreadRunner
from tests.unit.node.peers import on_trio
from tests.unit.node.voters import change, running


@on_trio
async def test_a_checkpoint_whose_asker_is_gone_is_finished_all_the_same(tmp_path: Path) -> None:
    """A follower that asks for a snapshot may lose its link while it is made. A job that is begun and never finished would keep
    all later ones away, and cuts."""
    async with running(tmp_path) as actor:
        await actor.write([change(1)], "primary", b"1" * 16, 2.0)
        busy = actor.upkeep._runner = ThreadRunner("busy")
        others = trio.Event()
        async with trio.open_nursery() as nursery:

            async def occupy() -> None:
                async with busy._limiter:
                    await others.wait()

            nursery.start_soon(occupy)
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as asker:
                asker.start_soon(actor.upkeep.checkpoint)
                await trio.testing.wait_all_tasks_blocked()
                others.set()
                asker.cancel_scope.cancel()
        await actor.write([change(2)], "primary", b"2" * 16, 2.0)
        await actor.upkeep.checkpoint()
        assert not actor.replica.unsaved_bytes
