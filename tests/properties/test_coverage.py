"""Whom to ask: every shard once, by somebody who has it, near and well where that can be, and by few (docs/fan-out.md)."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from router.coverage import FAR, HERE, LAG_MS_MAX, SAME_REGION, SAME_ZONE, Sight, choose, cover

LOCAL = "n0"


def _world(seed: int) -> tuple[Random, dict[int, list[str]], dict[str, Sight | None]]:
    random = Random(seed)
    nodes = [f"n{i}" for i in range(random.randint(1, 8))]
    shards = random.randint(1, 12)
    voters = {s: random.sample(nodes, random.randint(1, min(3, len(nodes)))) for s in range(shards)}
    sights: dict[str, Sight | None] = {}
    for name in nodes:
        lags = {s: random.choice([0, 500, 5_000]) for s in range(shards) if random.random() < 0.3}
        distance = HERE if name == LOCAL else random.choice([SAME_ZONE, SAME_REGION, FAR])
        seen = Sight(random.random() < 0.2, lags, distance, random.random())
        sights[name] = seen if name == LOCAL or random.random() < 0.8 else None
    return random, voters, sights


def _rank(sight: Sight, shard: int) -> int:
    lag = sight.lags_ms.get(shard, 0)
    return 2 + lag if lag > LAG_MS_MAX else int(sight.unwell)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 1 << 32))
def test_every_shard_once_by_the_best_that_there_is(seed: int) -> None:
    random, voters, sights = _world(seed)

    def candidates(shard: int) -> list[str]:
        return choose(shard, voters[shard], sights.__getitem__, LOCAL)

    assigned, missing = cover(voters, candidates, LOCAL, sights.__getitem__, random.randrange)
    seen = Counter(shard for some in assigned.values() for shard in some)
    assert set(seen.values()) <= {1}
    assert set(seen) | set(missing) == set(voters)
    assert not set(seen) & set(missing)
    for shard in missing:
        assert all(sights[name] is None for name in voters[shard])
    for name, some in assigned.items():
        for shard in some:
            assert name in voters[shard]
            mine = sights[name]
            assert mine is not None
            living = [sight for one in voters[shard] if (sight := sights[one]) is not None]
            best = min(_rank(one, shard) for one in living)
            assert _rank(mine, shard) == best
            # `local-bytes`: never far away when one as good is near.
            if mine.distance == FAR:
                assert all(one.distance == FAR for one in living if _rank(one, shard) == best)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32))
def test_of_equals_the_fewest_nodes_within_what_greedy_cover_promises(seed: int) -> None:
    random = Random(seed)
    nodes = [f"n{i}" for i in range(1, random.randint(2, 7))]
    shards = range(random.randint(1, 10))
    voters = {s: random.sample(nodes, min(len(nodes), random.randint(1, 3))) for s in shards}
    assigned, _ = cover(shards, voters.__getitem__, LOCAL, lambda name: Sight(False, {}), random.randrange)
    least = next(
        size
        for size in range(1, len(nodes) + 1)
        if any(all(set(some) & set(voters[s]) for s in shards) for some in combinations(nodes, size))
    )
    harmonic = sum(1 / i for i in range(1, len(shards) + 1))
    assert len(assigned) <= harmonic * least


def test_among_equals_the_zone_then_the_lighter_of_two() -> None:
    sights = {
        "a": Sight(False, {}, SAME_REGION, 0.0),
        "b": Sight(False, {}, SAME_ZONE, 0.3),
        "c": Sight(False, {}, SAME_ZONE, 0.1),
        "d": Sight(False, {}, SAME_ZONE, 0.2),
    }
    random = Random(3)
    taken = Counter(
        next(iter(cover([0], lambda s: list(sights), LOCAL, sights.__getitem__, random.randrange)[0]))
        for _ in range(3_000)
    )
    # Of three, the lightest is in two thirds of the pairs, the heaviest wins none.
    assert taken["a"] == taken["b"] == 0
    assert 0.6 < taken["c"] / 3_000 < 0.73


def test_the_region_comes_before_how_few() -> None:
    sights = {
        "near": Sight(False, {}, SAME_REGION),
        "also": Sight(False, {}, SAME_REGION),
        "far": Sight(False, {}, FAR),
    }
    voters = {0: ["near", "far"], 1: ["also", "far"]}
    assigned, _ = cover(
        voters, lambda s: choose(s, voters[s], sights.__getitem__, LOCAL), LOCAL, sights.__getitem__
    )
    assert set(assigned) == {"near", "also"}
