"""L1: the cache in Redis, as an actor. Everything that waits goes in one round trip (docs/caching.md).

Rules:
* `get` and `put` never raise, and `get` waits `redis_timeout_ms` at most: what goes wrong, or would wait longer, is absent;
* one trip at a time, in one thread; askers do not wait for that thread but for their answer;
* at most `ASKS_MAX` askers and `PUT_BYTES_MAX` of values wait; what is over it is absent, or not kept, and counted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import outcome
import structlog
import trio

from node.blocking import Runner
from node.config import CacheConfig
from node.logs import Every
from node.pending import Deadlines, Pending
from node.redistrips import Brought, Put, RedisTrips
from router.breaker import Breaker

log = structlog.get_logger(__name__)

ASKS_MAX = 2_048
TRIP_ASKS = 256
# Puts of one trip, beside one that is larger.
TRIP_PUT_BYTES = 256 << 10
PUT_BYTES_MAX = 16 << 20
VALUE_BYTES_MAX = 256 << 10
# While Redis has no memory, values are not sent to be refused.
FULL_S = 1.0
GATHER_S = 0.001
COMPLAIN_EVERY_S = 60.0
# Trips that fail in a row until Redis is left alone: each may have cost a query half its time.
FAILURES_MAX = 3


class Ask(Pending[list[bytes | None]]):
    """Keys that somebody waits for."""

    __slots__ = ("keys",)

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__()
        self.keys = keys

    def abandon(self) -> None:
        """Its place in the queue is found to be empty when its turn comes."""


@dataclass(slots=True)
class L1Counters:
    """rubbish: values that were no bytes. full: values that Redis had no memory for."""

    gets: int = 0
    found: int = 0
    puts: int = 0
    trips: int = 0
    failures: int = 0
    timeouts: int = 0
    shut: int = 0
    refused_gets: int = 0
    refused_puts: int = 0
    rubbish: int = 0
    full: int = 0
    trip_ns: int = 0


class RedisStore:
    """Implements `router.ports.Store`. Run it under a supervisor."""

    def __init__(self, config: CacheConfig, thread: Runner) -> None:
        self._timeout_s = config.redis_timeout_ms / 1000
        self._trips, self._thread = RedisTrips(config), thread
        self._breaker = Breaker(FAILURES_MAX)
        self._asks: deque[Ask] = deque()
        self._puts: deque[Put] = deque()
        self._put_bytes = 0
        self._deadlines: Deadlines[Ask] = Deadlines(self._expire)
        self._wake = trio.Event()
        self._running = False
        # When the trip that is under way began.
        self._away_since: float | None = None
        self._full_until = 0.0
        # By how many the last trip was asked for.
        self._asked = 0
        self._complaints = Every(COMPLAIN_EVERY_S)
        self.counters = L1Counters()

    async def get(self, keys: Sequence[str], deadline: float) -> list[bytes | None]:
        """As `router.ports.Store.get`."""
        now = trio.current_time()
        self.counters.gets += len(keys)
        wait_s = min(self._timeout_s, deadline - now)
        if not self._running or not self._breaker.may(now) or wait_s <= 0:
            self.counters.shut += 1
            return [None] * len(keys)
        stuck = self._away_since is not None and now - self._away_since > self._timeout_s
        if stuck or len(self._asks) >= ASKS_MAX:
            self.counters.refused_gets += 1
            return [None] * len(keys)
        ask = Ask(keys)
        self._asks.append(ask)
        self._deadlines.add(ask, wait_s)
        self._wake.set()
        return await ask.wait()

    def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """As `router.ports.Store.put`."""
        now = trio.current_time()
        over = len(value) > VALUE_BYTES_MAX or self._put_bytes + len(value) > PUT_BYTES_MAX
        if over or not self._running or now < self._full_until or not self._breaker.may(now):
            self.counters.refused_puts += 1
            return
        self._puts.append(Put(key, value, int(1000 * ttl_s)))
        self._put_bytes += len(value)
        self._wake.set()

    def _expire(self, ask: Ask) -> None:
        self.counters.timeouts += 1
        ask.settle(outcome.Value([None] * len(ask.keys)))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        self._running = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deadlines.run)
                task_status.started()
                while True:
                    await self._wake.wait()
                    # Who else is about to ask comes along; where several ask, more do soon, and a trip costs more than a key.
                    await trio.sleep(GATHER_S if self._asked > 1 or len(self._asks) > 1 else 0)
                    await self._go()
        finally:
            self._running = False
            self._away_since = None
            self._shut()
        raise AssertionError("unreachable")

    async def _go(self) -> None:
        asks = [self._asks.popleft() for _ in range(min(TRIP_ASKS, len(self._asks)))]
        asks = [ask for ask in asks if not ask.over]
        self._asked = len(asks)
        puts = self._take_puts()
        if not self._asks and not self._puts:
            self._wake = trio.Event()
        if not asks and not puts:
            return
        now = trio.current_time()
        if not self._breaker.may(now):
            self._settle(asks, ())
            return
        keys = [key for ask in asks for key in ask.keys]
        probe = self._breaker.began(now)
        self._away_since, began = now, time.perf_counter_ns()
        try:
            # Not outlived by its thread: the sockets' timeouts bound it.
            brought = await self._thread(self._trips.go, keys, puts)
        except Exception as error:  # whatever a broken or foreign server makes the library raise
            self._failed(error, probe)
            self._settle(asks, ())
            await self._thread(self._trips.forget)
        except BaseException:  # cancelled
            self._breaker.given_up(probe)
            raise
        else:
            self._breaker.succeeded(probe)
            self._succeeded(asks, puts, brought)
        finally:
            self._settle(asks, ())
            self._away_since = None
            self.counters.trips += 1
            self.counters.trip_ns += time.perf_counter_ns() - began

    def _take_puts(self) -> list[Put]:
        puts: list[Put] = []
        taken = 0
        while self._puts and taken < TRIP_PUT_BYTES:
            puts.append(self._puts.popleft())
            taken += len(puts[-1].value)
        self._put_bytes -= taken
        return puts

    def _succeeded(self, asks: Sequence[Ask], puts: Sequence[Put], brought: Brought) -> None:
        self.counters.puts += len(puts)
        if brought.full:
            self.counters.full += brought.full
            self._full_until = trio.current_time() + FULL_S
            self._complain("it has no memory for values; give it more, or a maxmemory-policy that evicts")
        self._settle(asks, brought.values)

    def _failed(self, error: Exception, probe: bool) -> None:
        self.counters.failures += 1
        self._breaker.failed(trio.current_time(), probe)
        if not self._breaker.closed:
            self._shut()
        self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, reason: str) -> None:
        if (held_back := self._complaints.due()) is not None:
            log.warning(
                "l1_troubled", reason=reason[:500], breaker=self._state(), held_back=held_back,
                what="queries are answered without Redis meanwhile",
            )  # fmt: skip

    def _shut(self) -> None:
        """Nobody waits for what is not asked."""
        self._settle(self._asks, ())
        self._asks.clear()
        self._puts.clear()
        self._put_bytes = 0

    def _settle(self, asks: Sequence[Ask] | deque[Ask], values: Sequence[object]) -> None:
        at = 0
        for ask in asks:
            end = at + len(ask.keys)
            found = [self._bytes(one) for one in (values[at:end] if values else [None] * len(ask.keys))]
            at = end
            if not ask.over:
                ask.settle(outcome.Value(found))

    def _state(self) -> str:
        return "closed" if self._breaker.closed else "open"

    def _bytes(self, value: object) -> bytes | None:
        if value is None:
            return None
        if type(value) is not bytes:
            self.counters.rubbish += 1
            return None
        self.counters.found += 1
        return value

    def statistics(self) -> dict[str, Any]:
        waiting = {"waiting": len(self._asks), "put_bytes_waiting": self._put_bytes}
        return {
            **asdict(self.counters),
            **waiting,
            "breaker": self._state(),
            "opened": self._breaker.opened,
        }
