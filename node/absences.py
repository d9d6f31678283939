"""How long things have been so, and which hosts count as gone for good until they have proved otherwise. Pure."""

from __future__ import annotations

from collections.abc import Collection, Hashable


class Lasting:
    """Since when something has held without a break, by key; a key that does not hold takes no room."""

    def __init__(self) -> None:
        self._since: dict[Hashable, float] = {}

    def see(self, key: Hashable, holds: bool, now: float) -> float:
        """For how many seconds it has held; negative when it does not."""
        if not holds:
            self._since.pop(key, None)
            return -1.0
        return now - self._since.setdefault(key, now)


class Absences:
    """Who has been gone for `after_s`, and who of those has not been back for as long.

    What has been rebuilt elsewhere stays there until the host has lasted. Until then it counts as gone at once when it is away
    again: one that comes and goes costs one copy, and at most one more that was begun when it came.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._away, self._back = Lasting(), Lasting()
        self._gone: set[str] = set()
        self._alive: set[str] = set()

    def see(self, name: str, alive: bool, now: float) -> None:
        """Told again and again, of every member."""
        away = self._away.see(name, not alive, now) >= self._after_s
        back = self._back.see(name, alive, now) >= self._after_s
        (self._alive.add if alive else self._alive.discard)(name)
        if away:
            self._gone.add(name)
        elif back:
            self._gone.discard(name)

    def absent(self, name: str, voters: Collection[str]) -> bool:
        """Whether another stands in for it where those vote. One that is back before its place was taken keeps it."""
        return name in self._gone and not (name in self._alive and name in voters)

    def forget_but(self, names: Collection[str]) -> None:
        """Who is no member any more."""
        for name in self._gone.union(self._alive).difference(names):
            self._away.see(name, False, 0.0)
            self._back.see(name, False, 0.0)
            self._gone.discard(name)
            self._alive.discard(name)
