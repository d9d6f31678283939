"""A coordinator small enough to know: it answers from a dict of users and items, as late, lagging or partial as told."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import trio
import trio.testing

from router import requests
from router.cachevalues import Origin
from router.caching import Caches, CacheSizes
from router.changes import Changes
from router.coordinator import Recommended
from router.errors import RequestError
from router.ports import StoredRecord
from router.ring import shard_of
from router.wire import Columns
from storage.records import Kind
from storage.view import ClassConstraint

DIM = 4
SHARDS = 3


class Lab:
    """Answers the caches in a coordinator's place, and is their `Trust`; their Store is in memory."""

    def __init__(self, *, store: bool = False, l0_bytes: int = 1 << 20) -> None:
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
        sizes = CacheSizes(l0_bytes=l0_bytes, dim=DIM)
        self.caches = Caches(
            self,  # type: ignore[arg-type]
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

    async def ask(self, user_id: int = 1, k: int = 3, **fields: Any) -> dict[str, Any]:
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

    # -- what the caches ask of the coordinator -------------------------------------------------------------------

    def allowed_s(self, timeout_ms: float | None) -> float:
        return (timeout_ms or 1_000.0) / 1000

    async def handle(self, request: requests.Put | requests.Delete) -> dict[str, Any]:
        for id_ in request.ids:
            if request.kind is Kind.USER:
                # Each shard's changes follow each other in its log.
                self._put_user(id_)
            else:
                self.sequence += 1
                self.items.discard(id_)
        shards = {shard_of(id_, SHARDS) for id_ in request.ids}
        last = {
            shard: max(
                (
                    self.users[i].version[1]
                    for i in request.ids
                    if i in self.users and shard_of(i, SHARDS) == shard
                ),
                default=self.sequence,
            )
            for shard in shards
        }
        await trio.sleep(self.delay_s)
        return {"written": len(request.ids), "session": [[s, 1, last[s]] for s in shards]}

    async def recommend(
        self, request: requests.Recommend, deadline: float, user: StoredRecord | None = None
    ) -> Recommended:
        if user is None:
            user, _ = await self.one_user(request.user_id, deadline, request.session)
        self.searches += 1
        items = sorted(self.old[1] if self.old else self.items)[: request.k]
        missing = sorted(self.failed) if await self._work(deadline) else list(range(SHARDS))
        # The score is the user's vector, so that answers tell from which one they are.
        scores = np.full(len(items), float(np.frombuffer(user.vector, np.float16)[0]), np.float32)
        coverage = {"answered": SHARDS - len(missing), "total": SHARDS, "missing": missing}
        reply = {
            "hits": Columns(np.array(items, np.uint64), scores, [b"\x80"] * len(items)),
            "coverage": coverage,
        }
        stale = {"stale_ms": self.age_ms} if self.age_ms > 2_000 else {}
        return Recommended(reply | stale, user, self.age_ms)

    async def one_user(
        self, user_id: int, deadline: float, session: requests.Session
    ) -> tuple[StoredRecord, int]:
        self.looked_up += 1
        if self.old and session:
            raise RequestError("session_behind", "no replica has it", "user_id")
        found = (self.old[0] if self.old else self.users).get(user_id)
        if not await self._work(deadline):
            raise RequestError("unavailable", "late", "user_id")
        if found is None:
            raise RequestError("unknown_user", "put it first", "user_id")
        return found, self.age_ms

    async def items_exist(self, ids: Sequence[int], deadline: float) -> int | None:
        items = set(self.old[1] if self.old else self.items)
        return self.age_ms if await self._work(deadline) and items.issuperset(ids) else None

    async def _work(self, deadline: float) -> bool:
        """Whether it was done in time."""
        left_s = deadline - trio.current_time()
        await trio.sleep(max(0.0, min(self.delay_s, left_s)))
        return self.delay_s <= left_s

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
