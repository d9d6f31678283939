"""How far the moves of a cluster are, from what its nodes tell of their replicas. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

Row = Mapping[str, Any]

# As a person reads them, in their order.
QUEUED, COPYING, CATCHING_UP, VOTING, REMOVING = "queued", "copying", "catching up", "voting", "removing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One replica on its way. source None: one more than before; target None: one that goes. detail: what the primary says.

    percent, eta_s: None where nobody can tell.
    """

    shard: int
    source: str | None
    target: str | None
    stage: str
    detail: str
    percent: float | None = None
    bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: int = 0
    eta_s: float | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """unknown: shards of which no primary told anything: their moves may be under way or not."""

    moves: tuple[Progress, ...]
    unknown: tuple[int, ...]


def overview(rows: Iterable[Row], version: int, wished: Sequence[Sequence[str]]) -> Overview:
    """rows: every replica as its node tells it (`gmco shards`). version, wished: of the layout that we go by."""
    by_shard: dict[int, list[Row]] = {}
    for row in rows:
        by_shard.setdefault(row["shard"], []).append(row)
    moves: list[Progress] = []
    unknown: list[int] = []
    for shard, names in enumerate(wished):
        there = by_shard.get(shard, [])
        leading = [row for row in there if row["role"] == "primary"]
        if not leading:
            unknown.append(shard)
            continue
        primary = max(leading, key=lambda row: int(row["epoch"]))
        # One that has not heard of our layout yet will follow it; a later one it knows better than we do.
        target = names if primary["layout"] < version else primary["target"]
        moves += _of_shard(shard, primary, target, {row["node"]: row for row in there})
    return Overview(tuple(moves), tuple(unknown))


def _of_shard(
    shard: int, primary: Row, target: Sequence[str], there: Mapping[str, Row]
) -> Iterable[Progress]:
    voters, learners = primary["voters"], primary["learners"]
    detail = primary["move"]
    coming = [name for name in target if name not in voters]
    going = [name for name in voters if name not in target]
    for source, name in zip_longest(going, coming):
        if name is None:
            yield Progress(shard=shard, source=source, target=None, stage=VOTING, detail=detail)
        else:
            yield _coming(shard, source, name, primary, there.get(name), detail)
    for name in there:
        if name not in voters and name not in target:
            stage = QUEUED if name in learners else REMOVING
            yield Progress(shard=shard, source=name, target=None, stage=stage, detail=detail)


def _coming(
    shard: int, source: str | None, name: str, primary: Row, row: Row | None, detail: str
) -> Progress:
    if row is None:
        return Progress(shard=shard, source=source, target=name, stage=QUEUED, detail=detail)
    state = str(row["state"])
    if "snapshot" in state:
        figures = row["snapshot"] or {"bytes": 0, "total_bytes": 0, "bytes_per_s": 0}
        done, total, rate = figures["bytes"], figures["total_bytes"], figures["bytes_per_s"]
        return Progress(
            shard=shard,
            source=source,
            target=name,
            stage=COPYING,
            detail=state,
            percent=round(100 * done / total, 1) if total else None,
            bytes=done,
            total_bytes=total,
            bytes_per_s=rate,
            eta_s=round((total - done) / rate, 1) if rate else None,
        )
    has, all_ = row["sequence"], primary["sequence"]
    return Progress(
        shard=shard,
        source=source,
        target=name,
        stage=CATCHING_UP,
        detail=detail,
        percent=round(min(100.0, 100 * has / all_), 1) if all_ else 100.0,
    )
