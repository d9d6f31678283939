"""Threads for the parts of one search. A search lane has one thread; these are its other cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
# At most this many in a piece: few enough that a thread which a busy host delays does not hold up the batch, enough
# to be worth a hand-over (some 50 µs).
PIECE = 16


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gmco-search")


def in_pieces(total: int, threads: int, work: Callable[[int, int], T], piece_max: int = PIECE) -> Sequence[T]:
    """work(low, high) for consecutive pieces of [0, total), in order; on the caller's thread when there is but one.

    Pieces are equally long and as many for each thread, so that none waits for the last one.
    """
    if threads <= 1 or total <= piece_max:
        return [work(0, total)]
    count = threads * -(-total // (threads * piece_max))
    bounds = [total * i // count for i in range(count + 1)]
    return list(_pool(threads).map(work, bounds[:-1], bounds[1:]))
