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

from node import lane as lane_module
from node.blocking import DedicatedThread, InlineRunner
from node.commit import OverloadedError
from node.lane import LaneAsk, LaneReply, LaneTicket, LaneTimeoutError, SearchLane
from router import merge
from storage.config import StorageConfig
from storage.records import Kind, Operation, decode, encode
from storage.replica import Replica
from storage.view import ClassConstraint
from tests.unit.node.peers import until

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


class Gated(DedicatedThread):
    """Each batch waits for its turn: `begun` and `go` are told batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Semaphore(0)
        self.begun = 0

    async def __call__(self, fn: Callable[..., Any], *args: Any) -> Any:
        def held() -> Any:
            self.begun += 1
            assert self.go.acquire(timeout=5)
            return fn(*args)

        return await super().__call__(held)


def test_what_waits_goes_by_priority_and_by_turns_and_what_is_taken_back_does_not_go(
    replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "BATCH_MAX", 2)

    async def main() -> None:
        order: list[str] = []
        async with Gated() as thread, trio.open_nursery() as nursery:
            lane = SearchLane(thread, queue_max=100)
            await nursery.start(lane.run)
            plain = _asks(replicas, 1)[0]

            def begin(name: str, source: str, priority: int) -> LaneTicket:
                ticket = lane.begin(plain._replace(source=source, priority=priority), 5.0)
                ticket.tell(lambda result: order.append(name))
                return ticket

            first = lane.begin(plain, 5.0)
            await until(lambda: thread.begun == 1)
            begin("prefetch", "a", 2)
            for number in range(3):
                begin(f"a{number}", "a", 0)
            gone = begin("gone", "a", 0)
            begin("b0", "b", 0)
            gone.cancel()
            assert lane.waiting == 5
            for _ in range(5):
                thread.go.release()
            await first.wait()
            await until(lambda: len(order) == 5)
            nursery.cancel_scope.cancel()
        assert [sorted(order[0:2]), sorted(order[2:4]), order[4:]] == [
            ["a0", "b0"],
            ["a1", "a2"],
            ["prefetch"],
        ]

    trio.run(main)


def test_a_running_batch_goes_on_without_what_is_taken_back(replicas: list[Replica]) -> None:
    asked: list[int] = []
    midway, go = threading.Event(), threading.Event()

    class Watching:
        """An engine that says how many queries it got, and stops before the second shard."""

        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def search(self, view: Any, queries: Any, k: int, constraints: Any) -> Any:
            asked.append(len(queries))
            found = self._engine.search(view, queries, k, constraints)
            if len(asked) == 1:
                midway.set()
                assert go.wait(5)
            return found

        def statistics(self) -> Any:
            return self._engine.statistics()

    async def main() -> None:
        async with DedicatedThread() as thread, trio.open_nursery() as nursery:
            lane = SearchLane(thread, queue_max=100)
            ask = _asks(replicas, 1)[0]._replace(replicas=replicas)
            stays, hangs_up = lane.begin(ask, 5.0), lane.begin(ask, 5.0)
            late = lane.begin(ask, 0.2)
            await nursery.start(lane.run)
            await until(midway.is_set)
            hangs_up.cancel()
            with pytest.raises(LaneTimeoutError):
                await late.wait()
            assert not late.ended, "the lane may still read for it"
            go.set()
            assert _same(await stays.wait(), alone)
            nursery.cancel_scope.cancel()

    alone = _run([_asks(replicas, 1)[0]._replace(replicas=replicas)])[0]
    with pytest.MonkeyPatch.context() as patch:
        for replica in replicas:
            view, engine = replica.searchable
            patch.setattr(replica, "searchable", (view, Watching(engine)))
        trio.run(main)
    assert asked == [3, 1, 1], "three queries in the first shard, one in the others"


def test_a_full_lane_refuses_the_least_important_and_says_when_to_come_again(replicas: list[Replica]) -> None:
    async def main() -> None:
        async with Gated() as thread, trio.open_nursery() as nursery:
            lane = SearchLane(thread, queue_max=2)
            await nursery.start(lane.run)
            ask = _asks(replicas, 1)[0]
            lane.begin(ask, 5.0)
            await until(lambda: thread.begun == 1)
            kept = lane.begin(ask._replace(source="a"), 5.0)
            prefetch = lane.begin(ask._replace(source="a", priority=2), 5.0)
            urgent = lane.begin(ask._replace(source="b"), 5.0)
            with pytest.raises(OverloadedError) as caught:
                await prefetch.wait()
            assert 10 <= caught.value.retry_after_ms <= 1_000
            with pytest.raises(OverloadedError):
                lane.begin(ask._replace(source="c", priority=1), 5.0)
            for _ in range(3):
                thread.go.release()
            assert _same(await kept.wait(), await urgent.wait())
            assert lane.statistics()["refused"] == 2
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_it_is_settled_when_nothing_is_read_any_more_for_what_was_asked_before(
    replicas: list[Replica],
) -> None:
    async def main() -> None:
        async with Gated() as thread, trio.open_nursery() as nursery:
            lane = SearchLane(thread, queue_max=9)
            await nursery.start(lane.run)
            ask = _asks(replicas, 1)[0]
            running = lane.begin(ask, 5.0)
            await until(lambda: thread.begun == 1)
            waiting = lane.begin(ask._replace(priority=2), 5.0)
            settled = trio.Event()

            async def settle() -> None:
                await lane.settle()
                settled.set()

            nursery.start_soon(settle)
            await trio.testing.wait_all_tasks_blocked()
            running.cancel()
            waiting.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert not settled.is_set(), "the batch still runs"
            lane.begin(ask, 5.0)  # what comes later is not waited for
            thread.go.release()
            await until(settled.is_set)
            assert thread.begun == 2
            thread.go.release()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_few_are_asked_of_each_shard_and_more_where_the_best_lie_together(replicas: list[Replica]) -> None:
    rng = np.random.default_rng(11)
    centre = _unit(rng)
    near = [(centre + rng.normal(size=DIM) * 0.01).astype(np.float16) for _ in range(60)]
    records = [
        encode(
            epoch=1, sequence=ITEMS // SHARDS + 1 + n, timestamp_ns=n, operation=Operation.PUT, kind=Kind.ITEM,
            id=10_000 + n, vector=(one / np.linalg.norm(one.astype(np.float32))).astype(np.float16).tobytes(),
            metadata=b"near",
        )
        for n, one in enumerate(near)
    ]  # fmt: skip
    _write(replicas[1], records)
    ask = LaneAsk(replicas, centre, 50, ClassConstraint(), True)

    async def main() -> tuple[LaneReply, int]:
        lane = SearchLane(InlineRunner(), queue_max=10)
        async with trio.open_nursery() as nursery:
            await nursery.start(lane.run)
            reply = await lane.begin(ask, 5.0).wait()
            nursery.cancel_scope.cancel()
        return reply, lane.statistics()["again"]

    reply, again = trio.run(main)
    assert again == 1
    each = [_run([ask._replace(replicas=[replica])])[0] for replica in replicas]
    whole = merge.top([(one.ids, one.scores) for one in each], 50)
    assert reply.ids.tobytes() == whole.ids.tobytes()
    assert reply.scores.tobytes() == whole.scores.tobytes()
