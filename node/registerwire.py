"""The messages of the register as msgpack bodies of the peer op `register`, and its state as a file. Pure.

A request is [kind, layout, ballot, value], a reply [kind, ballot, …]; layouts travel as their canonical bytes, ballots as
[counter, node]. The file is JSON with a checksum; it speaks of the layout whose hash it holds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from node.register import (
    NEVER,
    Accept,
    Accepted,
    Ask,
    Ballot,
    Learn,
    Learned,
    Prepare,
    Promise,
    Refuse,
    Reply,
    Slot,
    Stale,
)
from router.layout import Layout, layout_from

FORMAT = 1
REASONS = ("promised", "not_a_member", "new_disk", "other_layout")


def pack_ask(ask: Ask) -> list[Any]:
    if isinstance(ask, Learn):
        return ["learn", ask.layout.canonical, NEVER, None]
    if isinstance(ask, Prepare):
        return ["prepare", ask.base.canonical, ask.ballot, None]
    return ["accept", ask.base.canonical, ask.ballot, ask.value.canonical]


def unpack_ask(body: Any) -> Ask:
    """Raises ValueError or TypeError."""
    kind, layout, ballot, value = body
    if kind == "learn":
        return Learn(layout_from(layout))
    if kind == "prepare":
        return Prepare(layout_from(layout), _ballot(ballot))
    if kind == "accept":
        return Accept(layout_from(layout), _ballot(ballot), layout_from(value))
    raise ValueError(f"a message of unknown kind {kind!a}")


def pack_reply(reply: Reply) -> list[Any]:
    if isinstance(reply, Promise):
        accepted = None if reply.accepted is None else [reply.accepted[0], reply.accepted[1].canonical]
        return ["promise", reply.ballot, accepted]
    if isinstance(reply, Accepted):
        return ["accepted", reply.ballot, None]
    if isinstance(reply, Learned):
        return ["learned", NEVER, reply.hash]
    if isinstance(reply, Stale):
        return ["stale", NEVER, reply.layout.canonical]
    return ["refuse", reply.ballot, [reply.promised, reply.reason]]


def unpack_reply(body: Any) -> Reply:
    """Raises ValueError or TypeError."""
    kind, ballot, more = body
    if kind == "promise":
        accepted = None if more is None else (_ballot(more[0]), layout_from(more[1]))
        return Promise(_ballot(ballot), accepted)
    if kind == "accepted":
        return Accepted(_ballot(ballot))
    if kind == "learned":
        return Learned(str(more))
    if kind == "stale":
        return Stale(layout_from(more))
    if kind == "refuse" and more[1] in REASONS:
        return Refuse(_ballot(ballot), _ballot(more[0]), more[1])
    raise ValueError(f"a reply of unknown kind {kind!a}")


def _ballot(raw: Any) -> Ballot:
    counter, node = raw
    if type(counter) is not int or type(node) is not str or counter < 0:
        raise ValueError("a ballot is a count and a node's name")
    return Ballot(counter, node)


# -- the file ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What is on disk. version, hash: of the layout that promise and acceptance are about; 0 and "" for none yet."""

    version: int = 0
    hash: str = ""
    promised: Ballot = NEVER
    accepted: tuple[Ballot, Layout] | None = None
    counter: int = 0

    def slot(self, layout: Layout | None) -> Slot:
        """The acceptor's state beside that layout, which is the newest that this node knows to be decided."""
        if layout is None or layout.hash == self.hash:
            return Slot(layout, self.promised, self.accepted)
        if layout.version < self.version:
            # Its part in later versions is not known any more: it takes part in nothing until it has caught up.
            return Slot(layout, Ballot(1 << 62, "~"))
        return Slot(layout)


def keep(slot: Slot, counter: int) -> Kept:
    if slot.layout is None:
        return Kept(counter=counter)
    return Kept(
        version=slot.layout.version,
        hash=slot.layout.hash,
        promised=slot.promised,
        accepted=slot.accepted,
        counter=counter,
    )


def to_file(kept: Kept, cluster: str) -> bytes:
    fields = {
        "format": FORMAT,
        "cluster": cluster,
        "version": kept.version,
        "hash": kept.hash,
        "promised": list(kept.promised),
        "accepted": None
        if kept.accepted is None
        else [list(kept.accepted[0]), kept.accepted[1].canonical.hex()],
        "counter": kept.counter,
    }
    return json.dumps(fields | {"check": _check(fields)}).encode() + b"\n"


def from_file(data: bytes) -> tuple[int, str, Kept]:
    """Format, cluster, and what was kept. Raises ValueError, KeyError or TypeError for what was not written by `to_file`."""
    fields = json.loads(data)
    check = fields.pop("check")
    if fields["format"] != FORMAT:
        return fields["format"], fields["cluster"], Kept()
    if check != _check(fields):
        raise ValueError("its checksum does not fit")
    accepted = fields["accepted"]
    kept = Kept(
        version=fields["version"],
        hash=fields["hash"],
        promised=_ballot(fields["promised"]),
        accepted=None
        if accepted is None
        else (_ballot(accepted[0]), layout_from(bytes.fromhex(accepted[1]))),
        counter=fields["counter"],
    )
    return FORMAT, fields["cluster"], kept


def _check(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
