"""Replicas as they are opened: what they may be bound by, and who they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from node import promises
from node.blocking import ThreadRunner
from node.holdings import Holdings
from node.promises import Promises
from node.shard import ShardActor
from node.supervisor import Supervisor
from storage.errors import DamagedError
from storage.records import Version
from tests.unit.node.peers import on_trio
from tests.unit.node.voters import CONFIG, change, leading, running


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
async def holding(path: Path) -> AsyncIterator[tuple[Holdings, Any]]:
    config = SimpleNamespace(
        storage=CONFIG, node=SimpleNamespace(name="a"), limits=SimpleNamespace(write_queue=100)
    )
    failover = SimpleNamespace(adopt=lambda actor: None)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            kept = Promises(path / "promises", {}, ThreadRunner("promises"))
            await nursery.start(kept.run)
            holdings = Holdings(config, path, "a", kept, Supervisor(nursery), {})  # type: ignore[arg-type]
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
