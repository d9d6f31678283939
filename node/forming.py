"""From a node without a layout to one that has one: the shell of `node/bootstrap.py`, around gossip and `data/layout`."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog
import trio

from gossip.effects import Event
from node import bootstrap, facts, layoutfile
from node.bootstrap import Adopt, Create, Refuse, Seen, Wait
from node.members import Known, Members
from router.layout import Layout

log = structlog.get_logger(__name__)

# News wake the one who waits; this is for what makes no event.
LOOK_AGAIN_S = 1.0


def tell(members: Members, layout: Layout) -> None:
    """Publishes the layout that this node goes by. Only of what is on its disk."""
    for key, value in facts.pack_layout(layout).items():
        members.gossip.set_fact(key, value)


class Founding:
    """An operator's word that this node, which waits for a layout, makes the first one: `gmco cluster init`."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.wake: Callable[[], None] = lambda: None
        self._settled = trio.Event()
        self._made: Layout | None = None

    async def found(self, layout: Layout, timeout_s: float) -> str:
        """Why it was not made; empty when it was."""
        if self.layout is not None:
            return "another init is under way on this node"
        self.layout = layout
        self.wake()
        with trio.move_on_after(timeout_s):
            await self._settled.wait()
        self.layout = None
        if self._made is None:
            return "this node has not come to it in time: see its state in `gmco status`"
        if self._made.hash != layout.hash:
            return f"this node has gone by layout {self._made.hash} meanwhile, which others have made"
        return ""

    def settle(self, layout: Layout) -> None:
        """This node goes by a layout now."""
        self._made = layout
        self._settled.set()


async def form(
    members: Members, path: Path, cluster: str, founding: Founding, say: Callable[[str], None]
) -> Layout:
    """Waits until there is a layout, writes it to the disk, tells it, and returns it. `say`: what it waits for.

    Raises OSError when it cannot be written; then nobody has heard of it.
    """
    news = trio.Event()

    def on_event(_event: Event | None) -> None:
        news.set()

    members.watch.append(on_event)
    founding.wake = lambda: on_event(None)
    # One for all tries: the same founders make the same bytes.
    cluster_id = secrets.token_hex(16)
    said: bytes = b""
    refused = ""
    try:
        while True:
            news = trio.Event()
            others = [seen(one) for one in members.others()]
            step = bootstrap.decide(members.own, others, id=f"{members.own_id:016x}", cluster_id=cluster_id)
            if isinstance(step, Wait) and founding.layout is not None:
                step = Create(founding.layout)
            if isinstance(step, Adopt | Create):
                await _keep(members, path, cluster, step)
                founding.settle(step.layout)
                return step.layout
            view = step.view if isinstance(step, Wait) else b""
            if view != said:
                said = view
                members.gossip.set_fact(facts.WAITING, view)
            if isinstance(step, Refuse) and step.message != refused:
                log.error(step.code, message=step.message)
            refused = step.message if isinstance(step, Refuse) else ""
            say(f"waiting: {step.code}: {step.message}" if isinstance(step, Refuse) else str(step))
            with trio.move_on_after(LOOK_AGAIN_S):
                await news.wait()
    finally:
        members.watch.remove(on_event)


async def _keep(members: Members, path: Path, cluster: str, step: Adopt | Create) -> None:
    layout = step.layout
    facts.pack_layout(layout)  # what cannot be told must not be kept
    await trio.to_thread.run_sync(partial(layoutfile.save, path, layout, cluster=cluster))
    tell(members, layout)
    members.gossip.set_fact(facts.WAITING, b"")
    log.info(
        "layout_made" if isinstance(step, Create) else "layout_adopted",
        version=layout.version,
        hash=layout.hash,
        members=[member.name for member in layout.members],
        source=step.source if isinstance(step, Adopt) else members.own.name,
    )


class LayoutGuard:
    """Says when another member goes by another layout of our version: once for each, and in `problem` while it lasts."""

    def __init__(self, members: Members, layout: Layout) -> None:
        self._members, self._layout = members, layout
        self.problem = ""
        members.watch.append(self._on_event)
        self._look()

    def go_by(self, layout: Layout) -> None:
        """This node goes by a later layout."""
        self._layout = layout
        self._look()

    def _on_event(self, event: Event) -> None:
        if event.kind == "left" or event.key.startswith(facts.LAYOUT):
            self._look()

    def _look(self) -> None:
        found = bootstrap.conflict(self._layout, [seen(one) for one in self._members.others()])
        problem = "" if found is None else f"{found.code}: {found.message}"
        if found is not None and problem != self.problem:
            log.error(found.code, message=found.message)
        self.problem = problem


def seen(known: Known) -> Seen:
    return Seen(
        alive=known.alive,
        id=f"{known.id:016x}",
        fact=known.fact,
        layout=known.layout,
        partial=known.layout_partial,
        view=known.view_of_cluster,
    )
