"""Gossip of one node as an actor: the pure machine, and around it sockets, one timer and the keyring's file.

Time is `trio.current_time()`. The node owns the peer port's TCP listener and hands over streams that begin with `MAGIC`.
Nothing that comes over the network raises here; an error in the machine ends `run`, and whoever supervises runs it again
with the same machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import structlog
import trio

from gossip import keyfile
from gossip.cluster import Cluster
from gossip.codec import encode
from gossip.config import PACKET_BYTES_MAX, GossipConfig
from gossip.decoder import Decoded, decode
from gossip.drops import Drops
from gossip.effects import Effect, Event, Send
from gossip.errors import DroppedError
from gossip.exchange import MAGIC, Exchange, StreamLimits
from gossip.keyring import Keyring, KeyView
from gossip.machine import Machine
from gossip.member import MemberView
from gossip.messages import Ack, Address, Claim, Part
from gossip.paths import Paths
from gossip.replays import Replays
from gossip.seeds import Seeds
from gossip.streams import Streams, StreamStatistics
from gossip.udp import UdpSockets, UdpStatistics, own_address

__all__ = ["MAGIC", "Agent", "AgentStatistics"]

# How long a start waits for names to be looked up, and how often they are looked up later.
FIRST_SEEDS_S = 1.0
SEEDS_EVERY_S = 5.0
LEAVE_S = 1.0
TELL_THE_OLD_EVERY_S = 1.0
POLL_S = 0.01
# Rounds of draining before a timer: a flood may not keep the timer from coming.
DRAIN_ROUNDS = 16
log = structlog.get_logger(__name__)


class MachineFactory(Protocol):
    def __call__(
        self, config: GossipConfig, *, id: int, boot: int, address: Address, random: Random, now: float
    ) -> Machine: ...


class HostPort(Protocol):
    """Where to listen: a host's name or address, and a port."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


@dataclass(frozen=True, slots=True)
class AgentStatistics:
    """dropped: by the reasons of docs/gossip.md. oversized: our own packets that did not fit. by_stream: members that go
    over TCP because UDP does not reach them. machine: the machine's own counters."""

    udp: UdpStatistics
    streams: StreamStatistics
    dropped: dict[str, int]
    oversized: int
    by_stream: int
    watch_errors: int
    machine: dict[str, int]


class Agent:
    """`bind`, then `run`. Everything else may be called at any time after `bind`."""

    def __init__(
        self,
        config: GossipConfig,
        *,
        id: int,
        boot: int,
        keyring: Keyring,
        listen: HostPort,
        advertise: Address | None = None,
        seeds: Sequence[str] = (),
        random: Random,
        keys_path: Path | None = None,
        limits: StreamLimits | None = None,
        machine_factory: MachineFactory = Machine,
    ) -> None:
        """advertise: what others are to call this node; None: what `listen` and the way to the seeds say. seeds:
        "host:port" each. keys_path: where changed keys are kept; None: nowhere. Raises ValueError for a seed that is none."""
        self.config, self.id, self.boot = config, id, boot
        # Called with each event, in order, on the spot; what they raise is logged and goes no further.
        self.watch: list[Callable[[Event], None]] = []
        # Another process has our id and a higher boot: the node must stop.
        self.superseded = trio.Event()
        self.superseded_by = 0
        self.address: Address | None = None
        self._keyring, self._keys_path, self._keys_lock = keyring, keys_path, trio.Lock()
        self._listen, self._advertise, self._random = listen, advertise, random
        self._seeds = Seeds(seeds)
        self._factory = machine_factory
        self._machine: Machine | None = None
        self._started = False
        self._port: int | None = None
        self._timer = trio.CancelScope()
        self._udp = UdpSockets(self._on_datagram)
        self._streams = Streams(
            limits or StreamLimits(),
            seal=self._seal,
            on_packet=self._on_stream_packet,
            on_failed=self._on_stream_failed,
        )
        self._paths = Paths(config.udp, config.members_max)
        self._replays = Replays(config.members_max)
        self._drops = Drops()
        self.cluster = Cluster()
        self._oversized = self._watch_errors = 0
        self._told_the_old_at = float("-inf")

    # Life

    async def bind(self, port: int | None = None) -> Address:
        """Takes the UDP port (None: that of `listen`; the TCP listener's, so that one port is both) and returns the address
        that others are told. Raises OSError."""
        port = self._listen.port if port is None else port
        if self.config.udp != "off" and not self._udp.bound:
            port = await self._udp.bind(self._listen.host, port)
        self._port = port
        if self._machine is None:
            towards = next(iter(self._seeds.addresses), None)
            address = self._advertise or await own_address(self._listen.host, port, towards)
            self.address = address
            self._machine = self._factory(
                self.config,
                id=self.id,
                boot=self.boot,
                address=address,
                random=self._random,
                now=trio.current_time(),
            )
        assert self.address is not None
        return self.address

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Gossips until cancelled; binds first where that has not been done."""
        await self.bind(self._port)
        try:
            with trio.move_on_after(FIRST_SEEDS_S):
                await self._seeds.resolve()
            async with trio.open_nursery() as nursery:
                await nursery.start(self._streams.run)
                if not self._started:
                    self._started = True
                    self._apply(self._core.start(self._others(), trio.current_time()))
                nursery.start_soon(self._udp.run)
                nursery.start_soon(self._keep_time)
                if self._seeds.has_names:
                    nursery.start_soon(self._keep_seeds)
                task_status.started()
        finally:
            self._udp.close()

    async def leave(self) -> None:
        """Says good-bye to all, and waits at most a second until that is sent. `run` is the caller's to cancel."""
        self._apply(self._core.leave(trio.current_time()))
        with trio.move_on_after(LEAVE_S):
            while self._streams.pending:  # noqa: ASYNC110 - only at the end
                await trio.sleep(POLL_S)

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """An exchange that another node opened; its magic has been read. Raises nothing for the remote's sake."""
        await self._streams.serve(stream)

    @property
    def _core(self) -> Machine:
        assert self._machine is not None, "bind comes first"
        return self._machine

    async def _keep_time(self) -> None:
        """The one timer. What has arrived is handled before a timer that comes late: after a stall the answers that wait in
        the sockets are evidence, and the machine must have them before it concludes that none came."""
        while True:
            with trio.CancelScope(deadline=self._core.next_deadline) as self._timer:
                await trio.sleep_forever()
            if trio.current_time() - self._core.next_deadline > self.config.late_s:
                # Streams are read by their own tasks, which are awake by now.
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
            for _ in range(DRAIN_ROUNDS):
                if not self._udp.drain():
                    break
            now = trio.current_time()
            if now >= self._core.next_deadline:
                self._apply(self._core.on_timer(now))

    async def _keep_seeds(self) -> None:
        while True:
            await trio.sleep(SEEDS_EVERY_S)
            before = self._seeds.addresses
            if await self._seeds.resolve() != before:
                self._core.set_seeds(self._others())

    def _others(self) -> list[Address]:
        return [address for address in self._seeds.addresses if address != self.address]

    # What comes

    def _on_datagram(self, data: bytes, source: Address) -> None:
        now = trio.current_time()
        try:
            if len(data) > PACKET_BYTES_MAX:
                raise DroppedError("too_large")  # noqa: TRY301 - one place counts all reasons
            decoded = self._open(data, source, None)
        except DroppedError as dropped:
            self._drops.count(dropped.reason, source, now)
            return
        if self._paths and any(type(part) is Ack for part in decoded.parts):
            self._paths.on_udp_ack(source)
        self._apply(self._core.on_packet(decoded.sender, decoded.boot, source, decoded.parts, now))

    def _on_stream_packet(self, packet: bytes, exchange: Exchange) -> bool:
        now = trio.current_time()
        try:
            decoded = self._open(packet, exchange.address, exchange)
        except DroppedError as dropped:
            self._drops.count(dropped.reason, exchange.remote, now)
            # An old packet may be a slow one; anything else says that the peer is none of us, or broken.
            return dropped.reason in ("replayed", "old_boot", "other_cluster_id")
        exchange.proven = True
        if any(type(part) is Ack for part in decoded.parts) and self._paths.on_stream_ack(
            exchange.address, now
        ):
            log.warning("gossip_udp_blocked", member=str(exchange.address))
        effects = self._core.on_packet(decoded.sender, decoded.boot, exchange.address, decoded.parts, now)
        self._apply(effects, exchange)
        return True

    def _open(self, packet: bytes, source: Address, via: Exchange | None) -> Decoded:
        opened = self._keyring.open(packet)
        decoded = decode(opened.plain)
        if self.cluster.is_other(decoded.cluster):
            where = via.remote if via is not None else str(source)
            if self.cluster.note(where, trio.current_time()) and decoded.parts:
                # With nothing in it, so that it is not answered again.
                self._apply([Send(source, ())], via)
            raise DroppedError("other_cluster_id")
        try:
            self._replays.check(decoded.sender, decoded.boot, opened.session, opened.counter)
        except DroppedError as dropped:
            if dropped.reason == "old_boot":
                self._tell_the_old(decoded, source, via)
            raise
        return decoded

    def _tell_the_old(self, decoded: Decoded, source: Address, via: Exchange | None) -> None:
        """A process whose id has a higher boot by now would not hear of it: nobody calls its address any more. What it says
        is dropped, but it gets its successor's claim, at most once a second, for this may be a recording, too."""
        now = trio.current_time()
        if now < self._told_the_old_at + TELL_THE_OLD_EVERY_S:
            return
        self._told_the_old_at = now
        for member in self._core.members():
            if member.id == decoded.sender and member.boot > decoded.boot:
                claim = Claim(
                    member.id, member.boot, member.incarnation, member.state, member.address, self.id
                )
                self._apply([Send(source, (claim,))], via)

    def _on_stream_failed(self, address: Address, refused: bool) -> None:
        self._apply(self._core.on_stream_failed(address, refused, trio.current_time()))

    # What goes

    def _apply(self, effects: Sequence[Effect], via: Exchange | None = None) -> None:
        """Carries effects out in their order. via: the stream of the packet that they answer."""
        for effect in effects:
            if isinstance(effect, Send):
                if via is not None and effect.address == via.address:
                    via.send(effect.parts)
                else:
                    self._send(effect)
            elif isinstance(effect, Event):
                self._tell(effect)
            else:
                self._be_superseded(effect.boot)
        deadline = self._core.next_deadline
        # Only earlier: a timer that comes too early looks again and sleeps on, which is cheaper than moving it each time.
        if deadline < self._timer.deadline:
            self._timer.deadline = deadline

    def _send(self, effect: Send) -> None:
        address, parts, stream = effect
        if self._streams.answer(address, parts):
            return
        keep = self._paths.by_stream(address, trio.current_time())
        if keep or stream:
            self._streams.send(address, parts, keep=keep)
            return
        packet = self._seal(parts)
        if len(packet) > PACKET_BYTES_MAX:
            self._oversized += 1
            return
        self._udp.send(packet, address)

    def _seal(self, parts: Sequence[Part]) -> bytes:
        return self._keyring.seal(encode(self.id, self.boot, parts, self.cluster.tag))

    def _tell(self, event: Event) -> None:
        for watcher in self.watch:
            try:
                watcher(event)
            except Exception:
                self._watch_errors += 1
                log.exception("gossip_watcher_failed", event_kind=event.kind)

    def _be_superseded(self, boot: int) -> None:
        if not self.superseded.is_set():
            log.error("gossip_superseded", boot=self.boot, newer=boot)
        self.superseded_by = boot
        self.superseded.set()

    # For the node

    def members(self) -> list[MemberView]:
        """All but those who left, this node included, by id. Their times are `trio.current_time()`."""
        return self._core.members()

    def facts(self, id: int) -> Mapping[bytes, bytes]:
        return self._core.facts(id)

    def hot(self, id: int) -> bytes:
        return self._core.hot(id)

    def set_fact(self, key: bytes, value: bytes) -> None:
        """value empty: removes the key."""
        self._apply(self._core.set_fact(key, value, trio.current_time()))

    def set_hot(self, value: bytes) -> None:
        self._apply(self._core.set_hot(value, trio.current_time()))

    def set_address(self, address: Address) -> None:
        """What others are to call this node from now on."""
        self.address = address
        self._apply(self._core.set_address(address, trio.current_time()))

    def lost_link(self, id: int) -> None:
        """A connection to that member was reset: find out at once."""
        self._apply(self._core.on_link_lost(id, trio.current_time()))

    def forget(self, id: int) -> None:
        """An operator says that a down member will not come back."""
        self._apply(self._core.forget(id, trio.current_time()))

    def list_keys(self) -> list[KeyView]:
        return self._keyring.view()

    async def install_key(self, secret: bytes) -> str:
        """Returns its fingerprint. Raises KeyringError; OSError when it could not be kept, and then nothing has changed."""
        return str(await self._change_keys(self._keyring.install, secret))

    async def use_key(self, fingerprint: str) -> None:
        """As `install_key`."""
        await self._change_keys(self._keyring.use, fingerprint)

    async def remove_key(self, fingerprint: str) -> None:
        """As `install_key`."""
        await self._change_keys(self._keyring.remove, fingerprint)

    async def _change_keys(self, change: Callable[[Any], Any], argument: object) -> Any:
        async with self._keys_lock:
            before = self._keyring.secrets()
            result = change(argument)
            if self._keys_path is not None:
                try:
                    await trio.to_thread.run_sync(keyfile.save, self._keys_path, self._keyring.secrets())
                except BaseException:
                    self._keyring.restore(before)
                    raise
            return result

    def statistics(self) -> AgentStatistics:
        return AgentStatistics(
            udp=self._udp.statistics(),
            streams=self._streams.statistics(),
            dropped={str(reason): count for reason, count in self._drops.counts.items()},
            oversized=self._oversized,
            by_stream=len(self._paths.blocked(trio.current_time())),
            watch_errors=self._watch_errors,
            machine=self._core.statistics(),
        )
