"""Whole clusters of pure machines in virtual time, on a network that loses, delays, repeats and cuts.

One seed decides everything, so a run that fails is repeated exactly by its seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from gossip.codec import CLUSTER_PART_BYTES, SEAL_BYTES, STREAM_PARTS_BYTES_MAX, encode, size_of, split
from gossip.config import PACKET_BYTES_MAX, GossipConfig
from gossip.decoder import decode
from gossip.effects import Event, Send, Superseded
from gossip.machine import Machine
from gossip.messages import Address, Claim, Part, State

# Envelope, tag, versions, sender, a boot of one byte and the cluster: docs/gossip.md.
PACKET_OVERHEAD = 1 + 1 + 1 + 4 + 8 + 4 + 16 + 2 + 8 + 1 + CLUSTER_PART_BYTES
SOCKET_BUFFER_PACKETS = 4_000
CONNECT_TIMEOUT_S = 3.0


class AnyMachine(Protocol):
    """What the simulator needs of a machine; the model of memberlist has it too."""

    @property
    def next_deadline(self) -> float: ...
    def start(self, seeds: Sequence[Address], now: float) -> list[Any]: ...
    def on_timer(self, now: float) -> list[Any]: ...
    def on_packet(self, sender: int, boot: int, source: Address, parts: Any, now: float) -> list[Any]: ...
    def on_stream_failed(self, address: Address, refused: bool, now: float) -> list[Any]: ...


@dataclass(slots=True, eq=False)
class Host:
    """One simulated node: its machine while its process lives."""

    index: int
    id: int
    address: Address
    boot: int = 1
    machine: AnyMachine | None = None
    # False: no process. `dark`: the whole host is gone, so nobody refuses connections either.
    running: bool = False
    dark: bool = False
    stalled_until: float = 0.0
    waiting: list[tuple[Any, ...]] = field(default_factory=list)
    timer_at: float = float("inf")
    clock_offset: float = 0.0
    bytes_out: int = 0
    packets_out: int = 0
    superseded: bool = False


@dataclass
class Network:
    """Latencies in seconds; `cut(a, b)`: nothing gets from host a to host b (one way)."""

    loss: float = 0.0
    duplicate: float = 0.0
    latency_s: tuple[float, float] = (0.0002, 0.002)
    cut: Callable[[Host, Host], bool] | None = None


Maker = Callable[[Host, Random, float], AnyMachine]


def machine_maker(config: GossipConfig) -> Maker:
    def make(host: Host, random: Random, now: float) -> Machine:
        return Machine(config, id=host.id, boot=host.boot, address=host.address, random=random, now=now)

    return make


class Cluster:
    """Hosts, the network between them, and one clock."""

    def __init__(
        self,
        count: int,
        seed: int,
        *,
        network: Network | None = None,
        make: Maker | None = None,
        on_event: Callable[[Host, Event, float], None] | None = None,
        measure_bytes: bool = True,
        through_codec: bool = False,
    ) -> None:
        """`through_codec`: every packet is written and read as bytes, as on a wire; slower."""
        self._measure_bytes, self._through_codec = measure_bytes, through_codec
        self.random = Random(seed)
        self.seed = seed
        self.now = 0.0
        self.network = network or Network()
        self.make = make or machine_maker(GossipConfig())
        self.on_event = on_event
        self.handled = 0
        self._heap: list[tuple[float, int, str, Any]] = []
        self._count = 0
        ids = self.random.sample(range(1, 1 << 63), count)
        self.hosts = [
            Host(i, ids[i], Address(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", 7402)) for i in range(count)
        ]
        self.by_id = {host.id: host for host in self.hosts}
        self._by_address = {host.address: host for host in self.hosts}

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, until: float) -> None:
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, kind, what = pop(heap)
            if kind == "timer":
                self._on_timer(what)
            elif kind == "packet":
                self._arrive(*what)
            else:
                what()
        self.now = until

    def run_until(self, holds: Callable[[], bool], limit: float, step: float = 0.05) -> float:
        """When `holds` became true. Raises AssertionError, with the seed, when it did not before `limit`."""
        while not holds():
            assert self.now < limit, f"not reached by {limit} s (seed {self.seed})"
            self.run(self.now + step)
        return self.now

    def at(self, when: float, do: Callable[[], None]) -> None:
        self._push(when, "call", do)

    def _push(self, when: float, kind: str, what: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, kind, what))

    # -- hosts ----------------------------------------------------------------------------------------------------

    def start(self, host: Host, seeds: Iterable[Address] = ()) -> None:
        machine = self.make(host, Random(self.random.getrandbits(64)), self._clock(host))
        host.machine, host.running, host.dark, host.timer_at = machine, True, False, float("inf")
        host.waiting.clear()
        self._do(host, machine.start(list(seeds), self._clock(host)))

    def start_all(self, seeds: int = 1, within_s: float = 0.0) -> None:
        addresses = [host.address for host in self.hosts[:seeds]]
        for host in self.hosts:
            self.at(self.now + self.random.random() * within_s, lambda host=host: self.start(host, addresses))  # type: ignore[misc]

    def warm(self) -> None:
        """All hosts, each knowing all others already and with nothing to tell: a cluster that has been up for long."""
        claims = [Claim(h.id, h.boot, 0, State.ALIVE, h.address, h.id) for h in self.hosts]
        keep, self.on_event = self.on_event, None
        for host in self.hosts:
            self.start(host)
            machine = host.machine
            assert isinstance(machine, Machine)
            for claim in claims:
                machine._table.on_claim(claim, self.now)
            machine._claims.__init__()  # type: ignore[misc]
            machine._effects(self.now)
        self.on_event = keep

    def crash(self, host: Host, *, dark: bool = True) -> None:
        host.running, host.dark, host.machine = False, dark, None
        host.timer_at = float("inf")

    def restart(self, host: Host, seeds: Iterable[Address] = (), *, address: Address | None = None) -> None:
        host.boot += 1
        if address is not None:
            del self._by_address[host.address]
            host.address = address
            self._by_address[address] = host
        self.start(host, seeds)

    def stall(self, host: Host, seconds: float) -> None:
        """The process stands still; packets wait in its socket."""
        host.stalled_until = self.now + seconds
        self._push(host.stalled_until, "call", lambda: self._resume(host))

    def jump_clock(self, host: Host, seconds: float) -> None:
        """As when a virtual machine was paused: its own clock leaps ahead."""
        host.clock_offset += seconds
        if host.running:
            self._schedule(host)

    def _clock(self, host: Host) -> float:
        return self.now + host.clock_offset

    def call(self, host: Host, what: Callable[[Any, float], list[Any]]) -> None:
        """An event of the host's own: `what(machine, now)` returns effects."""
        assert host.machine is not None
        self._do(host, what(host.machine, self._clock(host)))

    def _resume(self, host: Host) -> None:
        if not host.running or self.now < host.stalled_until:
            return
        waiting, host.waiting = host.waiting, []
        for packet in waiting:  # what waits in the socket comes before timers that are late
            self._hand_over(host, *packet)
        self._fire(host)

    def _on_timer(self, what: tuple[Host, float]) -> None:
        host, when = what
        if host.running and host.timer_at == when:
            host.timer_at = float("inf")
            if self.now < host.stalled_until:
                return  # _resume will
            self._fire(host)

    def _fire(self, host: Host) -> None:
        assert host.machine is not None
        self.handled += 1
        self._do(host, host.machine.on_timer(self._clock(host)))

    def _schedule(self, host: Host) -> None:
        assert host.machine is not None
        when = max(self.now, host.machine.next_deadline - host.clock_offset)
        if when < host.timer_at:
            host.timer_at = when
            self._push(when, "timer", (host, when))

    # -- the network ----------------------------------------------------------------------------------------------

    def _do(self, host: Host, effects: Iterable[Any]) -> None:
        for effect in effects:
            if type(effect) is Send:
                if effect.stream or effect.address.host.startswith("stream-"):
                    self._send_stream(host, effect)
                else:
                    self._send(host, effect)
            elif isinstance(effect, Superseded):
                host.superseded = True
            elif self.on_event is not None:
                self.on_event(host, effect, self.now)
        if host.running:
            self._schedule(host)

    def _send(self, host: Host, send: Send) -> None:
        host.packets_out += 1
        if self._measure_bytes:
            host.bytes_out += PACKET_OVERHEAD + sum(map(size_of, send.parts))
        target = self._by_address.get(send.address)
        network, random = self.network, self.random.random
        if target is None or (network.cut is not None and network.cut(host, target)):
            return
        low, high = network.latency_s
        if self._through_codec:
            send = send._replace(parts=self._recoded(host, send.parts))
        packet = (target, host.id, host.boot, host.address, send.parts)
        for _ in range(2 if network.duplicate and random() < network.duplicate else 1):
            if random() >= network.loss:
                self._push(self.now + low + random() * (high - low), "packet", packet)

    def _send_stream(self, host: Host, send: Send) -> None:
        """TCP: three ways before the first byte arrives; a lost segment is sent again after 1 s (handshake) or 0.2 s."""
        network, random = self.network, self.random.random
        reply = send.address.host.startswith("stream-")
        target = self.hosts[send.address.port] if reply else self._by_address.get(send.address)
        cut = network.cut
        if target is None or target.dark or (cut is not None and (cut(host, target) or cut(target, host))):
            self._fail_later(host, send.address, CONNECT_TIMEOUT_S, refused=False)
            return
        delay = 0.0
        for resend_s in (0.2,) if reply else (1.0, 1.0, 0.2):
            delay += network.latency_s[0] + random() * (network.latency_s[1] - network.latency_s[0])
            while random() < network.loss:
                delay += resend_s
                resend_s *= 2
        if delay > CONNECT_TIMEOUT_S:
            self._fail_later(host, send.address, CONNECT_TIMEOUT_S, refused=False)
        elif not target.running:
            self._fail_later(host, send.address, delay, refused=True)
        else:
            source = Address(f"stream-{host.id}", host.index)
            parts = send.parts
            if self._through_codec:
                packets = split(parts, STREAM_PARTS_BYTES_MAX)
                parts = tuple(
                    part for some in packets for part in decode(encode(host.id, host.boot, some)).parts
                )
                assert parts == send.parts
            self._push(self.now + delay, "packet", (target, host.id, host.boot, source, parts))

    def _recoded(self, host: Host, parts: Sequence[Part]) -> tuple[Part, ...]:
        plain = encode(host.id, host.boot, parts)
        assert len(plain) + SEAL_BYTES <= PACKET_BYTES_MAX
        read = tuple(decode(plain).parts)
        assert read == tuple(parts)
        return read

    def _fail_later(self, host: Host, address: Address, delay: float, *, refused: bool) -> None:
        boot = host.boot

        def fail() -> None:
            if host.running and host.boot == boot and self.now >= host.stalled_until:
                assert host.machine is not None
                self._do(host, host.machine.on_stream_failed(address, refused, self._clock(host)))

        self.at(self.now + delay, fail)

    def _arrive(self, target: Host, *packet: Any) -> None:
        if not target.running:
            return
        if self.now < target.stalled_until:
            if len(target.waiting) < SOCKET_BUFFER_PACKETS:
                target.waiting.append(packet)
            return
        self._hand_over(target, *packet)

    def _hand_over(self, target: Host, sender: int, boot: int, source: Address, parts: Any) -> None:
        assert target.machine is not None
        self.handled += 1
        self._do(target, target.machine.on_packet(sender, boot, source, parts, self._clock(target)))

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def running(self) -> list[Host]:
        return [host for host in self.hosts if host.running]

    def state(self, observer: Host, subject: Host) -> State | None:
        assert isinstance(observer.machine, Machine)
        return observer.machine.member_state(subject.id)

    def all_see(self, subject: Host, state: State) -> bool:
        return all(self.state(host, subject) == state for host in self.running if host is not subject)

    def converged(self) -> bool:
        """Everybody who runs sees everybody who runs as alive, under its present boot and address."""
        want = {(h.id, h.boot, h.address) for h in self.running}
        for host in self.running:
            assert isinstance(host.machine, Machine)
            seen = {(m.id, m.boot, m.address) for m in host.machine.members() if m.state is State.ALIVE}
            if seen != want:
                return False
        return True
