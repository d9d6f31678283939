"""The peer link over real sockets."""

from __future__ import annotations

import dataclasses
import functools
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, ParamSpec

import msgpack
import pytest
import trio

from node.config import Address
from node.frames import MAGIC, pack_hello
from node.peerlink import (
    Handler,
    Hello,
    PeerGoneError,
    PeerLimits,
    PeerLink,
    PeerListener,
    PeerOverloadedError,
    PeerTimeoutError,
    PeerTooLargeError,
    RemoteError,
)

P = ParamSpec("P")
ANY = Address("127.0.0.1", 0)
SMALL = PeerLimits(frame_bytes=100_000, queue_bytes=300_000, requests_in_flight=8)
QUICK = PeerLimits(heartbeat_s=0.1, silence_s=0.4)


def hello(node: str, **changes: Any) -> Hello:
    return dataclasses.replace(
        Hello(cluster_id="c", node=node, shard_count=12, dim=8, metric="cosine", boot=1), **changes
    )


class CodedError(Exception):
    code = "indexing"
    retry_after_ms = 70


async def slow_echo(peer: str, body: Any) -> Any:
    await trio.sleep(body / 1000)
    return body


async def coded(peer: str, body: Any) -> Any:
    await trio.lowlevel.checkpoint()
    raise CodedError("wait a little")


def broken(peer: str, body: Any) -> Any:
    raise ZeroDivisionError("a secret")


HANDLERS: dict[str, Handler] = {
    "who": lambda peer, body: peer,
    "echo": lambda peer, body: body,
    "slow": slow_echo,
    "coded": coded,
    "broken": broken,
    "unpackable": lambda peer, body: object(),
    "grow": lambda peer, body: bytes(body),
}


@asynccontextmanager
async def linked(
    handlers: Mapping[str, Handler] = HANDLERS,
    *,
    mine: Hello | None = None,
    theirs: Hello | None = None,
    limits: PeerLimits | None = None,
    listener_limits: PeerLimits | None = None,
    connect: bool = True,
) -> AsyncIterator[tuple[PeerLink, PeerListener]]:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            listener = PeerListener(
                handlers, theirs or hello("b"), listen=ANY, limits=listener_limits or limits
            )
            address = await nursery.start(listener.run)
            link = PeerLink(address, mine or hello("a"), limits=limits, jitter=random.Random(1))
            await nursery.start(link.run)
            if connect:
                await link.wait_connected()
            yield link, listener
            nursery.cancel_scope.cancel()


def on_trio(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(functools.partial(test, *args, **kwargs))

    return run


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


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
            await link.call("coded", None, 1.0)
        assert (caught.value.code, caught.value.retry_after_ms) == ("indexing", 70)
        for op, code in (("broken", "internal"), ("unpackable", "internal"), ("nonsense", "unknown_op")):
            with pytest.raises(RemoteError) as caught:
                await link.call(op, None, 1.0)
            assert caught.value.code == code
            assert "secret" not in str(caught.value)
        with pytest.raises(TypeError):
            await link.call("echo", object(), 1.0)
        assert await link.call("echo", 1, 1.0) == 1


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
        link = PeerLink(Address(*listener.socket.getsockname()), hello("a"), limits=limits)
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cluster_id": "other"}, "different cluster_id"),
        ({"shard_count": 100}, "different shard_count"),
        ({"dim": 1024}, "different dim"),
        ({"metric": "dot"}, "different metric"),
        ({"node": "a"}, 'two nodes are named "a"'),
        ({"format_min": 9, "format_max": 9}, "no common format"),
    ],
)
@on_trio
async def test_strangers_are_refused_and_told_why(changes: dict[str, Any], said: str) -> None:
    async with linked(theirs=hello(**{"node": "b"} | changes), connect=False) as (link, listener):
        await until(lambda: said in link.statistics().last_error)
        assert listener.statistics().refused_hellos >= 1
        with pytest.raises(PeerGoneError, match=said) as caught:
            await link.call("echo", 1, 1.0)
        assert not caught.value.sent


@on_trio
async def test_unknown_names_and_wrong_addresses_are_refused() -> None:
    async with trio.open_nursery() as nursery:
        listener = PeerListener(HANDLERS, hello("b"), listen=ANY, known={"c"})
        address = await nursery.start(listener.run)
        stranger = PeerLink(address, hello("a"))
        lost = PeerLink(address, hello("c"), expect="d")
        await nursery.start(stranger.run)
        await nursery.start(lost.run)
        await until(lambda: "not in cluster.members" in stranger.statistics().last_error)
        await until(lambda: 'expected "d", found "b"' in lost.statistics().last_error)
        nursery.cancel_scope.cancel()


@on_trio
async def test_a_drop_tells_every_waiter_and_the_link_comes_back() -> None:
    async with trio.open_nursery() as nursery:
        listener = PeerListener(HANDLERS, hello("b"), listen=ANY)
        with trio.fail_after(10):
            address = await nursery.start(listener.run)
            link = PeerLink(address, hello("a"), expect="b")
            await nursery.start(link.run)
            await link.wait_connected()
            told: list[bool] = []

            async def ask() -> None:
                with pytest.raises(PeerGoneError) as caught:
                    await link.call("slow", 60_000, 60.0)
                told.append(caught.value.sent)

            async with trio.open_nursery() as askers:
                for _ in range(5):
                    askers.start_soon(ask)
                await until(lambda: listener.statistics().peers == {"a": 5})
                for session in listener._peers.values():
                    session.conn.close("the test pulls the plug")
            assert told == [True] * 5
            await link.wait_connected()
            assert await link.call("echo", 7, 1.0) == 7
            assert link.statistics().connects == 2
        nursery.cancel_scope.cancel()


@on_trio
async def test_a_peer_that_was_down_is_found_when_it_comes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with trio.open_nursery() as nursery:
        link = PeerLink(Address("127.0.0.1", port), hello("a"))
        await nursery.start(link.run)
        with pytest.raises(PeerGoneError):
            await link.call("echo", 1, 1.0)
        await until(lambda: link.statistics().failed_connects >= 2)
        listener = PeerListener(HANDLERS, hello("b"), listen=Address("127.0.0.1", port))
        await nursery.start(listener.run)
        with trio.fail_after(5):
            await link.wait_connected()
        assert await link.call("echo", 1, 1.0) == 1
        nursery.cancel_scope.cancel()


@on_trio
async def test_idle_links_live_by_heartbeats() -> None:
    async with linked(limits=QUICK) as (link, listener):
        await trio.sleep(1.0)
        assert link.statistics().connects == 1
        assert listener.statistics().accepted == 1
        assert await link.call("echo", 1, 1.0) == 1


@on_trio
async def test_a_newer_process_replaces_an_older_one() -> None:
    async with trio.open_nursery() as nursery:
        listener = PeerListener(HANDLERS, hello("b"), listen=ANY)
        address = await nursery.start(listener.run)
        old = PeerLink(address, hello("a", boot=1))
        await nursery.start(old.run)
        await old.wait_connected()
        new = PeerLink(address, hello("a", boot=2))
        await nursery.start(new.run)
        await new.wait_connected()
        await until(lambda: "a newer process" in old.statistics().last_error)
        assert await new.call("echo", 1, 1.0) == 1
        nursery.cancel_scope.cancel()
