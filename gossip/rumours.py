"""What to tell next: each rumour a bounded number of times, those told least often first. Pure."""

from __future__ import annotations

from collections.abc import Hashable

from gossip.codec import size_of
from gossip.messages import Part


class Rumours:
    """A queue with one place for each key: newer news takes the place of older (`last value only`).

    Level n holds what has been told n times, in the order of its arrival there.
    """

    def __init__(self) -> None:
        self._levels: list[dict[Hashable, tuple[Part, int]]] = []  # with their sizes
        self._level_of: dict[Hashable, int] = {}
        self.superseded = 0

    def __len__(self) -> int:
        return len(self._level_of)

    def put(self, key: Hashable, part: Part) -> None:
        """Tell `part` from now on, in place of what was told under `key`."""
        if self.discard(key):
            self.superseded += 1
        if not self._levels:
            self._levels.append({})
        self._levels[0][key] = (part, size_of(part))
        self._level_of[key] = 0

    def discard(self, key: Hashable) -> bool:
        level = self._level_of.pop(key, None)
        if level is None:
            return False
        del self._levels[level][key]
        return True

    def take(self, parts: list[Part], room: int, sends: int) -> int:
        """Add to `parts` what goes next, of at most `room` bytes in all; returns the bytes. Each counts as told once more,
        and is forgotten when it has been told `sends` times."""
        taken: list[tuple[Hashable, int]] = []
        left = room
        for level, entries in enumerate(self._levels):
            if left < _SMALLEST:
                break
            for key, (part, size) in entries.items():
                if size <= left:
                    taken.append((key, level))
                    parts.append(part)
                    left -= size
                    if left < _SMALLEST:
                        break
        for key, level in taken:
            told = self._levels[level].pop(key)
            if level + 1 >= sends:
                del self._level_of[key]
                continue
            if level + 1 == len(self._levels):
                self._levels.append({})
            self._levels[level + 1][key] = told
            self._level_of[key] = level + 1
        return room - left


# No rumour is smaller: with less room left, looking on is in vain.
_SMALLEST = 14


class Budget:
    """Bytes per second, with at most one second's worth saved up."""

    def __init__(self, bytes_per_s: int, now: float) -> None:
        self._rate, self._left, self._at = bytes_per_s, float(bytes_per_s), now

    def left(self, now: float) -> int:
        self._left = min(self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        return int(self._left)

    def spend(self, used: int) -> None:
        self._left -= used
