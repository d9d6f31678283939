"""Two ends of a peer link over real sockets, for the tests beside this file."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, ParamSpec

import trio

from node.config import Address
from node.peerlink import (
    Handler,
    Hello,
    PeerLimits,
    PeerLink,
    PeerListener,
)
from router.ports import Asked, Done, Outcome

P = ParamSpec("P")
ANY = Address("127.0.0.1", 0)
SMALL = PeerLimits(frame_bytes=100_000, queue_bytes=300_000, requests_in_flight=8)
QUICK = PeerLimits(heartbeat_s=0.1, silence_s=0.4)


def hello(node: str, **changes: Any) -> Hello:
    return dataclasses.replace(
        Hello(cluster="c", node=node, shard_count=12, dim=8, metric="cosine", boot=1), **changes
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
    bulk: Callable[[trio.abc.Stream], Awaitable[None]] | None = None,
) -> AsyncIterator[tuple[PeerLink, PeerListener]]:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            listener = PeerListener(
                handlers, theirs or hello("b"), listen=ANY, limits=listener_limits or limits, bulk=bulk
            )
            address = await nursery.start(listener.run)
            link = PeerLink(lambda: address, mine or hello("a"), limits=limits, jitter=random.Random(1))
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


async def answer(ask: Callable[[Done[Any]], Asked]) -> Any:
    """What a node answers that is asked with a callback."""
    came = trio.Event()
    results: list[Outcome[Any]] = []

    def done(result: Outcome[Any]) -> None:
        results.append(result)
        came.set()

    ask(done)
    with trio.fail_after(5):
        await came.wait()
    return results[0].unwrap()
