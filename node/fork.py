"""Where two logs of one shard part, by the starts of their epochs. Pure. `fork-exact` of docs/replication.md.

There is one primary for each epoch, and it writes each sequence of it once. So two logs agree on an epoch as far as both hold it,
and the logs part behind the last epoch that both have, at the lesser of the two ends of that epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from storage.records import Version


class EpochStarts:
    """The first sequence of each epoch in a log, ascending."""

    def __init__(self, starts: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[tuple[int, int]] = sorted(starts)

    def begin(self, epoch: int, first: int) -> None:
        """A record of `epoch` at `first` has been appended; nothing happens when the epoch has begun already."""
        newest = self._starts[-1][0] if self._starts else 0
        assert epoch >= newest, "the epochs of a log only grow"
        if epoch > newest:
            self._starts.append((epoch, first))

    def cut(self, last: int) -> None:
        """The log ends at `last` now."""
        while self._starts and self._starts[-1][1] > last:
            self._starts.pop()

    def up_to(self, epoch: int, last: int) -> Version:
        """The last record of the greatest epoch not above `epoch`, in a log that ends at `last`; (0, 0) when there is none."""
        place = bisect_right(self._starts, (epoch, last + 1)) - 1
        if place < 0:
            return Version(0, 0)
        end = self._starts[place + 1][1] - 1 if place + 1 < len(self._starts) else last
        return Version(self._starts[place][0], end)

    def matches(self, named: Version, last: int) -> bool:
        """Whether a log that ends at `last` holds that very record; (0, 0), an empty log, is held by all."""
        if named == (0, 0):
            return True
        shared = self.up_to(named.epoch, last)
        return shared.epoch == named.epoch and named.sequence <= shared.sequence

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._starts)


def fork_of(named: Version, starts: EpochStarts, last: int) -> Version | None:
    """As primary: None when our log holds the follower's last record; else the point to which its log may agree with ours."""
    if starts.matches(named, last):
        return None
    shared = starts.up_to(named.epoch, last)
    return Version(shared.epoch, min(shared.sequence, named.sequence))


def cut_at(told: Version, starts: EpochStarts, last: int) -> Version:
    """As follower: where our log is to end, after a primary told us that point."""
    ours = starts.up_to(told.epoch, last)
    if ours.epoch < told.epoch:
        return ours  # we do not hold that epoch at all: ask again from the end of the one before
    return Version(ours.epoch, min(ours.sequence, told.sequence))


def shared_end(ours: EpochStarts, our_last: int, theirs: EpochStarts, their_last: int) -> int:
    """The last sequence of a log of ours, which ends at `our_last`, that is provably in theirs: what follows it is not."""
    for epoch, _ in reversed(list(ours)):
        mine, other = ours.up_to(epoch, our_last), theirs.up_to(epoch, their_last)
        if mine.epoch == other.epoch == epoch:
            return min(mine.sequence, other.sequence)
    return 0
