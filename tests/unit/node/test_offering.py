"""Tails are offered to several primaries at once: one that is silent holds up its own shards only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from node.blocking import InlineRunner
from node.offering import AT_ONCE, CALL_S, EVERY_S, Offering
from node.peerlink import PeerTimeoutError


class File:
    name, records = "tail-1-1", 1

    def read(self, offset: int, _max_bytes: int) -> tuple[list[bytes], int]:
        return ([] if offset else [b"x"]), 1


class Shard:
    """As ShardActor, of one side file; `primary` leads it."""

    def __init__(self, shard: int, primary: str) -> None:
        self.shard, self.primary, self.name, self.diverged = shard, primary, "a", False
        self.files = [File()]
        self.replica = SimpleNamespace(side_files=lambda: list(self.files))

    async def forget(self, file: File) -> None:
        await trio.lowlevel.checkpoint()
        self.files.remove(file)


class Links:
    """`silent` answers nothing, for as long as a call may take; the others take everything."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.under_way = self.most = 0

    def __getitem__(self, name: str) -> Any:
        async def call(op: str, body: Any, timeout_s: float) -> list[Any]:
            self.calls.append((name, body[0]))
            if name != "silent":
                await trio.sleep(0.01)
                return []
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            try:
                await trio.sleep(timeout_s)
            finally:
                self.under_way -= 1
            raise PeerTimeoutError(name, timeout_s)

        return SimpleNamespace(call=call)


def test_one_that_is_silent_holds_up_nobody_elses_tails() -> None:
    trio.run(holding_up, clock=trio.testing.MockClock(autojump_threshold=0))


async def holding_up() -> None:
    silent = {shard: Shard(shard, "silent") for shard in range(5)}
    well = {shard: Shard(shard, "b") for shard in range(5, 10)}
    unled = {10: Shard(10, "")}
    links = Links()
    offering = Offering({**silent, **well, **unled}, links, InlineRunner())  # type: ignore[arg-type, dict-item]
    async with trio.open_nursery() as nursery:
        await nursery.start(offering.run)
        await trio.sleep(10 * EVERY_S)
        assert not any(shard.files for shard in well.values())
        assert links.most == AT_ONCE
        # Those of the silent one have their turn, one after the other.
        await trio.sleep(3 * (CALL_S + EVERY_S))
        assert {shard for name, shard in links.calls if name == "silent"} == set(silent)
        silent[0].primary = "b"
        await trio.sleep(CALL_S + 2 * EVERY_S)
        assert not silent[0].files
        nursery.cancel_scope.cancel()
    assert offering.counters["files_done"] == 6
    assert all(shard.files for shard in [*list(silent.values())[1:], *unled.values()])
