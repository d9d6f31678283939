"""Whose turn it is on a graph: many searches at once, or one step of building, with searches first.

A plain lock is not fair: a builder that releases it and takes it again at once nearly always wins against a
search that waits. Here a builder waits until no search holds or wants the graph, but at most `patience_s`, so
that a busy node still finishes its index.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Shared for searches, exclusive for building."""

    def __init__(self, patience_s: float = 0.05) -> None:
        self._patience_s = patience_s
        self._condition = threading.Condition()
        self._searching = 0
        self._wanting = 0
        self._building = False
        self._insisting = False

    @contextmanager
    def search(self) -> Iterator[None]:
        with self._condition:
            self._wanting += 1
            while self._building or self._insisting:
                self._condition.wait()
            self._wanting -= 1
            self._searching += 1
        try:
            yield
        finally:
            with self._condition:
                self._searching -= 1
                if not self._searching:
                    self._condition.notify_all()

    @contextmanager
    def build(self) -> Iterator[None]:
        """One builder at a time: a second one waits for the first."""
        with self._condition:
            until = time.monotonic() + self._patience_s
            while self._building or self._searching or (self._wanting and not self._insisting):
                left = until - time.monotonic()
                if left <= 0 and not self._building and not self._insisting:
                    self._insisting = True  # new searches wait; those that run finish
                    continue  # when none runs, those that wait will not wake us
                self._condition.wait(left if left > 0 else None)
            self._insisting = False
            self._building = True
        try:
            yield
        finally:
            with self._condition:
                self._building = False
                self._condition.notify_all()
