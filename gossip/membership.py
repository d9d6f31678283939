"""The member table: what is claimed of whom, suspicion, refutation, death. Pure. SWIM (2002) with Lifeguard (2017).

Laws (docs/gossip.md, where the table of transitions is):
* `order`: claims of one member are ordered by (boot, incarnation, state); a lower one changes nothing.
* `own-word`: we alone raise our incarnation, and do so when a claim of it says that we are not alive.
* `two-evidences`: whom we hold alive is not dead because somebody says so; that starts a suspicion, and death is declared
  only when our own burst of pings has failed as well. Whom we suspect already, we believe to be dead when another declares it.
* `self-doubt`: after a stall every suspicion gets more time, and no burst that ran meanwhile counts.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable

from gossip.buckets import ItemTable, Ref, item_of
from gossip.config import INCARNATION_MAX, GossipConfig
from gossip.effects import Effect, Event, EventKind, Superseded
from gossip.facts import Facts
from gossip.member import Me, Member, Suspicion
from gossip.messages import Address, Claim, State
from gossip.rumours import Rumours
from gossip.timers import Timers

# Accusers of one incarnation who are remembered after it was cleared.
CLEARED_MAX = 64


class Membership:
    """`burst(member)` asks for a burst of pings; its end is told by `burst_failed` or, by an answer, `vouch`."""

    def __init__(
        self,
        config: GossipConfig,
        me: Me,
        *,
        items: ItemTable,
        facts: Facts,
        rumours: Rumours,
        timers: Timers,
        out: list[Effect],
        burst: Callable[[Member, float], None],
        tell: Callable[[Member, float], None],
    ) -> None:
        self._config, self._me = config, me
        self._items, self._facts, self._rumours, self._timers, self._out = items, facts, rumours, timers, out
        self._burst, self._tell = burst, tell
        self.members: dict[int, Member] = {}
        # Ids of everybody who may be alive, ourselves included, in ring order.
        self.ring: list[int] = [me.id]
        self.down: dict[int, Member] = {}
        self.refused = 0
        self._publish_me()

    # -- news -----------------------------------------------------------------------------------------------------

    def on_claim(self, claim: Claim, now: float) -> None:
        if claim.id == self._me.id:
            self._on_claim_of_me(claim)
            return
        member = self.members.get(claim.id)
        if member is None:
            self._on_unknown(claim, now)
            return
        if (claim.boot, claim.incarnation) > (member.boot, member.incarnation):
            self._on_newer(member, claim, now)
        elif (claim.boot, claim.incarnation) == (member.boot, member.incarnation):
            self._on_same(member, claim, now)

    def _on_unknown(self, claim: Claim, now: float) -> None:
        if claim.state is State.LEFT:
            return  # nobody whom we would have to try
        if len(self.members) >= self._config.members_max and not self._make_room():
            self.refused += 1
            return
        item = item_of(Ref("c", claim.id))
        # A suspicion begins below, with its timer.
        state = State.ALIVE if claim.state is State.SUSPECT else claim.state
        member = Member(claim.id, claim.boot, claim.incarnation, state, claim.address, now, item)
        self.members[claim.id] = member
        self._place(member)
        if state is State.ALIVE:
            self._event("joined", member, claim.by, now)
        self._spread(member, claim.by)
        if claim.state is State.SUSPECT:
            self._accuse(member, claim.by, now)

    def _make_room(self) -> bool:
        """Who has left makes room, whoever was known first."""
        for member in self.members.values():
            if member.state is State.LEFT:
                self._forget(member)
                return True
        return False

    def _on_newer(self, member: Member, claim: Claim, now: float) -> None:
        """A greater boot or incarnation: what was said of the former is void."""
        before = member.state
        restarted = claim.boot > member.boot
        kind: EventKind | None = None
        if restarted:
            self._facts.raise_boot(member.id, claim.boot)
            kind = "joined" if before is State.LEFT else "restarted"
        elif before is State.LEFT:
            kind = "returned"  # an operator had given it up
        elif claim.state in (State.ALIVE, State.SUSPECT):
            if before is State.DOWN:
                kind = "returned"
            elif before is State.SUSPECT:
                kind = "refuted"
            elif claim.address != member.address:
                kind = "moved"
        if claim.state is State.DOWN:
            # Whom we suspect ourselves, or on an accuser's word, we believe to be dead; hearsay is not enough.
            buried = before is not State.ALIVE and not (
                member.suspicion is not None and member.suspicion.hearsay
            )
        else:
            buried = claim.state is State.LEFT and self._may_leave(member, claim)
        self._end_suspicion(member)
        member.boot, member.incarnation, member.address = claim.boot, claim.incarnation, claim.address
        member.cleared.clear()
        member.state, member.since = State.ALIVE, now
        if buried:
            self._bury(member, claim, now)
            return
        self._place(member)
        if kind is not None:
            self._event(kind, member, claim.by, now)
        if claim.state is State.DOWN:
            self._doubt_life(member, claim.by, now)
            return
        if claim.state is State.LEFT:
            self._tell(member, now)
            return
        self._spread(member, claim.by)
        if claim.state is State.SUSPECT:
            self._accuse(member, claim.by, now)

    def _on_same(self, member: Member, claim: Claim, now: float) -> None:
        if claim.state is State.SUSPECT:
            if member.state in (State.ALIVE, State.SUSPECT):
                self._accuse(member, claim.by, now)
        elif claim.state is State.DOWN:
            if member.suspicion is not None and not member.suspicion.hearsay:
                self._bury(member, claim, now)
            elif member.state is State.ALIVE and claim.by not in member.cleared:
                self._doubt_life(member, claim.by, now)
        elif claim.state is State.LEFT and member.state is not State.LEFT:
            if self._may_leave(member, claim):
                self._bury(member, claim, now)
            else:
                self._tell(member, now)

    def _may_leave(self, member: Member, claim: Claim) -> bool:
        """By its own word, or an operator's about one whom we do not hold alive."""
        return claim.by == member.id or member.state in (State.DOWN, State.LEFT)

    def _bury(self, member: Member, claim: Claim, now: float) -> None:
        self._end_suspicion(member)
        member.state, member.since = claim.state, now
        member.left_by = claim.by if claim.state is State.LEFT else 0
        self._place(member)
        self._event("left" if claim.state is State.LEFT else "down", member, claim.by, now)
        self._spread(member, claim.by)
        if claim.state is State.LEFT:
            # Those who join later do not hear of it; its facts would differ for as long as we remember it.
            self._facts.forget(member.id)
            self._timers.at(now + self._config.left_keep_s, self._forget_left, member)

    def _forget_left(self, member: Member, now: float) -> None:
        # It may have come back meanwhile, and left again since.
        if member.state is State.LEFT and now >= member.since + self._config.left_keep_s:
            self._forget(member)

    def _forget(self, member: Member) -> None:
        if self.members.get(member.id) is member:
            del self.members[member.id]
            self._items.drop(member.item, "c")
            self._facts.forget(member.id)

    def _on_claim_of_me(self, claim: Claim) -> None:
        me = self._me
        if claim.boot > me.boot:
            self._out.append(Superseded(claim.boot))
            return
        about_now = claim.boot == me.boot and claim.incarnation >= me.incarnation
        if not about_now or me.leaving:
            return
        if claim.state is State.ALIVE and claim.incarnation == me.incarnation:
            return
        # Who stands at the last one was pushed there: only a restart, with its greater boot, can refute more.
        me.incarnation = min(claim.incarnation + 1, INCARNATION_MAX)
        if claim.state is not State.ALIVE:
            # That others could think so may well be our own slowness (Lifeguard, section IV-A).
            me.health = min(me.health + 1, self._config.health_max)
        self._publish_me()

    def publish_address(self, address: Address) -> None:
        self._me.address = address
        self._me.incarnation = min(self._me.incarnation + 1, INCARNATION_MAX)
        self._publish_me()

    def leave(self) -> None:
        self._me.leaving = True
        self._publish_me()

    def _publish_me(self) -> None:
        me = self._me
        ref = Ref("c", me.id)
        state = State.LEFT if me.leaving else State.ALIVE
        self._items.put(item_of(ref), ref, me.boot << 32 | me.incarnation << 2 | state)
        self._rumours.put((me.id, 0), me.claim())

    # -- suspicion ------------------------------------------------------------------------------------------------

    def accuse(self, member: Member, now: float, *, burst_failed: bool = False) -> None:
        """Our own probe of it has failed."""
        if member.state not in (State.ALIVE, State.SUSPECT):
            return
        member.cleared.discard(self._me.id)
        self._accuse(member, self._me.id, now)
        suspicion = member.suspicion
        assert suspicion is not None
        if burst_failed:
            suspicion.burst_failed_at = now
        if not suspicion.mine:
            suspicion.mine = True
            verify_at = suspicion.started + self._config.suspicion_min_s - self._config.burst_deadline_s
            self._timers.at(max(now, verify_at), self._verify, member, suspicion)
            self._set_deadline(member, suspicion, now)

    def _accuse(self, member: Member, by: int, now: float) -> None:
        if by in member.cleared:
            return
        suspicion = member.suspicion
        if suspicion is None:
            suspicion = self._suspect(member, by, now)
        elif suspicion.hearsay:
            suspicion.hearsay = False
            suspicion.accusers.add(by)
        elif by in suspicion.accusers or len(suspicion.accusers) > self._config.confirmations:
            return
        else:
            suspicion.accusers.add(by)
        self._rumours.put((member.id, by), member.claim(by))
        self._set_deadline(member, suspicion, now)

    def _doubt_life(self, member: Member, by: int, now: float) -> None:
        """Somebody declares dead whom we hold alive, as after a split. We pass it on to nobody but the member itself:
        it answers for itself, or our burst fails as well."""
        suspicion = self._suspect(member, by, now)
        suspicion.hearsay = True
        suspicion.deadline = now + self._config.suspicion_min_s
        self._timers.at(suspicion.deadline, self._due, member, suspicion)

    def _suspect(self, member: Member, by: int, now: float) -> Suspicion:
        suspicion = member.suspicion = Suspicion(now, math.inf, {by})
        member.state, member.since = State.SUSPECT, now
        self._event("suspected", member, by, now)
        self._tell(member, now)
        return suspicion

    def _set_deadline(self, member: Member, suspicion: Suspicion, now: float) -> None:
        config = self._config
        lasts = config.suspicion_s(len(suspicion.accusers) - 1, len(self.ring))
        deadline = suspicion.started + lasts + (0.0 if suspicion.mine else config.bystander_s)
        if deadline < suspicion.deadline:
            suspicion.deadline = deadline
            self._timers.at(max(now, deadline), self._due, member, suspicion)

    def _verify(self, member: Member, suspicion: Suspicion, now: float) -> None:
        if member.suspicion is suspicion and suspicion.burst_failed_at is None:
            self._burst(member, now)

    def _due(self, member: Member, suspicion: Suspicion, now: float) -> None:
        if member.suspicion is not suspicion:
            return
        if now < suspicion.deadline:
            return  # it was put off; another timer is set
        failed_at = suspicion.burst_failed_at
        if failed_at is not None and now - failed_at <= self._config.suspicion_min_s:
            self.declare(member, now)
        else:
            self._burst(member, now)

    def burst_failed(self, member: Member, now: float, *, refused: bool) -> None:
        """Nothing came back. refused: its host says that nobody listens on that port."""
        if member.state is State.ALIVE:
            self.accuse(member, now, burst_failed=True)
        suspicion = member.suspicion
        if suspicion is None:
            return
        suspicion.burst_failed_at = now
        # Hearsay: somebody has declared it dead already, and now we have evidence of our own.
        if refused or suspicion.hearsay or now >= suspicion.deadline:
            self.declare(member, now)

    def declare(self, member: Member, now: float) -> None:
        claim = Claim(member.id, member.boot, member.incarnation, State.DOWN, member.address, self._me.id)
        self._bury(member, claim, now)

    def vouch(self, member: Member, now: float) -> None:
        """A round trip with it has been completed: we need no longer suspect this incarnation."""
        suspicion = member.suspicion
        if suspicion is None:
            return
        if len(member.cleared) > CLEARED_MAX:
            member.cleared.clear()
        member.cleared |= suspicion.accusers
        self._end_suspicion(member)
        member.state, member.since = State.ALIVE, now
        self._event("refuted", member, self._me.id, now)
        # Others may still hold what we have just seen refuted: it shall tell them so itself.
        self._tell(member, now)

    def doubt_ourselves(self, now: float) -> None:
        """We were stalled: whom we suspect may have answered meanwhile."""
        for id in self.ring:
            member = self.members.get(id)
            if member is not None and (suspicion := member.suspicion) is not None:
                suspicion.burst_failed_at = None
                suspicion.deadline = max(suspicion.deadline, now + self._config.suspicion_min_s)
                self._timers.at(suspicion.deadline, self._due, member, suspicion)

    def _end_suspicion(self, member: Member) -> None:
        suspicion = member.suspicion
        if suspicion is not None:
            for accuser in suspicion.accusers:
                self._rumours.discard((member.id, accuser))
            member.suspicion = None

    # -- the table ------------------------------------------------------------------------------------------------

    def _place(self, member: Member) -> None:
        """Into the ring or out of it, and its version into the items."""
        place = bisect_left(self.ring, member.id)
        inside = place < len(self.ring) and self.ring[place] == member.id
        alive = member.state in (State.ALIVE, State.SUSPECT)
        if alive and not inside:
            insort(self.ring, member.id)
        elif inside and not alive:
            del self.ring[place]
        if member.state is State.DOWN:
            self.down[member.id] = member
        else:
            self.down.pop(member.id, None)
        self._items.put(member.item, Ref("c", member.id), member.version)

    def _spread(self, member: Member, by: int) -> None:
        self._rumours.put((member.id, 0), member.claim(by))

    def _event(self, kind: EventKind, member: Member, by: int, now: float) -> None:
        self._out.append(Event(kind, member.id, now, member.boot, member.incarnation, by))
