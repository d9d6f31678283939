"""Calls over a peer link: multiplexing, bounds, errors, garbage."""

from __future__ import annotations

import dataclasses
import random
import struct

import msgpack
import pytest
import trio

from node.config import Address
from node.frames import MAGIC, pack_hello
from node.peerlink import (
    PeerGoneError,
    PeerLimits,
    PeerLink,
    PeerOverloadedError,
    PeerTimeoutError,
    PeerTooLargeError,
    RemoteError,
)
from tests.unit.node.peers import SMALL, hello, linked, on_trio, until


@on_trio
async def test_calls_are_multiplexed_and_answers_come_in_any_order() -> None:
    async with linked() as (link, listener):
        done: list[int] = []

        async def ask(ms: int) -> None:
            assert await link.call("slow", ms, 5.0) == ms
            done.append(ms)

        async with trio.open_nursery() as nursery:
            for ms in (150, 10, 80):
                nursery.start_soon(ask, ms)
        assert done == [10, 80, 150]
        assert await link.call("who", None, 1.0) == "a"
        assert listener.statistics().requests == 4
        assert link.statistics().in_flight == 0


@on_trio
async def test_waiting_messages_share_a_write() -> None:
    async with linked() as (link, _):
        async with trio.open_nursery() as nursery:
            for i in range(500):
                nursery.start_soon(link.call, "echo", i, 5.0)
        connection = link.statistics().connection
        assert connection is not None
        assert connection["messages_out"] >= 500
        assert connection["writes"] <= 10


@on_trio
async def test_big_frames_pass_both_ways() -> None:
    async with linked() as (link, _):
        body = random.Random(1).randbytes(20 << 20)
        assert await link.call("echo", body, 10.0) == body
        assert await link.call("echo", 1, 1.0) == 1


@on_trio
async def test_errors_keep_their_code() -> None:
    async with linked() as (link, _):
        with pytest.raises(RemoteError, match="wait a little") as caught:
            await link.call("coded", None, 5.0)
        assert (caught.value.code, caught.value.retry_after_ms) == ("indexing", 70)
        for op, code in (("broken", "internal"), ("unpackable", "internal"), ("nonsense", "unknown_op")):
            with pytest.raises(RemoteError) as caught:
                await link.call(op, None, 5.0)
            assert caught.value.code == code
            assert "secret" not in str(caught.value)
        with pytest.raises(TypeError):
            await link.call("echo", object(), 5.0)
        assert await link.call("echo", 1, 5.0) == 1


@on_trio
async def test_too_large_is_refused_on_either_side() -> None:
    async with linked(limits=SMALL) as (link, _):
        with pytest.raises(PeerTooLargeError):
            await link.call("echo", bytes(200_000), 1.0)
        with pytest.raises(RemoteError) as caught:
            await link.call("grow", 200_000, 1.0)
        assert caught.value.code == "too_large"
        assert await link.call("echo", 1, 1.0) == 1


@on_trio
async def test_a_timeout_is_the_callers_alone() -> None:
    async with linked() as (link, _):
        began = trio.current_time()
        with pytest.raises(PeerTimeoutError):
            await link.call("slow", 300, 0.05)
        assert 0.04 < trio.current_time() - began < 0.25
        with trio.move_on_after(0.02) as scope:
            await link.call("slow", 300, 5.0)
        assert scope.cancelled_caught
        assert link.statistics().in_flight == 0
        # The late answers find nobody and harm nobody.
        await trio.sleep(0.35)
        assert await link.call("echo", 1, 1.0) == 1
        assert link.statistics().timeouts == 1


@on_trio
async def test_over_the_bounds_is_told_at_once() -> None:
    wide = dataclasses.replace(SMALL, requests_in_flight=100)
    async with linked(limits=wide, listener_limits=SMALL) as (link, listener):
        codes: list[str] = []

        async def ask() -> None:
            try:
                await link.call("slow", 100, 5.0)
            except RemoteError as error:
                codes.append(error.code)
            else:
                codes.append("ok")

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert codes.count("ok") == 8
        assert codes.count("overloaded") == 12
        assert listener.statistics().refused_requests == 12
    async with linked(limits=SMALL) as (link, _):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(link.call, "slow", 50, 5.0)
            await until(lambda: link.statistics().in_flight == 8)
            with pytest.raises(PeerOverloadedError):
                await link.call("echo", 1, 1.0)
        assert link.statistics().refused == 1


@on_trio
async def test_a_peer_that_does_not_read_fills_only_the_bound() -> None:
    # A listener that agrees on the hello and then never reads.
    async def deaf(stream: trio.SocketStream) -> None:
        await stream.receive_some(len(MAGIC))
        await trio.sleep(0.05)
        await stream.receive_some(4096)
        payload = pack_hello(hello("b"))
        await stream.send_all(struct.pack("<I", len(payload)) + payload)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, deaf, [listener])
        limits = PeerLimits(frame_bytes=10 << 20, queue_bytes=20 << 20, heartbeat_s=0.2, silence_s=0.8)
        link = PeerLink(lambda: Address(*listener.socket.getsockname()), hello("a"), limits=limits)
        await nursery.start(link.run)
        await link.wait_connected()
        outcomes: list[str] = []

        async def ask() -> None:
            try:
                await link.call("echo", bytes(9 << 20), 5.0)
            except (PeerOverloadedError, PeerGoneError) as error:
                outcomes.append(type(error).__name__)

        with trio.fail_after(5):
            async with trio.open_nursery() as askers:
                for _ in range(6):
                    askers.start_soon(ask)
        # Half-open: it says nothing, so it is given up and every waiter told.
        assert outcomes.count("PeerOverloadedError") >= 2
        assert outcomes.count("PeerGoneError") >= 3
        nursery.cancel_scope.cancel()


@on_trio
async def test_garbage_closes_only_its_connection() -> None:
    async with linked(limits=SMALL) as (link, listener):
        shaken = MAGIC + frame(pack_hello(hello("x")))
        for garbage in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x00" * 64,
            MAGIC + b"\xff\xff\xff\xff",
            MAGIC + frame(b"\xc1"),
            MAGIC + frame(msgpack.packb({"node": 3})),
            shaken + b"\xff\xff\xff\x7f",
            shaken + frame(b"\xc1"),
            shaken + frame(msgpack.packb([0, 1, "echo"])),
            shaken + frame(msgpack.packb(["0", 1, "echo", None])),
            shaken + frame(msgpack.packb([7, 1, "echo", None])),
            shaken + frame(b"\x91" * 5_000),
        ):
            assert link.address is not None
            stream = await trio.open_tcp_stream(*link.address)
            async with stream:
                await stream.send_all(garbage)
                with trio.fail_after(2):
                    try:
                        while await stream.receive_some(4096):
                            pass
                    except trio.BrokenResourceError:
                        pass  # reset: it had not read all of our garbage
        assert await link.call("echo", 1, 1.0) == 1
        assert listener.statistics().connections == 1


def frame(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload
