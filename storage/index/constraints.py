"""Which rows a class constraint lets through, as bits, and how many they are.

Bits are little-endian, one per row, as in `ShardView.alive`. They are counted before a search is planned: few
rows are scanned exactly, many are left to the graph.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.view import ClassConstraint, ShardView

Bits = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Matching:
    """The alive rows of one view that satisfy one constraint.

    bits: uint8 [ceil(rows / 8)], little bit order, zero past `rows`; count: how many bits are set.
    """

    bits: Bits
    count: int

    def rows(self, low: int, high: int) -> npt.NDArray[np.int64]:
        """Matching row numbers in [low, high), ascending."""
        first = low // 8
        flags = np.unpackbits(self.bits[first : (high + 7) // 8], bitorder="little")
        return np.flatnonzero(flags[low - 8 * first : high - 8 * first]) + low

    def flags(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each of rows int64 [any shape] matches. Rows must be within the view."""
        return (self.bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 != 0  # type: ignore[no-any-return]


def satisfied(masks: npt.NDArray[np.uint64], constraint: ClassConstraint) -> npt.NDArray[np.bool_]:
    """bool [rows] for masks uint64 [rows, words]. A class beyond the mask's width is one that no row has."""
    rows, words = masks.shape
    result = np.ones(rows, np.bool_)
    width = 64 * words
    if any(not 0 <= c < width for c in constraint.require_all):
        return np.zeros(rows, np.bool_)
    for word, bits in _words(constraint.require_all, width).items():
        result &= (masks[:, word] & bits) == bits
    if constraint.require_any:
        some = np.zeros(rows, np.bool_)
        for word, bits in _words(constraint.require_any, width).items():
            some |= (masks[:, word] & bits) != 0
        result &= some
    for word, bits in _words(constraint.exclude, width).items():
        result &= (masks[:, word] & bits) == 0
    return result


def _words(classes: tuple[int, ...], width: int) -> dict[int, np.uint64]:
    words: dict[int, int] = {}
    for c in classes:
        if 0 <= c < width:
            words[c // 64] = words.get(c // 64, 0) | 1 << c % 64
    return {word: np.uint64(bits) for word, bits in words.items()}


def matching(view: ShardView, constraint: ClassConstraint) -> Matching:
    """The rows of `view` that are alive and satisfy `constraint`."""
    size = (view.rows + 7) // 8
    bits = view.alive[:size].copy()
    if view.rows % 8:
        bits[-1] &= (1 << view.rows % 8) - 1
    if constraint:
        bits &= np.packbits(satisfied(view.masks[: view.rows], constraint), bitorder="little")
    return Matching(bits, int(np.bitwise_count(bits).sum()))


class MatchingCache:
    """Matchings of the views last searched, bounded by bytes. Safe for use from several threads.

    A view is named by its rowset, position and rows: the row contents never change, and `alive` changes only
    with the position.
    """

    def __init__(self, bytes_max: int = 16 << 20) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._entries: OrderedDict[tuple[int, object, int, int, ClassConstraint], Matching] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = self.evicted = 0

    def get(self, view: ShardView, constraint: ClassConstraint) -> Matching:
        key = (view.rowset, view.position, view.rows, view.alive_rows, constraint)
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self.hits += 1
                return found
            self.misses += 1
        made = matching(view, constraint)
        with self._lock:
            if key not in self._entries and made.bits.nbytes <= self._bytes_max:
                self._entries[key] = made
                self._bytes += made.bits.nbytes
            while self._bytes > self._bytes_max:
                _, gone = self._entries.popitem(last=False)
                self._bytes -= gone.bits.nbytes
                self.evicted += 1
        return made
