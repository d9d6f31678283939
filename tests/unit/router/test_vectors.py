"""Vectors from the wire: scaled to unit length and rounded as numpy rounds, whatever their number and shape."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from router.errors import RequestError
from router.vectors import _FP16_SCALE, _narrow, from_wire

TINY = 2.0**-14  # below it FP16 is subnormal


def narrowed(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float16]:
    scaled = (numbers / _FP16_SCALE).astype(np.float32)
    out = np.empty(scaled.shape, np.uint16)
    _narrow(scaled.view(np.uint32), np.empty(scaled.shape, np.uint32), out)
    return out.view(np.float16)


def test_every_fp16_up_to_one_stays_and_halfway_goes_to_even() -> None:
    bits = np.arange(0x3C01, dtype=np.uint16)  # 0 to 1.0
    every = np.concatenate([bits, bits | np.uint16(0x8000)]).view(np.float16)
    assert (narrowed(every.astype(np.float64)).view(np.uint16) == every.view(np.uint16)).all()
    exact = bits.view(np.float16).astype(np.float64)
    halfway = (exact[:-1] + exact[1:]) / 2
    even = bits[:-1] + (bits[:-1] & 1)
    assert (narrowed(halfway).view(np.uint16) == even).all()
    assert (narrowed(-halfway).view(np.uint16) == even | np.uint16(0x8000)).all()
    assert (narrowed(halfway[1:] * (1 - 2.0**-12)).view(np.uint16) == bits[1:-1]).all()


@pytest.mark.parametrize("dtype", ["f2", "f4"])
@pytest.mark.parametrize(("count", "dim"), [(1, 1), (1, 1024), (130, 1024), (3, 70_000), (50, 3)])
def test_it_is_what_numpy_makes_of_it(dtype: Literal["f2", "f4"], count: int, dim: int) -> None:
    rng = np.random.default_rng(dim + count)
    spread = 10.0 ** rng.uniform(-3, 2, (count, dim))
    sent = (rng.standard_normal((count, dim)) * spread).astype(dtype)
    wide = sent.astype(np.float64)
    wanted = (wide / np.sqrt((wide * wide).sum(axis=1))[:, None]).astype(np.float32).astype(np.float16)
    found = from_wire([row.tobytes() for row in sent], dim, "cosine", dtype=dtype)
    assert found.dtype == np.float16
    apart = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    # A tie may fall the other way by the order in which squares are summed; and FP16's own step is never passed.
    assert (apart <= np.maximum(2.0**-24, np.abs(wanted.astype(np.float64)) * 2.0**-10)).all()
    assert (found.view(np.uint16) != wanted.view(np.uint16)).mean() < 0.001


@pytest.mark.parametrize("dtype", ["f2", "f4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(dtype: Literal["f2", "f4"], bad: float) -> None:
    rows = np.ones((200, 512), dtype)
    rows[150, 511] = bad
    with pytest.raises(RequestError, match="finite") as caught:
        from_wire([row.tobytes() for row in rows], 512, "cosine", dtype=dtype, path="items[{}].vector")
    assert (caught.value.code, caught.value.field) == ("bad_vector", "items[150].vector")
    rows[150] = 0
    with pytest.raises(RequestError) as caught:
        from_wire([row.tobytes() for row in rows], 512, "cosine", dtype=dtype, path="items[{}].vector")
    assert (caught.value.code, caught.value.field) == ("zero_vector", "items[150].vector")
