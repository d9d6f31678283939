"""Whom to probe when, and what became of it: pings, relays, TCP, bursts. Pure.

All nodes walk one ring in step: in round r the node at place i probes place i + 1 + (r mod (N - 1)). The round travels in
every ping and everybody takes the greater, so each member is probed once in each round and by another node each time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from gossip.config import GossipConfig
from gossip.member import Me, Member
from gossip.membership import Membership
from gossip.messages import Ack, Address, Nack, Part, Ping, PingReq, State
from gossip.timers import Timers

# A relay says that it has had no answer before the asker's own time is up.
NACK_AFTER = 0.5
# Answers that come late still clear a suspicion.
LATE_ANSWERS_S = 5.0
RELAYED_MAX = 4_096

Sender = Callable[[Address, list[Part], bool, float], None]


@dataclass(slots=True, eq=False)
class Probe:
    """One probe, or one burst, under one sequence number."""

    seq: int
    member: Member
    # Of the member when it began: what is found says nothing about a later life of it.
    life: tuple[int, int]
    started: float
    burst: bool
    void: bool = False
    answered: bool = False
    finished: bool = False
    refused: bool = False
    relays: int = 0
    nacks: int = 0
    pings: int = 0


class Prober:
    """Reads the member table and tells it what it finds."""

    def __init__(
        self,
        config: GossipConfig,
        me: Me,
        *,
        timers: Timers,
        random: Random,
        send: Sender,
    ) -> None:
        self._config, self._me, self._timers, self._random, self._send = config, me, timers, random, send
        self._seq = random.getrandbits(32)
        self._probes: dict[int, Probe] = {}
        self._probing: set[int] = set()
        self._bursting: dict[int, Probe] = {}
        # Our seq of a relayed ping → who asked, under which seq; answered or not.
        self._relayed: dict[int, tuple[Address, int]] = {}
        self._round, self._round_at = random.getrandbits(16), 0.0
        self.table: Membership
        self.counters = {"probes": 0, "failed_probes": 0, "bursts": 0, "failed_bursts": 0, "stalls": 0}

    def start(self, table: Membership, now: float) -> None:
        self.table = table
        self._round_at = now
        self._timers.at(now + self._random.random() * self._config.probe_s, self.tick)

    # -- rounds ---------------------------------------------------------------------------------------------------

    def _round_now(self, now: float) -> int:
        steps = int((now - self._round_at) / self._config.probe_s)
        if steps > 0:
            self._round += steps
            self._round_at += steps * self._config.probe_s
        return self._round & 0xFFFFFFFF

    def _see_round(self, theirs: int, now: float) -> None:
        # Greater by serial number arithmetic: the number wraps.
        if 0 < (theirs - self._round_now(now)) & 0xFFFFFFFF < 1 << 31:
            self._round, self._round_at = theirs, now

    def tick(self, now: float) -> None:
        if self._me.leaving:
            return
        self._timers.at(now + self._config.probe_s * (1 + self._me.health), self.tick)
        ring = self.table.ring
        others = len(ring) - 1
        if not others:
            return
        place = bisect_left(ring, self._me.id)
        target = ring[(place + 1 + self._round_now(now) % others) % len(ring)]
        if target not in self._probing:
            self._probe(self.table.members[target], now)

    # -- probes ---------------------------------------------------------------------------------------------------

    def _new(self, member: Member, now: float, *, burst: bool) -> Probe:
        probe = Probe(self._next_seq(), member, (member.boot, member.incarnation), now, burst)
        self._probes[probe.seq] = probe
        return probe

    def _next_seq(self) -> int:
        """Of probes and relayed pings alike, so that no answer is taken for another's; 0 is for those that want none."""
        self._seq = self._seq % 0xFFFFFFFF + 1
        return self._seq

    def _probe(self, member: Member, now: float) -> None:
        self.counters["probes"] += 1
        self._probing.add(member.id)
        probe = self._new(member, now, burst=False)
        self._ping(probe, now)
        self._timers.at(now + self._config.repings_s[0] * (1 + self._me.health), self._go_on, probe, 0)

    def _go_on(self, probe: Probe, step: int, now: float) -> None:
        """No answer yet: ping again, at `indirect_s` through others too, and give up in the end."""
        if probe.answered or probe.void:
            self._finish(probe, now)
            return
        config, slow = self._config, 1 + self._me.health
        if step == len(config.repings_s):
            self._failed(probe, now)
            return
        self._ping(probe, now)
        if config.repings_s[step] == config.indirect_s:
            self._ask_relays(probe, now)
            self._send(probe.member.address, [self._ping_part(probe, now), self._me.claim()], True, now)
        following = [*config.repings_s, config.probe_deadline_s]
        self._timers.at(probe.started + following[step + 1] * slow, self._go_on, probe, step + 1)

    def _ping_part(self, probe: Probe, now: float) -> Ping:
        return Ping(probe.seq, probe.member.id, self._round_now(now))

    def hello(self, target: int, now: float) -> Ping:
        """Whoever answers it is there; no probe waits for it. target 0: whoever that is."""
        return Ping(0, target, self._round_now(now))

    def _ping(self, probe: Probe, now: float) -> None:
        probe.pings += 1
        member = probe.member
        parts: list[Part] = [self._ping_part(probe, now)]
        if member.state is not State.ALIVE:
            # Lifeguard's buddy system: who is suspected hears of it from everybody who probes it.
            parts.append(member.claim(self._me.id))
        self._send(member.address, parts, False, now)

    def _ask_relays(self, probe: Probe, now: float) -> None:
        member = probe.member
        for relay in self.pick(self._config.relays, avoid=member.id, alive_only=True):
            probe.relays += 1
            self._send(relay.address, [PingReq(probe.seq, member.id, member.address)], False, now)

    def _failed(self, probe: Probe, now: float) -> None:
        self.counters["failed_probes"] += 1
        self._finish(probe, now)
        if 2 * probe.nacks < probe.relays or not probe.relays:
            # Our relays were silent, too: perhaps it is us.
            self._me.health = min(self._me.health + 1, self._config.health_max)
        member = probe.member
        if (
            not self._me.leaving
            and self.table.members.get(member.id) is member
            and probe.life[0] == member.boot
        ):
            self.table.accuse(member, now)

    def _finish(self, probe: Probe, now: float) -> None:
        if not probe.finished:
            probe.finished = True
            if not probe.void and not probe.burst:
                self._probing.discard(probe.member.id)
            self._timers.at(now + (0.0 if probe.answered else LATE_ANSWERS_S), self._drop, probe)

    def _drop(self, probe: Probe, now: float) -> None:
        self._probes.pop(probe.seq, None)

    # -- bursts ---------------------------------------------------------------------------------------------------

    def burst(self, member: Member, now: float) -> None:
        """Find out at once: pings, each through relays as well, and TCP. Ends in `vouch` or `burst_failed`."""
        running = self._bursting.get(member.id)
        if running is not None and running.life == (member.boot, member.incarnation):
            return
        self.counters["bursts"] += 1
        probe = self._new(member, now, burst=True)
        self._bursting[member.id] = probe
        self._send(member.address, [self._ping_part(probe, now), self._me.claim()], True, now)
        self._burst_step(probe, 0, now)

    def _burst_step(self, probe: Probe, step: int, now: float) -> None:
        if probe.answered or probe.void:
            self._end_burst(probe, now)
            return
        times = self._config.burst_s
        if step == len(times):
            self._end_burst(probe, now)
            self.counters["failed_bursts"] += 1
            member = probe.member
            # It has spoken since, if its life is another.
            if self.table.members.get(member.id) is member and probe.life == (
                member.boot,
                member.incarnation,
            ):
                self.table.burst_failed(member, now, refused=probe.refused)
            return
        self._ping(probe, now)
        self._ask_relays(probe, now)
        following = [*times, self._config.burst_deadline_s]
        self._timers.at(probe.started + following[step + 1], self._burst_step, probe, step + 1)

    def _end_burst(self, probe: Probe, now: float) -> None:
        if self._bursting.get(probe.member.id) is probe:
            del self._bursting[probe.member.id]
        self._finish(probe, now)

    # -- what comes in --------------------------------------------------------------------------------------------

    def on_ping(self, ping: Ping, source: Address, sender: Member | None, now: float) -> None:
        if ping.target not in (0, self._me.id) or self._me.leaving:
            return  # for whoever had this address before
        self._see_round(ping.round, now)
        parts: list[Part] = [Ack(ping.seq)]
        if sender is not None and sender.state is not State.ALIVE:
            parts.append(sender.claim(self._me.id))
        elif ping.target == 0 or sender is None:
            parts.append(self._me.claim())
        self._send(source, parts, False, now)

    def on_ack(self, ack: Ack, sender: int, now: float) -> None:
        relayed = self._relayed.pop(ack.seq, None)
        if relayed is not None:
            self._send(relayed[0], [Ack(relayed[1])], False, now)
            return
        probe = self._probes.get(ack.seq)
        if probe is None or probe.answered:
            return
        probe.answered = True
        member = probe.member
        if self.table.members.get(member.id) is not member or probe.life[0] != member.boot:
            return
        if sender == member.id and probe.pings == 1 and not probe.burst:
            rtt = now - probe.started
            member.rtt_s = rtt if member.rtt_s is None else member.rtt_s + (rtt - member.rtt_s) / 8
        if not probe.void and not probe.burst and self._me.health and not probe.finished:
            self._me.health -= 1
        self.table.vouch(member, now)
        if probe.burst:
            self._end_burst(probe, now)
        else:
            self._finish(probe, now)

    def on_nack(self, nack: Nack) -> None:
        probe = self._probes.get(nack.seq)
        if probe is not None:
            probe.nacks += 1

    def on_ping_req(self, request: PingReq, source: Address, now: float) -> None:
        if len(self._relayed) >= RELAYED_MAX or self._me.leaving:
            return
        seq = self._next_seq()
        self._relayed[seq] = (source, request.seq)
        parts: list[Part] = [Ping(seq, request.target, self._round_now(now))]
        member = self.table.members.get(request.target)
        if member is not None and member.state is not State.ALIVE:
            parts.append(member.claim(self._me.id))
        self._send(request.address, parts, False, now)
        self._timers.at(now + NACK_AFTER, self._nack, seq)

    def _nack(self, seq: int, now: float) -> None:
        relayed = self._relayed.pop(seq, None)
        if relayed is not None:
            self._send(relayed[0], [Nack(relayed[1])], False, now)

    def on_stream_failed(self, address: Address, refused: bool, now: float) -> None:
        """Its host says that nobody listens there: no need to wait for the end of a probe."""
        if not refused:
            return
        for probe in list(self._probes.values()):
            if probe.member.address == address and not probe.answered and not probe.void:
                probe.refused = True
                if (
                    not probe.burst
                    and not probe.finished
                    and probe.member.state in (State.ALIVE, State.SUSPECT)
                ):
                    self.burst(probe.member, now)

    def doubt_ourselves(self, now: float) -> None:
        """We were stalled: what we waited for meanwhile says nothing about others."""
        self.counters["stalls"] += 1
        self._me.health = min(self._me.health + 1, self._config.health_max)
        for probe in self._probes.values():
            if not probe.answered and not probe.finished:
                probe.void = True
                self._probing.discard(probe.member.id)
        self._bursting.clear()

    # -- others ---------------------------------------------------------------------------------------------------

    def pick(self, count: int, *, avoid: int = 0, alive_only: bool = False) -> list[Member]:
        """Up to `count` different members at random, without this node and `avoid`."""
        ring, members, random = self.table.ring, self.table.members, self._random
        size = len(ring)
        skip = {self._me.id, avoid}
        chosen: list[Member] = []
        if size <= 4 * count + 2:
            places = list(range(size))
            random.shuffle(places)
        else:  # a few draws more than needed
            draw = random.random
            places = [int(draw() * size) for _ in range(count + 4)]
        for place in places:
            id = ring[place]
            if id not in skip:
                member = members[id]
                if not alive_only or member.state is State.ALIVE:
                    skip.add(id)
                    chosen.append(member)
                    if len(chosen) == count:
                        break
        return chosen
