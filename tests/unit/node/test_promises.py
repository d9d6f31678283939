"""Promises on the disk before they are told, in one file for all shards, and never a lower one in place of a higher."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from node import promises
from node.blocking import DedicatedThread
from node.commit import CommitStoppedError
from node.promises import Promises, load, save
from storage.errors import DamagedFileError, FormatError
from tests.unit.node.peers import on_trio

KNOWN = {0: (7, 3, 0), 16: (1 << 63, 1 << 40, 1 << 39)}


class Runner:
    """Inline, unless told to wait or to fail; counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.gate: trio.Event | None = None
        self.error: OSError | None = None

    async def __call__(self, fn: Callable[..., Any], *args: Any) -> Any:
        self.calls += 1
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return fn(*args)


@asynccontextmanager
async def keeping(path: Path, runner: Any) -> AsyncIterator[Promises]:
    kept = Promises(path, load(path), runner)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(kept.run)
            yield kept
            nursery.cancel_scope.cancel()


@given(
    st.dictionaries(
        st.integers(0, 65_535),
        st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 60), st.integers(0, 1 << 60)),
        max_size=20,
    )
)
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, known: dict[int, tuple[int, int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "promises"
    save(path, known)
    assert load(path) == known


def test_none_yet_is_none(tmp_path: Path) -> None:
    assert load(tmp_path / "promises") == {}


@on_trio
async def test_a_promise_is_on_the_disk_before_keep_returns(tmp_path: Path) -> None:
    path = tmp_path / "promises"
    async with DedicatedThread("promises") as thread, keeping(path, thread) as kept:
        for epoch in (1, 2, 5):
            await kept.keep(3, 77, epoch)
            assert load(path) == {3: (77, epoch, 0)}, "what another start would find"
            assert kept.of(3, 77) == epoch


@on_trio
async def test_promises_that_wait_while_one_is_written_share_the_next_write(tmp_path: Path) -> None:
    runner, path = Runner(), tmp_path / "promises"
    runner.gate = trio.Event()
    async with keeping(path, runner) as kept, trio.open_nursery() as nursery:
        nursery.start_soon(kept.keep, 0, 1, 5)
        await trio.testing.wait_all_tasks_blocked()
        for shard in range(1, 100):
            nursery.start_soon(kept.keep, shard, 1, shard)
        await trio.testing.wait_all_tasks_blocked()
        assert kept.of(0, 1) is None, "not known before it is on the disk"
        runner.gate.set()
    assert runner.calls == 2
    assert load(path) == {0: (1, 5, 0)} | {shard: (1, shard, 0) for shard in range(1, 100)}


@on_trio
async def test_the_greatest_promise_of_a_replica_stays(tmp_path: Path) -> None:
    path = tmp_path / "promises"
    async with keeping(path, Runner()) as kept:
        await kept.keep(0, 1, 9)
        await kept.keep(0, 1, 4)
        assert load(path) == {0: (1, 9, 0)}
        async with trio.open_nursery() as nursery:  # in one write, too
            for epoch in (11, 30, 12):
                nursery.start_soon(kept.keep, 0, 1, epoch)
        assert load(path) == {0: (1, 30, 0)}


@on_trio
async def test_what_a_witness_promises_and_what_it_remembers_go_back_neither(tmp_path: Path) -> None:
    path = tmp_path / "witnessed"
    async with keeping(path, Runner()) as kept:
        await kept.keep(0, 1, 9, 0)
        await kept.keep(0, 1, 0, 7)
        assert load(path) == kept.entries() == {0: (1, 9, 7)}
        await kept.keep(0, 1, 10, 3)
        assert load(path) == {0: (1, 10, 7)}
        await kept.keep(0, 2, 0)
        assert load(path) == {0: (2, 0, 0)}


@on_trio
async def test_another_replica_of_that_shard_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "promises"
    async with keeping(path, Runner()) as kept:
        await kept.keep(0, 1, 9)
        assert kept.of(0, 2) is None, "what a replica on another disk has promised says nothing of this one"
        await kept.keep(0, 2, 0)
        assert (kept.of(0, 1), kept.of(0, 2)) == (None, 0)
        assert load(path) == {0: (2, 0, 0)}


@on_trio
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_promise_that_cannot_be_written_is_not_given_and_the_next_one_may_be(
    tmp_path: Path, number: int
) -> None:
    runner, path = Runner(), tmp_path / "promises"
    async with keeping(path, runner) as kept:
        await kept.keep(0, 1, 2)
        runner.error = OSError(number, os.strerror(number))
        with pytest.raises(OSError):
            await kept.keep(0, 1, 3)
        assert kept.of(0, 1) == 2
        assert load(path) == {0: (1, 2, 0)}
        runner.error = None
        await kept.keep(0, 1, 4)
        assert load(path) == {0: (1, 4, 0)}


@on_trio
async def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "promises"

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    async with keeping(path, Runner()) as kept:
        await kept.keep(0, 1, 2)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError):
                await kept.keep(0, 1, 3)
    assert load(path) == {0: (1, 2, 0)}
    assert os.listdir(tmp_path) == ["promises"]


@on_trio
async def test_who_asks_when_it_has_stopped_is_told(tmp_path: Path) -> None:
    runner = Runner()
    runner.gate = trio.Event()
    errors: list[bool] = []
    async with trio.open_nursery() as outer:
        async with keeping(tmp_path / "promises", runner) as kept:

            async def ask() -> None:
                with pytest.raises(CommitStoppedError) as caught:
                    await kept.keep(0, 1, 2)
                errors.append(caught.value.outcome_unknown)

            outer.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            outer.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
        await ask()
    assert sorted(errors) == [False, False, True]


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "promises"
    save(path, KNOWN)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x40]) + good[place + 1 :])
        with pytest.raises(DamagedFileError):
            load(path)
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedFileError):
            load(path)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", msgpack.packb(5), msgpack.packb([2]), msgpack.packb([2, 5]), msgpack.packb([2, {0: 5}]),
     msgpack.packb([2, {"x": [1, 2, 0]}]), msgpack.packb([2, {0: [None, 2, 0]}]), msgpack.packb([2, [1, 2]])],
)  # fmt: skip
def test_what_is_whole_and_no_list_of_promises_is_damage(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "promises"
    path.write_bytes(b"GMCOPROM" + struct.pack("<Q", xxh3_64_intdigest(body)) + body)
    with pytest.raises(DamagedFileError):
        load(path)


def test_another_format_says_so(tmp_path: Path) -> None:
    path = tmp_path / "promises"
    body = msgpack.packb([promises.FORMAT + 1, {}])
    path.write_bytes(b"GMCOPROM" + struct.pack("<Q", xxh3_64_intdigest(body)) + body)
    with pytest.raises(FormatError):
        load(path)
