"""Exact scans for a few queries against a sort of everything, over several pieces and any first row."""

from __future__ import annotations

import numpy as np
import pytest

from storage.index import few, scan
from storage.index.constraints import Matching
from storage.view import ShardView
from tests.contracts.engines import rows_of, view_of

ROWS = 40_003


@pytest.fixture(scope="module")
def view() -> ShardView:
    return view_of(rows_of(ROWS, dim=32))


@pytest.mark.parametrize("start", [0, 8, 13, ROWS - 3])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0005])
def test_every_row_that_may_be_among_the_best(view: ShardView, start: int, share: float) -> None:
    flags = np.random.default_rng(1).random(ROWS) < share
    matching = Matching(np.packbits(flags, bitorder="little"), int(flags.sum()))
    query = rows_of(1, seed=9, dim=32).astype(np.float32)
    margin = float(scan.slack(query, 1.001)[0])
    found = few.survivors(view, start, query[0], 10, margin, matching, 2)
    assert found is not None
    rows = np.flatnonzero(flags[start:]) + start
    scores = view.vectors[rows].astype(np.float64) @ query[0].astype(np.float64)
    best = rows[np.argsort(-scores)[:10]]
    assert np.isin(best, found).all()
    assert flags[found].all()
    assert len(np.unique(found)) == len(found) <= min(len(rows), 15)


def test_too_many_ties_are_left_to_another_scan() -> None:
    view = view_of(np.repeat(rows_of(1, dim=32), 1000, axis=0))
    matching = Matching(np.full(125, 255, np.uint8), 1000)
    query = view.vectors[0].astype(np.float32)
    assert few.survivors(view, 0, query, 10, 1e-5, matching, 2) is None
