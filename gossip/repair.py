"""Finding and mending what two nodes know differently: a hash of all, of 64 buckets, versions, then just the items. Pure.

    A → B  Root                       each `repair_s`, to one random member
    B → A  Buckets                    only when the roots differ
    A → B  Digest, one or several     versions of what is in the buckets that differ
    B → A  items that A lacks or has older, and Want for those that B lacks
    A → B  the wanted items

Each step answers one packet and keeps no state, so a lost one costs no more than this round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from gossip.buckets import COUNT, ItemTable, Ref, item_of
from gossip.codec import PARTS_BYTES_MAX, size_of
from gossip.config import GossipConfig
from gossip.facts import Facts
from gossip.member import Me, Member
from gossip.membership import Membership
from gossip.messages import Address, Buckets, Digest, Join, Part, Root, State, Want
from gossip.timers import Timers

# Beyond so many packets an exchange goes over TCP.
PACKETS_MAX = 4
WANT_MAX = 100
# What came before its claim is asked for together with the claim, at most so often.
ASK_AFTER_S = 0.05


class Repair:
    """Answers a packet with what the other needs; begins by itself each few seconds."""

    def __init__(
        self,
        config: GossipConfig,
        me: Me,
        *,
        items: ItemTable,
        facts: Facts,
        table: Membership,
        timers: Timers,
        random: Random,
        pick: Callable[..., list[Member]],
        send: Callable[[Address, list[Part], bool, float], None],
    ) -> None:
        self._config, self._me = config, me
        self._items, self._facts, self._table = items, facts, table
        self._timers, self._random, self._pick, self._send = timers, random, pick, send
        # A dict for its order.
        self._missing: dict[int, None] = {}
        self.counters = {"repairs": 0, "repaired": 0}

    def start(self, now: float) -> None:
        self._timers.at(now + self._random.random() * self._config.repair_s, self._begin)

    def _begin(self, now: float) -> None:
        self._timers.at(now + self._config.repair_s * (0.75 + self._random.random() / 2), self._begin)
        if not self._me.leaving:
            for member in self._pick(1, alive_only=True):
                self.counters["repairs"] += 1
                self._send(member.address, [self.root()], False, now)

    def root(self) -> Root:
        return Root(self._items.root())

    def own_parts(self) -> list[Part]:
        """Everything about this node itself."""
        return self._parts([ref for ref in self._items.everything() if ref.origin == self._me.id])

    def ask(self, ref: Ref, source: Address, now: float) -> None:
        """A fact came before the claim that it needs: whoever told it knows both. What is too much waits for a round."""
        if not self._missing:
            self._timers.at(now + ASK_AFTER_S, self._ask, source)
        if len(self._missing) < WANT_MAX:
            self._missing[item_of(Ref("c", ref.origin))] = None
            self._missing[item_of(ref)] = None

    def _ask(self, source: Address, now: float) -> None:
        wanted = tuple(self._missing)
        self._missing.clear()
        self._send(source, [Want(wanted)], False, now)

    # -- steps ----------------------------------------------------------------------------------------------------

    def on_root(self, part: Root, source: Address, sender: int, now: float) -> None:
        if part.hash != self._items.root():
            self._send(source, [Buckets(self._items.hashes())], False, now)

    def on_buckets(self, part: Buckets, source: Address, sender: int, now: float) -> None:
        mask = self._items.differing(part.hashes)
        if mask:
            self._send_all(source, self._digests(mask), now)

    def _digests(self, mask: int) -> list[Part]:
        """In pieces of whole buckets, as many as fit a packet, so that each can be compared by itself."""
        digests: list[Part] = []
        items: list[tuple[int, int]] = []
        piece, size = 0, 0
        for bucket in range(COUNT):
            if not mask >> bucket & 1:
                continue
            more = self._items.digest(1 << bucket)
            grown = size_of(Digest(mask, tuple(more)))
            if piece and size + grown > PARTS_BYTES_MAX:
                digests.append(Digest(piece, tuple(items)))
                piece, items, size = 0, [], 0
            piece |= 1 << bucket
            items += more
            size += grown
        digests.append(Digest(piece, tuple(items)))
        return digests

    def on_digest(self, part: Digest, source: Address, sender: int, now: float) -> None:
        newer, wanted = self._items.compare(part.mask, part.items)
        self.counters["repaired"] += len(newer)
        parts = self._parts(newer)
        parts += [Want(tuple(wanted[i : i + WANT_MAX])) for i in range(0, len(wanted), WANT_MAX)]
        self._send_all(source, parts, now)

    def on_want(self, part: Want, source: Address, sender: int, now: float) -> None:
        self._send_all(source, self._parts(self._items.refs(part.items)), now)

    def on_join(self, part: Join, source: Address, sender: int, now: float) -> None:
        self._send_all(source, self._parts(self._items.everything()), now)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _parts(self, refs: Sequence[Ref]) -> list[Part]:
        """Claims first: a fact is of no use before its origin is known."""
        claims: list[Part] = []
        facts: list[Part] = []
        for ref in refs:
            if ref.kind != "c":
                part = self._facts.part(ref)
                if part is not None:
                    facts.append(part)
            elif ref.origin == self._me.id:
                claims.append(self._me.claim())
            elif (member := self._table.members.get(ref.origin)) is not None:
                claim = member.claim(self._me.id)
                # Suspicion spreads by rumour alone, under its accuser's name.
                claims.append(claim._replace(state=State.ALIVE) if claim.state is State.SUSPECT else claim)
        return claims + facts

    def _send_all(self, address: Address, parts: Sequence[Part], now: float) -> None:
        """In a few packets or, when they are too many or one part is too large, over TCP."""
        packets: list[list[Part]] = []
        room, largest = 0, 0
        for part in parts:
            size = size_of(part)
            largest = max(largest, size)
            if size > room:
                packets.append([])
                room = PARTS_BYTES_MAX
            packets[-1].append(part)
            room -= size
        if len(packets) > PACKETS_MAX or largest > PARTS_BYTES_MAX:
            self._send(address, list(parts), True, now)
            return
        for packet in packets:
            self._send(address, packet, False, now)
