"""Where a key lives, and the ring of points on which layouts are made. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from xxhash import xxh64_intdigest


def shard_of(id: int, shard_count: int) -> int:
    """The shard of an item or user: xxh64 of the decimal id, so that any language finds the same one."""
    return xxh64_intdigest(b"%d" % id) % shard_count


def shards_of(ids: Iterable[int], shard_count: int) -> list[int]:
    """`shard_of` for many ids, in their order."""
    digest = xxh64_intdigest
    return [digest(b"%d" % id) % shard_count for id in ids]


def point(text: str) -> int:
    """A place on the ring: 64 bits, the same on every node and in every process."""
    return xxh64_intdigest(text.encode())


class Ring:
    """Names on a circle, each at several points in proportion to its weight.

    Consistent hashing (Karger et al. 1997): a name that comes or goes changes only the
    arcs beside its points.
    """

    POINTS_PER_NAME = 64
    # A heavy name gets more points, but a ring stays small enough to be walked for every shard.
    POINTS_MAX = 1_024

    def __init__(self, weights: dict[str, int]) -> None:
        assert weights, "a ring needs a name"
        assert min(weights.values()) > 0, "weights are positive"
        lightest = min(weights.values())
        spots: list[tuple[int, str]] = []
        for name, weight in weights.items():
            count = min(self.POINTS_PER_NAME * weight // lightest, self.POINTS_MAX)
            spots.extend((point(f"{name}#{i}"), name) for i in range(count))
        # The name breaks ties, so that the ring does not depend on the order of `weights`.
        spots.sort()
        self._points = [where for where, _ in spots]
        self._names = [name for _, name in spots]
        self._distinct = len(weights)

    def walk(self, key: str) -> list[str]:
        """Every name once, in the order in which they are met clockwise from the key's point."""
        start = bisect_right(self._points, point(key))
        names, seen = self._names, dict[str, None]()
        for i in range(len(names)):
            seen[names[(start + i) % len(names)]] = None
            if len(seen) == self._distinct:
                break
        return list(seen)
