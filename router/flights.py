"""Identical requests that wait at the same time are computed once (docs/caching.md, `one-flight`, `handed-on`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import trio

from router.errors import RequestError

T = TypeVar("T")
WAITERS_MAX = 1_024


class _Flight(Generic[T]):
    __slots__ = ("allowed_s", "done", "error", "value", "waiting")

    def __init__(self, allowed_s: float) -> None:
        self.allowed_s = allowed_s
        self.done = trio.Event()
        self.value: T | None = None
        self.error: RequestError | None = None
        self.waiting = 0


class Flights(Generic[T]):
    """Flights by user and by what is asked for that user. How many there are is bounded by the requests of a node."""

    def __init__(self, waiters_max: int = WAITERS_MAX) -> None:
        self._waiters_max = waiters_max
        self._open: dict[int, dict[Hashable, _Flight[T]]] = {}
        self.counters = {"led": 0, "shared": 0, "handed_on": 0, "refused": 0}

    async def run(
        self,
        user_id: int,
        key: Hashable,
        lead: Callable[[], Awaitable[T]],
        *,
        allowed_s: float,
        shareable: Callable[[T], bool],
        final: frozenset[str],
    ) -> T:
        """What `lead` gives, or gave to somebody who asked the same and is under way.

        allowed_s: how long it may take. shareable: whether an answer is good for who has more time than its maker had.
        final: codes of errors that would come to
        everybody. Raises what `lead` raises; RequestError `deadline_exceeded`, or `overloaded` when too many wait.
        """
        deadline = trio.current_time() + allowed_s
        while True:
            flight = self._open.get(user_id, {}).get(key)
            if flight is None:
                # Who waited first has less time left than it asked for.
                return await self._lead(user_id, key, lead, deadline - trio.current_time(), final)
            if flight.waiting >= self._waiters_max:
                self.counters["refused"] += 1
                raise RequestError(
                    "overloaded", "too many wait for this answer; try again", "user_id", retry_after_ms=50
                )
            flight.waiting += 1
            try:
                with trio.move_on_at(deadline) as scope:
                    await flight.done.wait()
            finally:
                flight.waiting -= 1
            if scope.cancelled_caught:
                raise RequestError("deadline_exceeded", "the answer was not there in time; try again")
            if flight.error is not None:
                self.counters["shared"] += 1
                # Its traceback would grow with each who raises it.
                error = flight.error
                raise RequestError(
                    error.code, error.message, error.field, retry_after_ms=error.retry_after_ms
                )
            if flight.value is not None and (flight.allowed_s >= allowed_s or shareable(flight.value)):
                self.counters["shared"] += 1
                return flight.value
            self.counters["handed_on"] += 1

    async def _lead(
        self,
        user_id: int,
        key: Hashable,
        lead: Callable[[], Awaitable[T]],
        allowed_s: float,
        final: frozenset[str],
    ) -> T:
        flight: _Flight[T] = _Flight(allowed_s)
        self._open.setdefault(user_id, {})[key] = flight
        self.counters["led"] += 1
        try:
            flight.value = await lead()
        except RequestError as error:
            if error.code in final:
                flight.error = error
            raise
        finally:
            mine = self._open.get(user_id)
            if mine is not None and mine.get(key) is flight:
                del mine[key]
                if not mine:
                    del self._open[user_id]
            flight.done.set()
        return flight.value

    def detach_user(self, user_id: int) -> None:
        """Who asks from now on does not join what is under way; who waits already still gets it."""
        self._open.pop(user_id, None)

    def detach_all(self) -> None:
        self._open.clear()

    def statistics(self) -> dict[str, int]:
        return {**self.counters, "open": sum(map(len, self._open.values()))}
