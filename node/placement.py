"""The placement in force: who votes for one shard, written in the log as the record that opens an epoch. Pure.

A voter is a name and the id of its replica. The id is made with the replica's directory, so one whose disk was replaced
has another and is no voter until a primary has opened an epoch that names it (`learners-silent` of docs/ownership.md).
A witness is a name and the id of its vote, which is made with its first promise (`node/witness.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgpack

# 2: a witness, and the former votes.
FORM = 2

Pairs = tuple[tuple[str, int], ...]


class PlacementError(ValueError):
    """These bytes are not a placement, or one that this build cannot read."""


@dataclass(frozen=True, slots=True)
class Placement:
    """voters: name → replica id, in the order in which they are preferred as primary. learners: follow and do not vote.
    witness: votes and holds no data; at most one, so that a majority of the voters is a quorum (`witness-no-disk`).

    former: the votes of the placement before, data first, when that had a witness and voted otherwise: those of them who do not
    know of this placement must not be able to elect anybody before it counts (`sealed`). former_witness: as `witness`, of those.
    """

    voters: Pairs
    learners: Pairs = ()
    witness: tuple[str, int] | None = None
    former: Pairs = ()
    former_witness: tuple[str, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Voters that hold data."""
        return tuple(name for name, _ in self.voters)

    @property
    def votes(self) -> Pairs:
        """All that elect: the voters, then the witness."""
        return self.voters if self.witness is None else (*self.voters, self.witness)

    @property
    def electors(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.votes)

    @property
    def holders(self) -> tuple[str, ...]:
        """Everybody who has a replica: voters, then learners."""
        return self.names + tuple(name for name, _ in self.learners)

    @property
    def witness_name(self) -> str:
        return "" if self.witness is None else self.witness[0]

    def is_voter(self, name: str, replica: int) -> bool:
        """As one that holds data."""
        return (name, replica) in self.voters

    def may_elect(self, name: str, id_: int) -> bool:
        """As a voter or as the witness."""
        return (name, id_) in self.votes

    def names_replica(self, name: str, replica: int) -> bool:
        """As a voter or as a learner."""
        return (name, replica) in self.voters or (name, replica) in self.learners

    def replaced(self, name: str, replica: int) -> Placement:
        """With that voter's, or learner's, replica on a new disk."""

        def put(pairs: Pairs) -> Pairs:
            return tuple((one, replica if one == name else before) for one, before in pairs)

        return replace(self, voters=put(self.voters), learners=put(self.learners))

    def witnessed(self, witness: tuple[str, int] | None) -> Placement:
        return replace(self, witness=witness)

    def after(self, before: Placement) -> Placement:
        """This one as what follows `before`, which is settled."""
        if before.witness is None or before.votes == self.votes:
            return replace(self, former=(), former_witness=None)
        return replace(self, former=before.voters, former_witness=before.witness)

    def sealed(self, knows: Iterable[tuple[str, int]]) -> bool:
        """Whether those of the former votes that do not know of this placement can elect nobody. knows: those that do: whose log
        has its record, or whose memory as a witness its epoch. One whose disk was replaced does not vote any more."""
        if not self.former:
            return True
        here = dict(self.votes)
        former = (*self.former, self.former_witness) if self.former_witness is not None else self.former
        replaced = {one for one in former if here.get(one[0], one[1]) != one[1]}
        return _outvoted(self.former, self.former_witness, replaced.union(knows))

    def remembered(self, knows: Iterable[tuple[str, int]]) -> bool:
        """Whether those of these votes that do not know of it can elect nobody, because the witness does."""
        return self.witness is not None and _outvoted(self.voters, self.witness, set(knows))

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb(
            [FORM, self.voters, self.learners, self.witness, self.former, self.former_witness]
        )
        return packed


def _outvoted(voters: Pairs, witness: tuple[str, int] | None, others: set[tuple[str, int]]) -> bool:
    """Whether nobody of the voters can win without one of the others: alone they are no majority, or none of them holds data."""
    votes = voters if witness is None else (*voters, witness)
    left = [one for one in votes if one not in others]
    return len(left) < len(votes) // 2 + 1 or not any(one in voters for one in left)


def unpack(data: bytes) -> Placement:
    """Raises PlacementError."""
    try:
        form, voters, learners, witness, former, former_witness, *_ = msgpack.unpackb(data)
        placement = Placement(
            _pairs(voters), _pairs(learners), _pair(witness), _pairs(former), _pair(former_witness)
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise PlacementError(f"not a placement: {error}") from error
    twice = len(set(placement.holders)) < len(placement.holders) or placement.witness_name in placement.names
    if form != FORM or not placement.voters or twice:
        raise PlacementError(f"not a placement of form {FORM} with voters, each named once")
    return placement


def _pairs(pairs: Iterable[tuple[str, int]]) -> Pairs:
    return tuple((str(name), int(replica)) for name, replica in pairs)


def _pair(pair: tuple[str, int] | None) -> tuple[str, int] | None:
    return None if pair is None else _pairs([pair])[0]
