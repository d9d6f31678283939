"""Snapshots over a real link: fetched whatever breaks, installed whole or not at all, and nothing of the old log lost."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from node import snapshots as module
from node.blocking import InlineRunner, ThreadRunner
from node.bulk import Piece
from node.election import Role
from node.fetching import Fetcher, SnapshotError, fetch, opened
from node.peerlink import PeerLink, RemoteError
from node.placement import Placement
from node.remote import coded
from node.replication import Progress
from node.shard import Reign, ShardActor
from node.snapshots import Snapshots
from node.transfer import Throttle, Transfer
from router.ports import NodeError
from storage.batch import Batch
from storage.config import StorageConfig
from storage.errors import DamagedError, DiskFullError
from storage.installing import Installing
from storage.records import Kind, Mark, Operation, Version
from storage.replica import Replica
from storage.table import Table
from tests.unit.node.peers import linked, on_trio
from tests.unit.storage.replica_writer import vector

CONFIG = StorageConfig(dim=8, class_width=64, engine="exact", wal_segment_bytes=1 << 16, wal_keep_s=0.0)


def replica_at(path: Path, node: str) -> Replica:
    return Replica.open(path, shard=0, node_id=node, config=CONFIG)


def put(replica: Replica, epoch: int, *ids: int, seed: int = 0) -> None:
    batch = Batch(epoch, replica.position.sequence, 1)
    for id_ in ids:
        batch.add(((Operation.PUT, Kind.ITEM, id_, vector(id_ + seed), (), b"m" * 100),), bytes(16))
    replica.append(batch.blobs, len(ids))
    replica.apply(batch.records)


def begin(replica: Replica, epoch: int, placement: Placement) -> None:
    batch = Batch(epoch, replica.position.sequence, 1)
    batch.add_mark(Mark.EPOCH, placement.pack())
    replica.append(batch.blobs, 0)
    replica.apply(batch.records)


def actor_of(replica: Replica, name: str) -> ShardActor:
    return ShardActor(
        replica, ("a", "b"), name=name, promised=0, owes=False, log_runner=ThreadRunner("log"),
        maintenance_runner=InlineRunner(), queue_max=100,
    )  # fmt: skip


@asynccontextmanager
async def pair(
    path: Path, *, items: int = 300
) -> AsyncIterator[tuple[ShardActor, ShardActor, Snapshots, PeerLink]]:
    """`b` leads epoch 2 with `items` items; `a` has an empty log and is linked to it."""
    ours, theirs = replica_at(path / "a" / "shard-000", "a"), replica_at(path / "b" / "shard-000", "b")
    placement = Placement((("b", theirs.replica_id), ("a", ours.replica_id)))
    begin(theirs, 1, placement)
    put(theirs, 1, *range(items // 2))
    begin(theirs, 2, placement)
    put(theirs, 2, *range(items // 2, items))
    follower, primary = actor_of(ours, "a"), actor_of(theirs, "b")
    primary.reign = Reign(2, Progress("b", placement, 2, 1))
    snapshots = Snapshots({0: primary}, path / "b" / "snapshots", expire_s=1.0)
    handlers = {op: coded(handler) for op, handler in snapshots.handlers().items()}
    async with trio.open_nursery() as nursery:
        await nursery.start(snapshots.run)
        async with linked(handlers, bulk=lambda stream: snapshots.give(stream)) as (link, _):
            yield follower, primary, snapshots, link
        nursery.cancel_scope.cancel()
    follower.replica.abort()
    primary.replica.abort()


async def install(follower: ShardActor, link: PeerLink) -> None:
    async with opened(link, 0, follower.replica.position) as snapshot:
        await Fetcher().catch_up(follower, snapshot, link, Transfer())


def read(snapshots: Snapshots, id_: str, name: str = "table/data.mdb", offset: int = 0) -> None:
    with snapshots.reading(Piece(id_, name, offset, 10)) as path:
        assert path.stat().st_size > 10


def digest(actor: ShardActor) -> Any:
    return actor.replica.statistics()["digest"]


@on_trio
async def test_a_snapshot_takes_the_place_of_a_replica_that_goes_on_under_its_id(tmp_path: Path) -> None:
    async with pair(tmp_path) as (follower, primary, _, link):
        before = follower.replica
        await install(follower, link)
        now = follower.replica
        assert now is follower.upkeep.replica is not before
        assert (now.replica_id, now.node_id) == (before.replica_id, "a")
        assert now.position == primary.replica.position
        assert digest(follower) == digest(primary)
        assert follower.placement == primary.placement
        # It can name its last record, which the primary has.
        last = now.position.sequence
        assert now.fingerprint(last) == primary.replica.fingerprint(last)
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["shard-000"]
        assert not list((tmp_path / "b" / "snapshots").iterdir())
        assert not primary.replica.log_holds
        # What the old one's log leaves when it is closed must not be taken for the new one's.
        assert (tmp_path / "a" / "shard-000" / "wal" / "SEAL").exists()
        now.retire()  # as a crash: it writes nothing
        follower.replica = now = replica_at(tmp_path / "a" / "shard-000", "a")
        put(primary.replica, 2, 1_000)
        now.append([primary.replica.read_log(last, 1 << 20)], 1)
        assert now.logged == last + 1


@on_trio
async def test_what_is_not_part_of_its_history_goes_into_a_side_file_first(tmp_path: Path) -> None:
    async with pair(tmp_path) as (follower, primary, _, link):
        begin(follower.replica, 1, primary.placement)
        put(follower.replica, 1, *range(200))  # up to 150 those of the primary's epoch 1, the last 50 its own
        follower._end = follower.replica.position
        await install(follower, link)
        (side,) = follower.replica.side_files()
        assert side.records == 50
        assert digest(follower) == digest(primary)
        assert Path(side.path).parent == tmp_path / "a" / "shard-000"


@on_trio
async def test_side_files_and_quarantine_of_both_are_carried_over(tmp_path: Path) -> None:
    async with pair(tmp_path) as (follower, primary, _, link):
        for replica, seed in ((follower.replica, 1), (primary.replica, 2)):
            end = replica.position
            put(replica, 2, *range(5_000, 5_003), seed=seed)
            replica.cut(end.sequence)
        batch = Batch(1, 0, 1)
        batch.add(((Operation.PUT, Kind.ITEM, 7, vector(7), (), b""),), bytes(16))
        follower.replica.quarantine(batch.records)
        await install(follower, link)
        assert sorted(file.records for file in follower.replica.side_files()) == [3, 3]
        assert [one.id for one in follower.replica.quarantined()] == [7]


@on_trio
async def test_it_never_takes_the_place_of_one_that_leads_is_ahead_or_has_promised_more(
    tmp_path: Path,
) -> None:
    """`end-not-back`, `binds-alike`."""
    async with pair(tmp_path) as (follower, _, _, link):
        async with opened(link, 0, Version(0, 0)) as snapshot:
            follower.election.role = Role.PRIMARY
            with pytest.raises(SnapshotError, match="not followed"):
                await Fetcher().catch_up(follower, snapshot, link, Transfer())
            follower.election.role = Role.FOLLOWER
            follower.election.promised = 3
            with pytest.raises(SnapshotError, match="not followed"):
                await Fetcher().catch_up(follower, snapshot, link, Transfer())
            follower.election.promised = 0
            begin(follower.replica, 2, follower.placement)
            put(follower.replica, 2, *range(400))
            with pytest.raises(SnapshotError, match="beyond"):
                await Fetcher().catch_up(follower, snapshot, link, Transfer())
        with pytest.raises(RemoteError) as caught:
            await install(follower, link)
        assert caught.value.code == "snapshot_behind"
        assert follower.replica.get(Kind.ITEM, 399) is not None
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["shard-000"]


@on_trio
async def test_a_broken_connection_goes_on_where_it_was_and_a_lost_snapshot_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(tmp_path, items=20_000) as (follower, primary, snapshots, link):
        transfer = Transfer()
        streams: list[trio.SocketStream] = []
        give = snapshots.give

        async def giving(stream: trio.abc.Stream) -> None:
            assert isinstance(stream, trio.SocketStream)
            streams.append(stream)
            await give(stream)

        monkeypatch.setattr(snapshots, "give", giving)

        async def breaking() -> None:
            while transfer.done_bytes < 2 << 20:
                await trio.sleep(0.001)
            # What the giver sends then is cut off within a piece.
            for stream in streams:
                stream.socket.shutdown(socket.SHUT_RDWR)

        async with opened(link, 0, Version(0, 0)) as snapshot, trio.open_nursery() as nursery:
            nursery.start_soon(breaking)
            await Fetcher(bytes_per_s=20e6).catch_up(follower, snapshot, link, transfer)
        assert len(streams) == 2
        assert digest(follower) == digest(primary)
        # Each byte once, but for the chunks that were under way.
        assert snapshots.counters["read_bytes"] <= snapshot.bytes + (4 << 20)
        async with opened(link, 0, Version(0, 0)) as snapshot:
            await link.call("snapshot_close", [snapshot.id], 1.0)
            with pytest.raises(RemoteError) as caught:
                await Fetcher().catch_up(follower, snapshot, link, Transfer())
            assert caught.value.code == "snapshot_gone"


@on_trio
async def test_a_byte_that_is_harmed_on_the_way_is_found_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        pair(tmp_path) as (follower, _, snapshots, link),
        opened(link, 0, Version(0, 0)) as snapshot,
    ):
        real = snapshots.reading

        @contextmanager
        def harmed(piece: Piece) -> Iterator[Path]:
            with real(piece) as path:
                data = bytearray(path.read_bytes())
                if piece.file == "table/data.mdb":
                    data[5_000] ^= 1
                sent = tmp_path / "harmed"
                sent.write_bytes(data)
                yield sent

        monkeypatch.setattr(snapshots, "reading", harmed)
        with pytest.raises(SnapshotError, match=r"data\.mdb"):
            await Fetcher().catch_up(follower, snapshot, link, Transfer())
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["shard-000"]
        assert follower.replica.position == Version(0, 0)


@on_trio
async def test_what_is_harmed_where_it_comes_from_does_not_open_here(tmp_path: Path) -> None:
    """Its checksum is that of the harmed file: what finds it is what every opening verifies."""
    async with pair(tmp_path) as (follower, _, _, link), opened(link, 0, Version(0, 0)) as snapshot:
        (directory,) = (tmp_path / "b" / "snapshots").iterdir()
        (rows,) = directory.glob("items-*.f16")
        harmed = bytearray(rows.read_bytes())
        harmed[4_096 + 100] ^= 1
        rows.write_bytes(harmed)
        with pytest.raises(SnapshotError, match="did not open"):
            await Fetcher().catch_up(follower, snapshot, link, Transfer())
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["shard-000"]
        assert follower.replica.position == Version(0, 0)


@on_trio
async def test_two_at_a_time_one_for_each_asker_and_none_that_nobody_reads(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, primary, snapshots, _):
        first = await snapshots.open("a", [0, (0, 0)])
        again = await snapshots.open("a", [0, (0, 0)])
        with pytest.raises(NodeError, match="ask for another"):
            read(snapshots, first[0])
        await snapshots.open("c", [0, (0, 0)])
        with pytest.raises(Exception, match="2 snapshots"):
            await snapshots.open("d", [0, (0, 0)])
        read(snapshots, again[0])
        for bad in ("../shard-000/table/data.mdb", "/etc/passwd"):
            with pytest.raises(NodeError, match="no such part"):
                read(snapshots, again[0], bad)
        with pytest.raises(NodeError, match="no such part"):
            read(snapshots, again[0], offset=1 << 40)
        assert len(primary.replica.log_holds) == 2
        with trio.fail_after(5):
            while snapshots.counters["expired"] < 2:
                await trio.sleep(0.05)
        assert not list((tmp_path / "b" / "snapshots").iterdir())
        assert not primary.replica.log_holds


@on_trio
async def test_one_that_is_asked_for_again_while_it_is_made_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files go from under whoever reads them for their checksums; that is no damage of the replica."""
    begun, on = threading.Event(), threading.Event()
    real = module._checksums

    def slow(directory: Path, files: Mapping[str, int]) -> list[tuple[str, str]]:
        if not begun.is_set():
            begun.set()
            on.wait(10)
        return real(directory, files)

    monkeypatch.setattr(module, "_checksums", slow)
    codes: list[str] = []
    async with pair(tmp_path) as (_, primary, snapshots, _):
        first = await snapshots.open("a", [0, (0, 0)])

        async def read_it() -> None:
            with pytest.raises(NodeError) as caught:
                await snapshots.checks("a", [first[0]])
            codes.append(caught.value.code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_it)
            with trio.fail_after(5):
                while not begun.is_set():
                    await trio.sleep(0.01)
            again = await snapshots.open("a", [0, (0, 0)])
            on.set()
        assert codes == ["snapshot_gone"]
        assert primary.harmed == ""
        read(snapshots, again[0])
        checks = dict(await snapshots.checks("a", [again[0]]))
        assert set(checks) == {name for name, _ in again[3]}
        with pytest.raises(NodeError, match="ask for another"):
            await snapshots.checks("c", [again[0]])
        # A file that cannot be read is damage.
        (directory,) = (tmp_path / "b" / "snapshots").iterdir()
        (directory / "table" / "data.mdb").unlink()
        with pytest.raises(NodeError) as caught:
            await snapshots.checks("a", [again[0]])
        assert caught.value.code == "damaged"
        assert primary.harmed


@on_trio
async def test_one_that_is_just_opening_its_next_epoch_is_waited_for_and_one_that_lost_it_is_not(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (_, primary, snapshots, _):
        reign, primary.reign = primary.reign, None
        with pytest.raises(NodeError) as caught:
            await snapshots.open("a", [0, (0, 0)])
        assert caught.value.code == "no_primary"

        async def lead() -> None:
            await trio.sleep(0.05)
            primary.reign = reign
            primary._tell()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lead)
            assert await snapshots.open("a", [0, (0, 0)])
        primary.reign = None
        primary.hear_of(9, "c")
        began = trio.current_time()
        with pytest.raises(NodeError):
            await snapshots.open("a", [0, (0, 0)])
        assert trio.current_time() - began < module.OPENING_S


@on_trio
async def test_the_log_is_kept_from_where_an_open_snapshot_ends(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, primary, snapshots, _):
        told = await snapshots.open("a", [0, (0, 0)])
        held = told[2].sequence
        for at in range(10):
            put(primary.replica, 2, *range(at * 300, at * 300 + 300), seed=at)
            primary.replica.settled = primary.replica.position.sequence
            primary.replica.checkpoint()
        assert primary.replica.fingerprint(held) is not None
        await snapshots.close("a", [told[0]])
        put(primary.replica, 2, 1)
        primary.replica.checkpoint()
        assert primary.replica.statistics()["log"]["first_sequence"] > held


@on_trio
async def test_a_rate_is_kept(tmp_path: Path) -> None:
    async with pair(tmp_path, items=10_000) as (_, _, _, link), opened(link, 0, Version(0, 0)) as snapshot:
        transfer = Transfer()
        throttle = Throttle(snapshot.bytes / 1.0)
        began = trio.current_time()
        await fetch(
            snapshot, link, tmp_path / "fetched", throttle=lambda: throttle, transfer=transfer,
            runner=ThreadRunner("fetch"), wanted=lambda: True,
        )  # fmt: skip
        # The last chunk needs no wait behind it.
        assert trio.current_time() - began > 0.5
        assert transfer.done_bytes == transfer.total_bytes == snapshot.bytes
        assert str(transfer) == "installing snapshot"


@on_trio
async def test_the_fetches_of_a_node_share_its_rate_and_one_with_a_rate_of_its_own_does_not() -> None:
    fetcher = Fetcher(bytes_per_s=1_000)
    shared, same = fetcher.throttle(1), fetcher.throttle(2)
    assert shared is same
    fetcher.pace(3, 500)
    fetcher.pace(4, 0)
    own, free = fetcher.throttle(3), fetcher.throttle(4)
    assert (shared.bounded, own.bounded, free.bounded) == (True, True, False)
    with trio.fail_after(5):
        began = trio.current_time()
        for _ in range(5):
            await free.take(1 << 30)
        assert trio.current_time() - began < 0.5
        # The first bytes go at once; whoever is next waits for all that went before, of whichever shard.
        await shared.take(100)
        await own.take(100)
        assert trio.current_time() - began < 0.5
        await same.take(1)
        assert trio.current_time() - began >= 0.1
        await own.take(1)
        assert trio.current_time() - began >= 0.2
    fetcher.pace(3, None)
    assert fetcher.throttle(3) is shared
    assert not Fetcher().throttle(9).bounded


@on_trio
async def test_a_rate_that_changes_counts_for_what_is_under_way(tmp_path: Path) -> None:
    """`--rate` may be told while the shard is being fetched already, and is taken back when its move is cancelled."""
    async with pair(tmp_path, items=10_000) as (_, _, _, link), opened(link, 0, Version(0, 0)) as snapshot:
        transfer, fetcher = Transfer(), Fetcher()
        fetcher.pace(0, 1_000)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    partial(
                        fetch, snapshot, link, tmp_path / "fetched", throttle=lambda: fetcher.throttle(0),
                        transfer=transfer, runner=ThreadRunner("fetch"), wanted=lambda: True,
                    )
                )  # fmt: skip
                await trio.sleep(0.3)
                assert transfer.done_bytes < snapshot.bytes
                fetcher.pace(0, None)
        assert transfer.done_bytes == snapshot.bytes


@on_trio
async def test_a_full_disk_at_either_end_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(tmp_path) as (follower, _, _, link):
        real = os.posix_fallocate

        def full(fd: int, offset: int, size: int) -> None:
            if ".fetch" in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd, offset, size)

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(DiskFullError):
                await install(follower, link)
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["shard-000"]

        def copy(_table: Table, directory: Path) -> None:
            directory.mkdir(parents=True)
            raise DiskFullError("no room left on the disk")

        with monkeypatch.context() as patch:
            patch.setattr(Table, "copy", copy)
            with pytest.raises(RemoteError) as caught:
                await install(follower, link)
        assert caught.value.code == "disk_full"
        assert not list((tmp_path / "b" / "snapshots").iterdir())
        await install(follower, link)
        assert follower.replica.get(Kind.ITEM, 299) is not None


class Crash(BaseException):
    pass


@pytest.mark.parametrize("after", range(12))
def test_a_crash_while_installing_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """`old-or-new`: `after`: at which of the system calls that change names or make them durable."""
    directory = tmp_path / "shard-000"
    old = replica_at(directory, "a")
    put(old, 1, 1)
    source = replica_at(tmp_path / "source", "b")
    put(source, 1, 1, 2)
    source.export(tmp_path / "snap")
    source.abort()
    installing = Installing(directory)
    Replica.import_snapshot(
        tmp_path / "snap", installing.fetch, shard=0, node_id="a", config=CONFIG, replica_id=old.replica_id
    )
    left = after

    def counted(real: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal left
            if left <= 0:
                raise Crash
            left -= 1
            return real(*args, **named)

        return call

    crashed = False
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "rename", counted(os.rename))
        try:
            installing.swap([], old.quarantine_path)
            if after % 2:
                installing.swap_back()
            else:
                installing.clear()
        except Crash:
            crashed = True
    assert crashed or after >= 7
    id_ = old.replica_id
    old.retire()  # as a crash: it writes nothing
    installing.recover()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000", "snap", "source"]
    found = replica_at(directory, "a")
    assert found.replica_id == id_
    assert found.position in (Version(1, 1), Version(1, 2))
    assert found.get(Kind.ITEM, 1) is not None
    found.close()


def test_a_directory_that_an_operator_removed_is_not_brought_back(tmp_path: Path) -> None:
    installing = Installing(tmp_path / "shard-000")
    installing.old.mkdir()
    installing.recover()
    assert not list(tmp_path.iterdir())


@on_trio
async def test_a_snapshot_that_does_not_open_gives_the_old_one_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(tmp_path) as (follower, _, _, link):
        put(follower.replica, 1, 1)
        before = follower.replica

        def harmed(cls: type[Replica], *args: Any, **named: Any) -> Replica:
            raise DamagedError(tmp_path, None, "planted")

        with monkeypatch.context() as patch:
            patch.setattr(Replica, "open", classmethod(harmed))
            with pytest.raises(SnapshotError, match="did not open"):
                await install(follower, link)
        assert follower.replica is before
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["shard-000"]
        put(before, 1, 2)
        assert follower.replica.get(Kind.ITEM, 2) is not None


@on_trio
async def test_who_was_elected_with_a_log_that_it_did_not_get_does_not_lead(tmp_path: Path) -> None:
    async with pair(tmp_path) as (follower, primary, _, _):
        told: list[Any] = []
        follower.act = lambda _actor, effects: told.extend(effects)
        election = follower.election
        end = primary.replica.position

        def fail(_old: Replica) -> Replica:
            # Meanwhile it stands, with the log that it is about to have, and gets its promises.
            assert election._last() == end
            election.role, election.epoch = Role.PRIMARY, 5
            election.seen = 5
            raise DiskFullError("no room left on the disk")

        with pytest.raises(DiskFullError):
            await follower.replace(2, end, fail, InlineRunner())
        assert election._last() == Version(0, 0)
        assert not await follower.open_epoch(5, primary.placement)
        assert (follower.leads, follower.replica.position) == (False, Version(0, 0))
        assert told
        election.role, election.epoch = Role.PRIMARY, 6  # stood anew, with what it has
        assert await follower.open_epoch(6, primary.placement)
