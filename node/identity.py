"""Whose data directory this is: one lock, one small file. A directory of another node or cluster is refused."""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from node import checked
from storage.disk import write_atomically
from storage.errors import ForeignDataError, FormatError, StorageError

FORMAT = 1


class LockedError(StorageError):
    """Another process has this data directory open."""

    code = "locked"


@dataclass(frozen=True, slots=True)
class Identity:
    """node_id: random, made once. boots: how often this directory has been opened."""

    node_id: str
    boots: int

    @property
    def member_id(self) -> int:
        """By which gossip knows this node: the first half of its id."""
        return int(self.node_id[:16], 16)


class DataDirectory:
    """Holds the lock of a data directory for as long as it is open."""

    def __init__(self, path: Path, identity: Identity, lock: int) -> None:
        self.path, self.identity, self._lock = path, identity, lock

    @classmethod
    def open(cls, path: Path, *, name: str, cluster: str) -> DataDirectory:
        """Lock it, check whose it is, count the start. Raises LockedError, ForeignDataError, FormatError, OSError."""
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockedError(
                    f"{path} is in use by another gmco-node process; stop that one first"
                ) from error
            identity = _identify(path / "node.id", name=name, cluster=cluster)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, identity, lock)

    def close(self) -> None:
        os.close(self._lock)


def _identify(file: Path, *, name: str, cluster: str) -> Identity:
    node_id, boots = secrets.token_hex(16), 0
    if file.exists():
        try:
            known = checked.decode(file.read_bytes())
            version = known["format"]
            owner = (known["name"], known["cluster"])
            node_id, boots = str(known["node_id"]), int(known["boots"])
        except (ValueError, KeyError, TypeError) as error:
            raise ForeignDataError(
                f"{file} is not a node.id file, or damaged: {error}; restore it, or give node.data_dir an empty directory"
            ) from error
        if version != FORMAT:
            raise FormatError(f"{file} has format {version}, this build knows {FORMAT}")
        if owner != (name, cluster):
            raise ForeignDataError(
                f"{file.parent} belongs to node {owner[0]!r} of cluster {owner[1]!r}, not to {name!r} of {cluster!r}; "
                "give node.data_dir a directory of its own"
            )
    elif any(file.parent.glob("shard-*")):
        raise ForeignDataError(
            f"{file.parent} holds shards but no node.id; give node.data_dir an empty directory"
        )
    boots += 1
    fields = {"format": FORMAT, "node_id": node_id, "boots": boots, "name": name, "cluster": cluster}
    write_atomically(file, checked.encode(fields))
    return Identity(node_id, boots)
