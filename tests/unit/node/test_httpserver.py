"""The HTTP server on real loopback sockets, with a handler of our own behind it."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio

from node.httpconn import HttpBounds
from node.httpserver import HttpServer
from node.httpwire import HttpRequest, Response, WireBounds

GET = b"GET /now HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /now HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(15):
            await test()

    trio.run(main)


class Backend:
    """`/now` answers at once, `/wait` when `gate` is set, `/bug` breaks, `/big` is 1 MiB, the rest echoes its body."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.waiting = 0
        self.counted: list[tuple[str, str, int]] = []

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.counted.append((route, method, status))

    def __call__(self, request: HttpRequest) -> Response | Awaitable[Response]:
        match request.target:
            case "/now":
                return Response(200, b"now", route="/now")
            case "/wait":
                return self.wait()
            case "/bug":
                raise RuntimeError("a secret")
            case "/big":
                return Response(200, bytes(1 << 20))
        return Response(200, request.target.encode() + b" " + request.body)

    async def wait(self) -> Response:
        self.waiting += 1
        await self.gate.wait()
        return Response(200, b"waited")


@asynccontextmanager
async def serving(**bounds: Any) -> AsyncIterator[tuple[HttpServer, Backend]]:
    backend = Backend()
    server = HttpServer(backend, HttpBounds(**bounds), count=backend.count, port=0)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield server, backend
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def dial(server: HttpServer) -> AsyncIterator[trio.SocketStream]:
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with stream:
        yield stream


async def all_of(stream: trio.SocketStream) -> bytes:
    """Whatever comes until the server closes."""
    heard = b""
    with suppress(trio.BrokenResourceError):
        while some := await stream.receive_some():
            heard += some
    return heard


async def answer(stream: trio.SocketStream) -> tuple[int, bytes]:
    """One answer's status and body; for a stream on which nothing else is on its way."""
    heard = b""
    while b"\r\n\r\n" not in heard:
        some = await stream.receive_some()
        assert some, heard
        heard += some
    head, _, body = heard.partition(b"\r\n\r\n")
    length = next(int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.startswith(b"Content-Length"))
    while len(body) < length:
        body += await stream.receive_some()
    assert len(body) == length
    return int(head.split()[1]), body


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await trio.sleep(0.005)


def statuses(heard: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", heard)]


def test_a_connection_is_kept_and_pipelined_answers_come_in_order() -> None:
    async def test() -> None:
        async with serving() as (server, backend), dial(server) as stream:
            await stream.send_all(GET)
            assert await answer(stream) == (200, b"now")
            many = [b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % i for i in range(2_000)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, b"".join(many) + LAST)
                heard = await all_of(stream)
            assert statuses(heard) == [200] * 2_001
            places = [heard.index(b"/%d " % i) for i in range(2_000)]
            assert places == sorted(places)
            assert heard.endswith(b"now")
            assert server.statistics().requests == 2_002
            assert len(backend.counted) == 2_002

    run(test)


def test_one_that_waits_holds_back_its_own_connection_only() -> None:
    async def test() -> None:
        async with serving() as (server, backend), dial(server) as slow, dial(server) as other:
            await slow.send_all(WAIT + LAST)
            await until(lambda: backend.waiting == 1)
            await other.send_all(GET)
            assert await answer(other) == (200, b"now")
            backend.gate.set()
            assert statuses(await all_of(slow)) == [200, 200]

    run(test)


def test_a_bug_is_a_500_that_says_nothing_of_itself() -> None:
    """`nothing-leaks`."""

    async def test() -> None:
        async with serving() as (server, _), dial(server) as stream:
            await stream.send_all(b"GET /bug HTTP/1.1\r\nHost: x\r\n\r\n")
            status, body = await answer(stream)
            assert status == 500
            assert b"internal" in body
            assert b"secret" not in body
            await stream.send_all(GET)
            assert (await answer(stream))[0] == 200
            assert server.statistics().internal == 1

    run(test)


def test_head_has_no_body_and_says_how_long_it_would_be() -> None:
    async def test() -> None:
        async with serving() as (server, _), dial(server) as stream:
            await stream.send_all(b"HEAD /now HTTP/1.1\r\nHost: x\r\n\r\n" + LAST)
            heard = await all_of(stream)
            assert heard.count(b"Content-Length: 3") == 2
            assert heard.count(b"now") == 1

    run(test)


def test_the_word_to_go_on_comes_before_the_body_and_only_then() -> None:
    async def test() -> None:
        head = b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        async with serving() as (server, _), dial(server) as stream:
            await stream.send_all(head)
            assert await stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
            await stream.send_all(b"abc")
            assert await answer(stream) == (200, b"/b abc")
            await stream.send_all(head + b"abc")
            assert await answer(stream) == (200, b"/b abc")
            await stream.send_all(head.replace(b"Length: 3", b"Length: 3000000"))
            assert statuses(await all_of(stream)) == [413]

    run(test)


@pytest.mark.parametrize("more", [b"", bytes(300_000)])
def test_a_refusal_arrives_although_more_is_on_its_way(more: bytes) -> None:
    async def test() -> None:
        async with serving() as (server, backend), dial(server) as stream, dial(server) as other:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(GET + b"\x00 nonsense\r\n\r\n" + more)
            heard = await all_of(stream)
            assert statuses(heard) == [200, 400]
            assert b"Connection: close" in heard
            assert backend.counted == [("/now", "GET", 200), ("other", "other", 400)]
            await other.send_all(GET)
            assert (await answer(other))[0] == 200

    run(test)


def test_a_slow_head_a_slow_body_and_silence_have_their_times() -> None:
    async def test() -> None:
        async with serving(head_s=0.3, body_s=0.6, idle_s=0.9) as (server, _):
            async with dial(server) as head, dial(server) as body, dial(server) as silent:
                begun = trio.current_time()
                ends: dict[str, tuple[float, list[int]]] = {}

                async def listen(name: str, stream: trio.SocketStream) -> None:
                    heard = await all_of(stream)
                    ends[name] = (trio.current_time() - begun, statuses(heard))

                async def drip(stream: trio.SocketStream) -> None:
                    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        while True:
                            await stream.send_all(b"a")
                            await trio.sleep(0.05)

                await head.send_all(b"GET /slow")
                await body.send_all(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
                async with trio.open_nursery() as dripping:
                    async with trio.open_nursery() as nursery:
                        for name, stream in (("head", head), ("body", body), ("silent", silent)):
                            nursery.start_soon(listen, name, stream)
                        dripping.start_soon(drip, head)
                        dripping.start_soon(drip, body)
                    dripping.cancel_scope.cancel()
                assert {name: said for name, (_, said) in ends.items()} == {
                    "head": [408],
                    "body": [408],
                    "silent": [],
                }
                assert ends["head"][0] >= 0.3
                assert ends["body"][0] >= 0.6
                assert ends["silent"][0] >= 0.9
                assert server.statistics().timeouts == 2
            await until(lambda: server.statistics().connections == 0)

    run(test)


def test_who_does_not_read_is_dropped() -> None:
    async def test() -> None:
        async with serving(send_s=0.3) as (server, _), dial(server) as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            await stream.send_all(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
            await until(lambda: server.statistics().slow_dropped == 1)
            assert server.statistics().connections == 0

    run(test)


def test_past_the_bound_the_longest_waiting_goes_and_the_busy_stay() -> None:
    async def test() -> None:
        async with serving(connections_max=3) as (server, backend):
            async with dial(server) as busy, dial(server) as half, dial(server) as idle:
                await busy.send_all(WAIT)
                await until(lambda: backend.waiting == 1)
                await half.send_all(b"GET /half")
                await idle.send_all(GET)  # it has had an answer since: the half one has waited longer
                assert (await answer(idle))[0] == 200
                async with dial(server) as new:
                    await new.send_all(GET)
                    assert (await answer(new))[0] == 200
                    assert await all_of(half) == b""
                    assert server.statistics().evicted == 1
                    await idle.send_all(WAIT)
                    await new.send_all(WAIT)
                    await until(lambda: backend.waiting == 3)
                    async with dial(server) as refused:
                        assert statuses(await all_of(refused)) == [503]
                        assert server.statistics().rejected == 1
                    backend.gate.set()
                    for stream in (busy, idle, new):
                        assert await answer(stream) == (200, b"waited")

    run(test)


def test_all_bodies_together_are_bounded() -> None:
    async def test() -> None:
        part = b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + bytes(40_000)
        async with serving(bodies_bytes_max=100_000) as (server, _):
            async with dial(server) as first, dial(server) as second, dial(server) as third:
                for stream in (first, second):
                    await stream.send_all(part)
                await until(lambda: server.statistics().bodies_bytes == 80_000)
                await third.send_all(part)
                heard = await all_of(third)
                assert statuses(heard) == [503]
                assert b"Retry-After: 1\r\n" in heard
                await first.send_all(bytes(20_000))
                assert (await answer(first))[0] == 200
            await until(lambda: server.statistics().connections == 0)
            assert server.statistics().bodies_bytes == 0

    run(test)


def test_a_half_closed_socket_gets_its_answer() -> None:
    async def test() -> None:
        async with serving() as (server, backend), dial(server) as stream, dial(server) as cut:
            await stream.send_all(WAIT)
            await stream.send_eof()
            await cut.send_all(b"GET /now HTT")
            await cut.send_eof()
            assert await all_of(cut) == b""
            await until(lambda: backend.waiting == 1)
            backend.gate.set()
            assert statuses(await all_of(stream)) == [200]

    run(test)


def test_a_stop_answers_what_is_under_way_and_closes_the_rest() -> None:
    """`last-word`."""

    async def test() -> None:
        backend = Backend()
        server = HttpServer(backend, count=backend.count, port=0)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            async with dial(server) as busy, dial(server) as half, dial(server) as idle:
                await idle.send_all(GET)
                await answer(idle)
                await half.send_all(GET[:9])
                await busy.send_all(WAIT + GET)
                await until(lambda: backend.waiting == 1)
                server.stop()
                assert await all_of(idle) == b""
                await half.send_all(GET[9:])
                heard = await all_of(half)
                assert statuses(heard) == [503]
                assert b"shutting_down" in heard
                backend.gate.set()
                heard = await all_of(busy)
                assert statuses(heard) == [200]
                assert b"Connection: close" in heard
        # `run` has returned: the nursery ended by itself
        with pytest.raises(OSError):
            await trio.open_tcp_stream("127.0.0.1", server.port)

    run(test)


def test_a_stop_does_not_wait_for_ever() -> None:
    async def test() -> None:
        server = HttpServer(Backend(), HttpBounds(stop_grace_s=0.2), port=0)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            async with dial(server) as stream:
                await stream.send_all(WAIT)
                await trio.sleep(0.05)
                server.stop()
                assert await all_of(stream) == b""

    run(test)


def test_bounds_of_one_request_are_those_given() -> None:
    async def test() -> None:
        wire = WireBounds(body_bytes_max=10)
        async with serving(wire=wire) as (server, _), dial(server) as stream:
            await stream.send_all(b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n")
            assert statuses(await all_of(stream)) == [413]

    run(test)


def test_who_does_not_read_and_who_was_refused_make_room_too() -> None:
    async def test() -> None:
        async with serving(connections_max=3) as (server, backend):
            async with dial(server) as deaf, dial(server) as refused, dial(server) as busy:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                await deaf.send_all(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
                await refused.send_all(b"nonsense\r\n\r\n")
                await busy.send_all(WAIT)
                await until(lambda: backend.waiting == 1 and server.statistics().refused == 1)
                async with dial(server) as first, dial(server) as second:
                    for stream in (first, second):
                        await stream.send_all(WAIT)
                    await until(lambda: backend.waiting == 3)
                    assert server.statistics().evicted >= 1  # the refused one may have ended by itself
                    assert server.statistics().connections == 3
                    # Their sockets are closed, not only out of the count.
                    assert statuses(await all_of(refused)) == [400]
                    assert len(await all_of(deaf)) < 20 << 20
                    backend.gate.set()
                    for stream in (busy, first, second):
                        assert await answer(stream) == (200, b"waited")

    run(test)
