"""When a damaged replica may be rebuilt: the others must be able to do without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from node.placement import Placement
from node.rebuilding import Rebuilding
from tests.unit.node.peers import on_trio

TWO = Placement((("a", 1), ("b", 2)))
THREE = Placement((("a", 1), ("b", 2), ("c", 3)))
WITNESSED = TWO.witnessed(("w", 9))


@on_trio
@pytest.mark.parametrize(
    ("placement", "primary", "alive", "why"),
    [
        (THREE, "b", "bc", ""),
        (THREE, "b", "b", "only 1 of its 3 voters"),
        (TWO, "b", "b", "only 1 of its 2 voters"),
        (WITNESSED, "b", "bw", ""),
        (WITNESSED, "b", "b", "only 1 of its 3 voters"),
        (WITNESSED, "b", "w", "nobody else leads"),
        # One that does not vote takes nobody's vote away, whoever is there.
        (Placement((("b", 2), ("c", 3)), (("a", 1),)), "b", "b", ""),
        # Who leads by hearsay holds nothing; of the voters only the witness is there.
        (WITNESSED, "x", "wx", "only 1 of its 3 voters"),
        (Placement((("a", 1),), witness=("w", 9)), "x", "wx", "only 1 of its 2 voters"),
    ],
)
async def test_it_waits_for_a_majority_of_the_others_the_witness_included(
    placement: Placement, primary: str, alive: str, why: str
) -> None:
    rebuilt: list[int] = []

    async def rebuild(shard: int, _failover: Any) -> None:
        rebuilt.append(shard)

    actor = SimpleNamespace(shard=3, leads=False, primary=primary, placement=placement, harmed="bad block")
    held = SimpleNamespace(actors={3: actor}, rebuild=rebuild)
    one = Rebuilding(held, None, "a", lambda name: name in alive)  # type: ignore[arg-type]
    told = await one._rebuild(actor)  # type: ignore[arg-type]
    assert told.startswith(why)
    assert bool(told) == bool(why)
    assert rebuilt == ([] if why else [3])
