"""How often in a row a process has ended while it opened a replica: LMDB may take the process with it when a page is damaged.

shard-017.opening  one byte for each attempt, there only while one is under way or after one that did not come back
"""

from __future__ import annotations

from pathlib import Path

# So many ends in a row are no accident any more.
ENDED_MAX = 3


class Attempts:
    """Of one replica's directory. Not durable: what matters is the end of a process, not of the power. Raise OSError."""

    def __init__(self, directory: Path) -> None:
        self._path = directory.with_name(directory.name + ".opening")

    @property
    def ended(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def begin(self) -> None:
        with self._path.open("ab") as file:
            file.write(b".")

    def end(self) -> None:
        """It opened, or said why not."""
        self._path.unlink(missing_ok=True)
