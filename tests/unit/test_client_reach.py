"""gmco's client where no node is to be had: it says why of each, soon, and tells silence from absence."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from trio_websocket import serve_websocket

import gmco
from node.connection import ServerBounds
from node.server import AppServer
from router.errors import RequestError
from tests.unit.test_client import LIMITS, Backend, nodes, run, until


@asynccontextmanager
async def strangers() -> AsyncIterator[dict[str, str]]:
    """URLs at which there is no node, each for its own reason."""

    async def http(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    async def mute(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def chat(request: Any) -> None:
        await request.accept()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        urls = {}
        for name, handler in (("http", http), ("mute", mute)):
            (listener,) = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
            urls[name] = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
        server = await nursery.start(partial(serve_websocket, chat, "127.0.0.1", 0, None))
        urls |= {"chat": f"ws://127.0.0.1:{server.port}", "nobody": "ws://127.0.0.1:9"}
        with ExitStack() as held:
            full = held.enter_context(socket.socket())
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for _ in range(4):  # then the system drops what comes, as it does with a host that is off
                one = held.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(full.getsockname())
            urls["off"] = f"ws://127.0.0.1:{full.getsockname()[1]}"
            yield urls
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("name", "kind", "said"), [
    ("nobody", gmco.Unavailable, "connection refused"),
    ("http", gmco.Unavailable, "not a GMC-O node (HTTP 404)"),
    ("chat", gmco.Unavailable, "not a GMC-O node (it does not speak gmco.msgpack)"),
    ("mute", gmco.DeadlineExceeded, "it takes connections, but does not speak as a node does (2 s)"),
    ("off", gmco.DeadlineExceeded, "timed out (2 s)"),
])  # fmt: skip
def test_a_node_that_cannot_be_reached_is_told_with_the_reason(
    name: str, kind: type[gmco.GmcoError], said: str
) -> None:
    async def test() -> None:
        async with strangers() as urls:
            with pytest.raises(kind) as caught:
                async with gmco.connect([urls[name], urls["nobody"]], timeout_s=2.5):
                    pass
            assert f"{urls[name]}: {said}" in caught.value.message
            assert f"{urls['nobody']}: connection refused" in caught.value.message

    run(test)


def test_refused_everywhere_is_told_soon_unless_asked_to_wait() -> None:
    async def test() -> None:
        urls = ["ws://127.0.0.1:9", "ws://127.0.0.1:19"]
        for given, low, high in (({}, 0.4, 1.5), ({"wait_s": 0.0}, 0.0, 0.4), ({"wait_s": 1.2}, 1.1, 2.5)):
            begin = trio.current_time()
            with pytest.raises(gmco.Unavailable, match="no node can be reached"):
                async with gmco.connect(urls, **given):
                    pass
            assert low <= trio.current_time() - begin < high
        async with nodes(1) as (servers, _, (scope,), found), trio.open_nursery() as nursery:
            scope.cancel()
            await until(lambda: not servers[0].statistics().connections)

            async def wait() -> None:
                async with gmco.connect(found, wait_s=5.0) as client:
                    await client.ping()

            nursery.start_soon(wait)
            await trio.sleep(0.7)
            again = AppServer(Backend(), LIMITS, port=servers[0].port)
            await nursery.start(again.run)
            await until(lambda: again.statistics().requests == 1)
            nursery.cancel_scope.cancel()

    run(test)


def test_too_little_time_is_a_deadline_not_a_missing_node() -> None:
    async def test() -> None:
        async with strangers() as urls:
            with pytest.raises(gmco.DeadlineExceeded, match="no answer in time"):
                async with gmco.connect([urls["mute"]], timeout_s=0.05):
                    pass
        async with nodes(1) as (_, _, (scope,), found), gmco.connect(found) as client:
            await client.ping()
            scope.cancel()
            await trio.sleep(0.05)
            with pytest.raises(gmco.Unavailable, match="connection refused"):
                await client.recommend(1, timeout_s=0.3)

    run(test)


def test_events_are_asked_of_one_node_only() -> None:
    async def test() -> None:
        async with nodes(2) as (_, backends, scopes, urls), gmco.connect(urls) as client:
            await client.ping()
            (at,) = [urls.index(link.url) for link in client._links.values()]
            backends[at].gate = trio.Event()
            begin = trio.current_time()
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    with pytest.raises(gmco.Unavailable, match=f"the connection to {urls[at]} broke"):
                        await client.events(5, wait_s=30.0)

                nursery.start_soon(ask)
                await until(lambda: bool(backends[at].requests))
                scopes[at].cancel()
            assert trio.current_time() - begin < 1
            assert not backends[1 - at].requests
            backends[1 - at].refusals = [RequestError("shutting_down", "it stops")]
            with pytest.raises(gmco.Unavailable, match="it stops"):
                await client.events(wait_s=30.0)

    run(test)


def test_a_node_that_is_full_is_waited_for() -> None:
    async def test() -> None:
        server = AppServer(Backend(), LIMITS, ServerBounds(connections_max=1), port=0)
        async with trio.open_nursery() as nursery:
            url = f"ws://127.0.0.1:{await nursery.start(server.run)}"

            async def take_the_place(seconds: float, *, task_status: trio.TaskStatus[None]) -> None:
                async with gmco.connect([url]):
                    task_status.started()
                    await trio.sleep(seconds)

            await nursery.start(take_the_place, 2.0)
            begin = trio.current_time()
            with pytest.raises(gmco.Unavailable, match=r"it takes no connections now \(HTTP 503\)"):
                async with gmco.connect([url], timeout_s=1.0):
                    pass
            async with gmco.connect([url]) as client:
                await client.ping()
            assert trio.current_time() - begin > 1.5
            nursery.cancel_scope.cancel()

    run(test)
