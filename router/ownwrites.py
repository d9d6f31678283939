"""What this node has just written for apps, so that its next answers show it (docs/caching.md, `seen-at-once`). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from router.cachevalues import Version
from router.requests import Session
from router.ring import shard_of

# A replica that lags more leaves routing; a little is added for the news of that.
KEEP_S = 3.0
KEPT_MAX = 8_192
V = TypeVar("V")


class OwnWrites:
    """Times in seconds of one monotonic clock. Over the bound the oldest are forgotten."""

    def __init__(self, shard_count: int) -> None:
        self._shard_count = shard_count
        self._users: dict[int, tuple[float, tuple[int, int, int]]] = {}
        self._items: dict[int, float] = {}

    def users(self, ids: Sequence[int], session: Session, now: float) -> dict[int, Version | None]:
        """By user of one write: the version that it got, None when the write has not succeeded there.

        A write that was answered a second time may have got a lower version than said here. Then what is cached of that user is
        thought to be older than it is.
        """
        tokens = {shard: (epoch, sequence) for shard, epoch, sequence in session}
        # The changes of one shard stand in the log without gaps, in the order in which they were sent.
        left: dict[int, int] = {}
        for user_id in ids:
            shard = shard_of(user_id, self._shard_count)
            left[shard] = left.get(shard, 0) + 1
        versions: dict[int, Version | None] = {}
        for user_id in ids:
            shard = shard_of(user_id, self._shard_count)
            left[shard] -= 1
            token = tokens.get(shard)
            versions[user_id] = None if token is None else (token[0], token[1] - left[shard])
            if token is not None:
                _put(self._users, user_id, (now + KEEP_S, (shard, *token)))
        return versions

    def token(self, user_id: int, now: float) -> Session:
        """What a replica must have applied to answer for that user; nothing once it is old."""
        kept = self._users.get(user_id)
        if kept is None:
            return ()
        if kept[0] <= now:
            del self._users[user_id]
            return ()
        return (kept[1],)

    def deleted(self, ids: Iterable[int], now: float) -> None:
        for id_ in ids:
            _put(self._items, id_, now + KEEP_S)

    def put(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            self._items.pop(id_, None)

    def gone(self, now: float) -> dict[int, float]:
        """Items that a replica which lags may still bring, and should not."""
        items = self._items
        while items and next(iter(items.values())) <= now:
            del items[next(iter(items))]
        return items


def _put(kept: dict[int, V], key: int, value: V) -> None:
    kept.pop(key, None)
    kept[key] = value
    if len(kept) > KEPT_MAX:
        del kept[next(iter(kept))]
