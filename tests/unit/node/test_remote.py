"""What a broken or newer peer may send in a search costs it an answer, and nobody else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio

from node.blocking import InlineRunner
from node.lane import SearchLane
from node.local import LocalNode
from node.peerlink import RemoteError
from node.remote import RemoteNode, handlers
from router.ports import NodeError, SearchAsk
from storage.view import ClassConstraint
from tests.unit.node.peers import answer, linked, on_trio

GOOD: list[Any] = [[0], b"\0\0", 3, [[], [], []], False, [], 0, 0, 1000.0]


@on_trio
async def test_odd_searches_are_refused_and_the_lane_goes_on() -> None:
    lane = SearchLane(InlineRunner(), queue_max=8)
    local = LocalNode({}, {}, lane, 1)
    async with trio.open_nursery() as nursery, linked(handlers(local, {}, dict)) as (link, _):
        await nursery.start(lane.run)
        odd = {
            2: (0, -1, 1 << 40, 3.5, "3", None),
            6: ("x", None, []),
            7: ("x", [1], None),
            8: ("soon", None),
        }
        for place, values in odd.items():
            for value in values:
                body = [*GOOD]
                body[place] = value
                with pytest.raises(RemoteError) as caught:
                    await link.call("search", body, 2.0)
                assert caught.value.code == "bad_request", (place, value)
        ids, _, _, failed, _ = await link.call("search", [*GOOD[:6], 99, *GOOD[7:]], 2.0)
        assert (ids, failed) == (b"", {0: "unavailable"})
        nursery.cancel_scope.cancel()


@on_trio
async def test_an_answer_that_cannot_be_read_is_the_peers_failure() -> None:
    good = [b"i" * 8, b"s" * 4, None, {}, 0]
    bad: list[Any] = [["?"], None, 7, [b"i" * 16, *good[1:]], [b"i", *good[1:]], [*good[:2], [], {}, 0],
                      [*good[:3], [], 0], [*good[:4], None]]  # fmt: skip
    bodies = [*bad, good]
    async with linked({"search": lambda peer, body: bodies.pop(0)}) as (link, _):
        ask = SearchAsk((0,), np.zeros(1, np.float16), 3, ClassConstraint(), False)
        for _ in bad:
            with pytest.raises(NodeError) as caught:
                await answer(lambda done: RemoteNode("b", link).search(ask, 2.0, done))
            assert caught.value.code == "internal"
        reply = await answer(lambda done: RemoteNode("b", link).search(ask, 2.0, done))
        assert len(reply.ids) == 1
