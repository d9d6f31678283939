"""What gossip raises. One root; a packet that is not for us is a `DroppedError`, a fact over a bound a
`FactError`, an operator's wrong key a `KeyringError`."""

from __future__ import annotations

from typing import Literal

# Stable: they are metrics' labels and stand in docs/gossip.md.
DropReason = Literal[
    "not_gossip",
    "newer_version",
    "other_cluster",
    "other_cluster_id",
    "unknown_key",
    "forged",
    "replayed",
    "old_boot",
    "malformed",
    "too_large",
]


class GossipError(Exception):
    """Root of gossip's errors."""


class DroppedError(GossipError):
    """A packet is not taken. It is counted under `reason`, and nothing else happens."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason)
        self.reason: DropReason = reason


class CodecError(DroppedError):
    """The opened packet is not what a node of a version that we read sends."""


class FactError(GossipError):
    """A fact of our own is over a bound."""

    code = "too_large"


class KeyringError(GossipError):
    """A change of keys is refused; `code` is stable, the sentence says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message
