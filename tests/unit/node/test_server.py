"""The app server on real loopback sockets, with a handler of our own behind it."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgpack
import numpy as np
import pytest
import trio
from trio_websocket import ConnectionClosed, wrap_client_stream

from node.server import AppServer, Connection, ServerBounds
from router.errors import RequestError
from router.operating import Status
from router.requests import Get, Limits, Recommend, Request, Search
from router.wire import Columns, Kept, Reply

LIMITS = Limits(dim=4, frame_bytes_max=200_000)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(10):
            await test()

    trio.run(main)


@asynccontextmanager
async def dial(url: str, **options: Any) -> AsyncIterator[Any]:
    """A client whose socket we close ourselves: the library forgets to when the server closed first."""
    port = int(url.rsplit(":", 1)[1])
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:
        ws = await wrap_client_stream(nursery, stream, f"127.0.0.1:{port}", "/", **options)
        yield ws
        await ws.aclose()
        nursery.cancel_scope.cancel()


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await trio.sleep(0.005)


class Backend:
    """`get` waits for `gate`; `recommend` answers k hits; `status` breaks; `search` is refused."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.waiting = 0

    def __call__(self, request: Request, connection: Connection) -> Reply | Awaitable[Reply]:
        if isinstance(request, Recommend):
            metadata = [msgpack.packb({"pad": "x" * 1_000})] * request.k
            return {
                "hits": Columns(
                    np.arange(request.k, dtype=np.uint64), np.ones(request.k, np.float32), metadata
                )
            }
        if isinstance(request, Get):
            return self.wait()
        if isinstance(request, Search):
            raise RequestError("unavailable", "no shard answers")
        if isinstance(request, Status):
            raise RuntimeError("a bug")
        return {"unsendable": object()}

    async def wait(self) -> Reply:
        self.waiting += 1
        await self.gate.wait()
        return {"records": []}


@asynccontextmanager
async def serving(**bounds: Any) -> AsyncIterator[tuple[AppServer, Backend, str]]:
    backend = Backend()
    server = AppServer(backend, LIMITS, ServerBounds(**bounds), port=0)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(server.run)
        yield server, backend, f"ws://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


async def ask(ws: Any, *requests: dict[str, Any]) -> dict[Any, Any]:
    """Replies by id, for requests sent as one msgpack frame."""
    await ws.send_message(msgpack.packb(requests[0] if len(requests) == 1 else requests))
    return await replies(ws, len(requests))


async def replies(ws: Any, count: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    while len(found) < count:
        frame = await ws.get_message()
        reply = json.loads(frame) if isinstance(frame, str) else msgpack.unpackb(frame)
        for one in reply if isinstance(reply, list) else [reply]:
            found[one["id"]] = one
    return found


PING = {"id": 1, "op": "ping"}
GET = {"op": "get", "kind": "item", "ids": []}


def test_each_frame_is_answered_in_its_own_type() -> None:
    async def test() -> None:
        async with serving() as (_, _, url), dial(url) as ws:
            await ws.send_message(json.dumps(PING))
            assert json.loads(await ws.get_message()) == {"id": 1, "ok": True}
            await ws.send_message(msgpack.packb([PING, {"id": "b", "op": "ping"}]))
            assert msgpack.unpackb(await ws.get_message()) == [{"id": 1, "ok": True}, {"id": "b", "ok": True}]
            await ws.send_message('{"id": 2, "op": "recommend", "user_id": 1, "k": 1}')
            assert (await replies(ws, 1))[2]["hits"][0]["media_id"] == 0

    run(test)


@pytest.mark.parametrize(("subprotocol", "good", "bad"), [
    ("gmco.json", json.dumps(PING), msgpack.packb(PING)),
    ("gmco.msgpack", msgpack.packb(PING), json.dumps(PING)),
])  # fmt: skip
def test_a_subprotocol_fixes_the_type(subprotocol: str, good: Any, bad: Any) -> None:
    async def test() -> None:
        offered = ["other", subprotocol]
        async with serving() as (_, _, url), dial(url, subprotocols=offered) as ws:
            assert ws.subprotocol == subprotocol
            await ws.send_message(good)
            assert 1 in await replies(ws, 1)
            await ws.send_message(bad)
            with pytest.raises(ConnectionClosed) as closed:
                await ws.get_message()
            assert closed.value.reason.code == 1003

    run(test)


def test_faults_of_a_request_and_of_a_handler_stay_with_it() -> None:
    async def test() -> None:
        async with serving() as (server, _, url), dial(url) as ws:
            found = await ask(
                ws,
                {"id": 1, "op": "nope"},
                {"id": 2, "op": "status"},
                {"id": 3, "op": "search", "vector": [1, 0, 0, 0]},
                {"id": 4, "op": "batch", "user_id": 1, "media_ids": []},
                {"id": 5, "op": "recommend", "user_id": 1, "k": 0},
                {"id": 6, "op": "ping"},
            )
            codes = [found[i]["error"]["code"] for i in range(1, 6)]
            assert codes == ["unknown_op", "internal", "unavailable", "internal", "out_of_range"]
            assert found[5]["error"]["field"] == "k"
            assert found[6]["ok"]
            await ws.send_message(b"\xc1")
            assert (await replies(ws, 1))[None]["error"]["code"] == "bad_frame"
            assert server.statistics().internal == 2

    run(test)


def upgrade(*headers: str) -> bytes:
    lines = ["GET / HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade", *headers]
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    return "\r\n".join([*lines, key, "Sec-WebSocket-Version: 13", "", ""]).encode()


async def status_line(port: int, *headers: str) -> bytes:
    """The first line that a handshake with these headers gets. By hand: the library leaks a rejected socket."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(upgrade(*headers))
        return bytes(await stream.receive_some()).split(b"\r\n")[0]


async def garbage(url: str, raw: bytes, handshake: bool) -> bytes:
    """What a server says until it closes, when sent these bytes (after a proper handshake, if asked)."""
    stream = await trio.open_tcp_stream("127.0.0.1", int(url.rsplit(":", 1)[1]))
    heard = b""
    async with stream:
        if handshake:
            await stream.send_all(upgrade())
            assert b"101" in await stream.receive_some()
        await stream.send_all(raw)
        try:
            while some := await stream.receive_some():
                heard += bytes(some)
        except trio.BrokenResourceError:
            pass
    return heard


MASK = b"\x00\x00\x00\x00"


@pytest.mark.parametrize(("raw", "handshake", "code"), [
    (b"\x00\x01\x02 not HTTP at all\r\n\r\n", False, None),
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", False, None),
    (b"\x81\x82" + MASK + b"\xff\xfe", True, 1007),  # text that is not UTF-8
    (b"\x83\x80" + MASK, True, 1002),  # an opcode that does not exist
    (b"\x82\x01x", True, 1002),  # not masked
    (b"\x80\x80" + MASK, True, 1002),  # goes on with what never began
    (b"\xc2\x80" + MASK, True, 1002),  # claims compression
])  # fmt: skip
def test_garbage_is_closed_and_disturbs_nobody(raw: bytes, handshake: bool, code: int | None) -> None:
    async def test() -> None:
        async with serving(handshake_s=0.3) as (server, _, url), dial(url) as other:
            heard = await garbage(url, raw, handshake)
            if code is not None:
                assert heard[:1] == b"\x88"
                assert int.from_bytes(heard[2:4], "big") == code
            assert (await ask(other, PING))[1]["ok"]
            assert server.statistics().failed == 0

    run(test)


def test_noise_after_the_handshake_disturbs_nobody() -> None:
    async def test() -> None:
        async with serving(handshake_s=0.3) as (_, _, url), dial(url) as other:
            for _ in range(30):
                with trio.move_on_after(0.1):
                    await garbage(url, os.urandom(200), True)
            assert (await ask(other, PING))[1]["ok"]

    run(test)


def test_a_frame_over_the_bound_closes_with_1009() -> None:
    async def test() -> None:
        async with serving() as (_, _, url), dial(url) as other, dial(url) as ws:
            with suppress(ConnectionClosed):
                await ws.send_message(bytes(3_000_000))
            with pytest.raises(ConnectionClosed) as closed:
                await ws.get_message()
            assert closed.value.reason.code == 1009
            assert (await ask(other, PING))[1]["ok"]

    run(test)


def test_over_the_bound_in_flight_a_request_is_refused_at_once() -> None:
    async def test() -> None:
        bounds = {"connection_in_flight_max": 2, "in_flight_max": 3}
        async with serving(**bounds) as (server, backend, url):
            async with dial(url) as ws, dial(url) as other:
                await ws.send_message(msgpack.packb([{"id": i, **GET} for i in range(3)]))
                refused = await replies(ws, 1)
                assert refused[2]["error"]["code"] == "overloaded"
                assert refused[2]["error"]["retry_after_ms"] > 0
                await other.send_message(msgpack.packb([{"id": i, **GET} for i in range(2)]))
                assert (await replies(other, 1))[1]["error"]["code"] == "overloaded"
                assert (await ask(other, {"id": 7, "op": "ping"}))[7]["ok"]
                backend.gate.set()
                assert set(await replies(ws, 2)) == {0, 1}
                assert set(await replies(other, 1)) == {0}
                assert server.statistics().in_flight == 0
                assert server.statistics().overloaded == 2

    run(test)


def test_a_client_that_does_not_read_is_dropped_and_disturbs_nobody() -> None:
    async def test() -> None:
        async with serving(send_s=0.3) as (server, _, url), dial(url) as other:
            stream = await trio.open_tcp_stream("127.0.0.1", server.port)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            await stream.send_all(upgrade())
            assert b"101" in await stream.receive_some()
            request = msgpack.packb({"id": 1, "op": "recommend", "user_id": 1, "k": 5_000})
            for _ in range(6):
                await stream.send_all(bytes([0x82, 0x80 | len(request)]) + MASK + request)
            while server.statistics().slow_dropped == 0:
                assert (await ask(other, PING))[1]["ok"]
                await trio.sleep(0.02)
            await until(lambda: server.statistics().connections == 1)
            assert (await ask(other, PING))[1]["ok"]
            await stream.aclose()

    run(test)


def test_requests_that_never_end_take_only_so_much_memory() -> None:
    async def test() -> None:
        async with serving(unread_bytes_max=400_000) as (server, _, url), dial(url) as other:
            head = bytes([0x82, 0x80 | 127]) + (195_000).to_bytes(8, "big") + MASK
            hoarders = []
            for size in (100_000, 190_000, 150_000):  # the second has most when the third goes over the bound
                stream = await trio.open_tcp_stream("127.0.0.1", server.port)
                await stream.send_all(upgrade())
                assert b"101" in await stream.receive_some()
                await stream.send_all(head + bytes(size))
                hoarders.append(stream)
            with pytest.raises(trio.BrokenResourceError):
                while await hoarders[1].receive_some():
                    pass
                raise trio.BrokenResourceError  # closed with or without a reset
            await until(lambda: server.statistics().connections == 3)
            assert server.statistics().greedy_dropped == 1
            for _ in range(200):  # what is answered is not held against anyone
                assert (await ask(other, {"id": 1, "op": "ping"}))[1]["ok"]
            for stream in hoarders:
                await stream.aclose()
            await until(lambda: server.statistics().connections == 1)
            assert server._shared.unread_bytes == 0

    run(test)


def test_a_silent_peer_is_pinged_and_then_dropped() -> None:
    async def test() -> None:
        async with (
            serving(idle_ping_s=0.1, pong_s=0.2) as (server, _, url),
            dial(url) as lively,
        ):
            stream = await trio.open_tcp_stream("127.0.0.1", server.port)
            await stream.send_all(upgrade())
            await until(lambda: server.statistics().dead_dropped > 0)
            await trio.sleep(0.3)  # time for a second drop, were the answering one taken for dead
            assert server.statistics().dead_dropped == 1
            assert (await ask(lively, PING))[1]["ok"]
            await stream.aclose()

    run(test)


def test_a_client_that_leaves_takes_its_requests_with_it() -> None:
    async def test() -> None:
        async with serving() as (server, backend, url):
            async with dial(url) as ws:
                await ws.send_message(msgpack.packb([{"id": i, **GET} for i in range(5)]))
                await until(lambda: backend.waiting == 5)
            await until(lambda: not server.statistics().connections)
            assert server.statistics().in_flight == 0

    run(test)


def test_connections_and_origins_are_bounded() -> None:
    async def test() -> None:
        async with serving(connections_max=1, origins=frozenset({"https://good"})) as (server, _, url):
            assert b" 403 " in await status_line(server.port, "Origin: https://evil")
            async with dial(url, extra_headers=[(b"Origin", b"https://good")]) as ws:
                assert b" 503 " in await status_line(server.port)
                assert (await ask(ws, PING))[1]["ok"]

    run(test)


def test_stop_refuses_the_new_and_finishes_what_is_in_flight() -> None:
    async def test() -> None:
        backend = Backend()
        server = AppServer(backend, LIMITS, port=0)
        async with trio.open_nursery() as nursery:
            url = f"ws://127.0.0.1:{await nursery.start(server.run)}"
            async with dial(url) as ws:
                await ws.send_message(msgpack.packb({"id": 1, **GET}))
                await until(lambda: backend.waiting > 0)
                server.stop()
                assert (await ask(ws, {"id": 2, **GET}))[2]["error"]["code"] == "shutting_down"
                with pytest.raises(OSError, match="all attempts"):
                    await trio.open_tcp_stream("127.0.0.1", server.port)
                backend.gate.set()
                assert (await replies(ws, 1))[1]["ok"]
                with pytest.raises(ConnectionClosed) as closed:
                    await ws.get_message()
                assert closed.value.reason.code == 1001

    run(test)


def test_a_port_in_use_is_a_plain_oserror() -> None:
    async def test() -> None:
        async with serving() as (server, _, _):
            second = AppServer(Backend(), LIMITS, port=server.port)
            async with trio.open_nursery() as nursery:
                with pytest.raises(OSError, match="ddress") as refused:
                    await nursery.start(second.run)
                assert refused.value.errno == errno.EADDRINUSE

    run(test)


def test_a_kept_reply_is_sent_with_each_requests_id_and_in_its_form() -> None:
    columns = Columns(np.arange(2, dtype=np.uint64), np.ones(2, np.float32), [msgpack.packb({"t": "x"}), b""])
    kept = Kept({"hits": columns})

    def answer(request: Request, connection: Connection) -> Reply:
        return kept

    async def test() -> None:
        server = AppServer(answer, LIMITS, port=0)
        async with trio.open_nursery() as nursery:
            url = f"ws://127.0.0.1:{await nursery.start(server.run)}"
            async with dial(url) as ws:
                frame = [{"id": i, "op": "recommend", "user_id": 1} for i in (5, "six")]
                await ws.send_message(msgpack.packb(frame))
                replies = msgpack.unpackb(await ws.get_message())
                assert [one["id"] for one in replies] == [5, "six"]
                assert all(one["ok"] and len(one["hits"]["scores"]) == 8 for one in replies)
                await ws.send_message(json.dumps(frame[0]))
                reply = json.loads(await ws.get_message())
                hits = [
                    {"media_id": 0, "score": 1.0, "metadata": {"t": "x"}},
                    {"media_id": 1, "score": 1.0, "metadata": {}},
                ]
                assert reply == {"id": 5, "ok": True, "hits": hits}
            nursery.cancel_scope.cancel()

    run(test)
