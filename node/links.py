"""One lasting link to each other member, to wherever gossip says it is. An actor: links appear as members do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from gossip.effects import Event
from node.members import Members
from node.peerlink import Hello, PeerLimits, PeerLink
from node.supervisor import Supervisor

# News after which a link should look where its peer is now.
LOOK_AGAIN = frozenset({"joined", "moved", "restarted", "returned", "refuted", "fact"})


class Links:
    """Links by name. A member that leaves keeps its link, idle: it may come back, and the table of members is bounded."""

    def __init__(self, members: Members, hello: Hello, limits: PeerLimits, supervisor: Supervisor) -> None:
        self._members = members
        self._hello, self._limits, self._supervisor = hello, limits, supervisor
        self._links: dict[str, PeerLink] = {}
        # Where members were that have gone since.
        self._regions: dict[str, str] = {}
        self._changed = trio.Event()
        members.watch.append(self._on_event)

    def __getitem__(self, name: str) -> PeerLink:
        return self._links[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._links))

    def connected(self, name: str) -> bool:
        link = self._links.get(name)
        return link is not None and link.connected

    def read_bytes(self) -> dict[str, dict[str, int]]:
        """Of the reads that this node has asked other nodes for: bytes there and back, by "region>region"."""
        own = self._members.own.region
        pairs: dict[str, dict[str, int]] = {}
        for name, link in self._links.items():
            known = self._members.get(name)
            if known is not None and known.fact is not None:
                self._regions[name] = known.fact.region
            pair = pairs.setdefault(f"{own}>{self._regions.get(name, '?')}", {"out": 0, "in": 0})
            pair["out"] += link.read_bytes_out
            pair["in"] += link.read_bytes_in
        return pairs

    async def add(self, name: str) -> PeerLink:
        """The link to that member, known already or not."""
        link = self._links.get(name)
        if link is None:
            link = self._links[name] = PeerLink(
                lambda: self._members.address(name),
                self._hello,
                expect=name,
                limits=self._limits,
                lost=self._teller(name),
            )
            await self._supervisor.start(link, name=f"link-{name}")
        return link

    def _teller(self, name: str) -> Callable[[], None]:
        def lost() -> None:
            known = self._members.get(name)
            if known is not None:
                self._members.gossip.lost_link(known.id)

        return lost

    def _on_event(self, event: Event) -> None:
        self._changed.set()
        if event.kind in LOOK_AGAIN and event.id != self._members.own_id:
            link = self._links.get(self._members.name_of(event.id))
            if link is not None and (not link.connected or event.kind in ("moved", "restarted")):
                link.look_again()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            self._changed = trio.Event()
            for known in self._members.others():
                if known.fact is not None and known.name != self._members.own.name:
                    await self.add(known.name)
            await self._changed.wait()
