"""What is counted for /metrics beside the parts' own statistics: cheap on the way of a request, read once a scrape."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import datasketches

from router.errors import RequestError
from router.requests import Batch, Recommend, Request, Search, Similar
from router.wire import Columns, Reply

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LOOKUP_SECONDS = (0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.01, 0.1, 1.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 100)
# 2^12 registers: 1.6% off at one standard deviation, in 2 KiB.
LG_REGISTERS = 12
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
_OPS: Mapping[type, str] = {Recommend: "recommend", Similar: "similar", Search: "search", Batch: "batch"}


class Distribution:
    """A histogram. counts[i]: values at most bounds[i] and above the bound before; the last: above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, int]]:
        """Cumulative, by upper bound, as Prometheus wants them; the last is +Inf and all."""
        total, out = 0, []
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            total += count
            out.append(("+Inf" if bound == math.inf else repr(float(bound)), total))
        return out


class MinuteUsers:
    """About how many different users were seen in the last whole minute."""

    def __init__(self) -> None:
        self._minute = -1
        self._now = self._sketch()
        self._before = 0.0

    @staticmethod
    def _sketch() -> Any:
        return datasketches.hll_sketch(LG_REGISTERS)

    def add(self, user_id: int, now: float) -> None:
        """now: seconds of any clock that only goes forward."""
        self._turn(now)
        # The sketch takes signed integers of 64 bits; which users are the same does not change by that.
        self._now.update(user_id if user_id < 1 << 63 else user_id - (1 << 64))

    def estimate(self, now: float) -> float:
        self._turn(now)
        return self._before

    def _turn(self, now: float) -> None:
        minute = int(now // 60)
        if minute == self._minute:
            return
        self._before = self._now.get_estimate() if minute == self._minute + 1 else 0.0
        self._minute = minute
        self._now = self._sketch()


class Meters:
    """One node's. Every label comes from a fixed set: ops, error codes, routes, methods, statuses."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.inference: dict[tuple[str, str], int] = {}
        self.latency = {op: Distribution(SECONDS) for op in _OPS.values()}
        self.lookups = Distribution(LOOKUP_SECONDS)
        self.batches = Distribution(BATCH_SIZES)
        self.served = 0
        self.users = MinuteUsers()
        self.http: dict[tuple[str, str, int], int] = {}
        self.http_seconds: dict[str, Distribution] = {}

    def now(self) -> float:
        return self._clock()

    def ask(
        self, request: Request, answer: Callable[[Request], Awaitable[Reply] | Reply]
    ) -> Awaitable[Reply] | Reply:
        """What `answer` gives, measured if it is a question. Raises what it raises."""
        op = _OPS.get(type(request))
        if op is None:
            return answer(request)
        begun = self._clock()
        if isinstance(request, Recommend | Batch):
            self.users.add(request.user_id, begun)
        try:
            result = answer(request)
        except Exception as error:
            self._note(op, begun, _outcome(error))
            raise
        if isinstance(result, dict):
            self._answered(op, begun, result)
            return result
        return self._measured(op, begun, result)

    async def _measured(self, op: str, begun: float, result: Awaitable[Reply]) -> Reply:
        try:
            reply = await result
        except Exception as error:
            self._note(op, begun, _outcome(error))
            raise
        self._answered(op, begun, reply)
        return reply

    def _answered(self, op: str, begun: float, reply: Reply) -> None:
        coverage, hits = reply.get("coverage"), reply.get("hits")
        self._note(op, begun, "partial" if coverage and coverage["missing"] else "ok")
        if op == "recommend" and type(hits) is Columns:
            self.served += len(hits.ids)

    def _note(self, op: str, begun: float, outcome: str) -> None:
        key = (op, outcome)
        self.inference[key] = self.inference.get(key, 0) + 1
        self.latency[op].observe(self._clock() - begun)

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """route: one of the paths there are, or `other`."""
        key = (route, method if method in METHODS else "other", status)
        self.http[key] = self.http.get(key, 0) + 1
        found = self.http_seconds.get(route)
        if found is None:
            found = self.http_seconds[route] = Distribution(SECONDS)
        found.observe(seconds)


def _outcome(error: Exception) -> str:
    return error.code if isinstance(error, RequestError) else "internal"
