"""What a primary knows of its voters, and what a follower does next. Pure.

Laws:
* `durable-before-stream`: a voter's position moves only by what it names in a pull, and it names only what it has fsynced.
* `log-matching`: a pull names the last record of the follower's log by epoch, sequence and checksum. It counts, and is
  answered, only after the primary has found that very record in its own log; else it is told where the logs part.
* positions never go back within one epoch: an old pull that arrives late changes nothing.
* `quorum` is a majority of all voters, the dead ones counted; `all` is every voter. A witness is none: it has no disk to count.
* under a placement that is not `sealed` yet nothing is on a quorum: those who do not know of it could elect another primary.
* a follower appends a reply only if it begins right after its own last sequence (`no-gaps`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from node.fork import EpochStarts, fork_of
from node.placement import Placement
from storage.records import EMPTY, Fingerprint, Version

Ack = Literal["primary", "quorum", "all"]
MARKS_MAX = 1_024
# With MARKS_MAX marks this remembers 51 s; older lag shows as that.
MARK_EVERY_S = 0.05
# So long a level follower's pull waits at the primary for news: an idle stream is heard that often. A third of a lease, because
# each answer carries a stamp and each pull an echo, by which the primary's lease lives.
WAIT_MS = 500
# So many leases a primary that wants to change its placement waits for the only other disk.
PATIENCE_LEASES = 4
# For the way there and back and a busy host. Together they stay below the 2 s from which a replica is avoided.
SLACK_MS = 500


@dataclass(frozen=True, slots=True)
class Matched:
    """Answer with what follows the named record."""


@dataclass(frozen=True, slots=True)
class LookUp:
    """By its epoch's start that record is ours: find it, then call `found`."""


@dataclass(frozen=True, slots=True)
class Fork:
    """The follower's log leaves ours at or before `at`."""

    at: Version


@dataclass(frozen=True, slots=True)
class Diverged:
    """Two records of one epoch and sequence: bytes were changed at rest, or a law was broken. Stop following."""

    reason: str


@dataclass(slots=True)
class Progress:
    """A primary's picture of one shard in one epoch: how far each voter's disk is."""

    name: str
    placement: Placement
    epoch: int
    # The sequence of the record that opened the epoch.
    began: int
    positions: dict[str, int] = field(default_factory=dict)
    # By witness, name and id: the newest epoch that its memory has on the disk.
    remembered: dict[tuple[str, int], int] = field(default_factory=dict)
    # What each follower named last, once it was found in our log: an idle follower's next pull needs no look-up.
    _matched: dict[str, Fingerprint] = field(default_factory=dict)
    # (sequence, monotonic seconds at which the primary passed it), for lag in time; bounded, so very old lag is a floor.
    _marks: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=MARKS_MAX))

    @property
    def voters(self) -> tuple[str, ...]:
        """Those that hold data."""
        return self.placement.names

    def durable(self, sequence: int, now: float) -> None:
        """The primary's own disk has everything to `sequence`."""
        self.positions[self.name] = max(sequence, self.positions.get(self.name, 0))
        if not self._marks or now - self._marks[-1][1] >= MARK_EVERY_S:
            self._marks.append((sequence, now))

    def pulled(self, follower: str, named: Fingerprint, starts: EpochStarts) -> Matched | LookUp | Fork:
        """A follower said that its disk has everything to `named`. starts: of the epochs in the primary's log."""
        if named == EMPTY or self._matched.get(follower) == named:
            return Matched()
        last = self.positions.get(self.name, 0)
        at = fork_of(Version(named.epoch, named.sequence), starts, last)
        return LookUp() if at is None else Fork(at)

    def found(self, follower: str, named: Fingerprint, ours: Fingerprint) -> Matched | Diverged:
        """What our own log has where `named` says it is."""
        if named == ours:
            self._matched[follower] = named
            return Matched()
        self._matched.pop(follower, None)
        self.positions.pop(follower, None)
        return Diverged(
            f"at sequence {named.sequence} its log has record {named.check:016x} of epoch {named.epoch}, ours has "
            f"{ours.check:016x} of epoch {ours.epoch}"
        )

    def count(self, follower: str, sequence: int) -> None:
        """A voter that follows this epoch has everything to `sequence`, and it matched."""
        if follower in self.voters:  # others do not count
            self.positions[follower] = max(sequence, self.positions.get(follower, 0))

    def remember(self, witness: str, id_: int, epoch: int) -> None:
        """A witness, of this placement or of the former one, has that epoch on its disk."""
        if (witness, id_) in (self.placement.witness, self.placement.former_witness):
            self.remembered[witness, id_] = max(epoch, self.remembered.get((witness, id_), 0))

    @property
    def on_majority(self) -> bool:
        """The epoch's record is on a majority of the voters' disks, `sealed` or not: from here on witnesses are told of it, and
        whoever lacks it gets their vote no more."""
        return self._held(len(self.voters) // 2) >= self.began

    @property
    def _knows(self) -> list[tuple[str, int]]:
        """Who will vote for nobody who lacks the epoch's record."""
        knows = [one for one in self.placement.voters if self.positions.get(one[0], 0) >= self.began]
        return knows + [witness for witness, epoch in self.remembered.items() if epoch >= self.epoch]

    @property
    def _sealed(self) -> bool:
        return self.placement.sealed(self._knows)

    @property
    def established(self) -> bool:
        """No later primary can lack the epoch's record: it is on a quorum, or a witness remembers it for a disk that is gone."""
        return self._sealed and (self.on_majority or self.placement.remembered(self._knows))

    def stuck(self, reign_s: float, lease_s: float) -> bool:
        """Whether the epoch can only be established by the witness's memory: of two disks the other has been away since it began,
        and may be gone. From then on only ours can lead until the other has caught up, so not for a short absence."""
        return len(self.voters) == 2 and not self.on_majority and reign_s > PATIENCE_LEASES * lease_s

    def _held(self, place: int) -> int:
        return sorted((self.positions.get(voter, 0) for voter in self.voters), reverse=True)[place]

    def reached(self, ack: Ack) -> int:
        """The greatest sequence that satisfies `ack`."""
        if ack == "primary":
            return self.positions.get(self.name, 0)
        if not self._sealed:
            return 0
        return self._held(-1 if ack == "all" else len(self.voters) // 2)

    def holders(self, sequence: int) -> int:
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


Step = Take | PullAgain | Refuse


def on_stream(*, last: Version, primary_last: int, first: int | None, count: int) -> Step:
    """What a follower whose log ends at `last` does with records of an epoch that it takes.

    `first` is the sequence of the reply's first record (None: no records), `primary_last` where the primary's log ends.
    """
    if primary_last < last.sequence:
        return Refuse(f"the primary's log ends at {primary_last}, before ours at {last.sequence}")
    if first is None:
        return PullAgain()
    if first != last.sequence + 1:
        return Refuse(f"the reply begins at {first}, our log ends at {last.sequence}")
    if primary_last < first + count - 1:
        return Refuse("the reply holds more than the primary says it has")
    return Take()
