"""The shard actor over a real replica, its disk's faults injected: what is answered is what is true."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

from node.blocking import InlineRunner, ThreadRunner
from node.shard import ShardActor
from router.layout import Placement
from router.ports import Change, NodeError
from storage.config import StorageConfig
from storage.errors import ReplicaStoppedError
from storage.records import Kind, Operation, Version
from storage.replica import Replica

DIM = 8
CONFIG = StorageConfig(dim=DIM, class_width=64, engine="exact", wal_segment_bytes=1 << 16)


def change(id_: int, fill: float = 1.0, classes: tuple[int, ...] = ()) -> Change:
    return Change(Operation.PUT, Kind.ITEM, id_, np.full(DIM, fill, np.float16).tobytes(), classes, b"\x80")


class Clock:
    def __init__(self) -> None:
        self.ns = 10**18

    def __call__(self) -> int:
        return self.ns


@asynccontextmanager
async def running(
    path: Path, voters: tuple[str, ...] = ("a",), clock: Clock | None = None
) -> AsyncIterator[ShardActor]:
    replica = Replica.open(path, shard=0, node_id="n", config=CONFIG)
    actor = ShardActor(
        replica,
        Placement(shard=0, epoch=1, voters=voters),
        name="a",
        log_runner=ThreadRunner("log"),
        maintenance_runner=InlineRunner(),
        queue_max=100,
        now_ns=clock or Clock(),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        try:
            yield actor
        finally:
            nursery.cancel_scope.cancel()
    replica.abort()


def test_concurrent_writes_share_batches_and_keep_their_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            versions: list[Version] = []

            async def write(i: int) -> None:
                versions.append(await actor.write([change(i)], "primary", bytes(15) + bytes([i + 1]), 5.0))

            async with trio.open_nursery() as nursery:
                for i in range(50):
                    nursery.start_soon(write, i)
            assert sorted(versions) == [Version(1, n) for n in range(1, 51)]
            assert actor.counters["batches"] < 50
            assert actor.replica.view.alive_rows == 50

    trio.run(main)


def test_a_retry_in_the_same_batch_and_after_a_restart_is_applied_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            answers: list[Version] = []

            async def write() -> None:
                answers.append(await actor.write([change(1), change(2)], "primary", b"w" * 16, 5.0))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                nursery.start_soon(write)
            assert answers == [Version(1, 2)] * 2
        async with running(tmp_path) as actor:
            assert await actor.write([change(1), change(2)], "primary", b"w" * 16, 5.0) == Version(1, 2)
            assert actor.replica.position == Version(1, 2)

    trio.run(main)


def test_a_clock_that_steps_back_does_not_switch_once_off(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with running(tmp_path, clock=clock) as actor:
            await actor.write([change(1)], "primary", b"1" * 16, 5.0)
            clock.ns -= 3_600 * 10**9
            first = await actor.write([change(2)], "primary", b"2" * 16, 5.0)
            assert await actor.write([change(2)], "primary", b"2" * 16, 5.0) == first

    trio.run(main)


def test_a_failed_fsync_is_an_unknown_outcome_and_then_a_refusal(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:

            def fail(blobs: object, rows: int) -> None:
                raise ReplicaStoppedError("fdatasync: Input/output error")

            actor.replica.append = fail  # type: ignore[method-assign]
            for code in ("outcome_unknown", "replica_stopped"):
                with pytest.raises(NodeError) as caught:
                    await actor.write([change(1)], "primary", b"w" * 16, 5.0)
                assert caught.value.code == code

    trio.run(main)


def test_what_does_not_fit_this_node_never_enters_the_log(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            short = change(1)._replace(vector=b"\0\0")
            for bad in (change(1, classes=(64,)), short):
                with pytest.raises(NodeError) as caught:
                    await actor.write([bad], "primary", b"w" * 16, 5.0)
                assert caught.value.code == "bad_request"
            assert actor.replica.position == Version(0, 0)
            assert await actor.write([change(1, classes=(63,))], "primary", b"w" * 16, 5.0) == Version(1, 1)

    trio.run(main)


def test_quorum_waits_for_a_majority_and_a_longer_foreign_log_does_not_count(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, voters=("a", "b", "c")) as actor:
            await actor.serve_pull("b", 1_000, 1 << 20, 0.0)  # b holds another history
            with pytest.raises(NodeError) as caught:
                await actor.write([change(1)], "quorum", b"1" * 16, 0.2)
            assert caught.value.code == "ack_timeout"
            assert "1 of 3" in caught.value.message

            async def follow() -> None:
                after = 0
                while after < 2:
                    _, last, _, data = await actor.serve_pull("c", after, 1 << 20, 1.0)
                    assert data
                    after = last
                await actor.serve_pull("c", after, 1 << 20, 0.0)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow)
                assert await actor.write([change(2)], "quorum", b"2" * 16, 5.0) == Version(1, 2)

    trio.run(main)


def test_a_stuck_disk_does_not_hold_the_asker_past_its_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            async with actor._writing:
                with trio.fail_after(2.0), pytest.raises(NodeError) as caught:
                    await actor.write([change(1)], "primary", b"1" * 16, 0.1)
            assert caught.value.code == "outcome_unknown"

    trio.run(main)
