"""Who is in the cluster, by name: what gossip tells, read once and kept until it tells something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import structlog
import trio

from gossip.effects import Event
from gossip.member import MemberView
from gossip.messages import State
from node import facts
from node.config import Address
from node.facts import Health, Held, Hot, NodeFact
from node.logs import Every
from router.layout import Layout

log = structlog.get_logger(__name__)

REFUSED_EVERY_S = 60.0
NAMES_MAX = 8_192


class Gossip(Protocol):
    """What the node needs of gossip; `gossip.agent.Agent` is that. Times of members are `trio.current_time()`."""

    # Called on the loop, at once, whenever something becomes known.
    watch: list[Callable[[Event], None]]
    # Set when another process with our id and a higher boot is there.
    superseded: trio.Event

    def members(self) -> list[MemberView]: ...
    def facts(self, id: int) -> Mapping[bytes, bytes]: ...
    def hot(self, id: int) -> bytes: ...
    def set_fact(self, key: bytes, value: bytes) -> None: ...
    def set_hot(self, value: bytes) -> None: ...
    def lost_link(self, id: int) -> None: ...
    def forget(self, id: int) -> None: ...
    async def leave(self) -> None: ...


class Known:
    """A member as its news tell. What changes often (the hot vector) is asked of gossip and decoded when it is new."""

    def __init__(self, gossip: Gossip, view: MemberView, fact: NodeFact | None) -> None:
        self.view = view
        self.id = view.id
        self.fact = fact
        self.name = fact.name if fact is not None else f"{view.id:016x}"
        self._gossip = gossip
        told = gossip.facts(view.id)
        self.view_of_cluster = told.get(facts.WAITING, b"")
        self.reason = facts.reason_text(told.get(facts.DEGRADED, b""))
        self.order = facts.reason_text(told.get(facts.DUTY, b""))
        self.layout, self.layout_partial = _layout(told, self.name)
        shards = told.get(facts.SHARDS, b"")
        self.held = _held(shards, self.name)
        # Not before it has started; then it may hold what `held` does not say.
        self.tells_shards = bool(shards)
        self.led = _led(told.get(facts.PRIMARIES, b""), self.name)
        self._fingerprint = facts.shards_fingerprint(shards)
        self._hot_bytes = b""
        self._hot: Hot | None = None
        self._lags: dict[int, int] = {}

    @property
    def state(self) -> State:
        return self.view.state

    @property
    def address(self) -> Address:
        return Address(*self.view.address)

    @property
    def alive(self) -> bool:
        """Not known to be dead: a suspect may still answer."""
        return self.view.state <= State.SUSPECT

    @property
    def hot(self) -> Hot | None:
        value = self._gossip.hot(self.id)
        if value != self._hot_bytes:
            self._hot_bytes, self._hot = value, facts.unpack_hot(value)
            self._lags = {}
            if self._hot is not None and self._hot.fingerprint == self._fingerprint:
                pairs = zip(self.held, self._hot.lags, strict=False)
                self._lags = {
                    one.shard: int(facts.log_value(byte, facts.LAG_UNIT_MS)) for one, byte in pairs if byte
                }
        return self._hot

    @property
    def health(self) -> Health:
        hot = self.hot
        return Health(0) if hot is None else hot.health

    @property
    def lags_ms(self) -> Mapping[int, int]:
        """By shard, of those that lag. Empty while the list of shards that they speak of is not known."""
        return self._lags if self.hot is not None else {}


class Members:
    """The member table by name. Of two members of one name the living one counts, then the one of the smaller id."""

    def __init__(self, gossip: Gossip, own: NodeFact, own_id: int) -> None:
        self.own, self.own_id = own, own_id
        self.gossip = gossip
        # Called with each event after the table has been marked old.
        self.watch: list[Callable[[Event], None]] = []
        self._by_id: dict[int, Known] = {}
        self._by_name: dict[str, Known] = {}
        self._all: list[Known] = []
        # Of those who have left, too: what is said of them later should name them.
        self._names: dict[int, str] = {}
        # Ids of those who said good-bye, or of whom an operator said that they will not come back.
        self._left: dict[int, None] = {}
        self._led: dict[int, tuple[int, str]] = {}
        self._holders: dict[int, list[str]] = {}
        self._generation = 0
        self._old = True
        # Whose facts must be read again; parsing those of everybody at each event would cost a large cluster seconds.
        self._changed: set[int] = set()
        self._conflicts: dict[str, tuple[int, ...]] = {}
        gossip.watch.append(self._on_event)

    def _on_event(self, event: Event) -> None:
        self._old = True
        self._changed.add(event.id)
        if event.kind == "left":
            self._left[event.id] = None
        elif event.kind != "fact":
            self._left.pop(event.id, None)
        for told in self.watch:
            told(event)

    def refresh(self) -> None:
        """Makes the next read see what comes without an event: when a member was heard last."""
        self._old = True

    def get(self, name: str) -> Known | None:
        """The member of that name, ourselves included, as far as anybody has told us of one."""
        if self._old:
            self._read()
        return self._by_name.get(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def all(self) -> list[Known]:
        """Every member, by name, those included that have not said their name yet."""
        if self._old:
            self._read()
        return self._all

    def others(self) -> list[Known]:
        return [one for one in self.all() if one.id != self.own_id]

    @property
    def alive_names(self) -> list[str]:
        """Of those whom gossip takes for alive, and our own."""
        return sorted({one.name for one in self.all() if one.alive} | {self.own.name})

    def address(self, name: str) -> Address | None:
        known = self.get(name)
        return None if known is None or known.fact is None else known.address

    def name_of(self, id: int) -> str:
        """A member's name, present or past; its id in hex when it has not said one."""
        if self._old:
            self._read()
        return self._names.get(id, f"{id:016x}")

    def has_left(self, name: str) -> bool:
        """Whether a member of that name was there and left; False when we have never heard of one."""
        return name not in self and any(self._names.get(id) == name for id in self._left)

    @property
    def generation(self) -> int:
        """Another number whenever the table has been read anew."""
        if self._old:
            self._read()
        return self._generation

    def holders(self, shard: int) -> list[str]:
        """Living members that say they have a replica of that shard, by name."""
        if self._old:
            self._read()
        return self._holders.get(shard, [])

    def primary(self, shard: int) -> str:
        """Who says, in the greatest epoch, that it leads that shard; empty when nobody does."""
        return self.reign(shard)[1]

    def reign(self, shard: int) -> tuple[int, str]:
        """That epoch, and who says it; 0 and empty when nobody does."""
        if self._old:
            self._read()
        return self._led.get(shard, (0, ""))

    def _read(self) -> None:
        self._old = False
        before, self._by_id = self._by_id, {}
        for view in self.gossip.members():
            known = before.get(view.id)
            # Of our own facts there is no event.
            own = view.id == self.own_id
            if known is None or own or view.id in self._changed or known.view.boot != view.boot:
                fact = self.own if own else _fact(self.gossip.facts(view.id), view.id)
                known = Known(self.gossip, view, fact)
            known.view = view
            self._by_id[view.id] = known
            if known.fact is not None:
                self._names[view.id] = known.name
        for kept in (self._names, self._left):
            while len(kept) > NAMES_MAX:
                kept.pop(next(iter(kept)))
        self._changed.clear()
        self._all = list(self._by_id.values())
        self._all.sort(key=lambda one: (one.name, not one.alive, one.id))
        self._by_name = {}
        self._generation += 1
        self._led, self._holders = {}, {}
        for one in self._all:
            if one.alive and one.fact is not None:
                for held in one.held:
                    self._holders.setdefault(held.shard, []).append(one.name)
                for shard, epoch in one.led.items():
                    self._led[shard] = max((epoch, one.name), self._led.get(shard, (0, "")))
        claimed: dict[str, list[int]] = {}
        for one in self._all:
            self._by_name.setdefault(one.name, one)
            if one.alive:
                claimed.setdefault(one.name, []).append(one.id)
        self._tell_conflicts({name: tuple(ids) for name, ids in claimed.items() if len(ids) > 1})

    def _tell_conflicts(self, conflicts: dict[str, tuple[int, ...]]) -> None:
        for name, ids in conflicts.items():
            if self._conflicts.get(name) != ids:
                shown = [f"{id:016x}" for id in ids]
                log.error(
                    "name_conflict",
                    name=name,
                    ids=shown,
                    chosen=shown[0],
                    message="two nodes share one name; give one of them another node.name",
                )
        self._conflicts = conflicts

    def problems(self) -> list[str]:
        """What a person should mend, in sentences."""
        self.all()
        return [
            f'name_conflict: {len(ids)} nodes are named "{name}"; each needs its own node.name'
            for name, ids in self._conflicts.items()
        ]


# A fact of a newer or broken version is skipped, and told now and then.
_refused = Every(REFUSED_EVERY_S)


def _tell_refused(of: str, error: facts.FactError) -> None:
    if (held_back := _refused.due()) is not None:
        log.warning("fact_refused", member=of, reason=str(error), held_back=held_back)


def _fact(told: Mapping[bytes, bytes], id: int) -> NodeFact | None:
    value = told.get(facts.NODE, b"")
    if not value:
        return None
    try:
        return facts.unpack_node(value)
    except facts.FactError as error:
        _tell_refused(f"{id:016x}", error)
        return None


def _layout(told: Mapping[bytes, bytes], name: str) -> tuple[Layout | None, bool]:
    """The layout that a member goes by, and whether only a part of it is known."""
    try:
        layout = facts.unpack_layout(told)
    except facts.FactError as error:
        _tell_refused(name, error)
        return None, True
    return layout, layout is None and bool(told.get(facts.LAYOUT))


def _led(primaries: bytes, name: str) -> dict[int, int]:
    try:
        return facts.unpack_primaries(primaries)
    except facts.FactError as error:
        _tell_refused(name, error)
        return {}


def _held(shards: bytes, name: str) -> list[Held]:
    try:
        return facts.unpack_shards(shards)
    except facts.FactError as error:
        _tell_refused(name, error)
        return []
