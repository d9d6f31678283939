"""Single-writer facts: what each node says of itself. Pure.

Laws (docs/gossip.md): the state of one origin is (boot, {key: (counter, value)}, hot). A greater boot replaces everything,
within a boot the greater (counter, value) wins each key. So merging is commutative, associative and idempotent. Only the
owner writes: `set` and `set_hot` are of this node's own facts, and nothing merged changes those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gossip.buckets import ItemTable, Ref, item_of
from gossip.config import (
    COUNTER_MAX,
    FACT_BYTES_MAX,
    FACT_KEY_BYTES_MAX,
    FACT_KEYS_MAX,
    FACT_VALUE_BYTES_MAX,
    HOT_BYTES_MAX,
)
from gossip.errors import FactError
from gossip.messages import Fact, Hot


@dataclass(slots=True)
class _Origin:
    boot: int
    # key → (counter, value); a removed key has an empty value.
    entries: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    size: int = 0
    hot: tuple[int, bytes] | None = None
    # Made on demand and kept while the entries stay the same.
    view: Mapping[bytes, bytes] | None = None


class Facts:
    """All facts that this node knows, its own among them."""

    def __init__(self, me: int, boot: int, items: ItemTable, *, origins_max: int) -> None:
        self._me, self._boot, self._items, self._origins_max = me, boot, items, origins_max
        self._origins: dict[int, _Origin] = {me: _Origin(boot)}
        self._counter = 0
        self.refused = 0

    # -- our own --------------------------------------------------------------------------------------------------

    def set(self, key: bytes, value: bytes) -> Fact | None:
        """A new value (empty: removed) of one of our keys; None when nothing changes. Raises FactError."""
        mine = self._origins[self._me]
        old = mine.entries.get(key, (0, b""))
        if old[1] == value:
            return None
        if not 1 <= len(key) <= FACT_KEY_BYTES_MAX or len(value) > FACT_VALUE_BYTES_MAX:
            raise FactError(
                f"a fact has a key of 1 to {FACT_KEY_BYTES_MAX} and at most {FACT_VALUE_BYTES_MAX} bytes"
            )
        if not self._fits(mine, key, value):
            raise FactError(f"a node has at most {FACT_KEYS_MAX} facts of {FACT_BYTES_MAX} bytes together")
        self._counter += 1
        fact = Fact(self._me, self._boot, self._counter, key, value)
        self._store(mine, fact)
        return fact

    def set_hot(self, value: bytes) -> Hot | None:
        """A new hot vector of ours; None when nothing changes. Raises FactError."""
        if len(value) > HOT_BYTES_MAX:
            raise FactError(f"a hot vector has at most {HOT_BYTES_MAX} bytes")
        mine = self._origins[self._me]
        counter, old = mine.hot or (0, b"")
        if old == value:
            return None
        hot = Hot(self._me, self._boot, counter + 1, value)
        self._store_hot(mine, hot)
        return hot

    def outbid(self, heard: Fact | Hot) -> Fact | Hot | None:
        """Somebody tells a fact of ours that this process has not said, as after our disk was set back: what to say
        above it, or everybody would keep to it. None when it is older than what we say."""
        mine = self._origins[self._me]
        if heard.boot != self._boot or heard.counter >= COUNTER_MAX:
            return None
        if isinstance(heard, Hot):
            if mine.hot is not None and mine.hot >= (heard.counter, heard.value):
                return None
            hot = Hot(self._me, self._boot, heard.counter + 1, mine.hot[1] if mine.hot else b"")
            self._store_hot(mine, hot)
            return hot
        old = mine.entries.get(heard.key, (0, b""))
        if old >= (heard.counter, heard.value) or not self._fits(mine, heard.key, old[1]):
            return None
        self._counter = max(self._counter, heard.counter) + 1
        fact = Fact(self._me, self._boot, self._counter, heard.key, old[1])
        self._store(mine, fact)
        return fact

    # -- those of others ------------------------------------------------------------------------------------------

    def merge(self, fact: Fact) -> bool:
        """True when it was news."""
        origin = self._origin(fact.origin, fact.boot)
        if origin is None:
            return False
        old = origin.entries.get(fact.key)
        if old is not None and old >= (fact.counter, fact.value):
            return False
        if not self._fits(origin, fact.key, fact.value):
            self.refused += 1
            return False
        self._store(origin, fact)
        return True

    def merge_hot(self, hot: Hot) -> bool:
        """True when it was news."""
        origin = self._origin(hot.origin, hot.boot)
        if origin is None or (origin.hot is not None and origin.hot >= (hot.counter, hot.value)):
            return False
        self._store_hot(origin, hot)
        return True

    def raise_boot(self, id: int, boot: int) -> None:
        """The origin is known to have started again: what it said before is void."""
        origin = self._origins.get(id)
        if origin is not None and origin.boot < boot and id != self._me:
            self._clear(id, origin, boot)

    def forget(self, id: int) -> None:
        origin = self._origins.get(id)
        if origin is not None and id != self._me:
            self._clear(id, origin, origin.boot)
            del self._origins[id]

    # -- reading --------------------------------------------------------------------------------------------------

    def view(self, id: int) -> Mapping[bytes, bytes]:
        origin = self._origins.get(id)
        if origin is None:
            return {}
        if origin.view is None:
            origin.view = {key: value for key, (_, value) in origin.entries.items() if value}
        return origin.view

    def hot(self, id: int) -> bytes:
        origin = self._origins.get(id)
        return origin.hot[1] if origin is not None and origin.hot is not None else b""

    def part(self, ref: Ref) -> Fact | Hot | None:
        """The item as it is told."""
        origin = self._origins.get(ref.origin)
        if origin is None:
            return None
        if ref.kind == "h":
            return Hot(ref.origin, origin.boot, *origin.hot) if origin.hot else None
        entry = origin.entries.get(ref.key)
        return Fact(ref.origin, origin.boot, entry[0], ref.key, entry[1]) if entry else None

    # -- inside ---------------------------------------------------------------------------------------------------

    def _origin(self, id: int, boot: int) -> _Origin | None:
        """Where news of `boot` belongs; None when it is our own or older than what is known."""
        if id == self._me:
            return None
        origin = self._origins.get(id)
        if origin is None:
            if len(self._origins) >= self._origins_max:
                self.refused += 1
                return None
            origin = self._origins[id] = _Origin(boot)
        elif boot > origin.boot:
            self._clear(id, origin, boot)
        return origin if boot == origin.boot else None

    def _clear(self, id: int, origin: _Origin, boot: int) -> None:
        for key in origin.entries:
            self._items.drop(item_of(Ref("f", id, key)), "f")
        self._items.drop(item_of(Ref("h", id)), "h")
        origin.boot, origin.size, origin.hot, origin.view = boot, 0, None, None
        origin.entries.clear()

    def _fits(self, origin: _Origin, key: bytes, value: bytes) -> bool:
        old = origin.entries.get(key)
        grows = len(value) - len(old[1]) if old else len(key) + len(value)
        return origin.size + grows <= FACT_BYTES_MAX and (
            old is not None or len(origin.entries) < FACT_KEYS_MAX
        )

    def _store(self, origin: _Origin, fact: Fact) -> None:
        old = origin.entries.get(fact.key)
        origin.size += len(fact.value) - len(old[1]) if old else len(fact.key) + len(fact.value)
        origin.entries[fact.key] = (fact.counter, fact.value)
        origin.view = None
        ref = Ref("f", fact.origin, fact.key)
        self._items.put(item_of(ref), ref, fact.boot << 32 | fact.counter)

    def _store_hot(self, origin: _Origin, hot: Hot) -> None:
        origin.hot = (hot.counter, hot.value)
        ref = Ref("h", hot.origin)
        self._items.put(item_of(ref), ref, hot.boot << 32 | hot.counter)
