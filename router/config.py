"""The router's settings, as the `[router]` section of a node's file gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Time limits of a request, in milliseconds, and how often a shard is tried on another replica."""

    deadline_ms: int = 1_000
    try_ms: int = 400
    retries: int = 2
    write_deadline_ms: int = 10_000
