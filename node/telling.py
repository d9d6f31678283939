"""What this node tells its peers of changes, and in what order: the sender's half of docs/caching.md, *Changes*. Pure.

Rules:
* every change of a shard that this node leads is in the log from when it was applied; the log forgets the oldest over `LOG_MAX`;
* a peer is told from where it last confirmed; one that confirmed less than the log still has is told `lost`;
* a shard is named only while its lease holds, as the message is composed, and after everything was put into it that
  `covers` speaks of.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

LOG_MAX = 16_384
RING_MAX = 1_024
# Of a shard that one begins to lead, so much of what was followed is told.
TAKEN_OVER_S = 10.0


class Change(NamedTuple):
    """version: None for an item that was deleted."""

    id: int
    version: tuple[int, int] | None


class Led(NamedTuple):
    """covers_ms: how far back, from when the message was composed, all changes of that shard were told."""

    shard: int
    epoch: int
    covers_ms: int


class Told(NamedTuple):
    """One message; its fields in the order of the wire."""

    boot: int
    sequence: int
    settled: int
    led: list[Led]
    users: list[tuple[int, int, int]]
    items: list[int]
    lost: bool

    @staticmethod
    def read(body: Any) -> Told:
        """Raises TypeError or ValueError for what is no such message."""
        boot, sequence, settled, led, users, items, lost = body
        for number in (boot, sequence, settled, *items):
            if type(number) is not int:
                raise TypeError("boot, sequence, settled and items are integers")
        shards = [Led(*one) for one in led]
        written = [(user, epoch, place) for user, epoch, place in users]
        if any(type(number) is not int for one in (*shards, *written) for number in one):
            raise TypeError("shards and users are integers")
        return Told(boot, sequence, settled, shards, written, list(items), bool(lost))


@dataclass(slots=True)
class _Ring:
    """A shard's last changes, led or followed. since: what came before is not in it."""

    since: float
    changes: deque[tuple[float, Change]] = field(default_factory=deque)
    # What the epoch that is led was begun with.
    epoch: int = 0
    covered_since: float = math.inf

    def add(self, change: Change, now: float) -> None:
        self.changes.append((now, change))
        if len(self.changes) > RING_MAX:
            self.since = max(self.since, self.changes.popleft()[0])


@dataclass(slots=True)
class _Peer:
    """confirmed: it has been told everything before that place of the log."""

    confirmed: int
    sequence: int
    settled: int = 0
    # The end of what is under way; -1: nothing is.
    sent: int = -1


class Telling:
    """Times in seconds of one monotonic clock. tick: counts the rounds."""

    def __init__(self, boot: int, now: float) -> None:
        self._boot, self._began = boot, now
        self._log: deque[tuple[float, Change]] = deque()
        # The place of the log's first change, counted since the start; and when the last one before it came.
        self._first = 0
        self._forgot_at = -math.inf
        self._rings: dict[int, _Ring] = {}
        self._peers: dict[str, _Peer] = {}
        self.tick = 0
        self.counters = {"told": 0, "unanswered": 0, "lost": 0}

    def applied(self, shard: int, changes: Iterable[Change], leads: bool, now: float) -> None:
        ring = self._ring(shard)
        for change in changes:
            ring.add(change, now)
            if leads:
                self._append(change, now)

    def replaced(self, shard: int, now: float) -> None:
        """The replica was made anew from a snapshot: which records changed is not known."""
        self._rings[shard] = _Ring(now)

    def _ring(self, shard: int) -> _Ring:
        ring = self._rings.get(shard)
        if ring is None:
            ring = self._rings[shard] = _Ring(self._began)
        return ring

    def _append(self, change: Change, now: float) -> None:
        self._log.append((now, change))
        if len(self._log) > LOG_MAX:
            self._forgot_at = self._log.popleft()[0]
            self._first += 1

    def begin_round(self, leading: Mapping[int, int], now: float) -> None:
        """leading: shard → epoch of those that are led and whose lease holds."""
        self.tick += 1
        for shard, epoch in leading.items():
            ring = self._ring(shard)
            if ring.epoch == epoch:
                continue
            ring.epoch = epoch
            ring.covered_since = max(ring.since, now - TAKEN_OVER_S)
            for at, change in list(ring.changes):
                if at >= ring.covered_since:
                    self._append(change, now)

    def led(self, leading: Mapping[int, int], now: float) -> list[Led]:
        """As of now, for whoever has been told everything in the log."""
        out = []
        for shard, epoch in leading.items():
            ring = self._rings.get(shard)
            if ring is not None and ring.epoch == epoch:
                since = max(ring.covered_since, self._forgot_at)
                out.append(Led(shard, epoch, max(0, math.floor(1000 * (now - since)))))
        return out

    def compose(self, peer: str, leading: Mapping[int, int], now: float) -> Told | None:
        """What that peer is to be told now; None while a message to it is under way."""
        known = self._peers.get(peer)
        if known is None:
            # There is one message in a round at most: a sequence that begins here was never told before.
            known = self._peers[peer] = _Peer(self._first, self.tick + 1)
        if known.sent >= 0:
            return None
        end = self._first + len(self._log)
        lost = known.confirmed < self._first
        news = end - max(known.confirmed, self._first)
        changes = [change for _, change in islice(reversed(self._log), news)][::-1]
        known.sent = end
        self.counters["told"] += 1
        self.counters["lost"] += lost
        return Told(
            self._boot,
            known.sequence,
            known.settled,
            self.led(leading, now),
            [(one.id, *one.version) for one in changes if one.version is not None],
            [one.id for one in changes if one.version is None],
            lost,
        )

    def answered(self, peer: str, ok: bool) -> None:
        """The message under way to that peer was answered, or nobody knows."""
        known = self._peers[peer]
        if ok:
            known.confirmed = known.sent
            known.sequence += 1
            known.settled = self.tick + 1
        else:
            self.counters["unanswered"] += 1
        known.sent = -1
