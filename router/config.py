"""The router's settings, as the `[router]` section of a node's file gives them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Time limits of a request, in milliseconds, and how often a shard is tried on another replica (docs/fan-out.md)."""

    # Of a read that gives no timeout_ms.
    deadline_ms: int = field(default=100, metadata={"range": (1, 60_000)})
    # Of one try, while another replica could still be asked.
    try_ms: int = field(default=30, metadata={"range": (1, 60_000)})
    retries: int = field(default=2, metadata={"range": (0, 10)})
    # Messages that are sent only because another one is slow, in percent of the others.
    hedge_percent: float = field(default=5.0, metadata={"range": (0, 100)})
    write_deadline_ms: int = field(default=10_000, metadata={"range": (1, 60_000)})
