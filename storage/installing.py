"""One replica's directory in the place of another's, repeatable after a crash (docs/storage.md, "Installing"). Blocking.

    shard-017        the replica
    shard-017.fetch  what is not whole yet, or was taken back
    shard-017.new    whole and durable, about to take the place
    shard-017.old    the one whose place was taken

What is there, step by step: [·, fetch] → [·, new] → [old, new] → [·, old] → [·]; and back, when the new one does not open:
[·, old] → [fetch, old] → [·, fetch] → [·]. Only one of the steps back leaves `old` and `fetch` alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from storage.files import fsync_directory
from storage.side import carry


class Installing:
    """Of one replica's directory. All raise OSError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fetch, self.new, self.old = (
            directory.with_name(directory.name + suffix) for suffix in (".fetch", ".new", ".old")
        )

    def recover(self) -> None:
        """Before the replica is opened: finishes or takes back what a crash has interrupted, removes what is left over."""
        if not self.directory.exists():
            if self.new.exists():
                self._rename(self.new, self.directory)
            elif self.old.exists() and self.fetch.exists():
                self._rename(self.old, self.directory)
            else:
                # Somebody has removed the replica, to give it up: what it had replaced is older still.
                shutil.rmtree(self.old, ignore_errors=True)
        self.clear()

    def clear(self) -> None:
        """Nothing but the replica is left. Only when it is there."""
        assert self.directory.exists() or not (self.new.exists() or self.old.exists())
        for path in (self.fetch, self.new, self.old):
            if path.exists():
                shutil.rmtree(path)

    def swap(self, tails: Iterable[Path], quarantine: Path) -> None:
        """What is in `fetch`, a whole and durable replica, takes the place; side files and quarantine come along."""
        carry(tails, self.fetch)
        if quarantine.exists():
            os.link(quarantine, self.fetch / quarantine.name)
        fsync_directory(self.fetch)
        self._rename(self.fetch, self.new)
        try:
            self._rename(self.directory, self.old)
            self._rename(self.new, self.directory)
        except OSError:
            if not self.directory.exists():
                self._rename(self.old, self.directory)
            raise

    def swap_aside(self, aside: Path) -> None:
        """What is in `fetch` takes the place of a replica that keeps lying at `aside`."""
        self._rename(self.fetch, self.new)
        self._rename(self.directory, aside)
        self._rename(self.new, self.directory)

    def swap_back(self) -> None:
        """The new one did not open: the old one has its place again."""
        self._rename(self.directory, self.fetch)
        self._rename(self.old, self.directory)

    def _rename(self, source: Path, target: Path) -> None:
        source.rename(target)
        fsync_directory(target.parent)
