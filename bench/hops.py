"""What moving a message costs: peer-link calls, thread hops, mailbox asks. `python -m bench.hops [--quick]`

Both ends of the peer link run in this one process, so a figure holds the CPU of both.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import structlog
import trio

from bench.harness import arguments, figure
from node.actor import Mailbox
from node.blocking import DedicatedThread, ThreadRunner
from node.config import Address
from node.peerlink import Hello, PeerLink, PeerListener

BODY = [1, 2, b"x" * 200, "abc"]


async def cpu_us(ask: Callable[[], Awaitable[Any]], count: int, at_once: int) -> float:
    """CPU microseconds of the whole process per call, `at_once` of them in flight."""

    async def some() -> None:
        for _ in range(count // at_once):
            await ask()

    began = time.process_time()
    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(some)
    return (time.process_time() - began) / count * 1e6


async def echo_later(peer: str, body: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return body


async def peer_link(count: int) -> None:
    def hello(node: str) -> Hello:
        return Hello(cluster="bench", node=node, shard_count=12, dim=8, metric="dot")

    async with trio.open_nursery() as nursery:
        handlers = {"sync": lambda peer, body: body, "async": echo_later}
        listener = PeerListener(handlers, hello("b"), listen=Address("127.0.0.1", 0))
        address = await nursery.start(listener.run)
        link = PeerLink(lambda: address, hello("a"))
        await nursery.start(link.run)
        await link.wait_connected()
        for op in handlers:
            for at_once in (1, 32, 256):
                us = await cpu_us(partial(link.call, op, BODY, 5.0), count, at_once)
                target = "at most 40 pipelined" if at_once > 1 else "none: nothing to join"
                figure(
                    f"peer_call_{op}_{at_once}",
                    us,
                    "us CPU",
                    peer=None,
                    peer_value=None,
                    target=target,
                    n=count,
                )
        nursery.cancel_scope.cancel()


async def hops(count: int) -> None:
    pool = ThreadRunner()
    async with DedicatedThread() as thread:
        pooled = await cpu_us(lambda: pool(abs, 1), count, 1)
        dedicated = await cpu_us(lambda: thread(abs, 1), count, 1)
    figure(
        "thread_hop", dedicated, "us CPU", peer="trio.to_thread", peer_value=pooled, target="below 1", n=count
    )


async def asks(count: int) -> None:
    box: Mailbox[int] = Mailbox("bench")
    box.open()

    async def answer() -> None:
        while True:
            for letter in await box.receive_many(100):
                letter.reply(letter.message)

    send, receive = trio.open_memory_channel[int](1)

    async def drain() -> None:
        async for _ in receive:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        nursery.start_soon(drain)
        ours = await cpu_us(lambda: box.ask(1), count, 32)
        channel = await cpu_us(lambda: send.send(1), count, 32)
        nursery.cancel_scope.cancel()
    figure("mailbox_ask", ours, "us CPU", peer="channel hop", peer_value=channel, target="at most 2", n=count)


async def main() -> None:
    count = 3_000 if arguments("Cost of moving a message.").quick else 30_000
    await peer_link(count)
    await hops(count)
    await asks(count)


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    trio.run(main)
