"""`data/staged`: changes of the layout that wait on this node for a plan and a commit. Blocking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from node import checked
from router.planning import Change
from storage.errors import DamagedFileError, FormatError
from storage.files import write_atomically

FORMAT = 1
CHANGES_MAX = 1_000


def load(path: Path) -> list[Change]:
    """Empty when there are none. Raises DamagedFileError, FormatError, OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        fields = checked.decode(data)
        if fields["format"] != FORMAT:
            raise FormatError(f"{path} has format {fields['format']}, this build knows {FORMAT}")
        return [
            Change(action=action, node=node, values=tuple((key, value) for key, value in values))
            for action, node, values in fields["changes"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(path, error, "`gmco cluster revert` removes it") from error


def save(path: Path, changes: Sequence[Change]) -> None:
    """Durable when it returns. Raises OSError."""
    listed = [[change.action, change.node, change.values] for change in changes]
    write_atomically(path, checked.encode({"format": FORMAT, "changes": listed}))
