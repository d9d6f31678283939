"""`seen-in-1s` of docs/caching.md: several nodes that tell and hear, over links that lose, delay and break, while they restart
and take each other's shards over. Pure machines in virtual time; each failure repeats by its seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from node import hearing, telling
from node.hearing import Hearing
from node.telling import Change, Led, Telling, Told
from router.cachevalues import Origin
from router.changes import Changes

NAMES = ("a", "b", "c")
SHARDS = 2
STEP_S = 0.05
LEASE_S = 0.6


@dataclass
class Write:
    shard: int
    id: int
    version: tuple[int, int]
    acked_at: float


@dataclass
class Node:
    name: str
    boot: int
    now: float
    applied: list[int] = field(default_factory=lambda: [0] * SHARDS)

    def __post_init__(self) -> None:
        self.telling = Telling(self.boot, self.now)
        self.hearing = Hearing(self.name, SHARDS)
        self.changes = Changes(self.now)
        # id → the newest version that was noted, since the last drop.
        self.noted: dict[int, tuple[int, int]] = {}
        self.next_round = self.now

    def note(self, id_: int, version: tuple[int, int]) -> None:
        self.noted[id_] = max(version, self.noted.get(id_, (0, 0)))

    def drop(self, now: float) -> None:
        self.changes.drop(now)
        self.hearing.dropped()
        self.noted.clear()


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 100.0
        self.nodes = {name: Node(name, 1, self.now) for name in NAMES}
        self.logs: list[list[Write]] = [[] for _ in range(SHARDS)]
        self.leaders: list[tuple[str, int]] = [("a", 1), ("b", 1)]
        self.lease_until = [self.now + 1e9] * SHARDS
        self.cut: set[tuple[str, str]] = set()
        # (arrives at, from, to, told or None for an answer, ok)
        self.wire: list[tuple[float, str, str, Told | None, int]] = []
        self.values: list[tuple[Origin, float]] = []
        self.checked = self.trusted = 0

    def leading(self, name: str) -> dict[int, int]:
        return {
            shard: epoch
            for shard, (leader, epoch) in enumerate(self.leaders)
            if leader == name and self.now < self.lease_until[shard]
        }

    def step(self) -> None:
        self.now += STEP_S
        rng, now = self.random, self.now
        for node in self.nodes.values():
            self.catch_up(node)
            if now >= node.next_round:
                self.round(node)
        due = [one for one in self.wire if one[0] <= now]
        self.wire = [one for one in self.wire if one[0] > now]
        for one in due:
            self.arrive(*one[1:])
        dice = rng.random()
        if dice < 0.3:
            self.write(rng.randrange(SHARDS))
        elif dice < 0.32:
            self.cut ^= {(rng.choice(NAMES), rng.choice(NAMES))}
        elif dice < 0.33:
            self.cut.clear()
        elif dice < 0.335:
            self.restart(rng.choice(NAMES))
        elif dice < 0.345:
            shard = rng.randrange(SHARDS)
            self.lease_until[shard] = min(self.lease_until[shard], now + LEASE_S)
        for shard in range(SHARDS):
            if now >= self.lease_until[shard] + rng.random():
                self.elect(shard)
        origin_of = rng.choice(list(self.nodes.values()))
        self.values.append((Origin(origin_of.name, origin_of.boot, origin_of.telling.tick), now))
        del self.values[:-60]
        for node in self.nodes.values():
            self.check(node)

    def write(self, shard: int) -> None:
        name, epoch = self.leaders[shard]
        if shard in self.leading(name):
            version = (epoch, len(self.logs[shard]) + 1)
            self.logs[shard].append(Write(shard, self.random.randrange(5) + 10 * shard, version, self.now))
            self.catch_up(self.nodes[name])

    def catch_up(self, node: Node) -> None:
        """The leader has everything; followers come behind, now and then."""
        for shard, log in enumerate(self.logs):
            leads = self.leaders[shard][0] == node.name
            if leads or self.random.random() < 0.1:
                new = log[node.applied[shard] :]
                node.applied[shard] = len(log)
                node.telling.applied(shard, [Change(w.id, w.version) for w in new], leads, self.now)
                for one in new:
                    node.note(one.id, one.version)

    def elect(self, shard: int) -> None:
        name = self.random.choice(NAMES)
        self.catch_up_all(self.nodes[name], shard)
        self.leaders[shard] = (name, self.leaders[shard][1] + 1)
        self.lease_until[shard] = self.now + 1e9

    def catch_up_all(self, node: Node, shard: int) -> None:
        new = self.logs[shard][node.applied[shard] :]
        node.applied[shard] = len(self.logs[shard])
        node.telling.applied(shard, [Change(w.id, w.version) for w in new], False, self.now)
        for one in new:
            node.note(one.id, one.version)

    def restart(self, name: str) -> None:
        old = self.nodes[name]
        # What was on its disk stays; who led is deposed, once its lease is over.
        self.nodes[name] = Node(name, old.boot + 1, self.now, applied=list(old.applied))
        for shard, (leader, _) in enumerate(self.leaders):
            if leader == name:
                self.lease_until[shard] = min(self.lease_until[shard], self.now)

    def round(self, node: Node) -> None:
        node.next_round = self.now + 0.2
        leading = self.leading(node.name)
        node.telling.begin_round(leading, self.now)
        led = node.telling.led(leading, self.now)
        if node.hearing.hear_self(node.boot, led, node.telling.tick, self.now):
            node.drop(self.now)
        node.changes.expire(self.now)
        for peer in NAMES:
            told = node.telling.compose(peer, leading, self.now) if peer != node.name else None
            if told is not None:
                self.send(node.name, peer, told, node.boot)

    def send(self, sender: str, to: str, told: Told | None, boot: int) -> None:
        lost = (sender, to) in self.cut or self.random.random() < 0.02
        delay_s = self.random.random() * self.random.choice([0.02, 0.02, 0.3, 2.0 if self.cut else 0.1])
        if lost:
            # The asker gives up after a second.
            asker = sender if told is not None else to
            self.wire.append((self.now + 1.0, asker, asker, None, -boot))
        else:
            self.wire.append((self.now + delay_s, sender, to, told, boot))

    def arrive(self, sender: str, to: str, told: Told | None, boot: int) -> None:
        node = self.nodes[to]
        if told is None:
            if boot == node.boot or (boot < 0 and -boot == node.boot):
                peer = sender if boot > 0 else self.random.choice([n for n in NAMES if n != to])
                if node.telling._peers.get(peer) is not None and node.telling._peers[peer].sent >= 0:
                    node.telling.answered(peer, boot > 0)
            return
        if node.hearing.hear(sender, told, self.now):
            node.drop(self.now)
        for id_, epoch, sequence in told.users:
            node.note(id_, (epoch, sequence))
        self.send(to, sender, None, boot)

    def check(self, node: Node) -> None:
        if not node.hearing.current(self.now):
            return
        self.checked += 1
        since = node.changes.dropped_at
        for log in self.logs:
            for one in log[-40:]:
                if since < one.acked_at <= self.now - 1.0:
                    assert node.noted.get(one.id, (0, 0)) >= one.version, (node.name, one, since, self.now)
        for origin, begun in self.values:
            if node.hearing.trusts(origin, node.changes.complete_since):
                self.trusted += 1
                assert begun >= since, (node.name, origin, begun, since)


@pytest.mark.parametrize("seed", range(15))
def test_no_change_stays_unknown_for_a_second(seed: int) -> None:
    world = World(seed)
    for _ in range(1_200):
        world.step()
    assert world.checked > 200
    assert world.trusted > 200


def test_the_law_is_broken_when_silence_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearing, "SILENT_S", 60.0)
    with pytest.raises(AssertionError):
        for seed in range(20):
            test_no_change_stays_unknown_for_a_second(seed)


def test_the_law_is_broken_when_takeovers_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Telling.led
    monkeypatch.setattr(telling, "TAKEN_OVER_S", 0.0)
    monkeypatch.setattr(
        Telling,
        "led",
        lambda self, leading, now: [one._replace(covers_ms=10**9) for one in told(self, leading, now)],
    )
    with pytest.raises(AssertionError):
        for seed in range(40):
            test_no_change_stays_unknown_for_a_second(seed)


def _told(sequence: int, **more: object) -> Told:
    fields = {"boot": 1, "sequence": sequence, "settled": sequence, "led": [], "users": [], "items": []}
    return Told(**{**fields, "lost": False, **more})  # type: ignore[arg-type]


def test_a_gap_or_a_loss_drops_everything() -> None:
    one = Hearing("b", 1)
    assert not one.hear("a", _told(1), 0.0)
    assert not one.hear("a", _told(2), 0.2)
    assert one.hear("a", _told(4), 0.4)
    assert one.hear("a", _told(5, lost=True), 0.6)
    assert not one.hear("a", _told(6), 0.8)


def test_a_log_that_ran_over_is_told_as_a_loss() -> None:
    one = Telling(1, 0.0)
    told = one.compose("b", {}, 0.0)
    assert told is not None
    assert not told.lost
    one.answered("b", True)
    one.applied(0, [Change(i, (1, i)) for i in range(20_000)], True, 1.0)
    told = one.compose("b", {}, 1.2)
    assert told is not None
    assert told.lost
    assert len(told.users) <= 16_384


def test_a_message_of_another_shape_is_refused() -> None:
    for body in (None, [], [1] * 7, [1, 1, 1, [[1, 2]], [], [], False], [1, 1, 1, [], [], ["x"], False]):
        with pytest.raises((TypeError, ValueError)):
            Told.read(body)
    assert Told.read([1, 2, 3, [[0, 1, 5]], [[7, 1, 2]], [9], False]).led[0].covers_ms == 5


def test_a_replica_made_anew_covers_nothing_from_before() -> None:
    one = Telling(1, 0.0)
    one.applied(0, [Change(7, (1, 1))], False, 99.0)
    one.replaced(0, 99.5)
    one.begin_round({0: 2, 1: 2}, 100.0)
    assert {led.shard: led.covers_ms for led in one.led({0: 2, 1: 2}, 100.0)} == {0: 500, 1: 10_000}
    told = one.compose("b", {0: 2, 1: 2}, 100.0)
    assert told is not None
    assert told.users == []


def test_values_are_trusted_soon_after_everything_was_dropped() -> None:
    """Not only at the next sample: else a node would revalidate for long what it makes itself after its start."""
    one, changes = Hearing("b", 1), Changes(0.0)
    led = [Led(0, 1, 0)]
    assert one.hear_self(1, led, 1, 0.1)
    one.dropped()
    changes.drop(0.1)
    assert not one.hear_self(1, led, 2, 0.3)
    assert one.trusts(Origin("b", 1, 3), changes.complete_since)
    assert not one.trusts(Origin("b", 1, 2), changes.complete_since)
    assert not one.trusts(Origin("b", 2, 9), changes.complete_since)
