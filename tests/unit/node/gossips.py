"""Gossip in memory, for tests of what stands on it: a hub where news reach everybody at once, or when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import trio

from gossip.effects import Event, EventKind
from gossip.member import MemberView
from gossip.messages import Address, State


class Hub:
    """What all nodes know: one table for all."""

    def __init__(self) -> None:
        self.views: dict[int, MemberView] = {}
        self.told: dict[int, dict[bytes, bytes]] = {}
        self.hots: dict[int, bytes] = {}
        self.nodes: list[FakeGossip] = []

    def join(self, id: int, port: int = 7_402, boot: int = 1) -> FakeGossip:
        node = FakeGossip(self, id)
        self.nodes.append(node)
        self.told.setdefault(id, {})
        self.put(id, "joined", address=Address("127.0.0.1", port), boot=boot)
        return node

    def put(self, id: int, kind: EventKind, **changes: Any) -> None:
        """Changes a member and tells everybody."""
        old = self.views.get(id) or MemberView(
            id, 1, 0, State.ALIVE, Address("127.0.0.1", 7_402), 0.0, None, None
        )
        fields = {name: getattr(old, name) for name in MemberView.__dataclass_fields__}
        self.views[id] = MemberView(**{**fields, **changes})
        self.tell(Event(kind, id, trio.current_time(), self.views[id].boot, 0))

    def tell(self, event: Event) -> None:
        for node in self.nodes:
            for watcher in node.watch:
                watcher(event)


class FakeGossip:
    """Implements `node.members.Gossip` for one node of a hub."""

    def __init__(self, hub: Hub, id: int) -> None:
        self.hub, self.id = hub, id
        self.watch: list[Callable[[Event], None]] = []
        self.superseded = trio.Event()
        self.lost: list[int] = []
        self.hot_sets = 0

    def members(self) -> list[MemberView]:
        return [view for view in self.hub.views.values() if view.state is not State.LEFT]

    def facts(self, id: int) -> Mapping[bytes, bytes]:
        return self.hub.told[id]

    def hot(self, id: int) -> bytes:
        return self.hub.hots.get(id, b"")

    def set_fact(self, key: bytes, value: bytes) -> None:
        if value:
            self.hub.told[self.id][key] = value
        else:
            self.hub.told[self.id].pop(key, None)
        self.hub.tell(Event("fact", self.id, trio.current_time(), 1, 0, key=key))

    def set_hot(self, value: bytes) -> None:
        self.hot_sets += 1
        self.hub.hots[self.id] = value

    def lost_link(self, id: int) -> None:
        self.lost.append(id)

    def forget(self, id: int) -> None:
        self.hub.put(id, "left", state=State.LEFT)

    async def leave(self) -> None:
        self.forget(self.id)
