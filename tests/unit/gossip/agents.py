"""Agents on real sockets of this host, with a machine that tells the test what it was told."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any, NamedTuple, ParamSpec

import trio

from gossip.agent import MAGIC, Agent
from gossip.config import GossipConfig
from gossip.effects import Effect, Event, Send
from gossip.keyring import Keyring
from gossip.messages import Ack, Address, Fact, Join, Part, Ping

P = ParamSpec("P")
KEY = b"k" * 32


class Packet(NamedTuple):
    sender: int
    boot: int
    source: Address
    parts: tuple[Part, ...]
    now: float


class Listener:
    """A machine that answers pings, and a join with a hundred large facts; everything else it writes down."""

    def __init__(
        self, config: GossipConfig, *, id: int, boot: int, address: Address, random: Random, now: float
    ) -> None:
        self.id, self.boot, self.address = id, boot, address
        self.packets: list[Packet] = []
        self.timers: list[float] = []
        self.failures: list[tuple[Address, bool]] = []
        self.seeds: list[list[Address]] = []
        self.lost: list[int] = []
        # What happened, in order: for the tests of that.
        self.order: list[str] = []
        self.next_deadline = float("inf")
        self.answers = True

    def start(self, seeds: Sequence[Address], now: float) -> list[Effect]:
        self.seeds.append(list(seeds))
        return []

    def set_seeds(self, seeds: Sequence[Address]) -> None:
        self.seeds.append(list(seeds))

    def on_timer(self, now: float) -> list[Effect]:
        self.timers.append(now)
        self.order.append("timer")
        self.next_deadline = float("inf")
        return []

    def on_packet(
        self, sender: int, boot: int, source: Address, parts: Sequence[Part], now: float
    ) -> list[Effect]:
        self.packets.append(Packet(sender, boot, source, tuple(parts), now))
        self.order.append("packet")
        effects: list[Effect] = []
        for part in parts if self.answers else ():
            if isinstance(part, Ping):
                effects.append(Send(source, (Ack(part.seq),)))
            elif isinstance(part, Join):
                facts = tuple(Fact(self.id, self.boot, n, b"n", bytes(900)) for n in range(100))
                effects.append(Send(source, facts, stream=True))
        return effects

    def on_stream_failed(self, address: Address, refused: bool, now: float) -> list[Effect]:
        self.failures.append((address, refused))
        return []

    def on_link_lost(self, id: int, now: float) -> list[Effect]:
        self.lost.append(id)
        return []

    def set_fact(self, key: bytes, value: bytes, now: float) -> list[Effect]:
        return [Event("fact", self.id, now, self.boot, 0, key=key)]

    def leave(self, now: float) -> list[Effect]:
        return []

    def members(self) -> list[Any]:
        return []

    def facts(self, id: int) -> Mapping[bytes, bytes]:
        return {}

    def statistics(self) -> dict[str, int]:
        return {}

    @property
    def parts(self) -> list[Part]:
        """All parts that came, in order."""
        return [part for packet in self.packets for part in packet.parts]


class Host:
    """One node's agent and its peer port."""

    def __init__(self, agent: Agent, address: Address) -> None:
        self.agent, self.address = agent, address
        self.machine: Any = agent._machine

    def send(self, to: Address, *parts: Part, stream: bool = False) -> None:
        """As if the machine wanted it."""
        self.agent._apply([Send(to, parts, stream)])


async def serve(agent: Agent, stream: trio.SocketStream) -> None:
    """What the node's listener does."""
    seen = b""
    try:
        while len(seen) < len(MAGIC):
            chunk = await stream.receive_some(len(MAGIC) - len(seen))
            seen += bytes(chunk)
            if not chunk or not MAGIC.startswith(seen):
                await trio.aclose_forcefully(stream)
                return
    except trio.BrokenResourceError:
        return
    await agent.serve_stream(stream)


@asynccontextmanager
async def host(
    id: int,
    *,
    listen: str = "127.0.0.1",
    cluster: str = "films",
    keys: Sequence[bytes | None] = (KEY,),
    boot: int = 1,
    udp: Any = "auto",
    machine: Any = Listener,
    config: GossipConfig | None = None,
    **more: Any,
) -> AsyncIterator[Host]:
    """Port and agent until the block ends; abruptly then, as a killed process ends."""
    random = Random(id)
    listeners = await trio.open_tcp_listeners(0, host=listen)
    port = listeners[0].socket.getsockname()[1]
    agent = Agent(
        config or GossipConfig(udp=udp),
        id=id,
        boot=boot,
        keyring=Keyring(cluster, keys, random_bytes=random.randbytes),
        listen=Address(listen, port),
        random=random,
        machine_factory=machine,
        **more,
    )
    address = await agent.bind(port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, functools.partial(serve, agent), listeners)
        await nursery.start(agent.run)
        yield Host(agent, address)
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    """Returns when the condition holds; fails when it does not within `seconds`."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.005)


def on_trio(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Runs an async test, with a time limit."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def limited() -> None:
            with trio.fail_after(60):
                await test(*args, **kwargs)

        trio.run(limited)

    return run
