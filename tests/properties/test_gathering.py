"""`exact-merge`, `one-answer`, `never-silent`, `tries-bounded` (docs/fan-out.md), whatever fails, in whichever order."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from router import coverage, tail
from router.coverage import Choice, Sight
from router.gathering import Gathering
from router.merge import Part
from router.peers import HedgeBudget, Peer
from router.tries import Cancel, Counters, Effect, Failed, Rules, Send


@dataclass
class World:
    """Shards of (id, score) pairs, held by nodes."""

    random: Random
    shards: int
    nodes: int
    replication: int
    items: int
    ties: bool
    held: list[list[tuple[float, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.held = [[] for _ in range(self.shards)]
        skewed = self.random.random() < 0.3
        for id in range(self.items):
            score = float(
                np.float32(self.random.choice([0.5, 0.25, 1.0]) if self.ties else self.random.random())
            )
            # Skewed: what no hash would do; it must be exact even so.
            shard = (
                int(self.random.random() ** 4 * self.shards) if skewed else self.random.randrange(self.shards)
            )
            self.held[shard].append((-score, id))
        for some in self.held:
            some.sort()

    def voters(self, shard: int) -> list[str]:
        return [f"n{(shard * 7 + place) % self.nodes}" for place in range(self.replication)]

    def best(self, shards: list[int] | tuple[int, ...], k: int) -> Part:
        pairs = sorted(pair for shard in shards for pair in self.held[shard])[:k]
        return np.array([i for _, i in pairs], np.uint64), np.array([-s for s, _ in pairs], np.float32)

    def choose(self, shards: object, failed: Failed, near: bool) -> Choice:
        def sight(name: str) -> Sight:
            return Sight(False, {})

        single = set()

        def candidates(shard: int) -> list[str]:
            voters = [name for name in self.voters(shard) if (name, shard) not in failed]
            if len(voters) < 2:
                single.add(shard)
            return coverage.choose(shard, voters, sight, "n0")

        return Choice(*coverage.cover(shards, candidates, "n0", sight, self.random.randrange), single)  # type: ignore[arg-type]


Hits = tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]


def run(world: World, k: int, retries: int, trouble: float) -> tuple[Gathering[Hits], list[Send]]:
    """Answers and failures in any order, until nothing is open."""
    random = world.random
    peers: dict[str, Peer] = {}
    budget = HedgeBudget(100)
    budget.first(20)

    def peer(name: str) -> Peer:
        if name not in peers:
            peers[name] = Peer()
            for _ in range(30):
                peers[name].began(0.0)
                peers[name].answered(0.0, 0.002, False)
        return peers[name]

    every = list(range(world.shards))
    rules = Rules(deadline=10.0, try_s=0.03, retries=retries, k=k, total=world.shards)
    gathering: Gathering[Hits] = Gathering(rules, world.choose, peer, budget, Counters(), lambda hits: hits)
    out: dict[int, Send] = {}
    sent: list[Send] = []
    now = 0.0

    def do(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Cancel):
                del out[effect.id]
            else:
                out[effect.id] = effect
                sent.append(effect)

    do(gathering.start(now, world.choose(every, frozenset(), False)))
    steps = 0
    while gathering.open:
        steps += 1
        assert steps < 10_000
        assert out.keys() == gathering.open.keys()
        due = gathering.next_due()
        if due is not None and random.random() < 0.4:
            now = max(now, due)
            do(gathering.due(now))
            continue
        now += random.random() * 0.01
        send = out.pop(random.choice(sorted(out)))
        if random.random() < trouble:
            do(
                gathering.failed(
                    send.id, random.choice(["unavailable", "deadline_exceeded", "overloaded"]), now
                )
            )
        else:
            bad = {shard: "damaged" for shard in send.shards if random.random() < trouble / 4}
            good = [shard for shard in send.shards if shard not in bad]
            do(gathering.answered(send.id, world.best(good, send.k), bad, now))
    assert all(one.in_flight == 0 for one in peers.values())
    return gathering, sent


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, 1 << 32), st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(0, 400),
    st.integers(1, 60), st.booleans(), st.sampled_from([0.0, 0.05, 0.3, 0.8]), st.integers(0, 3),
)  # fmt: skip
def test_the_answer_is_that_of_one_big_index_over_the_shards_that_answered(
    seed: int,
    shards: int,
    nodes: int,
    replication: int,
    items: int,
    k: int,
    ties: bool,
    trouble: float,
    retries: int,
) -> None:
    world = World(Random(seed), shards, nodes, min(replication, nodes), items, ties)
    gathering, sent = run(world, k, retries, trouble)
    assert gathering.merged is not None
    answered, missing = set(gathering.answered_by), set(gathering.missing)
    assert answered | missing == set(range(shards))
    assert not answered & missing
    parts = [answer.shards for answer in gathering.answers.values()]
    assert len([s for part in parts for s in part]) == len({s for part in parts for s in part}), (
        "one answer each"
    )
    ids, scores = world.best(sorted(answered), k)
    # First hits of shards whose node failed later may stand among them; they hide nothing of the others.
    got = list(zip((-gathering.merged.scores).tolist(), gathering.merged.ids.tolist(), strict=True))
    assert got == sorted(got)
    if not gathering.incomplete and all(set(part) <= answered for part in parts):
        assert gathering.merged.ids.tolist() == ids.tolist()
        assert gathering.merged.scores.tolist() == scores.tolist()
    if not trouble:
        assert not missing
        assert gathering.merged.ids.tolist() == ids.tolist()
    by_shard: dict[int, list[str]] = {}
    for send in sent:
        for shard in send.shards:
            by_shard.setdefault(shard, []).append(send.node)
    for asked in by_shard.values():
        # Hedges aside, of which each try has one; and a question for more goes to the same node.
        assert len(set(asked)) <= 2 * (1 + retries)


def test_a_part_that_may_go_on_is_asked_for_no_more_than_can_matter() -> None:
    world = World(Random(1), 4, 4, 1, 0, False)
    # All of the best in one shard.
    world.held = [[(-100.0 + n, n) for n in range(60)], [(-1.0, 1_000)], [(-0.5, 1_001)], []]
    gathering, sent = run(world, 50, 2, 0.0)
    assert gathering.merged is not None
    assert gathering.merged.ids.tolist() == list(range(50))
    first = tail.enough(50, 1, 4)
    asked = [send.k for send in sent if 0 in send.shards]
    assert asked == [first, 50]
    assert [send.k for send in sent if 0 not in send.shards] == [first] * 3


def test_nothing_is_asked_twice_when_hits_are_spread_as_hashes_spread_them() -> None:
    counters = 0
    for seed in range(200):
        world = World(Random(seed), 100, 34, 1, 2_000, False)
        # Not skewed, whatever the seed said.
        every = [pair for some in world.held for pair in some]
        world.held = [[] for _ in range(100)]
        for pair in every:
            world.held[world.random.randrange(100)].append(pair)
        for some in world.held:
            some.sort()
        _, sent = run(world, 50, 2, 0.0)
        first = {(send.node, tuple(send.shards)) for send in sent}
        counters += len(sent) - len(first)
        assert max(send.k for send in sent) < 50 or len(sent) > len(first)
    assert counters <= 200 * 34 * tail.MISS * 20 + 5
