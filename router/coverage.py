"""Which node is asked for which shards (docs/fan-out.md, *Whom to ask*). Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

# A replica that lags more is asked only when no other is left.
LAG_MS_MAX = 2_000
# How far a node is from the one that asks.
HERE, SAME_ZONE, SAME_REGION, FAR = range(4)


class Sight(NamedTuple):
    """What is seen of a live node: whether to avoid it, and its lags by shard (absent: level)."""

    unwell: bool
    lags_ms: Mapping[int, int]
    distance: int = SAME_ZONE
    # About how long one more request takes there.
    load_s: float = 0.0


class Choice(NamedTuple):
    """By node: the shards that it is asked for; those that nobody can answer; those for which there is no second."""

    assigned: Mapping[str, Sequence[int]]
    missing: Sequence[int]
    single: AbstractSet[int] = frozenset()


def choose(shard: int, voters: Sequence[str], sight: Callable[[str], Sight | None], prefer: str) -> list[str]:
    """The replicas of a shard worth asking, in the given order: the well and level ones; else the level ones; else the
    freshest, and the answer says how old it may be. Of these the ones in this region, if any. `sight` of a dead node is
    None. Just `prefer`, when it is as good as any.
    """
    if len(voters) == 1:
        return list(voters) if sight(voters[0]) is not None else []
    if prefer in voters:
        seen = sight(prefer)
        if seen is not None and not seen.unwell and seen.lags_ms.get(shard, 0) <= LAG_MS_MAX:
            return [prefer]
    well: list[str] = []
    level: list[str] = []
    freshest: list[str] = []
    least = 0
    far = False
    for name in voters:
        seen = sight(name)
        if seen is None:
            continue
        far = far or seen.distance >= FAR
        lag_ms = seen.lags_ms.get(shard, 0)
        if lag_ms <= LAG_MS_MAX:
            (level if seen.unwell else well).append(name)
        elif not freshest or lag_ms < least:
            freshest, least = [name], lag_ms
        elif lag_ms == least:
            freshest.append(name)
    best = well or level or freshest
    return _near(best, sight) if far and len(best) > 1 else best


def _near(names: list[str], sight: Callable[[str], Sight | None]) -> list[str]:
    near = [name for name in names if (seen := sight(name)) is not None and seen.distance < FAR]
    return near or names


def cover(
    shards: Iterable[int],
    candidates: Callable[[int], Sequence[str]],
    prefer: str,
    sight: Callable[[str], Sight | None] = lambda name: None,
    draw: Callable[[int], int] = lambda count: 0,
) -> tuple[dict[str, list[int]], list[int]]:
    """Assign each shard to one of its candidate nodes, with the fewest nodes (greedy set cover).

    `prefer` (the coordinator itself) takes all that it can: that costs no message. Returns the assignment and the
    shards that nobody can answer. Among nodes that cover equally many, the nearest; of those two are drawn
    (`draw(n)`: a number below n) and the less loaded one is taken.
    """
    assigned: dict[str, list[int]] = {}
    missing: list[int] = []
    left: dict[int, Sequence[str]] = {}
    for shard in shards:
        names = candidates(shard)
        if len(names) == 1:
            # Whoever must be asked anyway takes what it can.
            assigned.setdefault(names[0], []).append(shard)
        elif prefer in names:
            assigned.setdefault(prefer, []).append(shard)
        elif names:
            left[shard] = names
        else:
            missing.append(shard)
    if not left:
        return assigned, missing
    holds: dict[str, list[int]] = {}
    for shard, names in left.items():
        for name in names:
            holds.setdefault(name, []).append(shard)
    count = {name: len(some) for name, some in holds.items()}
    forced = [name for name in assigned if name in count]
    while left:
        if forced:
            best = forced.pop()
        else:
            most = max(count.values())
            best = _lightest([name for name, covers in count.items() if covers == most], sight, draw)
        taken = [shard for shard in holds[best] if shard in left]
        if taken:
            assigned.setdefault(best, []).extend(taken)
        for shard in taken:
            for name in left.pop(shard):
                count[name] -= 1
    return assigned, missing


def _lightest(names: Sequence[str], sight: Callable[[str], Sight | None], draw: Callable[[int], int]) -> str:
    """The power of two choices (Mitzenmacher 2001) among the nearest."""
    if len(names) == 1:
        return names[0]
    seen = {name: sight(name) or Sight(False, {}) for name in names}
    nearest = min(one.distance for one in seen.values())
    near = [name for name in names if seen[name].distance == nearest]
    if len(near) == 1:
        return near[0]
    first = draw(len(near))
    second = (first + 1 + draw(len(near) - 1)) % len(near)
    a, b = near[first], near[second]
    return a if seen[a].load_s <= seen[b].load_s else b
