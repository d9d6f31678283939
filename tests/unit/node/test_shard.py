"""The shard actor over a real replica, its disk's faults injected: what is answered is what is true."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import trio

from node.placement import Placement
from node.pulls import Forked, NotPrimary, Streamed
from router.ports import NodeError
from storage.errors import LogGoneError, ReplicaStoppedError
from storage.records import EMPTY, Fingerprint, Version, decode
from tests.unit.node.peers import on_trio
from tests.unit.node.voters import Clock, change, leading, leased, pull, running


def test_concurrent_writes_share_batches_and_keep_their_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            versions: list[Version] = []

            async def write(i: int) -> None:
                versions.append(await actor.write([change(i)], "primary", bytes(15) + bytes([i + 1]), 5.0))

            async with trio.open_nursery() as nursery:
                for i in range(50):
                    nursery.start_soon(write, i)
            assert sorted(versions) == [Version(1, n) for n in range(2, 52)], (
                "behind the record of their epoch"
            )
            assert actor.counters["batches"] < 50
            assert actor.replica.view.alive_rows == 50

    trio.run(main)


def test_a_retry_in_the_same_batch_and_after_a_restart_is_applied_once(tmp_path: Path) -> None:
    """`once`."""

    async def main() -> None:
        async with running(tmp_path) as actor:
            answers: list[Version] = []

            async def write() -> None:
                answers.append(await actor.write([change(1), change(2)], "primary", b"w" * 16, 5.0))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                nursery.start_soon(write)
            assert answers == [Version(1, 3)] * 2
        async with running(tmp_path) as actor:
            assert actor.reign is not None
            assert actor.reign.epoch == 2, "a process writes only in an epoch that it has opened itself"
            # Answered with a place behind the first try's: where the log ends.
            assert await actor.write([change(1), change(2)], "primary", b"w" * 16, 5.0) == Version(2, 4)
            assert actor.replica.position == Version(2, 4)
            assert actor.counters["deduplicated"] == 2

    trio.run(main)


def test_a_clock_that_steps_back_does_not_switch_once_off(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with running(tmp_path, clock=clock) as actor:
            await actor.write([change(1)], "primary", b"1" * 16, 5.0)
            clock.ns -= 3_600 * 10**9
            first = await actor.write([change(2)], "primary", b"2" * 16, 5.0)
            assert await actor.write([change(2)], "primary", b"2" * 16, 5.0) == first
            assert actor.replica.position == first

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
            assert actor.replica.position == Version(1, 1)
            assert await actor.write([change(1, classes=(63,))], "primary", b"w" * 16, 5.0) == Version(1, 2)

    trio.run(main)


def test_quorum_waits_for_a_majority_and_a_longer_foreign_log_does_not_count(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, ("a", "b", "c")) as actor, leased(actor, "c"):
            # b holds another history
            assert isinstance(await pull(actor, "b", Fingerprint(1, 1_000, 7)), Forked)
            with pytest.raises(NodeError) as caught:
                await actor.write([change(1)], "quorum", b"1" * 16, 0.2)
            assert caught.value.code == "ack_timeout"
            assert "1 of 3" in caught.value.message

            async def follow() -> None:
                named = EMPTY
                while named.sequence < 3:
                    answer = await pull(actor, "c", named, wait_s=1.0)
                    assert isinstance(answer, Streamed)
                    assert answer.records
                    named = actor.replica.fingerprint(answer.primary_last)
                await pull(actor, "c", named)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow)
                assert await actor.write([change(2)], "quorum", b"2" * 16, 5.0) == Version(1, 3)

    trio.run(main)


def test_a_position_counts_only_in_this_epoch_and_of_the_replica_that_votes(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, ("a", "b", "c")) as actor, leased(actor, "c"):
            await actor.write([change(1)], "primary", b"1" * 16, 5.0)
            assert actor.reign is not None
            progress, last = actor.reign.progress, actor.replica.fingerprint(2)
            early = actor.replica.fingerprint(1)
            await pull(actor, "b", last, epoch=0)
            await pull(actor, "b", early, replica=7)
            await pull(actor, "z", last, replica=7)
            assert progress.holders(1) == 1
            assert set(actor.election._echoed) <= {"c"}, "nor do their echoes"
            await pull(actor, "b", last)
            assert progress.holders(2) == 2

    trio.run(main)


def test_a_pull_is_answered_only_after_a_record_of_this_very_log(tmp_path: Path) -> None:
    """`log-matching`."""

    async def main() -> None:
        async with (
            running(tmp_path / "a", ("a", "b")) as actor,
            leased(actor, "b"),
            running(tmp_path / "b") as other,
        ):
            for i in range(5):
                await actor.write([change(i)], "primary", bytes(15) + bytes([i + 1]), 5.0)
                await other.write([change(i, fill=2.0)], "primary", bytes(15) + bytes([i + 1]), 5.0)
            assert actor.reign is not None
            for sequence in (1, 6):
                with pytest.raises(NodeError) as caught:
                    await pull(actor, "b", other.replica.fingerprint(sequence))
                assert caught.value.code == "diverged"
                assert actor.reign.progress.holders(1) == 1
            answer = await pull(actor, "b", actor.replica.fingerprint(4))
            assert isinstance(answer, Streamed)
            assert (answer.primary_last, decode(answer.records).sequence) == (6, 5)
            assert actor.reign.progress.holders(4) == 2

    trio.run(main)


def test_a_follower_whose_last_record_the_log_has_dropped_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, ("a", "b")) as actor, leased(actor, "b"):
            for i in range(200):
                big = change(i)._replace(metadata=b"\xc4\xff" + bytes(255) + bytes(500))
                await actor.write([big], "primary", i.to_bytes(16, "big"), 5.0)
            early = [actor.replica.fingerprint(1), actor.replica.fingerprint(2)]
            actor.replica.settled = actor.replica.position.sequence
            actor.replica.checkpoint()  # the clock's records are old: whole segments go
        async with running(tmp_path, ("a", "b")) as actor:  # and so does what memory kept of them
            kept = actor.replica._log.first_sequence
            assert kept > 3
            assert actor.reign is not None
            progress = actor.reign.progress
            for named in (*early, Fingerprint(1, kept - 1, 0), EMPTY):
                with pytest.raises(LogGoneError):
                    await pull(actor, "b", named)
                assert progress.holders(1) == 1, "what is not proved is not counted"
            await pull(actor, "b", actor.replica.fingerprint(kept))
            assert progress.holders(kept) == 2

    trio.run(main)


def test_a_session_of_another_history_is_never_satisfied(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            await actor.write([change(1)], "primary", b"1" * 16, 5.0)
            assert await actor.wait_applied(1, 2, 0.0)
            actor.diverged = True
            assert not await actor.wait_applied(1, 2, 0.0)

    trio.run(main)


def test_a_token_counts_by_the_epochs_of_the_log(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            await actor.write([change(1)], "primary", b"1" * 16, 5.0)
        async with running(tmp_path) as actor:  # its epoch begins at 3
            for token, applied in (
                ((1, 1), True),
                ((1, 2), True),
                ((1, 3), False),  # cut, whoever has written it
                ((2, 3), True),
                ((2, 4), False),
                ((3, 1), False),
            ):
                assert await actor.wait_applied(*token, 0.0) is applied, token

    trio.run(main)


def test_what_lags_behind_a_restarted_primary_is_as_old_as_the_log_says(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with running(tmp_path, ("a", "b"), clock) as actor, leased(actor, "b"):
            await actor.write([change(1)], "primary", b"1" * 16, 5.0)
        clock.ns += 3_600 * 10**9
        async with running(tmp_path, ("a", "b"), clock, lead=False) as actor:
            assert actor.idle_s() == pytest.approx(3_600)
            await leading(actor)
            answer = await pull(actor, "b", EMPTY)
            assert isinstance(answer, Streamed)
            assert answer.records
            assert answer.lag_ms >= 3_600_000

    trio.run(main)


def test_a_stuck_disk_does_not_hold_the_asker_past_its_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as actor:
            async with actor._writing:
                with trio.fail_after(2.0), pytest.raises(NodeError) as caught:
                    await actor.write([change(1)], "primary", b"1" * 16, 0.1)
            assert caught.value.code == "outcome_unknown"

    trio.run(main)


def test_a_write_waits_for_a_lease_and_is_refused_without_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, ("a", "b", "c")) as actor:
            began = trio.current_time()
            with pytest.raises(NodeError) as caught:
                await actor.write([change(1)], "primary", b"1" * 16, 0.1)
            assert caught.value.code == "no_lease"
            assert caught.value.retry_after_ms
            assert trio.current_time() - began >= 0.1
            assert actor.replica.position == Version(1, 1), "nothing was begun"
            async with trio.open_nursery() as nursery:

                async def later() -> None:
                    await trio.sleep(0.05)
                    await pull(actor, "b", EMPTY)

                nursery.start_soon(later)
                assert await actor.write([change(1)], "primary", b"1" * 16, 2.0) == Version(1, 2)

    trio.run(main)


def test_what_waits_for_an_acknowledgement_ends_as_unknown_when_it_leads_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, ("a", "b", "c")) as actor, leased(actor, "c"):
            codes: list[str] = []

            async def write(i: int) -> None:
                with pytest.raises(NodeError) as caught:
                    await actor.write([change(i)], "quorum", bytes([i]) * 16, 30.0)
                codes.append(caught.value.code)

            with trio.fail_after(5.0):
                async with trio.open_nursery() as nursery:
                    for i in range(1, 6):
                        nursery.start_soon(write, i)
                    while actor.replica.position.sequence < 6:
                        await actor.changed()
                    # Somebody has been promised a higher epoch.
                    answer = await pull(actor, "b", EMPTY, promised=9)
                    assert isinstance(answer, NotPrimary)
            assert codes == ["outcome_unknown"] * 5

    trio.run(main)


def test_a_write_that_is_on_its_way_to_the_disk_when_the_epoch_ends_is_unknown(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, ("a", "b", "c")) as actor, leased(actor, "b"):
            hold, append = threading.Event(), actor.replica.append

            def slow(blobs: list[bytes], rows: int) -> None:
                hold.wait(5.0)
                append(blobs, rows)

            actor.replica.append = slow  # type: ignore[method-assign]
            codes: list[str] = []

            async def write(i: int) -> None:
                with pytest.raises(NodeError) as caught:
                    await actor.write([change(i)], "primary", bytes([i]) * 16, 30.0)
                codes.append(caught.value.code)

            with trio.fail_after(5.0):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(write, 1)
                    while not actor._commit.statistics().flushing:
                        await trio.sleep(0.001)
                    nursery.start_soon(write, 2)  # in the next batch
                    while not actor._commit.statistics().waiting:
                        await trio.sleep(0.001)
                    await pull(actor, "b", EMPTY, promised=9)
                    assert not actor.leads
                    hold.set()
            assert codes == ["outcome_unknown", "no_primary"]
            assert actor.replica.position.sequence >= 2, "what was on its way is in the log all the same"

    trio.run(main)


def test_a_write_whose_lease_ends_during_the_fsync_is_not_acknowledged(tmp_path: Path) -> None:
    """`checked-twice`: it held when the write began, and does not when the disk is done; nobody can say what becomes of it."""

    async def main() -> None:
        async with running(tmp_path, ("a", "b", "c")) as actor:
            append, lease_s = actor.replica.append, actor.election._config.lease_s

            def slow(blobs: list[bytes], rows: int) -> None:
                append(blobs, rows)
                time.sleep(lease_s)

            actor.replica.append = slow  # type: ignore[method-assign]
            await pull(actor, "b", EMPTY)
            assert actor.election.may_acknowledge(trio.current_time())
            with pytest.raises(NodeError) as caught:
                await actor.write([change(1)], "primary", b"1" * 16, lease_s + 0.5)
            assert caught.value.code in ("outcome_unknown", "ack_timeout", "no_lease")
            assert actor.replica.position == Version(1, 2), "it is in the log"

    trio.run(main)


def test_a_primary_that_has_resigned_begins_nothing_that_waited(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, ("a", "b", "c")) as actor, leased(actor, "b"):
            hold, append = threading.Event(), actor.replica.append

            def slow(blobs: list[bytes], rows: int) -> None:
                hold.wait(5.0)
                append(blobs, rows)

            actor.replica.append = slow  # type: ignore[method-assign]
            codes: list[str] = []

            async def write(i: int) -> None:
                try:
                    await actor.write([change(i)], "primary", bytes([i]) * 16, 0.5)
                except NodeError as error:
                    codes.append(f"{i} {error.code}")

            with trio.fail_after(5.0):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(write, 1)
                    while not actor._commit.statistics().flushing:
                        await trio.sleep(0.001)
                    nursery.start_soon(write, 2)  # in the next batch
                    while not actor._commit.statistics().waiting:
                        await trio.sleep(0.001)
                    actor.election.resign()
                    assert actor.end == 2, "what is on its way to the disk is part of the log"
                    hold.set()
            # The first is on the disk, and nobody may say so.
            assert codes == ["2 no_lease", "1 outcome_unknown"]
            assert actor.replica.position == Version(1, 2)
            actor.resume()
            assert await actor.write([change(2)], "primary", bytes([2]) * 16, 2.0) == Version(1, 3)

    trio.run(main)


@on_trio
async def test_who_lacks_what_was_written_before_this_epoch_is_as_old_as_that(tmp_path: Path) -> None:
    """A new replica, say: that the primary has led for a moment only does not make it fresh."""
    clock = Clock()
    async with running(tmp_path, ("a", "b"), clock) as actor:
        async with leased(actor, "b"):
            await actor.write([change(1)], "primary", b"1" * 16, 2.0)
            clock.ns += 3_600 * 10**9
            await actor.write([change(2)], "primary", b"2" * 16, 2.0)
        actor.act(actor, actor.election.renew(trio.current_time()))
        await leading(actor)
        answer = await pull(actor, "b", EMPTY)
        assert isinstance(answer, Streamed)
        assert answer.lag_ms >= 3_600_000
        level = await pull(actor, "b", actor.replica.fingerprint(actor.replica.position.sequence))
        assert isinstance(level, Streamed)
        assert level.lag_ms == 0


@on_trio
async def test_who_holds_by_no_placement_gets_nothing_of_an_epoch_before_it_is_settled(
    tmp_path: Path,
) -> None:
    """It may be the voter that this epoch takes out: with its record it would refuse all who lack that, and could not stand."""
    async with running(tmp_path, ("a", "b", "c")) as actor:
        assert not actor.settled
        stranger = await pull(actor, "d", EMPTY, replica=0xD)
        assert isinstance(stranger, Streamed)
        assert not stranger.records
        voter = await pull(actor, "b", EMPTY)
        assert isinstance(voter, Streamed)
        assert voter.records
        await pull(actor, "b", actor.replica.fingerprint(actor.replica.position.sequence))
        assert actor.settled
        stranger = await pull(actor, "d", EMPTY, replica=0xD)
        assert isinstance(stranger, Streamed)
        assert stranger.records


@on_trio
async def test_only_the_replica_that_is_named_is_level(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        end = actor.replica.fingerprint(actor.replica.position.sequence)
        await pull(actor, "b", end)
        assert actor.is_level("b")
        # Its disk was replaced: what the former one had says nothing of this one.
        await pull(actor, "b", EMPTY, replica=0x99)
        assert not actor.is_level("b")


@on_trio
async def test_a_learner_on_a_new_disk_is_named_anew_at_once_and_a_voter_once_it_is_level(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        told: list[tuple[str, int]] = []
        actor.readmit = lambda _actor, name, replica: told.append((name, replica))
        actor.placement = Placement(actor.placement.voters, (("d", 4),))
        await pull(actor, "d", EMPTY, replica=4)
        await pull(actor, "b", EMPTY)
        await pull(actor, "b", EMPTY, replica=0x99)
        assert told == []
        assert isinstance(await pull(actor, "d", EMPTY, replica=5), NotPrimary)
        end = actor.replica.fingerprint(actor.replica.position.sequence)
        assert isinstance(await pull(actor, "b", end, replica=0x99), NotPrimary)
        assert told == [("d", 5), ("b", 0x99)]
