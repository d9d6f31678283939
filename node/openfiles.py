"""How many files this process may have open, and how many of them may be sockets.

A log that finds no file descriptor left cannot begin its next segment. So whoever opens connections must never be able
to take them all.
"""

from __future__ import annotations

import dataclasses
import resource

from node.config import LimitsConfig
from node.server import REJECTED_POLITELY

# The program itself: libraries, the loop, the listeners, our links to others.
RESERVED = 256
# Log, table, two row files, and what a checkpoint, a compaction and an export open beside them.
PER_SHARD = 16
CONNECTIONS_MIN = 16


def raise_limit() -> int:
    """Takes what the system allows this process; returns how many that are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def fit(limits: LimitsConfig, *, shards: int, files: int) -> LimitsConfig:
    """`limits` with as many connections as `files` leave room for; a third of the room for each port."""
    room = files - RESERVED - PER_SHARD * shards - REJECTED_POLITELY
    if limits.connections + limits.http_connections + limits.peer_connections <= room:
        return limits
    most = max(CONNECTIONS_MIN, room // 3)
    return dataclasses.replace(
        limits,
        connections=min(limits.connections, most),
        http_connections=min(limits.http_connections, most),
        peer_connections=min(limits.peer_connections, most),
    )
