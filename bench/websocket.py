"""`ping` over one WebSocket connection, pipelined, against a bare trio-websocket echo of the same frames.

The client runs in a process of its own and speaks to both servers with the same code; runs alternate.

    python -m bench.websocket [--quick]
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection as Pipe

import msgpack
import trio
from trio_websocket import (
    ConnectionClosed,
    WebSocketConnection,
    WebSocketRequest,
    open_websocket_url,
    serve_websocket,
)

from bench.harness import arguments, figure, interleaved, say
from node.server import AppServer, Connection
from router.errors import RequestError
from router.requests import Limits, Request
from router.wire import Reply

DEPTH = 64
FRAMED = 32
RUNS = 9
RECEIVE_BYTES = 64 << 10


def _refuse(request: Request, connection: Connection) -> Reply:
    raise RequestError("internal", "this bench only pings")


async def _serve(pipe: Pipe) -> None:
    """Our server and the echo in one process, so that both have the same memory, cores and luck."""

    async def echo(request: WebSocketRequest) -> None:
        ws = await request.accept()
        try:
            while True:
                await ws.send_message(await ws.get_message())
        except ConnectionClosed:
            pass

    server = AppServer(_refuse, Limits(dim=16), port=0)
    async with trio.open_nursery() as nursery:
        ours = await nursery.start(server.run)
        bare = await nursery.start(serve_echo, echo)
        pipe.send((ours, bare))
        await trio.to_thread.run_sync(pipe.recv)
        nursery.cancel_scope.cancel()


async def serve_echo(
    echo: Callable[[WebSocketRequest], Awaitable[None]], *, task_status: trio.TaskStatus[int]
) -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            lambda task_status: serve_websocket(
                echo, "127.0.0.1", 0, None, receive_buffer_size=RECEIVE_BYTES, task_status=task_status
            )
        )
        task_status.started(server.port)


def _server(pipe: Pipe) -> None:
    trio.run(_serve, pipe)


async def _measure(port: int, framed: int, seconds: float) -> float:
    """Requests per second: `framed` requests to a frame, so many frames that DEPTH requests or more are in flight."""
    frames = max(DEPTH // framed, 4)
    async with open_websocket_url(
        f"ws://127.0.0.1:{port}", message_queue_size=16, receive_buffer_size=RECEIVE_BYTES
    ) as ws:
        await _exchange(ws, framed, frames, min(0.3, seconds))
        return await _exchange(ws, framed, frames, seconds)


async def _exchange(ws: WebSocketConnection, framed: int, frames: int, seconds: float) -> float:
    in_flight = answered = sent = 0
    sending = True
    answered_some = trio.Event()

    async def send() -> None:
        nonlocal in_flight, sent, sending, answered_some
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            while in_flight > (frames - 1) * framed:
                await answered_some.wait()
            requests = [{"id": sent + i, "op": "ping"} for i in range(framed)]
            in_flight += framed
            sent += framed
            await ws.send_message(msgpack.packb(requests[0] if framed == 1 else requests))
        sending = False

    begin = time.perf_counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while sending or in_flight:
            reply = msgpack.unpackb(await ws.get_message())
            replies = reply if isinstance(reply, list) else [reply]
            assert not any("error" in one for one in replies), replies
            count = len(replies)
            in_flight -= count
            answered += count
            answered_some.set()
            answered_some = trio.Event()
        nursery.cancel_scope.cancel()
    return answered / (time.perf_counter() - begin)


def main() -> None:
    options = arguments(__doc__ or "")
    seconds = 1.0 if options.quick else 2.0
    runs = 5 if options.quick else RUNS
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_server, args=(theirs,), daemon=True)
    process.start()
    ours_port, echo_port = pipe.recv()
    targets = {
        "single": (1, "≥ 0.8 × the echo's"),
        f"framed{FRAMED}": (FRAMED, "≥ 3 × the echo's single requests"),
    }
    for name, (framed, target) in targets.items():
        if options.only and options.only not in f"websocket.{name}":
            continue
        say(f"websocket.{name}: {runs} runs of {seconds} s each, and as many of the echo")
        ours, echo = interleaved(
            lambda framed=framed: trio.run(_measure, ours_port, framed, seconds),  # type: ignore[misc]
            lambda: trio.run(_measure, echo_port, 1, seconds),
            runs,
        )
        peer = "bare trio-websocket echo, one request in a frame"
        figure(f"websocket.{name}", ours, "requests/s", peer=peer, peer_value=echo, target=target, n=runs)
    pipe.send(None)
    process.join()


if __name__ == "__main__":
    main()
