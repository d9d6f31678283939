"""`data/layout`: the layout that this node goes by, durable before anybody else hears of it. Blocking."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from router.layout import Layout, Member
from storage.errors import DamagedFileError, ForeignDataError, FormatError
from storage.files import write_atomically

# 3: witnesses.
FORMAT = 3
ADVICE = "restore it, or remove it so that this node takes the layout of the others"


def load(path: Path, *, cluster: str) -> Layout | None:
    """None when there is none yet. Raises DamagedFileError, ForeignDataError, FormatError, OSError."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        known: dict[str, Any] = json.loads(text)
        version, owner = known["format"], known["cluster"]
        if version != FORMAT:
            raise FormatError(f"{path} has format {version}, this build knows {FORMAT}")
        layout = Layout(
            version=known["version"],
            shard_count=known["shard_count"],
            replication=known["replication"],
            members=tuple(Member(**member) for member in known["members"]),
            targets=tuple(tuple(voters) for voters in known["targets"]),
            witnesses=tuple(known["witnesses"]),
            base=known["base"],
            cluster_id=known["cluster_id"],
        )
        hash_ = known["hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(path, f"it is not a layout: {error}", ADVICE) from error
    if owner != cluster:
        raise ForeignDataError(f"{path} is of cluster {owner!r}, not of {cluster!r}")
    if layout.hash != hash_:
        raise DamagedFileError(path, f"its content has the hash {layout.hash}, not {hash_}", ADVICE)
    return layout


def save(path: Path, layout: Layout, *, cluster: str) -> None:
    """Durable when it returns. Raises OSError."""
    fields = {
        "format": FORMAT,
        "cluster": cluster,
        "cluster_id": layout.cluster_id,
        "version": layout.version,
        "base": layout.base,
        "shard_count": layout.shard_count,
        "replication": layout.replication,
        "members": [asdict(member) for member in layout.members],
        "targets": [list(voters) for voters in layout.targets],
        "witnesses": list(layout.witnesses),
        "hash": layout.hash,
    }
    write_atomically(path, json.dumps(fields, indent=1).encode() + b"\n")
