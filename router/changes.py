"""What a node knows of late changes: users that were written, items that were deleted. Pure.

From this the caches decide what may be kept and what may be used (docs/caching.md, *Changes*). Bounded by time and by count:
what is forgotten moves `complete_since` forward, so that what was made before is not trusted, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from router.cachevalues import Version

# Longer than an answer lives in any cache, its jitter included.
KEEP_S = 400.0
USERS_MAX = 131_072
ITEMS_MAX = 65_536


class Ticket(NamedTuple):
    """Taken when an answer is begun. at: seconds; deletes: how many were known then."""

    at: float
    deletes: int


class Changes:
    """Times are of one monotonic clock, in seconds."""

    def __init__(self, now: float, users_max: int = USERS_MAX, items_max: int = ITEMS_MAX) -> None:
        # Each in the order of time.
        self._users: dict[int, tuple[Version, float]] = {}
        self._items: dict[int, tuple[int, float]] = {}
        self._users_max, self._items_max = users_max, items_max
        # What came before is not known.
        self.dropped_at = now
        self._users_since = self._items_since = -math.inf
        # Counts deletes; a delete up to this count may have been forgotten.
        self.count = 0
        self._forgotten = 0
        self.counters = {"users": 0, "items": 0, "drops": 0, "forgotten": 0}

    @property
    def complete_since(self) -> float:
        return max(self.dropped_at, self._users_since, self._items_since)

    def user(self, user_id: int, version: Version, now: float) -> None:
        """A version of that user has been written; the greatest told counts."""
        self.counters["users"] += 1
        known = self._users.pop(user_id, None)
        self._users[user_id] = (version if known is None else max(known[0], version), now)
        if len(self._users) > self._users_max:
            self._forget_user()

    def item(self, media_id: int, now: float) -> None:
        """That item has been deleted."""
        self.counters["items"] += 1
        self.count += 1
        self._items.pop(media_id, None)
        self._items[media_id] = (self.count, now)
        if len(self._items) > self._items_max:
            self._forget_item()

    def drop(self, now: float) -> None:
        """Changes may have been missed: nothing that was made before is known to be right."""
        self.counters["drops"] += 1
        self.dropped_at = now
        self.count += 1
        self._forgotten = self.count
        self._users.clear()
        self._items.clear()

    def expire(self, now: float) -> None:
        """Forgets what is older than any value."""
        while self._users and next(iter(self._users.values()))[1] < now - KEEP_S:
            self._forget_user()
        while self._items and next(iter(self._items.values()))[1] < now - KEEP_S:
            self._forget_item()
        # Nothing newer has been forgotten; but a value may be older than the memory is long.
        self._users_since = max(self._users_since, now - KEEP_S)

    def _forget_user(self) -> None:
        _, at = self._users.pop(next(iter(self._users)))
        self._users_since = max(self._users_since, at)
        self.counters["forgotten"] += 1

    def _forget_item(self) -> None:
        count, at = self._items.pop(next(iter(self._items)))
        self._items_since = max(self._items_since, at)
        self._forgotten = max(self._forgotten, count)
        self.counters["forgotten"] += 1

    # -- what follows ---------------------------------------------------------------------------------------------

    def ticket(self, now: float) -> Ticket:
        return Ticket(now, self.count)

    def admits_user(self, user_id: int, version: Version) -> bool:
        """Whether nothing newer of that user is known."""
        known = self._users.get(user_id)
        return known is None or version >= known[0]

    def user_changed_after(self, user_id: int, at: float) -> bool:
        known = self._users.get(user_id)
        return known is not None and known[1] >= at

    def admits_items(self, ids: Iterable[int], count: int) -> bool:
        """Whether none was deleted since the count stood there."""
        if count == self.count:
            return True
        if count < self._forgotten:
            return False
        items = self._items
        return not any(id_ in items and items[id_][0] > count for id_ in ids)

    def admits_answer(self, ids: Iterable[int], reflects: float) -> bool:
        """Whether an answer that reflects all changes before that time reflects every delete that is known."""
        if reflects <= max(self.dropped_at, self._items_since):
            return False
        items = self._items
        return not any(id_ in items and items[id_][1] >= reflects for id_ in ids)

    def never_deleted(self, ids: Iterable[int]) -> bool:
        """Whether none of them was deleted as far back as is known."""
        return self._items.keys().isdisjoint(ids)

    def statistics(self) -> dict[str, int]:
        return {**self.counters, "users_known": len(self._users), "items_known": len(self._items)}
