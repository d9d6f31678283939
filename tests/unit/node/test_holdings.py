"""Replicas as they are opened: what they may be bound by, and who they are."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from node import promises
from node.blocking import ThreadRunner
from node.founders import Founders, load, save
from node.holdings import Holdings
from node.promises import Promises
from node.shard import ShardActor
from node.supervisor import Supervisor
from storage.batch import Batch
from storage.errors import DamagedError
from storage.quarantine import Quarantine, keep
from storage.records import Kind, Operation, Version
from tests.unit.node.peers import on_trio
from tests.unit.node.voters import CONFIG, change, leading, running
from tests.unit.storage.replica_writer import vector


@asynccontextmanager
async def opened(
    path: Path, founders: tuple[str, ...] = ("a", "b", "c"), *, others: bool = False
) -> AsyncIterator[ShardActor]:
    config = SimpleNamespace(
        storage=CONFIG, node=SimpleNamespace(name="a"), limits=SimpleNamespace(write_queue=100)
    )
    file = path / "promises"
    kept = Promises(file, promises.load(file), ThreadRunner("promises"))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(kept.run)
            holdings = Holdings(config, path, "a", kept, None, None, lambda _shard: others)  # type: ignore[arg-type]
            yield await holdings.open(0, founders)
            await holdings.close(lambda shard: None)
            nursery.cancel_scope.cancel()


@on_trio
async def test_a_new_replica_owes_nothing_and_one_that_comes_back_may(tmp_path: Path) -> None:
    async with opened(tmp_path) as actor:
        before = actor.replica.replica_id
        assert actor.election._bound_until <= trio.current_time()
    async with opened(tmp_path) as actor:
        assert actor.replica.replica_id == before
        assert actor.election._bound_until > trio.current_time(), "it may have promised its silence"


@on_trio
@pytest.mark.parametrize("records", [0, 1])
async def test_one_whose_promises_are_gone_is_another_replica_also_when_its_log_is_empty(
    tmp_path: Path, records: int
) -> None:
    """A founder may have promised the first epoch before a byte of it has come; with its old id it could promise that again."""
    async with running(tmp_path, keep=True, lead=False) as actor:
        if records:
            await leading(actor)
            await actor.write([change(1)], "primary", b"1" * 16, 2.0)
        else:
            actor.election.configure(())
            assert actor.replica.position == Version(0, 0)
        before = actor.replica.replica_id
    (tmp_path / "promises").unlink()
    async with opened(tmp_path) as actor:
        assert actor.replica.replica_id != before


@on_trio
async def test_a_replica_that_no_placement_names_yet_can_be_begun(tmp_path: Path) -> None:
    async with opened(tmp_path, ()) as actor:
        now = trio.current_time()
        assert not actor.election.may_acknowledge(now)
        assert actor.election.on_timer(now + 1e6) == []
        assert actor.election.takes(1)


@asynccontextmanager
async def holding(path: Path, founders: Founders | None = None) -> AsyncIterator[tuple[Holdings, Any]]:
    config = SimpleNamespace(
        storage=CONFIG, node=SimpleNamespace(name="a"), limits=SimpleNamespace(write_queue=100)
    )
    failover = SimpleNamespace(adopt=lambda actor: None)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            kept = Promises(path / "promises", {}, ThreadRunner("promises"))
            await nursery.start(kept.run)
            leave = founders or Founders(path / "founders", "c", [], [])
            holdings = Holdings(config, path, "a", kept, Supervisor(nursery), {}, leave=leave.leave)  # type: ignore[arg-type]
            yield holdings, failover
            nursery.cancel_scope.cancel()


@on_trio
@pytest.mark.parametrize("after", range(0, 40, 3))
async def test_a_replica_is_brought_or_removed_as_a_whole_when_who_asked_is_gone(
    tmp_path: Path, after: int
) -> None:
    """The primary's link breaks: its question is cancelled, wherever it is."""

    async def cancelled(job: Callable[[], Awaitable[Any]]) -> None:
        async with trio.open_nursery() as asker:
            asker.start_soon(job)
            for _ in range(after):
                await trio.sleep(0.0005)
            asker.cancel_scope.cancel()

    async with holding(tmp_path) as (holdings, failover):
        await cancelled(lambda: holdings.bring(0, failover))
        await holdings.bring(0, failover)
        assert 0 in holdings.replicators, "it follows"
        await cancelled(lambda: holdings.drop(0))
        assert (0 in holdings.actors) == holdings.path(0).exists()
        await holdings.bring(0, failover)
        assert 0 in holdings.replicators


@on_trio
async def test_what_was_removed_or_brought_founds_nothing_at_the_next_start(tmp_path: Path) -> None:
    """`founded-once`: those who had a shard first would found it again when all its replicas have moved away."""
    founders = Founders(tmp_path / "founders", "c", [0, 1, 2], [])
    save(founders)
    async with holding(tmp_path, founders) as (holdings, failover):
        await holdings.open(0, ("a", "b", "c"))
        await holdings.start(0, failover)
        await holdings.drop(0)
        assert not holdings.path(0).exists()
        # It is brought back, and a crash comes before the first byte.
        await holdings.bring(0, failover)
        await holdings.bring(1, failover)
    known = load(tmp_path / "founders", "c")
    assert (known.founds, known.founded) == ({2}, {0, 1})
    (tmp_path / "removed-007").mkdir()
    async with holding(tmp_path, known) as (holdings, failover):
        assert holdings.on_disk() == [0, 1]
        assert not (tmp_path / "removed-007").exists(), "half of one that was being removed"


@on_trio
async def test_a_disk_that_cannot_note_it_removes_and_brings_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    founders = Founders(tmp_path / "founders", "c", [0], [])
    async with holding(tmp_path, founders) as (holdings, failover):
        await holdings.open(0, ("a", "b", "c"))
        await holdings.start(0, failover)

        def full(_founders: Founders) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("node.founders.save", full)
        with pytest.raises(OSError, match="No space"):
            await holdings.drop(0)
        with pytest.raises(OSError, match="No space"):
            await holdings.bring(1, failover)
        assert 0 in holdings.actors
        assert holdings.path(0).exists()
        assert not holdings.path(1).exists()
        assert founders.founds == {0}


@on_trio
async def test_a_replica_that_is_removed_leaves_its_quarantine_here(tmp_path: Path) -> None:
    async with holding(tmp_path) as (holdings, failover):
        for round_ in (1, 2):
            actor = await holdings.bring(0, failover)
            assert len(holdings.quarantined()) == round_ - 1
            batch = Batch(1, 0, 1)
            batch.add(((Operation.PUT, Kind.ITEM, round_, vector(round_), (), b"m"),), bytes(16))
            await actor.put_aside(batch.records)
            assert holdings.quarantined()[-1] == actor.replica.quarantine_path
            await holdings.drop(0)
        kept = holdings.quarantined()
        assert [path.relative_to(tmp_path).as_posix() for path in kept] == [
            "quarantine/shard-000-1",
            "quarantine/shard-000-2",
        ]
        # Whole, and as before: under its usual name it can be read.
        for round_, path in enumerate(kept, 1):
            (tmp_path / "look").mkdir(exist_ok=True)
            (tmp_path / "look" / "quarantine").write_bytes(path.read_bytes())
            assert [one.id for one in Quarantine(tmp_path / "look", 0).records()] == [round_]
        # After a crash in between it is there once.
        directory = tmp_path / "again"
        directory.mkdir()
        os.link(kept[0], directory / "quarantine")
        assert keep(directory, tmp_path / "quarantine", 0) == kept[0]
        kept[0].unlink()
        assert holdings.quarantined() == kept[1:]


@on_trio
async def test_a_damaged_replica_is_begun_anew_only_when_others_vote(tmp_path: Path) -> None:
    async with running(tmp_path, keep=True) as actor:
        await actor.write([change(1)], "primary", b"1" * 16, 2.0)
        before = actor.replica.replica_id
    (rows,) = (tmp_path / "shard-000").glob("items-*.f16")
    data = bytearray(rows.read_bytes())
    data[4096] ^= 1
    rows.write_bytes(data)
    with pytest.raises(ExceptionGroup) as caught:
        async with opened(tmp_path):
            pass
    assert isinstance(caught.value.exceptions[0], DamagedError)
    assert not (tmp_path / "shard-000.damaged-1").exists()
    async with opened(tmp_path, others=True) as actor:
        assert actor.replica.replica_id != before
        assert actor.replica.position == Version(0, 0)
        assert actor.unreadable == "unavailable", "that something is not here says nothing"
    assert (tmp_path / "shard-000.damaged-1").is_dir()


@on_trio
async def test_one_at_which_processes_end_again_and_again_is_begun_anew(tmp_path: Path) -> None:
    async with running(tmp_path, keep=True) as actor:
        await actor.write([change(1)], "primary", b"1" * 16, 2.0)
    marker = tmp_path / "shard-000.opening"
    for ended, anew in ((b"..", False), (b"...", True)):
        marker.write_bytes(ended)
        async with opened(tmp_path, others=True) as actor:
            assert actor.blank is anew
        assert not marker.exists()
    async with opened(tmp_path, others=False) as actor:
        assert actor.replica.position == Version(0, 0)
