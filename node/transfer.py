"""How far a fetch is, and how fast it may be."""

from __future__ import annotations

from dataclasses import dataclass

import trio


@dataclass(slots=True)
class Transfer:
    """How far a fetch is, for whoever looks."""

    total_bytes: int = 0
    done_bytes: int = 0
    began: float = 0.0
    ended: float = 0.0

    def begin(self, total_bytes: int) -> None:
        self.total_bytes, self.done_bytes = total_bytes, 0
        self.began, self.ended = trio.current_time(), 0.0

    @property
    def bytes_per_s(self) -> float:
        seconds = (self.ended or trio.current_time()) - self.began
        return self.done_bytes / seconds if self.began and seconds > 0 else 0.0

    def figures(self) -> dict[str, int] | None:
        """None before the first."""
        if not self.total_bytes:
            return None
        return {
            "bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "bytes_per_s": round(self.bytes_per_s),
        }

    def __str__(self) -> str:
        if not self.total_bytes:
            return "asking for a snapshot"
        if self.done_bytes >= self.total_bytes:
            return "installing snapshot"
        done = 100 * self.done_bytes // self.total_bytes
        size, rate = self.total_bytes / 1e6, self.bytes_per_s / 1e6
        return f"fetching snapshot {done}% of {size:.1f} MB, {rate:.1f} MB/s"


class Throttle:
    """Bytes per second for all who share it; 0: no bound."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._over = trio.Event()

    @property
    def bounded(self) -> bool:
        return self._bytes_per_s > 0

    async def take(self, size: int) -> None:
        """Returns when `size` more bytes may go."""
        if not self._bytes_per_s:
            return
        at = max(self._free_at, trio.current_time())
        self._free_at = at + size / self._bytes_per_s
        with trio.move_on_at(at):
            await self._over.wait()

    def end(self) -> None:
        """Another takes its place: nobody waits for this one any more."""
        self._over.set()
