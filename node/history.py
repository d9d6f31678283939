"""What has happened to the cluster's members, as this node saw it: the last events, numbered, to be read and waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import structlog
import trio

from gossip.effects import Event
from node import facts
from node.members import Members

log = structlog.get_logger(__name__)

EVENTS_MAX = 1_000
READ_MAX = 1_000


class Entry(NamedTuple):
    """at: seconds since 1970, for people. by: who accused or declared, 0 for nobody. reason: of `degraded`."""

    sequence: int
    at: float
    kind: str
    id: int
    boot: int
    incarnation: int
    by: int
    reason: str


class History:
    """A ring of the last EVENTS_MAX events. Sequences begin at 1 with each start of the node."""

    def __init__(self, members: Members, *, wall: Callable[[], float] = time.time) -> None:
        self._members = members
        self._wall = wall
        self._ring: deque[Entry] = deque(maxlen=EVENTS_MAX)
        self._last = 0
        self._arrived = trio.Event()
        self._closed = False
        members.watch.append(self._on_event)

    def _on_event(self, event: Event) -> None:
        kind, reason = str(event.kind), ""
        if event.kind == "fact":
            if event.key != facts.DEGRADED:
                return
            reason = facts.reason_text(self._members.gossip.facts(event.id).get(facts.DEGRADED, b""))
            kind = "degraded" if reason else "well"
        self._last += 1
        entry = Entry(
            self._last, self._wall(), kind, event.id, event.boot, event.incarnation, event.by, reason
        )
        self._ring.append(entry)
        log.info("member", **{key: value for key, value in self._shown(entry).items() if key != "at"})
        self._arrived.set()
        self._arrived = trio.Event()

    async def read(self, after: int, wait_s: float) -> dict[str, Any]:
        """Events past the sequence `after`; waits up to `wait_s` for the first. `lost`: how many of them are forgotten.

        A greater `after` than there has been is of an earlier start of this node: the answer begins at the beginning.
        """
        if after > self._last:
            after = 0
        if after == self._last and not self._closed:
            arrived = self._arrived
            with trio.move_on_after(wait_s):
                await arrived.wait()
        found = [entry for entry in self._ring if entry.sequence > after][:READ_MAX]
        first = found[0].sequence if found else self._last + 1
        return {
            "events": [self._shown(entry) for entry in found],
            "next": found[-1].sequence if found else after,
            "lost": first - after - 1,
        }

    def close(self) -> None:
        """Wakes everybody who waits, for good: a node that stops must not be held up by them."""
        self._closed = True
        self._arrived.set()

    def _shown(self, entry: Entry) -> dict[str, Any]:
        """Names are looked up when somebody reads: a member is heard of before its name is."""
        shown: dict[str, Any] = {
            "sequence": entry.sequence,
            "at": round(entry.at, 3),
            "kind": entry.kind,
            "node": self._members.name_of(entry.id),
            "id": f"{entry.id:016x}",
            "boot": entry.boot,
            "incarnation": entry.incarnation,
        }
        if entry.by not in (0, entry.id):
            shown["by"] = self._members.name_of(entry.by)
        if entry.reason:
            shown["reason"] = entry.reason
        return shown
