"""The coordinator over a cluster of fakes that can be down, late or damaged: exact merges, retries, coverage, writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import outcome
import pytest
import trio
import trio.testing

from router import coverage, requests
from router.coordinator import Coordinator, RouterConfig
from router.errors import RequestError
from router.fanout import SOURCE
from router.layout import Placement
from router.ports import (
    Answers,
    Asked,
    Done,
    NodeError,
    NodeGoneError,
    SearchAsk,
    SearchReply,
    StoredRecord,
    WriteAsk,
    WriteReply,
)
from router.requests import Session
from router.ring import shard_of
from router.writing import NO_PRIMARY_S
from storage.records import Kind
from storage.view import ClassConstraint

DIM = 8
SHARDS = 6
NAMES = ("a", "b", "c")


class FakeNode:
    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.down = False
        self.delay_s = 0.0
        self.age_ms = 0
        self.damaged: set[int] = set()
        self.asked: list[tuple[int, ...]] = []
        self.asks: list[SearchAsk] = []
        self.timeouts_s: list[float] = []
        self.cancelled = 0
        self.refuse: NodeError | None = None
        self.written: list[WriteAsk] = []
        self.break_writes = 0

    async def _gate(self, timeout_s: float) -> None:
        if self.down:
            raise NodeGoneError(self.name, sent=False)
        with trio.move_on_after(timeout_s) as scope:
            await trio.sleep(self.delay_s)
        if scope.cancelled_caught:
            raise NodeError("deadline_exceeded", "late")

    def _later(self, make: Callable[[], Any], timeout_s: float, done: Done[Any]) -> Asked:
        """`make` after the gate, unless cancelled."""
        scope = trio.CancelScope()

        async def run() -> None:
            result: Any
            with scope:
                try:
                    await self._gate(timeout_s)
                    result = outcome.Value(make())
                except (NodeGoneError, NodeError) as error:
                    result = outcome.Error(error)
            if scope.cancelled_caught:
                self.cancelled += 1
            else:
                done(result)

        self.world.nursery.start_soon(run)
        return scope

    def search(self, ask: SearchAsk, timeout_s: float, done: Done[SearchReply]) -> Asked:
        self.asked.append(ask.shards)
        self.asks.append(ask)
        self.timeouts_s.append(timeout_s)
        if self.refuse is not None:
            raise self.refuse

        def make() -> SearchReply:
            good = [s for s in ask.shards if s not in self.damaged]
            ids, scores = self.world.top(good, ask.query, ask.k)
            metadata = [str(i).encode() for i in ids]
            failed = dict.fromkeys(self.damaged & set(ask.shards), "damaged")
            return SearchReply(ids, scores, metadata, failed, self.age_ms)

        return self._later(make, timeout_s, done)

    def get(
        self, kind: Kind, ids: Sequence[int], session: Session, timeout_s: float, done: Done[Any]
    ) -> Asked:
        def make() -> Answers[StoredRecord]:
            vectors = self.world.vectors
            found = [
                StoredRecord((1, 1), vectors[i].tobytes(), (), b"\x80") if i in vectors else None for i in ids
            ]
            return Answers(found, self.age_ms)

        return self._later(make, timeout_s, done)

    def score(
        self,
        query: npt.NDArray[np.float16],
        ids: Sequence[int],
        metadata: bool,
        session: Session,
        timeout_s: float,
        done: Done[Any],
    ) -> Asked:
        def make() -> Answers[tuple[float, bytes]]:
            found = [(float(i), b"") if i in self.world.vectors else None for i in ids]
            return Answers(found, self.age_ms)

        return self._later(make, timeout_s, done)

    async def write(self, asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]:
        await self._gate(timeout_s)
        if any(self.world.primary(ask.shard) != self.name for ask in asks):
            refusal = ("no_primary", f"not written through {self.name}", None)
            return [WriteReply(ask.shard, 0, 0, refusal) for ask in asks]
        self.written.extend(asks)
        if self.break_writes:
            self.break_writes -= 1
            raise NodeGoneError(self.name, sent=True)
        return [WriteReply(ask.shard, 1, len(ask.changes), None) for ask in asks]


class World:
    """A `router.ports.Cluster` of fakes."""

    def __init__(self, replication: int = 2) -> None:
        rng = np.random.default_rng(7)
        self.vectors = {i: rng.normal(size=DIM).astype(np.float16) for i in range(1, 200)}
        self.local = "a"
        self.shard_count = SHARDS
        self.nodes = {name: FakeNode(self, name) for name in NAMES}
        self.replication = replication
        self.seen_down: set[str] = set()
        self.unwell: set[str] = set()
        self.lags: dict[str, int] = {}
        self.far: set[str] = set()
        # Sessions are behind on these shards of the coordinator's own.
        self.behind: set[int] = set()
        # Where what nodes do runs: set while a request is handled.
        self.nursery: trio.Nursery

    def top(self, shards: Sequence[int], query: npt.NDArray[np.float16], k: int) -> tuple[Any, Any]:
        mine = [i for i in self.vectors if shard_of(i, SHARDS) in shards]
        pairs = sorted(
            (-float(np.float32(self.vectors[i].astype(np.float64) @ query.astype(np.float64))), i)
            for i in mine
        )[:k]
        return np.array([i for _, i in pairs], np.uint64), np.array([-s for s, _ in pairs], np.float32)

    def node(self, name: str) -> FakeNode:
        return self.nodes[name]

    def placement(self, shard: int) -> Placement:
        return Placement(
            shard=shard, epoch=1, voters=tuple(NAMES[(shard + i) % 3] for i in range(self.replication))
        )

    def primary(self, shard: int) -> str:
        return self.placement(shard).primary

    def alive(self, name: str) -> bool:
        return name not in self.seen_down

    def distance(self, name: str) -> int:
        return (
            coverage.FAR if name in self.far else coverage.HERE if name == self.local else coverage.SAME_ZONE
        )

    def load_s(self, name: str) -> float:
        return 0.0

    async def caught_up(self, shards: Sequence[int], session: Session, timeout_s: float) -> dict[int, str]:
        await trio.lowlevel.checkpoint()
        return dict.fromkeys(self.behind & set(shards), "session_behind")

    def lags_ms(self, name: str) -> dict[int, int]:
        return dict.fromkeys(range(SHARDS), self.lags.get(name, 0))

    def avoid(self, name: str) -> bool:
        return name in self.unwell


def _search(world: World, k: int = 10, timeout_ms: float | None = None) -> requests.Search:
    return requests.Search(
        k=k,
        constraint=ClassConstraint(),
        metadata=True,
        timeout_ms=timeout_ms,
        session=(),
        vector=world.vectors[1],
    )


def _run(world: World, request: object, **config: int) -> dict[str, Any]:
    coordinator = Coordinator(world, RouterConfig(**config), metric="dot")

    async def main() -> dict[str, Any]:
        async with trio.open_nursery() as world.nursery:
            answer = await coordinator.handle(request)
            world.nursery.cancel_scope.cancel()
        return answer

    return _unwrapped(main)


def _unwrapped(main: Callable[[], Awaitable[Any]]) -> Any:
    """What main returns, in virtual time; a lone error of a nursery as itself."""
    try:
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None


def _expected(world: World, k: int) -> list[int]:
    ids: list[int] = world.top(range(SHARDS), world.vectors[1], k)[0].tolist()
    return ids


@pytest.mark.parametrize("replication", [1, 2, 3])
def test_the_merged_answer_is_what_one_big_index_gives(replication: int) -> None:
    world = World(replication)
    reply = _run(world, _search(world, 25))
    assert reply["hits"].ids.tolist() == _expected(world, 25)
    assert reply["hits"].metadata == [str(i).encode() for i in _expected(world, 25)]
    assert reply["coverage"] == {"answered": SHARDS, "total": SHARDS, "missing": []}


def test_with_all_shards_at_home_nobody_else_is_asked() -> None:
    world = World(3)
    _run(world, _search(world))
    assert [len(node.asked) for node in world.nodes.values()] == [1, 0, 0]


def test_each_node_gets_one_message_and_the_fewest_nodes_are_asked() -> None:
    world = World(2)
    _run(world, _search(world))
    assert sorted(len(node.asked) for node in world.nodes.values()) == [0, 1, 1]


def test_a_node_that_breaks_loses_its_shards_to_their_other_replicas() -> None:
    world = World(2)
    world.nodes["b"].down = True
    world.nodes["a"].damaged = {0}
    reply = _run(world, _search(world))
    # Shard 0 lives on a (damaged) and b (down); the others have a second replica that works.
    assert reply["coverage"] == {"answered": 5, "total": 6, "missing": [0], "reason": "unavailable"}
    assert all(shard_of(i, SHARDS) != 0 for i in reply["hits"].ids.tolist())


def test_all_nodes_are_asked_before_any_is_waited_for() -> None:
    world = World(1)
    world.nodes["a"].delay_s = 60.0  # nothing that it does lets anybody wait
    _run(world, _search(world, timeout_ms=50))
    assert [len(node.asked) for node in world.nodes.values()] == [1, 1, 1]


def test_a_node_that_refuses_at_once_loses_its_shards_to_their_other_replicas() -> None:
    world = World(2)
    world.nodes["a"].refuse = NodeError("overloaded", "not now")
    reply = _run(world, _search(world))
    assert reply["coverage"]["missing"] == []
    assert reply["hits"].ids.tolist() == _expected(world, 10)
    world = World(1)
    world.nodes["a"].refuse = NodeError("overloaded", "not now")
    assert _run(world, _search(world))["coverage"]["reason"] == "overloaded"


def test_what_changes_is_seen_by_the_next_fan_out_but_one_of_the_same_moment() -> None:
    world = World(2)
    coordinator = Coordinator(world, RouterConfig(), metric="dot")

    async def main() -> None:
        async with trio.open_nursery() as world.nursery:
            await coordinator.handle(_search(world))
            world.seen_down = {"b"}
            await trio.sleep(0.002)
            before = len(world.nodes["b"].asked)
            assert (await coordinator.handle(_search(world)))["coverage"]["missing"] == []
            assert len(world.nodes["b"].asked) == before

    _unwrapped(main)


def test_a_late_node_is_given_up_and_the_answer_stays_whole() -> None:
    world = World(2)
    world.nodes["a"].delay_s = 60.0
    reply = _run(world, _search(world), try_ms=100, deadline_ms=1_000)
    assert reply["coverage"]["missing"] == []
    assert reply["hits"].ids.tolist() == _expected(world, 10)


def test_without_any_replica_the_answer_is_partial_and_in_time() -> None:
    """`never-silent`."""
    world = World(1)
    world.nodes["c"].delay_s = 60.0
    reply = _run(world, _search(world, timeout_ms=200))
    assert reply["coverage"]["missing"] == [2, 5]
    assert reply["coverage"]["answered"] == 4


def test_similar_drops_the_given_items_and_still_brings_k() -> None:
    world = World(2)
    request = requests.Similar(
        k=10,
        constraint=ClassConstraint(),
        metadata=True,
        timeout_ms=None,
        session=(),
        positive=(1, 2),
        negative=(3,),
    )
    reply = _run(world, request)
    ids = reply["hits"].ids.tolist()
    assert len(ids) == 10
    assert not {1, 2, 3} & set(ids)
    assert reply["hits"].metadata == [str(i).encode() for i in ids]


def test_an_unknown_item_is_named_and_an_unreachable_one_is_not_called_unknown() -> None:
    world = World(2)
    request = requests.Similar(
        k=1,
        constraint=ClassConstraint(),
        metadata=True,
        timeout_ms=None,
        session=(),
        positive=(9_999,),
        negative=(),
    )
    with pytest.raises(RequestError) as caught:
        _run(world, request)
    assert caught.value.code == "unknown_item"
    for node in world.nodes.values():
        node.down = True
    with pytest.raises(RequestError) as caught:
        _run(world, request)
    assert caught.value.code == "unavailable"


def _put(ids: Sequence[int]) -> requests.Put:
    return requests.Put(
        kind=Kind.ITEM,
        ids=tuple(ids),
        vectors=np.ones((len(ids), DIM), np.float16),
        classes=((),) * len(ids),
        metadata=(b"\x80",) * len(ids),
        ack="primary",
        write_id=None,
        timeout_ms=None,
    )


def test_a_write_goes_to_the_primaries_with_one_write_id() -> None:
    world = World(2)
    reply = _run(world, _put(range(1, 50)))
    assert reply["written"] == 49
    asks = [ask for node in world.nodes.values() for ask in node.written]
    assert {ask.write_id for ask in asks} == {reply["write_id"]}
    assert sorted(ask.shard for ask in asks) == sorted({shard_of(i, SHARDS) for i in range(1, 50)})
    for name, node in world.nodes.items():
        assert all(world.placement(ask.shard).primary == name for ask in node.written)


def test_a_broken_link_is_retried_under_the_same_write_id_then_unknown() -> None:
    world = World(2)
    for node in world.nodes.values():
        node.break_writes = 1
    reply = _run(world, _put([1]))
    (node,) = [node for node in world.nodes.values() if node.written]
    assert [ask.write_id for ask in node.written] == [reply["write_id"]] * 2
    node.break_writes = 1_000_000
    with pytest.raises(RequestError) as caught:
        _run(world, _put([1]), write_deadline_ms=1_000)
    assert caught.value.code == "outcome_unknown"


def test_a_primary_that_is_down_is_waited_for_as_long_as_an_election_takes() -> None:
    world = World(2)
    for node in world.nodes.values():
        node.down = True

    async def main() -> float:
        began = trio.current_time()
        with pytest.raises(RequestError) as caught:
            await Coordinator(world, RouterConfig(), metric="dot").handle(_put([1]))
        assert caught.value.code == "no_primary"
        return trio.current_time() - began

    took_s = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert NO_PRIMARY_S <= took_s < NO_PRIMARY_S + 0.5
    assert took_s < RouterConfig().write_deadline_ms / 1000 / 1.5, (
        "without a doubt there is no more to wait for"
    )


def test_a_lagging_replica_is_asked_only_when_no_other_is_left_and_the_answer_says_so() -> None:
    world = World(2)
    world.lags = {"a": 5_000}
    world.nodes["a"].age_ms = 5_000
    reply = _run(world, _search(world))
    assert not world.nodes["a"].asked
    assert "stale_ms" not in reply
    world.seen_down = {"b"}  # shards 0 and 3 have their other replica on a
    reply = _run(world, _search(world))
    assert reply["coverage"]["missing"] == []
    assert reply["stale_ms"] == 5_000


def test_an_unwell_node_is_asked_only_when_no_other_level_replica_is_left() -> None:
    world = World(2)
    world.unwell = {"a"}  # even the coordinator's own replicas
    reply = _run(world, _search(world))
    assert not world.nodes["a"].asked
    assert reply["coverage"]["missing"] == []
    world.seen_down = {"b"}  # shards 0 and 3 have their other replica on a
    reply = _run(world, _search(world))
    assert [set(asked) for asked in world.nodes["a"].asked] == [{0, 3}]
    assert reply["coverage"]["missing"] == []
    # Level and unwell comes before well and behind: fresh answers first, a failure turns to the other.
    world.seen_down, world.lags = set(), {"b": 5_000, "c": 5_000}
    world.nodes["b"].age_ms = world.nodes["c"].age_ms = 5_000
    reply = _run(world, _search(world))
    assert "a" in {name for name, node in world.nodes.items() if node.asked}
    assert reply["stale_ms"] == 5_000  # shards 1 and 4 live on b and c alone


def test_an_answer_is_as_old_as_the_node_that_gave_it_says() -> None:
    query: dict[str, Any] = {
        "k": 3, "constraint": ClassConstraint(), "metadata": False, "timeout_ms": None, "session": (),
    }  # fmt: skip
    asked = [
        requests.Search(vector=np.ones(DIM, np.float16), **query),
        requests.Recommend(user_id=1, **query),
        requests.Similar(positive=(1,), negative=(), **query),
        requests.Batch(user_id=1, media_ids=(2, 3), metadata=False, timeout_ms=None, session=()),
        requests.Get(kind=Kind.ITEM, ids=(1, 2), vector=False, timeout_ms=None, session=()),
    ]
    for request in asked:
        world = World(3)
        for node in world.nodes.values():
            node.age_ms = 1_999
        assert "stale_ms" not in _run(world, request), (
            "the coordinator's own view is that all are level, and they are"
        )
        for node in world.nodes.values():
            node.age_ms = 7_000
        assert _run(world, request)["stale_ms"] == 7_000, request


def test_a_recommendation_is_as_old_as_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    user = next(i for i in world.vectors if world.placement(shard_of(i, SHARDS)).primary == "b")
    look_up = FakeNode.get

    def old(self: FakeNode, kind: Kind, ids: Any, session: Any, timeout_s: float, done: Done[Any]) -> Asked:
        def aged(result: outcome.Outcome[Any]) -> None:
            done(outcome.Value(result.unwrap()._replace(age_ms=9_000)))

        return look_up(self, kind, ids, session, timeout_s, aged)

    monkeypatch.setattr(FakeNode, "get", old)
    request = requests.Recommend(
        user_id=user, k=3, constraint=ClassConstraint(), metadata=False, timeout_ms=None, session=()
    )
    assert _run(world, request)["stale_ms"] == 9_000


@pytest.mark.parametrize(
    ("refusal", "told"), [("overloaded", "outcome_unknown"), ("ack_timeout", "ack_timeout")]
)
def test_a_refusal_after_a_lost_try_is_an_unknown_outcome(refusal: str, told: str) -> None:
    world = World(2)

    async def refuse(asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]:
        if not node.written:
            node.written.extend(asks)
            raise NodeGoneError(node.name, sent=True)
        return [WriteReply(ask.shard, 0, 0, (refusal, "refused", 50)) for ask in asks]

    for node in world.nodes.values():
        if world.placement(shard_of(1, SHARDS)).primary == node.name:
            break
    node.write = refuse  # type: ignore[method-assign]
    with pytest.raises(RequestError) as caught:
        _run(world, _put([1]))
    assert caught.value.code == told


def test_who_asks_for_all_is_told_what_is_missing_as_an_error() -> None:
    world = World(1)
    world.nodes["c"].down = True
    request = dataclasses.replace(_search(world), require_full=True)
    with pytest.raises(RequestError) as caught:
        _run(world, request)
    assert caught.value.code == "partial"
    assert "2 of 6 shards" in caught.value.message
    world.nodes["c"].down = False
    assert _run(world, request)["coverage"]["answered"] == 6
    # The user and one item on a, another item on b.
    by_node = {
        name: [i for i in world.vectors if world.primary(shard_of(i, SHARDS)) == name] for name in NAMES
    }
    batch = requests.Batch(
        user_id=by_node["a"][0], media_ids=(by_node["a"][1], by_node["b"][0]), metadata=False, timeout_ms=None,
        session=(), require_full=True,
    )  # fmt: skip
    assert len(_run(world, batch)["hits"].ids) == 2
    world.nodes["b"].down = True
    with pytest.raises(RequestError) as caught:
        _run(world, batch)
    assert caught.value.code == "partial"


def test_nobody_at_all_is_an_error_that_says_why() -> None:
    for world, code, retry_after_ms in ((World(2), "unavailable", None), (World(2), "overloaded", 80)):
        for node in world.nodes.values():
            node.down = True
            node.refuse = NodeError("overloaded", "later", 80) if code == "overloaded" else None
        with pytest.raises(RequestError) as caught:
            _run(world, _search(world))
        assert (caught.value.code, caught.value.retry_after_ms) == (code, retry_after_ms)


def test_a_late_node_is_asked_for_no_longer_than_a_try_while_another_has_its_shards() -> None:
    world = World(2)
    world.nodes["a"].delay_s = 60.0
    reply = _run(world, _search(world), hedge_percent=0)
    assert reply["coverage"]["missing"] == []
    assert world.nodes["a"].timeouts_s == [pytest.approx(0.03)]
    # Of what only one has, it may take all the time there is.
    world = World(1)
    world.nodes["c"].delay_s = 0.09
    assert _run(world, _search(world))["coverage"]["missing"] == []


def test_what_only_one_has_is_waited_for_while_the_rest_is_asked_elsewhere() -> None:
    world = World(2)
    world.seen_down = {"b"}  # of shard 0 and 3 only a is left, of 2 and 5 c, too
    world.nodes["a"].delay_s = 0.06
    reply = _run(world, _search(world), hedge_percent=0)
    assert reply["coverage"]["missing"] == []
    assert reply["hits"].ids.tolist() == _expected(world, 10)


def test_who_hangs_up_takes_back_what_was_asked() -> None:
    world = World(1)
    for node in world.nodes.values():
        node.delay_s = 60.0
    coordinator = Coordinator(world, RouterConfig(), metric="dot")

    async def main() -> None:
        async with trio.open_nursery() as world.nursery:
            with trio.move_on_after(0.01):
                await coordinator.handle(_search(world))
            await trio.testing.wait_all_tasks_blocked()
            assert [node.cancelled for node in world.nodes.values()] == [1, 1, 1]
            assert all(one["in_flight"] == 0 for one in coordinator.peers().values())
            assert not any(one["open"] for one in coordinator.peers().values())

    _unwrapped(main)


@pytest.mark.parametrize("percent", [5, 0])
def test_a_hedge_takes_over_from_a_node_that_is_slower_than_usual_within_the_budget(percent: int) -> None:
    world = World(2)
    coordinator = Coordinator(world, RouterConfig(hedge_percent=percent), metric="dot")
    waited = 0

    async def main() -> None:
        nonlocal waited
        async with trio.open_nursery() as world.nursery:
            for number in range(400):
                for node in world.nodes.values():
                    node.delay_s = 0.001
                if number >= 100 and number % 25 == 0:
                    world.nodes["a"].delay_s = 0.02
                began = trio.current_time()
                reply = await coordinator.handle(_search(world))
                waited += trio.current_time() - began > 0.01
                assert reply["coverage"]["missing"] == []
                assert reply["hits"].ids.tolist() == _expected(world, 10)
                await trio.sleep(0.002)

    _unwrapped(main)
    seen = coordinator.statistics()
    if not percent:
        assert waited == 12
        assert seen["hedges"] == 0
        return
    # One in twenty that are no slower than usual is hedged, too: that is what a p95 is, and it uses up the budget.
    assert waited <= 4
    assert 0 < seen["hedges"] <= 0.05 * seen["first_messages"]
    assert sum(node.cancelled for node in world.nodes.values()) == seen["needless"] > 0


def test_a_node_that_fails_again_and_again_is_left_alone_and_tried_now_and_then() -> None:
    world = World(3)
    world.nodes["a"].down = True  # it would be asked first: it is the coordinator's own
    coordinator = Coordinator(world, RouterConfig(), metric="dot")

    async def main() -> None:
        async with trio.open_nursery() as world.nursery:
            for _ in range(20):
                assert (await coordinator.handle(_search(world)))["coverage"]["missing"] == []
                await trio.sleep(0.01)
            assert len(world.nodes["a"].asked) == 5
            await trio.sleep(1.0)
            async with trio.open_nursery() as together:
                for _ in range(20):
                    together.start_soon(coordinator.handle, _search(world))
            assert len(world.nodes["a"].asked) == 6, "one of them is the probe"
            world.nodes["a"].down = False
            await trio.sleep(2.0)
            for _ in range(20):
                await coordinator.handle(_search(world))
                await trio.sleep(0.01)
            assert len(world.nodes["a"].asked) == 26
            # When there is nobody else, it is asked whatever its breaker says.
            world.nodes["a"].down = True
            for _ in range(20):
                await coordinator.handle(_search(world))
                await trio.sleep(0.01)
            world.nodes["a"].down = False
            world.seen_down = {"b", "c"}
            assert (await coordinator.handle(_search(world)))["coverage"]["missing"] == []

    _unwrapped(main)


def test_own_replicas_that_are_behind_a_session_leave_their_shards_to_others() -> None:
    world = World(3)
    world.behind = {1, 2}
    request = dataclasses.replace(_search(world), session=((1, 1, 5), (2, 1, 7)))
    reply = _run(world, request)
    assert reply["coverage"]["missing"] == []
    assert world.nodes["a"].asked == [(0, 3, 4, 5)]
    assert sorted(s for name in "bc" for asked in world.nodes[name].asked for s in asked) == [1, 2]
    world.behind = set(range(SHARDS))
    world.seen_down = {"b", "c"}
    with pytest.raises(RequestError) as caught:
        _run(world, request)
    assert caught.value.code == "session_behind"


def test_far_away_is_asked_only_when_nobody_near_is_left_and_never_by_a_hedge() -> None:
    world = World(2)
    world.far = {"c"}
    _run(world, _search(world))
    assert sorted(s for asked in world.nodes["c"].asked for s in asked) == [], (
        "a and b have every shard but none"
    )
    world.nodes["b"].delay_s = 60.0
    reply = _run(world, _search(world))
    assert reply["coverage"]["missing"] == []
    assert world.nodes["c"].asked


def test_urgency_and_source_travel_with_the_question() -> None:
    world = World(1)
    token = SOURCE.set(42)
    try:
        _run(world, dataclasses.replace(_search(world), priority=2))
    finally:
        SOURCE.reset(token)
    asks = [ask for node in world.nodes.values() for ask in node.asks]
    assert {(ask.priority, ask.source) for ask in asks} == {(2, 42)}
    assert max(ask.k for ask in asks) < 10, (
        "each holds a third of the shards, and hash sharding spreads the best"
    )


def test_of_each_node_its_own_time_is_taken_not_that_of_the_slowest() -> None:
    world = World(1)
    world.nodes["b"].delay_s, world.nodes["c"].delay_s = 0.005, 0.02
    coordinator = Coordinator(world, RouterConfig(), metric="dot")

    async def main() -> None:
        async with trio.open_nursery() as world.nursery:
            for _ in range(5):
                await coordinator.handle(_search(world))

    _unwrapped(main)
    seen = coordinator.peers()
    assert [seen[name]["mean_ms"] for name in NAMES] == pytest.approx([0, 5, 20])


def test_an_answer_that_does_not_fit_its_question_is_a_failure_of_that_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(2)
    look_up = FakeNode.get

    def short(self: FakeNode, kind: Kind, ids: Any, session: Any, timeout_s: float, done: Done[Any]) -> Asked:
        return look_up(self, kind, ids[1:] if self.name == "a" else ids, session, timeout_s, done)

    monkeypatch.setattr(FakeNode, "get", short)
    request = requests.Get(kind=Kind.ITEM, ids=tuple(range(1, 40)), vector=False, timeout_ms=None, session=())
    assert all(_run(world, request)["records"])
    world.nodes["b"].down = world.nodes["c"].down = True
    with pytest.raises(RequestError) as caught:
        _run(world, request)
    assert caught.value.code in ("internal", "unavailable")


def test_who_was_only_late_is_asked_again_when_the_other_one_hangs() -> None:
    world = World(2)
    world.seen_down = {"a"}  # shards 1 and 4 are on b and c
    world.nodes["b"].delay_s = world.nodes["c"].delay_s = 60.0
    coordinator = Coordinator(world, RouterConfig(hedge_percent=0), metric="dot")

    async def main() -> None:
        async with trio.open_nursery() as world.nursery:

            async def well_again() -> None:
                await trio.sleep(0.02)
                world.nodes["b"].delay_s = world.nodes["c"].delay_s = 0.001

            world.nursery.start_soon(well_again)
            reply = await coordinator.handle(_search(world))
            assert not {1, 4} & set(reply["coverage"]["missing"])

    _unwrapped(main)
