"""The wish as one value (docs/layout.md): members, replication and the targets of each shard. Pure.

Canonical bytes are msgpack. Form 1, still read: `[1, version, shard_count, replication, members]`, its targets those of
`place`. Form 2:

    [2, cluster_id, version, base, shard_count, replication, members, targets]

cluster_id: 16 random bytes, made with version 1. base: 8 bytes, the hash of the layout before, empty for version 1. members:
`[name, region, zone, host, capacity, id]` by name. targets: for each shard its members, the preferred primary first, as their
places in `members`, one byte each up to 256 members, else two (little endian); all shards have equally many.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import chain

import msgpack
import numpy as np

from router.placing import Member, Placement, fair_shares, place

__all__ = ["Layout", "LayoutError", "Member", "Placement", "fair_shares", "layout_from", "place"]

Targets = tuple[tuple[str, ...], ...]
# Replicas of a shard, as config and operators may ask; with more each write waits for more disks.
REPLICATION_MAX = 7
_FORM = 2
_FORM_1_FIELDS = 5


class LayoutError(ValueError):
    """These bytes are not a layout, or one that this build cannot read; or nobody can go by it."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`members`: by name. `targets`: in shard order; none: those of `place` (form 1)."""

    version: int
    shard_count: int
    replication: int
    members: tuple[Member, ...]
    targets: Targets = ()
    base: str = ""
    cluster_id: str = ""

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if names != sorted(set(names)):
            raise LayoutError("a layout lists its members by name, each once")
        if not self.targets:
            return
        copies = min(self.replication, len(names))
        known = set(names)
        if len(self.targets) != self.shard_count or any(
            len(voters) != copies or len(set(voters)) != copies or not known.issuperset(voters)
            for voters in self.targets
        ):
            raise LayoutError(f"a layout names for each shard {copies} different members of its own")

    @cached_property
    def canonical(self) -> bytes:
        """The same bytes on every node for the same layout: what `hash` covers and what travels."""
        members = [list(astuple(member)) for member in self.members]
        if not self.targets:
            old = [member[:_FORM_1_FIELDS] for member in members]
            return self._packed([1, self.version, self.shard_count, self.replication, old])
        places = {member.name: place for place, member in enumerate(self.members)}
        flat = [places[name] for name in chain.from_iterable(self.targets)]
        return self._packed(
            [
                _FORM,
                bytes.fromhex(self.cluster_id),
                self.version,
                bytes.fromhex(self.base),
                self.shard_count,
                self.replication,
                members,
                np.array(flat, _place_type(len(places))).tobytes(),
            ]
        )

    @staticmethod
    def _packed(fields: list[object]) -> bytes:
        packed: bytes = msgpack.packb(fields)
        return packed

    @cached_property
    def hash(self) -> str:
        """16 hex digits of SHA-256 over the canonical bytes."""
        return hashlib.sha256(self.canonical).hexdigest()[:16]

    def member(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)

    def wished(self) -> Targets:
        """For each shard the members that should hold it, the preferred primary first."""
        return self.targets or self._placed

    @cached_property
    def _placed(self) -> Targets:
        return tuple(one.voters for one in place(self.members, self.shard_count, self.replication))

    def placements(self) -> list[Placement]:
        """The targets as placements of epoch 1: what is in force where nothing has been moved yet."""
        return [Placement(shard=shard, epoch=1, voters=voters) for shard, voters in enumerate(self.wished())]


def _place_type(members: int) -> str:
    return "<u1" if members <= 256 else "<u2"


def layout_from(canonical: bytes) -> Layout:
    """The layout of these canonical bytes. Raises LayoutError."""
    try:
        fields = msgpack.unpackb(canonical)
        layout = _of_form_1(*fields[1:]) if fields[0] == 1 else _of_form_2(*fields[1:])
        # Another form, too, has other bytes.
        if layout.canonical == canonical:
            return layout
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise LayoutError(f"not the bytes of a layout: {error}") from error
    except (AttributeError, msgpack.UnpackException) as error:
        raise LayoutError("not the bytes of a layout") from error
    raise LayoutError("not the canonical bytes of a layout that this build knows")


def _of_form_1(version: int, shard_count: int, replication: int, members: list[list[object]]) -> Layout:
    return Layout(
        version=int(version),
        shard_count=int(shard_count),
        replication=int(replication),
        members=tuple(_member([*member, ""]) for member in members),
    )


def _of_form_2(
    cluster_id: bytes,
    version: int,
    base: bytes,
    shard_count: int,
    replication: int,
    members: list[list[object]],
    targets: bytes,
) -> Layout:
    known = tuple(_member(member) for member in members)
    places = np.frombuffer(targets, _place_type(len(known))).reshape(int(shard_count), -1)
    return Layout(
        version=int(version),
        shard_count=int(shard_count),
        replication=int(replication),
        members=known,
        targets=tuple(tuple(known[place].name for place in row) for row in places.tolist()),
        base=base.hex(),
        cluster_id=cluster_id.hex(),
    )


def _member(fields: list[object]) -> Member:
    name, region, zone, host, capacity, id_ = fields
    if type(capacity) is not int or capacity < 1:
        raise LayoutError("a member's capacity is a whole number above 0")
    if any(type(text) is not str for text in (name, region, zone, host, id_)):
        raise LayoutError("a member's name and places are texts")
    return Member(
        name=str(name), region=str(region), zone=str(zone), host=str(host), capacity=capacity, id=str(id_)
    )
