"""One question on its way to the replicas of its shards: who is asked, asked again, asked instead. Pure.

Laws (docs/fan-out.md): `exact-merge`, `one-answer`, `never-silent`, `tries-bounded`, `hedge-budget`.

Events are `start`, `answered`, `failed` and `due`; each returns what to do now: messages to send, and messages whose answers
nobody wants any more. When `open` is empty all is said: `answered_by` and `missing` hold every shard once.

What a try may come to:
- answered: its shards are answered for, unless others have answered for some of them since; what it supersedes goes.
- failed, or failed for some of its shards: these are asked for elsewhere, unless another try is out for them.
- late (its time is up, while for some shards there is nobody else): those that somebody else has are asked for there; it goes on.
- needless: all its shards have been answered for by others; it is cancelled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Generic, TypeVar

import numpy as np

from router import merge, tail
from router.coverage import Choice
from router.merge import Merged, Part
from router.peers import HedgeBudget, Peer
from router.tries import Answer, Cancel, Counters, Effect, Failed, Rules, Send, Try

# The last bit of a deadline is not worth a message.
LEFT_MIN_S = 0.001
# So often a part is asked for as many more as can matter; then for all that there can be.
MORE_ROUNDS = 1

R = TypeVar("R")


class Gathering(Generic[R]):
    """The state of one question. `choose(shards, failed, near)` says whom to ask; near: only those of this region.

    hits: the columns of a reply; not called in look-ups.
    """

    def __init__(
        self,
        rules: Rules,
        choose: Callable[[Sequence[int], Failed, bool], Choice],
        peer: Callable[[str], Peer],
        budget: HedgeBudget,
        counters: Counters,
        hits: Callable[[R], Part],
    ) -> None:
        self.open: dict[int, Try] = {}
        self.answers: dict[int, Answer[R]] = {}
        self.answered_by: dict[int, int] = {}
        # Shard → the code that says why.
        self.missing: dict[int, str] = {}
        # First hits of shards whose node failed when it was asked for more; used when nobody else answers for them.
        self.incomplete: list[Answer[R]] = []
        self.merged: Merged | None = None
        self.retry_after_ms: int | None = None
        self._rules = rules
        self._choose, self._peer = choose, peer
        self._budget, self._counters = budget, counters
        self._hits = hits
        self._ids = 0
        self._failed: set[tuple[str, int]] = set()
        # Those of them that were late and nothing else: asked once more when nobody else is left.
        self._tardy: set[tuple[str, int]] = set()
        self._reasons: dict[int, str] = {}
        self._tries: dict[int, int] = {}
        # Nothing is saved any more: who is asked after something went wrong is asked for all.
        self._full = False
        # Whether some shards are, or were, asked for twice at once.
        self.doubled = False

    # -- events ---------------------------------------------------------------------------------------------------

    def start(self, now: float, choice: Choice) -> list[Effect]:
        """choice: of all shards, made before by whoever shares it."""
        effects = self._send(choice, now)
        self._budget.first(len(effects))
        return effects + self._check(now)

    def answered(self, id: int, reply: R, failed: Mapping[int, str], now: float) -> list[Effect]:
        """failed: shards for which that node has no answer, with the code that says why."""
        this = self.open.pop(id)
        this.peer.answered(now, now - this.began, this.probe)
        good = [shard for shard in this.shards if shard not in failed] if failed else this.shards
        for shard, code in failed.items():
            self._failed.add((this.node, shard))
            self._reasons[shard] = code
        rounds = 0
        if this.more_of is not None:
            rounds = self._withdraw(this.more_of).rounds + 1
        again: Collection[int] = failed
        if good and not self._accept(id, Answer(this.node, good, this.k, reply, rounds)):
            again = [*failed, *good]
        elif this.hedge and id in self.answers:
            self._counters.hedges_won += 1
        effects = self._cancel_needless() if self.doubled else []
        effects += self._lost(again, now)
        return effects if self.open else effects + self._check(now)

    def failed(self, id: int, code: str, now: float, retry_after_ms: int | None = None) -> list[Effect]:
        this = self.open.pop(id)
        hurried = this.timeout_s < self._rules.try_s / 2
        this.peer.failed(now, now - this.began, code, this.probe, hurried=hurried)
        if retry_after_ms is not None:
            self.retry_after_ms = max(retry_after_ms, self.retry_after_ms or 0)
        if this.more_of is not None:
            self.incomplete.append(self._withdraw(this.more_of))
            self._full = True
        for shard in this.shards:
            self._failed.add((this.node, shard))
            self._reasons[shard] = code
            if code == "deadline_exceeded":
                self._tardy.add((this.node, shard))
        return self._lost(this.shards, now) + self._check(now)

    def due(self, now: float) -> list[Effect]:
        """Time has come to `next_due`."""
        effects: list[Effect] = []
        for this in list(self.open.values()):
            if this.late_at is not None and now >= this.late_at:
                this.late_at = None
                effects += self._late(this, now)
            elif this.hedge_at is not None and now >= this.hedge_at:
                this.hedge_at = None
                effects += self._hedge(this, now)
        return effects

    def next_due(self) -> float | None:
        least: float | None = None
        hedging = self._budget.any
        for this in self.open.values():
            for at in (this.late_at, this.hedge_at if hedging else None):
                if at is not None and (least is None or at < least):
                    least = at
        return least

    def abandon(self) -> None:
        """Whoever asked has gone: the outcome of what is out says nothing about anybody."""
        for this in self.open.values():
            this.peer.given_up(this.probe)
        self.open.clear()

    # -- sending --------------------------------------------------------------------------------------------------

    def _send(self, choice: Choice, now: float, *, hedge: bool = False) -> list[Effect]:
        left_s = self._rules.deadline - now
        if left_s < LEFT_MIN_S:
            late = [shard for some in choice.assigned.values() for shard in some]
            self._give_up([*late, *choice.missing], "deadline_exceeded")
            return []
        self._give_up(choice.missing, "unavailable")
        return [
            self._ask(node, shards, now, left_s, choice.single, hedge=hedge)
            for node, shards in choice.assigned.items()
        ]

    def _ask(
        self,
        node: str,
        shards: Sequence[int],
        now: float,
        left_s: float,
        single: AbstractSet[int],
        *,
        hedge: bool,
    ) -> Send:
        rules = self._rules
        peer = self._peer(node)
        limit_s = rules.try_s
        others = {s for name, s in self._tardy if name != node} if self._tardy else ()
        alone = [
            s for s in shards if (s in single and s not in others) or self._tries.get(s, 0) >= rules.retries
        ]
        late_at = None
        if alone or limit_s >= left_s:
            if len(alone) < len(shards) and limit_s < left_s:
                late_at = now + limit_s
            limit_s = left_s
        after_s = None if hedge or len(alone) == len(shards) else peer.hedge_after_s()
        k = rules.k
        if k and not self._full and len(shards) < rules.total:
            k = tail.enough(k, len(shards), rules.total)
        return self._begin(
            Try(
                node, peer, shards, k, now, limit_s, False, hedge, late_at=late_at,
                hedge_at=now + after_s if after_s is not None and after_s < limit_s else None,
            )
        )  # fmt: skip

    def _begin(self, this: Try) -> Send:
        self._ids += 1
        self._counters.messages += 1
        this.probe = this.peer.began(this.began)
        self.open[self._ids] = this
        return Send(self._ids, this.node, this.shards, this.k, this.timeout_s)

    def _hedge(self, this: Try, now: float) -> list[Effect]:
        elsewhere = self._failed | {(this.node, shard) for shard in this.shards}
        choice = self._choose(this.shards, elsewhere, True)
        # What it could not cover we would have to wait for anyway.
        if choice.missing or self._rules.deadline - now < LEFT_MIN_S:
            return []
        if not self._budget.take(len(choice.assigned)):
            return []
        self._counters.hedges += len(choice.assigned)
        self.doubled = True
        return self._send(choice, now, hedge=True)

    def _late(self, this: Try, now: float) -> list[Effect]:
        """Those of its shards that somebody else has are asked for there; for the others it goes on."""
        self._counters.late += 1
        retries = self._rules.retries
        late = [s for s in this.shards if s not in self.answered_by and self._tries.get(s, 0) < retries]
        choice = self._choose(late, self._failed | {(this.node, shard) for shard in late}, False)
        for shard in (shard for some in choice.assigned.values() for shard in some):
            self._failed.add((this.node, shard))
            self._reasons[shard] = "deadline_exceeded"
            self._tries[shard] = self._tries.get(shard, 0) + 1
        self.doubled = self._full = True
        return self._send(choice._replace(missing=()), now)

    # -- outcomes -------------------------------------------------------------------------------------------------

    def _accept(self, id: int, answer: Answer[R]) -> bool:
        """False when it can be combined with what is there only by asking for less: parts must not overlap."""
        by = self.answered_by
        others = {by[shard] for shard in answer.shards if shard in by} if by else set()
        if others:
            shards = set(answer.shards)
            if all(shard in by for shard in shards):
                return True  # nothing new
            if any(not shards.issuperset(self.answers[other].shards) for other in others):
                return False
            for other in others:
                del self.answers[other]
        self.answers[id] = answer
        for shard in answer.shards:
            by[shard] = id
        return True

    def _withdraw(self, id: int) -> Answer[R]:
        answer = self.answers.pop(id)
        for shard in answer.shards:
            del self.answered_by[shard]
        return answer

    def _lost(self, shards: Collection[int], now: float) -> list[Effect]:
        """To be asked for elsewhere, those that nobody has answered for and nobody is out for."""
        if not shards:
            return []
        todo: list[int] = []
        gone: list[int] = []
        out = {shard for this in self.open.values() for shard in this.shards} if self.open else ()
        for shard in shards:
            if shard in self.answered_by or shard in self.missing or shard in out:
                continue
            tries = self._tries[shard] = self._tries.get(shard, 0) + 1
            (todo if tries <= self._rules.retries else gone).append(shard)
        self._give_up(gone, "unavailable")
        if not todo:
            return []
        effects = self._send(self._choose_again(todo), now)
        self._counters.retries += len(effects)
        return effects

    def _choose_again(self, shards: Sequence[int]) -> Choice:
        """Who has not failed them; else who was only late: a busy moment is no reason to have nobody."""
        # There may be no time to ask again for more.
        self._full = True
        choice = self._choose(shards, self._failed, False)
        if not choice.missing or not self._tardy:
            return choice
        late = self._choose(choice.missing, self._failed - self._tardy, False)
        assigned = {name: [*some] for name, some in choice.assigned.items()}
        for name, some in late.assigned.items():
            assigned.setdefault(name, []).extend(some)
        return Choice(assigned, late.missing, choice.single | late.single)

    def _give_up(self, shards: Iterable[int], code: str) -> None:
        for shard in shards:
            self.missing[shard] = self._reasons.get(shard, code)

    def _cancel_needless(self) -> list[Effect]:
        by = self.answered_by
        needless = [
            id
            for id, this in self.open.items()
            if this.more_of is None and all(shard in by for shard in this.shards)
        ]
        effects: list[Effect] = []
        for id in needless:
            this = self.open.pop(id)
            this.peer.given_up(this.probe)
            self._counters.needless += 1
            effects.append(Cancel(id))
        return effects

    # -- is it enough? --------------------------------------------------------------------------------------------

    def _check(self, now: float) -> list[Effect]:
        """When all is in: merge, and ask those for more whose hits may go on among the best k."""
        k = self._rules.k
        if self.open or not k:
            return []
        for answer in self.incomplete:
            if all(shard in self.missing for shard in answer.shards):
                self._ids += 1
                self.answers[self._ids] = answer
        self.incomplete = []
        parts = [self._hits(answer.reply) for answer in self.answers.values()]
        self.merged = merge.top(parts, k)
        if len(parts) == 1 and next(iter(self.answers.values())).asked >= k:
            return []
        left_s = self._rules.deadline - now
        effects: list[Effect] = []
        for id, wanted in self._short(parts, self.merged):
            answer = self.answers[id]
            if answer.shards[0] in self.missing:
                continue  # these hits are all that there are of it
            if left_s < LEFT_MIN_S:
                for shard in answer.shards:
                    del self.answered_by[shard]
                self._give_up(answer.shards, "deadline_exceeded")
                continue
            self._counters.more += 1
            peer = self._peer(answer.node)
            elsewhere = self._failed | {(answer.node, shard) for shard in answer.shards}
            alone = self._choose(answer.shards, elsewhere, False).missing
            limit_s = left_s if alone else min(left_s, self._rules.try_s)
            this = Try(answer.node, peer, answer.shards, wanted, now, limit_s, False, False, more_of=id)
            effects.append(self._begin(this))
        return effects

    def _short(self, parts: Sequence[Part], merged: Merged) -> list[tuple[int, int]]:
        """Answers that may go on among the best k, and for how many to ask them."""
        k = self._rules.k
        sizes = [len(part[0]) for part in parts]
        places = np.full(sum(sizes), k, np.int64)
        places[merged.places] = np.arange(len(merged.places))
        short = []
        end = 0
        for (id, answer), size in zip(self.answers.items(), sizes, strict=True):
            end += size
            if size < answer.asked or answer.asked >= k:
                continue
            wanted = tail.more(answer.asked, k, int(places[end - 1]))
            if wanted:
                short.append((id, k if answer.rounds >= MORE_ROUNDS else min(k, wanted)))
        return short
