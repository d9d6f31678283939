"""What peers have told of changes, and what that is worth: the receiver's half of docs/caching.md, *Changes*. Pure.

Rules:
* `answered-before-composed`: a message was composed after its sender had our answer to the one before, so it speaks of what
  was so after *that*; a first message, or one that is sent again, proves nothing of now;
* a gap, something lost, or a shard taken over with more silence than is covered: everything is to be dropped;
* values of an origin are trusted from the tick on that its sender had reached after an answer of ours which we gave when
  our memory of changes was complete.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from node.telling import Led, Told
from router.cachevalues import Origin

SILENT_S = 0.9
# Of where the ticks of a sender stood at what time, so much is kept: enough for all values that live.
SAMPLE_S = 5.0
SAMPLES_MAX = 128
SENDERS_MAX = 4_096


@dataclass(slots=True)
class _Sender:
    boot: int
    sequence: int
    # When we answered its last message.
    answered_at: float
    # (when we answered, its tick from which on values were begun after that), in order.
    settled: deque[tuple[float, int]] = field(default_factory=deque)


@dataclass(slots=True)
class _Shard:
    sender: str = ""
    boot: int = 0
    epoch: int = 0
    heard_at: float = -math.inf


class Hearing:
    """Times in seconds of one monotonic clock. name: this node's own; it hears itself as it hears others."""

    def __init__(self, name: str, shard_count: int) -> None:
        self._name = name
        self._shards = [_Shard() for _ in range(shard_count)]
        self._senders: dict[str, _Sender] = {}
        self._until = -math.inf
        self.counters = {"heard": 0, "gaps": 0, "lost": 0, "uncovered": 0, "older": 0}

    def current(self, now: float) -> bool:
        """Whether every shard has been heard of late."""
        return now < self._until

    def silent(self, now: float) -> list[int]:
        """Shards that have not been."""
        return [i for i, one in enumerate(self._shards) if one.heard_at + SILENT_S <= now]

    def hear(self, sender: str, told: Told, now: float) -> bool:
        """A message has come, and is answered now. Whether everything is to be dropped, before its changes are noted."""
        self.counters["heard"] += 1
        known = self._senders.get(sender)
        drop = told.lost
        self.counters["lost"] += told.lost
        composed_at = -math.inf
        if known is None or told.boot > known.boot:
            # One that was forgotten while it led may have told something meanwhile.
            drop = drop or any((one.sender, one.boot) == (sender, told.boot) for one in self._shards)
            known = _Sender(told.boot, told.sequence, now)
            self._remember(sender, known)
        elif told.boot < known.boot or told.sequence < known.sequence:
            # Overtaken by a later one: it says nothing new of anything.
            self.counters["older"] += 1
            return drop
        else:
            if told.sequence == known.sequence + 1:
                composed_at = known.answered_at
                self._sample(known, told.settled)
            elif told.sequence != known.sequence:
                self.counters["gaps"] += 1
                drop = True
                known.settled.clear()
            if told.sequence != known.sequence:
                # Which answer to one that was sent again its sender has got, we do not know: the first is the safe one.
                known.answered_at = now
            known.sequence = told.sequence
        return self._hear_of(sender, told.boot, told.led, composed_at, now) or drop

    def hear_self(self, boot: int, led: list[Led], tick: int, now: float) -> bool:
        """What this node knows without a message; as `hear`."""
        known = self._senders.get(self._name)
        if known is None:
            known = self._senders[self._name] = _Sender(boot, 0, now)
        known.answered_at = now
        self._sample(known, tick + 1)
        return self._hear_of(self._name, boot, led, now, now)

    def _remember(self, name: str, sender: _Sender) -> None:
        self._senders.pop(name, None)
        self._senders[name] = sender
        if len(self._senders) > SENDERS_MAX:
            del self._senders[next(iter(self._senders))]

    def _sample(self, sender: _Sender, settled: int) -> None:
        samples = sender.settled
        if not samples or sender.answered_at >= samples[-1][0] + SAMPLE_S:
            samples.append((sender.answered_at, settled))
            if len(samples) > SAMPLES_MAX:
                samples.popleft()

    def _hear_of(self, sender: str, boot: int, led: list[Led], composed_at: float, now: float) -> bool:
        drop = False
        for shard, epoch, covers_ms in led:
            if not 0 <= shard < len(self._shards):
                continue
            one = self._shards[shard]
            if epoch < one.epoch:
                continue  # its successor has been heard already
            if (sender, boot, epoch) != (one.sender, one.boot, one.epoch):
                if now - covers_ms / 1000 > one.heard_at:
                    self.counters["uncovered"] += 1
                    drop = True
                one.sender, one.boot, one.epoch = sender, boot, epoch
            one.heard_at = max(one.heard_at, composed_at)
        self._until = min(one.heard_at for one in self._shards) + SILENT_S
        return drop

    def dropped(self) -> None:
        """Our memory begins anew: what was settled before says nothing of it, and the next message does."""
        for sender in self._senders.values():
            sender.settled.clear()

    def trusts(self, origin: Origin, complete_since: float) -> bool:
        """Whether a value of that origin was begun when our memory was complete already."""
        known = self._senders.get(origin.node)
        if known is None or known.boot != origin.boot:
            return False
        samples = known.settled
        while samples and samples[0][0] < complete_since:
            samples.popleft()
        return bool(samples) and origin.tick >= samples[0][1]

    def figures(self, now: float) -> Mapping[str, int]:
        return {**self.counters, "silent_shards": len(self.silent(now))}
