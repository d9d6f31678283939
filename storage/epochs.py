"""Where each epoch of a log begins, and which placements its EPOCH marks tell (docs/ownership.md). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from storage.records import Mark, Operation, Record, Version

# Of epochs whose records the log has dropped, so many starts are kept: by them a log that parted long ago is still known to have
# done so, and what is to be kept of it when a snapshot takes its place.
STARTS_KEPT = 1_000


class Epochs:
    """Follows a log; can tell what it was when its tail is cut, and forgets what no cut can reach any more."""

    def __init__(self, starts: Mapping[int, int], placements: Mapping[int, bytes]) -> None:
        # epoch → the first sequence logged in it, ascending
        self.starts = dict(sorted(starts.items()))
        # sequence of an EPOCH mark → its metadata, ascending
        self.placements = dict(sorted(placements.items()))

    @property
    def placement(self) -> bytes:
        """Of the log's last EPOCH mark, b"" when it has none."""
        return next(reversed(self.placements.values()), b"")

    def advance(self, after: int, epochs: Sequence[int], sequences: Sequence[int]) -> None:
        """Records have followed one of epoch `after`."""
        for epoch, sequence in zip(epochs, sequences, strict=True):
            if epoch > after:
                self.starts.setdefault(epoch, sequence)

    def mark(self, record: Record) -> None:
        """Takes an EPOCH mark; other records say nothing of placements."""
        if record.operation is Operation.MARK and record.id == Mark.EPOCH:
            self.placements[record.sequence] = record.metadata

    def place(self, sequence: int) -> Version:
        """(epoch, sequence) of that place in the log; of none before the first known epoch."""
        begun = [epoch for epoch, first in self.starts.items() if first <= sequence]
        return Version(begun[-1], sequence) if begun else Version(0, 0)

    def up_to(self, last: int) -> Epochs:
        """Of the same log when it ends at sequence `last`."""
        return Epochs(
            {epoch: first for epoch, first in self.starts.items() if first <= last},
            {at: placement for at, placement in self.placements.items() if at <= last},
        )

    def prune(self, first: int) -> None:
        """The log begins at sequence `first`: of the epochs and marks that ended before it only the newest are kept:
        STARTS_KEPT epochs and one mark."""
        started = [epoch for epoch, start in self.starts.items() if start <= first]
        for epoch in started[: -STARTS_KEPT - 1]:
            del self.starts[epoch]
        for at in [at for at in self.placements if at < first][:-1]:
            del self.placements[at]
