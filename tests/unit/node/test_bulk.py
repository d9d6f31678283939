"""Files beside the peer link: what is asked badly, what breaks, and that a thread ends when its caller is cancelled."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
from xxhash import xxh3_64_hexdigest

from node import bulk
from node.blocking import ThreadRunner
from node.bulk import PIECE_BYTES_MAX, Asker, Piece, RefusedError, Target, asking, give
from node.config import Address
from node.frames import BULK_MAGIC, HEADER, ProtocolError
from router.ports import NodeError
from tests.unit.node.peers import on_trio

DATA = os.urandom((9 << 20) + 5)


class Giver:
    """Serves `path` under the id "s"; keeps what ended each connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runner = ThreadRunner("give", limit=4)
        self.ended: list[BaseException | None] = []
        self.streams: list[trio.SocketStream] = []

    @contextmanager
    def find(self, piece: Piece) -> Iterator[Path]:
        if piece.snapshot != "s":
            raise NodeError("snapshot_gone", "not open")
        yield self.path

    async def serve(self, stream: trio.SocketStream) -> None:
        self.streams.append(stream)
        async with stream:
            if await stream.receive_some(len(BULK_MAGIC)) != BULK_MAGIC:
                return  # nothing was asked
            try:
                await give(stream, self.find, self.runner)
                self.ended.append(None)
            except (ProtocolError, trio.BrokenResourceError) as error:
                self.ended.append(error)


@asynccontextmanager
async def giving(path: Path) -> AsyncIterator[tuple[Giver, Address]]:
    (path / "file").write_bytes(DATA)
    giver = Giver(path / "file")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            listeners: list[trio.SocketListener] = await nursery.start(
                partial(trio.serve_tcp, giver.serve, 0, host="127.0.0.1")
            )
            yield giver, Address("127.0.0.1", listeners[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()


@contextmanager
def target(path: Path) -> Iterator[Target]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        yield Target(path, fd)
    finally:
        os.close(fd)


async def take(asker: Asker, into: Target, size: int) -> None:
    await asker.take(into, size, ThreadRunner("take"))


@on_trio
async def test_pieces_that_were_asked_ahead_come_in_order_hashed_and_written(tmp_path: Path) -> None:
    async with giving(tmp_path) as (_, address), asking(address) as asker:
        with target(tmp_path / "copy") as into:
            sizes = [PIECE_BYTES_MAX, PIECE_BYTES_MAX, 1 << 20, 5]
            offset = 0
            for size in sizes:
                await asker.ask(Piece("s", "file", offset, size))
                offset += size
            for size in sizes:
                await take(asker, into, size)
            into.sync()
            assert into.done == len(DATA)
            assert into.xxh3 == xxh3_64_hexdigest(DATA)
        assert (tmp_path / "copy").read_bytes() == DATA


@on_trio
async def test_a_refusal_is_told_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with giving(tmp_path) as (_, address), asking(address) as asker:
        with target(tmp_path / "copy") as into:
            await asker.ask(Piece("other", "file", 0, 10))
            await asker.ask(Piece("s", "file", 3, 10))
            with pytest.raises(RefusedError) as caught:
                await take(asker, into, 10)
            assert caught.value.code == "snapshot_gone"
            await take(asker, into, 10)
        assert (tmp_path / "copy").read_bytes() == DATA[3:13]


@on_trio
@pytest.mark.parametrize(
    "request_",
    [
        HEADER.pack(1 << 20),
        HEADER.pack(3) + b"\xc1\xc1\xc1",
        *(
            HEADER.pack(len(body)) + body
            for body in map(
                msgpack.packb,
                [
                    ["s"],
                    ["s", "file", -1, 10],
                    ["s", "file", 0, PIECE_BYTES_MAX + 1],
                    ["s", "file", 0, 0],
                    [1, 2, 3, 4],
                    {},
                ],
            )
        ),
    ],
)
async def test_what_no_asker_sends_ends_the_connection(tmp_path: Path, request_: bytes) -> None:
    async with giving(tmp_path) as (giver, address):
        async with await trio.open_tcp_stream(address.host, address.port) as stream:
            await stream.send_all(BULK_MAGIC + request_)
            assert await stream.receive_some(1) == b""
        assert isinstance(giver.ended[0], ProtocolError)


@on_trio
async def test_a_connection_that_breaks_within_a_piece_says_how_far_it_came(tmp_path: Path) -> None:
    async with giving(tmp_path) as (giver, address):
        with target(tmp_path / "copy") as into:
            giver.path.write_bytes(DATA[: 1 << 20])
            async with asking(address) as asker:
                # The file is shorter than it was: that is found in the middle of sending it.
                await asker.ask(Piece("s", "file", 0, 2 << 20))
                with pytest.raises(ConnectionError):
                    await take(asker, into, 2 << 20)
            assert into.done == 1 << 20
            giver.path.write_bytes(DATA)
            async with asking(address) as asker:
                await asker.ask(Piece("s", "file", into.done, 100))
                await take(asker, into, 100)
        assert (tmp_path / "copy").read_bytes() == DATA[: (1 << 20) + 100]


@on_trio
async def test_threads_end_when_their_callers_are_cancelled_however_silent_the_other_end_is(
    tmp_path: Path,
) -> None:
    async with giving(tmp_path) as (giver, address):
        began = trio.current_time()
        with target(tmp_path / "copy") as into, trio.move_on_after(0.2):
            async with asking(address) as asker:
                await take(asker, into, 10)  # which nobody was asked for
        # A giver whose asker takes nothing waits in a thread, too.
        async with asking(address) as asker:
            for _ in range(10):
                await asker.ask(Piece("s", "file", 0, PIECE_BYTES_MAX))
            await trio.sleep(0.2)
            assert giver.runner.statistics().waiting == 1
            began_again = trio.current_time()
            giver.streams[-1].socket.shutdown(2)
            while giver.runner.statistics().waiting:
                await trio.sleep(0.01)
        assert trio.current_time() - began_again < bulk.SILENCE_S / 5
    assert trio.current_time() - began < bulk.SILENCE_S / 2


@on_trio
async def test_one_that_is_silent_for_too_long_is_given_up(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bulk, "SILENCE_S", 0.3)
    async with giving(tmp_path) as (_, address), asking(address) as asker:
        with target(tmp_path / "copy") as into, pytest.raises(TimeoutError):
            await take(asker, into, 10)
