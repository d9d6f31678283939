"""The search lane: a batch's replies are those of each query alone, damage costs its shard only, and time limits hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from node.blocking import DedicatedThread, InlineRunner
from node.lane import LaneAsk, LaneReply, LaneTimeoutError, SearchLane
from router import merge
from storage.config import StorageConfig
from storage.records import Kind, Operation, decode, encode
from storage.replica import Replica
from storage.view import ClassConstraint

DIM, SHARDS, ITEMS = 8, 3, 90
CONFIG = StorageConfig(dim=DIM, engine="exact", class_width=64, wal_segment_bytes=1 << 20, threads=1)


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Replica]]:
    rng = np.random.default_rng(3)
    made = []
    for shard in range(SHARDS):
        replica = Replica.open(tmp_path / str(shard), shard=shard, node_id="n", config=CONFIG)
        records = [
            encode(
                epoch=1, sequence=n, timestamp_ns=n, operation=Operation.PUT, kind=Kind.ITEM,
                id=shard + SHARDS * n, vector=_unit(rng).tobytes(), metadata=b"m%d" % (shard + SHARDS * n),
            )
            for n in range(1, ITEMS // SHARDS + 1)
        ]  # fmt: skip
        _write(replica, records)
        made.append(replica)
    yield made
    for replica in made:
        replica.abort()


def _write(replica: Replica, records: list[bytes]) -> None:
    replica.append(records, len(records))
    replica.apply([decode(record) for record in records])


def _unit(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float16]]:
    vector = rng.normal(size=DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float16)


def _asks(replicas: list[Replica], count: int) -> list[LaneAsk]:
    rng = np.random.default_rng(5)
    some = ([0, 1, 2], [1], [0, 2], [])
    return [
        LaneAsk(
            [replicas[shard] for shard in some[n % 4]],
            _unit(rng),
            (1, 7, 40)[n % 3],
            ClassConstraint(),
            n % 5 != 0,
        )
        for n in range(count)
    ]


def _run(asks: list[LaneAsk]) -> list[LaneReply]:
    """All of them as one batch."""

    async def main() -> list[LaneReply]:
        lane = SearchLane(InlineRunner(), queue_max=1_000)
        async with trio.open_nursery() as nursery:
            await nursery.start(lane.run)
            replies = [await ticket.wait() for ticket in [lane.begin(ask, 5.0) for ask in asks]]
            assert lane.statistics()["batches"] == 1
            nursery.cancel_scope.cancel()
        return replies

    return trio.run(main)


def _same(a: LaneReply, b: LaneReply) -> bool:
    columns = a.ids.tobytes() == b.ids.tobytes() and a.scores.tobytes() == b.scores.tobytes()
    return columns and a.metadata == b.metadata and a.failed == b.failed


@pytest.mark.parametrize("hits", [1, 50, 1 << 16])
def test_a_batch_answers_as_each_query_alone(
    replicas: list[Replica], hits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_HITS", hits)
    asks = _asks(replicas, 30)
    for ask, reply in zip(asks, _run(asks), strict=True):
        assert _same(reply, _run([ask])[0])
        size = sum(ITEMS // SHARDS for _ in ask.replicas)
        assert len(reply.ids) == min(ask.k, size)
        order = list(zip((-reply.scores).tolist(), reply.ids.tolist(), strict=True))
        assert order == sorted(order)
        wanted = [b"m%d" % id for id in reply.ids.tolist()] if ask.metadata else None
        assert reply.metadata == wanted


def test_a_damaged_entry_takes_its_shard_out_of_the_answers_that_need_it(replicas: list[Replica]) -> None:
    asks = [ask._replace(replicas=replicas, metadata=True) for ask in _asks(replicas, 20)]
    whole = _run(asks)
    victim = int(whole[0].ids[0])
    bad = replicas[victim % SHARDS]
    overlay = bad._spaces[Kind.ITEM].layers[0]
    overlay[victim] = overlay[victim][:-1] + b"?"
    without = [replica for replica in replicas if replica is not bad]
    met = 0
    for ask, before, reply in zip(asks, whole, _run(asks), strict=True):
        if victim in before.ids.tolist():
            met += 1
            assert reply.failed == {bad.shard: "damaged"}
            alone = _run([ask._replace(replicas=without)])[0]
            assert _same(reply._replace(failed={}), alone)
        else:
            assert _same(reply, before)
    assert 0 < met < len(asks)


def test_a_search_that_takes_too_long_is_given_up_and_the_next_is_answered(replicas: list[Replica]) -> None:
    gate = threading.Event()

    class Slow(DedicatedThread):
        async def __call__(self, fn: Callable[..., Any], *args: Any) -> Any:
            def held() -> Any:
                gate.wait(5)
                return fn(*args)

            return await super().__call__(held)

    async def main() -> None:
        async with Slow() as thread, trio.open_nursery() as nursery:
            lane = SearchLane(thread, queue_max=2)
            await nursery.start(lane.run)
            ask = _asks(replicas, 1)[0]
            running = lane.begin(ask, 0.05)
            await trio.testing.wait_all_tasks_blocked()
            waiting = lane.begin(ask, 0.05)
            for ticket in (running, waiting):
                with pytest.raises(LaneTimeoutError):
                    await ticket.wait()
            assert lane.waiting == 0
            gate.set()
            assert len((await lane.begin(ask, 5.0).wait()).ids) == ask.k
            nursery.cancel_scope.cancel()

    trio.run(main)
