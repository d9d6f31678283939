"""A graph at rest: one file of the library's own format and a manifest that says what it is.

The manifest names the graph's file, and its rename is the one moment at which a new graph replaces the old,
so a crash leaves the one or the other, whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

FORMAT = 1
MANIFEST = "manifest.json"
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """What a saved graph must agree on with the engine and the view that want to use it."""

    engine: str
    codes: str
    m: int
    ef_construction: int
    metric: str
    dim: int
    rowset: int


def save(directory: Path, parameters: Parameters, rows: int, write: Callable[[Path], None]) -> None:
    """`write` puts the graph into the path that it is given. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f"graph.{os.getpid()}.part"
    try:
        write(part)
        _sync(part)
        check = checksum(part)
        graph = directory / f"graph-{check}.bin"
        part.replace(graph)
    finally:
        part.unlink(missing_ok=True)
    manifest = {"format": FORMAT, **asdict(parameters), "rows": rows, "file": graph.name, "xxh3": check}
    draft = directory / f"{MANIFEST}.part"
    draft.write_text(json.dumps(manifest, indent=1))
    _sync(draft)
    _sync(directory)
    draft.replace(directory / MANIFEST)
    _sync(directory)
    for old in directory.glob("graph-*.bin"):
        if old.name != graph.name:
            old.unlink(missing_ok=True)


def find(directory: Path, parameters: Parameters, rows_max: int) -> tuple[Path, int] | None:
    """(graph's file, its rows) when it fits and its checksum is right; None otherwise."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or not _fits(manifest, parameters, rows_max):
            return None
        path = directory / Path(str(manifest["file"])).name
        return (path, manifest["rows"]) if checksum(path) == manifest["xxh3"] else None
    except (OSError, ValueError, KeyError):
        return None


def _fits(manifest: dict[str, Any], parameters: Parameters, rows_max: int) -> bool:
    wanted = {"format": FORMAT, **asdict(parameters)}
    rows = manifest.get("rows")
    same = all(manifest.get(name) == value for name, value in wanted.items())
    return same and isinstance(rows, int) and 0 < rows <= rows_max


def checksum(path: Path) -> str:
    digest = xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
