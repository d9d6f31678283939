"""One question to several nodes at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

T = TypeVar("T")


async def ask_all(names: Iterable[str], ask: Callable[[str], Awaitable[T]]) -> dict[str, T]:
    """name → what `ask` has returned for it, by name. What it raises ends the other questions, too."""
    told: dict[str, T] = {}

    async def one(name: str) -> None:
        told[name] = await ask(name)

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(one, name)
    return dict(sorted(told.items()))
