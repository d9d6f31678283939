"""Vectors from the wire to what storage keeps: float16, unit length for cosine. Pure.

A vector arrives as little endian FP16 or FP32 bytes or as a list of numbers. It is checked, scaled
(its length is summed in float64, so that no FP32 vector overflows or vanishes) and only then rounded to FP16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from router.errors import RequestError
from storage.config import Metric
from storage.index.scan import widen

Dtype = Literal["f2", "f4"]
Vectors = npt.NDArray[np.float16]

# An FP16's exponent: all ones says that it is not finite.
_EXPONENT = np.uint16(0x7C00)
# Between the exponents' biases of FP32 and FP16.
_FP16_SCALE = 2.0**112
# So many at a time stay in the cache from pass to pass.
_BLOCK_NUMBERS = 65_536
# For fewer vectors numpy's own conversions are cheaper than so many passes.
_MANY = 8

_WIDTHS: dict[Dtype | None, tuple[int, ...]] = {None: (2, 4), "f2": (2,), "f4": (4,)}


def from_wire(
    raw: Sequence[Any], dim: int, metric: Metric, *, dtype: Dtype | None = None, path: str = "vector"
) -> Vectors:
    """float16 [len(raw), dim]. `path` names the i-th vector in errors, with `{}` where i belongs.

    Raises RequestError: bad_type, wrong_dimension, bad_vector, zero_vector.
    """
    full = np.empty((len(raw), dim), np.float32)
    if raw and all(type(v) is bytes for v in raw) and len({len(v) for v in raw}) == 1:
        # The way of nearly every request: one join and one cast for all of them.
        width = _width(raw[0], dim, dtype, path.format(0))
        sent = np.frombuffer(b"".join(raw), f"<f{width}").reshape(len(raw), dim)
        if width == 2 and len(raw) >= _MANY and not ((sent.view("<u2") & _EXPONENT) == _EXPONENT).any():
            widen(sent, full)
        else:
            with np.errstate(invalid="ignore"):  # a signalling NaN is refused below, not warned about
                full[:] = sent
    else:
        for i, one in enumerate(raw):
            full[i] = _one(one, dim, dtype, path.format(i))
    return _finish(full, metric, path)


def _width(raw: bytes, dim: int, dtype: Dtype | None, field: str) -> int:
    for width in _WIDTHS[dtype]:
        if len(raw) == width * dim:
            return width
    wanted = " or ".join(f"{width * dim} bytes (FP{8 * width})" for width in _WIDTHS[dtype])
    raise RequestError("wrong_dimension", f"send {wanted} for {dim} dimensions, not {len(raw)} bytes", field)


def _one(raw: Any, dim: int, dtype: Dtype | None, field: str) -> npt.NDArray[np.float32]:
    if isinstance(raw, bytes):
        with np.errstate(invalid="ignore"):
            return np.frombuffer(raw, f"<f{_width(raw, dim, dtype, field)}").astype(np.float32)
    if not isinstance(raw, list | tuple):
        raise RequestError("bad_type", "send a vector as bytes or as a list of numbers", field)
    if len(raw) != dim:
        raise RequestError("wrong_dimension", f"send {dim} numbers, not {len(raw)}", field)
    try:
        numbers = msgspec.convert(raw, list[float])
    except msgspec.ValidationError as error:
        if "out of range" in str(error):
            raise RequestError("bad_vector", "send finite numbers", field) from None
        raise RequestError("bad_type", "send only numbers in a vector", field) from None
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        raise RequestError("bad_type", "send only numbers in a vector", field) from None
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float64).astype(np.float32)


def _finish(full: npt.NDArray[np.float32], metric: Metric, path: str) -> Vectors:
    if metric == "cosine":
        return _unit(full, path)
    finite = np.isfinite(full).all(axis=1)
    if not finite.all():
        raise RequestError("bad_vector", "send finite numbers only", path.format(int(finite.argmin())))
    with np.errstate(over="ignore"):
        half = full.astype(np.float16)
    fits = np.isfinite(half).all(axis=1)
    if not fits.all():
        where = path.format(int(fits.argmin()))
        raise RequestError(
            "bad_vector", "a number is beyond what FP16 holds (±65504); scale the vector", where
        )
    return half


def _unit(full: npt.NDArray[np.float32], path: str) -> Vectors:
    """Rows scaled to unit length. Raises RequestError."""
    if len(full) < _MANY:
        wide, lengths = _measured(full, 0, path)
        wide /= lengths[:, None]
        return wide.astype(np.float32).astype(np.float16)  # a number of a unit vector always fits
    dim = full.shape[1]
    step = max(1, min(len(full), _BLOCK_NUMBERS // max(1, dim)))
    half = np.empty(full.shape, np.float16)
    # Reused from block to block: fresh memory for each pass costs more than the pass.
    room, bits_all = np.empty((step, dim), np.float64), np.empty((2, step, dim), np.uint32)
    for low in range(0, len(full), step):
        rows = full[low : low + step]
        bits = bits_all[:, : len(rows)]
        wide, lengths = _measured(rows, low, path, room[: len(rows)])
        wide /= (lengths * _FP16_SCALE)[:, None]
        bits[0].view(np.float32)[:] = wide
        _narrow(bits[0], bits[1], half[low : low + step].view(np.uint16))
    return half


def _measured(
    rows: npt.NDArray[np.float32], first: int, path: str, room: npt.NDArray[np.float64] | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The rows, in `room` when that is given, and their lengths; the first is number `first`. Raises RequestError."""
    wide = np.empty(rows.shape, np.float64) if room is None else room
    with np.errstate(invalid="ignore"):  # a signalling NaN is refused here, not warned about
        wide[:] = rows
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    # No sum of squares of FP32 numbers overflows float64: a length that is not finite comes of a number that is not.
    for i, length in enumerate(lengths.tolist()):
        if not math.isfinite(length):
            raise RequestError("bad_vector", "send finite numbers only", path.format(first + i))
    if not lengths.all():
        where = path.format(first + int((lengths != 0).argmin()))
        raise RequestError("zero_vector", "a vector of zeros has no direction; leave it out", where)
    return wide, lengths


def _narrow(bits: npt.NDArray[np.uint32], spare: npt.NDArray[np.uint32], out: npt.NDArray[np.uint16]) -> None:
    """out = the nearest FP16 of FP32 numbers of at most 1 that come divided by `_FP16_SCALE`; to even when two are as near.

    So scaled, a number's FP32 exponent is that of its FP16, subnormals included, and only the mantissa is left to round: some
    passes over whole registers instead of numpy's own conversion, number by number. `bits` and `spare` are overwritten.
    """
    np.right_shift(bits, 16, out=spare)
    spare &= np.uint32(0x8000)
    out[:] = spare
    bits &= np.uint32(0x7FFFFFFF)
    np.right_shift(bits, 13, out=spare)
    spare &= np.uint32(1)
    bits += spare
    bits += np.uint32(0xFFF)
    bits >>= 13
    out |= bits.astype(np.uint16)
