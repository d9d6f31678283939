"""A process that dies at the n-th of its system calls that change the disk, for tests of what must be repeatable."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from storage.table import Table

_CALLS = ("fsync", "fdatasync", "replace", "rename", "unlink", "pwrite", "pwritev", "posix_fallocate")


class Crash(BaseException):
    """From here on nothing reaches the disk."""


class Crashing:
    def __init__(self, patch: pytest.MonkeyPatch, after: int) -> None:
        """`after` so many calls each further one raises Crash."""
        self._left = after
        self.done: list[str] = []
        for name in _CALLS:
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        patch.setattr(Table, "commit", self._counted("commit", Table.commit))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            if self._left <= 0:
                raise Crash(name)
            self._left -= 1
            self.done.append(name)
            return call(*args, **named)

        return counted
