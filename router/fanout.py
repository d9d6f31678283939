"""One question, many nodes, one answer in time: the shell over `router/gathering.py` (docs/fan-out.md)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import trio

from router import coverage, requests
from router.asking import Asking
from router.config import RouterConfig
from router.coverage import Choice, Sight
from router.errors import RequestError, known
from router.gathering import Gathering
from router.merge import Merged, Part
from router.peers import HedgeBudget, Peer, usual_p95_s
from router.ports import (
    Answers,
    Asked,
    Cluster,
    Done,
    Node,
    SearchAsk,
    SearchReply,
)
from router.requests import Session
from router.ring import shard_of
from router.tries import Counters, Failed, Rules, Send
from router.wire import Columns

Query = npt.NDArray[np.float16]
T = TypeVar("T")
R = TypeVar("R")
# What is known of other nodes is older than that anyway, and a try that fails looks again.
SHARED_S = 0.001
RETRY_AFTER_MS = 50
# The connection on whose behalf a task asks, for taking turns; 0: nobody's in particular.
SOURCE: ContextVar[int] = ContextVar("SOURCE", default=0)
_sources = itertools.count(1)


def take_turns() -> None:
    """What this task asks from now on takes turns with what others ask: for a connection of its own."""
    SOURCE.set(next(_sources))


@dataclass(frozen=True, slots=True)
class Found:
    """What a fan-out brought. reasons: missing shard → code."""

    columns: Columns
    reasons: dict[int, str]
    total: int
    # How old the oldest replica that answered may be, by what the nodes said of themselves.
    age_ms: int = 0
    retry_after_ms: int | None = None

    def coverage(self) -> dict[str, Any]:
        missing = sorted(self.reasons)
        answer: dict[str, Any] = {
            "answered": self.total - len(missing),
            "total": self.total,
            "missing": missing,
        }
        if missing:
            answer["reason"] = self.reasons[missing[0]]
        return answer

    def check(self, *, require_full: bool) -> None:
        """Raises RequestError when there is no answer at all, or not the whole one that is required."""
        missing = len(self.reasons)
        if not missing:
            return
        reason = next(iter(self.reasons.values()))
        if missing == self.total:
            code = known(reason)
            message = f"no replica of any of the {self.total} shards could answer; try again"
            retry_after_ms = (self.retry_after_ms or RETRY_AFTER_MS) if code == "overloaded" else None
            raise RequestError(code, message, retry_after_ms=retry_after_ms)
        if require_full:
            raise RequestError(
                "partial",
                f"{missing} of {self.total} shards did not answer ({reason}); try again, or without require_full to get "
                "what there is",
                "require_full",
            )


class _Looked(NamedTuple):
    """Answers of a look-up, by id."""

    ids: Sequence[int]
    answers: Answers[Any]


class FanOut:
    """Asks the nodes of a `Cluster`, and remembers how they answered."""

    def __init__(self, cluster: Cluster, config: RouterConfig, draw: random.Random | None = None) -> None:
        self._cluster = cluster
        self._config = config
        self._all = tuple(range(cluster.shard_count))
        self._first: tuple[float, Choice] = (-math.inf, Choice({}, ()))
        self._draw = (draw or random.Random()).randrange
        self._counters = Counters()
        self._partial = 0
        self._peers: dict[str, Peer] = {}
        self._budget = HedgeBudget(config.hedge_percent)

    def statistics(self) -> dict[str, int]:
        """`breakers_open`: now. The rest: since the start."""
        return {
            **asdict(self._counters),
            "first_messages": self._budget.firsts,
            "partial": self._partial,
            "breakers_open": sum(not peer.breaker.closed for peer in self._peers.values()),
            "breakers_opened": sum(peer.breaker.opened for peer in self._peers.values()),
        }

    def peers(self) -> dict[str, dict[str, float]]:
        """Of each node that was asked: what was seen of it."""
        return {
            name: {
                "in_flight": peer.in_flight,
                "answers": peer.answers,
                "errors": peer.errors,
                "timeouts": peer.timeouts,
                "mean_ms": round(1000 * peer.mean_s, 3),
                "p95_ms": round(1000 * peer.p95_s, 3),
                "open": not peer.breaker.closed,
            }
            for name, peer in self._peers.items()
        }

    def deadline(self, timeout_ms: float | None) -> float:
        """When the answer to a request must be there, by trio's clock."""
        return trio.current_time() + self.allowed_s(timeout_ms)

    def allowed_s(self, timeout_ms: float | None) -> float:
        """How long a read may take that asks for that limit."""
        return (timeout_ms or self._config.deadline_ms) / 1000

    # -- choice ---------------------------------------------------------------------------------------------------

    def _peer(self, name: str) -> Peer:
        peer = self._peers.get(name)
        if peer is None:
            peer = self._peers[name] = Peer()
        return peer

    def _choose_all(self) -> Choice:
        """Of all shards, for a first try. Not to be changed: the requests of a frame share it."""
        now = trio.current_time()
        if now >= self._first[0] + SHARED_S:
            choice = self._choose(self._all, frozenset(), False)
            # A peer that is tried after failures is for one request alone.
            wary = any(not self._peer(name).breaker.closed for name in choice.assigned)
            self._first = (-math.inf if wary else now, choice)
        return self._first[1]

    def _choose(self, shards: Sequence[int], failed: Failed, near: bool) -> Choice:
        """near: only within this region, and only what is well and level: what it is asked in place of is merely late."""
        cluster = self._cluster
        now = trio.current_time()
        # Each node is looked at once, whatever the number of its shards.
        seen: dict[str, Sight | None] = {}

        def sight(name: str) -> Sight | None:
            if name in seen:
                return seen[name]
            found = None
            if cluster.alive(name):
                distance = cluster.distance(name)
                if not near or distance < coverage.FAR:
                    peer = self._peer(name)
                    unwell = cluster.avoid(name) or not peer.breaker.may(now)
                    load_s = peer.load_s(now) + cluster.load_s(name)
                    if not (near and unwell):
                        found = Sight(unwell, cluster.lags_ms(name), distance, load_s)
            seen[name] = found
            return found

        def level(name: str, shard: int) -> bool:
            one = sight(name)
            return one is not None and one.lags_ms.get(shard, 0) <= coverage.LAG_MS_MAX

        single: set[int] = set()

        def candidates(shard: int) -> Sequence[str]:
            voters: Sequence[str] = cluster.placement(shard).voters
            if failed:
                voters = [name for name in voters if (name, shard) not in failed]
            if near:
                voters = [name for name in voters if level(name, shard)]
            if len(voters) < 2 or sum([sight(name) is not None for name in voters]) < 2:
                single.add(shard)
            return coverage.choose(shard, voters, sight, cluster.local)

        return Choice(*coverage.cover(shards, candidates, cluster.local, sight, self._draw), single)

    # -- questions ------------------------------------------------------------------------------------------------

    async def find(
        self,
        query: Query,
        request: requests.Query,
        deadline: float | None = None,
        drop: AbstractSet[int] = frozenset(),
        age_ms: int = 0,
    ) -> Found:
        """The best k over all shards, `drop` left out. Raises RequestError when there is nothing to answer with.

        age_ms: of what the query was made from.
        """
        source = SOURCE.get()

        def ask(node: Node, send: Send, done: Done[Any]) -> Asked:
            wanted = SearchAsk(
                tuple(send.shards), query, send.k, request.constraint, request.metadata, request.session,
                request.priority, source,
            )  # fmt: skip
            return node.search(wanted, send.timeout_s, done)

        deadline = deadline or self.deadline(request.timeout_ms)
        rules = Rules(
            deadline=deadline,
            try_s=self._try_s(deadline),
            retries=self._config.retries,
            k=request.k + len(drop),
            total=len(self._all),
        )
        gathering = self._gathering(rules, _hits)
        await Asking(self._cluster, gathering, ask, _take_hits, request.session).run(self._choose_all())
        replies = [answer.reply for answer in gathering.answers.values()]
        assert gathering.merged is not None
        columns = _columns(replies, gathering.merged, request, drop)
        age_ms = max([age_ms, *[reply.age_ms for reply in replies]])
        self._partial += bool(gathering.missing)
        found = Found(columns, gathering.missing, len(self._all), age_ms, gathering.retry_after_ms)
        found.check(require_full=request.require_full)
        return found

    async def look_up(
        self,
        ids: Sequence[int],
        begin: Callable[[Node, Sequence[int], float, Done[Answers[T]]], Asked],
        deadline: float,
        session: Session,
    ) -> tuple[dict[int, T | str | None], int]:
        """Ask each id's shard; by id what came, a string for the code of its shard's error; and the answers' age in ms."""
        by_shard: dict[int, list[int]] = {}
        for id_ in dict.fromkeys(ids):
            by_shard.setdefault(shard_of(id_, self._cluster.shard_count), []).append(id_)

        def of(shards: Sequence[int]) -> list[int]:
            return [id_ for shard in shards for id_ in by_shard[shard]]

        def ask(node: Node, send: Send, done: Done[Any]) -> Asked:
            return begin(node, of(send.shards), send.timeout_s, done)

        def take(shards: Sequence[int], answers: Any) -> tuple[_Looked, dict[int, str]]:
            asked = of(shards)
            pairs = zip(asked, answers.found, strict=True)
            failed = {
                shard_of(id_, self._cluster.shard_count): found for id_, found in pairs if type(found) is str
            }
            return _Looked(asked, answers), failed

        shards = list(by_shard)
        rules = Rules(deadline, self._try_s(deadline), self._config.retries)
        gathering: Gathering[_Looked] = self._gathering(rules, _no_hits)
        choice = self._choose(shards, frozenset(), False)
        await Asking(self._cluster, gathering, ask, take, session).run(choice)
        found: dict[int, T | str | None] = {}
        for shard, code in gathering.missing.items():
            found.update(dict.fromkeys(by_shard[shard], code))
        age_ms = 0
        for answer in gathering.answers.values():
            looked = answer.reply
            age_ms = max(age_ms, looked.answers.age_ms)
            good = set(answer.shards)
            for id_, one in zip(looked.ids, looked.answers.found, strict=True):
                if shard_of(id_, self._cluster.shard_count) in good:
                    found[id_] = one
        return found, age_ms

    def _try_s(self, deadline: float) -> float:
        """Where nodes usually take long they get more, but never so much that nobody else could be asked."""
        most_s = (deadline - trio.current_time()) / 2
        return max(self._config.try_ms / 1000, min(most_s, 2 * usual_p95_s(self._peers.values())))

    def _gathering(self, rules: Rules, hits: Callable[[R], Part]) -> Gathering[R]:
        return Gathering(rules, self._choose, self._peer, self._budget, self._counters, hits)


def _hits(reply: SearchReply) -> Part:
    return reply.hits


def _no_hits(reply: Any) -> Part:
    raise AssertionError("look-ups are not merged")


def _take_hits(shards: Sequence[int], reply: SearchReply) -> tuple[SearchReply, dict[int, str]]:
    return reply, {shard: reply.failed[shard] for shard in shards if shard in reply.failed}


def _columns(
    replies: Sequence[SearchReply], best: Merged, request: requests.Query, drop: AbstractSet[int]
) -> Columns:
    if drop:
        keep = np.flatnonzero(~np.isin(best.ids, np.array(list(drop), np.uint64)))[: request.k]
        best = Merged(best.ids[keep], best.scores[keep], best.places[keep])
    metadata: list[bytes] | None = None
    if request.metadata:
        packed = [one for reply in replies for one in reply.metadata or ()]
        metadata = [packed[place] for place in best.places.tolist()]
    return Columns(best.ids, best.scores, metadata)
