"""What operators do to the layout through this node: changes staged, planned, committed (docs/layout.md)."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import structlog
import trio

from node import facts, staged
from node.asking import ask_all
from node.facts import FactError
from node.forming import Founding
from node.links import Links
from node.members import Members
from node.peerlink import PeerError
from node.registers import Register
from router.errors import RequestError
from router.layout import Layout, LayoutError, Member
from router.operating import Cluster
from router.planning import MOVE_BYTES_PER_S, Change, ChangeError, Plan, first_layout, limits, loads, plan
from storage.errors import StorageError

log = structlog.get_logger(__name__)

TIMEOUT_S = 10.0
SIZES_S = 2.0
# So many hashes are remembered, so that a stale plan is told from one that never was.
PLANS_MAX = 64
APPLY_TRIES = 5
# How far a forced version is above the greatest known: above what the lost may have committed.
FORCED_VERSIONS = 1_000


class Layouts:
    """Handles the op `cluster`. `register` is None until this node goes by a layout."""

    def __init__(
        self,
        directory: Path,
        members: Members,
        links: Links,
        founding: Founding,
        sizes: Callable[[], Mapping[int, int]],
    ) -> None:
        """sizes: bytes of this node's replicas by shard; called in a thread."""
        self.register: Register | None = None
        self._path = directory / "staged"
        self._members, self._links, self._founding = members, links, founding
        self._sizes = sizes
        self._lock = trio.Lock()
        self._hashes: dict[str, None] = {}

    async def handle(self, request: Cluster) -> dict[str, Any]:
        """The reply's fields. Raises RequestError."""
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else TIMEOUT_S
        with self._refusals():
            if request.action == "init":
                return await self._init(request.members, timeout_s)
            async with self._lock:
                return await self._handle(request, timeout_s)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except (ChangeError, LayoutError, FactError) as error:
            raise RequestError("refused", str(error), getattr(error, "field", None)) from error
        except StorageError as error:
            raise RequestError("damaged", str(error)) from error
        except OSError as error:
            log.exception("layout_not_written")
            raise RequestError("internal", f"the disk of {self._members.own.name} failed: {error}") from error

    async def _handle(self, request: Cluster, timeout_s: float) -> dict[str, Any]:
        if request.action == "recover":
            return await self._recover()
        if request.action == "revert":
            await trio.to_thread.run_sync(self._path.unlink, True)
            return {"node": self._members.own.name, "staged": []}
        changes = await trio.to_thread.run_sync(staged.load, self._path)
        if request.action == "show":
            return self._show(changes)
        if request.action == "plan":
            return await self._plan(changes)
        if request.action == "commit":
            return await self._commit(request.hash, changes, timeout_s)
        return await self._stage(self._change(request), changes)

    def here(self) -> Register:
        """Raises RequestError."""
        if self.register is None:
            raise RequestError(
                "refused", f"{self._members.own.name} goes by no layout yet; see `gmco cluster init`"
            )
        return self.register

    # -- staging --------------------------------------------------------------------------------------------------------

    def _change(self, request: Cluster) -> Change:
        values = dict(request.values)
        if request.action == "join":
            values = self._member(request.node) | values
        elif request.action == "leave":
            values = {}
        return Change(action=request.action, node=request.node, values=tuple(values.items()))

    def _member(self, name: str) -> dict[str, Any]:
        """What a node says of itself, as a member's values."""
        known = self._members.get(name)
        if known is None or known.fact is None:
            raise RequestError("unknown_node", f"there is no node {name!a} in gossip; start it first", "node")
        member = asdict(replace(known.fact.member(), id=f"{known.id:016x}"))
        del member["name"]
        return member

    async def _stage(self, change: Change, changes: list[Change]) -> dict[str, Any]:
        register = self.here()
        if change not in changes:
            changes = [*changes, change]
        if len(changes) > staged.CHANGES_MAX:
            raise RequestError(
                "too_large", f"{staged.CHANGES_MAX} changes are staged; commit or revert them first"
            )
        plan(register.layout, changes, {})  # what cannot be planned is not staged
        await trio.to_thread.run_sync(staged.save, self._path, changes)
        return self._show(changes)

    def _show(self, changes: Sequence[Change]) -> dict[str, Any]:
        layout = self.here().layout
        return {
            "node": self._members.own.name,
            "layout": _shown(layout),
            "staged": [str(change) for change in changes],
            "limits": [asdict(limit) for limit in limits(layout)],
            "new_disks": self._new_disks(layout),
        }

    def _new_disks(self, layout: Layout) -> list[str]:
        """Members that run on another data directory than the layout knows: they have no vote until they join again."""
        known = {member.name: self._members.get(member.name) for member in layout.members}
        return [
            member.name
            for member in layout.members
            if member.id and (one := known[member.name]) is not None and f"{one.id:016x}" != member.id
        ]

    # -- planning and committing ----------------------------------------------------------------------------------------

    async def _plan(self, changes: Sequence[Change]) -> dict[str, Any]:
        base = self.here().layout
        sizes, silent = await self._all_sizes()
        made = await trio.to_thread.run_sync(plan, base, changes, sizes)
        self._remember(made.layout.hash)
        unknown = [shard for shard in range(base.shard_count) if shard not in sizes]
        return _told(made) | {
            "node": self._members.own.name,
            "staged": [str(change) for change in changes],
            "sizes_unknown": unknown,
            "silent": silent,
        }

    def _remember(self, hash_: str) -> None:
        self._hashes[hash_] = None
        while len(self._hashes) > PLANS_MAX:
            del self._hashes[next(iter(self._hashes))]

    async def _all_sizes(self) -> tuple[dict[int, int], list[str]]:
        """Bytes by shard, the greatest that anybody has; and who did not answer."""
        sizes = dict(await trio.to_thread.run_sync(self._sizes))

        async def ask(name: str) -> dict[int, int] | None:
            try:
                link = await self._links.add(name)
                told = await link.call("sizes", None, SIZES_S)
                return {int(shard): int(size) for shard, size in dict(told).items()}
            except (PeerError, ValueError, TypeError):
                return None

        own = self._members.own.name
        told = await ask_all((name for name in self._members.alive_names if name != own), ask)
        for theirs in told.values():
            for shard, size in (theirs or {}).items():
                sizes[shard] = max(size, sizes.get(shard, 0))
        return sizes, [name for name, theirs in told.items() if theirs is None]

    async def handle_sizes(self, peer: str, body: Any) -> Any:
        """The peer op `sizes` → bytes by shard."""
        return dict(await trio.to_thread.run_sync(self._sizes))

    async def _commit(self, hash_: str, changes: Sequence[Change], timeout_s: float) -> dict[str, Any]:
        register = self.here()
        if register.layout.hash == hash_:
            return {"node": self._members.own.name, "layout": _shown(register.layout)}
        value = None
        # What was staged may have become impossible by what others have committed.
        with contextlib.suppress(ChangeError):
            if changes:
                value = (await trio.to_thread.run_sync(plan, register.layout, changes, {})).layout
        if value is None or value.hash != hash_:
            if hash_ in self._hashes:
                raise RequestError(
                    "stale_plan", "the layout or what is staged has changed since; plan again", "hash"
                )
            raise RequestError(
                "unknown_plan",
                f"{self._members.own.name} has made no plan {hash_}; commit where it was made",
                "hash",
            )
        self._remember(hash_)
        await self._decide(register, value, timeout_s)
        await trio.to_thread.run_sync(self._path.unlink, True)
        return {"node": self._members.own.name, "layout": _shown(value)}

    async def _decide(self, register: Register, value: Layout, timeout_s: float) -> None:
        """Raises RequestError; `stale_plan` when another layout was committed first."""
        facts.pack_layout(value)  # what cannot be told must not be kept
        done = await register.commit(value, timeout_s)
        if done.outcome == "committed":
            return
        if done.outcome == "conflict":
            raise RequestError("stale_plan", "another layout was committed first; plan again", "hash")
        if done.outcome == "unavailable":
            raise RequestError(
                "no_majority",
                f"no majority of the {len(register.layout.members)} members answered; nothing was changed. "
                "If they are lost for good: gmco cluster recover --force",
            )
        raise RequestError(
            "outcome_unknown",
            f"a majority could not be heard in time; `gmco cluster show` tells whether {value.hash} is the layout, "
            "and doing the same again settles it",
        )

    async def apply(self, make: Callable[[Layout], Layout], timeout_s: float) -> Layout:
        """Commits what `make` makes of the layout, at once, whatever is staged; after another commit got ahead, of that one.
        The layout that says so. Raises RequestError."""
        with self._refusals():
            async with self._lock:
                for tries in range(APPLY_TRIES):
                    register = self.here()
                    value = await trio.to_thread.run_sync(make, register.layout)
                    if (value.members, value.wished()) == (register.layout.members, register.layout.wished()):
                        return register.layout
                    try:
                        await self._decide(register, value, timeout_s)
                    except RequestError as error:
                        if error.code != "stale_plan" or tries + 1 == APPLY_TRIES:
                            raise
                    else:
                        return value
        raise AssertionError("unreachable")

    async def checked(self, make: Callable[[Layout], Layout]) -> None:
        """Whether `apply` of it could be done now. Raises RequestError."""
        with self._refusals():
            await trio.to_thread.run_sync(make, self.here().layout)

    async def told(self, changes: Sequence[Change]) -> dict[str, Any]:
        """What these changes alone would do. Raises RequestError."""
        with self._refusals():
            return await self._plan(changes)

    # -- first and last resort ------------------------------------------------------------------------------------------

    async def _init(self, names: Sequence[str], timeout_s: float) -> dict[str, Any]:
        own = self._members.own
        if self.register is not None:
            raise RequestError(
                "refused", f"{own.name} goes by layout version {self.register.layout.version} already"
            )
        chosen = names or [known.name for known in self._members.all() if known.alive and known.fact]
        members = [Member(name=name, **self._member(name)) for name in sorted({*chosen})]
        if own.name not in chosen:
            raise RequestError(
                "refused", f"ask one of the members: {own.name} is not among {', '.join(chosen)}"
            )
        layout = await trio.to_thread.run_sync(
            first_layout, members, own.shard_count, own.replication, secrets.token_hex(16)
        )
        refused = await self._founding.found(layout, timeout_s)
        if refused:
            raise RequestError("refused", refused)
        return {"node": own.name, "layout": _shown(layout)}

    async def _recover(self) -> dict[str, Any]:
        """Version + 1,000 of those members that are alive, by nobody's leave but the operator's."""
        register = self.here()
        layout = register.layout
        alive = self._members.alive_names
        gone = [Change(action="leave", node=one.name) for one in layout.members if one.name not in alive]
        if 2 * len(gone) < len(layout.members):
            raise RequestError(
                "refused",
                f"a majority of the members is alive ({len(layout.members) - len(gone)} of {len(layout.members)}): "
                "use leave, plan and commit",
            )
        made = await trio.to_thread.run_sync(plan, layout, gone, {})
        forced = replace(made.layout, version=layout.version + FORCED_VERSIONS)
        log.warning("layout_forced", version=forced.version, without=[one.node for one in gone])
        await register.hear(forced)
        return {
            "node": self._members.own.name,
            "layout": _shown(forced),
            "without": [one.node for one in gone],
            "lost": f"layouts after version {layout.version} that were committed among those, if any",
        }


def disk_sizes(directory: Path, shards: Iterable[int]) -> dict[int, int]:
    """Bytes on the disk of each replica, its log aside: what a move carries. Blocking."""
    sizes = {}
    for shard in list(shards):
        total = 0
        for path in (directory / f"shard-{shard:03}").rglob("*"):
            with contextlib.suppress(OSError):  # it may be gone by now
                if path.parent.name != "wal" and path.is_file():
                    total += path.stat().st_blocks * 512
        sizes[shard] = total
    return sizes


def _shown(layout: Layout) -> dict[str, Any]:
    return {
        "version": layout.version,
        "hash": layout.hash,
        "base": layout.base,
        "cluster_id": layout.cluster_id,
        "shard_count": layout.shard_count,
        "replication": layout.replication,
        "members": [asdict(member) for member in layout.members],
        "balance": [asdict(load) for load in loads(layout, {})],
    }


def _told(made: Plan) -> dict[str, Any]:
    layout = made.layout
    return {
        "hash": layout.hash,
        "base": {"version": made.base.version, "hash": made.base.hash},
        "version": layout.version,
        "replication": layout.replication,
        "moves": [asdict(move) for move in made.moves],
        "bytes": sum(move.size_bytes for move in made.moves),
        "handovers": made.handovers,
        "eta_s": made.eta_s,
        "bytes_per_s": MOVE_BYTES_PER_S,
        "before": [asdict(load) for load in made.before],
        "after": [asdict(load) for load in made.after],
        "limits": [asdict(limit) for limit in made.limits],
        "gains": list(made.gains),
    }
