"""The wish as one value (docs/layout.md): members, replication and the targets of each shard. Pure.

Canonical bytes are msgpack, form 3:

    [3, cluster_id, version, base, shard_count, replication, members, targets, witnesses]

cluster_id: 16 random bytes, made with version 1. base: 8 bytes, the hash of the layout before, empty for version 1. members:
`[name, region, zone, host, capacity, id]` by name; one of capacity 0 holds no data and only witnesses. targets: for each shard
its members, the preferred primary first, as their places in `members`, one byte each up to 255 members, else two (little endian);
all shards have equally many. witnesses: for each shard the place of its witness and 1, or 0; no bytes where no shard has one.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import chain

import msgpack
import numpy as np

from router.placing import Member, Placement, fair_shares, place
from router.witnesses import check

__all__ = ["Layout", "LayoutError", "Member", "Placement", "fair_shares", "layout_from", "place"]

Targets = tuple[tuple[str, ...], ...]
# Replicas of a shard, as config and operators may ask; with more each write waits for more disks.
REPLICATION_MAX = 7
_FORM = 3


class LayoutError(ValueError):
    """These bytes are not a layout, or one that this build cannot read; or nobody can go by it."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`members`: by name. `targets`: in shard order. `witnesses`: one for each shard, or ""; none where no shard has one."""

    version: int
    shard_count: int
    replication: int
    members: tuple[Member, ...]
    targets: Targets
    witnesses: tuple[str, ...] = ()
    base: str = ""
    cluster_id: str = ""

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if names != sorted(set(names)):
            raise LayoutError("a layout lists its members by name, each once")
        known = {member.name for member in self.members if member.capacity}
        copies = min(self.replication, len(known))
        if len(self.targets) != self.shard_count or any(
            len(voters) != copies or len(set(voters)) != copies or not known.issuperset(voters)
            for voters in self.targets
        ):
            raise LayoutError(f"a layout names for each shard {copies} different members that hold data")
        if not check(self.witnesses, self.targets, names):
            raise LayoutError(
                "a layout's witnesses are members that hold nothing of their shard of two replicas"
            )

    @cached_property
    def canonical(self) -> bytes:
        """The same bytes on every node for the same layout: what `hash` covers and what travels."""
        members = [list(astuple(member)) for member in self.members]
        places = {member.name: place for place, member in enumerate(self.members)}
        flat = [places[name] for name in chain.from_iterable(self.targets)]
        votes = [places[name] + 1 if name else 0 for name in self.witnesses]
        packed: bytes = msgpack.packb(
            [
                _FORM,
                bytes.fromhex(self.cluster_id),
                self.version,
                bytes.fromhex(self.base),
                self.shard_count,
                self.replication,
                members,
                np.array(flat, _place_type(len(places))).tobytes(),
                np.array(votes, _place_type(len(places))).tobytes(),
            ]
        )
        return packed

    @cached_property
    def hash(self) -> str:
        """16 hex digits of SHA-256 over the canonical bytes."""
        return hashlib.sha256(self.canonical).hexdigest()[:16]

    def member(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)

    def wished(self) -> Targets:
        """For each shard the members that should hold it, the preferred primary first."""
        return self.targets

    def witness(self, shard: int) -> str:
        """The member that should witness it; empty: none."""
        return self.witnesses[shard] if self.witnesses else ""

    def placements(self) -> list[Placement]:
        """The targets as placements of epoch 1: what is in force where nothing has been moved yet."""
        return [Placement(shard=shard, epoch=1, voters=voters) for shard, voters in enumerate(self.wished())]


def _place_type(members: int) -> str:
    return "<u1" if members < 256 else "<u2"


def layout_from(canonical: bytes) -> Layout:
    """The layout of these canonical bytes. Raises LayoutError."""
    try:
        fields = msgpack.unpackb(canonical)
        layout = _of(*fields[1:])
        # Another form, too, has other bytes.
        if layout.canonical == canonical:
            return layout
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise LayoutError(f"not the bytes of a layout: {error}") from error
    except (AttributeError, msgpack.UnpackException) as error:
        raise LayoutError("not the bytes of a layout") from error
    raise LayoutError("not the canonical bytes of a layout that this build knows")


def _of(
    cluster_id: bytes,
    version: int,
    base: bytes,
    shard_count: int,
    replication: int,
    members: list[list[object]],
    targets: bytes,
    witnesses: bytes,
) -> Layout:
    known = tuple(_member(member) for member in members)
    places = np.frombuffer(targets, _place_type(len(known))).reshape(int(shard_count), -1)
    votes = np.frombuffer(witnesses, _place_type(len(known))).tolist()
    return Layout(
        version=int(version),
        shard_count=int(shard_count),
        replication=int(replication),
        members=known,
        targets=tuple(tuple(known[place].name for place in row) for row in places.tolist()),
        witnesses=tuple(known[vote - 1].name if vote else "" for vote in votes),
        base=base.hex(),
        cluster_id=cluster_id.hex(),
    )


def _member(fields: list[object]) -> Member:
    name, region, zone, host, capacity, id_ = fields
    if type(capacity) is not int or capacity < 0:
        raise LayoutError("a member's capacity is a whole number, 0 for one that only witnesses")
    if any(type(text) is not str for text in (name, region, zone, host, id_)):
        raise LayoutError("a member's name and places are texts")
    return Member(
        name=str(name), region=str(region), zone=str(zone), host=str(host), capacity=capacity, id=str(id_)
    )
