"""When a node is to be sent requests, as its parts stand; the process tests show the rest with real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from node.readiness import LEADERLESS_S, Readiness
from node.status import READY, Parts


class Fake:
    """The parts of a node `a` with one replica, of shard 0."""

    def __init__(self) -> None:
        self.actor = SimpleNamespace(shard=0, leads=False, harmed="", blank=False, primary="")
        self.age_ms = 60_000
        self.said = ""
        self.alive = {"a", "b"}

    def parts(self) -> Parts:
        found: Any = SimpleNamespace(
            name="a",
            state=READY,
            layout=None,
            duty=None,
            shards={0: self.actor},
            replicators={0: SimpleNamespace(age_ms=self.age_ms)},
            members=SimpleNamespace(primary=lambda shard: self.said),
            cluster=SimpleNamespace(alive=lambda name: name in self.alive),
        )
        return cast(Parts, found)


def run(test: Any) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_replica_that_nobody_leads_is_waited_for_a_while_and_not_for_good() -> None:
    async def test() -> None:
        fake = Fake()
        readiness = Readiness(fake.parts, lambda: False)
        assert readiness.reasons() == ["warm: 1 replicas have not been level yet (shards 0)"]
        await trio.sleep(LEADERLESS_S)
        assert readiness.reasons() == []
        # There is somebody to be level with again: it was never warm.
        fake.said = "b"
        assert readiness.reasons() != []
        fake.age_ms = 0
        assert readiness.reasons() == []
        fake.age_ms = 60_000
        assert readiness.reasons() == [], "kept once reached"

    run(test)


def test_only_a_primary_that_lives_is_one_to_be_level_with() -> None:
    async def test() -> None:
        for primary, ready in (("b", False), ("gone", True), ("a", True)):
            fake = Fake()
            fake.actor.primary = primary
            readiness = Readiness(fake.parts, lambda: False)
            readiness.reasons()
            await trio.sleep(LEADERLESS_S)
            assert (readiness.reasons() == []) is ready

    run(test)


def test_a_replica_without_its_data_is_not_ready_whoever_leads() -> None:
    async def test() -> None:
        for state in ("harmed", "blank"):
            fake = Fake()
            setattr(fake.actor, state, True)
            readiness = Readiness(fake.parts, lambda: False)
            readiness.reasons()
            await trio.sleep(LEADERLESS_S)
            assert readiness.reasons() != []

    run(test)
