"""Minimum-cost flow, exact, in whole numbers. Pure.

Negative cycles of what flows already are cancelled until there is none, then what is missing is shipped along shortest
paths (Bellman–Ford over arrays: a plan of 100 shards on 100 members has 12,000 arcs and is one of some dozen rounds).
Both keep the optimality (Ahuja, Magnanti, Orlin 1993, sections 9.6 and 9.7).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

FAR = 1 << 61
# Every so many rounds of relaxation the tree is looked through for a cycle.
CYCLE_LOOK_ROUNDS = 6


class InfeasibleError(ValueError):
    """What is supplied cannot reach the end."""


class Network:
    """Arcs are added first, with what flows on them already; then `ship`."""

    def __init__(self) -> None:
        self.nodes = 0
        self._tail: list[int] = []
        self._head: list[int] = []
        self._room: list[int] = []
        self._cost: list[int] = []

    def node(self) -> int:
        self.nodes += 1
        return self.nodes - 1

    def arc(self, tail: int, head: int, capacity: int, cost: int = 0) -> int:
        """An arc; returns its number, for `push` and `flow`. Each has its way back beside it."""
        self._tail += (tail, head)
        self._head += (head, tail)
        self._room += (capacity, 0)
        self._cost += (cost, -cost)
        return len(self._tail) - 2

    def push(self, arc: int, amount: int = 1) -> None:
        assert self._room[arc] >= amount, "an arc that is full"
        self._room[arc] -= amount
        self._room[arc + 1] += amount

    def tail(self, arc: int) -> int:
        return self._tail[arc]

    def room(self, arc: int) -> int:
        return self._room[arc]

    def flow(self, arc: int) -> int:
        return self._room[arc + 1]

    def cost(self) -> int:
        """Of all that flows."""
        return sum(self._cost[arc] * self._room[arc + 1] for arc in range(0, len(self._cost), 2))

    def ship(self, supply: Iterable[int], end: int) -> None:
        """One unit from each node of `supply` (some come several times) to `end`, at the least cost. Raises InfeasibleError."""
        self._tails = np.array(self._tail, np.int64)
        self._heads = np.array(self._head, np.int64)
        self._costs = np.array(self._cost, np.int64)
        while True:
            _, onward, cyclic = self._shortest(np.zeros(self.nodes, np.int64))
            if not cyclic:
                break
            self._cancel(onward)
        waiting = list(supply)
        while waiting:
            start = np.full(self.nodes, FAR, np.int64)
            start[end] = 0
            distance, onward, cyclic = self._shortest(start)
            assert not cyclic, "shortest paths leave no negative cycle"
            left = [node for node in waiting if not self._send(node, end, distance, onward)]
            if len(left) == len(waiting):
                raise InfeasibleError(f"{len(left)} units have no way to the end")
            waiting = left

    def _shortest(
        self, distance: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], bool]:
        """Distances to the nodes that start at 0, the arc each goes on by (-1: none), whether there is a negative cycle."""
        usable = np.flatnonzero(np.array(self._room, np.int64) > 0)
        tails, heads, costs = self._tails[usable], self._heads[usable], self._costs[usable]
        onward = np.full(self.nodes, -1, np.int64)
        rounds = 0
        while True:
            rounds += 1
            from_head = distance[heads]
            through = np.where(from_head >= FAR, FAR, from_head + costs)
            nearer = distance.copy()
            np.minimum.at(nearer, tails, through)
            better = nearer < distance
            if not better.any():
                return distance, onward, False
            hit = better[tails] & (through == nearer[tails])
            onward[tails[hit]] = usable[hit]
            distance = nearer
            if rounds % CYCLE_LOOK_ROUNDS == 0 and self._cycles(onward):
                return distance, onward, True

    def _cycles(self, onward: npt.NDArray[np.int64]) -> list[list[int]]:
        """The cycles of the arcs by which nodes go on: no two share a node."""
        arcs: list[int] = onward.tolist()
        seen_in = [0] * self.nodes
        found = []
        for start in range(self.nodes):
            at = start
            while seen_in[at] == 0 and arcs[at] >= 0:
                seen_in[at] = start + 1
                at = self._head[arcs[at]]
            if arcs[at] >= 0 and seen_in[at] == start + 1:
                cycle = [arcs[at]]
                while (at := self._head[cycle[-1]]) != self._tail[cycle[0]]:
                    cycle.append(arcs[at])
                found.append(cycle)
        return found

    def _cancel(self, onward: npt.NDArray[np.int64]) -> None:
        for cycle in self._cycles(onward):
            assert sum(self._cost[arc] for arc in cycle) < 0, "cycles of shortest paths are negative"
            self._along(cycle, min(self._room[arc] for arc in cycle))

    def _along(self, arcs: list[int], amount: int) -> None:
        for arc in arcs:
            self._room[arc] -= amount
            self._room[arc ^ 1] += amount

    def _send(
        self, node: int, end: int, distance: npt.NDArray[np.int64], onward: npt.NDArray[np.int64]
    ) -> bool:
        """One unit by the shortest way, if those sent before it have left room on it."""
        if distance[node] >= FAR:
            return False
        path: list[int] = []
        while node != end:
            arc = int(onward[node])
            if self._room[arc] <= 0:
                return False
            path.append(arc)
            node = self._head[arc]
        self._along(path, 1)
        return True
