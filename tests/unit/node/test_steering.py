"""Whom a forced failover asks before it is done: everybody alive, since a replica left behind does not know who came after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.lowlevel

from node.election import FORCED_EVERY, ElectionConfig
from node.failover import Failover
from node.peerlink import PeerGoneError
from node.shard import ShardActor
from node.steering import Steering
from node.witness import Kept, Vote
from router.errors import RequestError
from router.operating import FailOver
from tests.unit.node.peers import on_trio
from tests.unit.node.voters import BRISK, running

END = {"epoch": 0, "sequence": 0, "promised": 0, "leads": False}


class Others:
    """Links to nodes that answer `shard_end` as told; who is not told of does not answer."""

    def __init__(self, ends: dict[str, dict[str, Any] | None]) -> None:
        self.ends = ends
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        async def call(op: str, body: Any, timeout_s: float) -> dict[str, Any] | None:
            await trio.lowlevel.checkpoint()
            assert (op, body[0]) == ("shard_end", 0)
            self.asked.add(name)
            if name not in self.ends:
                raise PeerGoneError(name, "it is not there", sent=False)
            return self.ends[name]

        return SimpleNamespace(call=call)


def steering(
    actor: ShardActor, others: Others, alive: Sequence[str], votes: dict[int, Vote] | None = None
) -> Steering:
    failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
    members: Any = SimpleNamespace(own=SimpleNamespace(name="a"), alive_names=["a", *alive])
    shards = {0: actor}
    return Steering(members, others, shards, failover, None, votes or {})  # type: ignore[arg-type]


def force(confirmed: bool = True) -> FailOver:
    return FailOver(shard=0, to="a", force=True, confirmed=confirmed, timeout_ms=2_000)


@on_trio
async def test_a_replica_left_behind_is_not_forced_beside_a_primary_that_it_does_not_name(
    tmp_path: Path,
) -> None:
    # Its placement names b and c, who are gone; the shard has moved to d meanwhile.
    async with running(tmp_path, ("a", "b", "c"), lead=False, election=ElectionConfig()) as actor:
        led = END | {"epoch": 9, "sequence": 50, "promised": 9, "leads": True}
        others = Others({"d": led, "e": None})
        for confirmed in (False, True):
            with pytest.raises(RequestError, match="has a primary") as caught:
                await steering(actor, others, ["d", "e"]).apply(force(confirmed))
            assert caught.value.code == "refused"
        assert others.asked == {"b", "c", "d", "e"}
        assert not actor.leads
        # Nor where one that it does not name has more.
        others = Others({"d": led | {"leads": False}})
        with pytest.raises(RequestError, match="d has more of shard 0 than a"):
            await steering(actor, others, ["d"]).apply(force())
        assert not actor.leads


@on_trio
async def test_who_has_no_replica_is_not_silent_and_a_witness_tells_what_it_has_seen(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c"), lead=False, election=ElectionConfig()) as actor:
        seen = 3 * FORCED_EVERY + 7
        others = Others({"d": None, "w": END | {"promised": seen}})
        forced = steering(actor, others, ["d", "w"])
        told = await forced.apply(force(confirmed=False))
        assert (told["silent"], told["ahead"], told["forced"]) == (["b", "c"], {}, False)
        told = await forced.apply(force())
        assert told["forced"]
        assert told["epoch"] > seen


@on_trio
async def test_a_witness_answers_with_what_its_vote_has_promised_and_remembers(tmp_path: Path) -> None:
    async with running(tmp_path, lead=False) as actor:
        now = trio.current_time()
        votes = {
            shard: Vote(BRISK, "a", Kept(1, promised, remembered), random=Random(1), now=now, owes=True)
            for shard, promised, remembered in ((1, 12, 0), (2, 3, 14))
        }
        asked = steering(actor, Others({}), [], votes)
        assert [asked.tell_end("b", [shard, 0]) for shard in (1, 2, 3)] == [
            END | {"promised": 12},
            END | {"promised": 14},
            None,
        ]
