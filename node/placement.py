"""The placement in force: who votes for one shard, written in the log as the record that opens an epoch. Pure.

A voter is a name and the id of its replica. The id is made with the replica's directory, so one whose disk was replaced
has another and is no voter until a primary has opened an epoch that names it (`learners-silent` of docs/ownership.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgpack

FORM = 1


class PlacementError(ValueError):
    """These bytes are not a placement, or one that this build cannot read."""


@dataclass(frozen=True, slots=True)
class Placement:
    """voters: name → replica id, in the order in which they are preferred as primary. learners: follow and do not vote."""

    voters: tuple[tuple[str, int], ...]
    learners: tuple[tuple[str, int], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.voters)

    @property
    def holders(self) -> tuple[str, ...]:
        """Everybody who has a replica: voters, then learners."""
        return self.names + tuple(name for name, _ in self.learners)

    def is_voter(self, name: str, replica: int) -> bool:
        return (name, replica) in self.voters

    def names_replica(self, name: str, replica: int) -> bool:
        """As a voter or as a learner."""
        return (name, replica) in self.voters or (name, replica) in self.learners

    def replaced(self, name: str, replica: int) -> Placement:
        """With that voter's, or learner's, replica on a new disk."""

        def put(pairs: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
            return tuple((one, replica if one == name else before) for one, before in pairs)

        return Placement(put(self.voters), put(self.learners))

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb([FORM, self.voters, self.learners])
        return packed


def unpack(data: bytes) -> Placement:
    """Raises PlacementError."""
    try:
        form, voters, learners, *_ = msgpack.unpackb(data)
        placement = Placement(_replicas(voters), _replicas(learners))
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise PlacementError(f"not a placement: {error}") from error
    if form != FORM or not placement.voters or len(set(placement.holders)) < len(placement.holders):
        raise PlacementError(f"not a placement of form {FORM} with voters, each replica named once")
    return placement


def _replicas(pairs: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    return tuple((str(name), int(replica)) for name, replica in pairs)
