"""Which node is asked for which shards. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

# A replica that lags more is asked only when no other is left.
LAG_MS_MAX = 2_000


class Sight(NamedTuple):
    """What is seen of a live node: whether to avoid it, and its lags by shard (absent: level)."""

    unwell: bool
    lags_ms: Mapping[int, int]


def choose(shard: int, voters: Sequence[str], sight: Callable[[str], Sight | None], prefer: str) -> list[str]:
    """The replicas of a shard worth asking, in the given order: the well and level ones; else the level ones; else the
    freshest, and the answer says how old it may be. `sight` of a dead node is None. Just `prefer`, when it is as good as any.
    """
    if prefer in voters:
        seen = sight(prefer)
        if seen is not None and not seen.unwell and seen.lags_ms.get(shard, 0) <= LAG_MS_MAX:
            return [prefer]
    well: list[str] = []
    level: list[str] = []
    freshest: list[str] = []
    least = 0
    for name in voters:
        seen = sight(name)
        if seen is None:
            continue
        lag_ms = seen.lags_ms.get(shard, 0)
        if lag_ms <= LAG_MS_MAX:
            (level if seen.unwell else well).append(name)
        elif not freshest or lag_ms < least:
            freshest, least = [name], lag_ms
        elif lag_ms == least:
            freshest.append(name)
    return well or level or freshest


def cover(
    shards: Iterable[int],
    candidates: Callable[[int], list[str]],
    prefer: str,
) -> tuple[dict[str, list[int]], list[int]]:
    """Assign each shard to one of its candidate nodes, with the fewest nodes (greedy set cover).

    `prefer` (the coordinator itself) takes all that it can: that costs no message. Returns the assignment and the
    shards that nobody can answer. Among nodes that cover equally many, the earlier in a shard's own order wins.
    """
    assigned: dict[str, list[int]] = {}
    missing: list[int] = []
    open_: dict[int, list[str]] = {}
    for shard in shards:
        names = candidates(shard)
        if prefer in names:
            assigned.setdefault(prefer, []).append(shard)
        elif names:
            open_[shard] = names
        else:
            missing.append(shard)
    while open_:
        count: dict[str, tuple[int, int]] = {}
        for names in open_.values():
            for place, name in enumerate(names):
                covered, order = count.get(name, (0, 0))
                count[name] = (covered + 1, order - place)
        best = max(count, key=lambda name: (*count[name], name))
        taken = [shard for shard, names in open_.items() if best in names]
        assigned.setdefault(best, []).extend(taken)
        for shard in taken:
            del open_[shard]
    return assigned, missing
