"""Which node is asked for which shards. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable


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
