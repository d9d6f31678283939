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
from storage.errors import LogGoneError, ReplicaStoppedError
from storage.records import EMPTY, Fingerprint, Kind, Operation, Version, decode
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
            with pytest.raises(NodeError) as caught:  # b holds another history
                await actor.serve_pull("b", Fingerprint(1, 1_000, 7), 1 << 20, 0.0)
            assert caught.value.code == "diverged"
            with pytest.raises(NodeError) as caught:
                await actor.write([change(1)], "quorum", b"1" * 16, 0.2)
            assert caught.value.code == "ack_timeout"
            assert "1 of 3" in caught.value.message

            async def follow() -> None:
                named = EMPTY
                while named.sequence < 2:
                    _, last, _, data = await actor.serve_pull("c", named, 1 << 20, 1.0)
                    assert data
                    named = actor.replica.fingerprint(last)
                await actor.serve_pull("c", named, 1 << 20, 0.0)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow)
                assert await actor.write([change(2)], "quorum", b"2" * 16, 5.0) == Version(1, 2)

    trio.run(main)


def test_a_pull_is_answered_only_after_a_record_of_this_very_log(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "a", voters=("a", "b")) as actor, running(tmp_path / "b") as other:
            for i in range(5):
                await actor.write([change(i)], "primary", bytes(15) + bytes([i + 1]), 5.0)
                await other.write([change(i, fill=2.0)], "primary", bytes(15) + bytes([i + 1]), 5.0)
            for sequence in (1, 5):
                with pytest.raises(NodeError) as caught:
                    await actor.serve_pull("b", other.replica.fingerprint(sequence), 1 << 20, 0.0)
                assert caught.value.code == "diverged"
                assert actor.progress.count(1) == 1
            _, last, _, data = await actor.serve_pull("b", actor.replica.fingerprint(3), 1 << 20, 0.0)
            assert (last, decode(data).sequence) == (5, 4)
            assert actor.progress.count(3) == 2

    trio.run(main)


def test_a_follower_whose_last_record_the_log_has_dropped_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, voters=("a", "b")) as actor:
            for i in range(200):
                big = change(i)._replace(metadata=b"\xc4\xff" + bytes(255) + bytes(500))
                await actor.write([big], "primary", i.to_bytes(16, "big"), 5.0)
            early = [actor.replica.fingerprint(1), actor.replica.fingerprint(2)]
            actor.replica.checkpoint()  # the clock's records are old: whole segments go
        async with running(tmp_path, voters=("a", "b")) as actor:  # and so does what memory kept of them
            kept = actor.replica._log.first_sequence
            assert kept > 3
            for named in (*early, Fingerprint(1, kept - 1, 0), EMPTY):
                with pytest.raises(LogGoneError):
                    await actor.serve_pull("b", named, 1 << 20, 0.0)
                assert actor.progress.count(1) == 1, "what is not proved is not counted"
            await actor.serve_pull("b", actor.replica.fingerprint(kept), 1 << 20, 0.0)
            assert actor.progress.count(kept) == 2

    trio.run(main)


def test_a_session_of_another_history_is_never_satisfied(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            await actor.write([change(1)], "primary", b"1" * 16, 5.0)
            assert await actor.wait_applied(1, 1, 0.0)
            actor.diverged = True
            assert not await actor.wait_applied(1, 1, 0.0)

    trio.run(main)


def test_what_lags_behind_a_restarted_primary_is_as_old_as_the_log_says(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with running(tmp_path, voters=("a", "b"), clock=clock) as actor:
            await actor.write([change(1)], "primary", b"1" * 16, 5.0)
        clock.ns += 3_600 * 10**9
        async with running(tmp_path, voters=("a", "b"), clock=clock) as actor:
            assert actor.idle_s() == pytest.approx(3_600)
            _, _, lag_ms, data = await actor.serve_pull("b", EMPTY, 1 << 20, 0.0)
            assert data
            assert lag_ms >= 3_600_000

    trio.run(main)


def test_a_stuck_disk_does_not_hold_the_asker_past_its_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            async with actor._writing:
                with trio.fail_after(2.0), pytest.raises(NodeError) as caught:
                    await actor.write([change(1)], "primary", b"1" * 16, 0.1)
            assert caught.value.code == "outcome_unknown"

    trio.run(main)
