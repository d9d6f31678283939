"""The caches around the coordinator: L0, what is in flight, L1; and what makes them forget (docs/caching.md).

`handle` is the door for every request. What L0 has is answered at once, as a map; the rest is awaited.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from router import cachekeys, cachevalues, requests
from router.cachevalues import CachedAnswer, CachedUser, Version
from router.changes import Changes, Ticket
from router.coordinator import Coordinator, Recommended
from router.errors import RequestError
from router.flights import Flights
from router.l0 import JITTER, L0, Entry
from router.ownwrites import OwnWrites
from router.ports import Store, StoredRecord, Trust
from router.requests import Recommend, Session
from router.wire import Columns, Kept
from storage.records import Kind

# Of a query's time, what it may wait for L1.
L1_SHARE = 0.5
# An error that everybody who asks now would get; it is shared with who waits, and not kept.
FINAL = frozenset({"unknown_user"})

# Looking up more items than this is no cheaper than computing the answer.
REVALIDATED_MAX = 200

Reply = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSizes:
    """l0_bytes 0: nothing is kept in the process. dim: of a user's vector."""

    l0_bytes: int
    dim: int


@dataclass(slots=True)
class Level:
    """Of one level. waited_ns: in all, by those who looked there."""

    hits: int = 0
    misses: int = 0
    # Found, and not used: older than a change, of a session too far behind, or not what it should be.
    refused: int = 0
    revalidated: int = 0
    not_kept: int = 0
    waited_ns: int = 0


class Caches:
    """Answers requests, from a cache where that is as good as the replicas' answer.

    `user_changed`, `item_deleted` and `drop_all` are called on the loop, as changes become known.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        trust: Trust,
        changes: Changes,
        sizes: CacheSizes,
        *,
        shard_count: int,
        jitter: Callable[[], float],
        store: Store | None = None,
    ) -> None:
        self._coordinator, self._trust, self._store = coordinator, trust, store
        self._dim, self._jitter = sizes.dim, jitter
        self._changes = changes
        self._l0 = L0(sizes.l0_bytes, cachekeys.ANSWER_TTL_S, jitter)
        self._flights: Flights[Reply] = Flights()
        self._own = OwnWrites(shard_count)
        self._l0_level, self._l1_level, self._computed = Level(), Level(), Level()

    def handle(self, request: object) -> Reply | Awaitable[Reply]:
        """The reply's fields, or an awaitable of them. Raises RequestError, as the awaitable does."""
        if type(request) is Recommend:
            context = cachekeys.context_hash(request.k, request.constraint, request.metadata)
            kept = self._hit(request, context)
            return kept if kept is not None else self._miss(request, context)
        if isinstance(request, requests.Put | requests.Delete):
            return self._write(request)
        return self._coordinator.handle(request)

    # -- changes --------------------------------------------------------------------------------------------------

    def user_changed(self, user_id: int, version: Version) -> None:
        self._changes.user(user_id, version, trio.current_time())
        self._l0.drop_user(user_id, below=version)
        self._flights.detach_user(user_id)

    def item_deleted(self, media_id: int) -> None:
        self._changes.item(media_id, trio.current_time())
        self._flights.detach_all()

    def drop_all(self) -> None:
        """Changes may have been missed."""
        self._changes.drop(trio.current_time())
        self._l0.clear()
        self._flights.detach_all()

    async def _write(self, request: requests.Put | requests.Delete) -> Reply:
        """`seen-at-once`: whatever becomes of the write, nothing from before it is answered after its end."""
        session: Session = ()
        try:
            reply = await self._coordinator.handle(request)
            session = tuple((s, e, n) for s, e, n in reply["session"])
            return reply
        finally:
            self._wrote(request, session)

    def _wrote(self, request: requests.Put | requests.Delete, session: Session) -> None:
        now = trio.current_time()
        deleted = isinstance(request, requests.Delete)
        if request.kind is Kind.USER:
            for user_id, version in self._own.users(request.ids, session, now).items():
                self._l0.drop_user(user_id)
                self._flights.detach_user(user_id)
                if version is not None:
                    self.user_changed(user_id, version)
        elif deleted:
            for media_id in request.ids:
                self.item_deleted(media_id)
            self._own.deleted(request.ids, now)
        else:
            self._own.put(request.ids)

    # -- reading --------------------------------------------------------------------------------------------------

    def _hit(self, request: Recommend, context: str) -> Kept | None:
        began = time.perf_counter_ns()
        level, now = self._l0_level, trio.current_time()
        entry = self._l0.get((request.user_id, context), now) if self._trust.current(now) else None
        if entry is not None and not self._good(entry, request.session):
            level.refused += 1
            entry = None
        level.waited_ns += time.perf_counter_ns() - began
        if entry is None:
            level.misses += 1
            return None
        level.hits += 1
        return entry.reply

    def _good(self, entry: Entry, session: Session) -> bool:
        changes = self._changes
        if entry.count != changes.count:
            if not changes.admits_items(entry.ids, entry.count):
                self._l0.drop(entry.key)
                return False
            entry.count = changes.count
        return not session or covers(entry.session, session)

    async def _miss(self, request: Recommend, context: str) -> Reply:
        allowed_s = self._coordinator.allowed_s(request.timeout_ms)
        deadline = trio.current_time() + allowed_s
        return await self._flights.run(
            request.user_id,
            # Whatever else a request may ask for, it is the same only when that is.
            dataclasses.replace(request, timeout_ms=None),
            lambda: self._answer(request, context, deadline),
            allowed_s=allowed_s,
            shareable=_complete,
            final=FINAL,
        )

    async def _answer(self, request: Recommend, context: str, deadline: float) -> Reply:
        """From L1, or computed."""
        user: CachedUser | None = None
        if self._store is not None and not request.session:
            ticket = self._changes.ticket(trio.current_time())
            found, user = await self._ask(self._store, request.user_id, context, deadline)
            if found is not None:
                kept = await self._from_store(request.user_id, context, found, ticket, deadline)
                if kept is not None:
                    return kept
        return await self._compute(request, context, deadline, user)

    async def _compute(
        self, request: Recommend, context: str, deadline: float, user: CachedUser | None
    ) -> Reply:
        """user: from L1, when that has one that may be used."""
        began, ticket = time.perf_counter_ns(), self._changes.ticket(trio.current_time())
        token = () if request.session or user is not None else self._own.token(request.user_id, ticket.at)
        try:
            if token:
                made = await self._read_own(request, deadline, token)
            else:
                record = None if user is None else StoredRecord(user.version, user.vector, (), b"")
                made = await self._coordinator.recommend(request, deadline, record)
        finally:
            self._computed.waited_ns += time.perf_counter_ns() - began
        self._computed.hits += 1
        gone = self._own.gone(trio.current_time())
        if gone:
            left = without(made.reply["hits"], gone)
            if left is not made.reply["hits"]:
                # Short of a hit, and from a replica that lags: good for now only.
                self._computed.not_kept += 1
                return {**made.reply, "hits": left}
        return self._keep(request, context, made, ticket, user)

    async def _read_own(self, request: Recommend, deadline: float, token: Session) -> Recommended:
        """Of a user whom this node has just written: by a replica that has that write, if there is one that answers."""
        try:
            user, age_ms = await self._coordinator.one_user(request.user_id, deadline, token)
        except RequestError as error:
            if error.code != "session_behind":
                raise
            return await self._coordinator.recommend(request, deadline)
        made = await self._coordinator.recommend(request, deadline, user)
        return made._replace(age_ms=max(age_ms, made.age_ms))

    # -- filling --------------------------------------------------------------------------------------------------

    def _keep(
        self, request: Recommend, context: str, made: Recommended, ticket: Ticket, cached: CachedUser | None
    ) -> Reply:
        """The reply, which is now in L0, and on its way to L1, when it may be kept. cached: the user that L1 had."""
        reply, user, user_id = made.reply, made.user, request.user_id
        if not _complete(reply) or "stale_ms" in reply:
            self._computed.not_kept += 1
            return reply
        hits: Columns = reply["hits"]
        # Slices of a whole batch's arrays would keep that alive.
        columns = Columns(hits.ids.copy(), hits.scores.copy(), hits.metadata)
        fresh = Kept({**reply, "hits": columns})
        kept = self._keep_here(user_id, context, fresh, user.version, made.age_ms, ticket, request.session)
        if kept is None:
            self._computed.not_kept += 1
            return reply
        if self._store is not None:
            # It reflects what was there so long before now; or, if its user came from L1, before that was begun.
            age_ms = made.age_ms + int(1000 * (trio.current_time() - ticket.at))
            origin = self._trust.origin(age_ms) if cached is None else cached.origin.older(age_ms)
            answer = CachedAnswer(user.version, origin, columns, reply["coverage"]["total"])
            self._send(
                cachekeys.answer_key(user_id, context),
                cachevalues.pack_answer(user_id, context, answer),
                cachekeys.ANSWER_TTL_S,
            )
            if cached is None:
                packed = cachevalues.pack_user(user_id, CachedUser(user.version, origin, user.vector))
                self._send(cachekeys.user_key(user_id), packed, cachekeys.USER_TTL_S)
        return kept

    def _keep_here(
        self,
        user_id: int,
        context: str,
        kept: Kept,
        version: Version,
        age_ms: int,
        ticket: Ticket,
        session: Session = (),
    ) -> Kept | None:
        """Into L0; None when a change that is known says that it must not be."""
        changes, ids = self._changes, kept["hits"].ids.tolist()
        if not changes.admits_user(user_id, version):
            return None
        if not changes.admits_answer(ids, ticket.at - age_ms / 1000):
            return None
        entry = Entry(
            (user_id, context), kept, version=version, ids=ids, count=ticket.deletes, session=session
        )
        self._l0.put(entry, trio.current_time())
        return kept

    def _send(self, key: str, value: bytes, ttl_s: float) -> None:
        if self._store is not None:
            self._store.put(key, value, ttl_s * (1 - JITTER + 2 * JITTER * self._jitter()))

    # -- L1 -------------------------------------------------------------------------------------------------------

    async def _ask(
        self, store: Store, user_id: int, context: str, deadline: float
    ) -> tuple[CachedAnswer | None, CachedUser | None]:
        """What L1 has of the answer; else of the user, when that may be used."""
        level, began = self._l1_level, time.perf_counter_ns()
        now = trio.current_time()
        keys = [cachekeys.answer_key(user_id, context), cachekeys.user_key(user_id)]
        try:
            packed, packed_user = await store.get(keys, now + L1_SHARE * max(0.0, deadline - now))
        finally:
            level.waited_ns += time.perf_counter_ns() - began
        answer = cachevalues.unpack_answer(user_id, context, packed) if packed is not None else None
        if answer is not None:
            return answer, None
        level.misses += 1
        level.refused += packed is not None
        user = cachevalues.unpack_user(user_id, self._dim, packed_user) if packed_user is not None else None
        if user is None or not self._knows(user.origin):
            return None, None
        if not self._changes.admits_user(user_id, user.version):
            return None, None
        return None, user

    def _knows(self, origin: cachevalues.Origin) -> bool:
        """Whether every change since a value of that origin was begun is known here."""
        return self._trust.current(trio.current_time()) and self._trust.trusts(origin)

    async def _from_store(
        self, user_id: int, context: str, found: CachedAnswer, ticket: Ticket, deadline: float
    ) -> Kept | None:
        level, changes = self._l1_level, self._changes
        ids = found.columns.ids.tolist()
        age_ms = 0
        good = changes.admits_user(user_id, found.version) and changes.never_deleted(ids)
        if good and not self._knows(found.origin):
            level.revalidated += 1
            fresh_ms = await self._revalidated(user_id, found, ids, deadline)
            good, age_ms = fresh_ms is not None, fresh_ms or 0
        if not good:
            level.misses += 1
            level.refused += 1
            return None
        level.hits += 1
        coverage = {"answered": found.total, "total": found.total, "missing": []}
        kept = Kept({"hits": found.columns, "coverage": coverage})
        # A change may have come while it was looked up; then it is as good as an answer that was begun before that.
        self._keep_here(user_id, context, kept, found.version, age_ms, ticket)
        return kept

    async def _revalidated(
        self, user_id: int, found: CachedAnswer, ids: Sequence[int], deadline: float
    ) -> int | None:
        """How old in ms the proof may be that neither the user was written nor an item deleted since; None: no proof."""
        if len(ids) > REVALIDATED_MAX:
            return None
        try:
            token = self._own.token(user_id, trio.current_time())
            user, age_ms = await self._coordinator.one_user(user_id, deadline, token)
            if user.version != found.version:
                return None
            items_age_ms = await self._coordinator.items_exist(ids, deadline)
        except RequestError:
            return None
        return None if items_age_ms is None else max(age_ms, items_age_ms)

    def statistics(self) -> dict[str, Any]:
        """By level; `l1` is None without a store."""
        return {
            "l0": dataclasses.asdict(self._l0_level) | self._l0.statistics(),
            "l1": dataclasses.asdict(self._l1_level) if self._store is not None else None,
            "computed": dataclasses.asdict(self._computed),
            "flights": self._flights.statistics(),
            "changes": self._changes.statistics(),
        }


def _complete(reply: Reply) -> bool:
    coverage = reply["coverage"]
    return bool(coverage["answered"] == coverage["total"])


def covers(had: Session, asked: Session) -> bool:
    """Whether what was computed under the tokens `had` reflects what `asked` names. Of another epoch it is not known."""
    if had == asked:
        return True
    places = {shard: (epoch, sequence) for shard, epoch, sequence in had}
    for shard, epoch, sequence in asked:
        place = places.get(shard)
        if place is None or place[0] != epoch or place[1] < sequence:
            return False
    return True


def without(columns: Columns, gone: Container[int]) -> Columns:
    """The hits but those in `gone`."""
    keep = [i for i, id_ in enumerate(columns.ids.tolist()) if id_ not in gone]
    if len(keep) == len(columns.ids):
        return columns
    metadata = None if columns.metadata is None else [columns.metadata[i] for i in keep]
    return Columns(columns.ids[keep], columns.scores[keep], metadata)
