"""All of gossip behind one pure machine: (event, now) → effects. The laws are in docs/gossip.md."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from random import Random
from typing import Any

from gossip.buckets import ItemTable, Ref
from gossip.codec import CLUSTER_PART_BYTES, PARTS_BYTES_MAX, size_of
from gossip.config import GossipConfig
from gossip.effects import Effect, Event, Send, Superseded
from gossip.facts import Facts
from gossip.member import Me, Member, MemberView
from gossip.membership import Membership
from gossip.messages import (
    Ack,
    Address,
    Buckets,
    Claim,
    Digest,
    Fact,
    Hot,
    Join,
    Nack,
    Part,
    Ping,
    PingReq,
    Root,
    State,
    Want,
)
from gossip.probing import Prober
from gossip.repair import Repair
from gossip.rumours import Budget, Rumours
from gossip.timers import Timers

# News that ride on pings and answers take no more than this.
RIDE_BYTES = 400
TELL_EVERY_S = 0.5
# So many members hear a good-bye directly; the others by rumour.
GOODBYES_MAX = 128


class Machine:
    """Gossip of one node. Time is monotonic seconds, given by the caller; packets come already opened and decoded."""

    def __init__(
        self, config: GossipConfig, *, id: int, boot: int, address: Address, random: Random, now: float
    ) -> None:
        self._config, self._random = config, random
        self._me = Me(id, boot, address)
        self._out: list[Effect] = []
        self._timers = Timers()
        self._items = ItemTable()
        self._facts = Facts(id, boot, self._items, origins_max=config.members_max + 1)
        self._claims, self._cold, self._hot = Rumours(), Rumours(), Rumours()
        self._prober = Prober(config, self._me, timers=self._timers, random=random, send=self._send)
        self._table = Membership(
            config,
            self._me,
            items=self._items,
            facts=self._facts,
            rumours=self._claims,
            timers=self._timers,
            out=self._out,
            burst=self._prober.burst,
            tell=self._tell,
        )
        self._repair = Repair(
            config,
            self._me,
            items=self._items,
            facts=self._facts,
            table=self._table,
            timers=self._timers,
            random=random,
            pick=self._prober.pick,
            send=self._send,
        )
        self._cold_budget = Budget(config.cold_bytes_per_s, now)
        self._hot_budget = Budget(config.hot_bytes_per_s, now)
        self._seeds: list[Address] = []
        # Who answered at a seed's address: while it lives, the seed needs no trying.
        self._behind_seed: dict[Address, int] = {}
        self._retry_s = config.retry_min_s
        self._tries = 0
        self._telling = False
        self._told_at = now - config.rumour_s
        self._sends = 1
        self._started = now
        self._counters = {"packets_in": 0, "packets_out": 0, "streams_out": 0, "unannounced": 0}
        self._on: dict[type, Callable[[Any, Address, int, float], None]] = {
            Ping: self._on_ping,
            Ack: lambda part, source, sender, now: self._prober.on_ack(part, sender, now),
            PingReq: lambda part, source, sender, now: self._prober.on_ping_req(part, source, now),
            Nack: lambda part, source, sender, now: self._prober.on_nack(part),
            Claim: lambda part, source, sender, now: self._table.on_claim(part, now),
            Fact: self._on_fact,
            Hot: self._on_hot,
            Root: self._repair.on_root,
            Buckets: self._repair.on_buckets,
            Digest: self._repair.on_digest,
            Want: self._repair.on_want,
            Join: self._repair.on_join,
        }

    # -- events ---------------------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float:
        """When `on_timer` wants to be called; infinity: never."""
        return self._timers.next_deadline

    def start(self, seeds: Sequence[Address], now: float) -> list[Effect]:
        self._prober.start(self._table, now)
        self.set_seeds(seeds)
        self._repair.start(now)
        self._timers.at(now + self._config.retry_min_s, self._retry)
        for seed in self._open_seeds()[:3]:
            self._send(seed, self._join_parts(), True, now)
        return self._effects(now)

    def set_seeds(self, seeds: Sequence[Address]) -> None:
        self._seeds = list(dict.fromkeys(seeds))
        self._random.shuffle(self._seeds)
        self._behind_seed = {seed: id for seed, id in self._behind_seed.items() if seed in self._seeds}

    def on_timer(self, now: float) -> list[Effect]:
        if now - self._timers.next_deadline > self._config.late_s:
            self._prober.doubt_ourselves(now)
            self._table.doubt_ourselves(now)
        self._timers.run(now)
        return self._effects(now)

    def on_packet(
        self, sender: int, boot: int, source: Address, parts: Sequence[Part], now: float
    ) -> list[Effect]:
        self._counters["packets_in"] += 1
        if sender == self._me.id:
            if boot == self._me.boot:
                self._note_seed(source, sender)  # a seed that is ourselves
                return []
            if boot > self._me.boot:
                self._out.append(Superseded(boot))
        else:
            self._note_seed(source, sender)
            self._hear(sender, boot, now)
        on = self._on
        for part in parts:
            on[type(part)](part, source, sender, now)
        return self._effects(now)

    def _note_seed(self, source: Address, id: int) -> None:
        if source in self._seeds:
            self._behind_seed[source] = id

    def _hear(self, sender: int, boot: int, now: float) -> None:
        member = self._table.members.get(sender)
        if member is None or member.boot != boot:
            return
        member.heard_at = now
        if member.state in (State.DOWN, State.LEFT) or member.suspicion is not None:
            self._tell(member, now)

    def on_stream_failed(self, address: Address, refused: bool, now: float) -> list[Effect]:
        """A stream to `address` could not be had; `refused`: its host says that nobody listens there."""
        self._prober.on_stream_failed(address, refused, now)
        return self._effects(now)

    def on_link_lost(self, id: int, now: float) -> list[Effect]:
        """A connection to that member was reset: find out at once."""
        member = self._table.members.get(id)
        if member is not None and member.state in (State.ALIVE, State.SUSPECT):
            self._prober.burst(member, now)
        return self._effects(now)

    def set_fact(self, key: bytes, value: bytes, now: float) -> list[Effect]:
        """Say something of ourselves to everybody. Raises FactError when it is over a bound."""
        fact = self._facts.set(key, value)
        if fact is not None:
            self._cold.put((fact.origin, key), fact)
        return self._effects(now)

    def set_hot(self, value: bytes, now: float) -> list[Effect]:
        """Our vector of fast-changing numbers. Raises FactError."""
        hot = self._facts.set_hot(value)
        if hot is not None:
            self._hot.put(hot.origin, hot)
        return self._effects(now)

    def set_address(self, address: Address, now: float) -> list[Effect]:
        if address != self._me.address:
            self._table.publish_address(address)
        return self._effects(now)

    def leave(self, now: float) -> list[Effect]:
        """Say good-bye to all; the process may end a moment later."""
        if not self._me.leaving:
            self._table.leave()
            for member in self._prober.pick(GOODBYES_MAX):
                self._send(member.address, [self._me.claim()], False, now)
        return self._effects(now)

    def forget(self, id: int, now: float) -> list[Effect]:
        """An operator says that a down member will not come back. If it lives it refutes that."""
        member = self._table.members.get(id)
        if member is not None and member.state is State.DOWN:
            claim = member.claim(self._me.id)._replace(state=State.LEFT)
            self._table.on_claim(claim, now)
        return self._effects(now)

    # -- what comes in --------------------------------------------------------------------------------------------

    def _on_ping(self, part: Ping, source: Address, sender: int, now: float) -> None:
        self._prober.on_ping(part, source, self._table.members.get(sender), now)

    def _on_fact(self, part: Fact, source: Address, sender: int, now: float) -> None:
        if part.origin == self._me.id:
            self._outbid(part, self._cold, (part.origin, part.key))
        elif self._announced(part, Ref("f", part.origin, part.key), source, now) and self._facts.merge(part):
            self._cold.put((part.origin, part.key), part)
            self._out.append(Event("fact", part.origin, now, part.boot, 0, key=part.key))

    def _on_hot(self, part: Hot, source: Address, sender: int, now: float) -> None:
        if part.origin == self._me.id:
            self._outbid(part, self._hot, part.origin)
        elif self._announced(part, Ref("h", part.origin), source, now) and self._facts.merge_hot(part):
            self._hot.put(part.origin, part)

    def _announced(self, part: Fact | Hot, ref: Ref, source: Address, now: float) -> bool:
        """Whether its origin is a member, and in that boot. Facts of nobody would be passed on forever;
        those that came before their claim are asked for with it."""
        member = self._table.members.get(part.origin)
        if member is not None and member.boot == part.boot and member.state is not State.LEFT:
            return True
        self._counters["unannounced"] += 1
        if member is None or member.boot < part.boot:
            self._repair.ask(ref, source, now)
        return False

    def _outbid(self, part: Fact | Hot, rumours: Rumours, key: Hashable) -> None:
        mine = self._facts.outbid(part)
        if mine is not None:
            rumours.put(key, mine)

    # -- sending --------------------------------------------------------------------------------------------------

    def _send(self, address: Address, parts: list[Part], stream: bool, now: float) -> None:
        if stream:
            self._counters["streams_out"] += 1
        else:
            self._counters["packets_out"] += 1
            if self._claims:
                room = PARTS_BYTES_MAX - sum(map(size_of, parts))
                self._claims.take(parts, min(room, RIDE_BYTES), self._sends)
        self._out.append(Send(address, tuple(parts), stream))

    def _effects(self, now: float) -> list[Effect]:
        """What this event brought, and the rumour timer set when there is something to tell."""
        if not self._telling and (self._claims or self._cold or self._hot):
            self._telling = True
            # At once if nothing was told lately: news need not wait for a beat.
            self._timers.at(max(now, self._told_at + self._config.rumour_s), self._tell_rumours)
        effects = self._out[:]
        self._out.clear()
        return effects

    def _tell_rumours(self, now: float) -> None:
        config = self._config
        self._told_at = now
        self._sends = config.sends(len(self._table.ring))
        targets = self._prober.pick(config.fanout)
        for place, member in enumerate(targets):
            parts: list[Part] = []
            used = self._claims.take(parts, PARTS_BYTES_MAX, self._sends) if self._claims else 0
            if self._cold:
                # Cold facts leave half of what is left to the hot ones, if there are any: but for the first packet, because
                # the largest of them need a whole one.
                room = (PARTS_BYTES_MAX - used) // (2 if self._hot and place else 1)
                cold = self._cold.take(parts, min(room, self._cold_budget.left(now)), self._sends)
                self._cold_budget.spend(cold)
                used += cold
            if self._hot:
                room = min(PARTS_BYTES_MAX - used, self._hot_budget.left(now))
                hot = self._hot.take(parts, room, config.hot_sends)
                # Nearly all packets of a busy cluster are theirs, so they pay for what each of those says of the cluster.
                self._hot_budget.spend(hot + (CLUSTER_PART_BYTES if hot else 0))
            if parts:
                self._counters["packets_out"] += 1
                self._out.append(Send(member.address, tuple(parts)))
        # Without anybody to tell, news wait until somebody is there.
        self._telling = bool(self._claims or self._cold or self._hot)
        if self._telling:
            self._timers.at(now + config.rumour_s, self._tell_rumours)

    def _tell(self, member: Member, now: float) -> None:
        """What is said of it, to the member itself, which alone can put it right."""
        if now - member.told_at < TELL_EVERY_S:
            return
        member.told_at = now
        claim = member.claim(self._me.id)
        if member.state is State.ALIVE:
            # We have just cleared it; others may still suspect it.
            claim = claim._replace(state=State.SUSPECT)
        self._send(member.address, [claim], False, now)

    # -- joining, and those who are away ------------------------------------------------------------------------

    def _join_parts(self) -> list[Part]:
        return [*self._repair.own_parts(), Join()]

    def _open_seeds(self) -> list[Address]:
        """Seeds at whose addresses nobody is known to be alive."""
        if not self._seeds:
            return []
        taken = {self._me.address}
        for id in self._table.ring:
            member = self._table.members.get(id)
            if member is not None:
                taken.add(member.address)
        ring = set(self._table.ring)
        return [seed for seed in self._seeds if seed not in taken and self._behind_seed.get(seed) not in ring]

    def _retry(self, now: float) -> None:
        """One of the down or of the seeds; every other time over TCP, in case UDP does not get through."""
        config = self._config
        if self._me.leaving:
            return
        down = list(self._table.down.values())
        away: list[Member | Address] = [*down, *self._open_seeds()]
        if not away:
            self._retry_s = config.retry_min_s
            self._timers.at(now + self._retry_s, self._retry)
            return
        self._tries += 1
        for chosen in self._random.sample(away, min(len(away), 2 if len(self._table.ring) == 1 else 1)):
            self._try(chosen, now)
        self._timers.at(now + self._retry_s * (0.75 + self._random.random() / 2), self._retry)
        self._retry_s = min(self._retry_s * 1.25, config.retry_max_s)

    def _try(self, chosen: Member | Address, now: float) -> None:
        if isinstance(chosen, Member):
            if self._tries % 2:
                self._send(
                    chosen.address,
                    [self._prober.hello(chosen.id, now), self._me.claim(), chosen.claim(self._me.id)],
                    False,
                    now,
                )
            else:
                self._send(
                    chosen.address,
                    [self._me.claim(), chosen.claim(self._me.id), self._repair.root()],
                    True,
                    now,
                )
        elif self._tries % 2:
            self._send(
                chosen, [self._prober.hello(0, now), self._me.claim(), self._repair.root()], False, now
            )
        else:
            self._send(chosen, self._join_parts(), True, now)

    # -- reading --------------------------------------------------------------------------------------------------

    def members(self) -> list[MemberView]:
        """All but those who left, this node included, by id."""
        me = self._me
        mine = MemberView(me.id, me.boot, me.incarnation, State.ALIVE, me.address, self._started, None, None)
        others = [
            MemberView(m.id, m.boot, m.incarnation, m.state, m.address, m.since, m.heard_at, m.rtt_s)
            for m in self._table.members.values()
            if m.state is not State.LEFT
        ]
        return sorted([mine, *others], key=lambda view: view.id)

    def member_state(self, id: int) -> State | None:
        member = self._table.members.get(id)
        return member.state if member is not None else None

    def facts(self, id: int) -> Mapping[bytes, bytes]:
        return self._facts.view(id)

    def hot(self, id: int) -> bytes:
        return self._facts.hot(id)

    def statistics(self) -> dict[str, int]:
        """Counters since the start, and sizes."""
        return {
            **self._counters,
            **self._prober.counters,
            **self._repair.counters,
            "members": len(self._table.ring),
            "down": len(self._table.down),
            "health": self._me.health,
            "incarnation": self._me.incarnation,
            "rumours": len(self._claims) + len(self._cold) + len(self._hot),
            "refused": self._table.refused + self._facts.refused,
        }
