"""One write on its way through elections, broken links and late answers, in virtual time: nothing is guessed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
import trio
import trio.testing

from router.layout import Placement
from router.ports import Change, NodeError, NodeGoneError, WriteAsk, WriteReply
from router.writing import NO_PRIMARY_S, RETRY_S, TRY_S, _Try
from storage.records import Kind, Operation

NAMES = ("a", "b", "c")
CHANGE = Change(Operation.PUT, Kind.ITEM, 1, b"", (), b"\x80")
DEADLINE_S = 10.0

Refusal = tuple[str, str, int | None]
Answer = Callable[[WriteAsk, float], Awaitable[WriteReply]]


class FakeNode:
    """Writes what it leads; says of the rest who leads it, as far as it `knows`."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.asked: list[tuple[float, tuple[int, ...]]] = []
        self.knows = True
        # Instead of an answer: by shard, else for all.
        self.gone: bool | None = None
        self.refuses: dict[int, Refusal] = {}
        self.delay_s = 0.0

    async def write(self, asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]:
        now = trio.current_time()
        self.asked.append((now, tuple(sorted(ask.shard for ask in asks))))
        assert timeout_s > 0
        await trio.sleep(min(self.delay_s, timeout_s))
        if self.gone is not None:
            raise NodeGoneError(self.name, sent=self.gone)
        if self.delay_s > timeout_s:
            raise NodeError("deadline_exceeded", "late")
        return [self._one(ask) for ask in asks]

    def _one(self, ask: WriteAsk) -> WriteReply:
        leader = self.world.leader(ask.shard)
        if leader != self.name:
            hint = leader if self.knows else ""
            return WriteReply(ask.shard, 0, 0, ("no_primary", f"not through {self.name}", None), hint)
        if ask.shard in self.refuses:
            return WriteReply(ask.shard, 0, 0, self.refuses[ask.shard])
        self.world.written.append((ask.shard, self.name, ask.write_id))
        return WriteReply(ask.shard, 1, 1, None)


class World:
    """A `router.ports.Cluster` of three; who leads is a matter of time: [(from when, name or "")…] by shard."""

    def __init__(self, leaders: Mapping[int, Sequence[tuple[float, str]]]) -> None:
        self.local, self.shard_count = "a", 6
        self.leaders = leaders
        self.nodes = {name: FakeNode(self, name) for name in NAMES}
        self.dead: set[str] = set()
        # What the coordinator takes for the primary, whatever is true.
        self.believed: dict[int, str] = {}
        self.written: list[tuple[int, str, bytes]] = []

    def leader(self, shard: int) -> str:
        now = trio.current_time()
        return next((name for at, name in reversed(self.leaders[shard]) if at <= now), "")

    def primary(self, shard: int) -> str:
        return self.believed.get(shard, "a")

    def node(self, name: str) -> FakeNode:
        return self.nodes[name]

    def placement(self, shard: int) -> Placement:
        return Placement(shard=shard, epoch=1, voters=NAMES)

    def alive(self, name: str) -> bool:
        return name not in self.dead

    def avoid(self, name: str) -> bool:
        return False

    def lags_ms(self, name: str) -> dict[int, int]:
        return {}

    @property
    def tries(self) -> int:
        return sum(len(node.asked) for node in self.nodes.values())


def settle(
    world: World,
    *shards: int,
    deadline_s: float = DEADLINE_S,
    meanwhile: Callable[[], Awaitable[Any]] | None = None,
) -> tuple[dict[int, WriteReply], float]:
    """The outcome by shard and how long it took."""

    async def main() -> tuple[dict[int, WriteReply], float]:
        assert trio.current_time() == 0.0
        asks = [WriteAsk(shard, [CHANGE], "primary", b"w" * 16) for shard in shards]
        async with trio.open_nursery() as nursery:
            if meanwhile is not None:
                nursery.start_soon(meanwhile)
            replies = await _Try(world, deadline_s).settle(asks)  # type: ignore[arg-type]
            took_s = trio.current_time()
            nursery.cancel_scope.cancel()
        assert sorted(reply.shard for reply in replies) == sorted(shards), "one outcome for each"
        return {reply.shard: reply for reply in replies}, took_s

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def code(reply: WriteReply) -> str:
    return reply.error[0] if reply.error else ""


def test_a_hint_is_followed() -> None:
    world = World({0: [(0.0, "c")]})
    replies, took_s = settle(world, 0)
    assert replies[0].error is None
    assert [len(world.nodes[name].asked) for name in NAMES] == [1, 0, 1]
    assert took_s <= 2 * RETRY_S


def test_without_a_hint_the_other_voters_are_asked_in_turn() -> None:
    world = World({0: [(0.0, "c")]})
    for node in world.nodes.values():
        node.knows = False
    replies, took_s = settle(world, 0)
    assert replies[0].error is None
    assert world.tries <= 6, "every second time whoever is said to lead"
    assert took_s < 1.0


def test_the_dead_are_left_out_and_one_that_only_the_link_knows_dead_is_passed_by() -> None:
    world = World({0: [(0.0, "c")]})
    world.nodes["a"].gone = False
    world.nodes["b"].knows = False
    world.dead = {"b"}
    replies, _ = settle(world, 0)
    assert replies[0].error is None
    assert not world.nodes["b"].asked


def test_one_message_carries_all_shards_of_a_primary_and_is_split_when_they_part() -> None:
    world = World({0: [(0.0, "a")], 1: [(0.0, "b")], 2: [(0.0, "c")], 3: [(0.0, "c")]})
    replies, _ = settle(world, 0, 1, 2, 3)
    assert not any(reply.error for reply in replies.values())
    assert [shards for _, shards in world.nodes["a"].asked] == [(0, 1, 2, 3)]
    assert [shards for _, shards in world.nodes["b"].asked] == [(1,)]
    assert [shards for _, shards in world.nodes["c"].asked] == [(2, 3)]
    assert sorted(world.written) == [
        (0, "a", b"w" * 16),
        (1, "b", b"w" * 16),
        (2, "c", b"w" * 16),
        (3, "c", b"w" * 16),
    ]


def test_two_shards_whose_primaries_change_at_different_times_do_not_wait_for_each_other() -> None:
    world = World({0: [(0.0, ""), (0.7, "b")], 1: [(0.0, ""), (3.1, "c")]})
    done: dict[int, float] = {}
    write = FakeNode._one

    class Noting(FakeNode):
        def _one(self, ask: WriteAsk) -> WriteReply:
            reply = write(self, ask)
            if reply.error is None:
                done[ask.shard] = trio.current_time()
            return reply

    world.nodes = {name: Noting(world, name) for name in NAMES}
    replies, took_s = settle(world, 0, 1)
    assert not any(reply.error for reply in replies.values())
    assert 0.7 <= done[0] < 0.7 + 4 * 4 * RETRY_S
    assert 3.1 <= done[1] < 3.1 + 4 * 4 * RETRY_S
    assert took_s == done[1]
    assert len(world.written) == 2


def test_a_slow_group_holds_up_no_other() -> None:
    world = World({0: [(0.0, "b")], 1: [(0.0, "c")]})
    world.believed = {0: "b", 1: "a"}
    world.nodes["b"].delay_s = 2.0
    replies, took_s = settle(world, 0, 1)
    assert not any(reply.error for reply in replies.values())
    assert world.nodes["c"].asked[0][0] < 0.2, "shard 1 found its primary meanwhile"
    assert took_s == 2.0


def test_without_a_primary_and_without_a_doubt_it_ends_when_an_election_would_have() -> None:
    world = World({0: [(0.0, "")]})
    replies, took_s = settle(world, 0)
    assert code(replies[0]) == "no_primary"
    assert NO_PRIMARY_S <= took_s < NO_PRIMARY_S + 0.5
    # Steps of 50 ms to 200 ms, and no more of them than that gives.
    assert 20 <= world.tries <= NO_PRIMARY_S / (4 * RETRY_S) + 5


@pytest.mark.parametrize("sent", [True, False])
def test_a_message_that_may_have_arrived_leaves_a_doubt_that_no_refusal_takes_away(sent: bool) -> None:
    world = World({0: [(0.0, "a"), (0.1, "")]})
    world.nodes["a"].gone = sent
    replies, took_s = settle(world, 0)
    assert code(replies[0]) == ("outcome_unknown" if sent else "no_primary")
    assert took_s == pytest.approx(DEADLINE_S if sent else NO_PRIMARY_S, abs=0.5)


def test_a_doubt_is_settled_by_the_next_primary() -> None:
    world = World({0: [(0.0, "a"), (2.0, "b")]})
    world.nodes["a"].refuses = {0: ("outcome_unknown", "its primary changed", None)}
    replies, took_s = settle(world, 0)
    assert replies[0].error is None
    assert world.written == [(0, "b", b"w" * 16)]
    assert took_s < 3.0


@pytest.mark.parametrize("refusal", ["bad_request", "overloaded", "disk_full"])
def test_what_another_try_would_not_settle_is_told_at_once_unless_in_doubt(refusal: str) -> None:
    world = World({0: [(0.0, "a")]})
    world.nodes["a"].refuses = {0: (refusal, "no", 70)}
    replies, took_s = settle(world, 0)
    assert replies[0].error == (refusal, "no", 70)
    assert (took_s, world.tries) == (0.0, 1)

    doubtful = World({0: [(0.0, "a")]})
    doubtful.nodes["a"].gone = True

    async def back() -> None:
        await trio.sleep(0.02)
        doubtful.nodes["a"].gone = None
        doubtful.nodes["a"].refuses = {0: (refusal, "no", 70)}

    replies, took_s = settle(doubtful, 0, meanwhile=back)
    assert code(replies[0]) == "outcome_unknown"
    assert took_s < 1.0


def test_the_deadline_is_kept_while_nobody_answers() -> None:
    for deadline_s in (0.3, 1.0, 7.0):
        world = World({0: [(0.0, "a")], 1: [(0.0, "b")]})
        for node in world.nodes.values():
            node.delay_s = 60.0
        replies, took_s = settle(world, 0, 1, deadline_s=deadline_s)
        assert took_s == pytest.approx(deadline_s, abs=0.01)
        assert {code(reply) for reply in replies.values()} == {"outcome_unknown"}, (
            "it may have been carried out"
        )
        assert world.tries <= 2 * (deadline_s / TRY_S + 2)


def test_a_deadline_that_has_passed_asks_nobody() -> None:
    world = World({0: [(0.0, "a")]})
    replies, took_s = settle(world, 0, deadline_s=0.0)
    assert code(replies[0]) == "no_primary"
    assert (took_s, world.tries) == (0.0, 0)


def late_quorum(world: World) -> None:
    """Each try is written, and acknowledged by too few within its time."""

    class Lonely(FakeNode):
        async def write(self, asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]:
            if self.world.leader(asks[0].shard) == self.name:
                self.asked.append((trio.current_time(), (0,)))
                await trio.sleep(timeout_s)
                return [WriteReply(ask.shard, 0, 0, ("ack_timeout", "1 of 3", None)) for ask in asks]
            return await super().write(asks, timeout_s)

    world.nodes = {name: Lonely(world, name) for name in NAMES}


@pytest.mark.parametrize("deadline_s", [1.0, 4.0, 8.0, DEADLINE_S])
def test_that_it_is_written_and_not_acknowledged_is_said_whenever_the_time_ends(deadline_s: float) -> None:
    world = World({0: [(0.0, "a")]})
    late_quorum(world)
    replies, took_s = settle(world, 0, deadline_s=deadline_s)
    assert code(replies[0]) == "ack_timeout"
    assert took_s == pytest.approx(deadline_s, abs=0.01)


def test_that_it_was_written_is_not_forgotten_when_its_primary_goes() -> None:
    world = World({0: [(0.0, "a"), (2.4, "")]})
    late_quorum(world)
    replies, took_s = settle(world, 0)
    assert code(replies[0]) in ("ack_timeout", "outcome_unknown"), "never that nobody wrote it"
    assert took_s == pytest.approx(DEADLINE_S, abs=0.5)


def test_two_that_send_each_other_away_are_not_asked_in_a_busy_loop() -> None:
    world = World({0: [(0.0, "")]})

    class Lying(FakeNode):
        def _one(self, ask: WriteAsk) -> WriteReply:
            other = "b" if self.name == "a" else "a"
            return WriteReply(ask.shard, 0, 0, ("no_primary", f"ask {other}", None), other)

    world.nodes = {name: Lying(world, name) for name in NAMES}
    replies, took_s = settle(world, 0)
    assert code(replies[0]) == "no_primary"
    assert world.tries <= took_s / (4 * RETRY_S) + 5


def test_many_shards_in_an_election_cost_a_bounded_number_of_messages() -> None:
    world = World({shard: [(0.0, ""), (2.0, NAMES[shard % 3])] for shard in range(6)})
    replies, took_s = settle(world, *range(6))
    assert not any(reply.error for reply in replies.values())
    assert took_s < 3.0
    # At most each shard for itself, five times a second.
    assert world.tries <= 6 * (took_s / (4 * RETRY_S) + 5)


def test_no_lease_is_waited_for_and_then_written() -> None:
    world = World({0: [(0.0, "a")]})
    world.nodes["a"].refuses = {0: ("no_lease", "not heard by a majority", 50)}

    async def leased() -> None:
        await trio.sleep(0.8)
        world.nodes["a"].refuses = {}

    replies, took_s = settle(world, 0, meanwhile=leased)
    assert replies[0].error is None
    assert 0.8 <= took_s < 1.5
