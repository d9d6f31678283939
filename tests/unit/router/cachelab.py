"""A cluster small enough to know: one node that answers from a dict of users and items, as late, lagging or partial as told."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import outcome
import trio
import trio.testing

from router import coverage, requests
from router.cachevalues import Origin
from router.caching import Caches, CacheSizes
from router.changes import Changes
from router.coordinator import Coordinator, RouterConfig
from router.layout import Placement
from router.ports import (
    Answers,
    Asked,
    Done,
    NodeError,
    SearchAsk,
    SearchReply,
    StoredRecord,
    WriteAsk,
    WriteReply,
)
from storage.records import Kind, Operation
from storage.view import ClassConstraint

DIM = 4
SHARDS = 3


class Lab:
    """Implements `router.ports.Cluster`, its only Node, `Trust`, and a Store in memory."""

    def __init__(self, *, store: bool = False, l0_bytes: int = 1 << 20) -> None:
        self.local, self.shard_count = "a", SHARDS
        self.users: dict[int, StoredRecord] = {}
        self.items: set[int] = set(range(1, 50))
        # What a lagging replica still answers with; None: it is level.
        self.old: tuple[dict[int, StoredRecord], set[int]] | None = None
        self.age_ms = 0
        self.delay_s = 0.01
        self.failed: dict[int, str] = {}
        self.searches = self.looked_up = 0
        self.sequence = 0
        self.is_current = True
        self.trusted = True
        self.kept: dict[str, bytes] = {}
        self.store_delay_s = 0.0
        self.changes = Changes(-1.0)
        coordinator = Coordinator(self, RouterConfig(deadline_ms=1_000, try_ms=400), metric="dot")
        sizes = CacheSizes(l0_bytes=l0_bytes, dim=DIM)
        self.caches = Caches(
            coordinator,
            self,
            self.changes,
            sizes,
            shard_count=SHARDS,
            jitter=lambda: 0.5,
            store=MemoryStore(self) if store else None,
        )

    # -- what happens elsewhere -----------------------------------------------------------------------------------

    def write_user(self, user_id: int, *, told: bool = True) -> tuple[int, int]:
        """As another node's doing."""
        version = self._put_user(user_id)
        if told:
            self.caches.user_changed(user_id, version)
        return version

    def _put_user(self, user_id: int) -> tuple[int, int]:
        self.sequence += 1
        vector = np.full(DIM, self.sequence % 100 + 1, np.float16).tobytes()
        self.users[user_id] = StoredRecord((1, self.sequence), vector, (), b"")
        return 1, self.sequence

    def lag(self) -> None:
        """From now on replicas answer with what there is now."""
        self.old = (dict(self.users), set(self.items))

    # -- asking ---------------------------------------------------------------------------------------------------

    async def recommend(self, user_id: int = 1, k: int = 3, **fields: Any) -> dict[str, Any]:
        result = self.caches.handle(recommend(user_id, k, **fields))
        return result if isinstance(result, dict) else await result

    def at_once(self, user_id: int = 1, k: int = 3, **fields: Any) -> dict[str, Any] | None:
        """What L0 answers; None: nothing."""
        result = self.caches.handle(recommend(user_id, k, **fields))
        if isinstance(result, dict):
            return result
        result.close()  # type: ignore[attr-defined]
        return None

    async def put_users(self, *ids: int) -> dict[str, Any]:
        vectors = np.zeros((len(ids), DIM), np.float16)
        blank = ((),) * len(ids)
        request = requests.Put(
            kind=Kind.USER, ids=ids, vectors=vectors, classes=blank, metadata=(b"",) * len(ids),
            ack="primary", write_id=None, timeout_ms=None,
        )  # fmt: skip
        return await self.caches.handle(request)  # type: ignore[no-any-return, misc]

    async def delete_items(self, *ids: int) -> dict[str, Any]:
        request = requests.Delete(kind=Kind.ITEM, ids=ids, ack="primary", write_id=None, timeout_ms=None)
        return await self.caches.handle(request)  # type: ignore[no-any-return, misc]

    # -- router.ports.Cluster -------------------------------------------------------------------------------------

    def node(self, name: str) -> Lab:
        return self

    def placement(self, shard: int) -> Placement:
        return Placement(shard=shard, epoch=1, voters=("a",))

    def primary(self, shard: int) -> str:
        return "a"

    def alive(self, name: str) -> bool:
        return True

    def avoid(self, name: str) -> bool:
        return False

    def lags_ms(self, name: str) -> dict[int, int]:
        return {}

    def distance(self, name: str) -> int:
        return coverage.HERE

    def load_s(self, name: str) -> float:
        return 0.0

    async def caught_up(
        self, shards: Sequence[int], session: requests.Session, timeout_s: float
    ) -> dict[int, str]:
        behind = {shard for shard, _, _ in session} if self.old else set()
        return {shard: "session_behind" for shard in shards if shard in behind}

    # -- router.ports.Node ----------------------------------------------------------------------------------------

    def search(self, ask: SearchAsk, timeout_s: float, done: Done[SearchReply]) -> Asked:
        self.searches += 1
        items = sorted(self.old[1] if self.old else self.items)[: ask.k]
        # The score is the user's vector, so that answers tell from which one they are.
        scores = np.full(len(items), float(ask.query[0]), np.float32)
        metadata = [b"\x80"] * len(items)
        reply = SearchReply(np.array(items, np.uint64), scores, metadata, dict(self.failed), self.age_ms)
        return self._later(reply, timeout_s, done)

    def get(
        self,
        kind: Kind,
        ids: Sequence[int],
        session: requests.Session,
        timeout_s: float,
        done: Done[Answers[StoredRecord]],
    ) -> Asked:
        self.looked_up += 1
        users, items = self.old or (self.users, self.items)
        blank = StoredRecord((1, 1), bytes(2 * DIM), (), b"")
        found = [users.get(i) if kind is Kind.USER else (blank if i in items else None) for i in ids]
        return self._later(Answers(found, self.age_ms), timeout_s, done)

    def _later(self, reply: Any, timeout_s: float, done: Done[Any]) -> Asked:
        """As it is now, after as long as it takes, unless cancelled."""
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await trio.sleep(min(self.delay_s, timeout_s))
            if not scope.cancelled_caught:
                late = outcome.Error(NodeError("deadline_exceeded", "late"))
                done(late if self.delay_s > timeout_s else outcome.Value(reply))

        trio.lowlevel.spawn_system_task(run)
        return scope

    def score(self, *args: Any) -> Asked:
        raise NotImplementedError

    async def write(self, asks: Sequence[WriteAsk], timeout_s: float) -> list[WriteReply]:
        replies = []
        for ask in asks:
            for change in ask.changes:
                if change.kind is Kind.USER:
                    self._put_user(change.id)
                elif change.operation is Operation.DELETE:
                    self.sequence += 1
                    self.items.discard(change.id)
            replies.append(WriteReply(ask.shard, 1, self.sequence, None))
        await trio.sleep(self.delay_s)
        return replies

    # -- router.ports.Trust ---------------------------------------------------------------------------------------

    def current(self, now: float) -> bool:
        return self.is_current

    def trusts(self, origin: Origin) -> bool:
        return self.trusted and origin.tick / 1000 > self.changes.complete_since

    def origin(self, age_ms: int) -> Origin:
        return Origin("a", 1, int(1000 * trio.current_time()) - age_ms)


class MemoryStore:
    """A store that loses nothing and may be slow."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    async def get(self, keys: Sequence[str], deadline: float) -> list[bytes | None]:
        with trio.move_on_at(deadline):
            await trio.sleep(self._lab.store_delay_s)
            return [self._lab.kept.get(key) for key in keys]
        return [None] * len(keys)

    def put(self, key: str, value: bytes, ttl_s: float) -> None:
        self._lab.kept[key] = value


def recommend(
    user_id: int = 1, k: int = 3, session: requests.Session = (), timeout_ms: float | None = None
) -> requests.Recommend:
    return requests.Recommend(
        k=k,
        constraint=ClassConstraint(),
        metadata=True,
        timeout_ms=timeout_ms,
        session=session,
        user_id=user_id,
    )


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In virtual time."""
    trio.run(scene, clock=trio.testing.MockClock(autojump_threshold=0))
