"""Whether an opened packet has been here before. Pure.

Laws, for one sender:
* only the newest boot that was seen is heard, and of that boot only the newest session. A session is newer than another
  when it lies less than half the circle of 2^64 ahead: a process starts at a random one and goes on by one, so its own are
  in order, and an old one can never push out the one in use;
* of a session each counter is taken once, and none that lies 1,024 or more behind the greatest.

The sender must be known to have sealed the packet before this is asked: a stranger must not move a window.
"""

from __future__ import annotations

from gossip.errors import DroppedError

WINDOW = 1_024
_ALL = (1 << WINDOW) - 1
_HALF = 1 << 63
_SESSIONS = 1 << 64


class _Window:
    __slots__ = ("boot", "greatest", "seen", "session")

    def __init__(self, boot: int, session: int, counter: int) -> None:
        self.boot, self.session, self.greatest = boot, session, counter
        # Bit n: `greatest` - n was here.
        self.seen = 1


class Replays:
    """One window per sender, for at most `senders_max` of them: past it the one that came first is forgotten."""

    def __init__(self, senders_max: int) -> None:
        self._senders_max = senders_max
        self._windows: dict[int, _Window] = {}

    def check(self, sender: int, boot: int, session: int, counter: int) -> None:
        """Raises DroppedError("replayed" or "old_boot"), and remembers the packet otherwise."""
        window = self._windows.get(sender)
        if window is None:
            if len(self._windows) >= self._senders_max:
                del self._windows[next(iter(self._windows))]
            self._windows[sender] = _Window(boot, session, counter)
            return
        if boot != window.boot or session != window.session:
            if boot < window.boot:
                raise DroppedError("old_boot")
            if boot == window.boot and (session - window.session) % _SESSIONS >= _HALF:
                raise DroppedError("replayed")
            self._windows[sender] = _Window(boot, session, counter)
            return
        ahead = counter - window.greatest
        if ahead > 0:
            window.seen = (window.seen << ahead | 1) & _ALL if ahead < WINDOW else 1
            window.greatest = counter
            return
        if ahead <= -WINDOW or window.seen >> -ahead & 1:
            raise DroppedError("replayed")
        window.seen |= 1 << -ahead

    def __len__(self) -> int:
        return len(self._windows)
