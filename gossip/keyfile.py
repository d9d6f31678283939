"""`data/keyring`: the keys of a node on its disk, readable by its owner alone. Blocking.

JSON: {"format": 1, "keys": [hex or "derived", …]}, the primary first.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from gossip.errors import KeyringError

FORMAT = 1
_DERIVED = "derived"


def load(path: Path) -> list[bytes | None] | None:
    """What `save` wrote; None when there is no file. Raises KeyringError, OSError."""
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise KeyringError(
                    "keyring_exposed", f"others can read {path}; chmod 600 it, or make new keys"
                )
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        known = json.loads(text)
        version, keys = known["format"], known["keys"]
        if version == FORMAT:
            return [None if key == _DERIVED else bytes.fromhex(key) for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        # No word of what it holds: it may be half a key.
        raise KeyringError(
            "keyring_unreadable", f"{path} is not a keyring; restore it, or move it away"
        ) from error
    raise KeyringError("keyring_format", f"{path} has format {version}, this build knows {FORMAT}")


def save(path: Path, keys: Sequence[bytes | None]) -> None:
    """Durable when it returns, and whole at any moment: the old keys or the new ones. Raises OSError."""
    listed = [_DERIVED if key is None else key.hex() for key in keys]
    data = json.dumps({"format": FORMAT, "keys": listed}).encode() + b"\n"
    new = path.with_name(path.name + ".new")
    # Left by a crash, perhaps with another mode.
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
