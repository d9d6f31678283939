"""This node's part in the register of layouts: the shell of `node/register.py` around disk, links and gossip.

The layout that this node goes by lies in `data/layout`, what it has promised about the next in `data/register`; both are on
disk before anything of them is told.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import structlog
import trio

from gossip.effects import Event
from node import facts, layoutfile, registerwire
from node.members import Members
from node.peerlink import PeerError, RemoteError
from node.register import (
    ROUND_S,
    Ask,
    Done,
    Effect,
    Learn,
    Proposer,
    Reply,
    Reserve,
    Slot,
    Tell,
    answer,
    learn,
)
from router.layout import Layout
from storage.errors import DamagedFileError, ForeignDataError, FormatError
from storage.files import write_atomically

log = structlog.get_logger(__name__)

# After the end of a try the last words to the others get this long.
GRACE_S = 0.3
REPLIES_MAX = 256


class Link(Protocol):
    async def call(self, op: str, body: Any, timeout_s: float) -> Any: ...


class Links(Protocol):
    """`node.links.Links` is that."""

    async def add(self, name: str) -> Link: ...


def load(path: Path, *, cluster: str) -> registerwire.Kept:
    """What is on disk; nothing promised when there is no file. Raises StorageError, OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return registerwire.Kept()
    try:
        version, owner, kept = registerwire.from_file(data)
    except (ValueError, KeyError, TypeError) as error:
        advice = "what this node has promised is lost. Move its data directory away and let it join anew"
        raise DamagedFileError(path, error, advice) from error
    if version != registerwire.FORMAT:
        raise FormatError(f"{path} has format {version}, this build knows {registerwire.FORMAT}")
    if owner != cluster:
        raise ForeignDataError(f"{path} is of cluster {owner!r}, not of {cluster!r}")
    return kept


class Register:
    """An actor: takes over what gossip tells. `commit` and `handle_peer` from any task of the same loop."""

    def __init__(
        self,
        directory: Path,
        cluster: str,
        members: Members,
        links: Links,
        layout: Layout,
        kept: registerwire.Kept,
    ) -> None:
        self.layout = layout
        # Called on the loop with each layout that this node goes by from now on; it is on disk.
        self.watch: list[Callable[[Layout], None]] = []
        self._directory, self._cluster = directory, cluster
        self._members, self._links = members, links
        self._id = f"{members.own_id:016x}"
        self._slot, self._counter = kept.slot(layout), kept.counter
        self._writing, self._committing = trio.Lock(), trio.Lock()
        self._news = trio.Event()
        members.watch.append(self._on_event)

    # -- what is on disk ------------------------------------------------------------------------------------------------

    async def _write(self, slot: Slot, counter: int) -> None:
        """On disk when it returns; only then it counts. With `_writing` held. Raises OSError."""
        layout = slot.layout
        assert layout is not None
        later = layout if layout.hash != self.layout.hash else None
        if later is not None:
            facts.pack_layout(later)  # what cannot be told must not be kept
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._write_files, later, registerwire.keep(slot, counter))
        self._slot, self._counter = slot, counter
        if later is not None:
            self._go_by(later)

    def _write_files(self, later: Layout | None, kept: registerwire.Kept) -> None:
        if later is not None:
            layoutfile.save(self._directory / "layout", later, cluster=self._cluster)
        write_atomically(self._directory / "register", registerwire.to_file(kept, self._cluster))

    def _go_by(self, layout: Layout) -> None:
        self.layout = layout
        for key, value in facts.pack_layout(layout).items():
            self._members.gossip.set_fact(key, value)
        log.info(
            "layout", version=layout.version, hash=layout.hash, members=[one.name for one in layout.members]
        )
        for told in self.watch:
            told(layout)

    # -- hearing --------------------------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        if event.kind == "fact" and event.key.startswith(facts.LAYOUT):
            self._news.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Goes by each later layout that another member goes by."""
        task_status.started()
        while True:
            self._news = trio.Event()
            heard = [one.layout for one in self._members.others() if one.layout is not None]
            later = max(heard, key=lambda one: one.version, default=None)
            if later is not None and later.version > self.layout.version:
                await self.hear(later)
            await self._news.wait()

    async def hear(self, layout: Layout) -> None:
        """This layout is decided. Of another cluster, or of other shards, it is refused. Raises OSError."""
        if not self._ours(layout):
            log.error(
                "layout_conflict", message=f"layout {layout.hash} is of another cluster; it is not taken"
            )
            return
        async with self._writing:
            slot = learn(self._slot, layout)
            if slot is not self._slot:
                await self._write(slot, self._counter)

    def _ours(self, layout: Layout) -> bool:
        mine = self.layout
        # Version 1 of an earlier build has no cluster_id.
        same = layout.cluster_id == mine.cluster_id or not mine.cluster_id
        return same and layout.shard_count == mine.shard_count

    # -- acceptor -------------------------------------------------------------------------------------------------------

    async def handle_peer(self, peer: str, body: Any) -> Any:
        """The peer op `register`. Raises RemoteError for what cannot be read, OSError."""
        try:
            return registerwire.pack_reply(await self._answer(registerwire.unpack_ask(body)))
        except (ValueError, TypeError) as error:
            raise RemoteError("bad_request", f"the message could not be read: {error}") from error

    async def _answer(self, ask: Ask) -> Reply:
        about = ask.layout if isinstance(ask, Learn) else ask.base
        if not self._ours(about):
            raise ValueError("a layout of another cluster")
        async with self._writing:
            slot, reply = answer(self._slot, self._members.own.name, self._id, ask)
            if slot is not self._slot:
                await self._write(slot, self._counter)
        return reply

    # -- proposer -------------------------------------------------------------------------------------------------------

    async def commit(self, value: Layout, timeout_s: float) -> Done:
        """Makes `value` follow the layout whose hash is its `base`, if that is ours. Raises OSError."""
        with trio.move_on_after(timeout_s):
            async with self._committing:
                return await self._commit(value, timeout_s)
        return Done("unavailable")

    async def _commit(self, value: Layout, timeout_s: float) -> Done:
        if value.base != self.layout.hash:
            return Done("committed" if value.hash == self.layout.hash else "conflict", self.layout)
        # Cancelled in the middle it would not be known what was asked: the proposer ends by its own deadline.
        with trio.CancelScope(shield=True):
            done = await self._propose(
                Proposer(
                    # Two nodes may share a name by mistake, but no id: they must not share ballots.
                    f"{self._members.own.name}:{self._id}",
                    self.layout,
                    value,
                    counter=self._counter,
                    random=random.Random(),
                    deadline=trio.current_time() + timeout_s,
                )
            )
            if done.layout is not None:
                await self.hear(done.layout)
        log.info("commit", version=value.version, hash=value.hash, outcome=done.outcome)
        return done

    async def _propose(self, proposer: Proposer) -> Done:
        send, replies = trio.open_memory_channel[tuple[str, Reply]](REPLIES_MAX)
        async with send, replies, trio.open_nursery() as nursery:
            effects = proposer.start(trio.current_time())
            while proposer.done is None:
                effects = await self._do(effects, proposer, nursery, send)
                if proposer.done is None and not effects:
                    effects = await self._next(proposer, replies)
            await self._do(effects, proposer, nursery, send)
            nursery.cancel_scope.deadline = trio.current_time() + GRACE_S
        return proposer.done

    async def _next(
        self, proposer: Proposer, replies: trio.MemoryReceiveChannel[tuple[str, Reply]]
    ) -> list[Effect]:
        with trio.move_on_at(proposer.next_deadline):
            sender, reply = await replies.receive()
            return proposer.on_reply(sender, reply, trio.current_time())
        return proposer.on_timer(trio.current_time())

    async def _do(
        self,
        effects: list[Effect],
        proposer: Proposer,
        nursery: trio.Nursery,
        send: trio.MemorySendChannel[tuple[str, Reply]],
    ) -> list[Effect]:
        more: list[Effect] = []
        for effect in effects:
            if isinstance(effect, Tell):
                nursery.start_soon(self._tell, effect, send)
            elif isinstance(effect, Reserve):
                async with self._writing:
                    await self._write(self._slot, effect.counter)
                more += proposer.on_reserved(trio.current_time())
        return more

    async def _tell(self, tell: Tell, send: trio.MemorySendChannel[tuple[str, Reply]]) -> None:
        """One message and its answer; an answer that does not come is what the proposer's timer is for."""
        try:
            if tell.to == self._members.own.name:
                reply = await self._answer(tell.message)
            else:
                link = await self._links.add(tell.to)
                body = await link.call("register", registerwire.pack_ask(tell.message), ROUND_S)
                reply = registerwire.unpack_reply(body)
        except (PeerError, OSError, ValueError, TypeError) as error:
            log.info("register", peer=tell.to, asked=type(tell.message).__name__, error=str(error))
            return
        try:
            send.send_nowait((tell.to, reply))
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            return


async def open_register(
    directory: Path, cluster: str, members: Members, links: Links, layout: Layout
) -> Register:
    """Raises StorageError, OSError."""
    kept = await trio.to_thread.run_sync(partial(load, directory / "register", cluster=cluster))
    return Register(directory, cluster, members, links, layout, kept)
