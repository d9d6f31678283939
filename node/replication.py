"""What a primary knows of its voters, and what a follower does next. Pure.

Laws:
* `durable-before-stream`: a voter's position moves only by what it names in a pull, and it names only what it has fsynced.
* `log-matching`: a pull names the last record of the follower's log by epoch, sequence and checksum. It counts, and is
  answered, only after the primary has found that very record in its own log; else the two hold different histories.
* positions never go back within one epoch: an old pull that arrives late changes nothing.
* `quorum` is a majority of all voters, the dead ones counted; `all` is every voter.
* a follower appends a reply only if it begins right after its own last sequence (`no-gaps`) and its epoch is not lower.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from storage.records import EMPTY, Fingerprint, Version

Ack = Literal["primary", "quorum", "all"]
MARKS_MAX = 1_024
# With MARKS_MAX marks this remembers 51 s; older lag shows as that.
MARK_EVERY_S = 0.05
# So long a level follower's pull waits at the primary for news: an idle stream is heard that often.
WAIT_MS = 1_000
# For the way there and back and a busy host. Together they stay below the 2 s from which a replica is avoided.
SLACK_MS = 500


@dataclass(frozen=True, slots=True)
class Matched:
    """The position counts; answer with what follows it."""


@dataclass(frozen=True, slots=True)
class LookUp:
    """Find our own record at that sequence, then call `found`. When the log no longer holds it, nothing is proved."""


@dataclass(frozen=True, slots=True)
class Diverged:
    """Stop following: one of the two logs holds what the other's history does not."""

    reason: str


@dataclass(slots=True)
class Progress:
    """The primary's picture of one shard: how far each voter's disk is."""

    name: str
    voters: tuple[str, ...]
    positions: dict[str, int] = field(default_factory=dict)
    # What each follower named last, once it was found in our log: an idle follower's next pull needs no look-up.
    _matched: dict[str, Fingerprint] = field(default_factory=dict)
    # (sequence, monotonic seconds at which the primary passed it), for lag in time; bounded, so very old lag is a floor.
    _marks: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=MARKS_MAX))

    def durable(self, sequence: int, now: float) -> None:
        """The primary's own disk has everything to `sequence`."""
        self.positions[self.name] = max(sequence, self.positions.get(self.name, 0))
        if not self._marks or now - self._marks[-1][1] >= MARK_EVERY_S:
            self._marks.append((sequence, now))

    def pulled(self, follower: str, named: Fingerprint) -> Matched | LookUp | Diverged:
        """A follower said that its disk has everything to `named`."""
        last = self.positions.get(self.name, 0)
        if named.sequence > last:
            return self._part(
                follower,
                f"its log ends at {named.sequence}, ours at {last}: we have lost records that it holds",
            )
        if named == EMPTY or self._matched.get(follower) == named:
            return self._match(follower, named)
        return LookUp()

    def found(self, follower: str, named: Fingerprint, ours: Fingerprint) -> Matched | Diverged:
        """What our own log has where `named` says it is."""
        if named == ours:
            return self._match(follower, named)
        return self._part(
            follower,
            f"at sequence {named.sequence} its log has record {named.check:016x} of epoch {named.epoch}, ours has "
            f"{ours.check:016x} of epoch {ours.epoch}",
        )

    def _match(self, follower: str, named: Fingerprint) -> Matched:
        self._matched[follower] = named
        if follower in self.voters:  # others do not count
            self.positions[follower] = max(named.sequence, self.positions.get(follower, 0))
        return Matched()

    def _part(self, follower: str, reason: str) -> Diverged:
        """What it named before was on a disk that it no longer has."""
        self._matched.pop(follower, None)
        self.positions.pop(follower, None)
        return Diverged(reason)

    def reached(self, ack: Ack) -> int:
        """The greatest sequence that satisfies `ack`."""
        if ack == "primary":
            return self.positions.get(self.name, 0)
        held = sorted((self.positions.get(voter, 0) for voter in self.voters), reverse=True)
        return held[-1] if ack == "all" else held[len(held) // 2]

    def count(self, sequence: int) -> int:
        """How many voters' disks hold `sequence`."""
        return sum(self.positions.get(voter, 0) >= sequence for voter in self.voters)

    def lag_ms(self, sequence: int, now: float) -> int:
        """How long ago the primary passed `sequence` with something newer; 0 when nothing newer exists."""
        for passed, at in self._marks:
            if passed > sequence:
                return int((now - at) * 1000)
        return 0


def follower_lag_ms(*, following: bool, behind: int, old_ms: int, silent_ms: int) -> int:
    """How far behind a follower is to be taken, when the primary's last answer is `silent_ms` old.

    Level by that answer, and its stream alive: 0, because a long poll that waits for news is not lag. Else what it was
    behind by then (`old_ms`) and the time since: nobody knows what it has missed.
    """
    if following and behind <= 0 and silent_ms <= WAIT_MS + SLACK_MS:
        return 0
    return old_ms + silent_ms


@dataclass(frozen=True, slots=True)
class Take:
    """Append the reply's records, fsync, apply; only then pull again."""


@dataclass(frozen=True, slots=True)
class PullAgain:
    """Nothing new."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Drop the reply and wait before the next pull."""

    reason: str


Step = Take | PullAgain | Refuse | Diverged


def on_pull_reply(
    *, epoch: int, last: Version, reply_epoch: int, primary_last: int, first: int | None, count: int
) -> Step:
    """What a follower in `epoch`, whose log ends at `last`, does with a reply.

    `first` is the sequence of the reply's first record (None: no records), `primary_last` where the primary's log ends.
    """
    if reply_epoch < epoch:
        return Refuse(f"the reply is of epoch {reply_epoch}, ours is {epoch}")
    if primary_last < last.sequence:
        return Diverged(
            f"our log ends at {last.sequence}, the primary's at {primary_last}: the primary has lost records that we hold"
        )
    if first is None:
        return PullAgain()
    if first != last.sequence + 1:
        return Refuse(f"the reply begins at {first}, our log ends at {last.sequence}")
    if primary_last < first + count - 1:
        return Refuse("the reply holds more than the primary says it has")
    return Take()
