"""L0: answers kept in this process, least recently used out first. Pure: times and luck are given.

Rules:
* the bytes of all entries stay within `bytes_max`; a reply that grows (its packed forms are made when first asked for) counts
  from then on, and one that is larger than an eighth of it is not kept;
* an entry lives for `ttl_s` ± 10%, so that what was filled at once does not expire at once;
* `drop_user` costs what that user has here, not what everybody has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from router.cachevalues import Version
from router.requests import Session
from router.wire import Kept

# Of an entry beside its columns and packed forms, measured: objects, tuples, index.
ENTRY_BYTES = 1_200
JITTER = 0.1
Key = tuple[int, str]  # user, context hash


class Entry:
    """An answer. ids: of its hits. count: changes that it has been compared with. session: tokens it was computed under."""

    __slots__ = ("count", "expires_at", "ids", "key", "reply", "session", "size", "version")

    def __init__(
        self, key: Key, reply: Kept, *, version: Version, ids: Sequence[int], count: int, session: Session
    ) -> None:
        self.key, self.reply, self.version = key, reply, version
        self.ids, self.count, self.session = ids, count, session
        self.size = 0
        self.expires_at = 0.0


class L0:
    """Bounded in bytes; see the module's rules."""

    def __init__(self, bytes_max: int, ttl_s: float, jitter: Callable[[], float]) -> None:
        """jitter: gives numbers in [0, 1)."""
        self._bytes_max, self._ttl_s, self._jitter = bytes_max, ttl_s, jitter
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._of_user: dict[int, set[str]] = {}
        self.bytes = 0
        self.counters = {"stored": 0, "evicted": 0, "expired": 0, "dropped": 0, "too_large": 0}

    def get(self, key: Key, now: float) -> Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now >= entry.expires_at:
            self._remove(entry)
            self.counters["expired"] += 1
            return None
        self._entries.move_to_end(key)
        return entry

    def put(self, entry: Entry, now: float) -> None:
        old = self._entries.get(entry.key)
        if old is not None:
            self._remove(old)
        entry.size = ENTRY_BYTES + 40 * len(entry.ids) + entry.reply.size
        if entry.size > self._bytes_max // 8:
            self.counters["too_large"] += 1
            return
        entry.expires_at = now + self._ttl_s * (1 - JITTER + 2 * JITTER * self._jitter())
        self._entries[entry.key] = entry
        self._of_user.setdefault(entry.key[0], set()).add(entry.key[1])
        self.bytes += entry.size
        self.counters["stored"] += 1
        entry.reply.grew = lambda size: self._grew(entry, size)
        self._make_room()

    def _grew(self, entry: Entry, size: int) -> None:
        if self._entries.get(entry.key) is entry:
            entry.size += size
            self.bytes += size
            self._make_room()

    def _make_room(self) -> None:
        while self.bytes > self._bytes_max:
            self._remove(next(iter(self._entries.values())))
            self.counters["evicted"] += 1

    def drop(self, key: Key) -> None:
        entry = self._entries.get(key)
        if entry is not None:
            self._remove(entry)
            self.counters["dropped"] += 1

    def drop_user(self, user_id: int, below: Version | None = None) -> None:
        """That user's entries; with `below`, those made from an older version than that."""
        for context in list(self._of_user.get(user_id, ())):
            entry = self._entries[user_id, context]
            if below is None or entry.version < below:
                self._remove(entry)
                self.counters["dropped"] += 1

    def clear(self) -> None:
        self.counters["dropped"] += len(self._entries)
        for entry in self._entries.values():
            entry.reply.grew = None
        self._entries.clear()
        self._of_user.clear()
        self.bytes = 0

    def _remove(self, entry: Entry) -> None:
        user_id, context = entry.key
        entry.reply.grew = None  # else the two would keep each other alive
        del self._entries[entry.key]
        contexts = self._of_user[user_id]
        contexts.discard(context)
        if not contexts:
            del self._of_user[user_id]
        self.bytes -= entry.size

    def __len__(self) -> int:
        return len(self._entries)

    def statistics(self) -> dict[str, int]:
        return {**self.counters, "entries": len(self), "bytes": self.bytes}
